"""Plain truncated SVD: the best rank-r approximation of the weight itself (Eckart and Young, 1936). The baseline."""

from __future__ import annotations

from torch import Tensor

from llmcompress.compressors.factors import LowRankFactors
from llmcompress.compressors.low_rank import LowRankCompressor, Whitened
from llmcompress.compressors.whitening import checked_weight
from llmcompress.types import Statistics


def svd_factorize(weight: Tensor, rank: int) -> LowRankFactors:
    """weight (d_out, d_in), W = weightᵀ = U S Vᵀ: A = U_r S_r^½, B = S_r^½ V_rᵀ, float64.

    Raises InputError if the weight is not finite or not 1 <= rank <= min(d_in, d_out).
    """
    return Whitened(checked_weight(weight).T).factors(rank)


class SVD(LowRankCompressor):
    """Data-free: looks at the weights alone."""

    def space(self, weight: Tensor, statistics: Statistics, name: str) -> Whitened:
        return Whitened(weight.T)
