"""The deep conjugate direction method for symmetric positive definite systems (arXiv 2205.10763).

A learned map proposes a direction from the unit residual; it is made A-orthogonal to the last few directions, and an
exact line search follows, so that the error in the A-norm never grows, whatever the map. With the identity it is the
conjugate gradient method, whose two terms suffice because the map is linear.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from llmcompress.backends.ports import Solution, Subject
from llmcompress.backends.regression.dcdm import dcdm
from llmcompress.backends.regression.direction_nets import (
    GramDirection,
    PoissonDirectionNet,
    energy_loss,
    fit_gram_direction,
    residual_loss,
    train_direction,
)
from llmcompress.backends.regression.krylov import SolveResult, cg, deflated_pcg, ic0, lanczos_ritz, pcg, ritz_samples
from llmcompress.backends.report import Report
from llmcompress.errors import RunError

__all__ = [
    "ConjugateDirection",
    "ConjugateDirectionOptions",
    "GramDirection",
    "PoissonDirectionNet",
    "SolveResult",
    "cg",
    "dcdm",
    "deflated_pcg",
    "energy_loss",
    "fit_gram_direction",
    "ic0",
    "lanczos_ritz",
    "pcg",
    "residual_loss",
    "ritz_samples",
    "train_direction",
]


class ConjugateDirectionOptions(BaseModel, extra="forbid"):
    rank: int = Field(default=64, ge=1, description="Ritz vectors that the learned direction rests on")
    tol: float = Field(default=1e-4, gt=0, lt=1, description="residual over right-hand side at which a column stops")
    max_iter: int = Field(default=1000, ge=1, description="iterations at most")
    damping: float = Field(default=0.0, ge=0, description="added to the diagonal, as a share of its mean")


# --- the ports -------------------------------------------------------------------------------------------------------


class ConjugateDirection:
    """The solver port, and an analysis: iterations against conjugate gradients and deflation, time against Cholesky."""

    Options: ClassVar[type[ConjugateDirectionOptions]] = ConjugateDirectionOptions

    def __init__(self, options: ConjugateDirectionOptions) -> None:
        self.options = options

    def solve(self, design: Tensor, target: Tensor, generator: torch.Generator) -> Solution:
        """On the normal equations, their columns scaled to unit length."""
        scale = design.norm(dim=0).clamp_min(torch.finfo(design.dtype).tiny)
        gram = self._damped((design / scale).T @ (design / scale))
        net = fit_gram_direction(gram, min(self.options.rank, len(gram)), generator=generator)
        right = (design / scale).T @ target
        found = dcdm(gram, right, net, tol=self.options.tol, max_iter=self.options.max_iter)
        if not found.converged:
            raise RunError(f"not solved to {self.options.tol:g} within {self.options.max_iter} iterations")
        note = f"learned direction of rank {net.V.shape[1]}: {int(found.n_iter.max())} iterations"
        return Solution(found.x / scale[:, None], [note])

    def _damped(self, gram: Tensor) -> Tensor:
        return gram + self.options.damping * gram.diagonal().mean() * torch.eye(
            len(gram), dtype=gram.dtype, device=gram.device
        )

    def analyze(self, subject: Subject) -> Report:
        """Gram of the first half of the rows, and the same directions on that of the second half."""
        report = Report(
            "iterations to a residual of 1e-4, damping 1e-3 of the mean diagonal",
            ["input", "d", "CG", "deflated", "learned", "other tokens: CG", "deflated ", "learned ", "train s",
             "solve s", "Cholesky s"],
        )  # fmt: skip
        generator = subject.generator()
        for name, rows in subject.inputs.items():
            halves = [part.double() for part in rows.split((len(rows) + 1) // 2)]
            grams = [_damp(half.T @ half) for half in halves]
            rank = min(self.options.rank, len(grams[0]) // 4)
            begin = time.perf_counter()
            net = fit_gram_direction(grams[0], rank, generator=generator)
            trained = time.perf_counter() - begin
            cells: list[Any] = []
            for gram in grams:
                right = torch.randn(len(gram), 8, generator=generator, dtype=gram.dtype, device=gram.device)
                begin = time.perf_counter()
                found = dcdm(gram, right, net, tol=1e-4, max_iter=2000)
                solved = time.perf_counter() - begin
                plain = cg(gram, right, tol=1e-4, max_iter=2000)
                deflated = deflated_pcg(gram, right, net.V, tol=1e-4, max_iter=2000)
                cells += [int(n.double().mean()) for n in (plain.n_iter, deflated.n_iter, found.n_iter)]
            begin = time.perf_counter()
            torch.cholesky_solve(right, torch.linalg.cholesky(gram))
            report.add(name, len(grams[0]), *cells, trained, solved, time.perf_counter() - begin)
        slower = [a / b for a, b in zip(report.column("solve s"), report.column("Cholesky s"), strict=True)]
        report.findings.append(
            f"solving takes {min(slower):.1f} to {max(slower):.1f} times as long as a Cholesky factorisation, training "
            "not counted" + ("" if min(slower) < 1 else ": use that one here")
        )
        return report


def _damp(gram: Tensor) -> Tensor:
    return gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
