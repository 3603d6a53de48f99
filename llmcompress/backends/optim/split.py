"""Matrices to one optimiser, all other parameters to AdamW, both behind the face of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

#: parts of the names of embeddings and heads, in transformers' models
ENDS = ("lm_head", "head", "wte", "wpe", "embed_out", "shared")


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Those of the model that a matrix optimiser takes, and the others: embeddings, head, norms, biases."""
    matrix, other = split_named(model.named_parameters())
    return [parameter for _, parameter in matrix], [parameter for _, parameter in other]


def split_named(
    parameters: Iterable[tuple[str, nn.Parameter]],
) -> tuple[list[tuple[str, nn.Parameter]], list[tuple[str, nn.Parameter]]]:
    """The same by the parameters' names."""
    matrix: list[tuple[str, nn.Parameter]] = []
    other: list[tuple[str, nn.Parameter]] = []
    for name, parameter in parameters:
        ends = any(part in ENDS or "embed" in part for part in name.split("."))
        (other if ends or parameter.ndim < 2 else matrix).append((name, parameter))
    return matrix, other


class Together(Optimizer):
    """Several optimisers as one: their groups and states are its own, so that schedules and checkpoints see all."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__(groups[:1], {})
        self.param_groups = groups  # the very dictionaries of the parts, some of which name their parameters
        self._share()

    def _share(self) -> None:
        first = 0
        for part in self.parts:
            count = len(part.param_groups)
            part.state = self.state
            part.param_groups = self.param_groups[first : first + count]
            first += count

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def with_adamw(
    parameters: Sequence[tuple[str, nn.Parameter]], other_lr: float,
    build: Callable[[list[tuple[str, nn.Parameter]]], Optimizer],
) -> Optimizer:  # fmt: skip
    """`build`'s optimiser for the matrices, with AdamW of that learning rate beside it where there is anything else."""
    matrix, other = split_named(parameters)
    parts = [build(matrix)] if matrix else []
    if other:
        parts.append(AdamW([parameter for _, parameter in other], other_lr, weight_decay=0.0))
    return parts[0] if len(parts) == 1 else Together(parts)
