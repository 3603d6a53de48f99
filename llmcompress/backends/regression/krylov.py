"""Krylov methods: Lanczos' Ritz pairs, and the conjugate gradients that learned directions are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from llmcompress.backends.checks import checked_matrix
from llmcompress.errors import InputError

Operator = Tensor | Callable[[Tensor], Tensor]
BREAKDOWN = 1e-10


@dataclass(frozen=True)
class SolveResult:
    """x like b; residuals (iterations + 1, k): ||b - A x|| / ||b - A x_0||; n_iter (k,) of each column; converged."""

    x: Tensor
    residuals: Tensor
    n_iter: Tensor
    converged: bool


@dataclass(frozen=True)
class Ritz:
    """theta (m,) ascending, vectors (n, m) orthonormal; m is less than asked for where Lanczos broke down."""

    theta: Tensor
    vectors: Tensor


def operator(A: Operator) -> Callable[[Tensor], Tensor]:
    """The product x (n, k) -> A x. InputError unless a matrix is square, finite and symmetric."""
    if not isinstance(A, Tensor):
        return A
    if A.ndim != 2 or A.shape[0] != A.shape[1]:
        raise InputError(f"A must be square; got {tuple(A.shape)}")
    if A.layout != torch.strided:
        return lambda x: A @ x
    matrix = checked_matrix(A, "A")
    if (matrix - matrix.T).abs().max() > 1e-8 * matrix.abs().max():
        raise InputError("A must be symmetric")
    return lambda x: matrix @ x


def lanczos_ritz(A: Operator, v: Tensor, m: int) -> Ritz:
    """Ritz pairs of m Lanczos steps from v (n,), fully re-orthogonalised twice; float64. O(m n²) and O(m² n).

    InputError if m exceeds n.
    """
    product, n = operator(A), len(v)
    if not 1 <= m <= n:
        raise InputError(f"m must be between 1 and n = {n}; got {m}")
    basis = v.new_zeros(n, m, dtype=torch.float64)
    alpha, beta = basis.new_zeros(m), basis.new_zeros(m)
    w = v.double() / v.double().norm()
    reached = m
    for j in range(m):
        basis[:, j] = w
        w = product(w[:, None])[:, 0]
        alpha[j] = w @ basis[:, j]
        for _ in range(2):
            w = w - basis[:, : j + 1] @ (basis[:, : j + 1].T @ w)
        beta[j] = w.norm()
        if beta[j] <= BREAKDOWN * alpha[: j + 1].abs().max():
            reached = j + 1
            break
        w = w / beta[j]
    diagonal, off = alpha[:reached], beta[: reached - 1]
    theta, s = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
    return Ritz(theta, basis[:, :reached] @ s)


def ritz_samples(R: Ritz, n: int, theta_off: int, gain: float = 9.0, *, generator: torch.Generator) -> Tensor:
    """Unit vectors (dim, n): combinations of the Ritz vectors, those below m/2 + theta_off weighted by `gain`.

    Ritz values below 1e-8 are left out. Source: arXiv 2205.10763, its official code.
    """
    kept = R.theta >= 1e-8
    vectors, m = R.vectors[:, kept], int(kept.sum())
    c = torch.randn(m, n, generator=generator, dtype=vectors.dtype, device=vectors.device)
    c[: m // 2 + theta_off] *= gain
    b = vectors @ c
    return b / b.norm(dim=0)


# --- conjugate gradients ---------------------------------------------------------------------------------------------


def cg(A: Operator, b: Tensor, tol: float = 1e-4, max_iter: int = 1000) -> SolveResult:
    """Conjugate gradients, every column of b (n, k) on its own."""
    return pcg(A, b, lambda r: r, tol, max_iter)


def pcg(
    A: Operator, b: Tensor, precondition: Callable[[Tensor], Tensor], tol: float = 1e-4, max_iter: int = 1000
) -> SolveResult:
    """Preconditioned conjugate gradients; precondition: residuals (n, k) -> (n, k), linear and positive definite."""
    return _conjugate_gradients(operator(A), b, precondition, tol, max_iter, None)


def deflated_pcg(
    A: Operator, b: Tensor, V: Tensor, precondition: Callable[[Tensor], Tensor] = lambda r: r, tol: float = 1e-4,
    max_iter: int = 1000,
) -> SolveResult:  # fmt: skip
    """PCG whose start solves the problem on span V (n, m) and whose directions stay A-orthogonal to it."""
    return _conjugate_gradients(operator(A), b, precondition, tol, max_iter, V.double())


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, precondition: Callable[[Tensor], Tensor], tol: float,
    max_iter: int, V: Tensor | None,
) -> SolveResult:  # fmt: skip
    columns = (b[:, None] if b.ndim == 1 else b).double()
    x, r = torch.zeros_like(columns), columns.clone()
    start = r.norm(dim=0)
    tiny = torch.finfo(r.dtype).tiny
    project: Callable[[Tensor], Tensor] = lambda z: z  # noqa: E731
    if V is not None:
        image = product(V)
        inner = torch.linalg.cholesky(V.T @ image)
        x = V @ torch.cholesky_solve(V.T @ columns, inner)
        r = columns - product(x)
        project = lambda z: z - V @ torch.cholesky_solve(image.T @ z, inner)  # noqa: E731
    z = precondition(r)
    p, rho = project(z), (r * z).sum(0)
    history, n_iter = [r.norm(dim=0) / start.clamp_min(tiny)], torch.zeros(len(start), dtype=torch.int64)
    for _ in range(max_iter):
        active = r.norm(dim=0) > tol * start
        if not active.any():
            break
        image_p = product(p)
        alpha = torch.where(active, rho / (p * image_p).sum(0).clamp_min(tiny), 0)
        x, r = x + alpha * p, r - alpha * image_p
        z = precondition(r)
        following = (r * z).sum(0)
        p = project(z) + torch.where(active, following / rho.clamp_min(tiny), 0) * p
        rho = following
        n_iter += active.cpu()
        history.append(r.norm(dim=0) / start.clamp_min(tiny))
    done = bool((r.norm(dim=0) <= tol * start).all())
    return SolveResult((x[:, 0] if b.ndim == 1 else x).to(b.dtype), torch.stack(history), n_iter, done)


def ic0(A: scipy.sparse.spmatrix) -> Callable[[Tensor], Tensor]:
    """Incomplete Cholesky factorisation without fill of a sparse A, as a preconditioner for `pcg`; on the CPU.

    InputError where a pivot is not positive.
    """
    lower = scipy.sparse.csr_matrix(scipy.sparse.tril(A)).astype(np.float64)
    lower.sort_indices()
    rows: list[dict[int, float]] = []
    for i in range(lower.shape[0]):
        span = slice(lower.indptr[i], lower.indptr[i + 1])
        row: dict[int, float] = {}
        for j, value in zip(lower.indices[span].tolist(), lower.data[span].tolist(), strict=True):
            other = row if j == i else rows[j]
            total = value - sum(v * other[k] for k, v in row.items() if k < j and k in other)
            if j == i and total <= 0:
                raise InputError(f"incomplete Cholesky: pivot {i} is not positive")
            row[j] = total**0.5 if j == i else total / other[j]
        rows.append(row)
    lower.data = np.array([value for row in rows for value in row.values()])
    upper = scipy.sparse.csr_matrix(lower.T)

    def solve(r: Tensor) -> Tensor:
        y = scipy.sparse.linalg.spsolve_triangular(lower, r.cpu().numpy(), lower=True)
        return torch.from_numpy(scipy.sparse.linalg.spsolve_triangular(upper, y, lower=False)).to(r)

    return solve
