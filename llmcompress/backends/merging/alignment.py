"""An element of a transformer's symmetry group, and the views of a model's tensors that it gives.

A model is read as a function from a parameter's name to its tensor, so that one tensor at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.backends.merging.block_matching import BlockMatch
from llmcompress.backends.merging.permutations import check_bijection
from llmcompress.backends.merging.weight_matching import weighted_mean
from llmcompress.errors import InputError
from llmcompress.models.symmetry import RESIDUAL, Block, Groups

Read = Callable[[str], Tensor]


@dataclass
class Alignment:
    """index[group] (n,) int64: place i takes what was at index[i]; the residual stream's is `residual`.

    sign (d,) ±1, of the residual stream, by the new places. rotation (d, d) float64 takes the place of the residual
    stream's index and signs: x becomes rotation @ x, and gains must have been folded away.
    """

    index: dict[str, Tensor]
    sign: Tensor
    rotation: Tensor | None = None

    @classmethod
    def identity(cls, groups: Groups) -> Alignment:
        index = {RESIDUAL: torch.arange(groups.width)}
        for block in groups.blocks:
            match = BlockMatch.identity(block.sites["down"].d_in, block.heads)
            index |= block_index(block, match)
        return cls(index, torch.ones(groups.width))

    @classmethod
    def random(cls, groups: Groups, generator: torch.Generator, signed: bool) -> Alignment:
        """A drawn element. signed: with sign flips. InputError if the norms do not allow them."""
        if signed:
            check_signed(groups)
        found = cls.identity(groups)
        found.index[RESIDUAL] = torch.randperm(groups.width, generator=generator)
        if signed:
            found.sign = torch.randint(0, 2, (groups.width,), generator=generator) * 2.0 - 1
        for block in groups.blocks:
            match = BlockMatch.random(block.sites["down"].d_in, block.heads, generator)
            found.index |= block_index(block, match)
        return found

    @property
    def is_identity(self) -> bool:
        places = all(torch.equal(index, torch.arange(len(index))) for index in self.index.values())
        return places and self.rotation is None and bool((self.sign == 1).all())

    def apply_to(self, name: str, tensor: Tensor, groups: Groups) -> Tensor:
        """A parameter of the aligned model; a rotation is applied in float64, and the result is in its dtype."""
        for axis, group in enumerate(groups.axes.get(name, ())):
            if group == RESIDUAL and self.rotation is not None:
                if name not in groups.gains:
                    rotation = self.rotation.to(tensor.device)
                    moved = tensor.movedim(axis, -1).double() @ rotation.T
                    tensor = moved.movedim(-1, axis).to(tensor.dtype)
            elif group is not None:
                tensor = tensor.index_select(axis, self.index[group].to(tensor.device))
                if group == RESIDUAL and name not in groups.gains:
                    shape = [-1 if a == axis else 1 for a in range(tensor.ndim)]
                    tensor = tensor * self.sign.to(tensor).view(shape)
        return tensor


def block_index(block: Block, match: BlockMatch) -> dict[str, Tensor]:
    """A block's match as the indices of its parameters' axes; fused maps get one index of all their rows."""
    heads = block.heads
    index = {f"{block.index}.ffn": match.ffn}
    if "gate_up" in block.sites:
        index[block.group("gate_up")] = torch.cat((match.ffn, match.ffn + len(match.ffn)))
    for role, rows in (("q", heads.q), ("k", heads.k), ("v", heads.v), ("o", heads.o)):
        name = role if role in block.sites else "qkv"
        site = block.sites[name]
        full = index.setdefault(block.group(name), torch.arange(site.d_in if role == "o" else site.d_out))
        places = rows.flatten()
        full[places] = places[match.places(role, heads)]
    return index


def aligned(read: Read, groups: Groups, alignment: Alignment) -> Read:
    """The aligned model's tensors."""
    return lambda name: alignment.apply_to(name, read(name), groups)


def folded(read: Read, groups: Groups) -> Read:
    """The model with the residual stream's gains folded into the weights that follow them; the same function.

    InputError if they cannot be folded.
    """
    check_orthogonal(groups)
    gain_of = {weight: (gain, neutral) for gain, (neutral, weights) in groups.folds.items() for weight in weights}

    def one(name: str) -> Tensor:
        tensor = read(name)
        if name in groups.folds:
            return torch.full_like(tensor, groups.folds[name][0])
        if name not in gain_of:
            return tensor
        gain, neutral = gain_of[name]
        scale = read(gain).double() + (1 - neutral)
        axis = groups.axes[name].index(RESIDUAL)
        return (tensor.double() * scale.view([-1 if a == axis else 1 for a in range(tensor.ndim)])).to(tensor.dtype)

    return one


def mean(reads: Sequence[Read], weights: Sequence[float]) -> Read:
    """Weighted mean of models."""
    return lambda name: weighted_mean([read(name) for read in reads], weights)


def check_signed(groups: Groups) -> None:
    if not groups.flips:
        raise InputError("match: signs cannot flip in this model, whose norms subtract a mean; use signed: false")


def check_orthogonal(groups: Groups) -> None:
    if groups.no_fold is not None:
        raise InputError(f"match: the residual stream cannot be rotated: {groups.no_fold}; use signed: true")


def check_alignment(alignment: Alignment, groups: Groups) -> None:
    """InputError naming the group whose index is no bijection, or whose signs are not all 1 or -1."""
    for group, index in Alignment.identity(groups).index.items():
        check_bijection(group, alignment.index.get(group), len(index))
    if alignment.sign.shape != (groups.width,) or not bool((alignment.sign.abs() == 1).all()):
        raise InputError(f"the signs must be {groups.width} values of 1 or -1")
