"""Low rank from the eigenvectors of the output covariance, without a Cholesky factor (Swift-SVD, arXiv 2604.01609)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.compressors.factors import LowRankFactors
from llmcompress.compressors.low_rank import LowRankCompressor, check_rank
from llmcompress.compressors.whitening import check_semidefinite, checked_gram, checked_weight
from llmcompress.types import Statistics


@dataclass(frozen=True)
class OutputCovariance:
    """Space of C = weight gram weightᵀ = Yᵀ Y, the outputs'. weight (d_out, d_in), gram (d_in, d_in), float64."""

    weight: Tensor
    gram: Tensor
    repair: str | None = None
    measures_output: bool = True

    def spectrum(self) -> Tensor:
        return _descending_roots(torch.linalg.eigvalsh(self._compact()[1]))

    def factors(self, rank: int) -> LowRankFactors:
        d_out, d_in = self.weight.shape
        check_rank(rank, d_in, d_out)
        frame, covariance = self._compact()
        eigenvalues, vectors = torch.linalg.eigh(covariance)
        top = vectors.flip(1)[:, :rank]
        if frame is not None:
            top = frame @ top
        return LowRankFactors(self.weight.T @ top, top.T, _descending_roots(eigenvalues))

    def _compact(self) -> tuple[Tensor | None, Tensor]:
        """(Q, Qᵀ C Q) with Q an orthonormal basis of the weight's columns where that is smaller than C."""
        d_out, d_in = self.weight.shape
        if d_out <= d_in:
            return None, self.weight @ self.gram @ self.weight.T
        frame, triangle = torch.linalg.qr(self.weight)
        return frame, triangle @ self.gram @ triangle.T


def swift_svd_factorize(weight: Tensor, gram: Tensor, rank: int) -> LowRankFactors:
    """Minimiser of ||X W - X A B||_F, W = weightᵀ: A = W V_r, B = V_rᵀ with V_r the top eigenvectors of Yᵀ Y, Y = X W.

    weight (d_out, d_in), gram (d_in, d_in) = Xᵀ X; factors in float64; a singular Gram needs no remedy.
    Raises InputError for bad weights, Grams or ranks. Source: arXiv 2604.01609.
    """
    weight = checked_weight(weight)
    return OutputCovariance(weight, checked_gram(gram, weight)).factors(rank)


def _descending_roots(eigenvalues: Tensor) -> Tensor:
    check_semidefinite(eigenvalues)
    return eigenvalues.flip(0).clamp_min(0).sqrt()


class SwiftSVD(LowRankCompressor):
    needs = frozenset({"gram"})

    def space(self, weight: Tensor, statistics: Statistics, name: str) -> OutputCovariance:
        return OutputCovariance(weight, checked_gram(statistics.require("gram", name), weight))
