"""Which axes of which parameters are permuted together, and what a permutation makes of a model's state.

Source: the specification is that of Git Re-Basin (Ainsworth et al., arXiv 2209.04836, appendix).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from llmcompress.errors import InputError

State = Mapping[str, Tensor]
Permutation = dict[str, Tensor]  # group -> (n,) int64: place i takes what was at index[i]

CHUNK = 2**22  # entries that are turned to float64 at a time


@dataclass(frozen=True)
class PermutationSpec:
    """axes[parameter]: the group of each of its axes, None for an axis that stays as it is.

    unmatched: tensors that are permuted like the others and have no part in matching, as batch norm's statistics.
    InputError if a group stands on two axes of one parameter: its match would not be a linear assignment.
    """

    axes: Mapping[str, tuple[str | None, ...]]
    unmatched: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name, groups in self.axes.items():
            found = [group for group in groups if group is not None]
            if len(set(found)) < len(found):
                raise InputError(f"{name}: one group stands on two of its axes: {groups}")

    @property
    def groups(self) -> list[str]:
        """In the order in which the parameters name them."""
        return list(dict.fromkeys(group for groups in self.axes.values() for group in groups if group is not None))

    def members(self, group: str) -> list[tuple[str, int]]:
        """The parameters that match the group, each with the axis on which it stands."""
        return [
            (name, axis)
            for name, groups in self.axes.items()
            for axis, found in enumerate(groups)
            if found == group and name not in self.unmatched
        ]

    def neighbours(self, group: str) -> set[str]:
        """The other groups that share a parameter with this one."""
        shared = [self.axes[name] for name, _ in self.members(group)]
        return {other for groups in shared for other in groups if other is not None} - {group}

    def sizes(self, state: State) -> dict[str, int]:
        """Length of every group. InputError if the state lacks a parameter, or axes of a group differ in length."""
        found: dict[str, tuple[int, str]] = {}
        for name, groups in self.axes.items():
            if name not in state:
                raise InputError(f"{name}: in the specification, but not in the model")
            if state[name].ndim != len(groups):
                raise InputError(f"{name}: {state[name].ndim} axes, {len(groups)} in the specification")
            for axis, group in enumerate(groups):
                if group is not None:
                    length = state[name].shape[axis]
                    known, first = found.setdefault(group, (length, name))
                    if known != length:
                        raise InputError(f"{name}: axis {axis} of group '{group}' is {length} long, {first}'s {known}")
        unknown = [name for name in state if name not in self.axes]
        if unknown:
            raise InputError(f"{unknown[0]}: in the model, but not in the specification")
        return {group: length for group, (length, _) in found.items()}

    def identity(self, state: State) -> Permutation:
        return {group: torch.arange(length) for group, length in self.sizes(state).items()}

    def random(self, state: State, generator: torch.Generator) -> Permutation:
        """A uniformly drawn element of the group."""
        return {group: torch.randperm(length, generator=generator) for group, length in self.sizes(state).items()}

    def apply(self, state: State, permutation: Permutation) -> dict[str, Tensor]:
        """The state with every axis in the order that its group's index gives; the same function of its input.

        InputError if an index is no bijection.
        """
        for group, length in self.sizes(state).items():
            check_bijection(group, permutation.get(group), length)
        return {name: self.apply_to(name, tensor, permutation) for name, tensor in state.items()}

    def apply_to(self, name: str, tensor: Tensor, permutation: Permutation, without: str | None = None) -> Tensor:
        """One parameter, all its groups applied but `without`."""
        for axis, group in enumerate(self.axes[name]):
            if group is not None and group != without:
                tensor = tensor.index_select(axis, permutation[group].to(tensor.device))
        return tensor


def mlp_spec(n_hidden: int) -> PermutationSpec:
    """That of nn.Sequential(Linear, activation, Linear, ..., Linear) with `n_hidden` hidden layers: `0.weight`, ..."""
    groups = [None, *[f"hidden{i}" for i in range(n_hidden)], None]
    axes: dict[str, tuple[str | None, ...]] = {}
    for index in range(n_hidden + 1):
        axes[f"{2 * index}.weight"] = (groups[index + 1], groups[index])
        axes[f"{2 * index}.bias"] = (groups[index + 1],)
    return PermutationSpec(axes)


def chain_spec(state: State) -> PermutationSpec:
    """That of a plain chain of linear maps or convolutions, batch norms between them, from its state's order.

    Axis 1 of a weight reads what axis 0 of the weight before it makes; tensors of one axis follow the weight before
    them; the last weight's outputs stay. InputError where a weight does not fit the one before it.
    """
    weights = [name for name, tensor in state.items() if tensor.ndim >= 2]
    axes: dict[str, tuple[str | None, ...]] = {}
    group, width = None, None
    for name, tensor in state.items():
        if tensor.ndim >= 2:
            if width is not None and tensor.shape[1] != width:
                raise InputError(f"{name}: reads {tensor.shape[1]} channels, the weight before it makes {width}")
            made = f"channels{weights.index(name)}" if name != weights[-1] else None
            axes[name] = (made, group, *[None] * (tensor.ndim - 2))
            group, width = made, tensor.shape[0]
        else:
            axes[name] = (group,) * tensor.ndim
    return PermutationSpec(axes, frozenset(name for name in axes if name.endswith(("running_mean", "running_var"))))


def check_bijection(group: str, index: Tensor | None, length: int) -> None:
    """InputError unless `index` holds every place of 0..length-1 once."""
    if index is None or index.shape != (length,) or not torch.equal(index.sort().values.cpu(), torch.arange(length)):
        raise InputError(f"group '{group}': not a permutation of its {length} places")


def check_states(states: Sequence[State]) -> None:
    """InputError naming the first tensor that two models have not in common, not in one shape, or not finite."""
    if len(states) < 2:
        raise InputError(f"matching needs at least 2 models; got {len(states)}")
    first = states[0]
    for number, state in enumerate(states[1:], 2):
        for name in [*first, *state]:
            if name not in first or name not in state:
                raise InputError(f"{name}: only in model {number if name in state else 1} of 1 and {number}")
            if first[name].shape != state[name].shape:
                shapes = tuple(first[name].shape), tuple(state[name].shape)
                raise InputError(f"{name}: shape {shapes[0]} in model 1, {shapes[1]} in model {number}")
    for number, state in enumerate(states, 1):
        for name, tensor in state.items():
            if not torch.isfinite(tensor).all():
                raise InputError(f"{name}: not finite in model {number}")


def cross(a: Tensor, b: Tensor, axis: int) -> Tensor:
    """Inner products (n, n), float64, of the slices of two equally shaped tensors along an axis of length n."""
    left, right = (tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1) for tensor in (a, b))
    total = torch.zeros(len(left), len(left), dtype=torch.float64, device=a.device)
    step = max(1, CHUNK // len(left))
    for start in range(0, left.shape[1], step):
        total += left[:, start : start + step].double() @ right[:, start : start + step].double().T
    return total


def squared_distance(a: Tensor, b: Tensor) -> float:
    """||a - b||² of two equally shaped tensors, in float64."""
    pairs = zip(a.reshape(-1).split(CHUNK), b.reshape(-1).split(CHUNK), strict=True)
    return sum(float((left.double() - right.double()).square().sum()) for left, right in pairs)


def assign(gains: Tensor) -> Tensor:
    """The index (n,) that maximises the sum of gains[i, index[i]]; gains (n, n)."""
    _, index = linear_sum_assignment(gains.cpu().numpy(), maximize=True)
    return torch.from_numpy(index).long()


def taken(gains: Tensor, index: Tensor) -> float:
    """Sum of gains[i, index[i]]."""
    return float(gains.cpu()[torch.arange(len(index)), index].sum())
