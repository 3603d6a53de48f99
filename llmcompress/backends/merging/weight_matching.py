"""Permutations that align one model's weights, or activations, to another's; merging of two models and of many.

Sources: Git Re-Basin (Ainsworth, Hayase, Srinivasa, arXiv 2209.04836), algorithm 1 and section 3; Ito, Yamada, Kumagai
(arXiv 2402.04051) for the merging of many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmcompress.backends.merging.permutations import (
    CHUNK,
    Permutation,
    PermutationSpec,
    State,
    assign,
    check_states,
    cross,
    squared_distance,
    taken,
)  # fmt: skip
from llmcompress.errors import InputError

GAIN = 1e-9  # of the largest inner product: a smaller gain is rounding


@dataclass
class Matching:
    """permutation: aligns b to a. objective: <a, pi(b)> at the start and after every accepted group, never falling.

    sweeps: passes over the groups; a group is passed over while none that shares a parameter with it has changed.
    """

    permutation: Permutation
    objective: list[float] = field(default_factory=list)
    sweeps: int = 0


def weight_matching(
    spec: PermutationSpec, a: State, b: State, seed: int = 0, max_iter: int = 100, init: Permutation | None = None
) -> Matching:
    """Coordinate descent on <a, pi(b)>, group by group in random order: each is a linear assignment, the others fixed.

    a and b: states with the same names and shapes. init: where it starts, the identity if absent.
    InputError naming the first tensor that differs, is not finite or does not fit the specification.
    Source: arXiv 2209.04836, algorithm 1.
    """
    check_states([a, b])
    permutation = dict(init) if init is not None else spec.identity(a)
    moved = spec.apply(b, permutation)
    objective = [sum(float((a[name].double() * moved[name].double()).sum()) for name in a)]
    generator = torch.Generator().manual_seed(seed)
    found = Matching(permutation, objective)
    open_groups = set(spec.groups)  # those whose problem has changed since they were matched
    while open_groups and found.sweeps < max_iter:
        found.sweeps += 1
        for index in torch.randperm(len(spec.groups), generator=generator).tolist():
            group = spec.groups[index]
            if group not in open_groups:
                continue
            open_groups.remove(group)
            gains = torch.stack([
                cross(a[name], spec.apply_to(name, b[name], permutation, without=group), axis)
                for name, axis in spec.members(group)
            ]).sum(0)  # fmt: skip
            best = assign(gains)
            gain = taken(gains, best) - taken(gains, permutation[group])
            if gain > GAIN * float(gains.abs().max()):
                permutation[group] = best
                objective.append(objective[-1] + gain)
                open_groups |= spec.neighbours(group)
    return found


def activation_matching(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Permutation:
    """The permutation of every group that maximises the inner products of hidden activations on the same rows.

    a[group], b[group]: (rows, n). InputError for other groups or shapes, or activations that are not finite.
    Source: arXiv 2209.04836, section 3.1.
    """
    check_states([a, b])
    return {group: assign(cross(a[group], b[group], -1)) for group in a}


def merge(a: State, b: State, lam: float = 0.5) -> dict[str, Tensor]:
    """(1 - lam) a + lam b, each tensor in its own dtype. InputError unless 0 <= lam <= 1, or if the states differ."""
    if not 0 <= lam <= 1:
        raise InputError(f"lam must be in [0, 1], the share of the second model; got {lam}")
    check_states([a, b])
    return {name: weighted_mean([a[name], b[name]], [1 - lam, lam]) for name in a}


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum of weights times tensors, added in float64: equal tensors come back as they are. Integers: the first's."""
    if not tensors[0].is_floating_point():
        return tensors[0]
    flat = [tensor.reshape(-1) for tensor in tensors]
    mean = torch.empty_like(flat[0])
    for start in range(0, len(mean), CHUNK):
        parts = [tensor[start : start + CHUNK].double() for tensor in flat]
        mean[start : start + CHUNK] = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    return mean.view(tensors[0].shape)


@dataclass
class ManyMerged:
    """state: the mean of the matched models. permutations: one a model.

    scatter: summed squared distance of the models to their mean, at the start and after every round.
    """

    state: dict[str, Tensor]
    permutations: list[Permutation]
    scatter: list[float]


def merge_many(spec: PermutationSpec, models: Sequence[State], seed: int = 0, max_rounds: int = 100) -> ManyMerged:
    """Mean of models, each replaced again and again by its match to the mean of the others until no distance falls.

    InputError for fewer than 2 models, or models that differ. Source: arXiv 2209.04836, MergeMany (algorithm 3).
    """
    check_states(models)
    generator = torch.Generator().manual_seed(seed)
    permutations = [spec.identity(models[0]) for _ in models]
    moved = [dict(model) for model in models]
    scatter = [_scatter(moved)]
    changed = True
    while changed and len(scatter) <= max_rounds:
        changed = False
        for index in torch.randperm(len(models), generator=generator).tolist():
            others = _mean([model for i, model in enumerate(moved) if i != index])
            found = weight_matching(spec, others, models[index], seed, init=permutations[index])
            if len(found.objective) > 1:
                permutations[index] = found.permutation
                moved[index] = spec.apply(models[index], found.permutation)
                changed = True
        scatter.append(_scatter(moved))
    return ManyMerged(_mean(moved), permutations, scatter)


def _mean(models: Sequence[State]) -> dict[str, Tensor]:
    weights = [1 / len(models)] * len(models)
    return {name: weighted_mean([model[name] for model in models], weights) for name in models[0]}


def _scatter(models: Sequence[State]) -> float:
    mean = _mean(models)
    return sum(squared_distance(model[name], mean[name]) for model in models for name in mean)
