"""Filling in uniform series of which some entries are seen, by Gaussian processes with spectral kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.backends.analysis.spectral_kernels import MIXTURES, cholesky, initial_params, spectral_kernel
from llmcompress.errors import InputError

LR = 5e-2
LARGEST_LOG_PRECISION = 12.0
JITTER = 1e-8


@dataclass(frozen=True)
class SeriesFit:
    """mean (b, n): of every entry given the seen ones; params: log_w, log_a, mu (b, Q) and log_tau (b,), of the kernel
    of the standardised series on [0, 1), so that mu counts cycles a window."""

    mean: Tensor
    params: dict[str, Tensor]


def fit_series(
    values: Tensor,
    mask: Tensor,
    kind: str = "stm",
    n_components: int = 24,
    max_frequency: float | None = None,
    steps: int = 150,
    starts: Sequence[float] = (0.0, 2.0, 4.0),
) -> SeriesFit:
    """Maximises the marginal likelihood of the entries values[:, mask], all series and starts at once.

    values (b, n) or (n,), mask (n,) bool; entries outside it are not read. Each series has a kernel and noise of its
    own; of the starts (log a), the one of the highest likelihood is kept. max_frequency: half the mean rate of the seen
    entries if absent. Cost O(steps b starts m³) for m seen entries. InputError for values that are not finite,
    fewer than 4 seen entries, an unknown kind.
    """
    rows = torch.atleast_2d(torch.as_tensor(values)).detach().double()
    if rows.ndim != 2 or mask.shape != rows.shape[1:] or mask.dtype != torch.bool:
        raise InputError(f"values must be (b, n) and the mask (n,) bool; got {tuple(rows.shape)}, {tuple(mask.shape)}")
    if int(mask.sum()) < 4 or not starts:
        raise InputError(f"needs at least 4 seen entries and a start; got {int(mask.sum())}, {len(starts)}")
    seen = rows[:, mask]
    if not torch.isfinite(seen).all():
        raise InputError("the seen values are not finite")
    mean, deviation = seen.mean(1, keepdim=True), seen.std(1, keepdim=True).clamp_min(1e-12)
    x = torch.arange(rows.shape[1], dtype=torch.float64, device=rows.device) / rows.shape[1]
    top = max_frequency or int(mask.sum()) / 2
    made = [initial_params(kind, n_components, top, start) for start in starts]
    count, s = len(rows), len(starts)
    params = {
        name: torch.stack([m[name] for m in made]).repeat_interleave(count, 0).to(rows.device) for name in made[0]
    }
    params["log_tau"] = torch.full((s * count,), math.log(100.0), dtype=torch.float64, device=rows.device)
    targets = ((seen - mean) / deviation).repeat(s, 1)
    index = torch.arange(len(x), device=rows.device)
    lag = (index[mask][:, None] - index[mask]).abs()
    trained = [p.requires_grad_() for name, p in params.items() if name != "mu" or kind in MIXTURES]
    optimizer = torch.optim.Adam(trained, lr=LR)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            _negative_log_likelihood(x, lag, targets, params, kind)[0].sum().backward()
        optimizer.step()
        with torch.no_grad():
            params["log_tau"].clamp_(max=LARGEST_LOG_PRECISION)
    with torch.no_grad():
        loss, weights = _negative_log_likelihood(x, lag, targets, params, kind)
        best = loss.view(s, count).argmin(0) * count + torch.arange(count, device=rows.device)
        params = {name: p.detach()[best] for name, p in params.items()}
        cross = _kernel(x, params, kind)[:, (index[:, None] - index[mask]).abs()]
        predicted = (cross @ weights[best][..., None])[..., 0]
    return SeriesFit(mean + deviation * predicted, params)


def _kernel(x: Tensor, params: dict[str, Tensor], kind: str) -> Tensor:
    """At every distance that a uniform series has, (b, n)."""
    return spectral_kernel(x, params, kind, 0)[0]


def _negative_log_likelihood(
    x: Tensor, lag: Tensor, targets: Tensor, params: dict[str, Tensor], kind: str
) -> tuple[Tensor, Tensor]:
    """Of each series, (b,), and the weights of its entries in the posterior mean, (b, m)."""
    matrix = _kernel(x, params, kind)[:, lag]
    identity = torch.eye(len(lag), dtype=matrix.dtype, device=matrix.device)
    lower = cholesky(matrix + (-params["log_tau"]).exp()[:, None, None] * identity, JITTER)
    weights = torch.cholesky_solve(targets[..., None], lower)[..., 0]
    log_det = 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return 0.5 * ((targets * weights).sum(1) + log_det + len(lag) * math.log(2 * math.pi)), weights
