"""Robust low-rank recovery by the sub-gradient method on the l1 loss, from a small start (arXiv 2202.08788).

y_i = <A_i, X*> + s_i, X* (d, d) positive semidefinite of rank r, s_i gross outliers or Gaussian noise. Descent on the
mean |<A_i, U Uᵀ> - y_i| over U (d, r'), any r' >= r, from a start of size alpha: the signal's directions grow out of it
exponentially while the others stay near it, so that the error is a power of alpha and nothing is stopped early. The
truth is found even where it is no minimiser of the loss.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from sklearn.base import BaseEstimator
from torch import Tensor

from llmcompress.backends.checks import choose
from llmcompress.backends.ports import Subject
from llmcompress.backends.recovery.l1_factors import l1_factors
from llmcompress.backends.recovery.probes import DenseOperator, Probes, QuadraticProbes
from llmcompress.backends.report import Report
from llmcompress.errors import InputError, RunError

__all__ = ["DenseOperator", "Descent", "QuadraticProbes", "SubGM", "SubGMOptions", "SubGMRecovery", "descend",
           "phi_gaussian", "phi_outlier", "sign_rip_direction", "spectral_init"]  # fmt: skip

log = logging.getLogger("llmcompress")
STEPS = ("geometric", "loss", "median", "constant", "sublinear")
GAUSS = 0.6745  # the median of |N(0, 1)|
AXES = 32  # leading axes of a site's inputs that the analysis recovers the Gram of


class SubGMOptions(BaseModel, extra="forbid"):
    rank: int = Field(default=32, ge=1, description="columns of the factor of a Gram: at or above its rank")
    probes: int = Field(default=3000, ge=1, description="readings of a Gram, each of rows of its own")
    alpha: float = Field(default=1e-4, gt=0, description="size of the start; the error is a power of it")
    step: Literal["geometric", "median"] = Field(
        default="geometric", description="how steps shrink: by rho, or with the median residual"
    )
    eta0: float = Field(default=0.4, gt=0, description="first step, in units of the matrix's norm")
    rho: float = Field(default=0.985, gt=0, lt=1, description="geometric: the factor from step to step, and the rate")
    max_iter: int = Field(default=1200, ge=1, description="steps at most")


# --- Sign-RIP --------------------------------------------------------------------------------------------------------


def sign_rip_direction(A: Tensor, X: Tensor, s: Tensor) -> Tensor:
    """Q (d, d) = mean of sign(<A_i, X> - s_i) A_i for A (m, d, d), s (m,): near phi X / ||X||_F on low-rank X."""
    op = DenseOperator(A)
    return op.adjoint(torch.sign(op.forward(X) - s)) / op.m


def phi_outlier(normX: float, s: Tensor, p: float) -> float:
    """phi of Gaussian A_i, p of them outliers, s a sample of these: sqrt(2/pi)(1 - p + p E exp(-s²/2||X||²))."""
    return math.sqrt(2 / math.pi) * (1 - p + p * float(torch.exp(-s.square() / (2 * normX**2)).mean()))


def phi_gaussian(normX: float, nu: float) -> float:
    """phi of Gaussian A_i under noise N(0, nu²): sqrt(2/pi) ||X|| / sqrt(||X||² + nu²)."""
    return math.sqrt(2 / math.pi) * normX / math.hypot(normX, nu)


# --- the descent -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Descent:
    """U (d, r'); losses: mean |residual| before each step and at the end; converged: a step moved U by at most tol."""

    U: Tensor
    losses: list[float]
    converged: bool


def spectral_init(A: Probes, y: Tensor, rank: int, alpha: float) -> Tensor:
    """alpha V Λ₊^½ (d, rank) of the `rank` largest eigenvalues, negative ones zero, of the mean of sign(y_i) A_i.

    That mean is near phi X* / ||X*||_F. InputError if it has no positive eigenvalue.
    """
    values, vectors = torch.linalg.eigh(A.adjoint(torch.sign(y)) / A.m)
    if not values[-1] > 0:
        raise InputError("no positive direction: target not PSD or sign flipped")
    kept = values[-rank:].flip(0).clamp_min(0)
    return alpha * vectors[:, -rank:].flip(1) * kept.sqrt()


def descend(
    A: Probes, y: Tensor, U: Tensor, step: str, eta0: float, rho: float, max_iter: int, tol: float = 0.0
) -> Descent:
    """U <- U - eta_t D U with D the mean of sign(<A_i, U Uᵀ> - y_i) A_i, sign(0) = 0; ||X*||_F is near 1.

    step: geometric eta0 rho^t, the error then decays like rho^t; loss, eta0 times the loss (without noise alone);
    median, eta0 times the median residual (an extension); constant; sublinear, eta0 / sqrt(t + 1).
    RunError naming eta0 if it diverges. Source: arXiv 2202.08788, algorithm 1.
    """
    losses: list[float] = []
    limit, converged = 1e3 * max(1.0, float(U.norm())), False
    for t in range(max_iter):
        residual = A.read(U) - y
        losses.append(float(residual.abs().mean()))
        eta = eta0 * _shrunk(step, residual, rho, t)
        move = A.combine(torch.sign(residual) * (eta / A.m), U)
        U = U - move
        size = float(U.norm())
        if not size <= limit:
            raise RunError(f"step {t + 1}: the descent diverges; lower eta0 = {eta0:g}")
        if tol and float(move.norm()) <= tol * size:
            converged = True
            break
    losses.append(float((A.read(U) - y).abs().mean()))
    return Descent(U, losses, converged)


def _shrunk(step: str, residual: Tensor, rho: float, t: int) -> float:
    """Step t over the first one."""
    if step == "loss":
        return float(residual.abs().mean())
    if step == "median":
        return float(residual.abs().median())
    return {"geometric": rho**t, "constant": 1.0, "sublinear": 1 / math.sqrt(t + 1)}[step]


class SubGMRecovery(BaseEstimator):
    """X_ = U_ U_ᵀ from A, a (m, d, d) tensor or probes, and y (m,): `fit(A, y)`.

    rank: columns r' of U_, at least the truth's rank, which need not be known; alpha: size of the start; step, eta0,
    rho, max_iter, tol: see `descend`; outliers declares that some of y may be wrong by any amount, which the step
    `loss` cannot take. After `fit`: U_ (d, rank), X_ (d, d), loss_curve_, scale_ (||X*||_F as estimated from the median
    of |y|), effective_rank_ (eigenvalues of X_ above a thousandth of the largest), converged_ (False with tol = 0).
    float32 (alpha >= 1e-3) or float64. O(m d²) a step, O(m d r') with probes. InputError for bad arguments, RunError
    if it diverges.
    """

    def __init__(
        self, rank: int, alpha: float = 1e-4, step: str = "geometric", eta0: float = 0.4, rho: float = 0.985,
        max_iter: int = 1200, tol: float = 0.0, outliers: bool = False, random_state: int | None = 0,
    ) -> None:  # fmt: skip
        self.rank, self.alpha, self.step, self.eta0, self.rho = rank, alpha, step, eta0, rho
        self.max_iter, self.tol, self.outliers, self.random_state = max_iter, tol, outliers, random_state

    def fit(self, A: Tensor | Probes, y: Tensor) -> SubGMRecovery:
        probes: Probes = DenseOperator(A) if isinstance(A, Tensor) else A
        self._check(probes, y)
        self.scale_ = float(y.abs().median()) / GAUSS or float(y.abs().mean())
        found = descend(probes, y / self.scale_, spectral_init(probes, y, self.rank, self.alpha), self.step, self.eta0,
                        self.rho, self.max_iter, self.tol)  # fmt: skip
        self.U_ = found.U * math.sqrt(self.scale_)
        self.X_ = self.U_ @ self.U_.T
        self.loss_curve_ = [self.scale_ * loss for loss in found.losses]
        self.converged_ = found.converged
        squares = torch.linalg.svdvals(self.U_).square()
        self.effective_rank_ = int((squares > 1e-3 * squares[0]).sum())
        return self

    def _check(self, probes: Probes, y: Tensor) -> None:
        choose("step", self.step, STEPS)
        if not 1 <= self.rank <= probes.d:
            raise InputError(f"rank must be between 1 and d = {probes.d}; got {self.rank}")
        if not self.alpha > 0:
            raise InputError(f"alpha must be positive; got {self.alpha}")
        if not 0 < self.rho < 1:
            raise InputError(f"rho must be in (0, 1); got {self.rho}")
        if self.step == "loss" and self.outliers:
            raise InputError("step loss needs measurements without outliers: use geometric or median")
        if tuple(y.shape) != (probes.m,):
            raise InputError(f"y must have the {probes.m} measurements of A; got shape {tuple(y.shape)}")
        if not torch.isfinite(y).all():
            raise InputError("y is not finite")
        if not y.any():
            raise InputError("y is zero: it measures nothing")
        if self.step == "geometric" and self.max_iter < math.log(self.alpha) / math.log(self.rho):
            log.warning("sub-gradient method: %d steps of factor %g end before the start of size %g is outgrown",
                        self.max_iter, self.rho, self.alpha)  # fmt: skip


# --- the ports -------------------------------------------------------------------------------------------------------


class SubGM:
    """The recovery port for entries, for a Gram from readings of its rows (`calibration.gram`), and an analysis."""

    Options: ClassVar[type[SubGMOptions]] = SubGMOptions

    def __init__(self, options: SubGMOptions) -> None:
        self.options = options

    def recover(
        self, entries: Tensor, observed: Tensor | None, rank: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The same descent for two factors of a rectangular matrix, on the l1 loss of its entries (an extension)."""
        options = self.options
        return l1_factors(entries, observed, rank, options.eta0, options.rho, options.max_iter)

    # a Gram, row by row

    def start(self, rows: int, d: int, generator: torch.Generator) -> None:
        self._rows, self._d, self._generator = max(1, rows // self.options.probes), d, generator
        self._seen = 0
        self._probes: list[tuple[Tensor, Tensor]] = []
        self._readings: list[Tensor] = []

    def update(self, rows: Tensor) -> None:
        """Every few rows are read by a pair of probes of their own: y = mean of ((x·a)² - (x·b)²) / sqrt 2."""
        whole = len(rows) // self._rows * self._rows
        for part, size in ((rows[:whole], self._rows), (rows[whole:], len(rows) - whole)):
            if not len(part):
                continue
            batches = part.double().view(-1, size, self._d)
            a, b = (self._draw(len(batches), rows.device) for _ in range(2))
            squares = [(batches @ probe[:, :, None]).square().mean((1, 2)) for probe in (a, b)]
            self._readings.append((squares[0] - squares[1]) / math.sqrt(2))
            self._probes.append((a, b))
        self._seen += len(rows)

    def _draw(self, count: int, device: torch.device) -> Tensor:
        return torch.randn(count, self._d, dtype=torch.float64, generator=self._generator, device=device)

    def gram(self) -> tuple[Tensor, list[str]]:
        """The rows' Gram (d, d) float64, their second moment times their count, and what there is to tell."""
        y = torch.cat(self._readings)
        probes = QuadraticProbes(*(torch.cat(part) for part in zip(*self._probes, strict=True)))
        found = self._fit(probes, y)
        level = float((probes.read(found.U_) - y).abs().median()) / found.scale_
        note = (
            f"Gram recovered from {len(y)} readings: effective rank {found.effective_rank_}, median residual "
            f"{level:.3f} of its norm"
        )
        return self._seen * found.X_, [note]

    def _fit(self, probes: QuadraticProbes, y: Tensor) -> SubGMRecovery:
        o = self.options
        rank = min(o.rank, probes.d)
        return SubGMRecovery(rank, o.alpha, o.step, o.eta0, o.rho, o.max_iter, outliers=True).fit(probes, y)

    def analyze(self, subject: Subject) -> Report:
        """Second moments of the leading axes of each input while a twentieth of the readings' rows is 50 times as long.

        Rows are drawn again with replacement, 16 a reading.
        """
        options, generator = self.options, subject.generator()
        report = Report(
            f"Gram of {AXES} axes, {options.probes} readings of 16 rows, 5 % of them times 50: relative error",
            ["site", "sub-gradient", "mean", "mean of the clean rows", "residual level"],
        )
        for site in subject.sites:
            rows = _leading(subject.inputs[site.name].double(), AXES)
            exact = rows.T @ rows / len(rows)
            count = options.probes
            drawn = torch.randint(len(rows), (16 * count,), generator=generator, device=rows.device)
            clean = rows[drawn]
            bad = torch.rand(count, generator=generator, device=rows.device) < 0.05
            dirty = clean * torch.where(bad, 50.0, 1.0).repeat_interleave(16)[:, None]
            own = SubGM(options)
            own.start(len(dirty), rows.shape[1], generator)
            own.update(dirty)
            gram, (note,) = own.gram()
            errors = [
                float((moment - exact).norm() / exact.norm())
                for moment in (gram / len(dirty), dirty.T @ dirty / len(dirty), clean.T @ clean / len(clean))
            ]
            report.add(site.name, *errors, note.rpartition("residual ")[2].partition(" ")[0])
        found, plain = report.column("sub-gradient"), report.column("mean")
        report.findings = [
            f"error of the sub-gradient method {min(found):.3f} to {max(found):.3f}, of the mean {min(plain):.3g} to "
            f"{max(plain):.3g}",
            "a heavy spectral tail acts as noise, which the residual level shows; on clean rows the mean is better",
        ]
        return report


def _leading(rows: Tensor, count: int) -> Tensor:
    """Coordinates of the rows on their leading axes, (n, count)."""
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    return rows @ vectors[:, -count:]
