"""What the allocations share: giving out exactly a total within bounds, and checks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from llmcompress.errors import InputError
from llmcompress.types import Profile, Site


def spread(shares: Sequence[float], lower: Sequence[float], upper: Sequence[float], total: float) -> list[float]:
    """values_i = clip(t shares_i, lower_i, upper_i) with t such that they sum to `total`.

    What a clamp takes or gives is thereby redistributed over the others in proportion to their shares, which are
    positive. InputError if no t does it: `total` outside [sum lower, sum upper].
    """
    share, low, high = (np.asarray(part, dtype=np.float64) for part in (shares, lower, upper))
    if not low.sum() * (1 - 1e-12) <= total <= high.sum() * (1 + 1e-12):
        raise InputError(f"{total:.0f} values cannot be given out between {low.sum():.0f} and {high.sum():.0f}")
    if not (np.isfinite(share).all() and (share > 0).all()):
        raise InputError("shares of a budget must be positive and finite")
    # The sum grows piecewise linearly in t, with a corner where a value meets its bound.
    corners = np.unique(np.concatenate((low / share, high / share)))
    sums = np.array([np.clip(t * share, low, high).sum() for t in corners])
    t = float(np.interp(total, sums, corners))
    return [float(value) for value in np.clip(t * share, low, high)]


def dense_values(unit: Sequence[Site]) -> int:
    return sum(site.dense_values for site in unit)


def least_values(profile: Profile) -> float:
    """The least that a unit can be given: rank 1, or its dense size where that is less."""
    return min(float(profile.costs[1]), float(profile.dense))


def checked(units: Sequence[Sequence[Site]], profiles: Sequence[Profile] | None, ratio: float) -> Sequence[Profile]:
    """The profiles. InputError if they do not fit the units, are not finite, or leave a unit below rank 1."""
    checked_ratio(ratio)
    if profiles is None or len(profiles) != len(units):
        raise InputError(f"this allocation needs a profile for each of the {len(units)} units")
    for unit, profile in zip(units, profiles, strict=True):
        if not math.isfinite(float(profile.spectrum.sum())):
            raise InputError(f"{unit[0].name}: the spectrum is not finite")
    dense = sum(profile.dense for profile in profiles)
    least = sum(map(least_values, profiles))
    if least > (1 - ratio) * dense:
        raise InputError(
            f"ratio {ratio} leaves less than rank 1 a unit; at most {1 - least / dense:.4f} can be removed"
        )
    return profiles


def checked_ratio(ratio: float) -> None:
    if not 0 < ratio < 1:
        raise InputError(f"ratio must be in (0, 1), the fraction removed; got {ratio}")
