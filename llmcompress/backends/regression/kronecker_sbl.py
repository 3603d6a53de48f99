"""Sparse Bayesian learning of vectors whose support is a Kronecker product (arXiv 2307.14719).

y = (H_1 kron ... kron H_I) x + noise; x has independent Gaussian entries of variance gamma = gamma_1 kron ... kron
gamma_I, fitted by expectation maximisation. The E-step works on the factors alone, in their eigenbases.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import scipy.fft
import scipy.optimize
import torch
from pydantic import BaseModel, Field
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.linear_model import orthogonal_mp
from torch import Tensor

from llmcompress.backends.checks import choose
from llmcompress.backends.ports import Codes, Subject
from llmcompress.backends.regression.kronecker import (
    classic_sbl,
    irs_channel,
    kron_matvec,
    kron_omp,
    kron_vectors,
    nearest_kronecker,
)
from llmcompress.backends.report import Report
from llmcompress.errors import InputError

__all__ = [
    "KroneckerSBL",
    "KroneckerSBLCoder",
    "KroneckerSBLOptions",
    "classic_sbl",
    "irs_channel",
    "kron_matvec",
    "kron_omp",
    "m_step",
    "posterior",
]

M_STEPS = ("svd", "am", "one_pass")
PRUNE = {"svd": 1e-3, "am": 1e-2, "one_pass": 1e-2}
CYCLES, CYCLE_TOLERANCE = 200, 1e-5
COUPLED_CYCLES, COUPLED_FLOOR = 10, 1e-5


class KroneckerSBLOptions(BaseModel, extra="forbid"):
    factors: list[str] | None = Field(
        default=None, description="shapes of the two factors, such as [16x24, 16x24]; nearly square ones if absent"
    )
    m_step: Literal["svd", "am", "one_pass"] = Field(default="svd", description="how variances are fitted to products")
    max_iter: int = Field(default=30, ge=1, description="EM iterations at most")


# --- expectation -----------------------------------------------------------------------------------------------------


def posterior(
    mats: Sequence[Tensor], gammas: Sequence[Tensor], y: Tensor, s2: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior mean (.., N), variance (.., N) and cost log det C + yᴴ C⁻¹ y (..); y (M,) or (B, M).

    gammas: (N_i,) or (B, N_i) each; s2: noise variance, one or B. Memory O(N + M), time O(sum M_i³ + N sum M_i) a row.
    """
    single = y.ndim == 1
    rows = y[None] if single else y
    spread = [g[None] if g.ndim == 1 else g for g in gammas]
    noise = torch.as_tensor(s2, dtype=torch.float64, device=y.device).reshape(-1, 1)
    values, vectors, back = [], [], []
    for H, g in zip(mats, spread, strict=True):
        scaled = g.to(H.dtype)[:, None, :] * H
        e, U = torch.linalg.eigh(scaled @ H.mH)
        values.append(e.clamp_min(0))
        vectors.append(U)
        back.append(scaled.mH @ U)
    D = noise + kron_vectors(values)
    z = kron_matvec([U.mH for U in vectors], rows)
    mean = kron_matvec(back, z / D)
    variance = kron_vectors(spread) - kron_matvec([V.abs().square() for V in back], 1 / D)
    cost = D.log().sum(1) + (z.abs().square() / D).sum(1)
    variance = variance.clamp_min(0)
    return (mean[0], variance[0], cost[0]) if single else (mean, variance, cost)


# --- maximisation ----------------------------------------------------------------------------------------------------


def m_step(lam: Tensor, gammas: Sequence[Tensor], method: str) -> list[Tensor]:
    """Kronecker variances for second moments lam (N,) or (B, N): minimises sum log gamma + lam / gamma.

    am: cycles of exact minimisation over one factor at a time; one_pass: a single cycle; svd: the leading singular
    vectors of lam, the nearest product. Zero entries of `gammas` stay out. All but the last factor have unit norm.
    """
    choose("m_step", method, M_STEPS)
    single = lam.ndim == 1
    rows = lam[None] if single else lam
    start = [g[None] if g.ndim == 1 else g for g in gammas]
    if method == "svd":
        found = [g * (s > 0) for g, s in zip(_svd_factors(rows, [g.shape[1] for g in start]), start, strict=True)]
    else:
        found = _alternate(rows, start, 1 if method == "one_pass" else CYCLES)
    return [g[0] for g in found] if single else found


def _svd_factors(lam: Tensor, sizes: list[int]) -> list[Tensor]:
    found = []
    for size in sizes[:-1]:
        u, s, vh = torch.linalg.svd(lam.reshape(len(lam), size, -1), full_matrices=False)
        found.append(u[:, :, 0].abs())
        lam = s[:, :1] * vh[:, 0].abs()
    return [*found, lam]


def _alternate(lam: Tensor, gammas: list[Tensor], cycles: int) -> list[Tensor]:
    sizes = [g.shape[1] for g in gammas]
    tensor = lam.reshape(len(lam), *sizes)
    gammas = list(gammas)
    for _ in range(cycles):
        before = kron_vectors(gammas)
        for i in range(len(gammas)):
            gammas[i] = _contract(tensor, gammas, i)
        gammas = normalised(gammas)
        after = kron_vectors(gammas)
        if float(((after - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-300)).max()) < CYCLE_TOLERANCE:
            break
    return gammas


def _contract(tensor: Tensor, gammas: list[Tensor], keep: int) -> Tensor:
    """Mean over the other modes' live entries of lam / prod gamma_j: the exact minimiser over gamma_keep."""
    out = tensor
    for j in reversed(range(len(gammas))):
        if j == keep:
            continue
        live = gammas[j] > 0
        inverse = torch.where(live, 1 / torch.where(live, gammas[j], 1), 0) / live.sum(1, keepdim=True).clamp_min(1)
        out = torch.einsum("b...n,bn->b...", out.movedim(j + 1, -1), inverse)  # later modes are gone already
    return out * (gammas[keep] > 0)


def normalised(gammas: Sequence[Tensor]) -> list[Tensor]:
    """The same product with unit norms but for the last factor."""
    norms = [g.norm(dim=1, keepdim=True) for g in gammas[:-1]]
    safe = [norm.clamp_min(1e-300) for norm in norms]
    scale = math.prod(norms[1:], start=norms[0]) if norms else 1.0
    return [g / norm for g, norm in zip(gammas[:-1], safe, strict=True)] + [gammas[-1] * scale]


def _coupled(lam: Tensor, gammas: list[Tensor], beta: float) -> list[Tensor]:
    """Block-sparse variant: gamma_i = 1e-5 + C g_i with C = I + beta (its neighbours), g_i >= 0 by least squares."""
    tensor = lam.reshape(len(lam), *[g.shape[1] for g in gammas])
    gammas = list(gammas)
    for _ in range(COUPLED_CYCLES):
        for i, g in enumerate(gammas):
            size = g.shape[1]
            C = np.eye(size) + beta * (np.eye(size, k=1) + np.eye(size, k=-1))
            wanted = _contract(tensor, gammas, i).cpu().numpy()
            fitted = [COUPLED_FLOOR + C @ scipy.optimize.nnls(C, row)[0] for row in wanted]
            gammas[i] = torch.from_numpy(np.stack(fitted)).to(g)
        gammas = normalised(gammas)
    return gammas


# --- the estimator ---------------------------------------------------------------------------------------------------


class KroneckerSBL(BaseEstimator, RegressorMixin):
    """x (N,) of y (M,), or (B, N) of (B, M), each row with variances of its own, over factors H_i (M_i, N_i).

    m_step: svd (fast and the most accurate as a rule, without a guarantee), am, one_pass. noise_var: learned if None.
    prune: entries below this share of their factor's largest drop out; None: 1e-3 for svd, else 1e-2, half of it where
    the noise is learned. coupling: beta in [0, 1) of the block-sparse variant, which uses am. After `fit`: coef_,
    gammas_ (one a factor), supports_ (bool, likewise), noise_var_ (B,) or a float, cost_history_ (summed over rows),
    n_iter_. Real or complex; solved in double. InputError for bad arguments; a row that loses all entries is zero, with
    a warning.
    """

    def __init__(
        self, m_step: str = "svd", noise_var: float | None = None, max_iter: int = 150, tol: float = 1e-4,
        prune: float | None = None, coupling: float | None = None,
    ) -> None:  # fmt: skip
        self.m_step, self.noise_var, self.max_iter, self.tol = m_step, noise_var, max_iter, tol
        self.prune, self.coupling = prune, coupling

    def fit(self, mats: Sequence[Tensor], y: Tensor) -> KroneckerSBL:
        mats, rows = self._checked(mats, y)
        self._mats = mats
        variance = rows.abs().square().mean(1)
        floor = (1e-12 * variance).clamp_min(torch.finfo(torch.float64).tiny)
        s2 = torch.full_like(variance, self.noise_var) if self.noise_var else (0.1 * variance).clamp_min(floor)
        B = len(rows)
        gammas = normalised([torch.ones(B, H.shape[1], dtype=torch.float64, device=rows.device) for H in mats])
        threshold = PRUNE[self.m_step] if self.prune is None else self.prune
        threshold *= 0.5 if self.noise_var is None and self.prune is None else 1.0
        self.cost_history_: list[float] = []
        self.n_iter_ = 0
        for _ in range(self.max_iter):
            self.n_iter_ += 1
            mean, var, cost = posterior(mats, gammas, rows, s2)
            self.cost_history_.append(float(cost.sum()))
            before = kron_vectors(gammas)
            found = self._maximised(var + mean.abs().square(), gammas)
            if self.noise_var is None:
                s2 = self._noise(rows, mean, var, before, s2).clamp_min(floor)
            gammas = normalised([torch.where(g >= threshold * g.amax(1, keepdim=True), g, 0) for g in found])
            change = (kron_vectors(gammas) - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-300)
            if float(change.max()) < self.tol:
                break
        mean, _, cost = posterior(mats, gammas, rows, s2)
        self.cost_history_.append(float(cost.sum()))
        self._finish(mean, gammas, s2, torch.as_tensor(y))
        return self

    def _maximised(self, lam: Tensor, gammas: list[Tensor]) -> list[Tensor]:
        return m_step(lam, gammas, self.m_step) if self.coupling is None else _coupled(lam, gammas, self.coupling)

    def _noise(self, rows: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, s2: Tensor) -> Tensor:
        residual = (rows - kron_matvec(self._mats, mean)).abs().square().sum(1)
        live = gamma > 0
        explained = torch.where(live, 1 - var / torch.where(live, gamma, 1), 0).sum(1)
        return (residual + s2 * explained) / rows.shape[1]

    def _finish(self, mean: Tensor, gammas: list[Tensor], s2: Tensor, y: Tensor) -> None:
        empty = ~(kron_vectors(gammas) > 0).any(1) | (mean == 0).all(1)
        if empty.any():
            warnings.warn(f"{int(empty.sum())} of {len(mean)} rows lost every entry: zero", UserWarning, stacklevel=3)
        single = y.ndim == 1
        coef = mean.to(torch.promote_types(y.dtype, self._dtype))
        self.coef_ = coef[0] if single else coef
        self.gammas_ = [g[0] if single else g for g in gammas]
        self.supports_ = [g > 0 for g in self.gammas_]
        self.noise_var_ = float(s2[0]) if single else s2

    def _checked(self, mats: Sequence[Tensor], y: Tensor) -> tuple[list[Tensor], Tensor]:
        choose("m_step", self.m_step, M_STEPS)
        if self.coupling is not None and not 0 <= self.coupling < 1:
            raise InputError(f"coupling must be in [0, 1); got {self.coupling}")
        if self.noise_var is not None and not self.noise_var > 0:
            raise InputError(f"noise_var must be positive; got {self.noise_var}")
        if len(mats) < 2:
            raise InputError(f"at least 2 factors are needed; got {len(mats)}")
        y = torch.as_tensor(y)
        if math.prod(H.shape[0] for H in mats) != y.shape[-1]:
            raise InputError(f"the factors have {math.prod(H.shape[0] for H in mats)} rows and y {y.shape[-1]} entries")
        if not all(torch.isfinite(torch.view_as_real(t) if t.is_complex() else t).all() for t in (*mats, y)):
            raise InputError("factors and y must be finite")
        for i, H in enumerate(mats):
            if (H == 0).all(0).any():
                raise InputError(f"factor {i} has a zero column")
        complex_mats = [H.is_complex() for H in mats]
        if y.is_complex() and not any(complex_mats):
            raise InputError("y is complex and every factor real: its imaginary part would be lost")
        double = torch.complex128 if any(complex_mats) else torch.float64
        self._dtype = mats[0].dtype if not any(complex_mats) else next(H.dtype for H in mats if H.is_complex())
        rows = y[None] if y.ndim == 1 else y
        return [H.to(double) for H in mats], rows.to(double)

    def predict(self) -> Tensor:
        """(H_1 kron ..) coef_."""
        return kron_matvec(self._mats, self.coef_.to(self._mats[0].dtype))


# --- the ports -------------------------------------------------------------------------------------------------------


def factor_shapes(d: int, k: int) -> list[tuple[int, int]]:
    """Two shapes whose product has d rows and at most k columns, as square as they can be."""
    m1 = next(m for m in range(math.isqrt(d), 0, -1) if d % m == 0)
    n1 = max(1, math.isqrt(k))
    return [(m1, n1), (d // m1, k // n1)]


class KroneckerSBLCoder:
    """The sparse coder port, over the nearest Kronecker product to the dictionary; and an analysis.

    k_1 + k_2 indices describe k_1 k_2 coefficients: it wins where few measurements see a separable code. Weights of
    language models are none, and the report says so.
    """

    Options: ClassVar[type[KroneckerSBLOptions]] = KroneckerSBLOptions

    def __init__(self, options: KroneckerSBLOptions) -> None:
        self.options = options

    def code(self, dictionary: Tensor, signals: Tensor, nonzeros: int, generator: torch.Generator) -> Codes:
        shapes = self._shapes(*dictionary.shape)
        D = dictionary.double()[:, : shapes[0][1] * shapes[1][1]]
        mats = nearest_kronecker(D, shapes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a signal without any code keeps its largest atoms, at zero
            fit = KroneckerSBL(self.options.m_step, max_iter=self.options.max_iter).fit(mats, signals.double().T)
        product = torch.kron(*mats)
        s = min(nonzeros, product.shape[1])
        indices = fit.coef_.abs().topk(s, dim=1).indices.sort(1).values
        gram, right = product.T @ product, (signals.double().T @ product).gather(1, indices)
        values = [
            torch.linalg.lstsq(gram[chosen][:, chosen], target, driver="gelsd").solution
            for chosen, target in zip(indices, right, strict=True)
        ]
        shown = ", ".join(f"{m}x{n}" for m, n in shapes)
        return Codes(product.to(dictionary), indices, torch.stack(values).to(signals), [f"Kronecker factors {shown}"])

    def _shapes(self, d: int, k: int) -> list[tuple[int, int]]:
        if self.options.factors is None:
            return factor_shapes(d, k)
        try:
            (a, b), (c, e) = ([int(size) for size in shape.split("x")] for shape in self.options.factors)
        except ValueError:
            raise InputError(f"factors: two shapes such as 16x24; got {self.options.factors}") from None
        if a * c != d or b * e > k:
            raise InputError(
                f"factors: together they must have {d} rows and at most {k} columns; got {a * c} x {b * e}"
            )
        return [(a, b), (c, e)]

    def analyze(self, subject: Subject) -> Report:
        """A quarter of the inputs, ranked jointly with the outputs and refitted; 16 x 16 tiles in a DCT."""
        report = Report(
            "inputs ranked by gamma_1 (a quarter kept, least squares): relative output error; tiles: relative error",
            ["site", "am", "svd", "|w|·norm", "tiles: Kronecker SBL", "tiles: OMP"],
        )
        for site in subject.sites:
            rows, weight = subject.inputs[site.name].double(), subject.weights[site.name].double()
            ranks = [_ranked_error(rows, weight[:24], m, subject.generator()) for m in ("am", "svd", "norm")]
            report.add(site.name, *ranks, *_tile_errors(weight))
        sbl, omp = report.column("tiles: Kronecker SBL"), report.column("tiles: OMP")
        if any(a > b for a, b in zip(sbl, omp, strict=True)):
            report.findings.append("warning: weight tiles are not Kronecker-sparse: OMP codes them better, bit for bit")
        for method in ("am", "svd"):
            ratios = [a / b for a, b in zip(report.column(method), report.column("|w|·norm"), strict=True)]
            report.findings.append(
                f"inputs ranked by {method}: {min(ratios):.2f} to {max(ratios):.2f} times the error of |w| times norm"
            )
        return report


def _ranked_error(rows: Tensor, weight: Tensor, method: str, generator: torch.Generator) -> float:
    """Relative error of 24 outputs from a quarter of the inputs, chosen by gamma_1 on 256 rows and refitted on all."""
    norm = rows.norm(dim=0).clamp_min(1e-300)
    if method == "norm":
        score = weight.norm(dim=0) * norm
    else:
        drawn = torch.randperm(len(rows), generator=generator, device=rows.device)[:256]
        few = rows[drawn] / norm * math.sqrt(len(rows))
        eye = torch.eye(len(weight), dtype=rows.dtype, device=rows.device)
        y = (few @ (weight * norm / math.sqrt(len(rows))).T).flatten()
        fit = KroneckerSBL(method, max_iter=15, prune=0.0).fit([few, eye], y)
        score = fit.gammas_[0]
    chosen = score.topk(rows.shape[1] // 4).indices
    exact, part = rows @ weight.T, rows[:, chosen]
    fitted = part @ torch.linalg.lstsq(part, exact, driver="gelsy").solution
    return float((fitted - exact).norm() / exact.norm())


def _tile_errors(weight: Tensor, count: int = 16) -> tuple[float, float]:
    """Relative error of the first 16 x 16 tiles in an overcomplete DCT: Kronecker SBL and OMP, as many bits each."""
    dct = torch.from_numpy(scipy.fft.dct(np.eye(24), axis=0)[:16]).to(weight)
    dct = dct / dct.norm(dim=0)
    tiles = weight[:16, : 16 * (weight.shape[1] // 16)].reshape(16, -1, 16).permute(1, 0, 2).reshape(-1, 256)[:count]
    fit = KroneckerSBL("svd", max_iter=30).fit([dct, dct], tiles)
    product = torch.kron(dct, dct)
    missed = [0.0, 0.0]
    for tile, coef in zip(tiles, fit.coef_, strict=True):
        values = int((coef.abs() > 1e-3 * coef.abs().max()).sum())
        bits = 16 * values + 48  # two masks of 24 bits
        pursuit = orthogonal_mp(product.cpu().numpy(), tile.cpu().numpy(), n_nonzero_coefs=min(max(1, bits // 26), 250))
        missed[0] += float((tile - product @ coef).square().sum())
        missed[1] += float((tile - product @ torch.from_numpy(pursuit).to(tile)).square().sum())
    total = float(tiles.square().sum())
    return (missed[0] / total) ** 0.5, (missed[1] / total) ** 0.5
