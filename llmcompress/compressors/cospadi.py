"""Sparse dictionaries learnt in the space of a layer's outputs (CoSpaDi, arXiv 2509.22075).

A weight is W = weightᵀ ≈ D S with a dictionary D (d_in, k) and codes S (k, d_out) of exactly s non-zeros a column. The
error ||X (W - D S)||_F equals ||L (W - D S)||_F for any L with Lᵀ L = XᵀX: an ordinary sparse dictionary of L W.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from llmcompress.backends.choice import Backend
from llmcompress.backends.dictionary import code_again, solve_again
from llmcompress.compressors.allocation.curves import following_losses, truncation_losses
from llmcompress.compressors.basis_sharing import BasisSharing, BasisSharingOptions
from llmcompress.compressors.dictionary_learning import DictionaryFactors, learn_fast, learning_operations, mod_update
from llmcompress.compressors.dictionary_sizes import Sizes, dictionary_sizes, sizes_within, stored_bits
from llmcompress.compressors.factors import pivot
from llmcompress.compressors.hard_thresholding import check_sparsity, hard_thresholding_pursuit
from llmcompress.compressors.kfac_svd import DAMPING, KFACSVD
from llmcompress.compressors.ksvd import ksvd_sweep, learn_ksvd, omp
from llmcompress.compressors.loss_refinement import ROUNDS, refine, refinement_operations
from llmcompress.compressors.low_rank import Whitened, build_layers, joint_statistics, naming, stacked_weight
from llmcompress.compressors.ranks import rank_costs, rank_within
from llmcompress.compressors.svd_llm import SVDLLM, SVDLLMOptions
from llmcompress.errors import InputError, RunError
from llmcompress.layers.base import StructuredLinear
from llmcompress.layers.sparse_dictionary import (
    MAX_VALUE_BITS,
    MIN_VALUE_BITS,
    SparseDictionaryLinear,
)
from llmcompress.types import Budget, Compressed, Problem, Profile, Site, Statistics

__all__ = [
    "CoSpaDi",
    "CoSpaDiOptions",
    "DictionaryFactors",
    "cospadi",
    "cospadi_shared",
    "dictionary_sizes",
    "hard_thresholding_pursuit",
    "ksvd_sweep",
    "learn_dictionary",
    "mod_update",
    "omp",
    "stored_bits",
]

Solver = Literal["fast", "ksvd"]
OutputWeights = Literal["none", "diagonal", "full"]
ITERATIONS = {"fast": 10, "ksvd": 60}
SEED = 42
LEAST_SHARE = 0.35  # of a unit's dense values: below it, curves say too little about a dictionary
#: kept shares at which short fits measure a dictionary's loss; its logarithm is taken as linear in the share
PROBES = (0.5, 0.75)
PROBE_ITERATIONS = 3


class CoSpaDiOptions(BaseModel, extra="forbid"):
    share: Literal["input", "none", "layers"] = Field(
        default="input",
        description="one dictionary for all sites that read the same tensor (input), for the q, k, v, gate and up of "
        "neighbouring blocks each (layers), or for one site (none)",
    )
    layers: int = Field(default=2, ge=1, description="blocks that share a dictionary with share: layers")
    grouping: Backend | None = Field(
        default=None, description="with share: layers, backend that chooses which blocks share, `layers` on average"
    )
    structure: Literal["cospadi", "low_rank", "auto"] = Field(
        default="auto",
        description="auto: of the dictionary and the pivoted whitened SVD of the same size, the one with the lower "
        "calibration error, unit by unit",
    )
    solver: Solver = Field(
        default="fast", description="fast: thresholding pursuit and MOD; ksvd: the paper's OMP, K-SVD"
    )
    iterations: int | None = Field(default=None, ge=1, description="rounds at most; 10 for fast, 60 for ksvd if absent")
    tolerance: float = Field(
        default=2e-3, ge=0, lt=1, description="stop when the squared error falls by less, relative"
    )
    rho: float = Field(default=2.0, ge=1, description="atoms for each non-zero of a column")
    value_bits: int = Field(
        default=14,
        ge=MIN_VALUE_BITS,
        le=MAX_VALUE_BITS,
        description="bits of a stored code value: a shortened bfloat16",
    )
    output_weights: OutputWeights = Field(
        default="none",
        description="diagonal: weight each output by how much the loss depends on it; full: and by how outputs act "
        "together on the loss (both need a backward pass)",
    )
    coder: Backend | None = Field(default=None, description="backend that codes the columns over the final dictionary")
    refit: Backend | None = Field(
        default=None, description="backend that solves for the dictionary once more, given the final codes"
    )

    BACKENDS: ClassVar[dict[str, str]] = {"coder": "sparse coder", "refit": "solver", "grouping": "grouping"}

    @model_validator(mode="after")
    def _groups_share(self) -> CoSpaDiOptions:
        if self.grouping is not None and self.share != "layers":
            raise ValueError("grouping: chooses the blocks that share, so it needs share: layers")
        return self


# --- factorisation ---------------------------------------------------------------------------------------------------


def learn_dictionary(
    y: Tensor,
    k: int,
    s: int,
    solver: Solver = "fast",
    iterations: int | None = None,
    tolerance: float = 2e-3,
    generator: torch.Generator | None = None,
) -> DictionaryFactors:
    """min ||y - D S||_F over k unit atoms and s non-zeros in each column of S; y (d_in, d_out) float32 or float64.

    generator: on y's device, seeded with 42 if absent. InputError unless 1 <= s <= k and y is finite.
    """
    check_sparsity(s, k)
    if not torch.isfinite(y).all():
        raise InputError("the matrix to factorise is not finite")
    generator = generator or torch.Generator(device=y.device).manual_seed(SEED)
    solve = learn_fast if solver == "fast" else learn_ksvd
    return solve(y, k, s, iterations or ITERATIONS[solver], tolerance, generator)


def cospadi(
    weight: Tensor,
    gram: Tensor,
    ratio: float,
    options: CoSpaDiOptions | None = None,
    generator: torch.Generator | None = None,
) -> StructuredLinear:
    """The layer that stands for weight (d_out, d_in) at 1 - ratio of its 16-bit size, fitted under the input Gram.

    gram (d_in, d_in) = XᵀX. A dictionary, unless `options` ask for another structure. InputError for bad weights,
    Grams, ratios. Source: arXiv 2509.22075.
    """
    return cospadi_shared([weight], [gram], ratio, options, generator)[0]


def cospadi_shared(
    weights: Sequence[Tensor],
    grams: Sequence[Tensor],
    ratio: float,
    options: CoSpaDiOptions | None = None,
    generator: torch.Generator | None = None,
) -> list[StructuredLinear]:
    """Layers of several weights (d_out_i, d_in) with one dictionary, under the mean of their inputs' distinct Grams.

    The same Gram object for all of them (weights that read one input) makes the fit exact. Errors as in `cospadi`.
    """
    if not weights or len(weights) != len(grams):
        raise InputError(f"as many Grams as weights are needed, at least one; got {len(weights)} and {len(grams)}")
    for i, weight in enumerate(weights):
        if weight.shape[-1] != weights[0].shape[-1]:
            raise InputError(
                f"weight {i}: weights that share a dictionary must have the same d_in; "
                f"got {weight.shape[-1]}, weight 0 has {weights[0].shape[-1]}"
            )
    names = [f"weight {i}" if len(weights) > 1 else "weight" for i in range(len(weights))]
    first = {id(gram): name for name, gram in reversed(list(zip(names, grams, strict=True)))}
    sites = [
        Site(name, "other", 0, weight.shape[-1], len(weight), first[id(gram)])
        for name, weight, gram in zip(names, weights, grams, strict=True)
    ]
    statistics = [Statistics(tokens=math.inf, gram=gram) for gram in grams]
    problem = Problem(sites, list(weights), [None] * len(sites), statistics)
    generator = generator or torch.Generator(device=weights[0].device).manual_seed(SEED)
    method = CoSpaDi(options or CoSpaDiOptions(structure="cospadi"))
    layers = method.compress(problem, Budget.for_ratio(sites, ratio), generator).layers
    return [layer for layer in layers if layer is not None]


# --- the compressor --------------------------------------------------------------------------------------------------


class CoSpaDi:
    Options: ClassVar[type[CoSpaDiOptions]] = CoSpaDiOptions

    def __init__(self, options: CoSpaDiOptions | None = None) -> None:
        self.options = options or CoSpaDiOptions()
        weighted = self.options.output_weights != "none"
        self.needs = frozenset({"gram", "output_gram"} if weighted else {"gram"})

    def units(self, sites: Sequence[Site]) -> list[list[Site]]:
        if self.options.share == "layers":
            return BasisSharing(BasisSharingOptions(layers=self.options.layers)).units(sites)
        return SVDLLM(SVDLLMOptions(share=self.options.share)).units(sites)

    def costs(self, sites: Sequence[Site]) -> Tensor:
        """Those of the pivot form, but never below the least share of the dense values that a dictionary gets."""
        costs = _rank_costs(sites)
        return costs if self.options.structure == "low_rank" else costs.clamp_min(LEAST_SHARE * _dense_values(sites))

    def profile(self, problem: Problem) -> Profile:
        """The low-rank spectrum, whitened on both sides where outputs are weighted: a surrogate for a dictionary's.

        With full weights, losses are measured instead: by short fits at a few sizes, and for `auto` the spectrum's
        where those are lower; or they follow those of the problem's `like`.
        """
        sites, options = problem.sites, self.options
        with naming(problem.name):
            method = SVDLLM() if options.output_weights == "none" else KFACSVD()
            spectrum = method.space(stacked_weight(problem), joint_statistics(problem), problem.name).spectrum().cpu()
            losses = None
            if options.output_weights == "full" and options.structure != "low_rank":
                like = problem.like
                losses = self._losses(problem, spectrum) if like is None else following_losses(spectrum, like)
        return Profile(sites, spectrum, self.costs(sites), _dense_values(sites), losses)

    def _losses(self, problem: Problem, spectrum: Tensor) -> Tensor:
        """The loss at every cost of the profile, in the unit of the squared spectrum."""
        tail = truncation_losses(spectrum)
        space, dense = self._space(problem), _dense_values(problem.sites)
        probed = []
        for share in PROBES:
            generator = torch.Generator(device=space.matrix.device).manual_seed(SEED)
            sizes = self._sizes(problem.sites, Budget(share * dense))
            factors, _ = self._factors(problem, space, sizes, PROBE_ITERATIONS, generator, rounds=1)
            probed.append(math.log(max(factors.history[-1] ** 2, 1e-12)))
        slope = (probed[1] - probed[0]) / (PROBES[1] - PROBES[0])
        costs = self.costs(problem.sites)
        losses = tail[0] * torch.exp(probed[0] + slope * (costs / dense - PROBES[0])).clamp_max(1.0)
        return torch.minimum(losses, tail) if self.options.structure == "auto" else losses

    def plan(self, sites: Sequence[Site], budget: Budget) -> dict[str, Any]:
        dense = _dense_values(sites)
        if budget.values >= dense:
            return {"atoms": None, "nonzeros": None, "values": float(dense)}
        with naming(sites[0].name):
            if self.options.structure == "low_rank":
                rank = rank_within(_rank_costs(sites), budget.values)
                return {"rank": rank, "values": float(_rank_costs(sites)[rank])}
            sizes = self._sizes(sites, budget)
        found = {"atoms": sizes.atoms, "nonzeros": sizes.nonzeros, "values": sizes.values}
        return found | {"operations": self._operations(sites, sizes.atoms)}

    def _operations(self, sites: Sequence[Site], atoms: int) -> float:
        options, d_in, d_outs = self.options, sites[0].d_in, [site.d_out for site in sites]
        learning = learning_operations(d_in, sum(d_outs), atoms, options.iterations or ITERATIONS[options.solver])
        full = options.output_weights == "full"
        return learning + (refinement_operations(d_in, d_outs, atoms) if full else 0)

    def compress(self, problem: Problem, budget: Budget, generator: torch.Generator) -> Compressed:
        name = problem.name
        if budget.values >= _dense_values(problem.sites):
            note = f"{name}: left dense, its budget of {budget.values:.0f} values holds the dense weight"
            return Compressed([None] * len(problem.sites), [note])
        with naming(name):
            space = self._space(problem)
            notes = [f"{name}: {space.repair}"] if space.repair else []
            found: dict[str, list[StructuredLinear]] = {}
            if self.options.structure != "low_rank":
                sizes = self._sizes(problem.sites, budget)
                found["dictionary"], told_of = self._dictionary_layers(problem, space, sizes, generator)
                notes += [f"{name}: {note}" for note in told_of]
            if self.options.structure != "cospadi":
                rank = rank_within(_rank_costs(problem.sites), budget.values)
                factors = self._low_rank_space(problem, space).factors(rank)
                found["low rank"] = list(build_layers(problem, pivot(factors)))
            kept = next(iter(found))
            if len(found) > 1:
                weights = self._output_grams(problem)
                errors = {form: _output_error(problem, layers, weights) for form, layers in found.items()}
                kept = min(errors, key=lambda form: errors[form])
                told = ", ".join(f"{form} {error:.4f}" for form, error in errors.items())
                notes.append(f"{name}: {kept} kept; calibration errors at equal size: {told}")
        return Compressed(list(found[kept]), notes, _output_error(problem, found[kept]))

    def _sizes(self, sites: Sequence[Site], budget: Budget) -> Sizes:
        options = self.options
        return sizes_within(
            budget.values, sites[0].d_in, [site.d_out for site in sites], options.rho, options.value_bits
        )

    def _space(self, problem: Problem) -> Whitened:
        """L W diag(q), q = 1 where outputs are not weighted."""
        space = SVDLLM().space(stacked_weight(problem), joint_statistics(problem), problem.name)
        grams = self._output_grams(problem)
        if grams is None:
            return space
        scale = torch.cat([gram if gram.ndim == 1 else gram.diagonal() for gram in grams]).sqrt()
        return Whitened(space.matrix * scale, space.undo, output_scale=scale, repair=space.repair)

    def _low_rank_space(self, problem: Problem, space: Whitened) -> Whitened:
        """That of the best low-rank factors under the same weights."""
        if self.options.output_weights != "full":
            return space
        return KFACSVD().space(stacked_weight(problem), joint_statistics(problem), problem.name)

    def _output_grams(self, problem: Problem) -> list[Tensor] | None:
        """What outputs count, site by site: the damped output-gradient Gram a token, or its diagonal (d_out,)."""
        weights = self.options.output_weights
        if weights == "none":
            return None
        grams = []
        for site, statistics in zip(problem.sites, problem.statistics, strict=True):
            gram = statistics.require("output_gram", site.name).double() / max(statistics.backward_tokens, 1)
            if len(gram) != site.d_out:
                raise InputError(f"{site.name}: the output-gradient Gram must have {site.d_out} rows; got {len(gram)}")
            if not gram.any():
                raise InputError(
                    f"{site.name}: the output-gradient Gram is zero: the loss does not depend on this site"
                )
            gram.diagonal().add_(DAMPING[1] * gram.diagonal().mean())
            grams.append(gram if weights == "full" else gram.diagonal())
        return grams

    def _factors(
        self,
        problem: Problem,
        space: Whitened,
        sizes: Sizes,
        iterations: int | None,
        generator: torch.Generator,
        rounds: int = ROUNDS,
    ) -> tuple[DictionaryFactors, float]:
        """The space's matrix over the returned scale, factorised; under full weights refined by so many rounds."""
        matrix, options = space.matrix, self.options
        scale = float(matrix.norm()) / math.sqrt(matrix.shape[1]) or 1.0
        y = (matrix / scale).float()
        factors = learn_dictionary(
            y, sizes.atoms, sizes.nonzeros, options.solver, iterations, options.tolerance, generator
        )
        if options.output_weights == "full" and space.output_scale is not None:
            own = space.output_scale.split([site.d_out for site in problem.sites])
            grams = self._output_grams(problem) or []
            blocks = [gram / (q[:, None] * q) for gram, q in zip(grams, own, strict=True)]
            factors = refine(y, factors, blocks, rounds)
        return factors, scale

    def _dictionary_layers(
        self, problem: Problem, space: Whitened, sizes: Sizes, generator: torch.Generator
    ) -> tuple[list[StructuredLinear], list[str]]:
        """One layer a site, the first owning the dictionary, and findings."""
        factors, scale = self._factors(problem, space, sizes, self.options.iterations, generator)
        unused = factors.unused_atoms
        notes = [f"{unused} of {sizes.atoms} atoms are used by no column"] if unused else []
        factors, told = self._by_backends((space.matrix / scale).float(), factors, generator)
        notes += told
        atoms = scale * factors.dictionary.double()
        atoms = space.undo(atoms) if space.undo else atoms
        length = atoms.norm(dim=0)
        values = factors.values.double() * length[factors.indices]
        if space.output_scale is not None:
            values = values / space.output_scale[:, None]
        if not (torch.isfinite(atoms).all() and torch.isfinite(values.float()).all()):
            raise RunError(f"{problem.name}: the dictionary is not finite")
        dictionary = nn.Parameter((atoms / length).to(torch.bfloat16).contiguous(), requires_grad=False)
        layers: list[StructuredLinear] = []
        d_outs = [site.d_out for site in problem.sites]
        parts = zip(factors.indices.split(d_outs), values.split(d_outs), problem.biases, strict=True)
        for indices, own, bias in parts:
            shared = {"dictionary": problem.sites[0].name} if layers else None
            layers.append(
                SparseDictionaryLinear.from_factors(
                    dictionary, indices, own, bias,
                    value_bits=self.options.value_bits, shared=shared, dtype=problem.weights[0].dtype,
                )
            )  # fmt: skip
        return layers, notes

    def _by_backends(
        self, y: Tensor, factors: DictionaryFactors, generator: torch.Generator
    ) -> tuple[DictionaryFactors, list[str]]:
        """The factors after the options' coder and refit, and what these tell."""
        dictionary, indices, values = factors.dictionary, factors.indices, factors.values
        notes: list[str] = []
        if self.options.coder is not None:
            coder = self.options.coder.build("sparse coder")
            codes, notes = code_again(y, dictionary, indices, values, coder, generator)
            dictionary, indices, values = codes.dictionary.to(y), codes.indices, codes.values.to(y)
        if self.options.refit is not None:
            solver = self.options.refit.build("solver")
            dictionary, values, told = solve_again(y, dictionary, indices, values, solver, generator)
            notes = notes + told
        changed = dataclasses.replace(factors, dictionary=dictionary, indices=indices, values=values)
        return changed, notes


def _dense_values(sites: Sequence[Site]) -> int:
    return sum(site.dense_values for site in sites)


def _rank_costs(sites: Sequence[Site]) -> Tensor:
    return rank_costs(sites[0].d_in, [site.d_out for site in sites], pivoted=True)


def _output_error(
    problem: Problem, layers: Sequence[StructuredLinear], output_grams: Sequence[Tensor] | None = None
) -> float:
    """Relative error of the outputs on the calibration data, of the layers as stored, each site under its own Gram.

    With output Grams, (d_out, d_out) or their diagonals (d_out,), outputs count as those weight them.
    """
    missed = total = 0.0
    for index, (weight, statistics, layer) in enumerate(zip(problem.weights, problem.statistics, layers, strict=True)):
        exact = weight.detach().double()
        gram = statistics.require("gram", problem.name).to(exact)
        for sign, rows in ((0, exact - layer.to_dense().detach().double()), (1, exact)):
            seen = rows @ gram
            if output_grams is not None:
                own = output_grams[index].to(exact)
                seen = own[:, None] * seen if own.ndim == 1 else own @ seen
            square = float((seen * rows).sum())
            missed, total = (missed, total + square) if sign else (missed + square, total)
    return math.sqrt(max(missed, 0.0) / total) if total > 0 else 0.0
