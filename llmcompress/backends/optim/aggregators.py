"""Aggregation rules to compare with: mean, medians, trimmed means, Krum and its kin."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmcompress.backends.checks import choose
from llmcompress.errors import InputError

Rule = Callable[[Tensor], Tensor]


def mean(G: Tensor, f: int) -> Tensor:
    return G.mean(0)


def unit_mean(G: Tensor, f: int) -> Tensor:
    """The mean of unit gradients times the median norm."""
    norms = G.norm(dim=1)
    return (G / norms[:, None]).mean(0) * norms.median()


def coordinate_median(G: Tensor, f: int) -> Tensor:
    return G.median(0).values


def trimmed_mean(G: Tensor, f: int) -> Tensor:
    """Without the f least and the f largest of every coordinate. Yin et al., 2018."""
    return G.sort(0).values[f : len(G) - f].mean(0)


def _nearest_mean(G: Tensor, centre: Tensor, count: int) -> Tensor:
    """Of every coordinate's `count` values nearest to the centre."""
    nearest = (G - centre).abs().topk(count, 0, largest=False).indices
    return G.gather(0, nearest).mean(0)


def meamed(G: Tensor, f: int) -> Tensor:
    """Mean around the median. Xie et al., 2018."""
    return _nearest_mean(G, coordinate_median(G, f), len(G) - f)


def phocas(G: Tensor, f: int) -> Tensor:
    """Mean around the trimmed mean. Xie et al., 2018."""
    return _nearest_mean(G, trimmed_mean(G, f), len(G) - f)


def _krum_scores(G: Tensor, f: int) -> Tensor:
    """Summed squared distances to the p - f - 2 nearest others. Blanchard et al., 2017."""
    distances = torch.cdist(G.double(), G.double()).square().nan_to_num(nan=torch.inf)
    distances.fill_diagonal_(torch.inf)
    return distances.topk(max(1, len(G) - f - 2), largest=False).values.sum(1)


def krum(G: Tensor, f: int) -> Tensor:
    return G[_krum_scores(G, f).argmin()]


def multi_krum(G: Tensor, f: int) -> Tensor:
    """The mean of the p - f best."""
    return G[_krum_scores(G, f).topk(len(G) - f, largest=False).indices].mean(0)


def bulyan(G: Tensor, f: int) -> Tensor:
    """Krum's choice, again and again, then the mean around the median. El Mhamdi et al., 2018; p >= 4f + 3."""
    if len(G) < 4 * f + 3:
        raise InputError(f"bulyan needs p >= 4f + 3 = {4 * f + 3} gradients; got {len(G)}")
    left, chosen = list(range(len(G))), []
    for _ in range(len(G) - 2 * f):
        chosen.append(left.pop(int(_krum_scores(G[left], f).argmin())))
    return _nearest_mean(G[chosen], coordinate_median(G[chosen], f), len(chosen) - 2 * f)


def geometric_median(G: Tensor, f: int, rounds: int = 50) -> Tensor:
    """By Weiszfeld's rounds."""
    centre = G.mean(0)
    for _ in range(rounds):
        weights = 1 / (G - centre).norm(dim=1).clamp_min(1e-12)
        centre = (weights / weights.sum()) @ G
    return centre


AGGREGATORS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean": mean,
    "unit_mean": unit_mean,
    "median": coordinate_median,
    "trimmed_mean": trimmed_mean,
    "phocas": phocas,
    "meamed": meamed,
    "krum": krum,
    "multi_krum": multi_krum,
    "bulyan": bulyan,
    "geometric_median": geometric_median,
}


def get_aggregator(name: str, f: int | None = None) -> Rule:
    """The rule of that name as a function (p, n) -> (n,); f: how many workers are bad, 0 if not said.

    InputError for an unknown name. The rule raises one if p is too small for f.
    """
    choose("aggregator", name, tuple(AGGREGATORS))
    bad, rule = f or 0, AGGREGATORS[name]

    def aggregate(G: Tensor) -> Tensor:
        if len(G) < 2 * bad + 1:
            raise InputError(f"{name}: {len(G)} gradients have no majority over {bad} bad ones")
        return rule(G, bad)

    return aggregate
