"""Likelihood-adjusted semidefinite programs of Gaussian mixtures (arXiv 2209.15097), and their solver.

A partition enters by its membership matrices Z_k = 1 1ᵀ / n_k on its clusters. Their relaxation is

    max sum_k <A_k, Z_k>   with Z_k positive semidefinite and not negative, tr Z_k = 1, (sum_k Z_k) 1 = 1,

A_k the likelihood of a pair under covariance k. With one covariance for all it is the Peng-Wei program of k-means.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.errors import InputError

RELAXATION = 1.6
CHECK_EVERY = 20
FREEZE_AFTER = 1500  # iterations after which the penalty stays: convergence is proved for a fixed one
UNBALANCED = 10.0
MAX_POINTS = 300


@dataclass(frozen=True)
class SDPResult:
    """Z (K, n, n), not negative, its constraints met within the residuals; objective on the A that was given."""

    Z: Tensor
    objective: float
    primal_residual: float
    dual_residual: float
    n_iter: int
    converged: bool


def likelihood_affinities(X: Tensor, covs: Tensor) -> Tensor:
    """A_k[i, j] = -(X_i - X_j)ᵀ S_k⁻¹ (X_i - X_j) / 2 - log|S_k|, (K, n, n) float64: X (n, p), covs (K, p, p).

    InputError unless the covariances are symmetric positive definite, of X's width.
    """
    X, covs = X.double(), covs.double()
    if covs.ndim != 3 or covs.shape[1:] != (X.shape[1], X.shape[1]):
        raise InputError(f"covs must be (K, {X.shape[1]}, {X.shape[1]}); got {tuple(covs.shape)}")
    lower, failed = torch.linalg.cholesky_ex(covs)
    if failed.any() or not torch.allclose(covs, covs.mT) or not torch.isfinite(covs).all():
        raise InputError("covs must be symmetric positive definite")
    Y = torch.linalg.solve_triangular(lower, X.T.expand(len(covs), -1, -1), upper=False)
    products = Y.mT @ Y
    squares = products.diagonal(dim1=1, dim2=2)
    log_det = 2 * lower.diagonal(dim1=1, dim2=2).log().sum(1)
    return products - (squares[:, :, None] + squares[:, None, :]) / 2 - log_det[:, None, None]


def project_affine(Z: Tensor, trace: float = 1.0) -> Tensor:
    """The nearest symmetric Z (K, n, n) with tr Z_k = trace and (sum_k Z_k) 1 = 1; Z symmetric, n at least 2."""
    K, n, _ = Z.shape
    r = Z.sum((0, 2)) - 1
    t = Z.diagonal(dim1=1, dim2=2).sum(1) - trace
    s = (r.sum() - t.sum()) / (K * (n - 1))
    mu = (t - s) / n
    y = 2 / (K * n) * (r - mu.sum()) - s / n
    Z = Z - (y[:, None] + y) / 2
    Z.diagonal(dim1=1, dim2=2).sub_(mu[:, None])
    return Z


def solve_la_sdp(
    A: Tensor,
    tol: float = 1e-4,
    max_iter: int = 3000,
    warm_start: Tensor | None = None,
    max_points: int = MAX_POINTS,
) -> SDPResult:
    """The program for A (K, n, n), by consensus ADMM with closed-form projections; warm_start: Z (K, n, n).

    InputError unless A is symmetric and finite, and n at most max_points: beyond, `subsample` or raise it. Cost:
    O(K n³) an iteration, some hundreds of them.
    """
    return _admm(A, 1.0, tol, max_iter, warm_start, max_points)


def peng_wei_sdp(X: Tensor, K: int, tol: float = 1e-4, max_iter: int = 3000, max_points: int = MAX_POINTS) -> SDPResult:
    """k-means' relaxation, max <A, Z> with Z positive semidefinite and not negative, tr Z = K, Z 1 = 1: X (n, p).

    Z comes as (1, n, n). Errors and cost as `solve_la_sdp`.
    """
    identity = torch.eye(X.shape[1], dtype=torch.float64, device=X.device)
    return _admm(likelihood_affinities(X, identity[None]), float(K), tol, max_iter, None, max_points)


def _admm(A: Tensor, trace: float, tol: float, max_iter: int, warm_start: Tensor | None, max_points: int) -> SDPResult:
    """Source: arXiv 2209.15097 for the program; two-block consensus ADMM, X affine, Y semidefinite, W not negative."""
    if A.ndim != 3 or A.shape[1] != A.shape[2] or not torch.isfinite(A).all():
        raise InputError(f"A must be (K, n, n) and finite; got {tuple(A.shape)}")
    if float((A - A.mT).abs().max()) > 1e-8 * float(A.abs().max().clamp_min(1e-300)):
        raise InputError("A must be symmetric")
    n = A.shape[1]
    if n > max_points:
        raise InputError(f"{n} points exceed max_points = {max_points}: subsample them, or raise it")
    A = A.double()
    cost = A - A.mean()
    cost = cost / cost.abs().max().clamp_min(1e-300)
    if warm_start is None:
        start = torch.eye(n, dtype=A.dtype, device=A.device).expand(len(A), n, n) * (trace / n)
    else:
        start = warm_start.double()
    X, Y, W = start.clone(), start.clone(), start.clone()
    U, V, rho = torch.zeros_like(X), torch.zeros_like(X), 1.0
    primal = dual = float("inf")
    for iteration in range(1, max_iter + 1):
        X = project_affine((Y - U + W - V) / 2 + cost / (2 * rho), trace)
        for_Y = RELAXATION * X + (1 - RELAXATION) * Y
        for_W = RELAXATION * X + (1 - RELAXATION) * W
        last_Y, last_W = Y, W
        Y = _semidefinite(for_Y + U)
        W = (for_W + V).clamp_min(0)
        U, V = U + for_Y - Y, V + for_W - W
        if iteration % CHECK_EVERY and iteration < max_iter:
            continue
        scale = max(1.0, float(X.norm()))
        primal = max(float((X - Y).norm()), float((X - W).norm())) / scale
        dual = rho * max(float((Y - last_Y).norm()), float((W - last_W).norm())) / scale
        if max(primal, dual) <= tol:
            break
        if iteration < FREEZE_AFTER and max(primal, dual) > UNBALANCED * min(primal, dual):
            factor = 2.0 if primal > dual else 0.5
            rho, U, V = rho * factor, U / factor, V / factor
    return SDPResult(W, float((A * W).sum()), primal, dual, iteration, max(primal, dual) <= tol)


def _semidefinite(Z: Tensor) -> Tensor:
    """The nearest positive semidefinite matrices."""
    values, vectors = torch.linalg.eigh((Z + Z.mT) / 2)
    return (vectors * values.clamp_min(0)[:, None, :]) @ vectors.mT


def hard_memberships(labels: Tensor, K: int) -> Tensor:
    """Z_k = 1 1ᵀ / n_k on cluster k, (K, n, n) float64."""
    inside = torch.nn.functional.one_hot(labels, K).T.double()
    return inside[:, :, None] * inside[:, None, :] / inside.sum(1).clamp_min(1)[:, None, None]
