"""Where a backend plugs into the pipeline: one small protocol a port.

A catalogue entry of kind "backend" names a class with a pydantic `Options`, built as `cls(cls.Options(...))`, that
offers the method of its entry's port; any of them may offer `analyze` too. Tensors come and go on the caller's device;
everything random is drawn from the generator that is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from llmcompress.backends.report import Report
from llmcompress.errors import InputError
from llmcompress.types import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

PORTS = (
    "sampler", "solver", "sparse coder", "recovery", "stream", "curvature", "aggregator", "grouping", "layer",
    "analysis",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """Rows that stand for all: indices (m,) int64, repeats allowed; weights (m,) float64, positive.

    sum of weights[j] * x[indices[j]] x[indices[j]]ᵀ estimates the Gram of all rows. notes: findings, one line each.
    """

    indices: Tensor
    weights: Tensor
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Solution:
    """x (d, k) of a least-squares problem. notes: remedies and findings, one line each."""

    x: Tensor
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Codes:
    """Sparse codes: indices (m, s) int64, ascending and distinct; values (m, s); over dictionary (d, k).

    dictionary is the one given unless the coder is bound to a structured one of its own.
    """

    dictionary: Tensor
    indices: Tensor
    values: Tensor
    notes: list[str] = field(default_factory=list)


@dataclass
class Subject:
    """What an analysis looks at: a few sites of a model and what they see on some text.

    inputs[site] (n, d_in) and weights[site] (d_out, d_in) float32; residual[block] (n, d_model) float32, the hidden
    states that leave a block. The rows are the same tokens everywhere, in the order of the text. model, tokens,
    tokenizer: only for an analysis that trains. others: what the same sites see on the further texts that an analysis
    names in `texts`.
    """

    sites: list[Site]
    inputs: dict[str, Tensor]
    weights: dict[str, Tensor]
    residual: dict[int, Tensor]
    seed: int = 0
    model: PreTrainedModel | None = None
    tokens: Tensor | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    others: dict[str, Subject] = field(default_factory=dict)

    def trainable(self) -> tuple[PreTrainedModel, Tensor]:
        """The whole model in memory, and the tokens (sequences, length); for backends that set `trains`."""
        if self.model is None or self.tokens is None:
            raise InputError("this analysis trains the model, which has to be in memory as a whole")
        return self.model, self.tokens

    def generator(self) -> torch.Generator:
        return torch.Generator(device=next(iter(self.inputs.values())).device).manual_seed(self.seed)


class Sampler(Protocol):
    """Chooses calibration rows."""

    def sample(self, rows: Tensor, generator: torch.Generator) -> Sample:
        """rows (n, d), float32 or float64."""


class Solver(Protocol):
    """Solves the least-squares problems of layer-wise reconstruction."""

    def solve(self, design: Tensor, target: Tensor, generator: torch.Generator) -> Solution:
        """min ||design x - target||_F: design (n, d) of full column rank, target (n, k), float64."""


class SparseCoder(Protocol):
    """Codes signals over a dictionary."""

    def code(self, dictionary: Tensor, signals: Tensor, nonzeros: int, generator: torch.Generator) -> Codes:
        """At most `nonzeros` atoms a signal: dictionary (d, k) of unit atoms, signals (d, m)."""


class Recovery(Protocol):
    """Rank-r factors from full, partial or corrupted entries."""

    def recover(
        self, entries: Tensor, observed: Tensor | None, rank: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """A (m, r), B (r, n) with A B ≈ entries (m, n) where `observed` (m, n) is true (everywhere if None)."""


class GramRecovery(Protocol):
    """What a recovery may offer too: a Gram from rows that are seen once. A new object for each input."""

    def start(self, rows: int, d: int, generator: torch.Generator) -> None:
        """Before the first row: how many will come, and their length."""

    def update(self, rows: Tensor) -> None:
        """The next rows (b, d)."""

    def gram(self) -> tuple[Tensor, list[str]]:
        """After the last row: their Gram (d, d) float64, and findings, one line each."""


class Stream(Protocol):
    """Summarises rows that are seen once. A new object for each stream."""

    def start(self, rows: int, d: int, generator: torch.Generator) -> None:
        """Before the first row: how many will come, and their length."""

    def update(self, rows: Tensor) -> None:
        """The next rows (b, d)."""

    def finish(self) -> list[str]:
        """After the last row: findings, one line each."""


class Curvature(Protocol):
    """Products with an inverse Hessian or Fisher matrix estimated from gradients."""

    def fit(self, gradients: Tensor) -> None:
        """gradients (m, d), one a sequence."""

    def inverse_product(self, vector: Tensor) -> Tensor:
        """H⁻¹ v for v (d,) or (d, k)."""


class Aggregator(Protocol):
    """Makes one gradient of several workers', of which some may be bad."""

    #: each worker's standing in the last aggregate (p,): near 0 for a bad one
    values_: Tensor

    def coefficients(self, gram: Tensor) -> Tensor:
        """Weights (p,) of the workers' gradients, from their Gram (p, p) float64."""

    def aggregate(self, grads: Tensor) -> Tensor:
        """(p, n) -> (n,)."""


class Grouping(Protocol):
    """Clusters of layers, heads or neurons, by their weights; data-free."""

    def describe(self, weight: Tensor) -> Tensor:
        """What is to be known of one member, a weight (d_out, d_in): as many values for all of one shape."""

    def groups(self, features: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Labels (n,) int64 in 0..count-1 of features (n, ...), the members' descriptions in order of depth."""


class Layer(Protocol):
    """Changes layers of a model in place, or adds to them, before it is fine-tuned."""

    def convert(self, model: PreTrainedModel, generator: torch.Generator) -> list[str]:
        """Paths of the modules that were changed and marked (`layers.converted.mark`). InputError if none fits."""

    def callbacks(self) -> list[TrainerCallback]:
        """What the training is accompanied by."""

    def undo(self, model: PreTrainedModel) -> None:
        """Called where training lowered no validation loss, its weights again those from before: nothing may differ."""

    @staticmethod
    def restore(module: nn.Module, spec: dict[str, Any]) -> None:
        """Does the same to a module of a new model, from the mark; its tensors are loaded afterwards."""


@runtime_checkable
class Analysis(Protocol):
    """Measures a model on data."""

    def analyze(self, subject: Subject) -> Report:
        """Numbers, tables and curves; what does not help an LLM is said in the findings."""
