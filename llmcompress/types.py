"""The types that the stages of the pipeline hand to one another.

Shape names, here and everywhere: `d_in`, `d_out` (a weight is `(d_out, d_in)`, as in `nn.Linear`), `n` tokens,
`r` rank, `k` atoms, `s` non-zeros a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.finite import all_finite

if TYPE_CHECKING:
    from llmcompress.layers.base import StructuredLinear

ATTENTION_ROLES = ("q", "k", "v", "qkv", "o")
FFN_ROLES = ("gate", "up", "gate_up", "down")


@dataclass(frozen=True)
class Site:
    """One linear map of the model that can be compressed."""

    name: str  #: module path in the model, e.g. `model.layers.3.mlp.down_proj`
    role: str  #: one of ATTENTION_ROLES, FFN_ROLES, or "other"
    block: int  #: index of the block it lies in
    d_in: int
    d_out: int
    input: str  #: name of the first site that reads the same tensor; sites with equal `input` share statistics
    bias: bool = False
    transposed: bool = False  #: the module stores its weight as (d_in, d_out), as GPT-2's Conv1D does
    block_roles: tuple[str, ...] = ()  #: roles of all sites of its block
    d_head: int = 0  #: width of a head's values, of o alone; 0 where heads cannot be told apart

    @property
    def dense_values(self) -> int:
        """Values of the dense weight, bias left out (a bias is always kept)."""
        return self.d_in * self.d_out


@dataclass
class Statistics:
    """What calibration measured at one site. Everything is a sum, so that `a + b` merges shards and resumed runs.

    tokens: rows seen (the sum of their weights, if they were sampled with weights); sequences: backward passes seen.
    gram (d_in, d_in): sum of x xᵀ. abs_sum (d_in,): sum of |x|.
    cross (d_in, d_in): sum of x' xᵀ, where x' comes from the compressed prefix and x from the dense model; with it,
    `gram` is that of x'.
    row_fisher (d_in,), column_fisher (d_out,): sum over sequences of the squared gradient of the mean token loss with
    respect to the weight, summed over the outputs (inputs).
    output_gram (d_out, d_out): sum of g gᵀ over tokens, g the gradient of the token-summed loss at the output.
    backward_tokens: rows that `output_gram` sums. All float64 on the CPU.
    """

    SUMS: ClassVar[tuple[str, ...]] = ("gram", "abs_sum", "cross", "row_fisher", "column_fisher", "output_gram")

    tokens: float = 0
    sequences: int = 0
    backward_tokens: float = 0
    gram: Tensor | None = None
    abs_sum: Tensor | None = None
    cross: Tensor | None = None
    row_fisher: Tensor | None = None
    column_fisher: Tensor | None = None
    output_gram: Tensor | None = None

    def __add__(self, other: Statistics) -> Statistics:
        merged: dict[str, Any] = {}
        for name in self.SUMS:
            a, b = getattr(self, name), getattr(other, name)
            if a is not None and b is not None and a.shape != b.shape:
                raise InputError(f"statistics differ in shape: {name} {tuple(a.shape)} and {tuple(b.shape)}")
            merged[name] = b if a is None else a if b is None else a + b
        return Statistics(
            self.tokens + other.tokens,
            self.sequences + other.sequences,
            self.backward_tokens + other.backward_tokens,
            **merged,
        )

    def require(self, name: str, site: str) -> Tensor:
        """The statistic `name`; InputError naming the site if it was not measured or is not finite."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise InputError(f"{site}: this method needs the statistic '{name}', which calibration did not measure")
        if not all_finite(value):
            raise InputError(f"{site}: the statistic '{name}' is not finite")
        return value


@dataclass(frozen=True)
class Budget:
    """What a unit may store, counted in dense values: 16 stored bits of a 16-bit checkpoint are one value.

    A compressor that stores masks or narrower values converts bits to values at 16 bits a value.
    """

    values: float

    @classmethod
    def for_ratio(cls, sites: Sequence[Site], ratio: float) -> Budget:
        """`ratio` is the fraction removed. InputError unless 0 < ratio < 1."""
        if not 0 < ratio < 1:
            raise InputError(f"ratio must be in (0, 1), the fraction removed; got {ratio}")
        return cls((1 - ratio) * sum(site.dense_values for site in sites))


@dataclass
class Problem:
    """One unit of compression: the sites that are factorised together, with what is known about each.

    weights: (d_out, d_in) each, in the checkpoint's dtype; biases: (d_out,) or None; statistics: one a site (sites of
    one input refer to the same object unless output-side statistics differ). like: the profile of another unit of the
    same shapes, whose curve this unit's may follow where measuring one is work.
    """

    sites: list[Site]
    weights: list[Tensor]
    biases: list[Tensor | None]
    statistics: list[Statistics]
    like: Profile | None = None

    @property
    def name(self) -> str:
        return self.sites[0].name if len(self.sites) == 1 else f"{self.sites[0].name} (+{len(self.sites) - 1})"


@dataclass
class Compressed:
    """What a compressor returns for a unit.

    layers: one a site, in the order of the problem's sites; None leaves that site dense.
    notes: remedies and findings, one line each, that the pipeline logs once and the report shows.
    error: relative error of the unit's outputs on the calibration data, sqrt(sum ||X(W-W~)||² / sum ||XW||²), if
    known.
    """

    layers: list[StructuredLinear | None]
    notes: list[str] = field(default_factory=list)
    error: float | None = None


@dataclass
class Profile:
    """What an allocation may know of a unit before it is compressed.

    spectrum (p,): singular values, descending, of the unit's matrix in the compressor's own (whitened) space, float64:
    dropping value j costs spectrum[j]². costs (p + 1,): dense values stored at rank 0..p, never falling; a method that
    needs a least size says so by costs that start there. dense: values stored dense. losses (p + 1,): the loss at each
    cost where it was measured; otherwise that of dropping values, summed, takes its place.
    """

    sites: list[Site]
    spectrum: Tensor
    costs: Tensor
    dense: int
    losses: Tensor | None = None


class Compressor(Protocol):
    """A method. It is built from its options, knows no model, keeps no state between units."""

    #: statistics read, names of `Statistics` fields
    needs: frozenset[str]

    def units(self, sites: Sequence[Site]) -> list[list[Site]]:
        """Groups the targeted sites (in block order) into units that are factorised together."""

    def costs(self, sites: Sequence[Site]) -> Tensor:
        """`costs` of the unit's profile."""

    def profile(self, problem: Problem) -> Profile:
        """The unit's spectrum in the method's own space, for allocations that need one."""

    def plan(self, sites: Sequence[Site], budget: Budget) -> dict[str, Any]:
        """Sizes chosen for the budget, without data: what a dry run prints (`rank`, `atoms`, ..., `values`).

        `operations`: multiplications and additions beside an SVD's, where there are many.
        """

    def compress(self, problem: Problem, budget: Budget, generator: torch.Generator) -> Compressed:
        """Factorises one unit within the budget. InputError or RunError name the site."""
