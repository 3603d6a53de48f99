"""Row sampling by leverage scores, Lewis weights and lp sensitivities (arXiv 2306.00732).

The lp sensitivity of row x_i is the largest share |x_i·x|^p / ||X x||_p^p that it can have of the norm. Sampling rows
with probabilities at least in proportion to it preserves ||X x||_p for all x at once. Lewis weights are the leverage
scores of the rows reweighted so that they are their own leverage scores; they bound the sensitivities on both sides.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from sklearn.base import BaseEstimator
from torch import Tensor

from llmcompress.backends.checks import checked_matrix, choose, generator_for
from llmcompress.backends.ports import Sample, Subject
from llmcompress.backends.report import Report
from llmcompress.backends.sampling.sensitivities import lp_sensitivities
from llmcompress.backends.sampling.weights import (
    check_p,
    leverage_scores,
    lewis_weights,
    orthonormal_basis,
    powers,
    principal_features,
)
from llmcompress.errors import InputError

__all__ = [
    "Sensitivity",
    "SensitivityOptions",
    "SensitivitySampler",
    "distortion",
    "leverage_scores",
    "lewis_weights",
    "lp_sensitivities",
    "root_leverage_sample",
    "sample_size",
]

SCORES = ("uniform", "row_norm", "leverage", "lewis", "root_leverage", "sensitivity", "sensitivity+leverage")
RULES = ("generic", "sensitivity", "lewis", "root_leverage", "combined")
ENTRIES = 1 << 20  # rows x directions worked on at a time
EXACT_ROWS = 512  # above it, exact sensitivities would cost n² r² and a coreset stands for the norm


class SensitivityOptions(BaseModel, extra="forbid"):
    n_samples: int = Field(default=4096, ge=1, description="rows kept of each input, on average")
    p: float = Field(default=2.0, ge=1, description="norm that is preserved: 2 protects Grams, 4 outlier channels")
    score: Literal["uniform", "row_norm", "leverage", "lewis", "root_leverage", "sensitivity",
                   "sensitivity+leverage"] = Field(default="lewis", description="what probabilities are in "
                                                   "proportion to")  # fmt: skip
    rank: int | None = Field(default=None, ge=1, description="leading principal directions scored; all if absent")


# --- sizes and quality -----------------------------------------------------------------------------------------------


def sample_size(S: float, d: int, p: float, eps: float, rule: str = "sensitivity") -> int:
    """Rows that a rule asks for at total sensitivity S, up to constants and logarithms; `eps` the distortion.

    generic: S d. sensitivity: S^(2-2/p) for p > 2; d^(1-p/2) S for p <= 2, Chen and Derezinski's sharper bound. lewis:
    d^max(1, p/2). root_leverage: d, p < 2. combined (leverage + sensitivity): d^(2/p) S^(2-4/p) for p > 2, S + d for
    p <= 2 (arXiv 2406.00328). All over eps². InputError for an unknown rule or one that p rules out.
    """
    check_p(p)
    choose("rule", rule, RULES)
    if not (eps > 0 and S > 0 and d >= 1):
        raise InputError(f"eps, S must be positive and d at least 1; got {eps}, {S}, {d}")
    if rule == "root_leverage" and p >= 2:
        raise InputError(f"root_leverage holds for p < 2; got {p}")
    rows = {
        "generic": S * d,
        "sensitivity": S ** (2 - 2 / p) if p > 2 else d ** (1 - p / 2) * S,
        "lewis": d ** max(1.0, p / 2),
        "root_leverage": float(d),
        "combined": d ** (2 / p) * S ** (2 - 4 / p) if p > 2 else S + d,
    }[rule]
    return math.ceil(rows / eps**2)


def distortion(
    X: Tensor, idx: Tensor, weights: Tensor, p: float, n_directions: int = 2000,
    generator: torch.Generator | None = None,
) -> float:  # fmt: skip
    """sup over x of | sum c_i |x_i·x|^p / ||X x||_p^p - 1 |.

    Exact by eigenvalues for p = 2; otherwise over n_directions directions of the whitened space, half of them random
    and half those of the rows with the largest leverage.
    """
    return Distortion(X, p, n_directions, generator)(idx, weights)


class Distortion:
    """`distortion` of many samples of one X: its norms in all directions are computed once."""

    def __init__(self, X: Tensor, p: float, n_directions: int = 2000, generator: torch.Generator | None = None) -> None:
        check_p(p)
        self.p, self.basis = p, orthonormal_basis(checked_matrix(X))
        if p == 2:
            return
        basis, generator = self.basis, generator or generator_for(0, self.basis.device)
        rows = basis[basis.square().sum(1).topk(min(n_directions // 2, len(basis))).indices]
        shape = (n_directions - len(rows), basis.shape[1])
        random = torch.randn(shape, generator=generator, dtype=basis.dtype, device=basis.device)
        self.directions = torch.cat((rows, random))
        parts = self.directions.split(max(1, ENTRIES // len(basis)))
        self.norms = torch.cat([powers(basis @ part.T, p).sum(0) for part in parts])

    def __call__(self, idx: Tensor, weights: Tensor) -> float:
        kept, weights = self.basis[idx], weights.double()
        if self.p == 2:
            eigenvalues = torch.linalg.eigvalsh(kept.T @ (weights[:, None] * kept))
            return float((eigenvalues - 1).abs().max())
        return float((weights @ powers(kept @ self.directions.T, self.p) / self.norms - 1).abs().max())


# --- sampling --------------------------------------------------------------------------------------------------------


def _probabilities(scores: Tensor, n_samples: float) -> Tensor:
    """q = min(1, alpha score) with sum q = n_samples, alpha by bisection; all ones if there are no more rows."""
    nonzero = scores > 0
    if int(nonzero.sum()) <= n_samples:
        return nonzero.to(scores)
    low, high = 0.0, float(n_samples / scores.sum())
    while float((high * scores).clamp_max(1).sum()) < n_samples:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * scores).clamp_max(1).sum()) < n_samples else (low, middle)
    return (high * scores).clamp_max(1)


def _bernoulli(q: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of independent draws and their weights 1/q."""
    drawn = torch.rand(q.shape, generator=generator, dtype=q.dtype, device=q.device) < q
    indices = drawn.nonzero()[:, 0]
    return indices, 1 / q[indices]


def root_leverage_sample(X: Tensor, p: float, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices and weights of repeated sampling with q = min(1, alpha tau^(p/2)), tau of the reweighted survivors.

    Stops when more than 0.9 of the rows would survive; the size tends to alpha^(2/p) rank. InputError unless p < 2.
    Cost: O(n r²) for the first pass, geometrically less after it.
    """
    check_p(p)
    if p >= 2:
        raise InputError(f"root_leverage holds for p < 2; got {p}")
    if not alpha > 0:
        raise InputError(f"alpha must be positive; got {alpha}")
    X = checked_matrix(X)
    indices = (X != 0).any(1).nonzero()[:, 0]
    weights = torch.ones(len(indices), dtype=X.dtype, device=X.device)
    while len(indices):
        tau = leverage_scores(weights[:, None] ** (1 / p) * X[indices])
        q = (alpha * tau ** (p / 2)).clamp_max(1)
        if float(q.sum()) > 0.9 * len(q):
            break
        kept, factor = _bernoulli(q, generator)
        indices, weights = indices[kept], weights[kept] * factor
    return indices, weights


class SensitivitySampler(BaseEstimator):
    """Samples rows of X so that ||X x||_p^p ≈ sum of weights[j] |X[indices[j]]·x|^p for all x.

    n_samples: expected rows (a bound's constant for root_leverage). score: one of SCORES. rank: leading principal
    directions that are scored, all if None. allow_rank_loss: accept n_samples below the rank. random_state: int or
    generator. After `fit(X)`, X (n, d): scores_, probabilities_ (n,) in X's dtype; total_sensitivity_, the scores' sum;
    rank_; indices_ (m,) int64; weights_ (m,), 1/q, exactly 1 where q = 1. Probabilities are not known in closed form
    for root_leverage: there they are those of the first pass. InputError for bad arguments.
    """

    def __init__(
        self, n_samples: int, p: float = 2.0, score: str = "lewis", rank: int | None = None,
        allow_rank_loss: bool = False, random_state: int | torch.Generator | None = None,
    ) -> None:  # fmt: skip
        self.n_samples, self.p, self.score, self.rank = n_samples, p, score, rank
        self.allow_rank_loss, self.random_state = allow_rank_loss, random_state

    def fit(self, X: Tensor, y: Any = None) -> SensitivitySampler:
        check_p(self.p)
        choose("score", self.score, SCORES)
        if self.n_samples < 1:
            raise InputError(f"n_samples must be at least 1; got {self.n_samples}")
        if self.score == "root_leverage" and self.p >= 2:
            raise InputError(f"root_leverage holds for p < 2; got {self.p}")
        dtype = torch.as_tensor(X).dtype
        X = checked_matrix(X)
        if not X.any():
            raise InputError("X is zero: no row can be sampled")
        self._features = X if self.rank is None else principal_features(X, self.rank)
        basis = orthonormal_basis(self._features)
        self.rank_ = basis.shape[1]
        if self.n_samples < self.rank_ and not self.allow_rank_loss:
            raise InputError(
                f"n_samples {self.n_samples} is below the rank {self.rank_}: no sample can keep every direction; raise "
                "it, set a smaller rank, or allow_rank_loss"
            )
        scores = self._scores(X, basis)
        self._q = _probabilities(scores, self.n_samples)
        self.scores_, self.probabilities_ = scores.to(dtype), self._q.to(dtype)
        self.total_sensitivity_ = float(scores.sum())
        self._generator = generator_for(self.random_state, X.device)
        self.indices_, self.weights_ = self.sample()
        self.weights_ = self.weights_.to(dtype)
        return self

    def sample(self) -> tuple[Tensor, Tensor]:
        """Another draw: indices (m,), weights (m,) float64."""
        if self.score == "root_leverage":
            alpha = (self.n_samples / self.rank_) ** (self.p / 2)
            return root_leverage_sample(self._features, self.p, alpha, self._generator)
        return _bernoulli(self._q, self._generator)

    def _scores(self, X: Tensor, basis: Tensor) -> Tensor:
        rows, p = self._features, self.p
        if self.score == "uniform":
            return (X != 0).any(1).double()
        if self.score == "row_norm":
            return rows.norm(dim=1) ** p
        leverage = basis.square().sum(1)
        if self.score == "leverage":
            return leverage
        if self.score == "root_leverage":
            return leverage ** (p / 2)
        if self.score == "lewis":
            return leverage if p == 2 else lewis_weights(basis, p)
        method = "exact" if p == 2 or len(basis) <= EXACT_ROWS else "coreset"
        sensitivities = lp_sensitivities(basis, p, method)[1]
        return sensitivities if self.score == "sensitivity" else sensitivities + leverage


# --- the ports -------------------------------------------------------------------------------------------------------


class Sensitivity:
    """The sampler port, and an analysis: p-distortion of each score's rows against uniform rows of the same number."""

    Options: ClassVar[type[SensitivityOptions]] = SensitivityOptions

    def __init__(self, options: SensitivityOptions) -> None:
        self.options = options

    def sample(self, rows: Tensor, generator: torch.Generator) -> Sample:
        options = self.options
        found = SensitivitySampler(
            options.n_samples, options.p, options.score, options.rank, random_state=generator
        ).fit(rows)
        return Sample(found.indices_, found.weights_.double())

    def analyze(self, subject: Subject) -> Report:
        """Distortion at p = 2 and p = 4 over each input's leading directions; Lewis rows and uniform rows."""
        rank, n_samples = self.options.rank or 32, self.options.n_samples
        report = Report(
            f"row sampling, {rank} leading directions: worst relative error of ||Xx||_p^p (median of 5 draws)",
            ["input", "rows", "kept", "p", "lewis", "uniform", "uniform / lewis"],
        )
        generator = subject.generator()
        gains = []
        for name, rows in subject.inputs.items():
            features = principal_features(rows.double(), min(rank, *rows.shape))
            kept = min(n_samples, max(10 * features.shape[1], len(rows) // 12))
            for p in (2.0, 4.0):
                worst = {
                    score: _median_distortion(features, kept, p, score, generator) for score in ("lewis", "uniform")
                }
                gains.append(worst["uniform"] / worst["lewis"])
                report.add(name, len(rows), kept, p, worst["lewis"], worst["uniform"], gains[-1])
        least, most = (report.rows[gains.index(f(gains))][0] for f in (min, max))
        report.findings.append(
            f"Lewis rows are {min(gains):.2f} ({least}) to {max(gains):.2f} ({most}) times as exact as uniform rows of "
            "the same number"
        )
        return report


def _median_distortion(features: Tensor, kept: int, p: float, score: str, generator: torch.Generator) -> float:
    sampler = SensitivitySampler(kept, p, score, random_state=generator).fit(features)
    measure = Distortion(features, p, 500, generator)
    return float(torch.tensor([measure(*sampler.sample()) for _ in range(5)]).median())
