"""How many dimensions do data have of their own? Estimates from a deep density, and from neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.func import jacrev, vmap

from llmcompress.backends.analysis.deep_density import DeepDensity, fit_together
from llmcompress.backends.checks import checked_matrix
from llmcompress.errors import InputError

LARGEST_ASSIGNMENT = 4096
SCALES = (0.1, 0.15, 0.22)


def wasserstein1(a: Tensor, b: Tensor) -> float:
    """The exact W1 distance of two samples of one size, (m, D) each, m <= 4,096: the mean length of the best matching.

    Memory O(m²), time O(m³). InputError for unequal or too large samples.
    """
    a, b = checked_matrix(a, "a"), checked_matrix(b, "b")
    if a.shape != b.shape:
        raise InputError(f"both samples must have one shape; got {tuple(a.shape)}, {tuple(b.shape)}")
    if len(a) > LARGEST_ASSIGNMENT:
        raise InputError(f"at most {LARGEST_ASSIGNMENT} points are matched, memory being their square; got {len(a)}")
    cost = torch.cdist(a, b).cpu().numpy()
    return float(cost[linear_sum_assignment(cost)].mean())


def perturbation_rule(n: int, smoothness: float, dimension: float) -> float:
    """The noise that minimises s^(-t/(2b+t)) n^(-b/(2b+t)) + s, for smoothness b and intrinsic dimension t.

    The form of the error bound of arXiv 2105.04046; its constants are not known, so it tells how to scale with n.
    """
    if n < 1 or not (smoothness > 0 and dimension > 0):
        raise InputError(f"n must be at least 1, smoothness and dimension positive; got {n}, {smoothness}, {dimension}")
    b, t = smoothness, dimension
    return float((t / (2 * b + t)) ** ((2 * b + t) / (2 * b + 2 * t)) * n ** (-b / (2 * (b + t))))


def jacobian_dimension(model: DeepDensity, x: Tensor, cut: float = 2.0) -> float:
    """The mean number of singular values of df/dz above cut * sigma, at the posterior means of rows x (n, D)."""
    with torch.no_grad():
        z = model.posterior(x)[0]
        jacobians = vmap(jacrev(lambda point: model.decoder(point)))(z)
        values = torch.linalg.svdvals(jacobians)
    return float((values > cut * model.sigma()).sum(1).double().mean())


def slope_dimension(
    train: Tensor,
    test: Tensor,
    latent_dim: int,
    scales: Sequence[float] = SCALES,
    steps: int = 1500,
    particles: int = 10,
    seed: int = 0,
) -> float:
    """`slope` of fits at several perturbations. train, test (n, D); bounded by latent_dim."""
    if len(scales) < 2 or min(scales) <= 0:
        raise InputError(f"needs two positive scales at least; got {tuple(scales)}")
    models = [DeepDensity(latent_dim, train.shape[1]).to(train.device) for _ in scales]
    fit_together(models, [train] * len(scales), scales, steps, particles, seeds=[seed] * len(scales))
    return slope(models, test, scales, seed)


def slope(models: Sequence[DeepDensity], test: Tensor, scales: Sequence[float], seed: int = 0) -> float:
    """D plus the slope of the held-out score of test (n, D) against the logarithm of each model's perturbation.

    Noise of size s spreads the mass over s^(D - dimension).
    """
    scores = [float(m.score(test, s, seed=seed).mean()) for m, s in zip(models, scales, strict=True)]
    return test.shape[1] + float(np.polyfit(np.log(scales), scores, 1)[0])


def _neighbours(x: Tensor, k: int) -> np.ndarray:
    points = checked_matrix(x).cpu().numpy()
    if len(points) <= k + 1:
        raise InputError(f"{len(points)} points have no {k} neighbours each")
    distances: np.ndarray = NearestNeighbors(n_neighbors=k + 1).fit(points).kneighbors(points)[0][:, 1:]
    return distances[distances[:, 0] > 0]  # copies of a point tell nothing


def two_nn(x: Tensor) -> float:
    """The maximum-likelihood dimension from the ratio of the two nearest neighbours' distances (Facco et al., 2017)."""
    near = _neighbours(x, 2)
    return float((len(near) - 1) / np.log(near[:, 1] / near[:, 0]).sum())


def levina_bickel(x: Tensor, k: int = 10) -> float:
    """The maximum-likelihood dimension from k neighbours (Levina and Bickel, 2004), inverses averaged over points."""
    if k < 2:
        raise InputError(f"k must be at least 2; got {k}")
    near = _neighbours(x, k)
    return float(1 / np.log(near[:, -1:] / near[:, :-1]).mean())
