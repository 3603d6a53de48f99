"""Sparse dictionaries refined under a Kronecker-factored loss: errors of different outputs count together.

With Y = R Wᵀ (Rᵀ R the input Gram) and H the Gram of the output gradients, the second-order loss of W ≈ D S is
tr(E H Eᵀ), E = Y - D S. The diagonal of H alone leaves a problem that is separate for every column of S, on which a
dictionary is learnt first; here the whole of H is taken, which couples the columns. Source of the loss: K-FAC, arXiv
1503.05671; the alternation is this project's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmcompress.compressors.dictionary_learning import DictionaryFactors
from llmcompress.compressors.hard_thresholding import entries, largest

STEPS = 4  # of conjugate gradients a round
RIDGE = 1e-5  # of the mean diagonal, on the change of the dictionary
ROUNDS = 3
TOLERANCE = 1e-2


def refine(
    y: Tensor,
    factors: DictionaryFactors,
    output_grams: Sequence[Tensor],
    rounds: int = ROUNDS,
    tolerance: float = TOLERANCE,
) -> DictionaryFactors:
    """Lowers tr((y - D S) H (y - D S)ᵀ) from the given factors on; it never rises.

    y (d_in, d_out) float32 or float64; output_grams: the diagonal blocks of H, (d_out_i, d_out_i), from the first
    column of y on, best scaled to a unit diagonal, since conjugate gradients are not preconditioned. A round updates D
    by least squares, then moves the supports along the gradient and refits all values at once; the last is the one
    that gains less than `tolerance`, relative. `history` is sqrt(loss / loss without factors), from the start on.
    """
    loss = _Loss(y, [gram.to(y) for gram in output_grams])
    codes = y.new_zeros(y.shape[1], factors.dictionary.shape[1]).scatter_(1, factors.indices, factors.values)
    support = torch.zeros_like(codes).scatter_(1, factors.indices, 1.0)
    sparsity = factors.indices.shape[1]
    found = loss.of(factors.dictionary, codes, loss.weighted(codes), support)
    losses = [found.loss]
    for _ in range(rounds):
        found = _update_codes(loss, _update_dictionary(loss, found), sparsity)
        losses.append(found.loss)
        if losses[-2] - found.loss < tolerance * losses[-2]:
            break
    indices, values = entries(found.codes, found.support, sparsity)
    total = float((loss.target * y.T).sum(dtype=torch.float64))
    history = [math.sqrt(max(value, 0.0) / total) if total > 0 else 0.0 for value in losses]
    return replace(factors, dictionary=found.dictionary, indices=indices, values=values, history=history)


def refinement_operations(d_in: int, d_outs: Sequence[int], k: int) -> float:
    """Multiplications and additions of `refine` in all its rounds, each with one support."""
    codes = 2.0 * k * sum(d_outs)
    weighted = 2.0 * k * sum(d * d for d in d_outs)
    return ROUNDS * ((STEPS + 1) * weighted + (STEPS + 3) * codes * k + 7 * codes * d_in)


@dataclass(frozen=True)
class _State:
    """dictionary (d_in, k), codes Sᵀ, H Sᵀ and the support (d_out, k), and the loss."""

    dictionary: Tensor
    codes: Tensor
    weighted: Tensor
    support: Tensor
    loss: float


class _Loss:
    """The loss of y (d_in, d_out) under the blocks of H. Products with H are what costs, so they are handed on."""

    def __init__(self, y: Tensor, blocks: Sequence[Tensor]) -> None:
        self.y, self.blocks = y, blocks
        self.target = self.weighted(y.T)

    def weighted(self, rows: Tensor) -> Tensor:
        """H rows, block by block; rows (d_out, n)."""
        parts = rows.split([len(block) for block in self.blocks])
        return torch.cat([block @ part for block, part in zip(self.blocks, parts, strict=True)])

    def of(self, dictionary: Tensor, codes: Tensor, weighted: Tensor, support: Tensor) -> _State:
        error, weighted_error = self.y.T - codes @ dictionary.T, self.target - weighted @ dictionary.T
        return _State(dictionary, codes, weighted, support, float((weighted_error * error).sum(dtype=torch.float64)))


def _update_dictionary(loss: _Loss, before: _State) -> _State:
    """The best dictionary for the codes, with unit atoms; as it was where rounding makes the loss rise."""
    normal = (before.codes.T @ before.weighted).double()
    normal.diagonal().add_(RIDGE * normal.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(normal)
    if failed:
        return before
    residual = loss.y - before.dictionary @ before.codes.T
    change = torch.cholesky_solve((residual @ before.weighted).T.double(), lower).T
    moved = before.dictionary + change.to(loss.y)
    length = moved.norm(dim=0)
    after = loss.of(moved / length, before.codes * length, before.weighted * length, before.support)
    return after if bool((length > 0).all()) and after.loss < before.loss else before


def _update_codes(loss: _Loss, before: _State, sparsity: int) -> _State:
    """After a gradient step on the supports and a refit, or after the refit alone, whichever first lowers the loss."""
    dictionary = before.dictionary
    gram, products = dictionary.T @ dictionary, loss.target @ dictionary
    stepped = before.codes + products - before.weighted @ gram
    moved = largest(stepped, sparsity)
    start = stepped * moved
    for codes, weighted, support in (
        (start, loss.weighted(start), moved),
        (before.codes, before.weighted, before.support),
    ):
        found = _conjugate_gradients(loss, gram, products, codes, weighted, support)
        after = loss.of(dictionary, *found, support)
        if after.loss < before.loss:
            return after
    return before


def _conjugate_gradients(
    loss: _Loss, gram: Tensor, products: Tensor, codes: Tensor, weighted: Tensor, support: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes after a few steps towards the values of least loss on the support, all columns together, and H times them.

    products: H Yᵀ D.
    """
    codes, weighted = codes.clone(), weighted.clone()
    residual = (products - weighted @ gram) * support
    direction = residual.clone()
    square = residual.square().sum(dtype=torch.float64)
    for _ in range(STEPS):
        moved = loss.weighted(direction)
        image = moved @ gram
        curvature = (direction * image).sum(dtype=torch.float64)
        if not curvature > 0:
            break
        step = float(square / curvature)
        codes.add_(direction, alpha=step)
        weighted.add_(moved, alpha=step)
        residual.sub_(image * support, alpha=step)
        following = residual.square().sum(dtype=torch.float64)
        direction.mul_(float(following / square)).add_(residual)
        square = following
    return codes, weighted
