"""Decompositions of GL+(n) and SL(n) for equivariant networks, and the gauge of low-rank factors (arXiv 2310.11366).

A matrix of positive determinant is exp(X) R with X symmetric and R a rotation: unlike the exponential of the whole
algebra, this reaches every element, and the Haar measure factors with it. The r x r freedom of a low-rank pair is such
a matrix, and its factorisation tells the part that balances the factors from the rotation that is free. An LLM gains
nothing from the equivariant layers.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, Field
from torch import Tensor

from llmcompress.backends.geometry.equivariant import GroupConv2d, GroupResNet, LiftConv2d
from llmcompress.backends.geometry.gauge import GaugeResult, balanced_gauge, haar_so
from llmcompress.backends.geometry.matrix_groups import (
    GroupSamples,
    coordinates,
    effective_sample_size,
    haar_convolution,
    lift,
    polar_cartan,
    sample_group,
    split_det,
    xi,
    xi_inv,
)
from llmcompress.backends.ports import Subject
from llmcompress.backends.report import Report
from llmcompress.compressors.svd_llm import svd_llm_factorize
from llmcompress.errors import InputError
from llmcompress.layers.quantized_low_rank import MAX_BITS, MIN_BITS, quantize_rows

__all__ = ["GaugeResult", "GroupConv2d", "GroupResNet", "GroupSamples", "LieGroup", "LiftConv2d", "balanced_gauge",
           "coordinates", "effective_sample_size", "haar_convolution", "haar_so", "lift", "polar_cartan",
           "quantization_error", "sample_group", "split_det", "xi", "xi_inv"]  # fmt: skip


class LieGroupOptions(BaseModel, extra="forbid"):
    rank: int = Field(default=128, ge=1, description="rank of the whitened factors, at most that of the weight")
    bits: int = Field(default=4, ge=MIN_BITS, le=MAX_BITS, description="bits of a stored factor value")


def quantization_error(A: Tensor, B: Tensor, bits: int, gram: Tensor | None = None) -> float:
    """||X A B - X A~ B~|| / ||X A B||, rows of A (d_in, r) and columns of B (r, d_out) rounded to `bits` bits each.

    gram (d_in, d_in) = XᵀX; the identity if absent. Float64.
    """
    rounded = []
    for rows in (A, B.T):
        numbers, scales = quantize_rows(rows, bits)
        rounded.append(numbers.to(rows) * scales[:, None])
    exact, missed = A @ B, A @ B - rounded[0] @ rounded[1].T
    squares = [float(((m if gram is None else gram @ m) * m).sum()) for m in (missed, exact)]
    return (max(squares[0], 0.0) / squares[1]) ** 0.5


class LieGroup:
    """The analysis: what rounding low-rank factors adds to the outputs' error, gauge by gauge."""

    Options: ClassVar[type[LieGroupOptions]] = LieGroupOptions

    def __init__(self, options: LieGroupOptions) -> None:
        self.options = options

    def analyze(self, subject: Subject) -> Report:
        """Of each site's activation-whitened factors."""
        bits = self.options.bits
        report = Report(
            f"relative output error that {bits}-bit factors add, a scale a row of A and a column of B",
            ["site", "rank", "U S | V", "√S split", "balanced", "random", "Hadamard", "gain"],
        )
        for site in subject.sites:
            x, weight = subject.inputs[site.name].double(), subject.weights[site.name].double()
            rank = min(self.options.rank, *weight.shape)
            gram = x.T @ x
            factors = svd_llm_factorize(weight, gram, rank)
            root = factors.singular_values[:rank].sqrt()
            # the weight is (d_out, d_in): its U S is the factor on the outputs' side, B here
            gauges = {"U S | V": (factors.A / root, factors.B * root[:, None]), "split": (factors.A, factors.B)}
            for rotation in ("symmetric", "random", "hadamard"):
                try:
                    found = balanced_gauge(factors.A, factors.B, rotation, subject.seed)
                except InputError as error:
                    raise InputError(f"{site.name}: {error}; lower rank={rank}") from None
                gauges[rotation] = (found.A, found.B)
            errors = [quantization_error(A, B, bits, gram) for A, B in gauges.values()]
            report.add(site.name, rank, *errors, 1 - errors[-1] / errors[1])
        gains = report.column("gain")
        pairs = zip(report.column("√S split"), report.column("balanced"), strict=True)
        helped = sum(balanced < split for split, balanced in pairs)
        report.findings = [
            f"balanced and rotated by Hadamard: {min(gains):.0%} to {max(gains):.0%} below the √S split",
            f"balance alone helps on {helped} of {len(gains)} sites: what helps is the rotation",
            f"in a recipe: lowrank: {{gauge: balanced, rotation: hadamard, bits: {bits}}}; without bits the product is "
            "unchanged, and nothing is won or lost",
        ]
        return report
