"""A linear map stored as two thin factors, in the pivot form that gives the r² values of gauge freedom back."""

from __future__ import annotations

from typing import Any

import torch
from llmcompress_kernels.low_rank import low_rank_forward
from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.layers.premerge import PremergedLinear


class LowRankLinear(PremergedLinear):
    """y = x A B + bias with A (d_in, r) and B (r, d_out), or the pivot form of the same product.

    Pivot form: p of the coordinates of z = x A are outputs themselves, so that B keeps only the other d_out - p
    columns: y[index] = cat(z[offset : offset + p], z B), plus bias. `pivots` (ceil(d_out / 8),) uint8 is a bit mask,
    lowest bit first, of the outputs that are pivots; in ascending order they are z[offset : offset + p]. A layer on its
    own has p = r and offset 0; layers that share one A own a slice of z each. p = 0 is the plain form, without a mask.

    `index` (d_out,) int64 is derived from the mask by `after_load`, and not saved.
    """

    kind = "low_rank"
    factors = ("A", "B")
    pivots: Tensor
    index: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        *,
        pivot_count: int = 0,
        offset: int = 0,
        bias: bool = False,
        shared: dict[str, str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """An uninitialised layer. InputError if the sizes do not fit one another."""
        super().__init__()
        if not 1 <= rank <= d_in:
            raise InputError(f"rank must be between 1 and d_in = {d_in}; got {rank}")
        if not (0 <= pivot_count <= d_out and 0 <= offset <= rank - pivot_count):
            raise InputError(f"{pivot_count} pivots from {offset} on do not fit rank {rank} and d_out = {d_out}")
        self.d_in, self.d_out, self.rank = d_in, d_out, rank
        self.pivot_count, self.offset = pivot_count, offset
        self.shared = dict(shared or {})
        self.A = nn.Parameter(torch.empty(d_in, rank, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.empty(rank, d_out - pivot_count, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(d_out, dtype=dtype, device=device)) if bias else None
        if pivot_count:
            self.register_buffer("pivots", torch.zeros((d_out + 7) // 8, dtype=torch.uint8, device=device))
            index = torch.zeros(d_out, dtype=torch.int64, device=device)
            self.register_buffer("index", index, persistent=False)
            self.register_load_state_dict_post_hook(_rebuild)

    @classmethod
    def from_factors(
        cls,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None = None,
        pivots: Tensor | None = None,
        offset: int = 0,
        shared: dict[str, str] | None = None,
    ) -> LowRankLinear:
        """The layer of the given factors, in their dtype.

        A (d_in, r), the owner's Parameter itself where it is shared; B (r, d_out - p); bias (d_out,);
        pivots (d_out,) bool with p true entries, or None for the plain form.
        """
        count = int(pivots.sum()) if pivots is not None else 0
        if A.shape[1] != B.shape[0]:
            raise InputError(f"the factors' ranks differ: A {tuple(A.shape)}, B {tuple(B.shape)}")
        layer = cls(
            A.shape[0],
            B.shape[1] + count,
            A.shape[1],
            pivot_count=count,
            offset=offset,
            bias=bias is not None,
            shared=shared,
            dtype=B.dtype,
            device="meta",
        )
        layer.A = A if isinstance(A, nn.Parameter) else nn.Parameter(A.detach().contiguous())
        layer.B = nn.Parameter(B.detach().contiguous())
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone().to(B.dtype))
        if pivots is not None and count:
            layer.pivots = pack_mask(pivots).to(B.device)
        layer.after_load()
        return layer

    def spec(self) -> dict[str, Any]:
        return {
            "d_in": self.d_in,
            "d_out": self.d_out,
            "rank": self.rank,
            "pivots": self.pivot_count,
            "offset": self.offset,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> LowRankLinear:
        return cls(
            spec["d_in"],
            spec["d_out"],
            spec["rank"],
            pivot_count=spec["pivots"],
            offset=spec["offset"],
            bias=spec["bias"],
            shared=spec.get("shared"),
            dtype=dtype,
            device=device,
        )

    def after_load(self) -> None:
        """Builds `index` from the mask. InputError if the mask does not mark as many pivots as the layer has."""
        super().after_load()
        if not self.pivot_count or self.pivots.is_meta:
            return
        mask = unpack_mask(self.pivots, self.d_out)
        if int(mask.sum()) != self.pivot_count:
            raise InputError(f"corrupt pivot mask: {int(mask.sum())} outputs marked, {self.pivot_count} expected")
        self.index = torch.cat((mask.nonzero(), (~mask).nonzero())).squeeze(1)

    def product(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in:
            raise InputError(f"the last dimension of x must be d_in = {self.d_in}; got shape {tuple(x.shape)}")
        return low_rank_forward(x, self.A, self.B, self.bias, self.index if self.pivot_count else None, self.offset)

    def to_dense(self) -> Tensor:
        columns = self.A @ self.B
        if self.pivot_count:
            own = self.A[:, self.offset : self.offset + self.pivot_count]
            columns = torch.cat((own, columns), dim=1)
            columns = torch.empty_like(columns).index_copy(1, self.index, columns)
        return columns.T

    @property
    def storage_bits(self) -> int:
        mask = 8 * self.pivots.numel() if self.pivot_count else 0
        own = self.B.numel() + (0 if "A" in self.shared else self.A.numel())
        return own * self.B.element_size() * 8 + mask

    @property
    def flops(self) -> int:
        own = 0 if "A" in self.shared else self.A.numel()
        return 2 * (own + self.B.numel())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, pivots={self.pivot_count}"


def pack_mask(mask: Tensor) -> Tensor:
    """(d,) bool -> (ceil(d / 8),) uint8, lowest bit first."""
    padded = torch.zeros((mask.numel() + 7) // 8 * 8, dtype=torch.uint8, device=mask.device)
    padded[: mask.numel()] = mask
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, size: int) -> Tensor:
    """(ceil(size / 8),) uint8 -> (size,) bool, lowest bit first."""
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).bool().flatten()[:size]


def _rebuild(layer: nn.Module, _: Any) -> None:
    assert isinstance(layer, LowRankLinear)
    layer.after_load()
