"""Fisher-weighted low-rank factorisation (FWSVD, arXiv 2207.00112): the error of each input's weights counts by how
much the loss depends on them. Made for fine-tuning afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.compressors.factors import LowRankFactors
from llmcompress.compressors.low_rank import LowRankCompressor, LowRankOptions, Whitened, check_rank
from llmcompress.compressors.ranks import rank_from_fraction
from llmcompress.compressors.svd_llm import whitened
from llmcompress.compressors.whitening import checked_vector, checked_weight
from llmcompress.errors import InputError
from llmcompress.types import Budget, Site, Statistics

FLOOR = 1e-8

_READS = {
    "input": ("row_fisher",),
    "output": ("column_fisher",),
    "both": ("row_fisher", "column_fisher"),
    "gram": ("gram", "column_fisher"),
}


class FWSVDOptions(LowRankOptions):
    weighting: Literal["input", "output", "both", "gram"] = Field(
        default="input",
        description="what is weighted: inputs by the Fisher (the paper), outputs, both, or inputs by their Gram",
    )
    rank_fraction: float | None = Field(
        default=None, gt=0, lt=1, description="share of the full rank to keep, as in the paper; in place of ratio"
    )
    allow_unused: bool = Field(default=False, description="factorise sites without any gradient by plain SVD")


def fwsvd(weight: Tensor, row_weights: Tensor, rank: int, floor: float = FLOOR) -> LowRankFactors:
    """Minimiser of sum_i I_i ||W_i - (A B)_i||², W = weightᵀ: the error of input i's weights counts I_i.

    weight (d_out, d_in), row_weights (d_in,) of any scale, in units of their mean no less than `floor`; factors in
    float64. All zero: taken as equal (plain SVD), and `repair` says so. Raises InputError for bad weights or ranks.
    Source: arXiv 2207.00112; balanced between the factors.
    """
    weight = checked_weight(weight)
    return _space(weight, row_weights, None, None, floor).factors(rank)


def weighted_low_rank(
    weight: Tensor,
    rank: int,
    row_weights: Tensor | None = None,
    column_weights: Tensor | None = None,
    gram: Tensor | None = None,
) -> LowRankFactors:
    """Minimiser of ||T (W - A B) diag(q)||_F with q² the output weights (d_out,), T the root of the input side.

    The input side is row_weights (d_in,) or gram (d_in, d_in), not both; what is None is the identity. Float64.
    """
    weight = checked_weight(weight)
    return _space(weight, row_weights, column_weights, gram, FLOOR).factors(rank)


def weighted_error(weight: Tensor, factors: LowRankFactors, row_weights: Tensor) -> float:
    """sum_i I_i ||W_i - (A B)_i||², the objective, with the weights as they are."""
    weight = checked_weight(weight)
    rows = checked_vector(row_weights, weight.shape[1], "Fisher weights", weight.device)
    return float(((weight - factors.to_dense()).square() * rows).sum())


def optimal_weighted_error(weight: Tensor, row_weights: Tensor, rank: int) -> float:
    """The least `weighted_error` of any factors of that rank: the sum of the dropped sigma_i(diag(I^½) W)²."""
    weight = checked_weight(weight)
    rows = checked_vector(row_weights, weight.shape[1], "Fisher weights", weight.device)
    check_rank(rank, *weight.shape)
    return float(torch.linalg.svdvals(weight * rows.sqrt())[rank:].square().sum())


def _space(
    weight: Tensor, row_weights: Tensor | None, column_weights: Tensor | None, gram: Tensor | None, floor: float
) -> Whitened:
    """weight (d_out, d_in) float64. The root is essential: the objective weights squares by the Fisher."""
    d_out, d_in = weight.shape
    if row_weights is not None and gram is not None:
        raise InputError("the input side is weighted by Fisher weights or by a Gram, not by both")
    repairs: list[str | None] = []
    if gram is not None:
        space = dataclasses.replace(whitened(weight, gram), measures_output=False)
        repairs.append(space.repair)
    elif row_weights is not None:
        scale, repair = _root_weights(row_weights, d_in, floor, weight.device)
        column = scale[:, None]
        space = Whitened(column * weight.T, undo=lambda a: a / column)
        repairs.append(repair)
    else:
        space = Whitened(weight.T)
    if column_weights is not None:
        scale, repair = _root_weights(column_weights, d_out, floor, weight.device)
        space = dataclasses.replace(space, matrix=space.matrix * scale, output_scale=scale)
        repairs.append(repair)
    return dataclasses.replace(space, repair="; ".join(text for text in repairs if text) or None)


def _root_weights(weights: Tensor, size: int, floor: float, device: torch.device) -> tuple[Tensor, str | None]:
    weights = checked_vector(weights, size, "Fisher weights", device)
    mean = weights.mean()
    if mean == 0:
        return torch.ones_like(weights), f"all {size} Fisher weights of one side are zero; taken as equal"
    return (weights / mean).clamp_min(floor).sqrt(), None


class FWSVD(LowRankCompressor):
    Options: ClassVar[type[FWSVDOptions]] = FWSVDOptions
    options: FWSVDOptions

    def __init__(self, options: FWSVDOptions | None = None) -> None:
        super().__init__(options)
        self.needs = frozenset(_READS[self.options.weighting])

    def rank(self, sites: Sequence[Site], budget: Budget) -> int | None:
        """The rank of `rank_fraction` where that is given, whatever the budget; otherwise the budget's."""
        fraction = self.options.rank_fraction
        if fraction is None:
            return super().rank(sites, budget)
        return rank_from_fraction(sites[0].d_in, [site.d_out for site in sites], fraction, self.options.pivot)

    def space(self, weight: Tensor, statistics: Statistics, name: str) -> Whitened:
        found = {field: statistics.require(field, name) for field in _READS[self.options.weighting]}
        for field in ("row_fisher", "column_fisher"):
            if field in found and not found[field].any() and not self.options.allow_unused:
                raise InputError("no gradient reached this site; allow_unused: true factorises it by plain SVD")
        return _space(weight, found.get("row_fisher"), found.get("column_fisher"), found.get("gram"), FLOOR)
