"""lp sensitivities of a matrix's rows, each with a primal lower and a dual upper bound."""

from __future__ import annotations

import warnings

import numpy as np
import scipy.optimize
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from llmcompress.backends.checks import checked_matrix, choose, generator_for
from llmcompress.backends.sampling.weights import (
    check_p,
    lewis_change_of_basis,
    lewis_weights,
    orthonormal_basis,
    powers,
)

ITERATIONS = 300
LEAST_SMOOTHING = 1e-9
#: the least relative fall of f at which a row goes on, and the factor by which smoothing falls
EXACT, APPROXIMATE = (1e-15, 0.6), (1e-8, 0.2)
SMOOTH_P = 1.2  # below it the smoothed Newton steps stall and only a bracket is returned
CORESET = 100  # rows a unit of rank that stand for the norm
GAP = 1e-7
ENTRIES = 1 << 17  # (chunk of rows) x (rows of the norm) worked on at a time


def lp_sensitivities(X: Tensor, p: float, method: str = "exact") -> tuple[Tensor, Tensor]:
    """sigma_i = sup_x |x_i·x|^p / ||X x||_p^p as bounds (lower, upper), (n,) each, in X's dtype.

    exact: p = 2 leverage; p = 1 a linear programme a row; otherwise minimisation of ||X x||_p over x_i·x = 1 for all
    rows at once, bracketed by duality: O(n² r²) a step. For 1 < p < 1.2 the bracket may stay open
    (ConvergenceWarning). coreset: the norm is that of about 100 r Lewis-sampled rows, O(n r³): bounds for that norm.
    lewis_bound: the sandwich by Lewis weights, at their cost. InputError for p outside [1, inf), unknown methods.
    """
    check_p(p)
    choose("method", method, ("exact", "coreset", "lewis_bound"))
    dtype = torch.as_tensor(X).dtype
    basis = orthonormal_basis(checked_matrix(X))
    if p == 2:
        leverage = basis.square().sum(1)
        return leverage.to(dtype), leverage.to(dtype)
    if method == "lewis_bound":
        lower, upper = _sandwich(lewis_weights(basis, p), basis.shape[1], p)
    elif p == 1:
        lower = upper = _linear_programmes(basis)
    else:
        lower, upper = _bracket(basis, p, method)
    return lower.to(dtype), upper.to(dtype)


def _sandwich(weights: Tensor, rank: int, p: float) -> tuple[Tensor, Tensor]:
    factor = rank ** (p / 2 - 1)
    return (factor * weights, weights) if p <= 2 else (weights, (factor * weights).clamp_max(1))


def _linear_programmes(basis: Tensor) -> Tensor:
    """p = 1: the least ||y||_inf with Uᵀ y = u_i is sigma_i."""
    u = basis.cpu().numpy()
    n, r = u.shape
    ones = np.ones((n, 1))
    bound = np.block([[np.eye(n), -ones], [-np.eye(n), -ones]])  # |y| <= t
    equal = np.hstack([u.T, np.zeros((r, 1))])
    cost = np.append(np.zeros(n), 1.0)
    free = [(None, None)] * n + [(0, None)]
    found = [
        scipy.optimize.linprog(cost, bound, np.zeros(2 * n), equal, row, bounds=free, method="highs").fun for row in u
    ]
    return torch.tensor(found, dtype=basis.dtype, device=basis.device)


def _bracket(basis: Tensor, p: float, method: str) -> tuple[Tensor, Tensor]:
    nonzero = basis.square().sum(1) > torch.finfo(basis.dtype).tiny
    rows = basis[nonzero]
    weights = lewis_weights(rows, p, tol=1e-6)
    rows = rows @ lewis_change_of_basis(rows, weights.log(), p)
    norm_rows = rows
    if method == "coreset":
        q = (CORESET * rows.shape[1] * weights / weights.sum()).clamp_max(1)
        kept = torch.rand(len(q), generator=generator_for(0, q.device), dtype=q.dtype, device=q.device) < q
        norm_rows = q[kept, None] ** (-1 / p) * rows[kept]
    lower, upper = basis.new_zeros(2, len(basis))
    size = max(1, ENTRIES // len(norm_rows))
    effort = EXACT if method == "exact" else APPROXIMATE
    found = [_solve(norm_rows, part, p, *effort) for part in rows.split(size)]
    lower[nonzero] = torch.cat([pair[0] for pair in found])
    upper[nonzero] = torch.cat([pair[1] for pair in found])
    gap = float((upper[nonzero] / lower[nonzero] - 1).max())
    if gap > GAP and p < SMOOTH_P:
        message = f"lp sensitivities at p = {p}: the bounds differ by up to {gap:.1e}, relative"
        warnings.warn(message, ConvergenceWarning, stacklevel=3)
    return lower, upper


def _solve(norm_rows: Tensor, rows: Tensor, p: float, tolerance: float, decay: float) -> tuple[Tensor, Tensor]:
    """Bounds for `rows` (m, r), all at once, by weighted least-squares steps on f(x) = ||U x||_p^p, u_i·x = 1.

    A full step for p < 2, 1/(p - 1) of it (Newton's) for p > 2, halved while f rises; smoothing falls to 1e-9. A row is
    done when a step lowers its f by less than `tolerance`, relative.
    """
    products = (norm_rows[:, :, None] * norm_rows[:, None, :]).flatten(1)  # (n, r²): Gram by Gram becomes one product
    x = rows / rows.square().sum(1, keepdim=True)  # the maximiser of the Lewis quadratic form
    f = powers(x @ norm_rows.T, p).sum(1)
    smoothing, r = 1.0 if p < 2 else 1e-3, rows.shape[1]
    active = torch.arange(len(rows), device=rows.device)
    for _ in range(ITERATIONS):
        z = x[active] @ norm_rows.T
        z = z / z.abs().amax(1, keepdim=True)
        weights = powers(z.square().add_(smoothing**2), (p - 2) / 2)
        gram = (weights @ products).unflatten(1, (r, r))
        target = torch.linalg.solve(gram, rows[active])
        target = target / (target * rows[active]).sum(1, keepdim=True)
        x[active], fallen, f[active] = _backtrack(norm_rows, x[active], f[active], target - x[active], p)
        if smoothing <= LEAST_SMOOTHING:
            active = active[fallen > tolerance * f[active]]
        smoothing = max(LEAST_SMOOTHING, decay * smoothing)
        if not len(active):
            break
    return 1 / f, _dual(norm_rows, rows, x, f, p)


def _backtrack(norm_rows: Tensor, x: Tensor, f: Tensor, step: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """The first of the halved steps that lowers f, row by row; x, how far f fell, f."""
    length = 1.0 if p < 2 else 1 / (p - 1)
    best, best_f = x, f
    waiting = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(12):
        trial = x + length * step
        trial_f = powers(trial @ norm_rows.T, p).sum(1)
        better = waiting & (trial_f < f)
        best = torch.where(better[:, None], trial, best)
        best_f = torch.where(better, trial_f, best_f)
        waiting &= ~better
        if not waiting.any():
            break
        length /= 2
    return best, f - best_f, best_f


def _dual(norm_rows: Tensor, rows: Tensor, x: Tensor, f: Tensor, p: float) -> Tensor:
    """||y||_q^p >= sigma_i for any y with Uᵀ y = u_i, q = p/(p-1); y is the gradient at x, projected."""
    z = x @ norm_rows.T
    y = powers(z, p - 1) * z.sign() / f[:, None]
    y = y + (rows - y @ norm_rows) @ torch.linalg.pinv(norm_rows)
    q = p / (p - 1)
    largest = y.abs().amax(1)
    return (largest * (y / largest[:, None]).abs().pow(q).sum(1).pow(1 / q)).pow(p)
