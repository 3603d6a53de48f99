"""Loss curves that follow those of other units: how much a method gains over low rank hardly changes between blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.types import Profile, Site

SPACING = 8  # units of a kind for one whose curve is measured


def measured_for(units: Sequence[Sequence[Site]]) -> list[int]:
    """For each unit the number of the one whose curve is measured in its place; its own number where it is measured.

    Units of the same roles and shapes stand for one another: measured are the first and the last of them, which differ
    from all others, and every SPACING-th in between, which its neighbours follow.
    """
    kinds: dict[tuple[tuple[str, int, int], ...], list[int]] = {}
    for number, unit in enumerate(units):
        kinds.setdefault(tuple((site.role, site.d_in, site.d_out) for site in unit), []).append(number)
    found = list(range(len(units)))
    for numbers in kinds.values():
        inner = range(SPACING // 2, len(numbers) - 1, SPACING)
        for place in range(1, len(numbers) - 1):
            if inner:
                found[numbers[place]] = numbers[min(inner, key=lambda measured: abs(measured - place))]
    return found


def following_losses(spectrum: Tensor, like: Profile) -> Tensor:
    """Losses (p + 1,) of a unit with this spectrum (p,), float64: low rank's, times the share of it that `like` has.

    `like` is of a unit of the same shapes, so that entries belong to the same costs. Of the ranks below a least cost,
    which all cost the same, the largest counts.
    """
    own, others = truncation_losses(spectrum), truncation_losses(like.spectrum)
    least = int((like.costs == like.costs[0]).sum())
    own[:least], others[:least] = own[least - 1].clone(), others[least - 1].clone()
    if like.losses is None or not others[0] > 0:
        return own
    return torch.where(others > 0, own * like.losses / others, own[0] * like.losses / others[0])


def truncation_losses(spectrum: Tensor) -> Tensor:
    """(p + 1,): the squares dropped at rank 0..p."""
    return torch.cat((spectrum.square().flip(0).cumsum(0).flip(0), spectrum.new_zeros(1)))
