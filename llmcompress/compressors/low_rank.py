"""What the low-rank methods share: ranks and costs, the truncation, the pivot form, and the compressor around them.

A weight (d_out, d_in) is approximated by (A B)ᵀ with A (d_in, r), B (r, d_out). Every method truncates a singular value
decomposition in a space of its own; what a method adds is that space.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, Self

import scipy.linalg
import torch
from pydantic import BaseModel, Field, model_validator
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn

from llmcompress.compressors.factor_storage import FactorStorage, quantized_costs, quantized_errors, quantized_layer
from llmcompress.compressors.whitening import checked_weight
from llmcompress.errors import InputError, RunError
from llmcompress.layers.base import StructuredLinear
from llmcompress.layers.low_rank import LowRankLinear
from llmcompress.types import Budget, Compressed, Problem, Profile, Site, Statistics

GRAM_RANGE = 1e-4  # of singular values that a Gram's eigenvectors give to half of float64's digits
MAX_COEFFICIENT = 2.0  # pivots are swapped until no entry of the pivot form's B exceeds this


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


# --- factors ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LowRankFactors:
    """weight ≈ (A B)ᵀ: A (d_in, r), B (r, d_out), float64.

    singular_values: the whole spectrum (p,), descending, in the method's space. repair: what had to be done to the
    statistics first, one line, or None.
    """

    A: Tensor
    B: Tensor
    singular_values: Tensor
    repair: str | None = None

    def to_dense(self) -> Tensor:
        """The approximation, (d_out, d_in)."""
        return (self.A @ self.B).T


@dataclass(frozen=True)
class PivotedFactors:
    """weight[pivots] = Aᵀ, weight[~pivots] ≈ (A B)ᵀ: A (d_in, r), B (r, d_out - r), pivots (d_out,) bool."""

    A: Tensor
    B: Tensor
    pivots: Tensor
    singular_values: Tensor
    repair: str | None = None

    def to_dense(self) -> Tensor:
        """The approximation, (d_out, d_in)."""
        dense = self.A.new_empty(len(self.pivots), len(self.A))
        dense[self.pivots] = self.A.T
        dense[~self.pivots] = (self.A @ self.B).T
        return dense


def pivot(factors: LowRankFactors) -> PivotedFactors:
    """The same product with r rows of the weight stored as they are and the others as combinations of them.

    The pivots are chosen by a QR decomposition with column pivoting and then swapped until no coefficient exceeds 2,
    so that the product is equal to rounding even in a narrow dtype. Stores r (d_in + d_out - r) values and a bit mask.
    Source: interpolative decomposition; the swaps are maxvol (Goreinov et al., 2010).
    """
    basis, mix = torch.linalg.qr(factors.B.T.cpu())  # B = mixᵀ basisᵀ; basis (d_out, r) is orthonormal even if B is not
    rows, rank = basis.T, basis.shape[1]
    with _numpy_lock, _numpy_threads().limit(limits=1):
        order = torch.from_numpy(scipy.linalg.qr(rows.numpy(), mode="r", pivoting=True, check_finite=False)[1]).long()
    chosen, coefficients = _dominant_columns(rows, order[:rank], order[rank:])
    pivots = torch.zeros(rows.shape[1], dtype=torch.bool)
    pivots[chosen] = True
    A = factors.A @ (mix.T @ rows[:, chosen]).to(factors.A)
    return PivotedFactors(A, coefficients.to(A), pivots, factors.singular_values, factors.repair)


_numpy_lock = threading.Lock()  # its limit is the process's, and restored by whoever leaves last


@functools.cache
def _numpy_threads() -> ThreadpoolController:
    """SciPy's own BLAS, whose threads would compete with torch's for the cores: twice the time."""
    return ThreadpoolController().select(internal_api="openblas")


def _dominant_columns(rows: Tensor, chosen: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Columns (ascending) that span `rows` (r, d), and the coefficients (r, d - r) of the others, at most 2 in size.

    Every swap at least doubles the volume of the chosen block, whose columns are bounded: it ends.
    """
    while True:
        chosen, rest = chosen.sort().values, rest.sort().values
        coefficients = torch.linalg.solve(rows[:, chosen], rows[:, rest])
        if not coefficients.numel() or coefficients.abs().max() <= MAX_COEFFICIENT:
            return chosen, coefficients
        # Rank-one updates drift: the outer loop solves afresh before the result is believed.
        while coefficients.abs().max() > MAX_COEFFICIENT:
            i, j = divmod(int(coefficients.abs().argmax()), coefficients.shape[1])
            exchange(coefficients, i, j)
            leaving = int(chosen[i])
            chosen[i], rest[j] = rest[j], leaving


def exchange(coefficients: Tensor, i: int, j: int) -> None:
    """The coefficients (r, m) of m columns over r chosen ones, when chosen i and other j change places; in place."""
    change = coefficients[:, j] / coefficients[i, j]
    change[i] -= 1 / coefficients[i, j]
    coefficients[:, j] = 0
    coefficients[i, j] = 1
    coefficients -= torch.outer(change, coefficients[i])


# --- ranks and costs -------------------------------------------------------------------------------------------------


def rank_costs(d_in: int, d_outs: Sequence[int], pivoted: bool) -> Tensor:
    """Dense values stored at rank 0..min(d_in, sum d_out) for sites that share one A; a mask bit is 1/16 of a value."""
    total = sum(d_outs)
    rank = torch.arange(min(d_in, total) + 1, dtype=torch.float64)
    if not pivoted:
        return rank * (d_in + total)
    masks = sum(math.ceil(d / 8) for d in d_outs) / 2
    return rank * (d_in + total - rank) + masks * (rank > 0)


def rank_for(d_in: int, d_out: int, ratio: float, pivoted: bool = False) -> int:
    """The largest rank that stores at most 1 - ratio of the dense values; unpivoted, (1-ratio) d_in d_out/(d_in+d_out).

    InputError unless 0 < ratio < 1, and if not even rank 1 fits.
    """
    if not 0 < ratio < 1:
        raise InputError(f"ratio must be in (0, 1), the fraction removed; got {ratio}")
    return rank_within(rank_costs(d_in, [d_out], pivoted), (1 - ratio) * d_in * d_out)


def rank_within(costs: Tensor, values: float) -> int:
    """The largest rank whose cost is at most `values`. InputError if not even rank 1 fits."""
    rank = int((costs <= values).sum()) - 1
    if rank < 1:
        raise InputError(f"the budget of {values:.1f} values is below rank 1, which stores {costs[1]:.1f}")
    return rank


def rank_from_fraction(d_in: int, d_outs: Sequence[int], fraction: float, pivoted: bool) -> int:
    """`fraction` of the full rank. InputError if that is below 1 or stores as much as the dense weight."""
    costs = rank_costs(d_in, d_outs, pivoted)
    rank = int(fraction * (len(costs) - 1))
    dense = d_in * sum(d_outs)
    if rank < 1:
        raise InputError(f"rank_fraction {fraction} of rank {len(costs) - 1} is below rank 1")
    if costs[rank] >= dense:
        raise InputError(
            f"rank {rank} (rank_fraction {fraction}) stores {costs[rank]:.0f} values, the dense weight {dense}"
        )
    return rank


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
    pivoted = factors.pivots if isinstance(factors, PivotedFactors) else None
    layers: list[LowRankLinear] = []
    first = column = offset = 0
    for site, bias in zip(problem.sites, problem.biases, strict=True):
        mask = pivoted[first : first + site.d_out] if pivoted is not None else None
        count = int(mask.sum()) if mask is not None else 0
        B = factors.B[:, column : column + site.d_out - count].to(dtype)
        if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
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
