"""Where a block's heads stand in its maps, fused maps and grouped queries included, found without a model's name.

A single token passes through a weightless copy of the model, so that attention hands on its values as they are:
numbered values tell which row of the value map each column of the output map reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.errors import InputError
from llmcompress.models.structure import analyse, no_cache
from llmcompress.types import Site


@dataclass(frozen=True)
class Heads:
    """Places of the heads: rows of the query, key and value maps, columns of the output map; all int64.

    q (groups, queries, d_head), k (groups, d_head), v (groups, d_value), o (groups, queries, d_value).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor

    @classmethod
    def plain(cls, q: int, k: int, v: int, o: int, heads: int, groups: int) -> Heads:
        """Of separate maps with so many rows (columns of o), heads one after the other, neighbours in a group."""
        queries = heads // groups
        return cls(
            torch.arange(q).view(groups, queries, -1),
            torch.arange(k).view(groups, -1),
            torch.arange(v).view(groups, -1),
            torch.arange(o).view(groups, queries, -1),
        )


def find_heads(blocks: Sequence[dict[str, Site]], skeleton: PreTrainedModel) -> list[Heads]:
    """Of every block's sites by role, on a weightless copy of the model.

    InputError if what attention makes of its values is no selection of them.
    """
    pairs = [(sites.get("v") or sites["qkv"], sites["o"]) for sites in blocks]
    heads = skeleton.config.num_attention_heads
    rows = _rows_read(pairs, skeleton)
    return [_heads(sites, read.view(heads, -1)) for sites, read in zip(blocks, rows, strict=True)]


def _heads(sites: dict[str, Site], read: Tensor) -> Heads:
    """read (heads, d_value): the row of the value map that each column of the output map reads."""
    output, heads = sites["o"], len(read)
    groups = torch.unique(read[:, 0]).numel()
    order = read[:, 0].argsort(stable=True).view(groups, -1)  # the heads of each group
    v = read[order[:, 0]]
    o = torch.arange(output.d_in).view(heads, -1)[order]
    if "qkv" not in sites:
        q = torch.arange(sites["q"].d_out).view(heads, -1)[order]
        return Heads(q, torch.arange(sites["k"].d_out).view(groups, -1), v, o)
    rest = torch.ones(sites["qkv"].d_out, dtype=torch.bool)
    rest[v.flatten()] = False
    others = rest.nonzero().flatten()
    d_head = len(others) // (heads + groups)
    if int(v.max() - v.min()) + 1 == v.numel():  # all queries, all keys, all values
        q, k = others.split([heads * d_head, groups * d_head])
        return Heads(q.view(heads, d_head)[order], k.view(groups, d_head), v, o)
    parts = others.view(groups, -1)  # group by group: its queries, its key, its values
    q, k = parts[:, :-d_head], parts[:, -d_head:]
    return Heads(q.reshape(groups, order.shape[1], d_head), k, v, o)


def _rows_read(pairs: Sequence[tuple[Site, Site]], skeleton: PreTrainedModel) -> list[Tensor]:
    """For value and output map of every block, the row of the one that each column (d_in,) of the other reads."""
    seen: dict[str, Tensor] = {}

    def numbered(width: int) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.arange(width, dtype=torch.float32).expand(*x.shape[:-1], -1)

    def watch(name: str) -> Callable[..., None]:
        return lambda _, args: seen.__setitem__(name, args[0])

    sources = [skeleton.get_submodule(values.name) for values, _ in pairs]
    forwards = [source.forward for source in sources]
    hooks = [skeleton.get_submodule(o.name).register_forward_pre_hook(watch(o.name)) for _, o in pairs]
    for source, (values, _) in zip(sources, pairs, strict=True):
        source.forward = numbered(values.d_out)
    try:
        with torch.no_grad():
            skeleton(input_ids=torch.ones(1, 1, dtype=torch.long), **no_cache(skeleton))
    finally:
        for source, forward, hook in zip(sources, forwards, hooks, strict=True):
            source.forward = forward
            hook.remove()
    return [_places(values, seen[output.name].flatten()) for values, output in pairs]


def _places(values: Site, found: Tensor) -> Tensor:
    rows = found.round().long()
    if not torch.allclose(found, rows.float()) or int(rows.min()) < 0 or int(rows.max()) >= values.d_out:
        raise InputError(f"{values.name}: what attention makes of its values is not understood; use match: none")
    return rows


def head_weights(model: PreTrainedModel, matrix: str) -> tuple[Tensor, Tensor, list[str]]:
    """Weights (n, d_head, d) of all heads of a map, float32; the block of each (n,) int64; and names, PATH[HEAD].

    matrix: role (q, k, v, o) or leaf name of the map, which heads divide by rows, or o by columns. InputError if no
    block has it, or blocks differ in its shape.
    """
    sites = [site for site in analyse(model).sites if matrix in (site.role, site.name.rpartition(".")[2])]
    if not sites:
        raise InputError(f"no block has a map '{matrix}' that is understood; see `llmcompress inspect`")
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    by_column = sites[0].role == "o"
    divided = sites[0].d_in if by_column else sites[0].d_out
    if len({(site.d_in, site.d_out) for site in sites}) > 1 or divided % width:
        raise InputError(f"'{matrix}': it does not divide into heads of {width} alike in all blocks")
    count = divided // width
    parts = []
    for site in sites:
        weight = model.get_submodule(site.name).get_parameter("weight").detach().float()
        rows = weight.T if site.transposed != by_column else weight
        parts.append(rows.reshape(count, width, -1))
    blocks = torch.tensor([site.block for site in sites]).repeat_interleave(count)
    return torch.cat(parts), blocks, [f"{site.name}[{head}]" for site in sites for head in range(count)]
