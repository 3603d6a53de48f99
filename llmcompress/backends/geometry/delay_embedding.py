"""Delay embedding of multichannel series: stacking, augmented covariances, Yule-Walker, choice of order and lag.

Sources: arXiv 2302.04508 (the augmented covariance); Nichkawde, 2013 (maximised derivatives on projection, MDOP);
Cao, 1997 (the averaged false neighbours).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from llmcompress.backends.checks import choose
from llmcompress.errors import InputError

Selection = Literal["mdop", "afnn"]
BINS = 16  # of a channel's values, for mutual information
AFNN_MOST = 30  # largest lag and order that the averaged false neighbours look at
GROWTH = 2.0  # of a neighbour's distance, from which it was a false one


@dataclass(frozen=True)
class MDOPResult:
    """delays and their channels, the initial 0 first; fnn: share of false neighbours after each cycle."""

    delays: list[int]
    channels: list[int]
    fnn: list[float]


# --- covariances -----------------------------------------------------------------------------------------------------


def checked_series(X: Tensor, order: int, lag: int) -> Tensor:
    """X (N, d, T) as a float tensor. InputError unless 3-D, finite, without a constant channel, and order and lag
    fit."""
    if X.ndim != 3 or not X.numel():
        raise InputError(f"X must be series (N, d, T), not empty; got shape {tuple(X.shape)}")
    for name, value in (("order", order), ("lag", lag)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1; got {value!r}")
    if not torch.isfinite(X).all():
        raise InputError("X is not finite")
    X = X if X.is_floating_point() else X.double()
    constant = (X.amax(2) == X.amin(2)).nonzero()
    if len(constant):
        raise InputError(f"constant channel {int(constant[0, 1])} in series {int(constant[0, 0])}")
    if order > 1 and X.shape[2] - order * lag < 2:
        raise InputError(f"window too short: T={X.shape[2]}, order*lag={order * lag}")
    return X


def augment(X: Tensor, order: int, lag: int) -> Tensor:
    """X (N, d, T) stacked with copies of itself: (N, order d, T - order lag); block k is x[k lag : k lag + T'].

    Order 1 is X itself. InputError as `checked_series`. Source: arXiv 2302.04508, and its code for T'.
    """
    X = checked_series(X, order, lag)
    if order == 1:
        return X
    length = X.shape[2] - order * lag
    return torch.cat([X[:, :, k * lag : k * lag + length] for k in range(order)], dim=1)


def augmented_covariance(X: Tensor, order: int, lag: int, shrinkage: float = 0.0) -> Tensor:
    """Covariances (N, m, m), m = order d, of the augmented series: block (i, j) estimates E x_{t + (i - j) lag} x_tᵀ.

    (1 - a) C + a tr(C)/m I with a = shrinkage in [0, 1). In the dtype of X. O(N T m²). InputError as `augment`, and if
    there are fewer than m + 1 columns and no shrinkage.
    """
    if not 0 <= shrinkage < 1:
        raise InputError(f"shrinkage must be in [0, 1); got {shrinkage}")
    Y = augment(X, order, lag)
    m, length = Y.shape[1:]
    if m >= length and not shrinkage:
        raise InputError(f"singular augmented covariance: m={m}, T'={length}; shrink it")
    Y = Y - Y.mean(2, keepdim=True)
    C = Y @ Y.mT / (length - 1)
    if not shrinkage:
        return C
    scale = C.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return (1 - shrinkage) * C + shrinkage * scale * torch.eye(m, dtype=C.dtype, device=C.device)


def yule_walker(C: Tensor, d: int) -> tuple[list[Tensor], Tensor]:
    """[A_1, ..., A_p] (d, d) and the noise's covariance (d, d) of x_t = sum A_i x_{t - i lag} + e.

    C ((p + 1) d, (p + 1) d): an augmented covariance of order p + 1, its last block the newest. InputError if its
    size is no multiple of d, or p = 0.
    """
    if C.ndim != 2 or C.shape[0] != C.shape[1] or d < 1 or len(C) % d or len(C) < 2 * d:
        raise InputError(f"C must be square, of two blocks of {d} at least; got {tuple(C.shape)}")
    old, new = C[:-d, :-d], C[-d:, :-d]
    solution = torch.linalg.solve(old, new.T).T  # [A_p, ..., A_1]
    return list(reversed(solution.split(d, dim=1))), C[-d:, -d:] - solution @ new.T


# --- choice of order and lag -----------------------------------------------------------------------------------------


def mutual_information(s: np.ndarray, most: int) -> np.ndarray:
    """Between s_t and s_{t + lag} for lag 0..most, in nats, by histograms: (most + 1,)."""
    edges = np.linspace(s.min(), s.max(), BINS + 1)[1:-1]
    cells = np.digitize(s, edges)
    found = np.empty(most + 1)
    for lag in range(most + 1):
        pairs = cells[: len(s) - lag] * BINS + cells[lag:]
        joint = np.bincount(pairs, minlength=BINS**2).reshape(BINS, BINS) / len(pairs)
        outer = joint.sum(1, keepdims=True) * joint.sum(0)
        seen = joint > 0
        found[lag] = (joint[seen] * np.log(joint[seen] / outer[seen])).sum()
    return found


def first_minimum(values: np.ndarray) -> int:
    """Index of the first value below both neighbours, the least of all where there is none."""
    inner = (values[1:-1] < values[:-2]) & (values[1:-1] <= values[2:])
    return int(inner.argmax()) + 1 if inner.any() else int(values.argmin())


def _neighbours(Y: np.ndarray, last: int, theiler: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each of the first `last` points its nearest more than `theiler` steps away, and the distance."""
    points = Y[:last]
    count = min(2 * theiler + 2, last)
    distances, indices = cKDTree(points).query(points, count)
    far = np.abs(indices - np.arange(last)[:, None]) > theiler
    column = far.argmax(1)
    rows = np.arange(last)
    return indices[rows, column], np.where(far.any(1), distances[rows, column], 0.0)


def mdop(
    x: Tensor | np.ndarray,
    taus: Sequence[int] | None = None,
    theiler: int | None = None,
    fnn_threshold: float = 0.05,
    r: float = GROWTH,
    max_cycles: int = 50,
) -> MDOPResult:
    """Delays by maximised derivatives on projection of one series x (T, d).

    Each cycle adds the delayed channel in which neighbours part fastest: mean over points of log10 of their
    distance in it over that in the embedding so far. It ends when at most `fnn_threshold` of the neighbours part
    by more than r, or more than before, when that cycle is dropped. taus: candidates, 0..50 or a quarter of T.
    theiler: steps within which points are no neighbours; the largest first minimum of the channels' mutual
    information if absent. InputError for series that are not (T, d), finite, without constant channels and longer
    than twice the largest delay.
    """
    series = np.asarray(x, dtype=float)
    if series.ndim != 2 or not np.isfinite(series).all():
        raise InputError(f"x must be a finite series (T, d); got shape {series.shape}")
    delays = np.asarray(taus if taus is not None else range(min(50, len(series) // 4) + 1))
    if len(series) <= 2 * delays.max():
        raise InputError(f"window too short: T={len(series)}, largest delay {delays.max()}")
    if (np.ptp(series, axis=0) == 0).any():
        raise InputError(f"constant channel {int((np.ptp(series, axis=0) == 0).argmax())}")
    series = (series - series.mean(0)) / series.std(0)
    last = len(series) - int(delays.max())
    if theiler is None:
        most = min(50, len(series) // 4)
        theiler = max(first_minimum(mutual_information(channel, most)) for channel in series.T)
    theiler = min(theiler, (last - 2) // 2)
    delayed = np.stack([series[tau : tau + last] for tau in delays])  # (taus, last, d)

    def best(Y: np.ndarray) -> tuple[float, int, int, np.ndarray, np.ndarray]:
        near, distance = _neighbours(Y, last, theiler)
        gaps = np.abs(delayed - delayed[:, near])
        seen = (gaps > 0) & (distance > 0)[None, :, None]
        ratio = np.log10(np.where(seen, gaps, 1.0) / np.where(distance > 0, distance, 1.0)[None, :, None])
        beta = np.where(seen, ratio, 0.0).sum(1) / np.maximum(seen.sum(1), 1)
        tau, channel = np.unravel_index(int(beta.argmax()), beta.shape)
        return float(beta[tau, channel]), int(tau), int(channel), distance, gaps[tau, :, channel]

    starts = [best(series[:last, [channel]]) for channel in range(series.shape[1])]
    start = max(range(len(starts)), key=lambda channel: starts[channel][0])
    found, Y = MDOPResult([0], [start], []), series[:last, [start]]
    step = starts[start]
    for _ in range(max_cycles):
        _, tau, channel, distance, gap = step
        seen = distance > 0
        grown = np.sqrt(distance[seen] ** 2 + gap[seen] ** 2) / distance[seen]
        fnn = float((grown > r).mean()) if seen.any() else 0.0
        if found.fnn and fnn > found.fnn[-1]:
            break
        found.delays.append(int(delays[tau]))
        found.channels.append(channel)
        found.fnn.append(fnn)
        if fnn <= fnn_threshold:
            break
        Y = np.concatenate((Y, delayed[tau][:, [channel]]), axis=1)
        step = best(Y)
    return found


def mdop_order_lag(results: Sequence[MDOPResult], length: int) -> tuple[int, int]:
    """Means over series of the number of delays and of their mean, rounded, at least 1; cut to half of the length."""
    order = round(float(np.mean([len(result.delays) for result in results])))
    lag = round(float(np.mean([round(float(np.mean(result.delays))) for result in results])))
    return _within(order, max(1, lag), length)


def _within(order: int, lag: int, length: int) -> tuple[int, int]:
    return max(1, min(order, length // (2 * lag))), lag


def select_order_lag(X: Tensor, method: Selection, taus: Sequence[int] | None = None) -> tuple[int, int]:
    """Order and lag for series X (N, d, T), training ones alone: by MDOP of each, or by mutual information and
    Cao's E1 averaged over channels and series (first minimum, first maximum). Clipped so that order times lag is
    at most T / 2."""
    choose("method", method, ("mdop", "afnn"))
    series = checked_series(X, 1, 1).detach().cpu().double().numpy()
    if method == "mdop":
        return mdop_order_lag([mdop(one.T, taus) for one in series], series.shape[2])
    most = min(AFNN_MOST, series.shape[2] // 4)
    channels = series.reshape(-1, series.shape[2])
    lag = max(1, first_minimum(np.mean([mutual_information(s, most) for s in channels], axis=0)[1:]) + 1)
    orders = min(AFNN_MOST, series.shape[2] // (2 * lag))
    E1 = np.mean([cao(s, lag, orders) for s in channels], axis=0)
    return _within(first_minimum(-E1) + 1, lag, series.shape[2])


def cao(s: np.ndarray, lag: int, orders: int) -> np.ndarray:
    """E1 (orders - 1,) of one channel: growth of the neighbours' largest distance from order m + 1 over that from
    m."""
    growth = []
    for m in range(1, orders + 1):
        last = len(s) - m * lag
        Y = np.stack([s[k * lag : k * lag + last] for k in range(m + 1)], axis=1)
        distance, index = cKDTree(Y[:, :-1]).query(Y[:, :-1], 2, p=np.inf)
        near, old = index[:, 1], distance[:, 1]
        seen = old > 0
        new = np.abs(Y - Y[near]).max(1)
        growth.append((new[seen] / old[seen]).mean() if seen.any() else 1.0)
    return np.divide(growth[1:], growth[:-1])
