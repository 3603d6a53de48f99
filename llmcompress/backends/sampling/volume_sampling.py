"""Determinantal point processes and generalised volume sampling for weighted least squares (arXiv 2312.14057).

A space of m features, orthonormal over N rows: Q (N, m), QᵀQ = I, leverage l_i = ||Q_i||². A few rows with weights
stand for all: c = argmin sum_j w_j (f(x_j) - sqrt(N) Q_j·c)², stable if the weighted Gram of the chosen rows is near I.
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
from llmcompress.backends.sampling.weights import GRAM_RANGE
from llmcompress.errors import InputError, RunError

METHODS = ("projection_dpp", "iid_optimal", "volume", "repeated_dpp", "uniform")
MEASURES = ("optimal", "uniform", "mixture")


class VolumeOptions(BaseModel, extra="forbid"):
    n_samples: int = Field(default=4096, ge=1, description="rows kept of each input")
    method: Literal["iid_optimal", "volume", "repeated_dpp"] = Field(
        default="repeated_dpp", description="repeated_dpp is the most stable; iid_optimal draws by leverage alone"
    )
    rank: int | None = Field(default=None, ge=1, description="leading principal directions; all if absent")
    nu: Literal["optimal", "uniform", "mixture"] = Field(
        default="optimal", description="density of volume's other rows: by leverage, uniform, or the mean of both"
    )
    delta: float | None = Field(
        default=None, gt=0, lt=1, description="draw again until the chosen rows' least eigenvalue is 1 - delta"
    )


# --- drawing ---------------------------------------------------------------------------------------------------------


def projection_dpp(Q: Tensor, generator: torch.Generator) -> Tensor:
    """m distinct rows (m,) int64 with probability det(Q_I)² of the set, by the chain rule.

    Q (N, m) with orthonormal columns. O(N m²) time, O(N m) memory. InputError unless QᵀQ = I to 1e-6.
    """
    return _dpps(_checked_basis(Q), 1, generator)[0]


def _dpps(Q: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Independent sets (count, m), all drawn at once: a step is one product with Q."""
    m = Q.shape[1]
    mass = Q.square().sum(1).repeat(count, 1)
    chosen = torch.empty(count, m, dtype=torch.int64, device=Q.device)
    directions = Q.new_zeros(count, m, m)
    for step in range(m):
        below = mass.cumsum(1)
        draw = torch.rand(count, 1, generator=generator, dtype=Q.dtype, device=Q.device) * below[:, -1:]
        chosen[:, step] = torch.searchsorted(below, draw, right=True)[:, 0]  # never a row without mass
        e, before = Q[chosen[:, step], :, None], directions[:, :step]
        for _ in range(2):  # twice: once loses orthogonality where rows are nearly dependent
            e = e - before.mT @ (before @ e)
        e = e[:, :, 0] / e.norm(dim=1)
        directions[:, step] = e
        explained = e @ Q.T
        mass.addcmul_(explained, explained, value=-1).clamp_min_(0)
        mass.scatter_(1, chosen[:, : step + 1], 0.0)
    return chosen


def density(Q: Tensor, nu: str) -> Tensor:
    """Probabilities (N,) of single rows: leverage / m (optimal), 1/N (uniform), or the mean of both (mixture)."""
    choose("nu", nu, MEASURES)
    optimal = Q.square().sum(1) / Q.shape[1]
    uniform = torch.full_like(optimal, 1 / len(Q))
    return {"optimal": optimal, "uniform": uniform, "mixture": (optimal + uniform) / 2}[nu]


def iid_optimal(Q: Tensor, n: int, generator: torch.Generator, nu: str = "optimal") -> tuple[Tensor, Tensor]:
    """n independent rows from `density`: indices (n,) and weights (n,), dmu/dnu = 1 / (N probability)."""
    return _iid(_checked_basis(Q, n), n, nu, generator)


def _iid(Q: Tensor, n: int, nu: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    probabilities = density(Q, nu)
    indices = torch.multinomial(probabilities, n, replacement=True, generator=generator)
    return indices, 1 / (len(Q) * probabilities[indices])


def volume_rescaled(Q: Tensor, n: int, nu: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n >= m rows with density proportional to det(G) with respect to nu^n: indices, weights.

    m of them from the projection DPP, the others from nu, shuffled; least squares on them are unbiased.
    """
    return _volume(_checked_basis(Q, n), n, nu, generator)


def _volume(Q: Tensor, n: int, nu: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    probabilities = density(Q, nu)
    indices = _dpps(Q, 1, generator)[0]
    if n > len(indices):
        others = torch.multinomial(probabilities, n - len(indices), replacement=True, generator=generator)
        indices = torch.cat((indices, others))
    indices = indices[torch.randperm(n, generator=generator, device=Q.device)]
    return indices, 1 / (len(Q) * probabilities[indices])


def repeated_dpp(Q: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ceil(n / m) independent projection DPPs, all of whose rows are kept: indices, optimal weights m / (N l).

    A row that several draws choose stands several times. O(N m n).
    """
    return _repeated(_checked_basis(Q, n), n, generator)


def _repeated(Q: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    indices = _dpps(Q, math.ceil(n / Q.shape[1]), generator).flatten()
    return indices, 1 / (len(Q) * density(Q, "optimal")[indices])


# --- least squares on the rows ---------------------------------------------------------------------------------------


def empirical_gram(Q: Tensor, idx: Tensor, w: Tensor) -> Tensor:
    """G (m, m) = mean over the rows of w phi phiᵀ, phi = sqrt(N) Q_i; its expectation is I."""
    rows = Q[idx].double()
    return len(Q) / len(idx) * rows.T @ (w.double()[:, None] * rows)


def weighted_lstsq(Q: Tensor, idx: Tensor, w: Tensor, F: Tensor) -> Tensor:
    """c (m, k) minimising sum_j w_j ||F_j - sqrt(N) Q_j c||² by QR; F (n, k) are the targets of the rows idx alone.

    InputError for weights that are not positive; RunError if the rows do not span the features.
    """
    if not (w > 0).all():
        raise InputError("the weights must be positive")
    root = w.double().sqrt()[:, None]
    q, r = torch.linalg.qr(root * math.sqrt(len(Q)) * Q[idx].double())
    diagonal = r.diagonal().abs()
    if r.shape[0] < r.shape[1] or diagonal.min() <= 1e-13 * diagonal.max():
        raise RunError(f"the {len(idx)} rows do not span the {Q.shape[1]} features")
    return torch.linalg.solve_triangular(r, q.T @ (root * F.double()), upper=True).to(F.dtype)


def _checked_basis(Q: Tensor, n: int | None = None) -> Tensor:
    Q = checked_matrix(Q, "Q")
    m = Q.shape[1]
    if m > len(Q) or (Q.T @ Q - torch.eye(m, dtype=Q.dtype, device=Q.device)).abs().max() > 1e-6:
        raise InputError("Q must have orthonormal columns: QᵀQ = I to 1e-6")
    if n is not None and n < m:
        raise InputError(f"n_samples must be >= rank: {n} rows for {m} features")
    return Q


# --- the estimator ---------------------------------------------------------------------------------------------------


class VolumeSampler(BaseEstimator):
    """Draws rows of X (N, d) for least squares on its leading `rank` directions (its numerical rank if None).

    method: one of METHODS; nu: density of `volume`'s other rows; delta: draw again until lambda_min(G) >= 1 - delta, at
    most max_tries times (RunError). After `fit`: indices_ (n,) int64, with repeats; weights_ (n,) in X's dtype;
    leverage_ (N,), basis_ (N, m), lambda_min_, cond_ of the empirical Gram, n_tries_, rank_. InputError for bad input.
    """

    def __init__(
        self, n_samples: int, method: str = "repeated_dpp", rank: int | None = None, nu: str = "optimal",
        delta: float | None = None, max_tries: int = 1000, random_state: int | torch.Generator | None = None,
    ) -> None:  # fmt: skip
        self.n_samples, self.method, self.rank, self.nu = n_samples, method, rank, nu
        self.delta, self.max_tries, self.random_state = delta, max_tries, random_state

    def fit(self, X: Tensor, y: Any = None) -> VolumeSampler:
        choose("method", self.method, METHODS)
        choose("nu", self.nu, MEASURES)
        if self.delta is not None and not 0 < self.delta < 1:
            raise InputError(f"delta must be in (0, 1); got {self.delta}")
        dtype = torch.as_tensor(X).dtype
        self.basis_ = Q = leading_basis(checked_matrix(X), self.rank)
        self.rank_ = Q.shape[1]
        if self.n_samples < self.rank_:
            raise InputError(f"n_samples must be >= rank: {self.n_samples} rows for {self.rank_} features")
        if self.method == "projection_dpp" and self.n_samples != self.rank_:
            raise InputError(f"a projection DPP draws rank = {self.rank_} rows; n_samples is {self.n_samples}")
        self.leverage_ = Q.square().sum(1).to(dtype)
        generator = generator_for(self.random_state, Q.device)
        self.n_tries_ = 0
        for _ in range(self.max_tries):
            self.n_tries_ += 1
            indices, weights = self._draw(Q, generator)
            eigenvalues = torch.linalg.eigvalsh(empirical_gram(Q, indices, weights))
            if self.delta is None or eigenvalues[0] >= 1 - self.delta:
                break
        else:
            raise RunError(
                f"none of {self.max_tries} draws of n = {self.n_samples} rows for m = {self.rank_} features had a "
                f"least eigenvalue of 1 - delta, delta = {self.delta}"
            )
        self.indices_, self.weights_ = indices, weights.to(dtype)
        self.lambda_min_ = max(float(eigenvalues[0]), 0.0)
        self.cond_ = float(eigenvalues[-1]) / self.lambda_min_ if self.lambda_min_ else math.inf
        return self

    def _draw(self, Q: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.method in ("projection_dpp", "repeated_dpp"):
            return _repeated(Q, self.n_samples, generator)
        if self.method == "volume":
            return _volume(Q, self.n_samples, self.nu, generator)
        return _iid(Q, self.n_samples, "uniform" if self.method == "uniform" else "optimal", generator)


def leading_basis(X: Tensor, rank: int | None) -> Tensor:
    """The `rank` leading left singular vectors (N, rank), at most the numerical rank at 1e-10 of the largest value.

    X (N, d) float64. Of a tall X from its Gram, where the eigenvalues up to `rank` are within GRAM_RANGE, or its QR
    factor: O(N d²). InputError if the rank is out of range or X is zero.
    """
    if rank is not None and not 1 <= rank <= min(X.shape):
        raise InputError(f"rank must be between 1 and min(N, d) = {min(X.shape)}; got {rank}")
    tall = X.shape[0] > X.shape[1]
    if tall:
        values, vectors = (found.flip(-1) for found in torch.linalg.eigh(X.T @ X))
        if values[(rank or len(values)) - 1] > GRAM_RANGE * values[0]:
            return X @ (vectors * values.rsqrt())[:, :rank]
    q, r = torch.linalg.qr(X) if tall else (None, X)
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    if s[0] == 0:
        raise InputError("X is zero: it has no features")
    u = u[:, s > 1e-10 * s[0]][:, :rank]
    return q @ u if q is not None else u


# --- the ports -------------------------------------------------------------------------------------------------------


class Volume:
    """The sampler port, and an analysis: how well rows of each kind carry a least-squares fit to a far target."""

    Options: ClassVar[type[VolumeOptions]] = VolumeOptions

    def __init__(self, options: VolumeOptions) -> None:
        self.options = options

    def sample(self, rows: Tensor, generator: torch.Generator) -> Sample:
        options = self.options
        found = VolumeSampler(
            options.n_samples, options.method, options.rank, options.nu, options.delta, random_state=generator
        ).fit(rows)
        scale = len(rows) / len(found.indices_)  # its weights average to 1; those of a Gram add up to the rows
        note = f"sampled rows: least eigenvalue {found.lambda_min_:.2f} of 1, condition {found.cond_:.1f}"
        return Sample(found.indices_, found.weights_.double() * scale, [note])

    def analyze(self, subject: Subject) -> Report:
        """Excess error of a fit to the last residual stream from 2 and 4 rows a feature; least eigenvalue."""
        rank = self.options.rank or 64
        target = subject.residual[max(subject.residual)].double()
        report = Report(
            f"least squares of the last block's output on {rank} leading directions: error over the best one "
            "(mean of 8 draws)",
            ["features", "rows", "kept", "method", "excess", "least eigenvalue"],
        )
        features = dict(subject.inputs) | {f"output of block {i}": r for i, r in list(subject.residual.items())[:-1]}
        generator = subject.generator()
        gains: dict[int, list[float]] = {2: [], 4: []}
        for name, rows in features.items():
            basis = leading_basis(rows.double(), min(rank, *rows.shape))
            for factor in (2, 4):
                kept, found = factor * basis.shape[1], {}
                for method in ("uniform", "iid_optimal", "volume", "repeated_dpp"):
                    found[method], least = _mean_excess(basis, target, kept, method, generator)
                    report.add(name, len(rows), kept, method, found[method], least)
                gains[factor].append(found["uniform"] / found["repeated_dpp"])
        for factor, values in gains.items():
            report.findings.append(
                f"{factor} rows a feature: the excess of uniform rows is {min(values):.2f} to {max(values):.4g} times "
                f"that of repeated DPPs, most at {list(features)[values.index(max(values))]}"
            )
        return report


def _mean_excess(
    basis: Tensor, target: Tensor, n: int, method: str, generator: torch.Generator, draws: int = 8
) -> tuple[float, float]:
    """Mean of ||f - fit||² / ||f - best fit||² and of the least eigenvalue."""
    best = float((target - basis @ (basis.T @ target)).square().sum())
    excess, least = 0.0, 0.0
    for _ in range(draws):
        sampler = VolumeSampler(n, method, random_state=generator).fit(basis)
        own = sampler.basis_  # another basis of the same span
        coefficients = weighted_lstsq(own, sampler.indices_, sampler.weights_, target[sampler.indices_])
        fit = math.sqrt(len(own)) * own @ coefficients
        excess += float((target - fit).square().sum()) / best / draws
        least += sampler.lambda_min_ / draws
    return excess, least
