"""Whitened truncated SVD: the least output error of any rank-r factors (SVD-LLM, arXiv 2403.07378; V2, 2503.12340)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmcompress.backends.choice import Backend
from llmcompress.backends.ports import Solution, Solver
from llmcompress.compressors.factors import LowRankFactors
from llmcompress.compressors.low_rank import LowRankCompressor, LowRankOptions, Whitened
from llmcompress.compressors.whitening import check_semidefinite, checked_gram, checked_weight, damped_cholesky
from llmcompress.errors import InputError
from llmcompress.types import Statistics

Whitening = Literal["cholesky", "eigh"]


class SVDLLMOptions(LowRankOptions):
    whitening: Whitening = Field(
        default="cholesky",
        description="square root of the Gram: cholesky shifts a singular one, eigh leaves its null space out",
    )
    refit: bool = Field(
        default=False,
        description="refit the output factor to the dense model's outputs on the compressed prefix's inputs",
    )
    solver: Backend | None = Field(default=None, description="backend that solves the refit; exact if absent")

    BACKENDS: ClassVar[dict[str, str]] = {"solver": "solver"}

    @model_validator(mode="after")
    def _solver_has_a_refit(self) -> SVDLLMOptions:
        if self.solver is not None and not self.refit:
            raise ValueError("solver: solves the refit, so it needs refit: true")
        return self


def svd_llm_factorize(weight: Tensor, gram: Tensor, rank: int, whitening: Whitening = "cholesky") -> LowRankFactors:
    """Minimiser of ||X W - X A B||_F, W = weightᵀ: SVD of L W with Lᵀ L = gram; dropping sigma_i costs exactly sigma_i.

    weight (d_out, d_in), gram (d_in, d_in) = Xᵀ X; factors in float64. A singular Gram is shifted ("cholesky") or its
    null space is left out ("eigh"), and `repair` says so. Raises InputError for bad weights, Grams or ranks.
    Source: arXiv 2403.07378; "eigh": arXiv 2503.12340
    """
    return whitened(checked_weight(weight), gram, whitening).factors(rank)


def whitened(weight: Tensor, gram: Tensor, whitening: Whitening = "cholesky") -> Whitened:
    """The space of a float64 weight (d_out, d_in) in which a distance is an output error."""
    gram = checked_gram(gram, weight)
    if whitening == "eigh":
        return _eigh_space(weight, gram)
    upper, repair = damped_cholesky(gram)

    def undo(a: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(upper, a, upper=True)

    return Whitened(upper @ weight.T, undo, repair=repair, measures_output=True)


def _eigh_space(weight: Tensor, gram: Tensor) -> Whitened:
    eigenvalues, vectors = torch.linalg.eigh(gram)
    check_semidefinite(eigenvalues)
    kept = eigenvalues > len(gram) * torch.finfo(torch.float64).eps * eigenvalues[-1]
    root = torch.where(kept, eigenvalues, 0).sqrt()[:, None]
    inverse = torch.where(kept[:, None], 1 / root, 0)
    repair = None
    if not kept.all():
        repair = f"Gram singular (rank {int(kept.sum())} of {len(gram)}); its null space is left out"
    return Whitened(
        root * (vectors.T @ weight.T), lambda a: vectors @ (inverse * a), repair=repair, measures_output=True
    )


def refit_output_factor(A: Tensor, gram_shifted: Tensor, cross_times_weight: Tensor) -> Tensor:
    """B (r, d_out) minimising ||X' A B - X W||_F: X' from the compressed prefix, X from the dense model, float64.

    A (d_in, r); gram_shifted (d_in, d_in) = X'ᵀ X'; cross_times_weight (d_in, d_out) = X'ᵀ X W. The minimiser of least
    norm where Aᵀ gram A is singular. Source: arXiv 2403.07378, the update of its steps 2 and 3.
    """
    A, target = A.double(), cross_times_weight.double()
    gram = checked_gram(gram_shifted, A.T)
    if target.shape[0] != A.shape[0]:
        raise InputError(f"cross_times_weight must have {A.shape[0]} rows; got {target.shape[0]}")
    normal = A.T @ gram @ A
    scale = normal.diagonal().clamp_min(torch.finfo(torch.float64).tiny).rsqrt()  # equilibrates before the cutoff
    eigenvalues, vectors = torch.linalg.eigh(scale[:, None] * normal * scale)
    kept = eigenvalues > len(normal) * torch.finfo(torch.float64).eps * eigenvalues[-1]
    inverse = torch.where(kept, 1 / eigenvalues, 0)[:, None]
    return scale[:, None] * (vectors @ (inverse * (vectors.T @ (scale[:, None] * (A.T @ target)))))


def refit_by(
    solver: Solver, A: Tensor, gram_shifted: Tensor, cross_times_weight: Tensor, generator: torch.Generator
) -> Solution:
    """The same B (r, d_out) from a solver: min ||R A B - R⁻ᵀ X'ᵀ X W||_F with RᵀR = gram_shifted, float64.

    The solver's notes, and the shift of a singular Gram.
    """
    upper, repair = damped_cholesky(checked_gram(gram_shifted, A.T.double()))
    target = torch.linalg.solve_triangular(upper.T, cross_times_weight.double(), upper=False)
    solution = solver.solve(upper @ A.double(), target, generator)
    return Solution(solution.x, [*([repair] if repair else []), *solution.notes])


class SVDLLM(LowRankCompressor):
    Options: ClassVar[type[SVDLLMOptions]] = SVDLLMOptions
    options: SVDLLMOptions

    def __init__(self, options: SVDLLMOptions | None = None) -> None:
        super().__init__(options)
        self.needs = frozenset({"gram", "cross"} if self.options.refit else {"gram"})

    def space(self, weight: Tensor, statistics: Statistics, name: str) -> Whitened:
        space = whitened(weight, statistics.require("gram", name), self.options.whitening)
        if space.repair and statistics.tokens < weight.shape[1]:
            few = f"{statistics.tokens:g} calibration tokens for {weight.shape[1]} inputs"
            space = dataclasses.replace(space, repair=f"{few}: {space.repair}")
        return space

    def refine(self, factors: LowRankFactors, weight: Tensor, statistics: Statistics, name: str) -> LowRankFactors:
        if not self.options.refit:
            return factors
        cross = statistics.require("cross", name).to(weight)
        gram = statistics.require("gram", name).to(weight)
        if self.options.solver is None:
            return dataclasses.replace(factors, B=refit_output_factor(factors.A, gram, cross @ weight.T))
        generator = torch.Generator(device=weight.device).manual_seed(0)
        found = refit_by(self.options.solver.build("solver"), factors.A, gram, cross @ weight.T, generator)
        repair = "; ".join([*([factors.repair] if factors.repair else []), *found.notes])
        return dataclasses.replace(factors, B=found.x, repair=repair or None)
