"""Within a role, more parameters for the units that lose more (SVD-LLM V2, arXiv 2503.12340)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, Field

from llmcompress.compressors.allocation.spread import checked, least_values, spread
from llmcompress.types import Budget, Profile, Site


class SVDLLMV2Options(BaseModel, extra="forbid"):
    floor: float = Field(default=0.5, ge=0, le=1, description="least share of its uniform budget that a unit keeps")


def allocate_ratios(losses: Sequence[float], ratio: float, highest: Sequence[float] | None = None) -> list[float]:
    """Fraction removed from each matrix of one role, in proportion to 1 / log(loss); its mean is `ratio`.

    losses: truncation losses at the uniform ratio, at least 0. The logarithm needs losses above 1: a group whose least
    loss is below e is scaled so that this is e. highest: what may be removed at most, 1 if absent; what that clamps is
    redistributed. InputError if `ratio` is more than the mean of `highest`. Source: arXiv 2503.12340.
    """
    largest = max(losses)
    if largest <= 0:
        return [ratio] * len(losses)
    floored = [max(loss, 1e-12 * largest) for loss in losses]
    scale = max(1.0, math.e / min(floored))
    shares = [1 / math.log(loss * scale) for loss in floored]
    bounds = [1.0] * len(losses) if highest is None else highest
    return spread(shares, [0.0] * len(losses), bounds, ratio * len(losses))


def truncation_loss(profile: Profile, ratio: float) -> float:
    """Root of the dropped squared singular values at the rank that the uniform ratio affords."""
    rank = int((profile.costs <= (1 - ratio) * profile.dense).sum()) - 1
    return math.sqrt(float(profile.spectrum[rank:].square().sum()))


class SVDLLMV2:
    """Units of one role and size are a group, whose budget is that of the uniform ratio.

    The floor keeps the logarithm from emptying units whose loss is small; a half is Swift-SVD*'s (arXiv 2604.01609).
    """

    Options = SVDLLMV2Options
    needs_profiles = True
    spectra = "own"

    def __init__(self, options: SVDLLMV2Options | None = None) -> None:
        self.options = options or SVDLLMV2Options()

    def allocate(
        self, units: Sequence[Sequence[Site]], profiles: Sequence[Profile] | None, ratio: float
    ) -> list[Budget]:
        """InputError for a bad ratio, missing profiles, or a ratio that leaves a unit below rank 1."""
        found = checked(units, profiles, ratio)
        groups: dict[tuple[object, ...], list[int]] = {}
        for index, unit in enumerate(units):
            key = (tuple(sorted(site.role for site in unit)), found[index].dense)
            groups.setdefault(key, []).append(index)
        values = [0.0] * len(units)
        for members in groups.values():
            losses = [truncation_loss(found[i], ratio) for i in members]
            floor = self.options.floor * (1 - ratio)
            highest = [1 - max(floor, least_values(found[i]) / found[i].dense) for i in members]
            for i, removed in zip(members, allocate_ratios(losses, ratio, highest), strict=True):
                values[i] = (1 - removed) * found[i].dense
        return [Budget(value) for value in values]
