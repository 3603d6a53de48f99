"""Gradient descent on over-parameterised factors of a measured matrix, and the step that frees it (arXiv 2310.01769).

y = A(M*), M* of rank r, A nearly isotropic; factors of rank k >= r. X Xᵀ slows down to an error of 1 / T² as soon as
k > r. F Gᵀ started small and out of balance, FᵀF ≠ GᵀG, converges like exp(-alpha² T), alpha the size of the start; one
step that makes F's columns orthogonal and equal takes alpha out of the rate. With the whole matrix in hand all of this
only approaches its truncated singular value decomposition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from llmcompress.backends.checks import generator_for
from llmcompress.backends.ports import Subject
from llmcompress.backends.recovery.operators import (
    ActivationOperator,
    DenseOperator,
    EntriesOperator,
    IdentityOperator,
    LinearOperator,
    WhitenedActivationOperator,
)
from llmcompress.backends.report import Report
from llmcompress.errors import InputError, RunError

__all__ = ["ActivationOperator", "DenseOperator", "EntriesOperator", "IdentityOperator", "LinearOperator",
           "MatrixSensing", "MatrixSensingOptions", "SensingResult", "WhitenedActivationOperator", "effective_rank",
           "rescale_factors", "sense_asymmetric", "sense_symmetric"]  # fmt: skip

ROWS, OUTPUTS = 1024, 64  # of a layer that the analysis measures


class MatrixSensingOptions(BaseModel, extra="forbid"):
    parameterization: Literal["asymmetric", "symmetric"] = Field(
        default="asymmetric", description="factors F G', or X X' for symmetric positive semidefinite matrices"
    )
    rescale: Literal["residual", "none"] = Field(
        default="residual", description="residual: the one step, once the residual is below tau"
    )
    alpha: float = Field(default=0.1, gt=0, description="size of the start, in roots of the largest singular value")
    tau: float = Field(default=0.1, gt=0, description="relative residual at which the step is taken")
    max_iter: int = Field(default=400, ge=1, description="gradient steps at most")
    tol: float = Field(default=1e-6, gt=0, description="relative residual that ends the descent")


@dataclass
class SensingResult:
    """F (n1, k), G (n2, k); the symmetric descent's G is F, and X another name of it.

    losses: squared residual at the start and after each step; imbalance: the spectral norm of FᵀF - GᵀG, likewise;
    switched_at: steps before the factors were rescaled, None where they were not; converged: the residual fell to
    `tol`, which running out of steps is not.
    """

    F: Tensor
    G: Tensor
    losses: list[float] = field(repr=False)
    imbalance: list[float] = field(repr=False)
    switched_at: int | None
    n_iter: int
    converged: bool

    @property
    def X(self) -> Tensor:
        return self.F

    def product(self) -> Tensor:
        """(n1, n2)."""
        return self.F @ self.G.T


def sense_symmetric(
    op: LinearOperator, y: Tensor, rank: int, alpha: float, step: float | None = None, max_iter: int = 5000,
    tol: float = 1e-10, generator: torch.Generator | None = None,
) -> SensingResult:  # fmt: skip
    """X Xᵀ from y (m,): X <- X - step sym(A*(A(X Xᵀ) - y)) X from alpha N(0, 1/n) entries.

    It ends where ||A(X Xᵀ) - y|| <= tol ||y||. step: 0.2 / ||A*(y)||₂ if absent, 0.25 for the identity. O(n² k) and two
    products with A a step. InputError for bad arguments; RunError if it diverges. Source: arXiv 2310.01769, section 3.
    """
    n = op.shape[0]
    if op.shape[1] != n:
        raise InputError(f"op: a symmetric descent needs square matrices; got {op.shape}")
    eta = _checked(op, y, rank, step, alpha=alpha)
    X = _start(n, rank, alpha, y, generator)
    losses: list[float] = []
    for index in range(max_iter + 1):
        residual = op.forward(X @ X.T) - y
        if _settled(residual, y, losses, tol) or index == max_iter:
            break
        R = op.adjoint(residual)
        X = X - eta / 2 * ((R + R.T) @ X)
    return SensingResult(X, X, losses, [], None, len(losses) - 1, losses[-1] <= tol**2 * float(y.square().sum()))


def sense_asymmetric(
    op: LinearOperator, y: Tensor, rank: int, alpha: float, step: float | None = None, max_iter: int = 5000,
    tol: float = 1e-10, rescale: Literal["residual"] | int | None = "residual", tau: float = 0.1,
    beta: float | None = None, generator: torch.Generator | None = None,
) -> SensingResult:  # fmt: skip
    """F Gᵀ from y (m,): both factors move at once, F from alpha N(0, 1/n1) entries and G from a third of that.

    rescale: once, when the residual is at most tau ||y||, after so many steps, or never (None); see `rescale_factors`
    for beta. step, errors and cost as in `sense_symmetric`. Source: arXiv 2310.01769, sections 4 and 5; the test of the
    residual stands for the paper's closeness to M*.
    """
    eta = _checked(op, y, rank, step, alpha=alpha, tau=tau, beta=1.0 if beta is None else beta)
    F = _start(op.shape[0], rank, alpha, y, generator)
    G = _start(op.shape[1], rank, alpha / 3, y, generator)
    losses: list[float] = []
    imbalance: list[float] = []
    switched_at: int | None = None
    target = float(y.square().sum())
    for index in range(max_iter + 1):
        residual = op.forward(F @ G.T) - y
        imbalance.append(float(torch.linalg.matrix_norm(F.T @ F - G.T @ G, 2)))
        if _settled(residual, y, losses, tol) or index == max_iter:
            break
        due = losses[-1] <= tau**2 * target if rescale == "residual" else index == rescale
        if switched_at is None and due:
            F, G = rescale_factors(F, G, beta)
            switched_at = index
        R = op.adjoint(residual)
        F, G = F - eta * (R @ G), G - eta * (R.T @ F)
    return SensingResult(F, G, losses, imbalance, switched_at, len(losses) - 1, losses[-1] <= tol**2 * target)


def rescale_factors(F: Tensor, G: Tensor, beta: float | None = None) -> tuple[Tensor, Tensor]:
    """The same product with FᵀF = beta² I: F = A S Bᵀ becomes beta A, G becomes G B S / beta.

    beta: the root of the product's largest singular value if absent, which leaves the step size valid. Good before any
    low-rank pair is trained. InputError unless beta > 0. Source: arXiv 2310.01769, section 5.
    """
    if F.shape[1] != G.shape[1]:
        raise InputError(f"F and G must have as many columns; got {F.shape[1]} and {G.shape[1]}")
    if beta is None:
        beta = math.sqrt(float(_product_values(F, G)[0])) or 1.0
    if not beta > 0:
        raise InputError(f"beta must be positive; got {beta}")
    u, s, vh = torch.linalg.svd(F, full_matrices=False)
    return beta * u, (G @ vh.T) * (s / beta)


def effective_rank(F: Tensor, G: Tensor, rtol: float) -> int:
    """Singular values of F Gᵀ above rtol times the largest."""
    values = _product_values(F, G)
    return int((values > rtol * values[0]).sum())


def _product_values(F: Tensor, G: Tensor) -> Tensor:
    left, right = torch.linalg.qr(F, mode="r")[1], torch.linalg.qr(G, mode="r")[1]
    return torch.linalg.svdvals(left @ right.T)


def _start(n: int, rank: int, alpha: float, y: Tensor, generator: torch.Generator | None) -> Tensor:
    own = generator_for(generator, y.device)
    return alpha / math.sqrt(n) * torch.randn(n, rank, dtype=y.dtype, device=y.device, generator=own)


def _settled(residual: Tensor, y: Tensor, losses: list[float], tol: float) -> bool:
    losses.append(float(residual.square().sum()))
    if not losses[-1] <= 100 * losses[0]:
        raise RunError(f"step {len(losses) - 1}: the residual is above 10 times its start; give a smaller step")
    return losses[-1] <= tol**2 * float(y.square().sum())


def _checked(op: LinearOperator, y: Tensor, rank: int, step: float | None, **positive: float) -> float:
    """The step size. InputError naming the argument that is wrong."""
    if not 1 <= rank <= min(op.shape):
        raise InputError(f"rank must be between 1 and min(n1, n2) = {min(op.shape)}; got {rank}")
    for name, value in positive.items():
        if not value > 0:
            raise InputError(f"{name} must be positive; got {value}")
    if step is not None and not step > 0:
        raise InputError(f"step must be positive; got {step}")
    size = op.forward(torch.zeros(op.shape, dtype=y.dtype, device=y.device)).numel()
    if y.ndim != 1 or len(y) != size:
        raise InputError(f"y must have the operator's {size} measurements; got shape {tuple(y.shape)}")
    if not torch.isfinite(y).all():
        raise InputError("y is not finite")
    top = float(torch.linalg.matrix_norm(op.adjoint(y), 2))
    if top == 0:
        raise InputError("y is zero: it measures nothing")
    return step if step is not None else (0.25 if isinstance(op, IdentityOperator) else 0.2) / top


class MatrixSensing:
    """The recovery port, and an analysis: layers from their outputs, with and without the step."""

    Options: ClassVar[type[MatrixSensingOptions]] = MatrixSensingOptions

    def __init__(self, options: MatrixSensingOptions) -> None:
        self.options = options

    def recover(
        self, entries: Tensor, observed: Tensor | None, rank: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        op: LinearOperator = IdentityOperator(entries.shape[0], entries.shape[1])
        if observed is not None:
            op = EntriesOperator(observed, entries.dtype)
        found = self._sense(op, op.forward(entries), rank, self.options.rescale != "none", generator)
        return found.F, found.G.T

    def _sense(
        self, op: LinearOperator, y: Tensor, rank: int, rescale: bool, generator: torch.Generator
    ) -> SensingResult:
        options = self.options
        size = options.alpha * math.sqrt(float(torch.linalg.matrix_norm(op.adjoint(y), 2)))
        common: dict[str, Any] = {"max_iter": options.max_iter, "tol": options.tol, "generator": generator}
        if options.parameterization == "symmetric":
            return sense_symmetric(op, y, rank, size, **common)
        return sense_asymmetric(op, y, rank, size, rescale="residual" if rescale else None, tau=options.tau, **common)

    def analyze(self, subject: Subject) -> Report:
        """Relative squared residuals after the steps, and that of the best factors; rank an eighth of the outputs.

        A weight's first outputs from all its entries, and from what they give on the site's rows.
        """
        steps = self.options.max_iter
        report = Report(
            f"{steps} gradient steps, first {OUTPUTS} outputs: relative squared residual",
            ["site", "measured", "rank", "without rescaling", "with it", "switched at", "best factors"],
        )
        for site in subject.sites:
            rows = subject.inputs[site.name][:ROWS].double()
            weight = subject.weights[site.name][:OUTPUTS].double().T
            rank, ridge = max(1, weight.shape[1] // 8), 1e-6 * float(rows.square().mean())
            whitened = WhitenedActivationOperator(rows, weight.shape[1], ridge)
            raw = ActivationOperator(rows, weight.shape[1])
            best = _best_residual(whitened.forward(whitened.whiten(weight)).view(len(rows), -1), rank)
            measured: dict[str, tuple[LinearOperator, Tensor, float]] = {
                "entries": (IdentityOperator(*weight.shape), weight, _best_residual(weight, rank)),
                "outputs, whitened": (whitened, whitened.whiten(weight), best),
                "outputs": (raw, weight, best),
            }
            for name, (op, truth, least) in measured.items():
                y = op.forward(truth)
                plain, freed = (self._sense(op, y, rank, rescale, subject.generator()) for rescale in (False, True))
                report.add(site.name, name, rank, *[r.losses[-1] / r.losses[0] for r in (plain, freed)],
                           freed.switched_at, least)  # fmt: skip
        switched = sum(at is not None for at in report.column("switched at"))
        report.findings.append(
            f"the step was taken in {switched} of {len(report.rows)}: where a weight has no such rank, its residual "
            f"stays above tau = {self.options.tau:g}; then gradient descent only approaches the best factors"
        )
        return report


def _best_residual(matrix: Tensor, rank: int) -> float:
    squares = torch.linalg.svdvals(matrix).square()
    return float(squares[rank:].sum() / squares.sum())
