"""Networks on symmetric positive definite matrices: Bures-Wasserstein batch normalisation and its usual neighbours.

Source: arXiv 2504.00660 (the normalisation); Huang and Van Gool, 2017 (BiMap, ReEig, LogEig).
"""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from llmcompress.backends.geometry.spd import (
    FROM_IDENTITY,
    LYAPUNOV,
    checked_spd,
    fixed_point,
    pair,
    spd_log,
    spd_power,
    spectral,
    sym_exp,
)
from llmcompress.errors import InputError

log = logging.getLogger("llmcompress")


class GBWBatchNorm(nn.Module):
    """SPD matrices (N, n, n) normalised to the mean `bias` and the dispersion `scale` under the (M, theta) geometry.

    M and the bias are exponentials of symmetric parameters, both I at the start. While training, the batch's own mean
    (`mean_iters` fixed-point steps) and variance are used, without gradients, and enter the running ones with weight
    `momentum`. Computes in float64, returns the input's dtype. `folded` counts matrices whose scaled tangent vector
    leaves the domain of the exponential: their output is not where it should be, and the first time is warned of.
    O(N n³) a batch.
    """

    running_mean: Tensor
    running_var: Tensor
    folded: Tensor

    def __init__(
        self,
        n: int,
        theta: float = 1.0,
        learn_metric: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        mean_iters: int = 1,
    ) -> None:
        """InputError for theta = 0, n < 1 or mean_iters < 1."""
        super().__init__()
        if theta == 0 or n < 1 or mean_iters < 1:
            raise InputError(f"theta must not be 0, n and mean_iters at least 1; got {theta}, {n}, {mean_iters}")
        self.theta, self.momentum, self.eps, self.mean_iters = theta, momentum, eps, mean_iters
        eye = torch.eye(n, dtype=torch.float64)
        self.log_metric = nn.Parameter(torch.zeros_like(eye), requires_grad=learn_metric)
        self.log_bias = nn.Parameter(torch.zeros_like(eye))
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.register_buffer("running_mean", eye)
        self.register_buffer("running_var", torch.ones((), dtype=torch.float64))
        self.register_buffer("folded", torch.zeros((), dtype=torch.int64), persistent=False)

    @property
    def metric(self) -> Tensor:
        """M (n, n)."""
        return sym_exp(_symmetric(self.log_metric))

    @property
    def bias(self) -> Tensor:
        """B (n, n), the mean of the output."""
        return sym_exp(_symmetric(self.log_bias))

    def forward(self, X: Tensor) -> Tensor:
        if X.ndim != 3 or not len(X):
            raise InputError(f"X must be a batch of matrices (N, n, n), N at least 1; got shape {tuple(X.shape)}")
        if self.training and len(X) == 1:
            raise InputError("X: one matrix has no variance; a training batch needs two")
        half = _symmetric(self.log_metric) / 2
        inverse_root, root = sym_exp(-half), sym_exp(half)
        pushed = inverse_root @ spd_power(checked_spd(X, "X"), self.theta) @ inverse_root
        bias = inverse_root @ sym_exp(self.theta * _symmetric(self.log_bias)) @ inverse_root
        mean, var = self._statistics(pushed.detach()) if self.training else (self.running_mean, self.running_var)
        V = self.scale / (var + self.eps).sqrt() * _log_at_identity(mean, pushed)
        V = pair(bias, V, FROM_IDENTITY)
        L = pair(bias, V, LYAPUNOV)
        self._count_folded(L.detach())
        normalised = root @ (bias + V + L @ bias @ L) @ root
        return spd_power(normalised, 1 / self.theta).to(X.dtype)

    @torch.no_grad()
    def _statistics(self, pushed: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (pushed) and variance of the batch, which move the running ones."""
        weights = torch.full((len(pushed),), 1 / len(pushed)).to(pushed)
        mean, _ = fixed_point(pushed, weights, self.mean_iters, 1e-15)
        tangent = _log_at_identity(mean, pushed)
        # transport to I is an isometry, and the squared norm there is tr V² / 4
        var = tangent.square().sum((1, 2)).mean() / 4 / self.theta**2
        root, inverse = spd_power(self.running_mean, 0.5), spd_power(self.running_mean, -0.5)
        mixed = root @ spd_power(root @ mean @ root, 0.5) @ inverse
        t = self.momentum
        moved = (1 - t) ** 2 * self.running_mean + t**2 * mean + t * (1 - t) * (mixed + mixed.mT)
        self.running_mean.copy_(_symmetric(moved))
        self.running_var.mul_(1 - t).add_(t * var)
        return mean, var

    @torch.no_grad()
    def _count_folded(self, L: Tensor) -> None:
        folded = int((torch.linalg.eigvalsh(L)[:, 0] <= -1).sum())
        if folded and not self.folded:
            log.warning("batch normalisation folded %d of %d matrices: lower scale or eps larger", folded, len(L))
        self.folded += folded


def _symmetric(A: Tensor) -> Tensor:
    return (A + A.mT) / 2


def _log_at_identity(G: Tensor, X: Tensor) -> Tensor:
    """Log_G of X (N, n, n), transported from G (n, n) to I."""
    values, vectors = torch.linalg.eigh(G)
    root = (vectors * values.sqrt()) @ vectors.mT
    inverse = (vectors / values.sqrt()) @ vectors.mT
    mixed = root @ spd_power(root @ X @ root, 0.5) @ inverse
    V = mixed + mixed.mT - 2 * G
    scale = (2 / (values[:, None] + values)).sqrt()
    return vectors @ (scale * (vectors.mT @ V @ vectors)) @ vectors.mT


class BiMap(nn.Module):
    """Wᵀ X W with orthonormal columns W (n_in, n_out), n_out <= n_in: (N, n_in, n_in) -> (N, n_out, n_out)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        if not 1 <= n_out <= n_in:
            raise InputError(f"n_out must be between 1 and n_in = {n_in}; got {n_out}")
        self.map = orthogonal(nn.Linear(n_in, n_out, bias=False, dtype=torch.float64))

    def forward(self, X: Tensor) -> Tensor:
        W = cast(Tensor, self.map.weight)
        return (W @ X.double() @ W.mT).to(X.dtype)


class ReEig(nn.Module):
    """Eigenvalues raised to at least `floor`."""

    def __init__(self, floor: float = 1e-5) -> None:
        super().__init__()
        self.floor = floor

    def forward(self, X: Tensor) -> Tensor:
        found = spectral(X.double(), lambda x: x.clamp_min(self.floor), lambda x: (x > self.floor).to(x))
        return found.to(X.dtype)


class LogEig(nn.Module):
    """The symmetric logarithm, flattened to its upper triangle with off-diagonal entries times √2: (N, n (n + 1) /
    2)."""

    def forward(self, X: Tensor) -> Tensor:
        n = X.shape[-1]
        i, j = torch.triu_indices(n, n, device=X.device)
        scale = torch.where(i == j, 1.0, 2**0.5).to(X)
        return spd_log(X.double())[..., i, j].to(X.dtype) * scale
