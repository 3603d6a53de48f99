"""What every structured layer offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from llmcompress_kernels import layout
from torch import Tensor, nn


class StructuredLinear(nn.Module, ABC):
    """A linear map x (..., d_in) -> (..., d_out) stored as something smaller than its dense weight.

    Attributes every layer has: `d_in`, `d_out`, `bias` (a Parameter (d_out,) or None) and `shared`, the tensors that
    it does not own: parameter name -> path of the module that does. A shared tensor is one Parameter object,
    counted and saved with its owner alone.
    """

    #: the name under which the layer stands in the catalogue and in a checkpoint's config
    kind: str

    d_in: int
    d_out: int
    bias: nn.Parameter | None
    shared: dict[str, str]

    #: Parameters (d, n) that are multiplied with from the right, x W: their order in memory follows the device
    factors: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """JSON description from which `from_spec` builds an empty layer of the same shapes."""

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> StructuredLinear:
        """An uninitialised layer, whose tensors a checkpoint fills."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The dense weight (d_out, d_in) that this layer stands for, in the layer's dtype."""

    @property
    @abstractmethod
    def storage_bits(self) -> int:
        """Bits that a checkpoint holds for this layer: every own value, index and mask; bias and shared tensors not."""

    @property
    def storage_values(self) -> float:
        """The same counted in dense values: a floating-point value is one, masks and packed values 16 bits each."""
        own = {name: t for name, t in self.state_dict().items() if name not in self.shared and name != "bias"}
        return sum(t.numel() if t.is_floating_point() else t.numel() * t.element_size() / 2 for t in own.values())

    @property
    @abstractmethod
    def flops(self) -> int:
        """Multiplications and additions a token, bias left out; a shared product counts at its owner alone."""

    @property
    def num_parameters(self) -> int:
        """Own floating-point values, bias included, shared tensors not."""
        return sum(p.numel() for name, p in self.named_parameters() if name not in self.shared)

    def after_load(self) -> None:
        """Called when all tensors are in place: builds what is derived from them (indices, running counts)."""
        self._arrange()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._arrange()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Row-major, as files have it; layers that share a factor share its copy too."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if keep_vars:
            return
        copies = vars(destination).setdefault("_row_major", {})
        for name in self.factors:
            tensor = destination[prefix + name]
            if not tensor.is_contiguous():
                if tensor.data_ptr() not in copies:
                    copies[tensor.data_ptr()] = tensor.contiguous()
                destination[prefix + name] = copies[tensor.data_ptr()]

    def _arrange(self) -> None:
        for name in self.factors:
            parameter = getattr(self, name)
            if not parameter.is_meta:
                parameter.data = layout.arranged(parameter.data)

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_out={self.d_out}, bias={self.bias is not None}"
