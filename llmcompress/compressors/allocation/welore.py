"""Non-uniform ranks from one threshold over all normalised spectra (WeLore, arXiv 2407.11239)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from llmcompress.compressors.allocation.spectra import Spectra
from llmcompress.compressors.allocation.spread import checked, checked_ratio
from llmcompress.compressors.ranks import rank_costs
from llmcompress.errors import InputError
from llmcompress.types import Budget, Profile, Site

How = Literal["minmax", "max"]
Rule = Literal["storage", "half"]
HALF = 0.4999  # the published split


class WeLoreOptions(BaseModel, extra="forbid"):
    spectrum: Literal["weight", "whitened"] = Field(
        default="weight", description="singular values of the weights themselves (the paper), or in the method's space"
    )
    normalize: How = Field(
        default="minmax", description="each spectrum to 0..1 (the paper), or divided by its largest value"
    )
    err: float | None = Field(
        default=None, gt=0, lt=1, description="attempted rank reduction, as in the paper; in place of ratio"
    )
    split: Rule = Field(
        default="storage",
        description="factorised is what stores less than dense, or (half, the paper) what loses half its rank",
    )


# --- the threshold ---------------------------------------------------------------------------------------------------


def normalize_spectrum(s: Tensor, how: How = "minmax") -> Tensor:
    """(s - min) / (max - min), or s / max; 1 throughout where all values are equal. s (p,); float64.

    InputError unless finite and not negative. Source: arXiv 2407.11239, section on rank reduction.
    """
    if s.ndim != 1 or not len(s):
        raise InputError(f"a spectrum is a vector of at least one value; got shape {tuple(s.shape)}")
    if not torch.isfinite(s).all() or (s < 0).any():
        raise InputError("a spectrum must be finite and not negative")
    s = s.double()
    if s.min() == s.max():
        return torch.ones_like(s)
    low = s.min() if how == "minmax" else s.new_zeros(())
    return (s - low) / (s.max() - low)


def global_threshold(spectra: Sequence[Tensor], err: float, how: How = "minmax", grid: float | None = None) -> float:
    """The k below which a share `err` of all normalised singular values lies.

    Exact by default: the value at round(err · N) of the N in order, which meets err to 1/N where none are equal. With
    `grid`, as published: the first of 0, grid, 2 grid, ... whose share is at least err, or 1.
    """
    if not 0 < err < 1:
        raise InputError(f"err must be in (0, 1), the share of singular values removed; got {err}")
    pool = _pool([normalize_spectrum(s, how) for s in spectra])
    if grid is None:
        return float(pool[min(round(err * len(pool)), len(pool) - 1)])
    steps = torch.arange(0, 1 + grid / 2, grid, dtype=torch.float64).clamp(max=1)
    reached = torch.searchsorted(pool, steps) >= err * len(pool)
    return float(steps[int(reached.int().argmax())]) if reached.any() else 1.0


def threshold_for_parameters(
    spectra: Sequence[Tensor],
    shapes: Sequence[tuple[int, int]],
    ratio: float,
    how: How = "minmax",
    costs: Sequence[Tensor] | None = None,
    rule: Rule = "storage",
) -> tuple[float, list[int]]:
    """(k, ranks): the smallest pooled value k at which a share `ratio` of the dense values is removed, or more.

    shapes (d_out, d_in); a matrix of rank r = #(s >= k), at least 1, stores costs[r] if it is split off by `rule`,
    else it stays dense; costs default to r (d_in + d_out). What is stored never rises with k, so that k is bisected.
    InputError for bad spectra or a ratio that rank 1 everywhere does not reach.
    """
    checked_ratio(ratio)
    found = [normalize_spectrum(s, how) for s in spectra]
    pool = _pool(found)
    stored = [
        _stored(table, shape, rule) for table, shape in zip(_tables(found, shapes, costs), shapes, strict=True)
    ]  # (p + 1,) each
    dense = sum(d_out * d_in for d_out, d_in in shapes)
    ascending = [s.sort().values for s in found]

    def ranks(k: float) -> list[int]:
        return [max(1, len(s) - int(torch.searchsorted(s, k))) for s in ascending]

    def values(k: float) -> float:
        return sum(float(table[rank]) for table, rank in zip(stored, ranks(k), strict=True))

    low, high = 0, len(pool) - 1
    if values(float(pool[high])) > (1 - ratio) * dense:
        most = 1 - values(float(pool[high])) / dense
        raise InputError(f"ratio {ratio} cannot be reached with rank 1 or more; at most {most:.4f} can be removed")
    while low < high:
        middle = (low + high) // 2
        if values(float(pool[middle])) <= (1 - ratio) * dense:
            high = middle
        else:
            low = middle + 1
    return float(pool[low]), ranks(float(pool[low]))


def fill_budget(spectra: Sequence[Tensor], stored: Sequence[Tensor], ranks: Sequence[int], budget: float) -> list[int]:
    """Ranks raised by the largest values below the threshold that still fit: what a threshold leaves of a budget.

    spectra (p,) normalised, descending; stored (p + 1,): values at each rank. Less than one step of one matrix is left.
    """
    filled = list(ranks)
    left = budget - sum(float(table[rank]) for table, rank in zip(stored, ranks, strict=True))
    waiting = [(-float(s[r]), i) for i, (s, r) in enumerate(zip(spectra, filled, strict=True)) if r < len(s)]
    heapq.heapify(waiting)
    while waiting:
        _, i = heapq.heappop(waiting)
        step = float(stored[i][filled[i] + 1] - stored[i][filled[i]])
        if not 0 < step <= left:  # a step for nothing is one of a matrix that is dense already
            continue
        left -= step
        filled[i] += 1
        if filled[i] < len(spectra[i]):
            heapq.heappush(waiting, (-float(spectra[i][filled[i]]), i))
    return filled


def split_components(
    ranks: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    rule: Rule = "storage",
    costs: Sequence[Tensor] | None = None,
) -> list[bool]:
    """True for a low-rank component (LRC), which is factorised; the others stay dense, not truncated.

    storage: it stores less than the dense (d_out, d_in); half: it loses more than .4999 of its rank, as published.
    """
    tables = costs if costs is not None else [rank_costs(d_in, [d_out], False) for d_out, d_in in shapes]
    return [bool(_low_rank(table, shape, rule)[r]) for r, table, shape in zip(ranks, tables, shapes, strict=True)]


def _low_rank(costs: Tensor, shape: tuple[int, int], rule: Rule) -> Tensor:
    """(p + 1,) bool: at which ranks a matrix is an LRC."""
    if rule == "storage":
        return costs < shape[0] * shape[1]
    full = len(costs) - 1
    return (full - torch.arange(full + 1)) / full > HALF


def _stored(costs: Tensor, shape: tuple[int, int], rule: Rule) -> Tensor:
    return torch.where(_low_rank(costs, shape, rule), costs.double(), float(shape[0] * shape[1]))


def _pool(spectra: Sequence[Tensor]) -> Tensor:
    if not spectra:
        raise InputError("no spectra: a threshold needs at least one matrix")
    return torch.cat([s.cpu() for s in spectra]).sort().values


def _tables(
    spectra: Sequence[Tensor], shapes: Sequence[tuple[int, int]], costs: Sequence[Tensor] | None
) -> Sequence[Tensor]:
    if len(shapes) != len(spectra):
        raise InputError(f"as many shapes as spectra are needed; got {len(shapes)} and {len(spectra)}")
    for s, shape in zip(spectra, shapes, strict=True):
        if len(s) != min(shape):
            raise InputError(f"a matrix of shape {shape} has {min(shape)} singular values; got {len(s)}")
    return costs if costs is not None else [rank_costs(d_in, [d_out], False) for d_out, d_in in shapes]


# --- the allocation --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AllocationReport:
    """What a threshold does. attempted: share of singular values below it; effective: the same where only LRCs count;
    removed: share of the dense values removed. names, ranks, low_rank, values: one a unit. by_role: role -> share of
    its dense values kept."""

    threshold: float
    attempted: float
    effective: float
    removed: float
    names: list[str]
    ranks: list[int]
    low_rank: list[bool]
    values: list[float]
    by_role: dict[str, float]


class WeLore:
    Options = WeLoreOptions
    needs_profiles = True

    def __init__(self, options: WeLoreOptions | None = None) -> None:
        self.options = options or WeLoreOptions()

    @property
    def spectra(self) -> Spectra:
        return "weight" if self.options.spectrum == "weight" else "own"

    def allocate(
        self, units: Sequence[Sequence[Site]], profiles: Sequence[Profile] | None, ratio: float
    ) -> list[Budget]:
        """InputError for a bad ratio, missing profiles, or a ratio that leaves a unit below rank 1."""
        return [Budget(value) for value in self.report(units, profiles, ratio).values]

    def report(
        self, units: Sequence[Sequence[Site]], profiles: Sequence[Profile] | None, ratio: float
    ) -> AllocationReport:
        found = checked(units, profiles, ratio)
        options = self.options
        spectra = [profile.spectrum for profile in found]
        shapes = [(sum(site.d_out for site in unit), unit[0].d_in) for unit in units]
        costs = [profile.costs for profile in found]
        if options.err is None:
            threshold, ranks = threshold_for_parameters(spectra, shapes, ratio, options.normalize, costs, options.split)
            stored = [_stored(table, shape, options.split) for table, shape in zip(costs, shapes, strict=True)]
            scaled = [normalize_spectrum(s, options.normalize) for s in spectra]
            ranks = fill_budget(scaled, stored, ranks, (1 - ratio) * sum(profile.dense for profile in found))
        else:
            threshold = global_threshold(spectra, options.err, options.normalize)
            ranks = [max(1, int((normalize_spectrum(s, options.normalize) >= threshold).sum())) for s in spectra]
        low_rank = split_components(ranks, shapes, options.split, costs)
        values = [
            float(profile.costs[rank]) if split else float(profile.dense)
            for profile, rank, split in zip(found, ranks, low_rank, strict=True)
        ]
        return _report(units, found, threshold, ranks, low_rank, values)


def _report(
    units: Sequence[Sequence[Site]],
    profiles: Sequence[Profile],
    threshold: float,
    ranks: list[int],
    low_rank: list[bool],
    values: list[float],
) -> AllocationReport:
    full = [len(profile.spectrum) for profile in profiles]
    gone = [p - r for p, r in zip(full, ranks, strict=True)]
    dense = [profile.dense for profile in profiles]
    roles = ["|".join(dict.fromkeys(site.role for site in unit)) for unit in units]
    by_role = {
        role: sum(v for v, own in zip(values, roles, strict=True) if own == role)
        / sum(d for d, own in zip(dense, roles, strict=True) if own == role)
        for role in dict.fromkeys(roles)
    }
    return AllocationReport(
        threshold=threshold,
        attempted=sum(gone) / sum(full),
        effective=sum(lost for lost, split in zip(gone, low_rank, strict=True) if split) / sum(full),
        removed=1 - sum(values) / sum(dense),
        names=[unit[0].name for unit in units],
        ranks=ranks,
        low_rank=low_rank,
        values=values,
        by_role=by_role,
    )
