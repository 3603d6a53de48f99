"""Low-rank completion by alternating minimisation whose regressions are only approximate (arXiv 2302.11068).

M (m, n) ≈ U Vᵀ of rank k from some of its entries. Half-rounds in turn fit V to U and U to V; each of their regressions
takes a few steps from where the last round ended, preconditioned by sketches, so that a round costs O(seen k), what
checking an answer costs, in place of O(seen k²). The paper has no experiments: the sketch, the warm start and the rule
for stopping are this implementation's.
"""

from __future__ import annotations

import logging
from typing import ClassVar

import numpy as np
import scipy.sparse
import torch
from pydantic import BaseModel, Field
from sklearn.base import BaseEstimator
from torch import Tensor

from llmcompress.backends.checks import choose, generator_for
from llmcompress.backends.ports import Subject
from llmcompress.backends.recovery.entries import Entries, MaskedEntries, SparseEntries
from llmcompress.backends.recovery.outliers import largest_entries, outlier_report
from llmcompress.backends.recovery.regressions import (
    METHODS,
    RegressionInfo,
    check_entries,
    multi_regression,
    regress,
)
from llmcompress.backends.report import Report
from llmcompress.errors import InputError

__all__ = ["AltMinCompletion", "MatrixCompletion", "MatrixCompletionOptions", "RegressionInfo", "incoherence",
           "largest_entries", "multi_regression", "svd_clip_init"]  # fmt: skip

log = logging.getLogger("llmcompress")
DENSE_SHARE = 0.5  # of the entries seen: from there on dense products are the faster ones


class MatrixCompletionOptions(BaseModel, extra="forbid"):
    rounds: int = Field(default=50, ge=1, description="rounds at most; a round fits both factors once")
    tol: float = Field(default=1e-4, gt=0, description="stop when a round lowers the residual by less than this share")
    regressor: str = Field(
        default="sketch", pattern="^(sketch|sketch-gd|exact)$", description="how regressions are solved"
    )
    inner_iters: int = Field(default=2, ge=1, description="steps of a regression at most")
    mu: float = Field(default=2.0, gt=0, description="incoherence: larger entries of the first factor are set to zero")
    ridge: float = Field(default=0.0, ge=0, description="added to the regressions' Grams; of the noise's variance")


def incoherence(U: Tensor) -> float:
    """max_i ||U_i||² m / k of orthonormal columns U (m, k): 1 where all rows are alike, m / k at most."""
    return float(U.square().sum(1).max()) * U.shape[0] / U.shape[1]


def svd_clip_init(
    rows: Tensor, cols: Tensor, vals: Tensor, shape: tuple[int, int], rank: int, mu: float, clip: bool = True
) -> Tensor:
    """U (m, rank), orthonormal: leading left singular vectors of the seen entries, others zero, over the share seen.

    Entries above 2 mu sqrt(rank / m) are set to zero before the columns are orthonormalised again, so that no heavy row
    owns a singular vector. Source: arXiv 2302.11068, initialisation.
    """
    return _clipped(_leading_left(rows, cols, vals, shape, rank), mu, clip)


def _leading_left(rows: Tensor, cols: Tensor, vals: Tensor, shape: tuple[int, int], rank: int) -> Tensor:
    place = (rows.cpu().numpy(), cols.cpu().numpy())
    matrix = scipy.sparse.csr_array((vals.double().cpu().numpy(), place), shape=shape)
    if 4 * rank >= min(shape):
        u = np.linalg.svd(matrix.toarray(), full_matrices=False)[0][:, :rank]
    else:
        start = np.random.default_rng(0).standard_normal(min(shape))
        u, s, _ = scipy.sparse.linalg.svds(matrix, k=rank, v0=start)
        u = u[:, s.argsort()[::-1]]
    return torch.from_numpy(np.ascontiguousarray(u)).to(vals)


def _clipped(U: Tensor, mu: float, clip: bool) -> Tensor:
    if not clip:
        return U
    bound = 2 * mu * (U.shape[1] / U.shape[0]) ** 0.5
    q: Tensor = torch.linalg.qr(torch.where(U.abs() > bound, 0, U))[0]
    return q


class AltMinCompletion(BaseEstimator):
    """M ≈ U_ V_ᵀ from entries: `fit(rows, cols, vals, shape)`, or `fit_mask(M, mask)` of a matrix that is mostly seen.

    n_rounds at most; it stops when the relative residual is below tol, or a round lowers it by less than that share of
    itself. regressor, inner_tol, inner_iters, sketch_factor, ridge: see `multi_regression`; mu, clip: `svd_clip_init`;
    split: every half-round sees entries of its own, as the proof has it. float32 or float64, on the entries' device.
    After `fit`: U_ (m, k) orthonormal, V_ (n, k), history_ (relative residual on the seen entries after each round),
    n_rounds_, n_inner_, flops_, converged_ (False where the rounds ran out). O(seen k) a step.
    InputError for bad arguments, and for a row or column with fewer than `rank` entries while ridge is zero.
    """

    U_: Tensor
    V_: Tensor

    def __init__(
        self, rank: int, n_rounds: int = 50, tol: float = 1e-8, regressor: str = "sketch", inner_tol: float = 0.3,
        inner_iters: int = 2, sketch_factor: int = 8, mu: float = 2.0, clip: bool = True, split: bool = False,
        ridge: float = 0.0, random_state: int | torch.Generator | None = 0,
    ) -> None:  # fmt: skip
        self.rank, self.n_rounds, self.tol, self.regressor = rank, n_rounds, tol, regressor
        self.inner_tol, self.inner_iters, self.sketch_factor = inner_tol, inner_iters, sketch_factor
        self.mu, self.clip, self.split, self.ridge, self.random_state = mu, clip, split, ridge, random_state

    def fit(self, rows: Tensor, cols: Tensor, vals: Tensor, shape: tuple[int, int]) -> AltMinCompletion:
        rows, cols, vals = torch.as_tensor(rows).long(), torch.as_tensor(cols).long(), torch.as_tensor(vals)
        self._check_arguments(shape)
        check_entries(rows, cols, vals, shape)
        self._check_seen(torch.bincount(rows, minlength=shape[0]), torch.bincount(cols, minlength=shape[1]))
        U = svd_clip_init(rows, cols, vals, shape, self.rank, self.mu, self.clip)
        return self._alternate(SparseEntries(rows, cols, vals, shape), U)

    def fit_mask(self, M: Tensor, mask: Tensor) -> AltMinCompletion:
        """M (m, n) where `mask` (m, n) is true."""
        if M.shape != mask.shape or M.ndim != 2:
            raise InputError(f"the matrix and the mask must have one shape; got {tuple(M.shape)}, {tuple(mask.shape)}")
        mask, shape = mask.bool(), (M.shape[0], M.shape[1])
        rows, cols = mask.nonzero(as_tuple=True)
        if self.split or len(rows) < DENSE_SHARE * M.numel():
            return self.fit(rows, cols, M[mask], shape)
        self._check_arguments(shape)
        check_entries(rows, cols, M[mask], shape)
        self._check_seen(mask.sum(1), mask.sum(0))
        filled = torch.where(mask, M, 0)
        U = _clipped(torch.linalg.svd(filled, full_matrices=False)[0][:, : self.rank], self.mu, self.clip)
        return self._alternate(MaskedEntries(filled, mask.to(M.dtype)), U)

    def _alternate(self, entries: Entries, U: Tensor) -> AltMinCompletion:
        generator = generator_for(self.random_state, U.device)
        by_row = entries.transposed()
        size = float(entries.values.norm()) or 1.0
        self.history_: list[float] = []
        self.n_inner_, self.flops_, self.converged_ = 0, 0.0, False
        shares = self._shares(entries, generator)
        V: Tensor | None = None
        for index in range(self.n_rounds):
            half, other = shares[2 * index : 2 * index + 2] if shares else (entries, by_row)
            V = self._regress(U, half, V, generator)
            Q, R = torch.linalg.qr(V)
            U = self._regress(Q, other, U @ R.T, generator)
            U, R = torch.linalg.qr(U)
            V = Q @ R.T
            self.history_.append(float((entries.values - entries.product(U, V)).norm()) / size)
            before, now = self.history_[-2:] if index else (np.inf, self.history_[-1])
            if now <= self.tol or (1 - self.tol) * before <= now <= before < np.inf:
                self.converged_ = True
                break
        assert V is not None
        self.U_, self.V_, self.n_rounds_ = U, V, len(self.history_)
        if not (torch.isfinite(U).all() and torch.isfinite(V).all()):
            raise InputError("the entries overflow: scale them")
        return self

    def _regress(self, A: Tensor, entries: Entries, start: Tensor | None, generator: torch.Generator) -> Tensor:
        V, info = regress(
            A, entries, start, self.regressor, self.inner_tol, self.inner_iters, self.ridge, self.sketch_factor,
            generator,
        )  # fmt: skip
        self.n_inner_ += info.steps
        self.flops_ += info.flops
        return V

    def _shares(self, entries: Entries, generator: torch.Generator) -> list[Entries] | None:
        """Two disjoint parts of the entries a round, the second by rows; None without `split`."""
        if not self.split:
            return None
        assert isinstance(entries, SparseEntries)
        order = torch.randperm(entries.count, generator=generator, device=entries.values.device)
        parts = [entries.part(chosen) for chosen in order.tensor_split(2 * self.n_rounds)]
        return [part.transposed() if index % 2 else part for index, part in enumerate(parts)]

    def _check_arguments(self, shape: tuple[int, int]) -> None:
        choose("regressor", self.regressor, METHODS)
        if not 1 <= self.rank <= min(shape):
            raise InputError(f"rank must be between 1 and min(m, n) = {min(shape)}; got {self.rank}")
        if not self.mu > 0:
            raise InputError(f"mu must be positive; got {self.mu}")
        if self.ridge < 0:
            raise InputError(f"ridge must not be negative; got {self.ridge}")

    def _check_seen(self, by_row: Tensor, by_column: Tensor) -> None:
        for name, counts in (("row", by_row), ("column", by_column)):
            few = (counts < self.rank).nonzero()[:, 0]
            if len(few) and not self.ridge:
                named = ", ".join(map(str, few[:5].tolist())) + ", ..." * (len(few) > 5)
                raise InputError(
                    f"{len(few)} {name}s have fewer than rank = {self.rank} entries ({named}): lower rank, or "
                    "give ridge"
                )
        m, n, seen = len(by_row), len(by_column), int(by_row.sum())
        least = 2 * self.rank * (m + n - self.rank)
        if seen < least:
            log.warning("completion: %d entries are fewer than twice the degrees of freedom, %d", seen, least)

    def predict(self, rows: Tensor, cols: Tensor) -> Tensor:
        """The entries (E,) at those places."""
        return torch.linalg.vecdot(self.U_[rows], self.V_[cols])

    def reconstruct(self) -> Tensor:
        """U_ V_ᵀ (m, n)."""
        return self.U_ @ self.V_.T


class MatrixCompletion:
    """The recovery port, and an analysis: a weight's factors with its largest entries left out."""

    Options: ClassVar[type[MatrixCompletionOptions]] = MatrixCompletionOptions

    def __init__(self, options: MatrixCompletionOptions) -> None:
        self.options = options

    def recover(
        self, entries: Tensor, observed: Tensor | None, rank: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        options = self.options
        if observed is None or observed.all():  # nothing to complete: the best factors are known
            u, s, vh = torch.linalg.svd(entries, full_matrices=False)
            return u[:, :rank] * s[:rank], vh[:rank]
        found = AltMinCompletion(
            rank, options.rounds, options.tol, options.regressor, inner_iters=options.inner_iters, mu=options.mu,
            ridge=options.ridge, random_state=generator,
        ).fit_mask(entries, observed)  # fmt: skip
        return found.U_, found.V_.T

    def analyze(self, subject: Subject) -> Report:
        """Error on all but the largest hundredth of each weight's entries, next to two truncated SVDs."""
        return outlier_report("matrix_completion", self.recover, subject)
