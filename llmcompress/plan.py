"""Which sites each step of a recipe works on, in which units, and what it needs to know about them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmcompress.calibration.collect import BACKWARD, FORWARD
from llmcompress.catalog import nearest
from llmcompress.compressors.allocation.spectra import LOSS_NEEDS
from llmcompress.errors import InputError
from llmcompress.grouping import grouped_units
from llmcompress.models.structure import Structure
from llmcompress.recipe import Compress
from llmcompress.types import ATTENTION_ROLES, FFN_ROLES, Budget, Compressor, Site

GROUPS = {"attention": ATTENTION_ROLES, "ffn": FFN_ROLES}
ROLES = (*ATTENTION_ROLES, *FFN_ROLES)


@dataclass
class Step:
    """One step of the recipe on a model: its units in the order in which their last block comes."""

    recipe: Compress
    compressor: Compressor
    allocation: Any
    units: list[list[Site]]

    @property
    def sites(self) -> list[Site]:
        return [site for unit in self.units for site in unit]

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that the method reads, and those that the allocation's curves take."""
        return self.compressor.needs | (LOSS_NEEDS if self.allocation.spectra == "loss" else frozenset())


@dataclass
class Plan:
    """All steps, and what they need together."""

    structure: Structure
    steps: list[Step]
    measured: bool = False  #: the statistics of all blocks are in the store already

    @property
    def sites(self) -> list[Site]:
        return [site for step in self.steps for site in step.sites]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(step.needs for step in self.steps))

    @property
    def forward_needs(self) -> frozenset[str]:
        return self.needs & FORWARD

    @property
    def backward_needs(self) -> frozenset[str]:
        return self.needs & BACKWARD

    @property
    def propagate(self) -> bool:
        return any(step.recipe.propagate for step in self.steps)

    @property
    def spans_blocks(self) -> bool:
        return any(unit[0].block != unit[-1].block for step in self.steps for unit in step.units)

    @property
    def needs_profiles(self) -> bool:
        return any(step.allocation.needs_profiles for step in self.steps)

    @property
    def two_passes(self) -> bool:
        """Whether statistics of all blocks must be known before the first one is compressed."""
        measured = any(step.allocation.needs_profiles and step.allocation.spectra != "weight" for step in self.steps)
        return bool(self.measured or measured or self.backward_needs or self.spans_blocks)

    def budgets(self, profiles: list[list[Any]] | None) -> list[list[Budget]]:
        """The budget of every unit of every step; `profiles` in the same order, where an allocation needs them."""
        return [
            step.allocation.allocate(step.units, profiles[index] if profiles else None, step.recipe.ratio)
            for index, step in enumerate(self.steps)
        ]


def make_plan(
    structure: Structure,
    steps: Sequence[Compress],
    weight: Callable[[Site], Tensor] | None = None,
    seed: int = 0,
) -> Plan:
    """weight: reads a site's weight (d_out, d_in), for steps that group blocks by them; seed: of these groups.

    InputError if a target matches nothing, two steps claim a site, or a step asks for what it cannot have.
    """
    claimed: dict[str, int] = {}
    planned = []
    for index, recipe in enumerate(steps):
        sites = select_sites(structure, recipe.targets, f"compress.{index}.targets")
        for site in sites:
            if site.name in claimed:
                other = f"compress.{claimed[site.name]}"
                raise InputError(f"compress.{index}.targets: {site.name} belongs to {other} already")
            claimed[site.name] = index
        compressor = recipe.build()
        units = compressor.units(sites)
        options = getattr(compressor, "options", None)
        if weight is not None and getattr(options, "grouping", None) is not None:
            units = grouped_units(units, options, weight, seed, f"compress.{index}.grouping")
        units = sorted(units, key=lambda unit: unit[-1].block)
        step = Step(recipe, compressor, recipe.build_allocation(), units)
        if not step.allocation.needs_profiles:
            for unit, budget in zip(units, step.allocation.allocate(units, None, recipe.ratio), strict=True):
                compressor.plan(unit, budget)  # a ratio that leaves a unit nothing is refused now, not at its turn
        planned.append(step)
    plan = Plan(structure, planned)
    if plan.propagate and plan.spans_blocks:
        raise InputError("propagate: a method that shares factors between blocks cannot follow the compressed prefix")
    if "cross" in plan.needs and not plan.propagate:
        raise InputError("refit: needs propagate: true, since it fits to inputs from the compressed prefix")
    return plan


def select_sites(structure: Structure, targets: Sequence[str], key: str) -> list[Site]:
    """The sites that any target names: a group, a role, or a regex searched in the module path."""
    chosen: set[str] = set()
    for target in targets:
        roles = GROUPS.get(target, (target,) if target in ROLES else ())
        if roles:
            found = [site.name for site in structure.sites if site.role in roles]
        else:
            try:
                found = [site.name for site in structure.sites if re.search(target, site.name)]
            except re.error as error:
                raise InputError(f"{key}: '{target}' is neither a role nor a regular expression ({error})") from None
        if (not found and len(targets) == 1) or (not found and not roles):
            known = [*GROUPS, *sorted({site.role for site in structure.sites})]
            raise InputError(f"{key}: '{target}' matches no linear map of the blocks{nearest(target, known)}")
        chosen |= set(found)
    if not chosen:
        raise InputError(f"{key}: {', '.join(targets)} match no linear map of the blocks; see `llmcompress inspect`")
    return [site for site in structure.sites if site.name in chosen]
