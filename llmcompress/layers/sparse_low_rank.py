"""A linear map stored as two thin factors and a few entries of their own: low rank plus sparse."""

from __future__ import annotations

from typing import Any

import torch
from llmcompress_kernels.low_rank import low_rank_forward
from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.layers.premerge import PremergedLinear


class SparseLowRankLinear(PremergedLinear):
    """y = x (A B + S) + bias with A (d_in, r), B (r, d_out), and S (d_in, d_out) of `entries` non-zeros.

    S is stored by outputs: values (entries,), columns (entries,), the input that each one reads, int16 or from 32,768
    inputs on int32, ascending within an output; counts (d_out,), how many an output has, of the same width. `places`
    (2, entries) int64, the coordinates (output, input), is derived from them by `after_load`, and not saved.
    """

    kind = "sparse_low_rank"
    factors = ("A", "B")
    columns: Tensor
    counts: Tensor
    places: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        entries: int,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """An uninitialised layer. InputError if the sizes do not fit one another."""
        super().__init__()
        if not (1 <= rank <= min(d_in, d_out) and 0 <= entries <= d_in * d_out):
            raise InputError(f"rank {rank} and {entries} entries do not fit a map of {d_in} inputs, {d_out} outputs")
        self.d_in, self.d_out, self.rank, self.entries, self.shared = d_in, d_out, rank, entries, {}
        self.A = nn.Parameter(torch.empty(d_in, rank, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.empty(rank, d_out, dtype=dtype, device=device))
        self.values = nn.Parameter(torch.empty(entries, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(d_out, dtype=dtype, device=device)) if bias else None
        width = index_dtype(d_in)
        self.register_buffer("columns", torch.zeros(entries, dtype=width, device=device))
        self.register_buffer("counts", torch.zeros(d_out, dtype=width, device=device))
        places = torch.zeros(2, entries, dtype=torch.int64, device=device)
        self.register_buffer("places", places, persistent=False)
        self.register_load_state_dict_post_hook(_rebuild)

    @classmethod
    def from_factors(
        cls, A: Tensor, B: Tensor, sparse: Tensor, mask: Tensor, bias: Tensor | None = None
    ) -> SparseLowRankLinear:
        """The layer of A (d_in, r), B (r, d_out) and the entries of `sparse` (d_out, d_in) where `mask` is true."""
        layer = cls(len(A), B.shape[1], A.shape[1], int(mask.sum()), bias=bias is not None, device="meta")
        layer.A, layer.B = nn.Parameter(A.detach().contiguous()), nn.Parameter(B.detach().contiguous())
        layer.values = nn.Parameter(sparse[mask].detach().to(B.dtype))
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone().to(B.dtype))
        width = index_dtype(layer.d_in)
        layer.columns, layer.counts = mask.nonzero()[:, 1].to(width), mask.sum(1).to(width)
        layer.after_load()
        return layer

    def spec(self) -> dict[str, Any]:
        return {
            "d_in": self.d_in,
            "d_out": self.d_out,
            "rank": self.rank,
            "entries": self.entries,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> SparseLowRankLinear:
        return cls(
            spec["d_in"],
            spec["d_out"],
            spec["rank"],
            spec["entries"],
            bias=spec["bias"],
            dtype=dtype,
            device=device,
        )

    def after_load(self) -> None:
        """Builds `places`. InputError if the counts or columns are none of this layer's."""
        super().after_load()
        if self.counts.is_meta:
            return
        counts, columns = self.counts.long(), self.columns.long()
        inside = not self.entries or (int(columns.min()) >= 0 and int(columns.max()) < self.d_in)
        if int(counts.min()) < 0 or int(counts.sum()) != self.entries or not inside:
            raise InputError(f"corrupt sparse entries: {int(counts.sum())} counted, {self.entries} expected")
        outputs = torch.repeat_interleave(torch.arange(self.d_out, device=counts.device), counts)
        self.places = torch.stack((outputs, columns))

    def product(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in:
            raise InputError(f"the last dimension of x must be d_in = {self.d_in}; got shape {tuple(x.shape)}")
        y = low_rank_forward(x, self.A, self.B, self.bias, None, 0)
        # sparse products have no kernels for narrow types on every device
        wide = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        rows = x.reshape(-1, self.d_in).to(wide)
        sparse = torch.sparse_coo_tensor(
            self.places, self.values.to(wide), (self.d_out, self.d_in), is_coalesced=True, check_invariants=False
        )
        return y + torch.sparse.mm(sparse, rows.T).T.reshape(y.shape).to(y.dtype)

    def to_dense(self) -> Tensor:
        return (self.A @ self.B).T.index_put(tuple(self.places), self.values, accumulate=True)

    @property
    def storage_bits(self) -> int:
        own = (self.A, self.B, self.values, self.columns, self.counts)
        return sum(tensor.numel() * tensor.element_size() * 8 for tensor in own)

    @property
    def flops(self) -> int:
        return 2 * (self.A.numel() + self.B.numel() + self.entries)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, entries={self.entries}"


def index_dtype(d_in: int) -> torch.dtype:
    """The narrowest signed type that counts to d_in."""
    return torch.int16 if d_in < 1 << 15 else torch.int32


def _rebuild(layer: nn.Module, _: Any) -> None:
    assert isinstance(layer, SparseLowRankLinear)
    layer.after_load()
