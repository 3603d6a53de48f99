"""Ranks by effective rank over cost, and some of the queries' and keys' ranks for the values (D-Rank, 2025)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from llmcompress.compressors.allocation.spread import checked, least_values, spread
from llmcompress.types import Budget, Profile, Site


class DRankOptions(BaseModel, extra="forbid"):
    beta: float = Field(
        default=0.3, ge=0, lt=1, description="share of the queries' and keys' parameters moved to the values"
    )


def effective_rank(spectrum: Tensor) -> float:
    """exp of the entropy of sigma / sum sigma: between 1 and the number of singular values; 1 for a zero matrix."""
    total = spectrum.sum()
    if total <= 0:
        return 1.0
    share = spectrum.double() / total
    return math.exp(float(torch.special.entr(share).sum()))


def allocate_values(
    effective_ranks: Sequence[float],
    rank_costs: Sequence[float],
    lower: Sequence[float],
    upper: Sequence[float],
    total: float,
) -> list[float]:
    """Values for each group, summing to `total`: rank k_g in proportion to sqrt(erank_g / cost_g), each costing cost_g.

    This minimises sum erank_g / k_g within the budget. Clamped to [lower, upper], the difference redistributed.
    InputError if the bounds do not allow the total. Source: D-Rank, the Lagrangian allocation.
    """
    shares = [math.sqrt(erank * cost) for erank, cost in zip(effective_ranks, rank_costs, strict=True)]
    return spread(shares, lower, upper, total)


def move_to_values(
    q: float, k: float, v: float, beta: float, room: float, floors: tuple[float, float]
) -> tuple[float, float, float]:
    """Parameters of one block's q, k, v after a share beta of q's and k's went to v, at most `room`; the sum is kept.

    Neither q nor k falls below its floor.
    """
    from_q, from_k = min(beta * q, q - floors[0]), min(beta * k, k - floors[1])
    moved = from_q + from_k
    if moved <= 0:
        return q, k, v
    scale = min(1.0, room / moved)
    return q - scale * from_q, k - scale * from_k, v + scale * moved


class DRank:
    Options = DRankOptions
    needs_profiles = True
    spectra = "own"

    def __init__(self, options: DRankOptions | None = None) -> None:
        self.options = options or DRankOptions()

    def allocate(
        self, units: Sequence[Sequence[Site]], profiles: Sequence[Profile] | None, ratio: float
    ) -> list[Budget]:
        """InputError for a bad ratio, missing profiles, or a ratio that leaves a unit below rank 1."""
        found = checked(units, profiles, ratio)
        dense = [float(profile.dense) for profile in found]
        lower = [least_values(profile) for profile in found]
        values = allocate_values(
            [effective_rank(profile.spectrum) for profile in found],
            [float(unit[0].d_in + sum(site.d_out for site in unit)) for unit in units],
            lower,
            dense,
            (1 - ratio) * sum(dense),
        )
        for q, k, v in _attention_triples(units):
            room = dense[v] - values[v]
            moved = move_to_values(values[q], values[k], values[v], self.options.beta, room, (lower[q], lower[k]))
            values[q], values[k], values[v] = moved
        return [Budget(value) for value in np.minimum(values, dense).tolist()]


def _attention_triples(units: Sequence[Sequence[Site]]) -> list[tuple[int, int, int]]:
    """Indices of the units that hold the q, the k and the v of the same blocks, where those are units of their own."""
    by_blocks: dict[tuple[int, ...], dict[str, int]] = {}
    for index, unit in enumerate(units):
        roles = {site.role for site in unit}
        if len(roles) == 1 and roles <= {"q", "k", "v"}:
            by_blocks.setdefault(tuple(site.block for site in unit), {})[roles.pop()] = index
    return [(found["q"], found["k"], found["v"]) for found in by_blocks.values() if len(found) == 3]
