"""Groups at random, of sizes that differ by one at most: what every grouping has to beat."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor

from llmcompress.backends.graphs.subspaces import contiguous_labels


class RandomOptions(BaseModel, extra="forbid"):
    pass


class RandomGroups:
    Options: ClassVar[type[RandomOptions]] = RandomOptions

    def __init__(self, options: RandomOptions) -> None:
        self.options = options

    def describe(self, weight: Tensor) -> Tensor:
        return weight.new_zeros(1)

    def groups(self, features: Tensor, count: int, generator: torch.Generator) -> Tensor:
        order = torch.randperm(len(features), generator=generator, device=features.device)
        return contiguous_labels(len(features), count).to(order.device)[order]
