"""One budget for all units, spent where the summed error falls most: ranks by a Lagrange multiplier over error curves.

The relaxation is Everett's (Operations Research 11, 1963); choosing one rank a unit under a shared budget is the
multiple-choice knapsack problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import Tensor

from llmcompress.compressors.allocation.curves import truncation_losses
from llmcompress.compressors.allocation.spread import checked
from llmcompress.errors import InputError
from llmcompress.types import Budget, Profile, Site

STEPS = 60  # of the bisection over 200 octaves: to the last digit of a double
FREE = 1e-6  # a step that costs no more than this many values
SEARCH = 20_000  # partial choices at which the exact search gives up

Array = NDArray[np.float64]
Choice = NDArray[np.int64]


class LossAwareOptions(BaseModel, extra="forbid"):
    pass


def allocate(curves: Mapping[str, Tensor], costs: Mapping[str, Tensor], budget: float) -> dict[str, int]:
    """The rank of every unit, at least 1, that minimises the summed error with summed costs within the budget.

    curves[unit] (p + 1,): error at rank 0..p; costs[unit] (p + 1,): what that rank stores. Neither has to be convex.
    Each unit takes the rank of least error + multiplier · cost over its whole table, the multiplier is bisected, and
    what remains of the budget goes to the best steps that still fit. The result is optimal where the search among the
    ranks that the multiplier's bound leaves open is small, as it is for a few units; otherwise it misses the optimum by
    less than one unit's step between corners of its convex hull.
    InputError for malformed tables, and if rank 1 everywhere exceeds the budget.
    """
    tables = _Tables.build(curves, costs)
    least = float(tables.cost[:, 1].sum())
    if not least <= budget:
        raise InputError(f"the budget of {budget:.1f} values is below rank 1 a unit, which stores {least:.1f}")
    choice, multiplier = _bisect(tables, budget)
    choice = _fill(tables, choice, budget)
    choice = _search(tables, choice, multiplier, budget)
    return dict(zip(curves, choice.tolist(), strict=True))


@dataclass(frozen=True)
class _Tables:
    """error and cost (units, ranks). What cannot be chosen, rank 0 and ranks that a unit lacks, has infinite error."""

    error: Array
    cost: Array

    @classmethod
    def build(cls, curves: Mapping[str, Tensor], costs: Mapping[str, Tensor]) -> _Tables:
        if not curves or curves.keys() != costs.keys():
            raise InputError("as many cost tables as error curves are needed, of the same units, at least one")
        error = np.full((len(curves), max(curve.numel() for curve in curves.values())), np.inf)
        cost = np.zeros_like(error)
        for row, (name, curve) in enumerate(curves.items()):
            own = costs[name]
            if curve.ndim != 1 or curve.shape != own.shape or len(curve) < 2:
                raise InputError(
                    f"{name}: needs an error and a cost a rank; got {tuple(curve.shape)}, {tuple(own.shape)}"
                )
            if not (torch.isfinite(curve).all() and torch.isfinite(own).all() and (curve >= 0).all()):
                raise InputError(f"{name}: errors and costs must be finite, errors not negative")
            if (own.diff() < 0).any():
                raise InputError(f"{name}: costs must not fall with the rank")
            error[row, 1 : len(curve)] = curve[1:].double().cpu().numpy()
            cost[row, : len(curve)] = own.double().cpu().numpy()
        return cls(error, cost)

    def at(self, choice: Choice) -> tuple[Array, Array]:
        rows = np.arange(len(choice))
        return self.error[rows, choice], self.cost[rows, choice]


def _relaxed(tables: _Tables, multiplier: float) -> Choice:
    return (tables.error + multiplier * tables.cost).argmin(1)


def _bisect(tables: _Tables, budget: float) -> tuple[Choice, float]:
    """The choice of the least multiplier that keeps the budget, and that multiplier."""
    free = _relaxed(tables, 0.0)
    if tables.at(free)[1].sum() <= budget:
        return free, 0.0
    high = 1.0
    while tables.at(best := _relaxed(tables, high))[1].sum() > budget:
        high *= 2.0**20
    low = high * 2.0**-200
    for _ in range(STEPS):
        middle = float(np.sqrt(low) * np.sqrt(high))
        choice = _relaxed(tables, middle)
        if tables.at(choice)[1].sum() <= budget:
            high, best = middle, choice
        else:
            low = middle
    return best, high


def _fill(tables: _Tables, start: Choice, budget: float) -> Choice:
    """Spends what is left: again and again the step of one unit that saves most error a value and fits."""
    choice = start.copy()
    errors, costs = tables.at(choice)
    left = budget - costs.sum()
    gains = np.empty(len(choice))
    steps = np.empty(len(choice), dtype=np.int64)
    stale: Sequence[int] | Choice = range(len(choice))
    while True:
        for row in stale:
            steps[row], gains[row] = _best_step(tables, row, errors[row], costs[row], left)
        row = int(gains.argmax())
        if gains[row] <= 0:
            return choice
        choice[row] = steps[row]
        left -= tables.cost[row, steps[row]] - costs[row]
        errors[row], costs[row] = tables.error[row, steps[row]], tables.cost[row, steps[row]]
        targets = tables.cost[np.arange(len(choice)), steps]
        stale = np.flatnonzero((gains > 0) & ((targets - costs > left) | (np.arange(len(choice)) == row)))


def _best_step(tables: _Tables, row: int, error: float, cost: float, left: float) -> tuple[int, float]:
    """The rank of one unit with the most error saved a value among those within reach, and that rate (0: none)."""
    saved = error - tables.error[row]
    spent = tables.cost[row] - cost
    usable = (saved > 0) & (spent <= left)
    if not usable.any():
        return 0, 0.0
    rates = np.where(usable, saved / np.maximum(spent, FREE), 0)
    best = int(rates.argmax())
    return best, float(rates[best])


def _search(tables: _Tables, incumbent: Choice, multiplier: float, budget: float) -> Choice:
    """The optimum, if it takes no more than SEARCH partial choices at a time; otherwise the incumbent.

    A choice that beats the incumbent has a summed excess, error + multiplier · cost above each unit's least, below the
    gap between the incumbent and the relaxation's bound. Units are joined one by one; of partial choices, those within
    the gap and on the front of (cost, error) are kept.
    """
    weighed = tables.error + multiplier * tables.cost
    least = weighed.min(1)
    excess = weighed - least[:, None]
    found = float(tables.at(incumbent)[0].sum())
    gap = (found - least.sum() + multiplier * budget) * (1 + 1e-9)
    cheapest_rest = np.append(np.cumsum(tables.cost[::-1, 1])[::-1], 0.0)
    cost, error, slack = np.zeros(1), np.zeros(1), np.zeros(1)
    trail: list[tuple[Choice, Choice]] = []
    for row in range(len(incumbent)):
        options = np.flatnonzero(excess[row] <= gap)
        if len(options) * len(cost) > SEARCH:
            return incumbent
        parents, picks = (part.ravel() for part in np.meshgrid(np.arange(len(cost)), options, indexing="ij"))
        cost, error = cost[parents] + tables.cost[row, picks], error[parents] + tables.error[row, picks]
        slack = slack[parents] + excess[row, picks]
        kept = np.flatnonzero((slack <= gap) & (cost + cheapest_rest[row + 1] <= budget))
        kept = kept[np.lexsort((error[kept], cost[kept]))]
        front = np.append(np.inf, np.minimum.accumulate(error[kept])[:-1]) if len(kept) else np.empty(0)
        kept = kept[error[kept] < front]
        cost, error, slack = cost[kept], error[kept], slack[kept]
        trail.append((parents[kept], picks[kept]))
    if not len(error) or error.min() >= found:
        return incumbent
    at = int(error.argmin())
    chosen = np.empty_like(incumbent)
    for row, (parents, picks) in reversed(list(enumerate(trail))):
        chosen[row], at = picks[at], parents[at]
    return chosen


class LossAware:
    """For any method: output errors of different units do not add up to a loss, so the curves are always losses."""

    Options = LossAwareOptions
    needs_profiles = True
    spectra = "loss"

    def __init__(self, options: LossAwareOptions | None = None) -> None:
        self.options = options or LossAwareOptions()

    def allocate(
        self, units: Sequence[Sequence[Site]], profiles: Sequence[Profile] | None, ratio: float
    ) -> list[Budget]:
        """A unit whose best choice is its dense weight gets that as its budget, and so stays dense.

        InputError for a bad ratio, missing profiles, or a ratio that leaves a unit below rank 1.
        """
        found = checked(units, profiles, ratio)
        names = [unit[0].name for unit in units]
        tables = {name: choices(profile) for name, profile in zip(names, found, strict=True)}
        costs = {name: table[1] for name, table in tables.items()}
        budget = (1 - ratio) * sum(profile.dense for profile in found)
        ranks = allocate({name: table[0] for name, table in tables.items()}, costs, budget)
        return [Budget(float(costs[name][ranks[name]])) for name in names]


def choices(profile: Profile) -> tuple[Tensor, Tensor]:
    """(errors, costs) of every rank that stores less than the dense weight, and last of the dense weight: error 0."""
    none = torch.zeros(1, dtype=torch.float64)
    losses = truncation_losses(profile.spectrum.double()) if profile.losses is None else profile.losses
    smaller = profile.costs < profile.dense
    costs = torch.cat((profile.costs[smaller].double(), none + profile.dense))
    return torch.cat((losses.double()[smaller], none)), costs
