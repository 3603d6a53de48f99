"""Stationary kernels on one axis by their spectrum, with their derivatives, as Toeplitz matrices of a uniform grid.

Spectral mixtures: of Student-t components (StM, 5 degrees of freedom) and of Gaussian ones (GM), arXiv 2311.04465,
section 3; Matern-5/2 and the squared exponential (SE) are one component at frequency 0.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.backends.checks import choose
from llmcompress.errors import InputError, RunError

log = logging.getLogger("llmcompress")

MIXTURES = ("stm", "gm")  # the kinds with frequencies
KINDS = (*MIXTURES, "matern", "se")
JITTER_RETRIES = 3

Params = Mapping[str, Tensor]


def initial_params(kind: str, components: int, max_frequency: float, log_a: float = 0.0) -> dict[str, Tensor]:
    """log_w = -log Q, log_a and mu, evenly from 0 to max_frequency, each (Q,) float64; Q = 1 at 0 for one component.

    Weights are optimised by their logarithm without a penalty: Jeffreys' prior, which empties what is not needed.
    """
    choose("kind", kind, KINDS)
    if components < 1 or not max_frequency > 0:
        raise InputError(f"needs a component at least and a positive frequency; got {components}, {max_frequency}")
    q = components if kind in MIXTURES else 1
    mu = torch.linspace(0, max_frequency, q, dtype=torch.float64) if q > 1 else torch.zeros(1, dtype=torch.float64)
    full = torch.full((q,), 1.0, dtype=torch.float64)
    return {"log_w": -math.log(q) * full, "log_a": log_a * full, "mu": mu}


def spectral_kernel(tau: Tensor, params: Params, kind: str, order: int = 2) -> tuple[Tensor, ...]:
    """k, k' and k'' (as many as `order` + 1) of signed distances tau (...,): sum_q w_q kappa_q(tau) cos(2 pi mu_q tau).

    params: log_w, log_a, mu, each (..., Q) with as many leading dimensions as tau, or none. kappa: (1 + s + s²/3) e⁻ˢ,
    s = sqrt5 a |tau|, the transform of a Student-t of 5 degrees of freedom; for gm and se exp(-a tau²). matern and se
    have no frequencies. Units: mu in cycles a unit of tau. InputError for an unknown kind.
    """
    choose("kind", kind, KINDS)
    r = tau[..., None]
    weight, a = (params[name].exp()[..., None, :] for name in ("log_w", "log_a"))
    omega = 2 * math.pi * params["mu"][..., None, :] if kind in MIXTURES else torch.zeros_like(a)
    if kind in ("stm", "matern"):
        b = math.sqrt(5) * a
        s = b * r.abs()
        decay = torch.exp(-s)
        kappa = ((1 + s + s.square() / 3) * decay, -(b.square() / 3) * r * (1 + s) * decay,
                 -(b.square() / 3) * (1 + s - s.square()) * decay)  # fmt: skip
    else:
        value = torch.exp(-a * r.square())
        kappa = (value, -2 * a * r * value, (4 * a.square() * r.square() - 2 * a) * value)
    cosine, sine = torch.cos(omega * r), torch.sin(omega * r)
    found = [
        kappa[0] * cosine,
        kappa[1] * cosine - omega * kappa[0] * sine,
        kappa[2] * cosine - 2 * omega * kappa[1] * sine - omega.square() * kappa[0] * cosine,
    ]
    return tuple((weight * part).sum(-1) for part in found[: order + 1])


@dataclass(frozen=True)
class AxisKernel:
    """Of one uniform axis of n points: K + jitter I = L Lᵀ, first and second derivative matrices, all (n, n)."""

    lower: Tensor
    first: Tensor
    second: Tensor

    @property
    def log_det(self) -> Tensor:
        return 2 * self.lower.diagonal().log().sum()


def axis_kernel(axis: Tensor, params: Params, kind: str, jitter: float) -> AxisKernel:
    """From one column each: K and K'' are symmetric, K' is odd. RunError if K is not positive definite."""
    n = len(axis)
    index = torch.arange(n, device=axis.device)
    lag = index[:, None] - index
    value, first, second = spectral_kernel(axis - axis[0], params, kind)
    distance = lag.abs()
    return AxisKernel(cholesky(value[distance], jitter), lag.sign() * first[distance], second[distance])


def cholesky(matrix: Tensor, jitter: float) -> Tensor:
    """The lower factor of matrix + jitter I (..., n, n); ten times the jitter after a failure, three times, logged."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for attempt in range(JITTER_RETRIES + 1):
        lower, failed = torch.linalg.cholesky_ex(matrix + jitter * identity)
        if not failed.any():
            if attempt:
                log.warning("the kernel matrix needed a jitter of %.0e to be positive definite", jitter)
            return lower
        jitter *= 10
    raise RunError(f"the kernel matrix is not positive definite with a jitter of {jitter / 10:.0e}")
