"""Neighbouring blocks share the mean of their matrices, neurons and heads aligned first; each keeps its own norms.

Sources: the matching is Git Re-Basin's (arXiv 2209.04836) between two blocks of one model, on the symmetries of
arXiv 2506.22712; see `match_layers`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from llmcompress.backends.merging.block_matching import BlockMatch, match_layers, permuted
from llmcompress.backends.merging.site_maps import check_whole, cosine, site_maps
from llmcompress.backends.merging.weight_matching import weighted_mean
from llmcompress.errors import InputError
from llmcompress.layers.shared import SharedLinear
from llmcompress.models.heads import Heads
from llmcompress.types import Budget, Compressed, Problem, Profile, Site

ROUNDS = 20  # of matching every block to the mean of the others


class LayerSharingOptions(BaseModel, extra="forbid"):
    layers: int = Field(default=2, ge=2, description="neighbouring blocks that share; a last one joins those before it")
    match: bool = Field(default=True, description="align neurons and heads before the mean is taken")


def share(blocks: Sequence[dict[str, Tensor]], heads: Heads | None) -> tuple[dict[str, Tensor], list[BlockMatch]]:
    """The mean of blocks' maps after matching, and the match of every block: the first stays as it is.

    blocks: role -> (d_out, d_in), as `match_layers` takes them; heads None where no attention is among them. Every
    block is matched to the mean of those before it, then again and again to that of all others, until nothing gains.
    """
    neurons = blocks[0]["down"].shape[1] if "down" in blocks[0] else 0
    matches = [BlockMatch.identity(neurons, heads) for _ in blocks]
    moved = list(blocks)
    for number in range(ROUNDS):
        gained = False
        for index in range(1, len(blocks)):
            others = mean_of([b for i, b in enumerate(moved) if i != index and (number or i < index)])
            match, gain = match_layers(others, moved[index], heads)
            if gain > 0:
                matches[index] = matches[index].then(match)
                moved[index] = permuted(blocks[index], matches[index], heads)
                gained = True
        if not gained or len(blocks) == 2:
            break
    return mean_of(moved), matches


def mean_of(blocks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        role: weighted_mean([block[role] for block in blocks], [1 / len(blocks)] * len(blocks)) for role in blocks[0]
    }


class LayerSharing:
    """A unit is the targeted sites of `layers` neighbouring blocks; it stores those of one block, or stays dense."""

    Options: ClassVar[type[LayerSharingOptions]] = LayerSharingOptions
    needs: frozenset[str] = frozenset()
    profiles_itself = True  # a unit's sites have different inputs: they are no one matrix

    def __init__(self, options: LayerSharingOptions | None = None) -> None:
        self.options = options or LayerSharingOptions()

    def units(self, sites: Sequence[Site]) -> list[list[Site]]:
        """InputError for a block without a targeted neighbour of its layout, or half of an attention or FFN."""
        blocks: dict[int, list[Site]] = {}
        for site in sites:
            blocks.setdefault(site.block, []).append(site)
        runs: list[list[list[Site]]] = []
        for index, own in sorted(blocks.items()):
            if self.options.match:
                check_whole(own)
            previous = runs[-1][-1] if runs else None
            if previous and previous[0].block == index - 1 and _layout(previous) == _layout(own):
                runs[-1].append(own)
            else:
                runs.append([own])
        return [unit for run in runs for unit in self._split(run)]

    def _split(self, run: list[list[Site]]) -> list[list[Site]]:
        if len(run) < 2:
            raise InputError(
                f"{run[0][0].name}: no targeted neighbour of its layout to share with; target blocks in a row, for "
                "instance layers\\.(10|11)\\."
            )
        count = max(1, len(run) // self.options.layers)
        starts = [i * self.options.layers for i in range(count)] + [len(run)]
        return [[site for block in run[start:stop] for site in block] for start, stop in itertools.pairwise(starts)]

    def costs(self, sites: Sequence[Site]) -> Tensor:
        first = sum(site.dense_values for site in sites if site.block == sites[0].block)
        return torch.tensor([first, first], dtype=torch.float64)

    def profile(self, problem: Problem) -> Profile:
        """One value: what sharing costs, as loss to second order where gradients were measured, else as distance."""
        blocks, heads = site_maps(problem.sites, problem.weights, problem.biases)
        mean, matches = self._share(blocks, heads)
        numbers = sorted({site.block for site in problem.sites})
        cost = 0.0
        for site, weight, statistics in zip(problem.sites, problem.weights, problem.statistics, strict=True):
            back = permuted(mean, matches[numbers.index(site.block)].inverse(), heads)
            change = _joined(back, site)[:, : site.d_in].double() - weight.double()
            if statistics.gram is not None and statistics.output_gram is not None:
                cost += float((statistics.output_gram @ change @ statistics.gram).mul(change).sum())
            else:
                cost += float(change.square().sum())
        found = torch.tensor([cost], dtype=torch.float64)
        dense = sum(site.dense_values for site in problem.sites)
        return Profile(problem.sites, found.sqrt(), self.costs(problem.sites), dense, found.repeat(2))

    def plan(self, sites: Sequence[Site], budget: Budget) -> dict[str, Any]:
        dense, shared = sum(site.dense_values for site in sites), float(self.costs(sites)[0])
        if budget.values >= dense:
            return {"blocks": None, "values": float(dense)}
        if budget.values < shared:
            blocks = len({site.block for site in sites})
            raise InputError(
                f"{sites[0].name}: {blocks} blocks that share keep {shared:.0f} values, more than the budget of "
                f"{budget.values:.0f}; lower ratio, or more layers"
            )
        return {"blocks": len({site.block for site in sites}), "values": shared}

    def compress(self, problem: Problem, budget: Budget, generator: torch.Generator) -> Compressed:
        sites = problem.sites
        if self.plan(sites, budget)["blocks"] is None:
            note = f"{problem.name}: left dense, its budget of {budget.values:.0f} values holds the dense weights"
            return Compressed([None] * len(sites), [note])
        blocks, heads = site_maps(problem.sites, problem.weights, problem.biases)
        mean, matches = self._share(blocks, heads)
        owners: dict[str, tuple[str, nn.Parameter]] = {}
        layers: list[SharedLinear | None] = []
        numbers = sorted({site.block for site in sites})
        for site, weight, bias in zip(sites, problem.weights, problem.biases, strict=True):
            match = matches[numbers.index(site.block)]
            if site.role not in owners:
                value = _joined(mean, site)[:, : site.d_in].to(weight.dtype).contiguous()
                owners[site.role] = site.name, nn.Parameter(value)
                shared = None
            else:
                shared = {"weight": owners[site.role][0]}
            layers.append(SharedLinear.from_weight(owners[site.role][1], _moved_bias(site, bias, match, heads), shared))
        before, after = cosine(blocks), cosine([permuted(b, m, heads) for b, m in zip(blocks, matches, strict=True)])
        cosines = f"cosine {before:.3f} as given, {after:.3f} aligned"
        note = f"blocks {numbers[0]} to {numbers[-1]} share their matrices; {cosines}"
        return Compressed(list(layers), [note])

    def _share(
        self, blocks: list[dict[str, Tensor]], heads: Heads | None
    ) -> tuple[dict[str, Tensor], list[BlockMatch]]:
        if self.options.match:
            return share(blocks, heads)
        neurons = blocks[0]["down"].shape[1] if "down" in blocks[0] else 0
        return mean_of(blocks), [BlockMatch.identity(neurons, heads) for _ in blocks]


def _layout(sites: Sequence[Site]) -> list[tuple[str, int, int, bool]]:
    return [(site.role, site.d_in, site.d_out, site.bias) for site in sites]


def _joined(maps: dict[str, Tensor], site: Site) -> Tensor:
    return torch.cat((maps["gate"], maps["up"])) if site.role == "gate_up" else maps[site.role]


def _moved_bias(site: Site, bias: Tensor | None, match: BlockMatch, heads: Heads | None) -> Tensor | None:
    """A block's own bias in the order of the shared rows."""
    if bias is None or site.role in ("o", "down"):
        return bias
    if site.role in ("gate", "up"):
        return bias[match.ffn.to(bias.device)]
    if site.role == "gate_up":
        return bias.view(2, -1)[:, match.ffn.to(bias.device)].flatten()
    return bias if heads is None else bias[match.places(site.role, heads).to(bias.device)]
