"""Sketched least squares whose solution is accurate in every coordinate (arXiv 2302.00248).

x' = argmin ||S A x - S b|| for a dense random S with m rows: every entry of x' is within about
eps / sqrt(d) ||A x* - b|| ||A⁺|| of x*, sqrt(d) better than what the l2 bound implies; sparse S fail at this.

The published proof for the subsampled Hadamard transform (srht) at m = d polylog has a gap: its condition for fixed
vectors is used for one that depends on S. It is unproven there; proven are m = d^(1+o(1)) (Price, Song, Woodruff,
2017), and for the pooled Gaussian sketch the claim stands that its authors make in the successor.
"""

from __future__ import annotations

import math
import time
import warnings
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from sklearn.base import BaseEstimator
from torch import Tensor

from llmcompress.backends.checks import checked_matrix, choose, generator_for
from llmcompress.backends.ports import Solution, Subject
from llmcompress.backends.regression.sketches import (
    BASELINES,
    GUARANTEED,
    Sketch,
    _signs,
    fwht,
    make_sketch,
    next_power_of_two,
)
from llmcompress.backends.report import Report
from llmcompress.backends.sampling.weights import principal_features
from llmcompress.errors import InputError

__all__ = [
    "LinfSketch",
    "LinfSketchOptions",
    "Sketch",
    "SketchedLeastSquares",
    "fwht",
    "make_sketch",
    "solve_sketched",
    "solve_tensor",
    "theory_rows",
]


class LinfSketchOptions(BaseModel, extra="forbid"):
    sketch: Literal["srht", "gaussian_pooled", "gaussian", "rademacher"] = Field(
        default="srht", description="random matrix that shortens the problem"
    )
    oversampling: float = Field(default=16, gt=1, description="rows of the sketch for each unknown")
    ridge: float = Field(default=0.0, ge=0, description="penalty of the squared coefficients, added after sketching")


def theory_rows(n: int, d: int, eps: float, delta: float) -> int:
    """Rows of the paper's Theorem 1.1 without its constant, d log³(n / delta) / eps²: for comparison, far too many."""
    return math.ceil(d * math.log(n / delta) ** 3 / eps**2)


def solve_sketched(SA: Tensor, Sb: Tensor, ridge: float = 0.0) -> tuple[Tensor, float]:
    """argmin ||SA x - Sb||² + ridge ||x||² by QR, and sigma_min(SA) with the ridge's rows; SA (m, d), Sb (m, k).

    InputError naming the rank unless SA (with the ridge) has full column rank.
    """
    d = SA.shape[1]
    if ridge > 0:
        SA = torch.cat((SA, math.sqrt(ridge) * torch.eye(d, dtype=SA.dtype, device=SA.device)))
        Sb = torch.cat((Sb, Sb.new_zeros(d, Sb.shape[1])))
    q, r = torch.linalg.qr(SA)
    s = torch.linalg.svdvals(r)
    rank = int((s > max(SA.shape) * torch.finfo(SA.dtype).eps * s[0]).sum())
    if rank < d:
        raise InputError(f"the sketched matrix has rank {rank} of {d} columns: more rows, other features, or a ridge")
    return torch.linalg.solve_triangular(r, q.T @ Sb, upper=True), float(s[-1])


class SketchedLeastSquares(BaseEstimator):
    """min ||X W - Y||_F² + ridge ||W||_F² from a sketch of (X, Y), X (n, d), Y (n,) or (n, k); one sketch for all k.

    sketch: see `make_sketch`. n_rows: of the sketch; oversampling * d, at most n padded to a power of two, if None.
    After `fit`: coef_ (d,) or (d, k) in X's dtype, solved in float64; n_rows_; predicted_eps_ = sqrt(2 d ln d / m), 0
    where the sketch is exact; linf_bound_ (k,), the error of an entry that it predicts, nan for the baselines, which
    warn that they have no guarantee. `delta` enters theory_rows_ alone. O(k n log n + m d²). InputError for bad input.
    """

    def __init__(
        self, sketch: str = "srht", n_rows: int | None = None, oversampling: float = 16, ridge: float = 0.0,
        delta: float = 0.01, random_state: int | torch.Generator | None = None,
    ) -> None:  # fmt: skip
        self.sketch, self.n_rows, self.oversampling = sketch, n_rows, oversampling
        self.ridge, self.delta, self.random_state = ridge, delta, random_state

    def fit(self, X: Tensor, Y: Tensor) -> SketchedLeastSquares:
        choose("sketch", self.sketch, GUARANTEED + BASELINES)
        dtype = torch.as_tensor(X).dtype
        X, Y = checked_matrix(X), torch.as_tensor(Y)
        Y = checked_matrix(Y, "Y", Y.ndim if Y.ndim in (1, 2) else 2)
        n, d = X.shape
        if len(Y) != n:
            raise InputError(f"X has {n} rows and Y {len(Y)}")
        padded = next_power_of_two(n)
        m = self.n_rows or min(padded, math.ceil(self.oversampling * d))
        if m < d:
            raise InputError(f"n_rows must be at least d = {d}; got {m}")
        everything = self.sketch == "srht" and m == padded
        S = make_sketch(self.sketch, n, m, generator_for(self.random_state, X.device), replace=not everything)
        targets = Y[:, None] if Y.ndim == 1 else Y
        sketched = S(torch.cat((X, targets), dim=1))
        SA, Sb = sketched[:, :d], sketched[:, d:]
        coef, least = solve_sketched(SA, Sb, self.ridge)
        self.n_rows_, self.theory_rows_ = S.shape[0], theory_rows(n, d, 0.5, self.delta)
        self.predicted_eps_ = 0.0 if S.exact else math.sqrt(2 * d * math.log(max(d, 2)) / self.n_rows_)
        residual = (SA @ coef - Sb).norm(dim=0) / math.sqrt(max(1 - d / self.n_rows_, 1 / self.n_rows_))
        self.linf_bound_ = self.predicted_eps_ / math.sqrt(d) * residual / least
        if self.sketch in BASELINES:
            self.linf_bound_ = torch.full_like(residual, math.nan)
            message = f"{self.sketch} has no coordinate-wise guarantee: one entry can be far off"
            warnings.warn(message, UserWarning, stacklevel=2)
        self.coef_ = (coef[:, 0] if Y.ndim == 1 else coef).to(dtype)
        return self

    def predict(self, X: Tensor) -> Tensor:
        return X @ self.coef_


def solve_tensor(A1: Tensor, A2: Tensor, B: Tensor, m: int, generator: torch.Generator) -> Tensor:
    """argmin ||(A1 kron A2) vec(W) - vec(B)|| for W (d1, d2) from m rows of a tensor SRHT; vec is row-major.

    A1 (n1, d1), A2 (n2, d2), B (n1, n2). The Kronecker product is not formed: O(n1 n2 log(n1 n2) + m (d1 d2)²).
    InputError for shapes that do not fit, m < d1 d2, and a sketch without full column rank.
    """
    A1, A2, B = checked_matrix(A1, "A1"), checked_matrix(A2, "A2"), checked_matrix(B, "B")
    if B.shape != (len(A1), len(A2)):
        raise InputError(f"B must be ({len(A1)}, {len(A2)}); got {tuple(B.shape)}")
    if m < A1.shape[1] * A2.shape[1]:
        raise InputError(f"n_rows must be at least d1 d2 = {A1.shape[1] * A2.shape[1]}; got {m}")
    SA, Sb = tensor_srht(A1, A2, B, m, generator)
    return solve_sketched(SA, Sb)[0].view(A1.shape[1], A2.shape[1])


def tensor_srht(A1: Tensor, A2: Tensor, B: Tensor, m: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """S (A1 kron A2) (m, d1 d2) and S vec(B) (m, 1), S = m^-1/2 P (H D1 kron H D2)."""
    sizes = [next_power_of_two(len(A)) for A in (A1, A2)]
    signs = [_signs((len(A), 1), generator) for A in (A1, A2)]
    place = [torch.randint(size, (m,), generator=generator, device=generator.device) for size in sizes]

    def mix(X: Tensor, side: int) -> Tensor:
        padded = X.new_zeros(sizes[side], X.shape[1])
        padded[: len(X)] = signs[side].to(X) * X
        return fwht(padded)

    rows = [mix(A, side)[place[side]] for side, A in enumerate((A1, A2))]
    SA = (rows[0][:, :, None] * rows[1][:, None, :]).flatten(1)
    both = mix(mix(B, 0).T, 1).T
    return SA / math.sqrt(m), both[place[0], place[1], None] / math.sqrt(m)


# --- the ports -------------------------------------------------------------------------------------------------------


class LinfSketch:
    """The solver port, and an analysis: loss, largest error of a weight, and time against the exact solution."""

    Options: ClassVar[type[LinfSketchOptions]] = LinfSketchOptions

    def __init__(self, options: LinfSketchOptions) -> None:
        self.options = options

    def solve(self, design: Tensor, target: Tensor, generator: torch.Generator) -> Solution:
        found = self._estimator(self.options.sketch, generator).fit(design, target)
        if found.predicted_eps_ == 0:
            return Solution(found.coef_, [f"sketch of {found.n_rows_} rows for {len(design)}: exact, nothing saved"])
        return Solution(found.coef_, [f"sketched {len(design)} rows to {found.n_rows_}"])

    def _estimator(self, sketch: str, generator: torch.Generator, n_rows: int | None = None) -> SketchedLeastSquares:
        options = self.options
        return SketchedLeastSquares(sketch, n_rows, options.oversampling, options.ridge, random_state=generator)

    def analyze(self, subject: Subject) -> Report:
        """The last residual stream from 192 directions of each input and earlier stream, on a quarter of the rows."""
        report = Report(
            "the last block's output from 192 leading directions, solved on sketched rows",
            ["features", "rows", "kept", "sketch", "loss / exact", "max |dW| / rms W", "ms", "exact ms"],
        )
        target = subject.residual[max(subject.residual)].double()
        generator = subject.generator()
        losses: dict[str, list[float]] = {"srht": [], "uniform": []}
        features = dict(subject.inputs) | {f"output of block {i}": r for i, r in list(subject.residual.items())[:-1]}
        for name, rows in features.items():
            X = principal_features(rows.double(), min(192, rows.shape[1], len(rows) // 8))
            start = time.perf_counter()
            best = torch.linalg.lstsq(X, target).solution
            exact = 1e3 * (time.perf_counter() - start)
            least = float((X @ best - target).square().sum())
            m = max(2 * X.shape[1], len(X) // 4)
            for sketch in (self.options.sketch, "countsketch", "uniform"):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # the baselines' lack of a guarantee is the point
                    start = time.perf_counter()
                    found = self._estimator(sketch, generator, m).fit(X, target).coef_
                spent = 1e3 * (time.perf_counter() - start)
                loss = float((X @ found - target).square().sum()) / least
                losses.setdefault(sketch, []).append(loss)
                worst = float((found - best).abs().max() / best.square().mean().sqrt())
                report.add(name, len(X), m, sketch, loss, worst, spent, exact)
        mean = {sketch: sum(values) / len(values) for sketch, values in losses.items() if values}
        told = ", ".join(f"{sketch} {value:.2f}" for sketch, value in mean.items())
        report.findings.append(f"mean loss over exact: {told}")
        if mean[self.options.sketch] > 0.95 * mean["countsketch"]:
            report.findings.append("a sparse sketch is as good here: the guarantee needs spiky residuals")
        return report
