"""Matching two transformer blocks on one residual stream: FFN neurons, key-value groups, query heads, value dimensions.

Queries and keys keep their dimensions, which rotary positions fix. Source of the groups: arXiv 2506.22712, 2502.00264.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmcompress.backends.merging.permutations import assign, cross, taken
from llmcompress.models.heads import Heads

EXACT_ORDERS = 120  # query orders of a group that are all tried
GAIN = 1e-9  # of the largest inner product: a smaller gain is rounding

#: role -> (d_out, d_in), a bias as one more column of q, k, v, gate, up; heads in the order of `Heads`, unfused
Maps = Mapping[str, Tensor]


@dataclass(frozen=True)
class BlockMatch:
    """Place i of the aligned block takes what is at index[i].

    ffn (neurons,); groups (g,); queries (g, queries): heads inside the group that is taken; values (g, d_value).
    """

    ffn: Tensor
    groups: Tensor
    queries: Tensor
    values: Tensor

    @classmethod
    def identity(cls, neurons: int, heads: Heads | None) -> BlockMatch:
        """Without heads, of a block's FFN alone."""
        groups, queries, d_value = heads.o.shape if heads is not None else (0, 0, 0)
        return cls(
            torch.arange(neurons), torch.arange(groups), torch.arange(queries).repeat(groups, 1),
            torch.arange(d_value).repeat(groups, 1),
        )  # fmt: skip

    @classmethod
    def random(cls, neurons: int, heads: Heads, generator: torch.Generator) -> BlockMatch:
        groups, queries, d_value = heads.o.shape

        def draw(n: int) -> Tensor:
            return torch.randperm(n, generator=generator)

        return cls(
            draw(neurons), draw(groups), torch.stack([draw(queries) for _ in range(groups)]),
            torch.stack([draw(d_value) for _ in range(groups)]),
        )  # fmt: skip

    @property
    def is_identity(self) -> bool:
        parts = (self.ffn, self.groups, self.queries, self.values)
        return all(bool((part == torch.arange(part.shape[-1])).all()) for part in parts)

    def then(self, other: BlockMatch) -> BlockMatch:
        """This match, and the other of what it makes."""
        return BlockMatch(
            self.ffn[other.ffn],
            self.groups[other.groups],
            self.queries[other.groups].gather(1, other.queries),
            self.values[other.groups].gather(1, other.values),
        )

    def inverse(self) -> BlockMatch:
        """The match that undoes this one."""
        back = self.groups.argsort()
        return BlockMatch(self.ffn.argsort(), back, self.queries[back].argsort(1), self.values[back].argsort(1))

    def places(self, role: str, heads: Heads) -> Tensor:
        """The index on the flattened places of q, k, v or o."""
        source = torch.arange(getattr(heads, role).numel()).view(getattr(heads, role).shape)[self.groups]
        if role in ("q", "o"):
            source = source.gather(1, self.queries[:, :, None].expand_as(source))
        if role == "v":
            source = source.gather(1, self.values)
        if role == "o":
            source = source.gather(2, self.values[:, None, :].expand_as(source))
        return source.flatten()


def match_layers(a: Maps, b: Maps, heads: Heads | None) -> tuple[BlockMatch, float]:
    """The best match of block b to block a on the same residual stream, and what it gains on <a, pi(b)>.

    The FFN is one assignment. Of two key-value groups the value is that of the best order of the queries, each with an
    assignment of the value dimensions inside (all orders up to 120, otherwise that which matches the queries); then the
    groups are assigned. A part that would gain no more than rounding, or that the maps lack, stays as it is.
    """
    found = BlockMatch.identity(a["down"].shape[1] if "down" in a else 0, heads)
    total = 0.0
    if "down" in a:
        ffn, total = _match_ffn(a, b)
        found = replace(found, ffn=ffn)
    if heads is not None:
        groups, queries, values, gain = _match_attention(a, b, heads)
        if gain > 0:
            found, total = replace(found, groups=groups, queries=queries, values=values), total + gain
    return found, total


def permuted(maps: Maps, match: BlockMatch, heads: Heads | None) -> dict[str, Tensor]:
    """A block's maps in the order of the match: the same function."""
    moved = dict(maps)
    for role in maps.keys() & {"gate", "up"}:
        moved[role] = maps[role][match.ffn.to(maps[role].device)]
    if "down" in maps:
        moved["down"] = maps["down"][:, match.ffn.to(maps["down"].device)]
    if heads is not None:
        for role in ("q", "k", "v"):
            moved[role] = maps[role][match.places(role, heads).to(maps[role].device)]
        moved["o"] = maps["o"][:, match.places("o", heads).to(maps["o"].device)]
    return moved


def _match_ffn(a: Maps, b: Maps) -> tuple[Tensor, float]:
    gains = cross(a["up"], b["up"], 0) + cross(a["down"], b["down"], 1)
    if "gate" in a:
        gains += cross(a["gate"], b["gate"], 0)
    return _improved(gains)


def _improved(gains: Tensor) -> tuple[Tensor, float]:
    """The assignment and its gain over the identity; the identity where that is rounding."""
    index, same = assign(gains), torch.arange(len(gains))
    gain = taken(gains, index) - taken(gains, same)
    return (index, gain) if gain > GAIN * float(gains.abs().max()) else (same, 0.0)


def _match_attention(a: Maps, b: Maps, heads: Heads) -> tuple[Tensor, Tensor, Tensor, float]:
    """Groups, queries and values as in `BlockMatch`, and the gain; 0 or less where it is rounding."""
    groups, queries, d_value = heads.o.shape
    query = cross(a["q"].reshape(groups * queries, -1), b["q"].reshape(groups * queries, -1), 0).cpu()
    query = query.view(groups, queries, groups, queries)
    key = cross(a["k"].reshape(groups, -1), b["k"].reshape(groups, -1), 0).cpu()
    value = cross(a["v"], b["v"], 0).cpu().view(groups, d_value, groups, d_value)
    output = cross(a["o"], b["o"], 1).cpu().view(groups, queries, d_value, groups, queries, d_value)
    worth = key.clone()
    best: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for i, j in itertools.product(range(groups), repeat=2):
        found = _match_group(query[i, :, j], value[i, :, j], output[i, :, :, j])
        worth[i, j] += found[0]
        best[i, j] = found[1:]
    taking = assign(worth)
    order = torch.stack([best[i, int(j)][0] for i, j in enumerate(taking)])
    dims = torch.stack([best[i, int(j)][1] for i, j in enumerate(taking)])
    now = sum(float(part) for part in (
        key.trace(), query.reshape(groups * queries, -1).trace(), value.reshape(groups * d_value, -1).trace(),
        output.reshape(groups * queries * d_value, -1).trace(),
    ))  # fmt: skip
    gain = taken(worth, taking) - now
    scale = max(float(part.abs().max()) for part in (query, key, value, output))
    return taking, order, dims, gain if gain > GAIN * scale else 0.0


def _match_group(query: Tensor, value: Tensor, output: Tensor) -> tuple[float, Tensor, Tensor]:
    """Worth, query order and value dimensions of one pair of key-value groups.

    query (n, n), value (d, d), output (n, d, n, d): inner products of a's parts (first axes) and b's.
    """
    n = len(query)
    if math.factorial(n) <= EXACT_ORDERS:
        orders = [torch.tensor(order) for order in itertools.permutations(range(n))]
    else:
        orders = [assign(query)]
    best: tuple[float, Tensor, Tensor] | None = None
    for order in orders:
        dims = value + output[torch.arange(n), :, order].sum(0)
        index = assign(dims)
        worth = taken(query, order) + taken(dims, index)
        if best is None or worth > best[0]:
            best = worth, order, index
    assert best is not None
    return best
