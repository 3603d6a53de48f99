"""Multiple-response regression on seen entries: all columns' least squares at once (arXiv 2302.11068, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.backends.checks import choose, generator_for
from llmcompress.backends.recovery.entries import NARROW, Entries, SparseEntries
from llmcompress.errors import InputError

METHODS = ("sketch", "sketch-gd", "exact")
POWER_STEPS = 8


@dataclass(frozen=True)
class RegressionInfo:
    """steps: of the iteration; residual: largest preconditioned gradient over that of the start, of all columns.

    flops: additions and multiplications of all; step_flops: of one step. exact: columns whose preconditioner was
    singular, solved exactly.
    """

    steps: int
    residual: float
    flops: float
    step_flops: float
    exact: int = 0


def multi_regression(
    A: Tensor, rows: Tensor, cols: Tensor, vals: Tensor, n_cols: int, V0: Tensor | None = None,
    method: str = "sketch", tol: float = 0.3, max_iter: int = 2, ridge: float = 0.0, sketch_factor: int = 8,
    random_state: int | torch.Generator | None = None,
) -> tuple[Tensor, RegressionInfo]:  # fmt: skip
    """V (n_cols, k): row j minimises the sum over the entries of column j of (A_rows·v - vals)², plus ridge ||v||².

    A (m, k), rows, cols (E,) int64, vals (E,). `sketch`: conjugate gradients from V0, preconditioned by the R of a
    CountSketch of sketch_factor k rows, until each column's preconditioned gradient is `tol` of that at V0, at most
    max_iter steps; `sketch-gd`: gradient steps in its place; `exact`: normal equations, O(E k²). A step is O(E k).
    InputError for an unknown method. Source: arXiv 2302.11068.
    """
    entries = SparseEntries(rows, cols, vals, (len(A), n_cols))
    generator = generator_for(random_state, A.device)
    return regress(A, entries, V0, method, tol, max_iter, ridge, sketch_factor, generator)


def regress(
    A: Tensor, entries: Entries, V0: Tensor | None, method: str, tol: float, max_iter: int, ridge: float,
    sketch_factor: int, generator: torch.Generator,
) -> tuple[Tensor, RegressionInfo]:  # fmt: skip
    """`multi_regression` on entries of either kind."""
    choose("method", method, METHODS)
    (n, k), seen = (entries.shape[1], A.shape[1]), entries.count
    if method == "exact":
        flops = 2.0 * seen * (k * k + k) + n * k**3 / 3
        return _exact(A, entries, ridge), RegressionInfo(0, 0.0, flops, flops)
    R = entries.sketched_roots(A, sketch_factor * k, ridge, generator)
    diagonal = R.diagonal(dim1=1, dim2=2).abs()
    narrow = diagonal.amin(1) <= NARROW * torch.finfo(A.dtype).eps * diagonal.amax(1)
    if narrow.any():
        R = torch.where(narrow[:, None, None], torch.eye(k, dtype=A.dtype, device=A.device), R)
    V = A.new_zeros(n, k) if V0 is None else V0.clone()
    gradient = entries.adjoint(A, entries.values) if V0 is None else _descent(A, entries, V, ridge)
    if method == "sketch":
        steps, residual = _conjugate_gradients(A, entries, R, V, gradient, ridge, tol, max_iter)
    else:
        steps, residual = _gradient_steps(A, entries, R, V, gradient, ridge, tol, max_iter)
    if narrow.any():
        solved = _exact(A, entries, ridge)
        V = torch.where(narrow[:, None], solved, V)
    step_flops = 4.0 * seen * k + 4.0 * n * k * k
    sketching = 2.0 * seen * k + 2.0 * len(R) * sketch_factor * k**3
    info = RegressionInfo(steps, residual, sketching + (steps + 1) * step_flops, step_flops, int(narrow.sum()))
    return V, info


def _descent(A: Tensor, entries: Entries, V: Tensor, ridge: float) -> Tensor:
    return entries.adjoint(A, entries.values - entries.product(A, V)) - ridge * V


def _normal(A: Tensor, entries: Entries, V: Tensor, ridge: float) -> Tensor:
    return entries.adjoint(A, entries.product(A, V)) + ridge * V


def _half(R: Tensor, g: Tensor) -> Tensor:
    """R⁻ᵀ g of every column: its norm is that of the preconditioned gradient."""
    return _solve(R.mT, g, upper=False)


def _solve(R: Tensor, g: Tensor, upper: bool) -> Tensor:
    if len(R) == 1:
        return torch.linalg.solve_triangular(R[0], g.T, upper=upper).T
    return torch.linalg.solve_triangular(R, g[:, :, None], upper=upper)[:, :, 0]


def _conjugate_gradients(
    A: Tensor, entries: Entries, R: Tensor, V: Tensor, r: Tensor, ridge: float, tol: float, max_iter: int
) -> tuple[int, float]:
    """Every column its own steps, V in place; a column that has converged stands still."""
    half = _half(R, r)
    z, rho = _solve(R, half, upper=True), half.square().sum(1)
    start, p, steps = rho.clone(), z, 0
    while steps < max_iter and (moving := rho > tol**2 * start).any():
        q = _normal(A, entries, p, ridge)
        curvature = torch.linalg.vecdot(p, q)
        alpha = torch.where(moving & (curvature > 0), rho / curvature, 0)
        V += alpha[:, None] * p
        r = r - alpha[:, None] * q
        half = _half(R, r)
        z, following = _solve(R, half, upper=True), half.square().sum(1)
        p = z + torch.where(rho > 0, following / rho, 0)[:, None] * p
        rho, steps = following, steps + 1
    return steps, _reduction(rho, start)


def _gradient_steps(
    A: Tensor, entries: Entries, R: Tensor, V: Tensor, r: Tensor, ridge: float, tol: float, max_iter: int
) -> tuple[int, float]:
    """Steps of 1 / (1.1 times the largest eigenvalue), which power iteration finds: a fixed one fails short columns."""
    x, top = torch.ones_like(V), torch.ones_like(V[:, 0])
    for _ in range(POWER_STEPS):
        x = x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        x = _half(R, _normal(A, entries, _solve(R, x, upper=True), ridge))
        top = x.norm(dim=1)
    omega = torch.where(top > 0, 1 / (1.1 * top), 0)
    half, steps = _half(R, r), 0
    start = half.square().sum(1)
    rho = start
    while steps < max_iter and (moving := rho > tol**2 * start).any():
        V += torch.where(moving, omega, 0)[:, None] * _solve(R, half, upper=True)
        half = _half(R, _descent(A, entries, V, ridge))
        rho, steps = half.square().sum(1), steps + 1
    return steps, _reduction(rho, start)


def _reduction(rho: Tensor, start: Tensor) -> float:
    share = torch.where(start > 0, rho / start, 0)
    return float(share.max().sqrt()) if len(share) else 0.0


def _exact(A: Tensor, entries: Entries, ridge: float) -> Tensor:
    """By Cholesky factors; where a Gram is singular, the solution of least norm."""
    grams, right = entries.grams(A), entries.adjoint(A, entries.values)
    grams.diagonal(dim1=1, dim2=2).add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(grams)
    V = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
    bad = (failed != 0).nonzero()[:, 0]
    if len(bad):
        V[bad] = (torch.linalg.pinv(grams[bad], hermitian=True) @ right[bad, :, None])[:, :, 0]
    return V


def check_entries(rows: Tensor, cols: Tensor, vals: Tensor, shape: tuple[int, int]) -> None:
    """InputError unless rows, cols, vals (E,) are distinct places in the shape with finite floating-point values."""
    if not len(rows) == len(cols) == len(vals):
        raise InputError(f"rows, cols and vals differ in length: {len(rows)}, {len(cols)}, {len(vals)}")
    if not len(vals):
        raise InputError("no entry is seen: rows, cols and vals are empty")
    if vals.dtype not in (torch.float32, torch.float64):
        raise InputError(f"vals must be float32 or float64; got {vals.dtype}")
    if not torch.isfinite(vals).all():
        raise InputError("vals are not finite")
    for name, index, size in (("rows", rows, shape[0]), ("cols", cols, shape[1])):
        if int(index.min()) < 0 or int(index.max()) >= size:
            raise InputError(f"{name} must be in 0..{size - 1}; got {int(index.min())}..{int(index.max())}")
    places, counts = (rows * shape[1] + cols).unique(return_counts=True)
    if len(places) < len(rows):
        twice = int(places[counts.argmax()])
        raise InputError(f"the entry ({twice // shape[1]}, {twice % shape[1]}) is given more than once")
