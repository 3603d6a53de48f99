"""A dense linear map whose weight several places of the model use."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcompress.layers.base import StructuredLinear


class SharedLinear(StructuredLinear):
    """y = x weightᵀ + bias with weight (d_out, d_in), its own or that of the module which `shared` names."""

    kind = "shared"

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        bias: bool = False,
        shared: dict[str, str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """An uninitialised layer."""
        super().__init__()
        self.d_in, self.d_out, self.shared = d_in, d_out, dict(shared or {})
        self.weight = nn.Parameter(torch.empty(d_out, d_in, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(d_out, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_weight(cls, weight: nn.Parameter, bias: Tensor | None, shared: dict[str, str] | None) -> SharedLinear:
        """The layer of a weight, the owner's Parameter itself where it is shared."""
        layer = cls(weight.shape[1], weight.shape[0], bias=bias is not None, shared=shared, device="meta")
        layer.weight = weight
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone().to(weight.dtype))
        return layer

    def spec(self) -> dict[str, Any]:
        return {"d_in": self.d_in, "d_out": self.d_out, "bias": self.bias is not None}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> SharedLinear:
        return cls(
            spec["d_in"], spec["d_out"], bias=spec["bias"], shared=spec.get("shared"), dtype=dtype, device=device
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def to_dense(self) -> Tensor:
        return self.weight

    @property
    def storage_bits(self) -> int:
        return 0 if "weight" in self.shared else self.weight.numel() * self.weight.element_size() * 8

    @property
    def flops(self) -> int:
        return 2 * self.weight.numel()
