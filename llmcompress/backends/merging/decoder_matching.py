"""Matching a transformer to another one: residual stream, then every block, until nothing changes.

The residual stream is an assignment of channels, with their signs where norms allow it, or an orthogonal map
(Procrustes). It is first chosen by what lies outside the blocks, whose other axis the vocabulary fixes: products of
blocks whose neurons and heads stand in unrelated orders are noise, and hold the search at a worse match. Sources: Git
Re-Basin's coordinate descent (arXiv 2209.04836) on the symmetries of arXiv 2502.00264 and 2506.22712.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmcompress.backends.merging.alignment import (
    Alignment,
    Read,
    aligned,
    block_index,
    check_alignment,
    check_orthogonal,
    check_signed,
)  # fmt: skip
from llmcompress.backends.merging.block_matching import GAIN, match_layers
from llmcompress.backends.merging.permutations import assign, cross
from llmcompress.models.symmetry import RESIDUAL, Block, Groups


@dataclass
class Matched:
    """alignment of b to a. sweeps: how often all was visited; gains: what each accepted step added to <a, pi(b)>."""

    alignment: Alignment
    sweeps: int = 0
    gains: list[float] = field(default_factory=list)


def match_decoder(
    groups: Groups,
    a: Read,
    b: Read,
    signed: bool = True,
    orthogonal: bool = False,
    max_iter: int = 20,
    init: Alignment | None = None,
    visit: Callable[[str], None] = lambda _: None,
    swept: Callable[[Alignment], None] = lambda _: None,
) -> Matched:
    """The element of the symmetry group that aligns b to a, by coordinate descent from `init`, or the identity.

    No step lowers <a, pi(b)>.

    a, b: parameters by name, (see `folded` where `orthogonal`); memory holds the residual stream's inner products
    (d, d) in float64 and one block of each. signed: sign flips of the residual stream too. visit(part) is called for
    every part that is visited, swept(alignment) behind every sweep that changed something.
    InputError if the model does not allow flips (a rotation). Errors of a and b pass through.
    """
    if signed and not orthogonal:
        check_signed(groups)
    if orthogonal:
        check_orthogonal(groups)
    start = init or Alignment.identity(groups)
    check_alignment(start, groups)
    found = Matched(Alignment(dict(start.index), start.sign.clone(), start.rotation))
    ends = _Products.zero(groups.width)
    for name in groups.outside():
        ends.add(groups, name, a, b)
        visit(name)
    changed = True
    while changed and found.sweeps < max_iter:
        found.sweeps += 1
        fresh = found.sweeps == 1 and start.is_identity
        changed = _match_residual(groups, a, b, ends, found, signed, orthogonal, fresh, visit)
        if changed or found.sweeps == 1:
            for block in groups.blocks:
                changed |= _match_block(groups, block, a, b, found, visit)
        if changed:
            swept(found.alignment)
    return found


@dataclass
class _Products:
    """Inner products (d, d) of the residual channels of a and b: of matrices and biases (S), and of gains (N)."""

    matrices: Tensor
    gains: Tensor

    @classmethod
    def zero(cls, width: int) -> _Products:
        return cls(torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64))

    def copy(self) -> _Products:
        return _Products(self.matrices.clone(), self.gains.clone())

    def add(self, groups: Groups, name: str, a: Read, b: Read) -> None:
        """One parameter; one that has the stream on both axes has no part in a linear assignment."""
        axes = groups.axes[name]
        if axes.count(RESIDUAL) == 1:
            product = cross(a(name), b(name), axes.index(RESIDUAL)).cpu()
            (self.gains if name in groups.gains else self.matrices).add_(product)


@dataclass
class _Stream:
    """An element of the residual stream's group: a rotation (d, d), or the order of channels and their signs."""

    index: Tensor
    sign: Tensor
    rotation: Tensor | None

    @classmethod
    def best(cls, products: _Products, signed: bool, orthogonal: bool) -> _Stream:
        """That of the largest worth: Procrustes, or an assignment on |S| + N (S + N without signs)."""
        matrices = products.matrices
        places = torch.arange(len(matrices))
        if orthogonal:
            u, _, vh = torch.linalg.svd(matrices)
            return cls(places, torch.ones(len(matrices)), u @ vh)
        index = assign((matrices.abs() if signed else matrices) + products.gains)
        sign = torch.ones(len(matrices))
        sign[signed & (matrices[places, index] < 0)] = -1
        return cls(index, sign, None)

    def worth(self, products: _Products) -> float:
        """The part of <a, pi(b)> that depends on this element; gains keep their signs, and are ones if rotated."""
        if self.rotation is not None:
            return float((self.rotation * products.matrices).sum())
        places = torch.arange(len(self.index))
        on_matrices = self.sign.double() * products.matrices[places, self.index]
        return float((on_matrices + products.gains[places, self.index]).sum())


def _match_residual(
    groups: Groups,
    a: Read,
    b: Read,
    ends: _Products,
    found: Matched,
    signed: bool,
    orthogonal: bool,
    fresh: bool,
    visit: Callable[[str], None],
) -> bool:
    """Whether the residual stream's element changed; `ends` holds what no block's match changes.

    fresh: the blocks' orders are still unknown, so what suits the ends comes first, if all together gains by it.
    """
    alignment = found.alignment
    inner = Alignment({**alignment.index, RESIDUAL: torch.arange(groups.width)}, torch.ones(groups.width))
    moved = aligned(b, groups, inner)
    total = ends.copy()
    for block in groups.blocks:
        for name in parameters(groups, block):
            total.add(groups, name, a, moved)
        visit(f"residual stream, block {block.index}")
    rotation = alignment.rotation
    if orthogonal and rotation is None:
        rotation = torch.eye(groups.width, dtype=torch.float64)
    now = _Stream(alignment.index[RESIDUAL], alignment.sign, rotation).worth(total)
    least = GAIN * float((total.matrices.abs() + total.gains.abs()).max())
    for products in (ends, total) if fresh else (total,):
        best = _Stream.best(products, signed, orthogonal)
        gain = best.worth(total) - now
        if gain > least:
            alignment.index[RESIDUAL], alignment.sign, alignment.rotation = best.index, best.sign, best.rotation
            found.gains.append(gain)
            return True
    return False


def _match_block(groups: Groups, block: Block, a: Read, b: Read, found: Matched, visit: Callable[[str], None]) -> bool:
    alignment = found.alignment
    match, gain = match_layers(
        block_maps(groups, block, a), block_maps(groups, block, aligned(b, groups, alignment)), block.heads
    )
    visit(f"block {block.index}")
    if match.is_identity:
        return False
    for group, index in block_index(block, match).items():
        alignment.index[group] = alignment.index[group][index]
    found.gains.append(gain)
    return True


def parameters(groups: Groups, block: Block) -> list[str]:
    """Names of a block's maps and biases."""
    names = [f"{site.name}.{part}" for site in block.sites.values() for part in ("weight", "bias")]
    return [name for name in names if name in groups.axes]


def block_maps(groups: Groups, block: Block, read: Read) -> dict[str, Tensor]:
    """A block's maps as `match_layers` takes them: unfused, heads in order, biases of rows as one more column."""
    maps: dict[str, Tensor] = {}
    for role, site in block.sites.items():
        weight = read(f"{site.name}.weight")
        weight = weight.T if site.transposed else weight
        if site.bias and role not in ("o", "down"):
            weight = torch.cat((weight, read(f"{site.name}.bias")[:, None]), 1)
        maps[role] = weight
    if "gate_up" in maps:
        maps["gate"], maps["up"] = maps.pop("gate_up").chunk(2)
    fused = maps.pop("qkv", None)
    for role in ("q", "k", "v"):
        source = maps[role] if fused is None else fused
        maps[role] = source[getattr(block.heads, role).flatten().to(source.device)]
    maps["o"] = maps["o"][:, block.heads.o.flatten().to(maps["o"].device)]
    return maps
