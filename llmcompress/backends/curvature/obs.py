"""Pruning by the optimal brain surgeon with an empirical Fisher matrix (arXiv 2107.03356, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from llmcompress.backends.curvature.fisher_inverse import StaticFisherInverse
from llmcompress.errors import InputError


@dataclass(frozen=True)
class PruneReport:
    """densities: share left after each recomputation; predicted: the summed rise of the loss that the scores foretell;

    damps: lam of each; clamped: diagonal entries of F⁻¹ that were not positive and were left out of the pruning.
    """

    densities: list[float]
    predicted: float
    damps: list[float]
    clamped: int


def obs_prune(
    weight_flat: Tensor, grad_fn: Callable[[Tensor], Tensor], sparsity: float, damp: float | Literal["relative"],
    recomputations: int = 16, block_size: int = 2000, mask: Tensor | None = None, update: bool = True,
) -> tuple[Tensor, Tensor, PruneReport]:  # fmt: skip
    """The weights (d,) with a share `sparsity` of zeros, and which are left (d,) bool.

    grad_fn(weights) -> (m, d) gradients, one a sample, at those weights. `recomputations` times, densities falling
    geometrically, the weights of least w_i² / (2 [F⁻¹]_ii) go, the others take on what they did (F⁻¹ t, t_i =
    -w_i / [F⁻¹]_ii on the dropped ones) if `update`; F is that of the weights left, in blocks. damp: lam, or
    relative: the mean squared gradient, for gradients of unknown scale. mask: weights that there are to begin with.
    O(d m²) a recomputation beside its gradients. InputError for bad arguments. Source: arXiv 2107.03356, section 4.
    """
    left = torch.ones_like(weight_flat, dtype=torch.bool) if mask is None else mask.clone()
    start, target = float(left.float().mean()), 1 - sparsity
    if not 0 <= sparsity < 1 or target > start + 1e-9:
        raise InputError(f"sparsity must be in [0, 1) and at least the current {1 - start:.4g}; got {sparsity}")
    if recomputations < 1:
        raise InputError(f"recomputations must be at least 1; got {recomputations}")
    weights, densities, damps = weight_flat * left, [], []
    predicted, clamped = 0.0, 0
    for index in range(1, recomputations + 1):
        kept = round(len(weights) * start * (target / start) ** (index / recomputations))
        alive = left.nonzero()[:, 0]
        grads = _checked_gradients(grad_fn(weights), len(weights))[:, alive]
        lam = float(grads.square().mean()) if damp == "relative" else damp
        inverse = StaticFisherInverse(grads, lam, block_size)
        w, diagonal = weights[alive], inverse.diag()
        positive = diagonal > 0
        clamped += int((~positive).sum())
        scores = torch.where(positive, w.square() / (2 * diagonal), torch.inf)
        dropped = scores.topk(len(alive) - kept, largest=False).indices
        predicted += float(scores[dropped].sum())
        if update:
            t = torch.zeros_like(w)
            t[dropped] = -w[dropped] / diagonal[dropped]
            w = w + inverse.mul(t)
        w[dropped] = 0
        weights = torch.zeros_like(weights).index_copy(0, alive, w)
        left[alive[dropped]] = False
        densities.append(float(left.float().mean()))
        damps.append(lam)
    return weights, left, PruneReport(densities, predicted, damps, clamped)


def _checked_gradients(grads: Tensor, dim: int) -> Tensor:
    if grads.ndim != 2 or grads.shape[1] != dim:
        raise InputError(f"grad_fn must give (m, {dim}) gradients; got shape {tuple(grads.shape)}")
    if len(grads) < 2:
        raise InputError(f"pruning needs at least 2 gradients; got {len(grads)}")
    return grads


def collect_gradients(model: nn.Module, params: Sequence[nn.Parameter], batches: Iterable[dict[str, Any]]) -> Tensor:
    """Gradients (m, d) of the loss of each batch, the model's keyword arguments, its output having a `loss`."""
    if not params or not any(parameter.requires_grad for parameter in params):
        raise InputError("no parameter requires a gradient: all are frozen")
    rows = []
    for batch in batches:
        with torch.enable_grad():
            found = torch.autograd.grad(model(**batch).loss, params)
        rows.append(parameters_to_vector(found))
    if not rows:
        raise InputError("no batch was given")
    return torch.stack(rows)
