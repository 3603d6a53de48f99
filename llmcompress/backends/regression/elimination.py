"""Backward elimination of least-squares coefficients, many targets at once."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.errors import InputError

REFRESH = 32  # downdates of an inverse between two fresh factorisations


def backward_eliminate(
    X: Tensor, y: Tensor, cand: Tensor, sigma: float, max_nnz: int | None = None
) -> tuple[Tensor, Tensor]:
    """Deletes the candidate that raises the residual least, while that is below 2 sigma² log d or there are too many.

    X (N, d), y (N,), cand (c,) distinct columns. Returns the kept columns and their least-squares coefficients.
    Deleting j raises the residual sum of squares by exactly (w_j h_j)², 1 / h_j the length of row j of R⁻¹. float64.
    """
    d = X.shape[1]
    if len(cand.unique()) < len(cand) or (len(cand) and not 0 <= int(cand.min()) <= int(cand.max()) < d):
        raise InputError(f"candidates must be distinct columns in 0..{d - 1}")
    X, y = X.double(), y.double()
    cand = cand[X[:, cand].norm(dim=0) > 0]
    price = 2 * sigma**2 * torch.tensor(float(max(d, 2))).log().item()
    while len(cand):
        length = X[:, cand].norm(dim=0)
        q, r = torch.linalg.qr(X[:, cand] / length)
        usable = r.diagonal().abs() > 1e-12 * r.diagonal().abs().max()
        if not usable.all():  # columns that the earlier ones span
            cand = cand[usable]
            continue
        w = torch.linalg.solve_triangular(r, (q.T @ y)[:, None], upper=True)[:, 0]
        inverse = torch.linalg.solve_triangular(r, torch.eye(len(cand), dtype=r.dtype, device=r.device), upper=True)
        kept = _downdate(inverse @ inverse.T, w, price, max_nnz)
        if len(kept) == len(cand):
            return cand, w / length
        cand = cand[kept]
    return cand, X.new_zeros(0)


def _downdate(inverse: Tensor, w: Tensor, price: float, max_nnz: int | None) -> Tensor:
    """Positions kept after at most REFRESH deletions from the inverse Gram (c, c) and the coefficients (c,)."""
    alive = torch.ones(len(w), dtype=torch.bool, device=w.device)
    inverse, w = inverse.clone(), w.clone()
    for _ in range(REFRESH):
        costs = torch.where(alive, w.square() / inverse.diagonal().clamp_min(1e-300), torch.inf)
        j = int(costs.argmin())
        too_many = max_nnz is not None and int(alive.sum()) > max_nnz
        if not alive.any() or (costs[j] > price and not too_many):
            break
        column = inverse[:, j] / inverse[j, j]
        w = w - column * w[j]
        inverse = inverse - torch.outer(column, inverse[j])
        alive[j] = False
        inverse[j, j] = 1.0
    return alive.nonzero()[:, 0]


def eliminate_columns(gram: Tensor, products: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """Least squares on all k columns, then deletions down to s for every target at once: indices, values (m, s).

    gram (k, k) positive definite, products (m, k) = targets times columns; float64. O(m k²) a deletion.
    """
    m, k = products.shape
    inverse = torch.linalg.inv(gram).repeat(m, 1, 1)
    w = products @ inverse[0]
    alive = torch.ones(m, k, dtype=torch.bool, device=w.device)
    rows = torch.arange(m, device=w.device)
    for _ in range(k - s):
        costs = w.square() / inverse.diagonal(dim1=1, dim2=2).clamp_min(1e-300)
        j = torch.where(alive, costs, torch.inf).argmin(1)
        pivot = inverse[rows, j]
        column = pivot / pivot.gather(1, j[:, None])
        w = w - column * w.gather(1, j[:, None])
        inverse -= column[:, :, None] * pivot[:, None, :]
        inverse[rows, j, j] = 1.0
        alive[rows, j] = False
    indices = alive.nonzero()[:, 1].view(m, s)
    return indices, w.gather(1, indices)
