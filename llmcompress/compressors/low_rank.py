"""What the low-rank methods share: the truncation, and the compressor around it.

A weight (d_out, d_in) is approximated by (A B)ᵀ with A (d_in, r), B (r, d_out). Every method truncates a singular value
decomposition in a space of its own; what a method adds is that space.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from llmcompress.compressors.factor_storage import FactorStorage, quantized_costs, quantized_errors, quantized_layer
from llmcompress.compressors.factors import LowRankFactors, PivotedFactors, fitted_to_storage, pivot
from llmcompress.compressors.ranks import rank_costs, rank_within
from llmcompress.compressors.whitening import checked_weight
from llmcompress.errors import InputError, RunError
from llmcompress.layers.base import StructuredLinear
from llmcompress.layers.low_rank import LowRankLinear
from llmcompress.types import Budget, Compressed, Problem, Profile, Site, Statistics

GRAM_RANGE = 1e-4  # of singular values that a Gram's eigenvectors give to half of float64's digits


class PivotOptions(BaseModel, extra="forbid"):
    pivot: bool = Field(default=True, description="store the pivot form: the same product, r² values fewer at rank r")


class LowRankOptions(PivotOptions):
    share: Literal["none", "input"] = Field(
        default="none", description="input: one basis A for all sites that read the same tensor, factorised jointly"
    )
    lowrank: FactorStorage | None = Field(
        default=None, description="store two plain factors, in a gauge and at a width of their own, no pivot form"
    )

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.lowrank is None:
            return self
        if self.pivot and "pivot" in self.model_fields_set:
            raise ValueError("lowrank: stores two plain factors, and pivot: true the pivot form; leave one out")
        if self.lowrank.bits is not None and self.share != "none":
            raise ValueError("lowrank.bits: quantised factors belong to one site each; it needs share: none")
        self.pivot = False
        return self


# --- truncation ------------------------------------------------------------------------------------------------------


class Space(Protocol):
    """Where a method measures the weight's error. `measures_output`: that error is the site's output error."""

    @property
    def repair(self) -> str | None: ...

    @property
    def measures_output(self) -> bool: ...

    def spectrum(self) -> Tensor:
        """All singular values of the weight in this space, descending: dropping one costs its square."""

    def factors(self, rank: int) -> LowRankFactors:
        """The best factors of that rank in this space. InputError if the rank is out of range."""


@dataclass(frozen=True)
class Whitened:
    """Space of `matrix` (d_in, d_out) = T weightᵀ Q diag(output_scale), T a map of the inputs, Q one of the outputs.

    undo: (d_in, r) -> T⁻¹ of it; None where T is the identity. undo_output: (r, d_out) -> it times Q⁻¹, likewise.
    output_scale (d_out,) or None.
    """

    matrix: Tensor
    undo: Callable[[Tensor], Tensor] | None = None
    undo_output: Callable[[Tensor], Tensor] | None = None
    output_scale: Tensor | None = None
    repair: str | None = None
    measures_output: bool = False

    def spectrum(self) -> Tensor:
        return torch.linalg.svdvals(self.matrix)

    def factors(self, rank: int) -> LowRankFactors:
        check_rank(rank, *self.matrix.shape)
        u, s, vh = _leading(self.matrix, rank)
        root = s[:rank].sqrt()
        A = u * root
        B = root[:, None] * vh
        if self.undo is not None:
            A = self.undo(A)
        if self.output_scale is not None:
            B = B / self.output_scale
        if self.undo_output is not None:
            B = self.undo_output(B)
        return LowRankFactors(A, B, s, self.repair)


def check_rank(rank: int, d_in: int, d_out: int) -> None:
    if not 1 <= rank <= min(d_in, d_out):
        raise InputError(f"rank must be between 1 and min(d_in, d_out) = {min(d_in, d_out)}; got {rank}")


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_in, r), all singular values, descending, and Vᵀ (r, d_out) of a float64 matrix.

    From the eigenvectors of the smaller Gram, in half of the time of the decomposition itself, which is computed where
    the last of the r values is too small for that: a Gram's eigenvalues err by the rounding of its largest.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    squares, v = (found.flip(-1) for found in torch.linalg.eigh(tall.T @ tall))
    s, v = squares.clamp_min(0).sqrt(), v[:, :rank]
    if s[rank - 1] > GRAM_RANGE * s[0]:
        u = tall @ v / s[:rank]
    else:
        u, s, vh = torch.linalg.svd(tall, full_matrices=False)
        u, v = u[:, :rank], vh[:rank].T
    return (v, s, u.T) if wide else (u, s, v.T)


# --- the compressor --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def naming(site: str) -> Iterator[None]:
    """Puts the site's name before the message of an error that does not have it."""
    try:
        yield
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(site) else f"{site}: {text}") from None
    except torch.linalg.LinAlgError as error:
        raise RunError(f"{site}: the factorisation failed: {str(error).splitlines()[0]}") from error


class LowRankCompressor(ABC):
    """The compressor port for a method that is a `Space`: a subclass gives `space`, `needs` and its options."""

    Options: ClassVar[type[PivotOptions]] = LowRankOptions
    needs: frozenset[str] = frozenset()

    def __init__(self, options: PivotOptions | None = None) -> None:
        self.options = options if options is not None else self.Options()

    @abstractmethod
    def space(self, weight: Tensor, statistics: JointStatistics, name: str) -> Space:
        """The space for one unit: weight (sum d_out, d_in) float64, finite; `name` for `Statistics.require`."""

    def refine(self, factors: LowRankFactors, weight: Tensor, statistics: JointStatistics, name: str) -> LowRankFactors:
        """What a method does to the factors after the truncation; nothing by default."""
        return factors

    def rank(self, sites: Sequence[Site], budget: Budget) -> int | None:
        """The unit's rank; None where the budget holds the dense weights, which then stay as they are."""
        if budget.values >= sum(site.dense_values for site in sites):
            return None
        return rank_within(self.costs(sites), budget.values)

    def units(self, sites: Sequence[Site]) -> list[list[Site]]:
        if getattr(self.options, "share", "none") != "input":
            return [[site] for site in sites]
        groups: dict[str, list[Site]] = {}
        for site in sites:
            groups.setdefault(site.input, []).append(site)
        return list(groups.values())

    @property
    def storage(self) -> FactorStorage | None:
        return getattr(self.options, "lowrank", None)

    def costs(self, sites: Sequence[Site]) -> Tensor:
        if self.storage is not None and self.storage.bits is not None:
            return quantized_costs(sites[0].d_in, sites[0].d_out, self.storage.bits)
        return rank_costs(sites[0].d_in, [site.d_out for site in sites], self.options.pivot)

    def profile(self, problem: Problem) -> Profile:
        with naming(problem.name):
            space = self.space(stacked_weight(problem), joint_statistics(problem), problem.name)
            spectrum = space.spectrum().cpu()
        sites = problem.sites
        return Profile(sites, spectrum, self.costs(sites), sum(site.dense_values for site in sites))

    def plan(self, sites: Sequence[Site], budget: Budget) -> dict[str, Any]:
        with naming(sites[0].name):
            rank = self.rank(sites, budget)
        if rank is None:
            return {"rank": None, "values": float(sum(site.dense_values for site in sites))}
        return {"rank": rank, "values": float(self.costs(sites)[rank])}

    def compress(self, problem: Problem, budget: Budget, generator: torch.Generator) -> Compressed:
        with naming(problem.name):
            rank = self.rank(problem.sites, budget)
            if rank is None:
                note = f"{problem.name}: left dense, its budget of {budget.values:.0f} values holds the dense weight"
                return Compressed([None] * len(problem.sites), [note])
            weight, statistics = stacked_weight(problem), joint_statistics(problem)
            space = self.space(weight, statistics, problem.name)
            factors = space.factors(rank)
            refined = self.refine(factors, weight, statistics, problem.name)
            layers, notes, error = self._layers(problem, refined)
        one_input = len({site.input for site in problem.sites}) == 1
        if not (space.measures_output and one_input):
            error = None
        elif error is None and refined is factors:
            error = _relative_tail(factors.singular_values, rank)
        found = [refined.repair, *notes] if refined.repair else notes
        return Compressed(layers, [f"{problem.name}: {note}" for note in found], error)

    def _layers(
        self, problem: Problem, factors: LowRankFactors
    ) -> tuple[list[StructuredLinear | None], list[str], float | None]:
        """The layers in the form that the options choose, notes, and the error where storage has changed it."""
        storage = self.storage
        if storage is None:
            return [*build_layers(problem, pivot(factors) if self.options.pivot else factors)], [], None
        A, B, note = storage.rotated(factors.A, factors.B)
        notes = [note] if note else []
        if storage.bits is None:
            return [*build_layers(problem, dataclasses.replace(factors, A=A, B=B))], notes, None
        layer = quantized_layer(problem, A, B, storage.bits)
        before, after = quantized_errors(problem, A, B, layer)
        notes.append(f"{storage.bits}-bit factors: relative error {after:.4f}, {before:.4f} at full width")
        return [layer], notes, after


def stacked_weight(problem: Problem) -> Tensor:
    """The unit's weights below one another, (sum d_out, d_in), float64. InputError if one is malformed."""
    for site, weight in zip(problem.sites, problem.weights, strict=True):
        if tuple(weight.shape) != (site.d_out, site.d_in):
            raise InputError(f"{site.name}: the weight must be ({site.d_out}, {site.d_in}); got {tuple(weight.shape)}")
    return torch.cat([checked_weight(weight) for weight in problem.weights])


@dataclass
class JointStatistics(Statistics):
    """Statistics of a stacked weight. parts: those of its sites, in order; output-side Grams are found only there."""

    parts: list[Statistics] = field(default_factory=list)


def joint_statistics(problem: Problem) -> JointStatistics:
    """Inputs' sums over the distinct inputs, Fisher rows summed, columns joined."""
    if len(problem.sites) == 1:
        return JointStatistics(**vars(problem.statistics[0]), parts=problem.statistics)
    inputs = list({site.input: found for site, found in zip(problem.sites, problem.statistics, strict=True)}.values())
    return JointStatistics(
        tokens=sum(found.tokens for found in inputs),
        sequences=problem.statistics[0].sequences,
        gram=_total([found.gram for found in inputs]),
        abs_sum=_total([found.abs_sum for found in inputs]),
        cross=_total([found.cross for found in inputs]),
        row_fisher=_total([found.row_fisher for found in problem.statistics]),
        column_fisher=_stacked([found.column_fisher for found in problem.statistics]),
        parts=problem.statistics,
    )


def build_layers(problem: Problem, factors: LowRankFactors | PivotedFactors) -> list[LowRankLinear]:
    """One layer a site, in the weights' dtype; the first owns A, the others refer to it.

    RunError if a factor overflows that dtype.
    """
    dtype = problem.weights[0].dtype
    A = nn.Parameter(factors.A.to(dtype).contiguous())
    if not torch.isfinite(A).all():
        raise RunError(f"{problem.name}: a factor overflows {dtype}")
    pivoted = None
    if isinstance(factors, PivotedFactors):
        gram = joint_statistics(problem).gram if problem.statistics else None
        factors, pivoted = fitted_to_storage(factors, gram, dtype), factors.pivots
    layers: list[LowRankLinear] = []
    first = column = offset = 0
    for site, bias in zip(problem.sites, problem.biases, strict=True):
        mask = pivoted[first : first + site.d_out] if pivoted is not None else None
        count = int(mask.sum()) if mask is not None else 0
        B = factors.B[:, column : column + site.d_out - count].to(dtype)
        if not torch.isfinite(B).all():
            raise RunError(f"{site.name}: a factor overflows {dtype}")
        shared = {"A": problem.sites[0].name} if layers else None
        layers.append(LowRankLinear.from_factors(A, B, bias, mask, offset, shared))
        first, column, offset = first + site.d_out, column + site.d_out - count, offset + count
    return layers


def _total(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.stack(present).sum(0) if len(present) == len(parts) else None


def _stacked(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if len(present) == len(parts) else None


def _relative_tail(singular_values: Tensor, rank: int) -> float:
    squares = singular_values.square()
    total = float(squares.sum())
    return math.sqrt(float(squares[rank:].sum()) / total) if total else 0.0
