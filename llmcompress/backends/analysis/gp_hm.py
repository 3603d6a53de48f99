"""Differential equations on a grid by a Gaussian process with a spectral-mixture kernel on every axis (GP-HM).

Source: arXiv 2311.04465. Covariances are Kronecker products of one Toeplitz matrix an axis, derivatives of the solution
come from the kernel's. `joint` is the paper's optimisation; in `profile` mode, this project's, the solution is solved
for at every step while the kernels descend.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from llmcompress.backends.analysis.spectral_kernels import (
    MIXTURES,
    AxisKernel,
    axis_kernel,
    initial_params,
    spectral_kernel,
)
from llmcompress.backends.checks import choose
from llmcompress.errors import InputError, RunError

log = logging.getLogger("llmcompress")

LIMIT = 2500  # grid points of profile mode, which forms a matrix of that order
LOG_PRECISION = math.log(1e8)  # of boundary values and residuals, at most: beyond, factorisations fail
FINAL_STEPS = 3  # of Gauss-Newton
EQUATIONS = ("poisson", "allen_cahn", "advection")

Equation = Callable[[Tensor, list[Tensor], list[Tensor]], Tensor]


def equation_residual(name: str, source: Tensor, beta: float | None = None) -> Equation:
    """H(U, first, second): poisson sum u_ii - f, allen_cahn sum u_ii + u (u² - 1) - f, advection beta u_x + u_t - f.

    InputError for an unknown name, or advection without beta.
    """
    choose("equation", name, EQUATIONS)
    if name == "poisson":
        return lambda u, first, second: sum(second[1:], second[0]) - source
    if name == "allen_cahn":
        return lambda u, first, second: sum(second[1:], second[0]) + u * (u.square() - 1) - source
    if beta is None:
        raise InputError("advection needs beta, the speed")
    return lambda u, first, second: beta * first[0] + first[1] - source


@dataclass
class FitLog:
    """loss: of every step; residual: root mean square of the equation's residual at the end."""

    loss: list[float] = field(default_factory=list)
    residual: float = math.nan


class GPHM:
    """The solution on a grid: axes (one or two float64 vectors, uniform, at least 4 points), a kernel on each.

    kind: stm, gm, matern, se; n_components Q and max_frequency F (cycles a unit of the axis): F must cover the highest
    frequency and stay below (n - 1) / (2 length), or a warning is logged. start_log_a: of the kernels' widths.
    Cost a step O(sum n_i³ + M sum n_i) for M grid points, in profile mode O(M³). InputError for bad axes or options.
    """

    def __init__(
        self,
        axes: Sequence[Tensor],
        kind: str = "stm",
        n_components: int = 30,
        max_frequency: float = 20.0,
        jitter: float = 1e-6,
        boundary_weight: float = 200.0,
        start_log_a: float = 0.0,
    ) -> None:
        if not 1 <= len(axes) <= 2:
            raise InputError(f"needs one or two axes; got {len(axes)}")
        self.axes = [_checked_axis(axis) for axis in axes]
        self.kind, self.jitter, self.boundary_weight = kind, jitter, boundary_weight
        self.max_frequency = max_frequency
        self.params = [initial_params(kind, n_components, max_frequency, start_log_a) for _ in axes]
        for number, axis in enumerate(self.axes):
            nyquist = (len(axis) - 1) / (2 * float(axis[-1] - axis[0]))
            if kind in MIXTURES and max_frequency > nyquist:
                log.warning("axis %d: max_frequency %.4g is above the grid's Nyquist frequency %.4g", number,
                            max_frequency, nyquist)  # fmt: skip
        self.shape = tuple(len(axis) for axis in self.axes)
        self.solution = torch.zeros(self.shape, dtype=torch.float64)
        self.log_tau = torch.zeros((), dtype=torch.float64)
        self.log_v = torch.zeros((), dtype=torch.float64)

    # -- fitting ----------------------------------------------------------------------------------------------------

    def fit(
        self,
        equation: str | Equation,
        source: Tensor | None,
        mask: Tensor,
        values: Tensor,
        mode: Literal["profile", "joint"] = "profile",
        steps: int = 150,
        lr: float | None = None,
        beta: float | None = None,
    ) -> FitLog:
        """Solves H(U) = 0 on the grid with U[mask] = values.

        equation: a name, or a function of (U, first, second) that is pointwise, with the derivatives along each axis.
        source: on the grid, None for 0. mask: bool on the grid, or int64 counts of how often a value is prescribed;
        values: of its true entries, in order. lr: 5e-2 in profile, 1e-2 in joint mode if absent. InputError for bad
        values, an empty mask, a grid too large for profile mode; RunError if a loss is not finite.
        """
        choose("mode", mode, ("profile", "joint"))
        counts = mask.to(torch.int64)
        source = torch.zeros(self.shape, dtype=torch.float64) if source is None else source.double()
        if counts.shape != self.shape or source.shape != self.shape:
            raise InputError(f"source and mask must have the grid's shape {self.shape}; got {tuple(source.shape)}, "
                             f"{tuple(counts.shape)}")  # fmt: skip
        kept = counts > 0
        if not kept.any() or values.shape != (int(kept.sum()),):
            raise InputError(f"the mask holds {int(kept.sum())} entries and needs as many values, at least one; got "
                             f"{tuple(values.shape)}")  # fmt: skip
        if not (torch.isfinite(source).all() and torch.isfinite(values).all()):
            raise InputError("source and values must be finite")
        total = math.prod(self.shape)
        if mode == "profile" and total > LIMIT:
            raise InputError(f"profile mode takes at most {LIMIT} grid points; got {total}: use mode joint")
        residual = equation if callable(equation) else equation_residual(equation, source, beta)
        problem = _Problem(residual, kept, counts[kept].double(), values.double())
        found = (
            self._joint(problem, steps, lr or 1e-2) if mode == "joint" else self._profile(problem, steps, lr or 5e-2)
        )
        with torch.no_grad():
            kernels = self._kernels()
            found.residual = float(
                residual(self.solution, *_derivatives(kernels, self.solution)).square().mean().sqrt()
            )
        self._warn_of_edge()
        return found

    def _trainable(self) -> list[Tensor]:
        own = [p for params in self.params for name, p in params.items() if name != "mu" or self.kind in MIXTURES]
        return [*own, self.log_tau, self.log_v]

    def _joint(self, problem: _Problem, steps: int, lr: float) -> FitLog:
        trained = [self.solution, *self._trainable()]
        found = FitLog()
        optimizer = torch.optim.Adam([p.requires_grad_() for p in trained], lr=lr)
        for _ in range(steps):
            self._step(optimizer, problem, found)
        for p in trained:
            p.requires_grad_(False)
        return found

    def _profile(self, problem: _Problem, steps: int, lr: float) -> FitLog:
        trained, found = self._trainable(), FitLog()
        optimizer = torch.optim.Adam([p.requires_grad_() for p in trained], lr=lr)
        for _ in range(steps):
            self._solve(problem)
            self._step(optimizer, problem, found)
        for p in trained:
            p.requires_grad_(False)
        for _ in range(FINAL_STEPS):
            self._solve(problem)
        return found

    def _step(self, optimizer: torch.optim.Optimizer, problem: _Problem, found: FitLog) -> None:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = self._loss(problem)
            loss.backward()
        if not torch.isfinite(loss):
            raise RunError(f"step {len(found.loss) + 1}: the loss is not finite; lower lr")
        optimizer.step()
        with torch.no_grad():
            for precision in (self.log_tau, self.log_v):
                precision.clamp_(max=LOG_PRECISION)
        found.loss.append(float(loss.detach()))

    def _loss(self, problem: _Problem) -> Tensor:
        """The negative log joint density, up to a constant (arXiv 2311.04465, equation 10 with a weighted boundary)."""
        kernels, u = self._kernels(), self.solution
        total = u.numel()
        log_det = sum(total / n * kernel.log_det for n, kernel in zip(self.shape, kernels, strict=True))
        inverse = u
        for dim, kernel in enumerate(kernels):
            inverse = _solution(dim, kernel.lower, inverse)
        missed = (problem.counts * (u[problem.kept] - problem.values).square()).sum()
        weight = self.boundary_weight
        boundary = weight * 0.5 * (self.log_tau.exp() * missed - problem.counts.sum() * self.log_tau)
        residual = problem.residual(u, *_derivatives(kernels, u))
        equation = 0.5 * (self.log_v.exp() * residual.square().sum() - total * self.log_v)
        return 0.5 * log_det + 0.5 * (u * inverse).sum() + boundary + equation

    def _solve(self, problem: _Problem) -> None:
        """One Gauss-Newton step for the solution at the present kernels and precisions; exact for a linear equation."""
        with torch.no_grad():
            kernels = self._kernels()
            basis = _kron([kernel.lower for kernel in kernels])
            first = [_on_basis(kernels, dim, kernel.first) for dim, kernel in enumerate(kernels)]
            second = [_on_basis(kernels, dim, kernel.second) for dim, kernel in enumerate(kernels)]
            slopes = _derivatives(kernels, self.solution)
        parts = [part.clone().requires_grad_() for part in (self.solution, *slopes[0], *slopes[1])]
        with torch.enable_grad():
            dims = len(kernels)
            value = problem.residual(parts[0], parts[1 : 1 + dims], parts[1 + dims :])
            partials = torch.autograd.grad(value.sum(), parts, allow_unused=True)
        with torch.no_grad():
            jacobian = torch.zeros_like(basis)
            offset = self.solution.new_zeros(self.solution.numel())
            images = [self.solution, *slopes[0], *slopes[1]]
            for partial, matrix, image in zip(partials, [basis, *first, *second], images, strict=True):
                if partial is not None:
                    jacobian += partial.flatten()[:, None] * matrix
                    offset += (partial * image).flatten()
            right_side = offset - value.detach().flatten()
            rows = basis[problem.kept.flatten()]
            tau, v = self.boundary_weight * self.log_tau.exp() * problem.counts, self.log_v.exp()
            normal = rows.T @ (tau[:, None] * rows) + v * jacobian.T @ jacobian
            normal.diagonal().add_(1.0)
            right = rows.T @ (tau * problem.values) + v * jacobian.T @ right_side
            alpha = torch.cholesky_solve(right[:, None], torch.linalg.cholesky(normal))[:, 0]
            self.solution = (basis @ alpha).view(self.shape)

    def _kernels(self) -> list[AxisKernel]:
        return [axis_kernel(x, p, self.kind, self.jitter) for x, p in zip(self.axes, self.params, strict=True)]

    def _warn_of_edge(self) -> None:
        for number, params in enumerate(self.params if self.kind in MIXTURES else []):
            heaviest = float(params["mu"][params["log_w"].argmax()].abs())
            if heaviest >= self.max_frequency:
                log.warning("axis %d: the heaviest frequency %.4g is at max_frequency %.4g: raise it", number, heaviest,
                            self.max_frequency)  # fmt: skip

    # -- what was found ---------------------------------------------------------------------------------------------

    def predict(self, axes: Sequence[Tensor]) -> Tensor:
        """The solution on the grid of other axes, float64: kernel interpolation, axis by axis."""
        if len(axes) != len(self.axes):
            raise InputError(f"needs {len(self.axes)} axes; got {len(axes)}")
        found = self.solution
        kernels = self._kernels()
        for dim, (new, old, params, kernel) in enumerate(zip(axes, self.axes, self.params, kernels, strict=True)):
            cross = spectral_kernel((new.double()[:, None] - old).flatten(), params, self.kind, 0)[0].view(len(new), -1)
            found = _product(dim, cross, _solution(dim, kernel.lower, found))
        return found

    def frequencies(self, threshold: float = 0.01) -> list[list[tuple[float, float]]]:
        """For each axis (frequency, weight over the largest), the heaviest first, down to the threshold."""
        found = []
        for params in self.params:
            weight = (params["log_w"] - params["log_w"].max()).exp()
            order = weight.argsort(descending=True)
            found.append([(float(params["mu"][i].abs()), float(weight[i])) for i in order if weight[i] >= threshold])
        return found


@dataclass(frozen=True)
class _Problem:
    residual: Equation
    kept: Tensor
    counts: Tensor
    values: Tensor


def _checked_axis(axis: Tensor) -> Tensor:
    axis = torch.as_tensor(axis).detach().double()
    if axis.ndim != 1 or len(axis) < 4 or not torch.isfinite(axis).all():
        raise InputError(f"an axis must be a finite vector of at least 4 points; got shape {tuple(axis.shape)}")
    steps = axis.diff()
    if not bool((steps > 0).all()) or float((steps - steps.mean()).abs().max()) > 1e-6 * float(steps.mean()):
        raise InputError("an axis must be uniform and ascending: kernels are Toeplitz matrices")
    return axis


def _product(dim: int, matrix: Tensor, x: Tensor) -> Tensor:
    """matrix times x along one of its one or two dimensions."""
    return (matrix @ x.T).T if dim == 1 else matrix @ x


def _solution(dim: int, lower: Tensor, x: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ times x along one of its one or two dimensions."""
    if x.ndim == 1:
        return torch.cholesky_solve(x[:, None], lower)[:, 0]
    return torch.cholesky_solve(x.T, lower).T if dim == 1 else torch.cholesky_solve(x, lower)


def _derivatives(kernels: list[AxisKernel], u: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    first, second = [], []
    for dim, kernel in enumerate(kernels):
        weights = _solution(dim, kernel.lower, u)
        first.append(_product(dim, kernel.first, weights))
        second.append(_product(dim, kernel.second, weights))
    return first, second


def _on_basis(kernels: list[AxisKernel], dim: int, derivative: Tensor) -> Tensor:
    """The derivative along one axis of what the basis L_1 x L_2 maps from: there derivative K⁻¹ L."""
    lowers = [kernel.lower for kernel in kernels]
    lowers[dim] = torch.linalg.solve_triangular(lowers[dim], derivative.T, upper=False).T
    return _kron(lowers)


def _kron(matrices: list[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.kron(matrices[0].contiguous(), matrices[1].contiguous())
