"""Low rank plus sparse: a weight's largest entries stay as they are, factors are recovered from the others.

W ≈ L + S: S holds what L misses at the largest entries of |W|, so that these are exact; L of rank r is recovered from
all other entries by a backend of the recovery port, which never sees the large ones (robust principal component
analysis with a known support: Candès, Li, Ma and Wright, 2011). Data-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from llmcompress.backends.choice import Backend
from llmcompress.backends.recovery.outliers import errors_beside_svd, largest_entries
from llmcompress.compressors.low_rank import naming
from llmcompress.compressors.ranks import rank_costs, rank_within
from llmcompress.compressors.whitening import checked_weight
from llmcompress.errors import RunError
from llmcompress.layers.sparse_low_rank import SparseLowRankLinear, index_dtype
from llmcompress.types import Budget, Compressed, Problem, Profile, Site


class SparseLowRankOptions(BaseModel, extra="forbid"):
    keep_outliers: float = Field(
        default=0.01, ge=0, lt=1, description="share of the entries, the largest, that are stored one by one"
    )
    recovery: Backend = Field(
        default_factory=lambda: Backend(name="matrix_completion"),
        description="backend that recovers the factors from the other entries",
    )

    BACKENDS: ClassVar[dict[str, str]] = {"recovery": "recovery"}


class SparseLowRank:
    """The compressor port. A kept entry costs its value and an index; every output a count."""

    Options: ClassVar[type[SparseLowRankOptions]] = SparseLowRankOptions
    needs: frozenset[str] = frozenset()

    def __init__(self, options: SparseLowRankOptions | None = None) -> None:
        self.options = options or SparseLowRankOptions()

    def units(self, sites: Sequence[Site]) -> list[list[Site]]:
        return [[site] for site in sites]

    def costs(self, sites: Sequence[Site]) -> Tensor:
        (site,) = sites
        index = index_dtype(site.d_in).itemsize / 2
        extra = self._entries(site) * (1 + index) + site.d_out * index
        costs = rank_costs(site.d_in, [site.d_out], pivoted=False)
        return costs + extra * (costs > 0)

    def _entries(self, site: Site) -> int:
        return round(self.options.keep_outliers * site.dense_values)

    def profile(self, problem: Problem) -> Profile:
        """The spectrum of the weight without its largest entries."""
        (site,) = problem.sites
        with naming(problem.name):
            weight = checked_weight(problem.weights[0])
            observed = ~largest_entries(weight, self.options.keep_outliers)
            spectrum = torch.linalg.svdvals(weight * observed).cpu()
        return Profile(problem.sites, spectrum, self.costs(problem.sites), site.dense_values)

    def plan(self, sites: Sequence[Site], budget: Budget) -> dict[str, Any]:
        with naming(sites[0].name):
            rank = self._rank(sites, budget)
        if rank is None:
            return {"rank": None, "values": float(sites[0].dense_values)}
        return {"rank": rank, "entries": self._entries(sites[0]), "values": float(self.costs(sites)[rank])}

    def _rank(self, sites: Sequence[Site], budget: Budget) -> int | None:
        """None where the budget holds the dense weight."""
        if budget.values >= sites[0].dense_values:
            return None
        return rank_within(self.costs(sites), budget.values)

    def compress(self, problem: Problem, budget: Budget, generator: torch.Generator) -> Compressed:
        (site,), (bias,) = problem.sites, problem.biases
        with naming(problem.name):
            rank = self._rank(problem.sites, budget)
            if rank is None:
                return Compressed([None], [f"{problem.name}: left dense, its budget holds the dense weight"])
            weight = checked_weight(problem.weights[0])
            mask = largest_entries(weight, self.options.keep_outliers)
            recovery = self.options.recovery.build("recovery")
            A, B = recovery.recover(weight.T.contiguous(), ~mask.T if mask.any() else None, rank, generator)
        dtype = problem.weights[0].dtype
        A, B = A.to(dtype), B.to(dtype)
        missed = weight - (A @ B).T.double()
        if not torch.isfinite(missed).all():
            raise RunError(f"{site.name}: a factor overflows {dtype}")
        errors = errors_beside_svd(weight.T, ~mask.T, A.double(), B.double())
        note = (
            f"{site.name}: {self.options.recovery.name}, rank {rank}: relative error {errors[0]:.4f} on the entries "
            f"that are not kept; SVD {errors[1]:.4f}, SVD with zeros for the kept ones {errors[2]:.4f}"
        )
        return Compressed([SparseLowRankLinear.from_factors(A, B, missed, mask, bias)], [note])
