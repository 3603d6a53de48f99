"""The nearest block-structured weight to a dense one, plainly or under the Gram of its inputs.

A BlockDense weight is U_j V_j on the input columns c_j of block j; a BlockShuffle weight is the same for every B-th row
by itself. So both are low-rank approximations of column blocks, of which all rows of a class share the inputs.
Source of the structures: arXiv 2406.16450; the projection under a whole Gram is derived here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.compressors.whitening import checked_gram, checked_weight, damped_cholesky
from llmcompress.errors import InputError
from llmcompress.layers.block import (
    block_dense_weight,
    block_shuffle_weight,
    check_block_dense,
    check_block_shuffle,
    check_divides,
)


@dataclass(frozen=True)
class BlockFactors:
    """V (B, h, d_in / B); U (d_out, B h) of a BlockDense, (B, d_out / B, h) of a BlockShuffle layer; float64.

    repair: what had to be done to the Gram first, one line, or None.
    """

    V: Tensor
    U: Tensor
    repair: str | None = None

    def to_dense(self) -> Tensor:
        """The approximation, (d_out, d_in)."""
        return block_dense_weight(self.V, self.U) if self.U.ndim == 2 else block_shuffle_weight(self.V, self.U)


def project_block_dense(
    weight: Tensor, rank: int, num_blocks: int, gram: Tensor | None = None, sweeps: int = 0
) -> BlockFactors:
    """The BlockDense weight nearest to `weight` (d_out, d_in): one truncated SVD a column block, of rank / num_blocks.

    That is the optimum in the Frobenius norm. With gram (d_in, d_in) = Xᵀ X, each block is the optimum for its own
    inputs; `sweeps` then goes through the blocks as often, each made the optimum given the others, so that the output
    error never rises. float64. InputError for sizes that do not fit, non-finite weights or Grams, negative sweeps.
    """
    weight = checked_weight(weight)
    check_block_dense(weight.shape[1], weight.shape[0], rank, num_blocks)
    space = _space(weight, num_blocks, gram)
    left, right = _fit(weight[None], rank // num_blocks, num_blocks, space, sweeps)
    return BlockFactors(right[0], _joined(left)[0], space.repair if space else None)


def project_block_shuffle(
    weight: Tensor, num_blocks: int, inner: int, gram: Tensor | None = None, sweeps: int = 0
) -> BlockFactors:
    """The BlockShuffle weight nearest to `weight` (d_out, d_in): truncated SVDs of its B² strided blocks.

    inner: a multiple of num_blocks = B; each block W[l::B, c_k] keeps rank inner / B. For the rest see
    `project_block_dense`.
    """
    weight = checked_weight(weight)
    (d_out, d_in), B = weight.shape, num_blocks
    check_block_shuffle(d_in, d_out, B, inner)
    space = _space(weight, B, gram)
    left, right = _fit(_classes(weight, B), inner // B, B, space, sweeps)
    V = right.permute(1, 2, 0, 3).reshape(B, inner, d_in // B)
    return BlockFactors(V, _joined(left), space.repair if space else None)


def block_dense_spectrum(weight: Tensor, num_blocks: int, gram: Tensor | None = None) -> Tensor:
    """What `project_block_dense` drops with each step of the rank, as one singular value (d,), descending, float64."""
    weight = checked_weight(weight)
    check_divides(num_blocks, weight.shape[1])
    return _spectrum(weight[None], num_blocks, _space(weight, num_blocks, gram))


def block_shuffle_spectrum(weight: Tensor, num_blocks: int, gram: Tensor | None = None) -> Tensor:
    """The same of `project_block_shuffle` and its `inner`."""
    weight = checked_weight(weight)
    check_divides(num_blocks, *weight.shape)
    return _spectrum(_classes(weight, num_blocks), num_blocks, _space(weight, num_blocks, gram))


def relative_output_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """||X (W - W~)||_F / ||X W||_F with gram = Xᵀ X; all float64, weights (d_out, d_in). 0 where nothing comes out."""
    missed = weight - approximation
    total = float(((weight @ gram) * weight).sum())
    return (max(0.0, float(((missed @ gram) * missed).sum())) / total) ** 0.5 if total > 0 else 0.0


# --- the fit ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Space:
    """gram = upperᵀ upper; upper[:, c_j] = basis_j corner_j: (d_in, d_in), (B, d_in, p), (B, p, p) upper triangular."""

    upper: Tensor
    basis: Tensor
    corner: Tensor
    repair: str | None


def _space(weight: Tensor, num_blocks: int, gram: Tensor | None) -> _Space | None:
    if gram is None:
        return None
    upper, repair = damped_cholesky(checked_gram(gram, weight))
    basis, corner = torch.linalg.qr(upper.view(len(upper), num_blocks, -1).transpose(0, 1))
    return _Space(upper, basis, corner, repair)


def _classes(weight: Tensor, B: int) -> Tensor:
    """(B, d_out / B, d_in): class l has rows l, l + B, ..."""
    return weight.view(-1, B, weight.shape[1]).transpose(0, 1)


def _blocks(rows: Tensor, num_blocks: int, space: _Space | None) -> Tensor:
    """The column blocks of rows (C, n, d_in), whitened each by itself: (C, B, n, p)."""
    blocks = rows.unflatten(2, (num_blocks, -1)).transpose(1, 2)
    return blocks if space is None else blocks @ space.corner.mT


def _spectrum(rows: Tensor, num_blocks: int, space: _Space | None) -> Tensor:
    values = torch.linalg.svdvals(_blocks(rows, num_blocks, space))
    return values.flatten(0, 1).square().sum(0).sqrt()


def _fit(rows: Tensor, rank: int, num_blocks: int, space: _Space | None, sweeps: int) -> tuple[Tensor, Tensor]:
    """left (C, B, n, rank) and right (C, B, rank, p) of every class of rows (C, n, d_in) and column block."""
    if sweeps < 0:
        raise InputError(f"sweeps: must not be negative; got {sweeps}")
    left, right = _truncated(_blocks(rows, num_blocks, space), rank)
    if space is None:
        return left, right
    residual = rows @ space.upper.T - torch.einsum("cjnr,cjrp,jdp->cnd", left, right, space.basis)
    for _ in range(sweeps):
        for j, basis in enumerate(space.basis):
            own = residual @ basis + left[:, j] @ right[:, j]
            residual = residual + left[:, j] @ right[:, j] @ basis.T
            left[:, j], right[:, j] = _truncated(own, rank)
            residual = residual - left[:, j] @ right[:, j] @ basis.T
    return left, torch.linalg.solve_triangular(space.corner.mT, right, upper=False, left=False)


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors (..., n, rank) and (..., rank, p), of equal size, of a stack of matrices."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[..., :rank].sqrt()
    return u[..., :rank] * root[..., None, :], root[..., None] * vh[..., :rank, :]


def _joined(left: Tensor) -> Tensor:
    """(C, B, n, rank) -> (C, n, B rank)"""
    return left.transpose(1, 2).flatten(2)
