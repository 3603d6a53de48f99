"""Linear maps stored as block-diagonal factors: BlockDense and BlockShuffle (arXiv 2406.16450; Monarch, 2204.00595)."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from llmcompress_kernels.block import block_dense_linear, block_shuffle_linear
from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.layers.premerge import PremergedLinear


class _BlockLinear(PremergedLinear):
    """What both have in common: two factors of shapes that the subclass gives."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        num_blocks: int,
        shapes: tuple[tuple[int, ...], tuple[int, ...]],
        bias: bool,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        self.d_in, self.d_out, self.num_blocks = d_in, d_out, num_blocks
        self.shared = {}
        self.V, self.U = (nn.Parameter(torch.empty(shape, dtype=dtype, device=device)) for shape in shapes)
        self.bias = nn.Parameter(torch.empty(d_out, dtype=dtype, device=device)) if bias else None

    def _fill(self, V: Tensor, U: Tensor, bias: Tensor | None) -> Self:
        self.V, self.U = nn.Parameter(V.detach().contiguous()), nn.Parameter(U.detach().contiguous())
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone().to(V.dtype))
        return self

    @property
    def storage_bits(self) -> int:
        return 8 * self.V.element_size() * (self.V.numel() + self.U.numel())

    @property
    def flops(self) -> int:
        return 2 * (self.V.numel() + self.U.numel())


class BlockDenseLinear(_BlockLinear):
    """y = U blkdiag(V) x + bias: V (num_blocks, rank / num_blocks, d_in / num_blocks), U (d_out, rank).

    Stores rank (d_out + d_in / num_blocks) values.
    """

    kind = "block_dense"

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        num_blocks: int,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """An uninitialised layer. InputError: sizes that do not divide one another, or more values than dense."""
        check_block_dense(d_in, d_out, rank, num_blocks)
        self.rank = rank
        shapes = ((num_blocks, rank // num_blocks, d_in // num_blocks), (d_out, rank))
        super().__init__(d_in, d_out, num_blocks, shapes, bias, dtype, device)

    @classmethod
    def from_factors(cls, V: Tensor, U: Tensor, bias: Tensor | None = None) -> BlockDenseLinear:
        """The layer of the given factors, in their dtype; bias (d_out,)."""
        blocks, inner, width = V.shape
        layer = cls(blocks * width, len(U), blocks * inner, blocks, bias=bias is not None, dtype=V.dtype, device="meta")
        return layer._fill(V, U, bias)

    def spec(self) -> dict[str, Any]:
        return {
            "d_in": self.d_in, "d_out": self.d_out, "rank": self.rank, "num_blocks": self.num_blocks,
            "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> BlockDenseLinear:
        sizes = (spec["d_in"], spec["d_out"], spec["rank"], spec["num_blocks"])
        return cls(*sizes, bias=spec["bias"], dtype=dtype, device=device)

    def product(self, x: Tensor) -> Tensor:
        return block_dense_linear(x, self.V, self.U, self.bias)

    def to_dense(self) -> Tensor:
        return block_dense_weight(self.V, self.U)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, num_blocks={self.num_blocks}"


class BlockShuffleLinear(_BlockLinear):
    """y = P' blkdiag(U) P blkdiag(V) x + bias: V (B, inner, d_in / B), U (B, d_out / B, inner), B = num_blocks.

    P hands coordinate j to block j mod B; P' interleaves the blocks' outputs. Stores inner (d_in + d_out) values.
    """

    kind = "block_shuffle"

    def __init__(
        self,
        d_in: int,
        d_out: int,
        num_blocks: int,
        inner: int | None = None,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """An uninitialised layer; `inner` is the published min(d_in, d_out) / num_blocks if absent.

        InputError: sizes that do not divide one another, or more values than dense.
        """
        check_divides(num_blocks, d_in, d_out)
        inner = min(d_in, d_out) // num_blocks // num_blocks * num_blocks if inner is None else inner
        check_block_shuffle(d_in, d_out, num_blocks, inner)
        self.inner = inner
        shapes = ((num_blocks, inner, d_in // num_blocks), (num_blocks, d_out // num_blocks, inner))
        super().__init__(d_in, d_out, num_blocks, shapes, bias, dtype, device)

    @classmethod
    def from_factors(cls, V: Tensor, U: Tensor, bias: Tensor | None = None) -> BlockShuffleLinear:
        """The layer of the given factors, in their dtype; bias (d_out,)."""
        blocks, inner, width = V.shape
        d_out = blocks * U.shape[1]
        layer = cls(blocks * width, d_out, blocks, inner, bias=bias is not None, dtype=V.dtype, device="meta")
        return layer._fill(V, U, bias)

    def spec(self) -> dict[str, Any]:
        return {
            "d_in": self.d_in, "d_out": self.d_out, "num_blocks": self.num_blocks, "inner": self.inner,
            "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> BlockShuffleLinear:
        sizes = (spec["d_in"], spec["d_out"], spec["num_blocks"], spec["inner"])
        return cls(*sizes, bias=spec["bias"], dtype=dtype, device=device)

    def product(self, x: Tensor) -> Tensor:
        return block_shuffle_linear(x, self.V, self.U, self.bias)

    def to_dense(self) -> Tensor:
        return block_shuffle_weight(self.V, self.U)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_blocks={self.num_blocks}, inner={self.inner}"


# --- the dense weights -----------------------------------------------------------------------------------------------


def block_dense_weight(V: Tensor, U: Tensor) -> Tensor:
    """V (B, r / B, d_in / B), U (d_out, r) -> (d_out, d_in)."""
    blocks, inner, width = V.shape
    return torch.einsum("okt,ktc->okc", U.view(len(U), blocks, inner), V).reshape(len(U), blocks * width)


def block_shuffle_weight(V: Tensor, U: Tensor) -> Tensor:
    """V (B, h, d_in / B), U (B, d_out / B, h), h a multiple of B -> (d_out, d_in).

    Output i B + l meets input block k in U[l, i, k h / B + t] V[k, t B + l], summed over t < h / B.
    """
    blocks, inner, width = V.shape
    rows, part = U.shape[1], inner // blocks
    weight = torch.einsum("likt,ktlc->ilkc", U.view(blocks, rows, blocks, part), V.view(blocks, part, blocks, width))
    return weight.reshape(rows * blocks, blocks * width)


# --- sizes -----------------------------------------------------------------------------------------------------------


def check_divides(num_blocks: int, *widths: int) -> None:
    """InputError, with the nearest number that does, unless `num_blocks` divides every width."""
    if num_blocks < 1 or any(width % num_blocks for width in widths):
        whole = math.gcd(*widths)
        nearest = min((b for b in range(1, whole + 1) if whole % b == 0), key=lambda b: (abs(b - num_blocks), b))
        shown = " and ".join(str(width) for width in dict.fromkeys(widths))
        raise InputError(f"num_blocks: {num_blocks} does not divide {shown}; the nearest that does is {nearest}")


def check_block_dense(d_in: int, d_out: int, rank: int, num_blocks: int) -> None:
    """InputError unless the sizes are those of a BlockDense layer that is no larger than dense."""
    check_divides(num_blocks, d_in)
    _check_size("rank", rank, num_blocks, d_out + d_in // num_blocks, d_in * d_out)


def check_block_shuffle(d_in: int, d_out: int, num_blocks: int, inner: int) -> None:
    """InputError unless the sizes are those of a BlockShuffle layer that is no larger than dense."""
    check_divides(num_blocks, d_in, d_out)
    _check_size("inner", inner, num_blocks, d_in + d_out, d_in * d_out)


def _check_size(name: str, size: int, num_blocks: int, values: int, dense: int) -> None:
    """values: stored for each one of the size. A layer no larger than dense is below full size, too."""
    if size < 1 or size % num_blocks:
        raise InputError(f"{name}: must be a positive multiple of num_blocks = {num_blocks}; got {size}")
    if size * values > dense:
        most = dense // values // num_blocks * num_blocks
        raise InputError(f"{name}: {size} stores {size * values} values, the dense weight {dense}; at most {most}")
