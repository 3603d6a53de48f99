"""Factors of a rectangular matrix by the sub-gradient method on the l1 loss of its entries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmcompress.errors import RunError


def l1_factors(
    entries: Tensor, observed: Tensor | None, rank: int, eta0: float, rho: float, steps: int
) -> tuple[Tensor, Tensor]:
    """A (m, rank), B (rank, n) on the way to the least mean |A B - entries| over the observed entries.

    F <- F - eta D G and G <- G - eta Dᵀ F with D the residual's signs over their norm and eta = eta0 rho^t, in units
    of the entries' norm, from the truncated singular value decomposition of the observed entries. An extension of
    arXiv 2202.08788, whose theory has symmetric matrices and Gaussian measurements, to the entries of a weight: these
    are of full rank, where a small start is no help. O(m n rank) a step. RunError naming eta0 if it diverges.
    """
    mask = torch.ones_like(entries) if observed is None else observed.to(entries.dtype)
    target = entries * mask
    scale = float(target.norm()) or 1.0
    target = target / scale
    u, s, vh = torch.linalg.svd(target, full_matrices=False)
    root = s[:rank].sqrt()
    F, G = u[:, :rank] * root, vh[:rank].T * root
    length = math.sqrt(float(mask.sum()))
    for t in range(steps):
        signs = torch.sign((F @ G.T).mul_(mask).sub_(target))
        eta = eta0 * rho**t / length
        F, G = F - eta * (signs @ G), G - eta * (signs.T @ F)
        if not torch.isfinite(F.sum()):
            raise RunError(f"step {t + 1}: the descent diverges; lower eta0 = {eta0:g}")
    return F * scale, G.T
