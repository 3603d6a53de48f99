"""The conjugate direction iteration with any map for its proposals (arXiv 2205.10763)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmcompress.backends.checks import checked_matrix
from llmcompress.backends.regression.krylov import Operator, SolveResult, operator
from llmcompress.errors import InputError

Store = list[tuple[Tensor, Tensor, Tensor]]  # direction and image (n, k), curvature (k,), oldest first


def dcdm(
    A: Operator, b: Tensor, direction: Callable[[Tensor], Tensor], x0: Tensor | None = None, n_ortho: int = 2,
    tol: float = 1e-4, max_iter: int = 100,
) -> SolveResult:  # fmt: skip
    """Solves A x = b, A (n, n) symmetric positive definite or its product as a function of (n, k); b (n,) or (n, k).

    direction: unit residuals (n, k) -> proposals (n, k), column by column. n_ortho: earlier directions that are
    orthogonalised against, oldest first. A column stops at ||r|| <= tol ||r_0||. Each column is a search of its own. A
    proposal without curvature clears the column's store and is replaced by the residual. O(k n²) an iteration, and
    O(k n n_ortho). InputError for bad input and an A that shows not to be positive definite.
    """
    product = operator(A)
    columns = b[:, None] if b.ndim == 1 else b
    columns = checked_matrix(columns, "b")
    if isinstance(A, Tensor) and len(columns) != len(A):
        raise InputError(f"b has {len(columns)} rows and A {len(A)}")
    if not tol > 0 or n_ortho < 0:
        raise InputError(f"tol must be positive and n_ortho not negative; got {tol}, {n_ortho}")
    x = torch.zeros_like(columns) if x0 is None else x0.reshape(columns.shape).double().clone()
    r = columns - product(x)
    start = r.norm(dim=0)
    goal, unit = tol * start, start.clamp_min(torch.finfo(r.dtype).tiny)
    history = [torch.where(start > 0, 1.0, 0.0).to(start)]
    n_iter = torch.zeros(len(start), dtype=torch.int64, device=r.device)
    active = r.norm(dim=0) > goal
    store: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(max_iter):
        if not active.any():
            break
        live = active.nonzero()[:, 0]
        step, image, store = _direction(
            product, r[:, live], direction, [(p[:, live], i[:, live], c[live]) for p, i, c in store]
        )
        curvature = (step * image).sum(0)
        alpha = torch.where(curvature > 0, (step * r[:, live]).sum(0) / curvature, 0)
        x[:, live] += alpha * step
        r[:, live] = columns[:, live] - product(x[:, live])
        store = _widen([*store, (step, image, curvature)][-n_ortho:] if n_ortho else [], live, len(start))
        n_iter[live] += 1
        history.append(r.norm(dim=0) / unit)
        active = r.norm(dim=0) > goal
    shape_x = x[:, 0] if b.ndim == 1 else x
    return SolveResult(shape_x.to(b.dtype), torch.stack(history), n_iter, not bool(active.any()))


def _direction(
    product: Callable[[Tensor], Tensor], r: Tensor, direction: Callable[[Tensor], Tensor], store: Store
) -> tuple[Tensor, Tensor, Store]:
    """A proposal for every column, orthogonalised, with its image; the store without the columns that were reset."""
    step = direction(r / r.norm(dim=0)).to(r.dtype)
    for old, old_image, old_curvature in store:
        share = (step * old_image).sum(0) / old_curvature
        step = step - old * torch.where(old_curvature > 0, share, 0)
    image = product(step)
    curvature = (step * image).sum(0)
    bad = ~(curvature > 1e-14 * step.norm(dim=0) * image.norm(dim=0))  # NaN is bad too
    if bad.any():
        wrong = torch.isfinite(curvature) & (curvature < -1e-12 * step.norm(dim=0) * image.norm(dim=0))
        if wrong.any():
            raise InputError("A is not positive definite: a direction has negative curvature")
        step = torch.where(bad, r, step)
        image = torch.where(bad, product(r), image)
        store = [(old, im, torch.where(bad, 0.0, c)) for old, im, c in store]
        if ((step * image).sum(0)[bad] <= 0).any():
            raise InputError("A is not positive definite: a residual has no positive curvature")
    return step, image, store


def _widen(store: Store, live: Tensor, columns: int) -> Store:
    """Entries for all columns; those that have stopped are never read."""

    def wide(part: Tensor) -> Tensor:
        whole = part.new_zeros(*part.shape[:-1], columns)
        whole[..., live] = part
        return whole

    return [(wide(step), wide(image), wide(curvature)) for step, image, curvature in store]
