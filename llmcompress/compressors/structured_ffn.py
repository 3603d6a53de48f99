"""Structured feed-forward layers: low rank, BlockDense and BlockShuffle (arXiv 2406.16450).

A trained weight is projected onto the structure; a model that is trained from scratch starts from `random_layer`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from llmcompress.compressors.block_projection import (
    block_dense_spectrum,
    block_shuffle_spectrum,
    project_block_dense,
    project_block_shuffle,
    relative_output_error,
)
from llmcompress.compressors.low_rank import Whitened, naming
from llmcompress.compressors.svd import svd_factorize
from llmcompress.compressors.svd_llm import svd_llm_factorize, whitened
from llmcompress.compressors.whitening import checked_weight
from llmcompress.errors import InputError, RunError
from llmcompress.layers.base import StructuredLinear
from llmcompress.layers.block import BlockDenseLinear, BlockShuffleLinear, check_divides
from llmcompress.layers.low_rank import LowRankLinear
from llmcompress.types import ATTENTION_ROLES, Budget, Compressed, Problem, Profile, Site

Structure = Literal["low_rank", "block_dense", "block_shuffle"]


class StructuredFFNOptions(BaseModel, extra="forbid"):
    structure: Structure = Field(default="block_dense", description="what a weight is stored as")
    num_blocks: int = Field(default=2, ge=1, description="blocks of block_dense and block_shuffle")
    projection: Literal["gram", "frobenius"] = Field(
        default="gram", description="nearest in the layer's outputs on the calibration text, or in the weights alone"
    )
    sweeps: int = Field(default=0, ge=0, description="gram: times that each block is fitted again, given the others")

    @model_validator(mode="after")
    def _sweeps_have_a_gram(self) -> StructuredFFNOptions:
        if self.sweeps and (self.projection == "frobenius" or self.structure == "low_rank"):
            raise ValueError("sweeps: low_rank and the frobenius projection are the optimum without; leave it out")
        return self


# --- sizes: a level is the least step of a structure's size, one rank a block ----------------------------------------


def level_values(structure: Structure, num_blocks: int, d_in: int, d_out: int) -> int:
    """Values stored a level. InputError unless the blocks divide what they must."""
    if structure == "low_rank":
        return d_in + d_out
    if structure == "block_dense":
        check_divides(num_blocks, d_in)
        return num_blocks * d_out + d_in
    check_divides(num_blocks, d_in, d_out)
    return num_blocks * (d_in + d_out)


def most_levels(structure: Structure, num_blocks: int, d_in: int, d_out: int) -> int:
    """The level at which a structure can hold any weight."""
    if structure == "low_rank":
        return min(d_in, d_out)
    return min(d_in // num_blocks, d_out if structure == "block_dense" else d_out // num_blocks)


def level_within(structure: Structure, num_blocks: int, d_in: int, d_out: int, values: float) -> int:
    """The largest level that stores at most `values`. InputError if not even the first fits."""
    least = level_values(structure, num_blocks, d_in, d_out)
    level = min(math.floor(values / least), most_levels(structure, num_blocks, d_in, d_out))
    if level < 1:
        blocks = "" if structure == "low_rank" else f" of {num_blocks} blocks"
        raise InputError(f"{values:.0f} values are less than the smallest {structure} layer{blocks} stores, {least}")
    return level


# --- layers ----------------------------------------------------------------------------------------------------------


def random_layer(
    structure: Structure, num_blocks: int, d_in: int, d_out: int, level: int, std: float, generator: torch.Generator
) -> StructuredLinear:
    """A float32 layer to train from scratch, without bias.

    low_rank: the truncated SVD of a Gaussian matrix of that standard deviation, root singular values on both sides.
    Others: Gaussian blocks, each replaced by its polar factor. Source: arXiv 2406.16450.
    """

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if structure == "low_rank":
        factors = Whitened(std * gaussian(d_in, d_out)).factors(level)
        return LowRankLinear.from_factors(factors.A, factors.B)
    inner = num_blocks * level
    if structure == "block_dense":
        V = polar_factor(gaussian(num_blocks, level, d_in // num_blocks))
        return BlockDenseLinear.from_factors(V, polar_factor(gaussian(d_out, inner)))
    V = polar_factor(gaussian(num_blocks, inner, d_in // num_blocks))
    return BlockShuffleLinear.from_factors(V, polar_factor(gaussian(num_blocks, d_out // num_blocks, inner)))


def polar_factor(matrix: Tensor) -> Tensor:
    """The nearest matrices (..., m, n) with orthonormal rows or columns."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def projected_layer(
    structure: Structure,
    num_blocks: int,
    weight: Tensor,
    level: int,
    bias: Tensor | None = None,
    gram: Tensor | None = None,
    sweeps: int = 0,
) -> tuple[StructuredLinear, str | None]:
    """The layer nearest to a trained weight (d_out, d_in), in its dtype; and what had to be done to the Gram, if so.

    gram (d_in, d_in): see `block_projection`; low_rank is then the whitened truncated SVD.
    """
    if structure == "low_rank":
        low = svd_factorize(weight, level) if gram is None else svd_llm_factorize(weight, gram, level)
        return LowRankLinear.from_factors(low.A.to(weight.dtype), low.B.to(weight.dtype), bias), low.repair
    if structure == "block_dense":
        factors = project_block_dense(weight, num_blocks * level, num_blocks, gram, sweeps)
    else:
        factors = project_block_shuffle(weight, num_blocks, num_blocks * level, gram, sweeps)
    kind = BlockDenseLinear if structure == "block_dense" else BlockShuffleLinear
    return kind.from_factors(factors.V.to(weight.dtype), factors.U.to(weight.dtype), bias), factors.repair


# --- the compressor --------------------------------------------------------------------------------------------------


class StructuredFFN:
    """One unit a site, on feed-forward sites alone."""

    Options: ClassVar[type[StructuredFFNOptions]] = StructuredFFNOptions

    def __init__(self, options: StructuredFFNOptions | None = None) -> None:
        self.options = options or StructuredFFNOptions()
        self.needs = frozenset({"gram"} if self.options.projection == "gram" else ())
        self.kind = (self.options.structure, self.options.num_blocks)

    def units(self, sites: Sequence[Site]) -> list[list[Site]]:
        """InputError for an attention site, or blocks that do not divide every site; the nearest number that does."""
        for site in sites:
            if site.role in ATTENTION_ROLES:
                raise InputError(f"{site.name}: structured_ffn works on feed-forward sites; use targets: [ffn]")
        structure, num_blocks = self.kind
        if structure != "low_rank":
            outputs = [site.d_out for site in sites] if structure == "block_shuffle" else []
            check_divides(num_blocks, *(site.d_in for site in sites), *outputs)
        return [[site] for site in sites]

    def costs(self, sites: Sequence[Site]) -> Tensor:
        sizes = (*self.kind, sites[0].d_in, sites[0].d_out)
        return level_values(*sizes) * torch.arange(most_levels(*sizes) + 1, dtype=torch.float64)

    def profile(self, problem: Problem) -> Profile:
        with naming(problem.name):
            weight, gram = checked_weight(problem.weights[0]), self._gram(problem)
            structure, num_blocks = self.kind
            if structure == "low_rank":
                space = Whitened(weight.T) if gram is None else whitened(weight, gram)
                spectrum = space.spectrum()
            elif structure == "block_dense":
                spectrum = block_dense_spectrum(weight, num_blocks, gram)
            else:
                spectrum = block_shuffle_spectrum(weight, num_blocks, gram)
        sites = problem.sites
        return Profile(sites, spectrum.cpu(), self.costs(sites), sites[0].dense_values)

    def plan(self, sites: Sequence[Site], budget: Budget) -> dict[str, Any]:
        level = self.level(sites[0], budget)
        if level is None:
            return {"rank": None, "values": float(sites[0].dense_values)}
        structure, num_blocks = self.kind
        values = {"values": float(self.costs(sites)[level])}
        if structure == "low_rank":
            return {"rank": level, **values}
        name = "rank" if structure == "block_dense" else "inner"
        return {name: num_blocks * level, "num_blocks": num_blocks, **values}

    def compress(self, problem: Problem, budget: Budget, generator: torch.Generator) -> Compressed:
        level = self.level(problem.sites[0], budget)
        if level is None:
            note = f"{problem.name}: left dense, its budget of {budget.values:.0f} values holds the dense weight"
            return Compressed([None], [note])
        weight, error = problem.weights[0], None
        with naming(problem.name):
            gram = self._gram(problem)
            layer, repair = projected_layer(*self.kind, weight, level, problem.biases[0], gram, self.options.sweeps)
            if not all(torch.isfinite(parameter).all() for parameter in layer.parameters()):
                raise RunError(f"{problem.name}: a factor overflows {weight.dtype}")
            if gram is not None:
                error = relative_output_error(weight.double(), layer.to_dense().detach().double(), gram)
        return Compressed([layer], [f"{problem.name}: {repair}"] if repair else [], error)

    def level(self, site: Site, budget: Budget) -> int | None:
        """None where the budget holds the dense weight, which then stays as it is."""
        if budget.values >= site.dense_values:
            return None
        with naming(site.name):
            return level_within(*self.kind, site.d_in, site.d_out, budget.values)

    def _gram(self, problem: Problem) -> Tensor | None:
        if self.options.projection == "frobenius":
            return None
        return problem.statistics[0].require("gram", problem.name).to(problem.weights[0].device)
