"""Leverage scores and Lewis weights of a matrix's rows."""

from __future__ import annotations

import math
import warnings

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from llmcompress.backends.checks import checked_matrix, choose, generator_for
from llmcompress.errors import InputError

SIGNS = 8  # entries a column of the sparse sign sketch
SKETCH_ROWS = 16  # rows of it for each unit of rank
PROJECTIONS = 256  # Gaussian directions that estimate a row's norm
GRAM_RANGE = 1e-6  # of a Gram's eigenvalues, least over largest: above it they give orthonormal columns to 1e-10


def check_p(p: float) -> None:
    if not (1 <= p < math.inf):
        raise InputError(f"p must be in [1, inf); got {p}")


def powers(z: Tensor, p: float) -> Tensor:
    """|z|^p; a general power takes many times as long as the first few."""
    if p in (2, 3, 4):
        square = z.square()
        return square if p == 2 else square * z.abs() if p == 3 else square.square()
    return z.abs() if p == 1 else z.abs().pow(p)


def orthonormal_basis(X: Tensor) -> Tensor:
    """Orthonormal basis (n, r) of the columns' span, r the numerical rank; X (n, d) float64. Cost O(n d²).

    Columns of moderate condition go through their Gram, in products alone: a third of the time of a QR.
    """
    if X.shape[0] < X.shape[1]:
        u, s, _ = torch.linalg.svd(X, full_matrices=False)
        return u[:, s > max(X.shape) * torch.finfo(X.dtype).eps * s[0]]
    scale = X.norm(dim=0)
    X = X / torch.where(scale > 0, scale, 1)  # scales of columns are no matter of rank
    values, vectors = torch.linalg.eigh(X.T @ X)
    if values[0] > GRAM_RANGE * values[-1]:
        return X @ (vectors * values.rsqrt())
    q, r = torch.linalg.qr(X)
    u, s, _ = torch.linalg.svd(r)
    kept = s > max(X.shape) * torch.finfo(X.dtype).eps * s[0]
    return q @ u[:, kept]


def principal_features(X: Tensor, rank: int) -> Tensor:
    """X (n, d) on its `rank` leading right singular vectors: (n, rank). Cost O(n d² + d³)."""
    if not 1 <= rank <= min(X.shape):
        raise InputError(f"rank must be between 1 and min(n, d) = {min(X.shape)}; got {rank}")
    if X.shape[0] < X.shape[1]:
        return X @ torch.linalg.svd(X, full_matrices=False)[2][:rank].T
    return X @ torch.linalg.eigh(X.T @ X)[1][:, -rank:].flip(1)


def leverage_scores(X: Tensor, method: str = "exact", generator: torch.Generator | None = None) -> Tensor:
    """Leverage tau_i = ||Q_i||² of the rows of X (n, d), Q an orthonormal basis of its columns; (n,) in X's dtype.

    exact: O(n d²), sum = rank. sketch: R of a sparse sign sketch of X, then norms of the rows of X R⁻¹ by 256 Gaussian
    projections, O(nnz + r³ + 256 n r), within about 20 %; X must have full column rank there.
    """
    choose("method", method, ("exact", "sketch"))
    dtype = torch.as_tensor(X).dtype
    X = checked_matrix(X)
    if method == "exact":
        return orthonormal_basis(X).square().sum(1).to(dtype)
    n, d = X.shape
    generator = generator or generator_for(0, X.device)
    rows = SKETCH_ROWS * d
    sketch = X.new_zeros(rows, d)
    for _ in range(SIGNS):
        place = torch.randint(rows, (n,), generator=generator, device=X.device)
        sign = torch.randint(2, (n, 1), generator=generator, device=X.device).to(X) * 2 - 1
        sketch.index_add_(0, place, sign * X / math.sqrt(SIGNS))
    r = torch.linalg.qr(sketch, mode="r")[1]
    if r.diagonal().abs().min() <= 1e-12 * r.diagonal().abs().max():
        raise InputError("X has not full column rank: use method exact")
    gaussian = torch.randn(d, PROJECTIONS, generator=generator, dtype=X.dtype, device=X.device)
    projection = torch.linalg.solve_triangular(r, gaussian / math.sqrt(PROJECTIONS), upper=True)
    return (X @ projection).square().sum(1).clamp_max(1).to(dtype)


def lewis_weights(X: Tensor, p: float, tol: float = 1e-8, max_iter: int = 200) -> Tensor:
    """Lewis weights w (n,) of the rows of X (n, d): w_i = (x_iᵀ (Xᵀ W^(1-2/p) X)⁻¹ x_i)^(p/2), sum w = rank.

    A fixed-point iteration on log w, damped by 4 / (p + 2) for p > 2, contracting by |1 - p/2| (p <= 2) or
    (p-2)/(p+2). Zero rows weigh 0. Warns (ConvergenceWarning, naming the residual) if `tol` is not reached.
    Source: arXiv 2306.00732 for the use; Cohen and Peng, 2015, for the iteration at p < 4. Cost O(n r²) a sweep.
    """
    check_p(p)
    dtype = torch.as_tensor(X).dtype
    weights, history = _lewis(orthonormal_basis(checked_matrix(X)), p, tol, max_iter)
    if history[-1] > tol:
        message = f"Lewis weights: residual {history[-1]:.1e} after {len(history)} sweeps, above {tol:.1e}"
        warnings.warn(message, ConvergenceWarning, stacklevel=2)
    return weights.to(dtype)


def _lewis(basis: Tensor, p: float, tol: float, max_iter: int) -> tuple[Tensor, list[float]]:
    """Weights and the largest change of log w in every sweep."""
    nonzero = basis.square().sum(1) > torch.finfo(basis.dtype).tiny
    rows = basis[nonzero]
    eta = 1.0 if p <= 2 else 4 / (p + 2)
    log_w = rows.square().sum(1).log()
    history = []
    for _ in range(max_iter):
        target = lewis_quadratic(rows, log_w, p).log() * (p / 2)
        change = target - log_w
        history.append(float(change.abs().max()))
        log_w = log_w + eta * change
        if history[-1] <= tol:
            break
    weights = basis.new_zeros(len(basis))
    weights[nonzero] = log_w.exp()
    return weights, history


def lewis_quadratic(rows: Tensor, log_w: Tensor, p: float) -> Tensor:
    """x_iᵀ (Xᵀ W^(1-2/p) X)⁻¹ x_i, (n,)."""
    return (rows @ lewis_change_of_basis(rows, log_w, p)).square().sum(1)


def lewis_change_of_basis(rows: Tensor, log_w: Tensor, p: float) -> Tensor:
    """R⁻¹ (r, r) of the QR decomposition W^(1/2-1/p) X = Q R, so that X R⁻¹ is the Lewis basis."""
    r = torch.linalg.qr(((0.5 - 1 / p) * log_w).exp()[:, None] * rows, mode="r")[1]
    return torch.linalg.solve_triangular(r, torch.eye(len(r), dtype=r.dtype, device=r.device), upper=True)
