"""A linear map stored as two thin factors of a few bits a value, one scale a row."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.layers.base import StructuredLinear
from llmcompress.layers.sparse_dictionary import pack_codes, unpack_codes

MIN_BITS, MAX_BITS = 2, 8


def quantize_rows(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers (n, r) int8 in -q..q, q = 2^(bits - 1) - 1, and scales (n,) with rows ≈ scale times number.

    Rounded to nearest; the largest of a row is met exactly, a row of zeros has the scale 0. InputError unless 2 <=
    bits <= 8.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise InputError(f"bits must be between {MIN_BITS} and {MAX_BITS}; got {bits}")
    most = 2 ** (bits - 1) - 1
    scales = rows.abs().amax(1) / most
    numbers = (rows / torch.where(scales > 0, scales, 1)[:, None]).round().clamp(-most, most)
    return numbers.to(torch.int8), scales


class QuantizedLowRankLinear(StructuredLinear):
    """y = x A B + bias with A (d_in, r) and B (r, d_out) of `bits` bits a value.

    Stored: `A_codes` (d_in, ceil(r * bits / 8)) and `B_codes` (d_out, ceil(r * bits / 8)) uint8, bit streams of
    the rows of A and the columns of B, lowest bit first, each number plus 2^(bits - 1); their scales `A_scales`
    (d_in,) and `B_scales` (d_out,) in the model's dtype, which can be trained. `A_numbers` (d_in, r) and
    `B_numbers` (d_out, r) int8 are derived by `after_load`, and not saved.
    """

    kind = "quantized_low_rank"
    A_codes: Tensor
    B_codes: Tensor
    A_numbers: Tensor
    B_numbers: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        bits: int,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """An uninitialised layer."""
        super().__init__()
        self.d_in, self.d_out, self.rank, self.bits = d_in, d_out, rank, bits
        self.shared = {}
        for name, size in (("A", d_in), ("B", d_out)):
            packed = torch.zeros(size, row_bytes(rank, bits), dtype=torch.uint8, device=device)
            self.register_buffer(f"{name}_codes", packed)
            numbers = torch.zeros(size, rank, dtype=torch.int8, device=device)
            self.register_buffer(f"{name}_numbers", numbers, persistent=False)
        self.A_scales = nn.Parameter(torch.empty(d_in, dtype=dtype, device=device))
        self.B_scales = nn.Parameter(torch.empty(d_out, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(d_out, dtype=dtype, device=device)) if bias else None
        self.register_load_state_dict_post_hook(_rebuild)

    @classmethod
    def from_factors(
        cls, A: Tensor, B: Tensor, bits: int, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> QuantizedLowRankLinear:
        """The nearest layer to A (d_in, r), B (r, d_out); `dtype` (of A if absent) is that of scales and bias."""
        if A.shape[1] != B.shape[0]:
            raise InputError(f"the factors' ranks differ: A {tuple(A.shape)}, B {tuple(B.shape)}")
        dtype = dtype or A.dtype
        layer = cls(
            len(A), B.shape[1], A.shape[1], bits, bias=bias is not None, dtype=dtype, device=A.device
        )  # fmt: skip
        with torch.no_grad():
            for name, rows in (("A", A), ("B", B.T)):
                numbers, scales = quantize_rows(rows.detach(), bits)
                setattr(layer, f"{name}_codes", pack_codes(numbers.int() + 2 ** (bits - 1), bits))
                getattr(layer, f"{name}_scales").copy_(scales)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        layer.after_load()
        return layer

    def spec(self) -> dict[str, Any]:
        return {
            "d_in": self.d_in, "d_out": self.d_out, "rank": self.rank, "bits": self.bits,
            "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> QuantizedLowRankLinear:
        return cls(
            spec["d_in"], spec["d_out"], spec["rank"], spec["bits"], bias=spec["bias"], dtype=dtype, device=device
        )

    def after_load(self) -> None:
        """Builds the numbers from the codes."""
        if self.A_codes.is_meta:
            return
        for name in ("A", "B"):
            codes = unpack_codes(getattr(self, f"{name}_codes"), self.bits, self.rank)
            setattr(self, f"{name}_numbers", (codes - 2 ** (self.bits - 1)).to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in:
            raise InputError(f"the last dimension of x must be d_in = {self.d_in}; got shape {tuple(x.shape)}")
        z = (x * self.A_scales) @ self.A_numbers.to(x.dtype)
        y = F.linear(z, self.B_numbers.to(x.dtype)) * self.B_scales
        return y if self.bias is None else y + self.bias

    def to_dense(self) -> Tensor:
        dtype = self.A_scales.dtype
        A, B = self.A_numbers.to(dtype) * self.A_scales[:, None], self.B_numbers.to(dtype) * self.B_scales[:, None]
        return B @ A.T

    @property
    def storage_bits(self) -> int:
        own = (self.A_codes, self.B_codes, self.A_scales, self.B_scales)
        return sum(tensor.numel() * tensor.element_size() * 8 for tensor in own)

    @property
    def flops(self) -> int:
        return 2 * (self.d_in + self.d_out) * (self.rank + 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, bits={self.bits}"


def row_bytes(rank: int, bits: int) -> int:
    """Bytes of one row of `rank` numbers."""
    return math.ceil(rank * bits / 8)


def _rebuild(layer: nn.Module, _: Any) -> None:
    assert isinstance(layer, QuantizedLowRankLinear)
    layer.after_load()
