"""Which blocks share a factor, by a backend instead of by their order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmcompress.compressors.basis_sharing import SHARING_ROLES
from llmcompress.errors import InputError
from llmcompress.types import Site

log = logging.getLogger("llmcompress")


def grouped_units(
    units: Sequence[Sequence[Site]], options: Any, weight: Callable[[Site], Tensor], seed: int, at: str
) -> list[list[Site]]:
    """The units of a method whose options have `grouping` and `layers`, put together anew.

    Sites of the same role and shape, where the role is one that shares, are n members, of which the backend makes
    n // layers groups by their weights, read one at a time. InputError, with the recipe's key `at`, if it cannot.
    """
    grouping = options.grouping.build("grouping")
    families: dict[tuple[str, int, int], list[Site]] = {}
    found: list[list[Site]] = []
    for unit in units:
        if unit[0].role in SHARING_ROLES:
            families.setdefault((unit[0].role, unit[0].d_in, unit[0].d_out), []).extend(unit)
        else:
            found.append(list(unit))
    for (role, *_), members in families.items():
        members.sort(key=lambda site: site.block)
        count = len(members) // options.layers
        if count < 2:
            found.append(members)
            continue
        features = torch.stack([grouping.describe(weight(site).float()) for site in members])
        generator = torch.Generator(device=features.device).manual_seed(seed)
        try:
            labels = grouping.groups(features, count, generator).tolist()
        except InputError as error:
            raise InputError(f"{at}: {role} of {len(members)} blocks in {count} groups: {error}") from None
        groups = [[site for site, own in zip(members, labels, strict=True) if own == label] for label in range(count)]
        found += [group for group in groups if group]
        shown = "; ".join(" ".join(str(site.block) for site in group) for group in groups)
        log.info("%s: %s of blocks %s", at, role, shown)
    return found
