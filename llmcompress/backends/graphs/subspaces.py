"""Linear maps as the subspaces that they read, and what one basis shared by several of them costs."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.errors import InputError


def sketch(weight: Tensor, rank: int) -> Tensor:
    """The leading singular values times right singular vectors, (rank, d_in) float64, of a weight (d_out, d_in)."""
    if weight.ndim != 2 or not 1 <= rank <= min(weight.shape):
        raise InputError(f"rank must be between 1 and the weight's smaller side; got {rank} for {tuple(weight.shape)}")
    _, values, vectors = torch.linalg.svd(weight.double(), full_matrices=False)
    return values[:rank, None] * vectors[:rank]


def affinities(sketches: Tensor) -> Tensor:
    """||V_i V_jᵀ||_F² / sqrt(r_i r_j) (n, n), 1 for equal subspaces: sketches (n, r, d_in), V_i their rows normalised.

    Rows below 1e-6 of the longest one are no directions, and left out.
    """
    n, rank, _ = sketches.shape
    lengths = sketches.double().norm(dim=2)
    real = lengths > 1e-6 * lengths.amax(1, keepdim=True)
    rows = (sketches.double() / torch.where(real, lengths, torch.inf)[:, :, None]).flatten(0, 1)
    count = real.sum(1).double().clamp_min(1).sqrt()
    return (rows @ rows.T).square().view(n, rank, n, rank).sum((1, 3)) / (count[:, None] * count)


def shared_basis_error(weights: Tensor, labels: Tensor, rank: int) -> float:
    """Relative Frobenius error of all weights (n, d_out, d_in) when each group shares one basis of `rank` inputs."""
    weights = weights.double()
    lost = 0.0
    for label in labels.unique():
        rows = weights[labels == label].flatten(0, 1)
        gram = rows.T @ rows if rows.shape[0] >= rows.shape[1] else rows @ rows.T
        values = torch.linalg.eigvalsh(gram)
        lost += float(values[: max(0, len(values) - rank)].clamp_min(0).sum())
    return (lost / float(weights.square().sum())) ** 0.5


def contiguous_labels(n: int, count: int) -> Tensor:
    """Labels (n,) of `count` runs of neighbours, of sizes that differ by one at most."""
    return torch.arange(n) * count // n
