"""How low-rank factors are stored: in which gauge, and in how many bits (the gauge: arXiv 2310.11366's
factorisation)."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from llmcompress.backends.geometry.gauge import Rotation, balanced_gauge
from llmcompress.compressors.block_projection import relative_output_error
from llmcompress.errors import InputError, RunError
from llmcompress.layers.quantized_low_rank import MAX_BITS, MIN_BITS, QuantizedLowRankLinear, row_bytes
from llmcompress.types import Problem


class FactorStorage(BaseModel, extra="forbid"):
    gauge: Literal["balanced", "none"] = Field(
        default="balanced", description="balanced: both factors' Grams agree; none: as the method gives the factors"
    )
    rotation: Rotation = Field(
        default="hadamard", description="of the balanced gauge; hadamard spreads outliers before they are rounded"
    )
    bits: int | None = Field(
        default=None, ge=MIN_BITS, le=MAX_BITS, description="bits of a stored factor value; the model's dtype if absent"
    )

    @model_validator(mode="after")
    def _rotation_has_a_gauge(self) -> Self:
        if self.gauge == "none" and "rotation" in self.model_fields_set:
            raise ValueError("rotation: rotates the balanced gauge, and gauge is none")
        return self

    def rotated(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, str | None]:
        """The factors (d_in, r), (r, d_out) in the gauge, and what was found: their product may be of lower rank."""
        if self.gauge == "none":
            return A, B, None
        try:
            found = balanced_gauge(A, B, self.rotation)
        except InputError as error:
            return A, B, f"left in the method's own gauge: {error}"
        return found.A, found.B, None


def quantized_costs(d_in: int, d_out: int, bits: int) -> Tensor:
    """Dense values stored at rank 0..min(d_in, d_out), a value 16 bits: codes, and a scale for every input and
    output."""
    sizes = torch.tensor([float(row_bytes(r, bits)) for r in range(min(d_in, d_out) + 1)], dtype=torch.float64)
    return (d_in + d_out) * (sizes / 2 + (sizes > 0))


def quantized_layer(problem: Problem, A: Tensor, B: Tensor, bits: int) -> QuantizedLowRankLinear:
    """The layer of one site. RunError if a scale overflows the weight's dtype."""
    layer = QuantizedLowRankLinear.from_factors(A, B, bits, problem.biases[0], problem.weights[0].dtype)
    if not (torch.isfinite(layer.A_scales).all() and torch.isfinite(layer.B_scales).all()):
        raise RunError(f"{problem.name}: a scale overflows {layer.A_scales.dtype}")
    return layer


def quantized_errors(problem: Problem, A: Tensor, B: Tensor, layer: QuantizedLowRankLinear) -> tuple[float, float]:
    """Relative output errors on the calibration data (of the weights, without a Gram) of the factors and the layer."""
    weight = problem.weights[0].detach().double()
    gram = problem.statistics[0].gram
    if gram is None:
        gram = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return (
        relative_output_error(weight, (A @ B).T, gram),
        relative_output_error(weight, layer.to_dense().detach().double(), gram),
    )
