"""Activation-aware SVD: rows of the weight scaled by the mean activation magnitude (ASVD, arXiv 2312.05821)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from llmcompress.compressors.factors import LowRankFactors
from llmcompress.compressors.low_rank import LowRankCompressor, LowRankOptions, Whitened
from llmcompress.compressors.whitening import checked_vector, checked_weight
from llmcompress.errors import InputError
from llmcompress.types import Statistics

FLOOR = 1e-6  # added to every scale, so that an input that is never active can be scaled back


class ASVDOptions(LowRankOptions):
    alpha: float = Field(
        default=0.5, gt=0, le=1, description="power of the mean activation magnitude that scales an input"
    )


def asvd_factorize(weight: Tensor, abs_mean: Tensor, rank: int, alpha: float = 0.5) -> LowRankFactors:
    """weight (d_out, d_in), abs_mean (d_in,) the mean of |x|; s = abs_mean^alpha + 1e-6, SVD of diag(s) W, float64.

    Raises InputError for bad weights, magnitudes or rank. Source: arXiv 2312.05821
    """
    return _space(checked_weight(weight), abs_mean, alpha).factors(rank)


def _space(weight: Tensor, abs_mean: Tensor, alpha: float) -> Whitened:
    magnitude = checked_vector(abs_mean, weight.shape[1], "activation magnitudes", weight.device)
    scale = (magnitude**alpha + FLOOR)[:, None]
    return Whitened(scale * weight.T, undo=lambda a: a / scale)


class ASVD(LowRankCompressor):
    Options: ClassVar[type[ASVDOptions]] = ASVDOptions
    needs = frozenset({"abs_sum"})
    options: ASVDOptions

    def space(self, weight: Tensor, statistics: Statistics, name: str) -> Whitened:
        abs_sum = statistics.require("abs_sum", name)
        if statistics.tokens <= 0:
            raise InputError("the activation magnitudes sum over no tokens")
        return _space(weight, abs_sum / statistics.tokens, self.options.alpha)
