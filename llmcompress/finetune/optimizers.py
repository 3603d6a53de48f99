"""AdamW, and how a fine-tuning recipe names an optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from pydantic import BaseModel, Field
from torch import nn

from llmcompress import catalog
from llmcompress.recipe import Optimizer as Choice

Named = Sequence[tuple[str, nn.Parameter]]


class OptimizerFactory(Protocol):
    """An entry of kind `optimizer`. It is built from its options."""

    def build(self, parameters: Named, lr: float) -> torch.optim.Optimizer:
        """The optimiser of the named parameters, so that it may treat matrices apart from the rest."""


class AdamWOptions(BaseModel, extra="forbid"):
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the mean of the gradients")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="decay of the mean of their squares")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the mean square")
    weight_decay: float = Field(default=0.0, ge=0, description="share of a weight taken off, times the learning rate")


class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101), torch's own."""

    Options: ClassVar[type[AdamWOptions]] = AdamWOptions

    def __init__(self, options: AdamWOptions | None = None) -> None:
        self.options = options or AdamWOptions()

    def build(self, parameters: Named, lr: float) -> torch.optim.Optimizer:
        options = self.options
        return torch.optim.AdamW(
            [parameter for _, parameter in parameters], lr, (options.beta1, options.beta2), options.eps,
            options.weight_decay,
        )  # fmt: skip


def build_optimizer(choice: Choice, parameters: Named, lr: float) -> torch.optim.Optimizer:
    """The optimiser that a recipe names. InputError offers the nearest name for an unknown one.

    Parameters with an attribute `lr_share` have that share of the learning rate, and no weight decay.
    """
    entry = catalog.get("optimizer", choice.name).load()
    optimizer: torch.optim.Optimizer = entry(entry.Options(**choice.options)).build(parameters, lr)
    shares: set[float] = {getattr(p, "lr_share", 1.0) for _, p in parameters}
    for share in sorted(shares - {1.0}):
        apart = [p for _, p in parameters if getattr(p, "lr_share", None) == share]
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if getattr(p, "lr_share", None) != share]
        optimizer.add_param_group({"params": apart, "lr": share * lr, "weight_decay": 0.0})
    return optimizer
