"""Uniform rows without replacement: what every other sampler is compared with."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from llmcompress.backends.ports import Sample


class UniformOptions(BaseModel, extra="forbid"):
    n_samples: int = Field(default=4096, ge=1, description="rows kept of each input")


class Uniform:
    Options: ClassVar[type[UniformOptions]] = UniformOptions

    def __init__(self, options: UniformOptions) -> None:
        self.options = options

    def sample(self, rows: Tensor, generator: torch.Generator) -> Sample:
        kept = min(self.options.n_samples, len(rows))
        indices = torch.randperm(len(rows), generator=generator, device=rows.device)[:kept]
        weights = torch.full((kept,), len(rows) / kept, dtype=torch.float64, device=rows.device)
        return Sample(indices.sort().values, weights)
