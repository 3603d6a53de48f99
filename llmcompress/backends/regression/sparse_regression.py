"""Sparse linear regression that the design's condition number does not trouble (arXiv 2511.06211).

y = X w + noise, w k-sparse on a uniformly random support. The inside of the paper's two phases was not at hand; this is
a construction of the same form, with its proof: r random columns are free (fitted without penalty), and every other one
is penalised in proportion to s_j, its distance from their span. With probability 1 - delta over support and free
columns, s_j is at most the distance of column j from the others of the support (exchangeability: the support's k - 1
others and the disjoint blocks of k - 1 free columns are alike), so the weighted l1 norm of any w on the support is at
most k ||X w||: the weighted Lasso's slow rate holds with no condition number in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import BaseModel, Field
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.linear_model import Lasso, orthogonal_mp
from torch import Tensor

from llmcompress.backends.checks import checked_matrix, generator_for
from llmcompress.backends.ports import Codes, Subject
from llmcompress.backends.regression.elimination import backward_eliminate, eliminate_columns
from llmcompress.backends.report import Report
from llmcompress.errors import InputError

__all__ = [
    "Preconditioner",
    "RandomSupport",
    "RandomSupportOptions",
    "RandomSupportRegressor",
    "backward_eliminate",
    "error_bound",
    "free_columns",
    "iterative_hard_thresholding",
    "n_free",
    "precondition",
    "support_ratio",
]

SIGMA_LOOPS = 20
ENTRIES = 1 << 24  # of the inverse Grams that an elimination works on at a time


class RandomSupportOptions(BaseModel, extra="forbid"):
    k: int = Field(default=8, ge=1, description="non-zeros that a signal is thought to have")
    delta: float = Field(default=0.2, gt=0, lt=1, description="probability that the guarantee fails")
    n_free: int | None = Field(
        default=None, ge=0, description="atoms without penalty; all, if the dictionary is not wider than the signals"
    )
    max_nnz: int | None = Field(default=None, ge=1, description="non-zeros at most; the caller's number if absent")


# --- the parts -------------------------------------------------------------------------------------------------------


def n_free(k: int, delta: float) -> int:
    """Free columns that the lemma asks for, ceil(k (k-1) / delta). InputError unless k >= 1 and 0 < delta < 1."""
    if k < 1:
        raise InputError(f"k must be at least 1; got {k}")
    if not 0 < delta < 1:
        raise InputError(f"delta must be in (0, 1); got {delta}")
    return math.ceil(k * (k - 1) / delta)


def free_columns(d: int, k: int, delta: float, generator: torch.Generator, r: int | None = None) -> Tensor:
    """The first r (n_free(k, delta) if None) of a random permutation of the d columns: (r,) int64, ascending.

    Drawn without a look at the data: choosing by it would void the lemma.
    """
    count = n_free(k, delta) if r is None else r
    order = torch.randperm(d, generator=generator, device=generator.device)
    return order[: min(count, d)].sort().values


@dataclass(frozen=True)
class Preconditioner:
    """idx (r,): free columns; Q (N, q): orthonormal basis of their span; R (N, d): what is left of each column outside
    it; scale (d,): its length s_j, 0 on the free columns and where it is rounding."""

    idx: Tensor
    Q: Tensor
    R: Tensor
    scale: Tensor


def precondition(X: Tensor, idx: Tensor) -> Preconditioner:
    """Columns of X (N, d) outside the span of those in idx; float64. InputError for repeated or unknown indices."""
    X = checked_matrix(X)
    idx = torch.as_tensor(idx, dtype=torch.int64, device=X.device)
    if len(idx.unique()) < len(idx) or (len(idx) and not 0 <= int(idx.min()) <= int(idx.max()) < X.shape[1]):
        raise InputError(f"free columns must be distinct and in 0..{X.shape[1] - 1}")
    if len(idx) >= len(X):
        raise InputError(f"n_free (r) must be smaller than the number of rows (N); got {len(idx)} and {len(X)}")
    lengths = X.norm(dim=0)
    Q = _basis(X[:, idx] / lengths[idx].clamp_min(torch.finfo(X.dtype).tiny))
    R = X - Q @ (Q.T @ X)
    R = R - Q @ (Q.T @ R)
    scale = R.norm(dim=0)
    scale = torch.where(scale <= 1e-10 * lengths, 0, scale)
    scale[idx] = 0
    return Preconditioner(idx, Q, R, scale)


def _basis(columns: Tensor) -> Tensor:
    """Orthonormal basis of the span of unit columns, up to singular values of 1e-13 of the largest."""
    if not columns.shape[1]:
        return columns
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    return u[:, s > 1e-13 * s[0]]


def _distances(X: Tensor) -> Tensor:
    """Distance of every column from the span of the others: 1 over the rows' lengths of R⁻¹."""
    lengths = X.norm(dim=0)
    r = torch.linalg.qr(X / lengths, mode="r")[1]
    inverse = torch.linalg.solve_triangular(r, torch.eye(len(r), dtype=r.dtype, device=r.device), upper=True)
    return lengths / inverse.norm(dim=1)


def support_ratio(X: Tensor, pre: Preconditioner | None, support: Tensor) -> float:
    """sum over the support of s_j / dist_j, at most k where the lemma holds; s_j = ||X_j|| without a preconditioner."""
    columns = checked_matrix(X)[:, support]
    scale = columns.norm(dim=0) if pre is None else pre.scale[support]
    return float((scale / _distances(columns)).sum())


def error_bound(k: int, d: int, N: int, sigma: float, delta: float, B: float, r: int | None = None) -> float:
    """With probability 1 - 3 delta, ||X (w' - w)||² / N of the weighted Lasso; B = ||X w|| / sqrt(N)."""
    free, t = n_free(k, delta) if r is None else r, math.log(1 / delta)
    return sigma**2 * (free + 2 * math.sqrt(free * t) + 2 * t) / N + 4 * penalty(sigma, d, N, delta) * k * B


def penalty(sigma: float, d: int, N: int, delta: float) -> float:
    return sigma * math.sqrt(2 * math.log(2 * d / delta) / N)


# --- the estimator ---------------------------------------------------------------------------------------------------


class RandomSupportRegressor(BaseEstimator, RegressorMixin):
    """Weighted Lasso beside r free columns, then backward elimination; X (N, d), y (N,) or (N, m).

    k: non-zeros of the truth; delta: failure probability; sigma: noise, estimated if None; n_free: free columns,
    ceil(k (k-1) / delta) if None, or an index tensor of one's own; prune: eliminate; max_nnz: at most so many kept;
    tol, max_iter: of the Lasso, which warns where it stops early. After `fit`: coef_ (d,) or (d, m) in X's dtype,
    fitted_ (prediction on X in its orthogonal form), free_idx_, support_ (columns of any non-zero), scale_ (d,),
    sigma_, lam_, bound_ (m values, or one). All targets share the free columns. O(N r² + N r d) and the Lasso's sweeps.
    InputError for bad arguments; r is never lowered to fit N.
    """

    def __init__(
        self, k: int, delta: float = 0.2, sigma: float | None = None, n_free: int | Tensor | None = None,
        prune: bool = True, max_nnz: int | None = None, tol: float = 1e-7, max_iter: int = 50000,
        random_state: int | torch.Generator | None = None,
    ) -> None:  # fmt: skip
        self.k, self.delta, self.sigma, self.n_free = k, delta, sigma, n_free
        self.prune, self.max_nnz, self.tol, self.max_iter = prune, max_nnz, tol, max_iter
        self.random_state = random_state

    def fit(self, X: Tensor, y: Tensor) -> RandomSupportRegressor:
        dtype = torch.as_tensor(X).dtype
        X, y = checked_matrix(X), torch.as_tensor(y)
        y = checked_matrix(y, "y", y.ndim if y.ndim in (1, 2) else 2)
        N, d = X.shape
        if len(y) != N:
            raise InputError(f"X has {N} rows and y {len(y)}")
        if not 1 <= self.k <= d:
            raise InputError(f"k must be between 1 and the {d} columns; got {self.k}")
        if self.sigma is not None and not self.sigma > 0:
            raise InputError(f"sigma must be positive; got {self.sigma}")
        pre = precondition(X, self._free(d, N, X.device))
        self.free_idx_, self.scale_ = pre.idx, pre.scale
        targets = y[:, None] if y.ndim == 1 else y
        fits = [self._fit_one(X, target, pre) for target in targets.T]
        coef = torch.stack([fit[0] for fit in fits], dim=1)
        self.fitted_ = torch.stack([fit[1] for fit in fits], dim=1)
        sigmas, lams = [fit[2] for fit in fits], [fit[3] for fit in fits]
        B = self.fitted_.norm(dim=0) / math.sqrt(N)
        bounds = [
            error_bound(self.k, d, N, sigma, self.delta, float(b), len(pre.idx))
            for sigma, b in zip(sigmas, B, strict=True)
        ]
        self.support_ = (coef != 0).any(1).nonzero()[:, 0]
        single = y.ndim == 1
        self.coef_ = (coef[:, 0] if single else coef).to(dtype)
        self.fitted_ = self.fitted_[:, 0] if single else self.fitted_
        self.sigma_, self.lam_, self.bound_ = (v[0] if single else v for v in (sigmas, lams, bounds))
        return self

    def _free(self, d: int, N: int, device: torch.device) -> Tensor:
        if isinstance(self.n_free, Tensor):
            return self.n_free
        count = n_free(self.k, self.delta) if self.n_free is None else self.n_free
        if min(count, d) >= N:
            raise InputError(
                f"n_free (r) must be smaller than the number of rows (N); k = {self.k}, delta = {self.delta} ask for "
                f"{count} of {N}: give n_free"
            )
        return free_columns(d, self.k, self.delta, generator_for(self.random_state, device), count)

    def _fit_one(self, X: Tensor, y: Tensor, pre: Preconditioner) -> tuple[Tensor, Tensor, float, float]:
        """Coefficients (d,), prediction (N,), sigma, lambda."""
        N, d = X.shape
        used = (pre.scale > 0).nonzero()[:, 0]
        Z = math.sqrt(N) * pre.R[:, used] / pre.scale[used]
        inside = pre.Q @ (pre.Q.T @ y)
        outside = y - inside
        degrees = max(N - pre.Q.shape[1], 1)
        sigma = self.sigma or float(outside.norm()) / math.sqrt(degrees)
        a = torch.zeros(len(used), dtype=X.dtype, device=X.device)
        for _ in range(1 if self.sigma else SIGMA_LOOPS):
            lam = penalty(sigma, d, N, self.delta)
            a = self._lasso(Z, outside, lam)
            found = float((outside - Z @ a).norm()) / math.sqrt(degrees)
            if self.sigma or abs(found - sigma) <= 1e-3 * sigma:
                break
            sigma = found
        w = torch.zeros(d, dtype=X.dtype, device=X.device)
        if self.prune:
            candidates = torch.cat((pre.idx, used[a != 0])).unique()
            kept, coef = backward_eliminate(X, y, candidates, sigma, self.max_nnz)
            w[kept] = coef
            basis = _basis(X[:, kept] / X[:, kept].norm(dim=0))
            fitted = basis @ (basis.T @ y)
            if not self.sigma:
                sigma = float((y - fitted).norm()) / math.sqrt(max(N - len(kept), 1))
            return w, fitted, sigma, lam
        w[used] = math.sqrt(N) * a / pre.scale[used]
        if len(pre.idx):
            free = X[:, pre.idx]
            length = free.norm(dim=0).clamp_min(torch.finfo(X.dtype).tiny)
            w[pre.idx] = torch.linalg.lstsq(free / length, y - X @ w, driver="gelsy").solution / length
        return w, inside + Z @ a, sigma, lam

    def _lasso(self, Z: Tensor, y: Tensor, lam: float) -> Tensor:
        if not Z.shape[1] or lam == 0:
            return Z.new_zeros(Z.shape[1])
        fit = Lasso(alpha=lam, fit_intercept=False, tol=self.tol, max_iter=self.max_iter)
        coef = fit.fit(Z.cpu().numpy(), y.cpu().numpy()).coef_
        return torch.from_numpy(coef).to(Z)

    def predict(self, X: Tensor) -> Tensor:
        """X @ coef_; on the rows of `fit`, fitted_ is exact where columns nearly cancel."""
        return torch.as_tensor(X) @ self.coef_


def iterative_hard_thresholding(X: Tensor, y: Tensor, k: int, steps: int = 500) -> Tensor:
    """The baseline: gradient steps of 1 / ||X||², k largest kept, least squares on the last support; (d,)."""
    X, y = checked_matrix(X), checked_matrix(y, "y", 1)
    step = 1 / float(torch.linalg.matrix_norm(X, 2)) ** 2
    w = X.new_zeros(X.shape[1])
    kept = w.abs().topk(k).indices
    for _ in range(steps):
        moved = w + step * (X.T @ (y - X @ w))
        kept = moved.abs().topk(k).indices
        w = torch.zeros_like(w)
        w[kept] = moved[kept]
    w[kept] = torch.linalg.lstsq(X[:, kept], y, driver="gelsy").solution
    return w


# --- the ports -------------------------------------------------------------------------------------------------------


class RandomSupport:
    """The sparse coder port, and an analysis: does a layer's inputs' condition call for this, or will OMP do?"""

    Options: ClassVar[type[RandomSupportOptions]] = RandomSupportOptions

    def __init__(self, options: RandomSupportOptions) -> None:
        self.options = options

    def code(self, dictionary: Tensor, signals: Tensor, nonzeros: int, generator: torch.Generator) -> Codes:
        """All atoms free (elimination alone) where the dictionary is narrower than the signals and n_free is absent."""
        options, (d, k) = self.options, dictionary.shape
        s = min(nonzeros, options.max_nnz or nonzeros, k)
        if options.n_free is None and k < d:
            D, Y = dictionary.double(), signals.double()
            gram = D.T @ D
            gram.diagonal().add_(1e-10 * gram.diagonal().mean())
            size = max(1, ENTRIES // (k * k))
            parts = [eliminate_columns(gram, part @ D, s) for part in Y.T.split(size)]
            indices, values = (torch.cat(found) for found in zip(*parts, strict=True))
            note = f"all {k} atoms are free columns: backward elimination to {s}"
            return Codes(dictionary, indices, values.to(signals), [note])
        fit = RandomSupportRegressor(
            min(options.k, k), options.delta, n_free=options.n_free, max_nnz=s, random_state=generator
        ).fit(dictionary, signals)
        chosen = fit.coef_.T.abs().topk(s, dim=1).indices.sort(1).values
        return Codes(dictionary, chosen, fit.coef_.T.gather(1, chosen), [f"{len(fit.free_idx_)} free atoms"])

    def analyze(self, subject: Subject) -> Report:
        """32 of a site's inputs for each of 6 outputs, against OMP and the largest |w| times norm, on held-out rows."""
        kept = self.options.max_nnz or 32
        report = Report(
            f"{kept} inputs a neuron: held-out relative output error (mean of 6 neurons); support ratio at k = 4",
            ["site", "random support", "OMP", "largest |w|·norm", "support ratio, free", "without"],
        )
        generator = subject.generator()
        gains, ratios = [], []
        for site in subject.sites:
            rows = subject.inputs[site.name].double()
            half = len(rows) * 2 // 3
            weight = subject.weights[site.name][:6].double()
            errors = _neuron_errors(rows[:half], rows[half:], weight, kept, self.options, generator)
            pre = precondition(rows[:half], free_columns(site.d_in, 4, self.options.delta, generator, 64))
            support = torch.randperm(site.d_in, generator=generator, device=rows.device)[:4]
            plain = support_ratio(rows[:half], None, support)
            report.add(site.name, *errors, support_ratio(rows[:half], pre, support), plain)
            gains.append(errors[1] / errors[0])
            ratios.append(plain)
        needed = max(ratios) > 40
        report.findings.append(
            f"random supports of these inputs have a support ratio of up to {max(ratios):.1f} (4 is the least): "
            + ("the penalty's weights matter here" if needed else "they are nearly orthogonal, so OMP is enough")
        )
        report.findings.append(f"error of OMP over this one's: {min(gains):.2f} to {max(gains):.2f}")
        return report


def _neuron_errors(
    train: Tensor, test: Tensor, weight: Tensor, kept: int, options: RandomSupportOptions, generator: torch.Generator
) -> list[float]:
    targets = train @ weight.T
    free = min(options.n_free or 64, len(train) // 2)
    fit = RandomSupportRegressor(min(options.k, train.shape[1]), options.delta, n_free=free, max_nnz=kept, tol=1e-4,
                                 random_state=generator).fit(train, targets)  # fmt: skip
    length = train.norm(dim=0).clamp_min(1e-300)
    pursuit = orthogonal_mp((train / length).cpu().numpy(), targets.cpu().numpy(), n_nonzero_coefs=kept)
    omp = torch.from_numpy(pursuit).to(train) / length[:, None]
    largest = torch.zeros_like(omp)
    for j, row in enumerate(weight):
        chosen = (row.abs() * length).topk(kept).indices
        largest[chosen, j] = torch.linalg.lstsq(train[:, chosen], targets[:, j]).solution
    exact = test @ weight.T
    return [float((test @ w - exact).norm() / exact.norm()) for w in (fit.coef_, omp, largest)]
