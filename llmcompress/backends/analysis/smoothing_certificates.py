"""Certified l2 radii from the class probabilities of smoothed classifiers, and the bounds that sampling gives.

Randomised smoothing: Cohen et al., arXiv 1902.02918. Dual smoothing, of two halves of the input: arXiv 2404.09586; the
radius here is the exact distance to the first perturbation that two linear halves can be flipped by, and negative
quantiles are subtracted. Root sums of squares of two radii, or clipped ones, claim more than holds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta, norm

from llmcompress.backends.checks import choose
from llmcompress.errors import InputError

Array = NDArray[np.float64]


def check_sigma(name: str, sigma: float) -> float:
    if not (np.isfinite(sigma) and sigma > 0):
        raise InputError(f"{name} must be positive; got {sigma}")
    return float(sigma)


def check_sigmas(sigma_l: float, sigma_r: float | None) -> tuple[float, float]:
    """Those of both halves; the right one's is the left one's if absent."""
    return check_sigma("sigma_l", sigma_l), check_sigma("sigma_r", sigma_l if sigma_r is None else sigma_r)


def check_alpha(alpha: float) -> float:
    if not 0 < alpha < 1:
        raise InputError(f"alpha, the chance of a wrong certificate, must be in (0, 1); got {alpha}")
    return alpha


def clopper_pearson(k: ArrayLike, n: ArrayLike, alpha: float, side: str = "lower") -> Array:
    """The exact one-sided bound on a probability of which n draws held k, wrong with chance alpha; elementwise.

    `side`: lower or upper. InputError unless 0 <= k <= n, n >= 1, alpha in (0, 1).
    """
    choose("side", side, ("lower", "upper"))
    check_alpha(alpha)
    k, n = np.asarray(k, dtype=np.float64), np.asarray(n, dtype=np.float64)
    if not (np.all(n >= 1) and np.all((k >= 0) & (k <= n))):
        raise InputError("k must be between 0 and n, n at least 1")
    with np.errstate(invalid="ignore"):
        if side == "lower":
            return np.where(k == 0, 0.0, beta.ppf(alpha, k, n - k + 1))
        return np.where(k == n, 1.0, beta.ppf(1 - alpha, k + 1, n - k))


def _probabilities(name: str, p: ArrayLike, one: bool = False) -> Array:
    p = np.asarray(p, dtype=np.float64)
    if not (np.all(p >= 0) and np.all(p <= 1 if one else p < 1)):
        raise InputError(f"{name} must be in [0, 1{']' if one else ')'}; got {p}")
    return p


def smoothed_radius(p: ArrayLike, sigma: float) -> Array:
    """sigma ppf(p) where p > 1/2, else 0: the radius of plain randomised smoothing. InputError unless 0 <= p < 1."""
    return np.maximum(check_sigma("sigma", sigma) * norm.ppf(_probabilities("p", p)), 0.0)


def dual_radius(p_l: ArrayLike, p_r: ArrayLike, sigma_l: float, sigma_r: float | None = None) -> Array:
    """sigma_l sigma_r / sqrt(sigma_l² + sigma_r²) (ppf(p_l) + ppf(p_r)), or 0 where that is negative; elementwise.

    p_l, p_r: lower bounds on the class's probability in both halves. sigma_r: sigma_l if absent. A perturbation that
    moves the halves by s and t leaves cdf(a_l - s / sigma_l) + cdf(a_r - t / sigma_r), above 1 exactly while the
    arguments sum to more than 0. Holds for two parts only. InputError unless 0 <= p < 1 and the sigmas are positive.
    """
    sigma_l, sigma_r = check_sigmas(sigma_l, sigma_r)
    quantiles = norm.ppf(_probabilities("p_l", p_l)) + norm.ppf(_probabilities("p_r", p_r))
    return np.maximum(sigma_l * sigma_r / np.hypot(sigma_l, sigma_r) * quantiles, 0.0)


def radius_cap(n: int, alpha: float, sigma: float, dual: bool = True) -> float:
    """The largest radius that n draws (a half) can certify, where all of them agree."""
    if n < 1:
        raise InputError(f"n must be at least 1; got {n}")
    if not dual:
        return float(smoothed_radius(check_alpha(alpha) ** (1 / n), sigma))
    p = (check_alpha(alpha) / 2) ** (1 / n)
    return float(dual_radius(p, p, sigma))


def dual_radius_multiclass(
    p_l: float,
    p_r: float,
    q_l: ArrayLike,
    q_r: ArrayLike,
    sigma_l: float,
    sigma_r: float | None = None,
    n_angle: int = 721,
) -> float:
    """The radius against every other class by its own bounds: never below `dual_radius`, up to the angles' spacing.

    p_l, p_r: lower bounds of the class's probability in both halves; q_l, q_r (K - 1,): upper bounds of the others'.
    The margin of a class is found by bisection along `n_angle` directions of (s, t); between two of them the set of
    safe perturbations holds the boxes that both span, so that the result is a bound and no interpolation.
    Cost O(K n_angle). InputError unless p in [0, 1), q in [0, 1], shapes alike, n_angle >= 3.
    """
    sigma_l, sigma_r = check_sigmas(sigma_l, sigma_r)
    lower = [float(_probabilities(name, p)) for name, p in (("p_l", p_l), ("p_r", p_r))]
    upper = [np.atleast_1d(_probabilities(name, q, one=True)) for name, q in (("q_l", q_l), ("q_r", q_r))]
    if upper[0].ndim != 1 or upper[0].shape != upper[1].shape or not len(upper[0]) or n_angle < 3:
        raise InputError("q_l and q_r must be vectors of one length, at least 1, and n_angle at least 3")
    least = 1e-300  # its quantile is finite
    a_l, a_r = (norm.ppf(max(p, least)) for p in lower)
    b_l, b_r = (norm.ppf(np.clip(np.minimum(q, 1 - p), least, None)) for q, p in zip(upper, lower, strict=True))
    angles = np.linspace(0, np.pi / 2, n_angle)
    cosine, sine = np.cos(angles) / sigma_l, np.sin(angles) / sigma_r

    def safe(r: Array) -> NDArray[np.bool_]:
        """r (K - 1, n_angle): whether the class still leads there."""
        s, t = r * cosine, r * sine
        own = norm.cdf(a_l - s) + norm.cdf(a_r - t)
        return np.asarray(own > norm.cdf(b_l[:, None] + s) + norm.cdf(b_r[:, None] + t))

    low = np.zeros((len(b_l), n_angle))
    if not safe(low).all():
        return 0.0
    high = np.full_like(low, 80 * max(sigma_l, sigma_r))  # quantiles of doubles lie within 38 of 0
    for _ in range(60):
        middle = (low + high) / 2
        inside = safe(middle)
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    sines, cosines = np.sin(angles), np.cos(angles)
    from_left = low[:, :-1] * sines[:-1] / sines[1:]
    from_right = low[:, 1:] * cosines[1:] / cosines[:-1]
    return float(np.maximum(from_left, from_right).min())
