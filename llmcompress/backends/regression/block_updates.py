"""How to update a block: gradient, matrix, Newton, proximal and two-metric steps (arXiv 1712.08859)."""

from __future__ import annotations

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from llmcompress.backends.checks import choose
from llmcompress.backends.regression.block_problems import Problem, prox
from llmcompress.backends.regression.block_rules import solve_block
from llmcompress.errors import InputError

UPDATES = ("gradient", "la", "matrix", "newton", "prox_gradient", "prox_newton", "tmp")
ARMIJO = 1e-4
HALVINGS = 60
ACTIVE = 1e-4  # two-metric projection: a coordinate this near zero, pushed down, is active


def update_block(
    problem: Problem, x: Tensor, g: Tensor, block: Tensor, update: str, estimates: Tensor | None = None
) -> Tensor:
    """The point (p,) after an update of the distinct coordinates `block`; the objective never rises.

    gradient: step 1 / L_b; la: 1 / an estimate of L, from `estimates` (p,) which it changes; matrix: H_b⁻¹ g_b; newton:
    the Hessian at x, Armijo; prox_gradient; prox_newton: the block's quadratic model exactly, by non-negative least
    squares; tmp: two-metric projection. The last two need x >= 0. InputError otherwise, and for repeated coordinates.
    """
    choose("update", update, UPDATES)
    if len(block.unique()) < len(block):
        raise InputError("a block must not repeat a coordinate")
    if update in ("prox_newton", "tmp") and not problem.nonneg:
        raise InputError(f"update {update} needs nonneg: split x = u - v")
    if (problem.l1 or problem.nonneg) and not update.startswith("prox") and update != "tmp":
        raise InputError(f"update {update} has no place for a penalty: use prox_gradient, prox_newton or tmp")
    block = block[problem.lipschitz[block] > 0]
    if not len(block):
        return x
    moved = x.clone()
    if update == "gradient":
        moved[block] -= g[block] / _largest(problem, block)
        return moved
    if update == "la":
        return _estimated(problem, x, g, block, torch.ones_like(x) if estimates is None else estimates)
    if update == "matrix":
        moved[block] -= solve_block(problem.hess_bound(block), g[block])
        return moved
    if update == "newton":
        return _newton(problem, x, g, block)
    if update == "prox_gradient":
        step = 1 / _largest(problem, block)
        moved[block] = prox(problem, x[block] - step * g[block], step)
        return moved
    return _prox_newton(problem, x, g, block) if update == "prox_newton" else _two_metric(problem, x, g, block)


def _largest(problem: Problem, block: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(problem.hess_bound(block))[-1]


def _estimated(problem: Problem, x: Tensor, g: Tensor, block: Tensor, estimates: Tensor) -> Tensor:
    L, before, square = float(estimates[block].max()), problem.value(x), float(g[block].square().sum())
    while True:
        moved = x.clone()
        moved[block] -= g[block] / L
        if problem.value(moved) <= before - square / (2 * L) + 1e-15 * abs(before):
            estimates[block] = L
            return moved
        L *= 2


def _newton(problem: Problem, x: Tensor, g: Tensor, block: Tensor) -> Tensor:
    step = -solve_block(problem.hess(x, block), g[block])
    slope, before, length = float(g[block] @ step), problem.value(x), 1.0
    for _ in range(HALVINGS):
        moved = x.clone()
        moved[block] += length * step
        if problem.value(moved) <= before + ARMIJO * length * slope:
            return moved
        length /= 2
    return x


def _prox_newton(problem: Problem, x: Tensor, g: Tensor, block: Tensor) -> Tensor:
    """min over y >= 0 of the model: with H = RᵀR, ||R y - R⁻ᵀ (H x - g - l1)||, by non-negative least squares."""
    H = problem.hess(x, block)
    R = torch.linalg.cholesky(H + 1e-12 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)).T
    right = torch.linalg.solve_triangular(R.T, (H @ x[block] - g[block] - problem.l1)[:, None], upper=False)
    y = scipy.optimize.nnls(R.cpu().numpy(), right[:, 0].cpu().numpy(), maxiter=50 * len(H))[0]
    step = torch.from_numpy(np.asarray(y)).to(x) - x[block]
    return _projected(problem, x, block, step, g)


def _two_metric(problem: Problem, x: Tensor, g: Tensor, block: Tensor) -> Tensor:
    slope = g[block] + problem.l1
    active = (x[block] < ACTIVE) & (slope > 0)
    step = torch.zeros_like(slope)
    if active.any():
        step[active] = -slope[active] / problem.lipschitz[block][active].sum()
    free = (~active).nonzero()[:, 0]
    if len(free):
        step[free] = -solve_block(problem.hess(x, block[free]), slope[free])
    return _projected(problem, x, block, step, g)


def _projected(problem: Problem, x: Tensor, block: Tensor, step: Tensor, g: Tensor) -> Tensor:
    """x + length step, projected on x >= 0, with the first halved length that lowers the objective."""
    before, length = problem.value(x), 1.0
    for _ in range(HALVINGS):
        moved = x.clone()
        moved[block] = (x[block] + length * step).clamp_min(0)
        change = moved[block] - x[block]
        slope = float((g[block] + problem.l1) @ change)
        if problem.value(moved) <= before + ARMIJO * min(slope, 0.0):
            return moved
        length /= 2
    return x
