"""What a rank costs in stored values, and the rank that a budget pays for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.errors import InputError


def rank_costs(d_in: int, d_outs: Sequence[int], pivoted: bool) -> Tensor:
    """Dense values stored at rank 0..min(d_in, sum d_out) for sites that share one A; a mask bit is 1/16 of a value."""
    total = sum(d_outs)
    rank = torch.arange(min(d_in, total) + 1, dtype=torch.float64)
    if not pivoted:
        return rank * (d_in + total)
    masks = sum(math.ceil(d / 8) for d in d_outs) / 2
    return rank * (d_in + total - rank) + masks * (rank > 0)


def rank_for(d_in: int, d_out: int, ratio: float, pivoted: bool = False) -> int:
    """The largest rank that stores at most 1 - ratio of the dense values; unpivoted, (1-ratio) d_in d_out/(d_in+d_out).

    InputError unless 0 < ratio < 1, and if not even rank 1 fits.
    """
    if not 0 < ratio < 1:
        raise InputError(f"ratio must be in (0, 1), the fraction removed; got {ratio}")
    return rank_within(rank_costs(d_in, [d_out], pivoted), (1 - ratio) * d_in * d_out)


def rank_within(costs: Tensor, values: float) -> int:
    """The largest rank whose cost is at most `values`. InputError if not even rank 1 fits."""
    rank = int((costs <= values).sum()) - 1
    if rank < 1:
        raise InputError(f"the budget of {values:.1f} values is below rank 1, which stores {costs[1]:.1f}")
    return rank


def rank_from_fraction(d_in: int, d_outs: Sequence[int], fraction: float, pivoted: bool) -> int:
    """`fraction` of the full rank. InputError if that is below 1 or stores as much as the dense weight."""
    costs = rank_costs(d_in, d_outs, pivoted)
    rank = int(fraction * (len(costs) - 1))
    dense = d_in * sum(d_outs)
    if rank < 1:
        raise InputError(f"rank_fraction {fraction} of rank {len(costs) - 1} is below rank 1")
    if costs[rank] >= dense:
        raise InputError(
            f"rank {rank} (rank_fraction {fraction}) stores {costs[rank]:.0f} values, the dense weight {dense}"
        )
    return rank
