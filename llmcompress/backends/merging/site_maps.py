"""The maps of a model's blocks, as matching takes them, from what a compressor or an analysis is given: its sites."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.backends.merging.block_matching import Maps
from llmcompress.errors import InputError
from llmcompress.models.heads import Heads
from llmcompress.types import ATTENTION_ROLES, FFN_ROLES, Site

WITH_BIAS = ("q", "k", "v", "gate", "up", "gate_up")  # roles whose bias follows the order of the rows


def site_maps(
    sites: Sequence[Site], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[list[dict[str, Tensor]], Heads | None]:
    """The maps of every block in turn, and the heads that they have in common, None where attention is not whole.

    sites: of blocks of one layout; weights (d_out, d_in). InputError naming a site whose weight is not finite.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for site, weight, bias in zip(sites, weights, biases, strict=True):
        if not torch.isfinite(weight).all():
            raise InputError(f"{site.name}: its weight is not finite")
        follows = bias is not None and site.role in WITH_BIAS
        full = torch.cat((weight, bias[:, None].to(weight)), 1) if follows and bias is not None else weight
        maps = found.setdefault(site.block, {})
        if site.role == "gate_up":
            maps["gate"], maps["up"] = full.chunk(2)
        else:
            maps[site.role] = full
    first = {site.role: site for site in sites if site.block == sites[0].block}
    if not {"q", "k", "v", "o"} <= first.keys() or not first["o"].d_head:
        return list(found.values()), None
    q, k, v = (first[role].d_out for role in ("q", "k", "v"))
    width, d_head = first["o"].d_in, first["o"].d_head
    return list(found.values()), Heads.plain(q, k, v, width, width // d_head, v // d_head)


def check_whole(sites: Sequence[Site]) -> None:
    """InputError unless a block's sites are whole: neurons and heads are reordered in all maps that see them."""
    targeted = {site.role for site in sites}
    if "other" in targeted or "qkv" in targeted:
        name = next(site.name for site in sites if site.role in ("other", "qkv"))
        raise InputError(f"{name}: its heads cannot be aligned; target ffn, or use match: false")
    for part, roles in (("attention", ATTENTION_ROLES), ("ffn", FFN_ROLES)):
        all_roles = {role for role in sites[0].block_roles if role in roles}
        if targeted & all_roles and not all_roles <= targeted:
            missing = ", ".join(sorted(all_roles - targeted))
            raise InputError(f"{sites[0].name}: target {part} as a whole, {missing} too, or use match: false")
    heads = next((site for site in sites if site.role == "o"), None)
    if heads is not None and not heads.d_head:
        raise InputError(f"{heads.name}: its heads are not understood; target ffn, or use match: false")


def cosine(blocks: Sequence[Maps]) -> float:
    """Mean cosine of the first block's maps with the others'."""
    vectors = [torch.cat([block[role].double().flatten() for role in blocks[0]]) for block in blocks]
    found = [float(torch.nn.functional.cosine_similarity(vectors[0], other, dim=0)) for other in vectors[1:]]
    return sum(found) / len(found)
