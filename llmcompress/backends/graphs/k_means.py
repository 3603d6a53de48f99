"""K-means on subspace affinities: members that read alike inputs belong together."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from llmcompress.backends.graphs.subspaces import affinities, sketch


class KMeansOptions(BaseModel, extra="forbid"):
    rank: int = Field(default=16, ge=1, description="leading right singular directions that stand for a weight")
    n_init: int = Field(default=20, ge=1, description="k-means++ starts, of which the best is kept")


class KMeansGroups:
    Options: ClassVar[type[KMeansOptions]] = KMeansOptions

    def __init__(self, options: KMeansOptions) -> None:
        self.options = options

    def describe(self, weight: Tensor) -> Tensor:
        return sketch(weight, min(self.options.rank, *weight.shape))

    def groups(self, features: Tensor, count: int, generator: torch.Generator) -> Tensor:
        return k_means(affinities(features), count, self.options.n_init, generator).to(features.device)


def k_means(rows: Tensor, count: int, n_init: int, generator: torch.Generator) -> Tensor:
    """Labels (n,) int64 of rows (n, d) by scikit-learn's k-means, seeded from the generator."""
    from sklearn.cluster import KMeans

    seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
    found = KMeans(count, n_init=n_init, random_state=seed).fit_predict(rows.double().cpu().numpy())
    return torch.as_tensor(found).long()
