"""A linear map stored as a dictionary and column-sparse codes: a bit mask and values narrower than 16 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from llmcompress_kernels import gap_codes
from llmcompress_kernels.sparse_dictionary import sparse_dictionary_forward
from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.layers.base import StructuredLinear
from llmcompress.layers.low_rank import pack_mask, unpack_mask

MIN_VALUE_BITS, MAX_VALUE_BITS = 10, 16


class SparseDictionaryLinear(StructuredLinear):
    """y = x D S + bias with a dictionary D (d_in, k) and codes S (k, d_out) of exactly s non-zeros a column.

    Stored form: `dictionary` (d_in, k) bfloat16, whatever the dtype of the model; `mask` (d_out, ceil(k / 8)) uint8,
    one bit an atom, lowest bit first; `values` (d_out, ceil(s * value_bits / 8)) uint8, a bit stream for each output,
    lowest bit first, of its non-zeros by ascending atom, each the leading `value_bits` bits of a float32. These bytes
    are what a checkpoint holds, and conversions such as `half()` leave them alone. What multiplies is derived from them
    by `after_load` and not saved: for many rows the weight `dense` (d_out, d_in) in the model's dtype; for few rows the
    values in 16 bits, `codes` (d_out, s) bfloat16, or on a GPU, for one row, `words` and `starts` of gap_codes.py.

    Trainable form, made by `unpack` and ended by `pack`: `dictionary` and `values` (d_out, s) are Parameters of full
    width, the mask is fixed, and a checkpoint holds them as they are. Layers that share a dictionary change together.
    """

    kind = "sparse_dictionary"
    factors = ("dictionary",)
    mask: Tensor
    values: Tensor
    dense: Tensor
    codes: Tensor | None
    words: Tensor | None
    starts: Tensor | None
    index: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        atoms: int,
        nonzeros: int,
        *,
        value_bits: int = 14,
        packed: bool = True,
        bias: bool = False,
        shared: dict[str, str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """An uninitialised layer. InputError if the sizes do not fit one another."""
        super().__init__()
        if not 1 <= nonzeros <= atoms:
            raise InputError(f"non-zeros a column must be between 1 and the number of atoms, {atoms}; got {nonzeros}")
        check_value_bits(value_bits)
        self.d_in, self.d_out, self.atoms, self.nonzeros = d_in, d_out, atoms, nonzeros
        self.value_bits, self.packed = value_bits, packed
        self.shared = dict(shared or {})
        dtype = dtype or torch.get_default_dtype()
        width = torch.bfloat16 if packed else dtype
        dictionary = torch.empty(d_in, atoms, dtype=width, device=device)
        self.dictionary = nn.Parameter(dictionary, requires_grad=not packed)
        self.bias = nn.Parameter(torch.empty(d_out, dtype=dtype, device=device)) if bias else None
        self.register_buffer("mask", torch.zeros(d_out, math.ceil(atoms / 8), dtype=torch.uint8, device=device))
        if packed:
            size = math.ceil(nonzeros * value_bits / 8)
            self.register_buffer("values", torch.zeros(d_out, size, dtype=torch.uint8, device=device))
            self._register_derived(dtype, device)
        else:
            self.values = nn.Parameter(torch.empty(d_out, nonzeros, dtype=dtype, device=device))
            index = torch.zeros(d_out, nonzeros, dtype=torch.int64, device=device)
            self.register_buffer("index", index, persistent=False)
        self.register_load_state_dict_post_hook(_rebuild)

    @classmethod
    def from_factors(
        cls,
        dictionary: Tensor,
        indices: Tensor,
        values: Tensor,
        bias: Tensor | None = None,
        *,
        value_bits: int = 14,
        shared: dict[str, str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> SparseDictionaryLinear:
        """The stored form of the given factors, rounded to nearest; `dtype` (of `values` if absent) is the model's.

        dictionary (d_in, k), the owner's bfloat16 Parameter itself where it is shared; indices (d_out, s) int64,
        ascending; values (d_out, s); bias (d_out,).
        """
        dtype = dtype or values.dtype
        (d_in, atoms), (d_out, nonzeros) = dictionary.shape, values.shape
        layer = cls(
            d_in, d_out, atoms, nonzeros,
            value_bits=value_bits, bias=bias is not None, shared=shared, dtype=dtype, device=values.device,
        )  # fmt: skip
        if isinstance(dictionary, nn.Parameter):
            layer.dictionary = dictionary
        else:
            layer.dictionary.data = dictionary.detach().to(torch.bfloat16).contiguous()
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone().to(dtype))
        marked = torch.zeros(d_out, atoms, dtype=torch.bool, device=values.device).scatter_(1, indices, True)
        layer.mask = pack_mask(F.pad(marked, (0, -atoms % 8)).flatten()).view(d_out, -1)
        layer.values = pack_codes(narrow(values, value_bits), value_bits)
        layer.after_load()
        return layer

    def spec(self) -> dict[str, Any]:
        return {
            "d_in": self.d_in,
            "d_out": self.d_out,
            "atoms": self.atoms,
            "nonzeros": self.nonzeros,
            "value_bits": self.value_bits,
            "packed": self.packed,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> SparseDictionaryLinear:
        return cls(
            spec["d_in"],
            spec["d_out"],
            spec["atoms"],
            spec["nonzeros"],
            value_bits=spec["value_bits"],
            packed=spec["packed"],
            bias=spec["bias"],
            shared=spec.get("shared"),
            dtype=dtype,
            device=device,
        )

    # --- what is derived from the stored tensors ---------------------------------------------------------------------

    def _register_derived(self, dtype: torch.dtype, device: torch.device | str | None) -> None:
        empty = torch.zeros(self.d_out, self.d_in, dtype=dtype, device=device)
        self.register_buffer("dense", empty, persistent=False)
        for name in ("codes", "words", "starts"):
            self.register_buffer(name, None, persistent=False)

    def after_load(self) -> None:
        """Builds what multiplies, or in the trainable form `index`. InputError if an output has not s atoms marked."""
        super().after_load()
        if self.mask.is_meta or self.dictionary.is_meta:
            return
        index = self._indices()
        if not self.packed:
            self.index = index
            return
        with torch.no_grad():
            exact = torch.float64 if self.dense.dtype == torch.float64 else torch.float32
            values = widen(unpack_codes(self.values, self.value_bits, self.nonzeros), self.value_bits).to(exact)
            codes = values.new_zeros(self.d_out, self.atoms).scatter_(1, index, values)
            self.dense = (codes @ self.dictionary.to(exact).T).to(self.dense.dtype)
            rounded = values.bfloat16()  # exact: a value has at most 16 bits
            free = self.dictionary.is_cuda and self.value_bits <= gap_codes.VALUE_BITS
            gaps = gap_codes.encode(index, rounded, self.atoms) if free else None
            self.words, self.starts = gaps or (None, None)
            self.codes = None if self.dictionary.is_cuda else rounded

    def _indices(self) -> Tensor:
        """(d_out, s) int64, ascending: the atoms that the mask marks."""
        marked = unpack_mask(self.mask.flatten(), self.mask.numel() * 8).view(self.d_out, -1)
        if not (marked.sum(1) == self.nonzeros).all() or marked[:, self.atoms :].any():
            raise InputError(f"corrupt mask: an output does not have {self.nonzeros} of {self.atoms} atoms marked")
        return marked.nonzero()[:, 1].view(self.d_out, self.nonzeros)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the stored bytes without changing their width, and derives `dense` afresh in a new dtype."""
        if not self.packed:
            return super()._apply(fn, recurse)
        dictionary, codes, before = self.dictionary, self.codes, (self.dense.dtype, self.dense.device.type)

        def keep_width(tensor: Tensor) -> Tensor:
            stored = tensor is dictionary or tensor is codes
            return fn(tensor.view(torch.int16)).view(torch.bfloat16) if stored else fn(tensor)

        super()._apply(keep_width, recurse)
        if before[1] != "meta" and before != (self.dense.dtype, self.dense.device.type):
            self.after_load()
        return self

    # --- the product -------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            return F.linear(x @ self.dictionary, self._codes(), self.bias)
        if x.shape[-1] != self.d_in:
            raise InputError(f"the last dimension of x must be d_in = {self.d_in}; got shape {tuple(x.shape)}")
        gaps = None if self.words is None or self.starts is None else (self.words, self.starts)
        return sparse_dictionary_forward(x, self.dictionary, self.mask, self.codes, self.bias, self.dense, gaps)

    def _codes(self) -> Tensor:
        """(d_out, k), differentiable in the values."""
        return self.values.new_zeros(self.d_out, self.atoms).scatter(1, self.index, self.values)

    def to_dense(self) -> Tensor:
        return self.dense.clone() if self.packed else self._codes() @ self.dictionary.T

    # --- training ----------------------------------------------------------------------------------------------------

    def unpack(self, dtype: torch.dtype | None = None) -> None:
        """Turns to the trainable form in `dtype` (the model's if absent)."""
        if not self.packed:
            return
        dtype = dtype or self.dense.dtype
        values = widen(unpack_codes(self.values, self.value_bits, self.nonzeros), self.value_bits).to(dtype)
        index = self._indices()
        del self.values, self.dense, self.codes, self.words, self.starts
        self.packed = False
        self.values = nn.Parameter(values)
        self.register_buffer("index", index, persistent=False)
        self._set_dictionary(dtype, trainable=True)

    def pack(self) -> None:
        """Turns back to the stored form: dictionary and values are rounded to their stored widths."""
        if self.packed:
            return
        dtype = self.values.dtype
        packed = pack_codes(narrow(self.values.detach(), self.value_bits), self.value_bits)
        del self.values, self.index
        self.packed = True
        self.register_buffer("values", packed)
        self._register_derived(dtype, packed.device)
        self._set_dictionary(torch.bfloat16, trainable=False)
        self.after_load()

    def _set_dictionary(self, dtype: torch.dtype, trainable: bool) -> None:
        """Changes the Parameter itself, so that the layers that share it go on sharing it."""
        self.dictionary.requires_grad_(trainable)
        if self.dictionary.dtype != dtype:
            self.dictionary.grad = None
            self.dictionary.data = self.dictionary.data.to(dtype)

    # --- sizes -------------------------------------------------------------------------------------------------------

    @property
    def storage_bits(self) -> int:
        own = [self.mask, self.values] if "dictionary" in self.shared else [self.mask, self.values, self.dictionary]
        return sum(tensor.numel() * tensor.element_size() * 8 for tensor in own)

    @property
    def num_parameters(self) -> int:
        own = 0 if "dictionary" in self.shared else self.dictionary.numel()
        return own + self.d_out * self.nonzeros + (0 if self.bias is None else self.bias.numel())

    @property
    def flops(self) -> int:
        """Of the two products x D and (x D) S, which a kernel does; the dense form takes 2 d_in d_out."""
        own = 0 if "dictionary" in self.shared else self.dictionary.numel()
        return 2 * (own + self.d_out * self.nonzeros)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, atoms={self.atoms}, nonzeros={self.nonzeros}, value_bits={self.value_bits}"


def _rebuild(layer: nn.Module, _: Any) -> None:
    assert isinstance(layer, SparseDictionaryLinear)
    layer.after_load()


# --- narrow floats ---------------------------------------------------------------------------------------------------


def check_value_bits(bits: int) -> None:
    """A float32 cut to b bits keeps its sign, its 8 exponent bits and b - 9 of the mantissa."""
    if not MIN_VALUE_BITS <= bits <= MAX_VALUE_BITS:
        raise InputError(f"value bits must be between {MIN_VALUE_BITS} and {MAX_VALUE_BITS}; got {bits}")


def narrow(values: Tensor, bits: int) -> Tensor:
    """The codes (int32, in [0, 2**bits)) of values rounded to the nearest float of that many bits, ties to even."""
    raw = values.detach().float().contiguous().view(torch.int32).long() & 0xFFFFFFFF
    drop = 32 - bits
    return ((raw + (1 << (drop - 1)) - 1 + (raw >> drop & 1)) >> drop).int()


def widen(codes: Tensor, bits: int) -> Tensor:
    """The float32 values of codes made by `narrow`."""
    return (codes << (32 - bits)).view(torch.float32)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(rows, s) int32 codes -> (rows, ceil(s * bits / 8)) uint8: each row a bit stream, lowest bit first."""
    rows, s = codes.shape
    groups = F.pad(codes, (0, -s % 8)).view(rows, -1, 8)  # 8 codes fill `bits` bytes
    packed = torch.zeros(rows, groups.shape[1], bits, dtype=torch.int32, device=codes.device)
    for i in range(8):
        first = bits * i
        for byte in range(first // 8, (first + bits - 1) // 8 + 1):
            shift = first - 8 * byte
            part = groups[:, :, i] << shift if shift >= 0 else groups[:, :, i] >> -shift
            packed[:, :, byte] |= part & 255
    return packed.to(torch.uint8).view(rows, -1)[:, : math.ceil(s * bits / 8)].contiguous()


def unpack_codes(packed: Tensor, bits: int, s: int) -> Tensor:
    """The inverse of `pack_codes`: (rows, s) int32."""
    padding = math.ceil(s / 8) * bits - packed.shape[1]
    groups = F.pad(packed.int(), (0, padding)).view(len(packed), -1, bits)
    codes = torch.zeros(*groups.shape[:2], 8, dtype=torch.int32, device=packed.device)
    for i in range(8):
        first = bits * i
        for byte in range(first // 8, (first + bits - 1) // 8 + 1):
            shift = first - 8 * byte
            part = groups[:, :, byte] >> shift if shift >= 0 else groups[:, :, byte] << -shift
            codes[:, :, i] |= part & ((1 << bits) - 1)
    return codes.view(len(packed), -1)[:, :s].contiguous()
