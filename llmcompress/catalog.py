"""Every compressor, allocation, layer and backend by name: imported only when used.

A new algorithm adds one line here. Third-party packages add entries by the entry-point group `llmcompress.plugins`:
each entry point loads to an `Entry` or a list of them.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import Any

from llmcompress.errors import InputError, one_line


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue. `target` is `module:attribute`, `port` where a backend plugs in."""

    name: str
    kind: str  # compressor | allocation | optimizer | layer | backend
    target: str
    paper: str = ""
    group: str = ""
    port: str = ""
    summary: str = ""
    targets: tuple[str, ...] = ("attention", "ffn")  # a compressor's, where a recipe names none

    @property
    def module(self) -> str:
        """The last name of its module: a backend is found by it too."""
        return self.target.partition(":")[0].rpartition(".")[2]

    def load(self) -> Any:
        """What `target` names. InputError if a module that it needs is not installed, or has no such attribute."""
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise InputError(f"{self.kind} '{self.name}' needs the module '{error.name}': install it") from error
        except AttributeError as error:
            raise InputError(f"{self.kind} '{self.name}': {self.target} does not load: {error}") from error


_ENTRIES = (
    Entry("svd", "compressor", "llmcompress.compressors.svd:SVD", "Eckart-Young 1936", "low_rank",
          summary="plain truncated SVD, data-free; the baseline"),
    Entry("asvd", "compressor", "llmcompress.compressors.asvd:ASVD", "2312.05821", "low_rank",
          summary="SVD of the weight scaled by mean activation magnitude"),
    Entry("svd_llm", "compressor", "llmcompress.compressors.svd_llm:SVDLLM", "2403.07378", "low_rank",
          summary="SVD in the space whitened by the input Gram: the least output error of any rank-r factors"),
    Entry("swift_svd", "compressor", "llmcompress.compressors.swift_svd:SwiftSVD", "2604.01609", "low_rank",
          summary="the same minimiser from the output covariance's eigenvectors, no Cholesky"),
    Entry("basis_sharing", "compressor", "llmcompress.compressors.basis_sharing:BasisSharing", "2410.03765", "low_rank",
          summary="neighbouring blocks share one basis"),
    Entry("fwsvd", "compressor", "llmcompress.compressors.fwsvd:FWSVD", "2207.00112", "low_rank",
          summary="SVD weighted by the Fisher information of each input feature; meant for fine-tuning afterwards"),
    Entry("kfac_svd", "compressor", "llmcompress.compressors.kfac_svd:KFACSVD", "1503.05671, 2505.17974", "low_rank",
          summary="SVD whitened by the Grams of inputs and output gradients: the least loss to second order"),
    Entry("cospadi", "compressor", "llmcompress.compressors.cospadi:CoSpaDi", "2509.22075", "dictionary",
          summary="sparse dictionary of the whitened weight, one for all that read the same input"),
    Entry("structured_ffn", "compressor", "llmcompress.compressors.structured_ffn:StructuredFFN", "2406.16450", "block",
          summary="feed-forward weights as low-rank, BlockDense or BlockShuffle layers", targets=("ffn",)),
    Entry("layer_sharing", "compressor", "llmcompress.compressors.layer_sharing:LayerSharing", "2209.04836", "merging",
          summary="neighbouring blocks share the mean of their matrices, neurons and heads aligned first"),
    Entry("sparse_low_rank", "compressor", "llmcompress.compressors.sparse_low_rank:SparseLowRank", "2302.11068",
          "low_rank", summary="the largest entries as they are, factors recovered from the others; data-free"),
    Entry("uniform", "allocation", "llmcompress.compressors.allocation.uniform:Uniform",
          summary="every unit the same ratio"),
    Entry("svd_llm_v2", "allocation", "llmcompress.compressors.allocation.svd_llm_v2:SVDLLMV2", "2503.12340",
          summary="within a role, more for the units that lose more"),
    Entry("d_rank", "allocation", "llmcompress.compressors.allocation.d_rank:DRank", "D-Rank 2025",
          summary="ranks by effective rank over cost"),
    Entry("loss_aware", "allocation", "llmcompress.compressors.allocation.loss_aware:LossAware",
          summary="one budget for all units, spent where the summed error falls most"),
    Entry("welore", "allocation", "llmcompress.compressors.allocation.welore:WeLore", "2407.11239",
          summary="ranks from one threshold over all normalised spectra"),
    Entry("adamw", "optimizer", "llmcompress.finetune.optimizers:AdamW", "1711.05101",
          summary="Adam with decoupled weight decay"),
    Entry("muon", "optimizer", "llmcompress.backends.optim.auon:MuonFactory", "2502.16982", "optim",
          summary="orthogonalised momentum of matrices, AdamW for the rest"),
    Entry("auon", "optimizer", "llmcompress.backends.optim.auon:AuONFactory", "2509.24320", "optim",
          summary="momentum of unit norm for matrices; half of AdamW's state, no better than normalised SGD"),
    Entry("hybrid_auon", "optimizer", "llmcompress.backends.optim.auon:HybridAuONFactory", "2509.24320", "optim",
          summary="the same after one Newton-Schulz step"),
    Entry("mfac", "optimizer", "llmcompress.backends.curvature.mfac:MFACFactory", "2107.03356", "curvature",
          summary="steps by the inverse Fisher matrix of the last gradients, each of them kept"),
    Entry("gradient_stability", "backend", "llmcompress.backends.analysis.gradient_stability:GradientStability",
          "2407.11239", "analysis", "analysis", summary="gradient subspaces and ranks while the model trains"),
    Entry("dual_smoothing", "backend", "llmcompress.backends.analysis.dual_smoothing:DualSmoothing", "2404.09586",
          "analysis", "analysis", summary="which decisions on a model's embeddings provably survive its compression"),
    Entry("gp_pde", "backend", "llmcompress.backends.analysis.gp_pde:GPPDE", "2311.04465", "analysis", "analysis",
          summary="spectral-mixture Gaussian processes: positional attention; equations of high frequency"),
    Entry("singular_density", "backend", "llmcompress.backends.analysis.singular_density:SingularDensity",
          "2105.04046", "analysis", "analysis", summary="density and dimension of activations by a deep model"),
    Entry("weight_matching", "backend", "llmcompress.backends.merging.layer_similarity:WeightMatching",
          "2402.04051, 2209.04836", "merging", "analysis",
          summary="how alike blocks are once neurons and heads are aligned; whole models: llmcompress merge"),
    Entry("one_connection", "backend", "llmcompress.backends.graphs.one_connection:OneConnection", "2210.00239",
          "graphs", "analysis", summary="the residual stream as a linear model: where its output's variance begins"),
    Entry("uniform", "backend", "llmcompress.backends.sampling.uniform:Uniform", "", "sampling", "sampler",
          summary="uniform rows without replacement; the baseline"),
    Entry("sensitivity", "backend", "llmcompress.backends.sampling.sensitivity_sampling:Sensitivity", "2306.00732",
          "sampling", "sampler", summary="rows by leverage, Lewis weights or lp sensitivities"),
    Entry("volume", "backend", "llmcompress.backends.sampling.volume_sampling:Volume", "2312.14057", "sampling",
          "sampler", summary="rows by determinantal point processes: stable least squares from few of them"),
    Entry("top_eigenvector", "backend", "llmcompress.backends.streaming.streaming_eigenvector:TopEigenvector",
          "2412.11963", "streaming", "stream", summary="top direction in one pass; finds massive-activation tokens"),
    Entry("linf_sketch", "backend", "llmcompress.backends.regression.linf_regression:LinfSketch", "2302.00248",
          "regression", "solver", summary="sketched least squares that is accurate in every entry"),
    Entry("conjugate_direction", "backend", "llmcompress.backends.regression.conjugate_direction:ConjugateDirection",
          "2205.10763", "regression", "solver", summary="learned conjugate directions for positive definite systems"),
    Entry("block_coordinate", "backend", "llmcompress.backends.regression.block_coordinate:BlockCoordinate",
          "1712.08859", "regression", "solver", summary="greedy block coordinate descent from the Gram alone"),
    Entry("random_support", "backend", "llmcompress.backends.regression.sparse_regression:RandomSupport", "2511.06211",
          "regression", "sparse coder", summary="sparse regression that no condition number troubles"),
    Entry("kronecker_sbl", "backend", "llmcompress.backends.regression.kronecker_sbl:KroneckerSBLCoder", "2307.14719",
          "regression", "sparse coder", summary="sparse Bayesian codes whose support is a Kronecker product"),
    Entry("lie_group", "backend", "llmcompress.backends.geometry.lie_group:LieGroup", "2310.11366", "geometry",
          "analysis", summary="the gauge in which low-rank factors are rounded to few bits at the least error"),
    Entry("spd_batchnorm", "backend", "llmcompress.backends.geometry.spd_batchnorm:Bures", "2504.00660", "geometry",
          "stream", summary="Bures-Wasserstein distances between the Grams of texts, and the mixture that a text is"),
    Entry("augmented_covariance", "backend", "llmcompress.backends.geometry.augmented_covariance:ACMDomains",
          "2302.04508", "geometry", "analysis", summary="which text activations come from, and whether in order"),
    Entry("ponita", "backend", "llmcompress.backends.geometry.ponita:WeightClouds", "2310.02970", "geometry",
          "analysis", summary="guesses each matrix's loss from its neurons as points; not useful"),
    Entry("random", "backend", "llmcompress.backends.graphs.random_groups:RandomGroups", "", "graphs", "grouping",
          summary="groups at random; the baseline"),
    Entry("k_means", "backend", "llmcompress.backends.graphs.k_means:KMeansGroups", "", "graphs", "grouping",
          summary="k-means on the affinities of the subspaces that weights read"),
    Entry("bootstrap_amg", "backend", "llmcompress.backends.graphs.bootstrap_amg:BootstrapAMG", "2109.09367", "graphs",
          "grouping", summary="clusters of a graph with attributes by bootstrap algebraic multigrid"),
    Entry("ila_sdp", "backend", "llmcompress.backends.graphs.ila_sdp:ILASDPGroups", "2209.15097", "graphs", "grouping",
          summary="Gaussian clusters of different shapes by semidefinite programs, whatever the start"),
    Entry("negative_eigenvalues", "backend",
          "llmcompress.backends.sequence.negative_eigenvalues:NegativeEigenvalues", "2411.12537", "sequence", "layer",
          summary="eigenvalues in [-1, 1] for linear recurrences: states that can be tracked"),
    Entry("ptd", "backend", "llmcompress.backends.sequence.ptd:PTD", "2310.01698", "sequence", "layer",
          summary="state-space adapters whose HiPPO matrix is perturbed, then made diagonal"),
    Entry("matrix_completion", "backend", "llmcompress.backends.recovery.matrix_completion:MatrixCompletion",
          "2302.11068", "recovery", "recovery", summary="factors from the entries seen, by alternating minimisation"),
    Entry("matrix_sensing", "backend", "llmcompress.backends.recovery.matrix_sensing:MatrixSensing", "2310.01769",
          "recovery", "recovery", summary="factors of too many columns by gradient descent, freed by one rescaling"),
    Entry("subgradient", "backend", "llmcompress.backends.recovery.subgradient:SubGM", "2202.08788", "recovery",
          "recovery", summary="factors by the l1 loss; Grams that bad batches do not ruin"),
    Entry("mfac", "backend", "llmcompress.backends.curvature.mfac:SequenceFisher", "2107.03356", "curvature",
          "curvature", summary="inverse Fisher products of sequence gradients; pruning by them"),
    Entry("flag", "backend", "llmcompress.backends.optim.flag_aggregator:Flag", "2302.05865", "optim", "aggregator",
          summary="gradients by the subspace that most workers agree on: a broken one ruins nothing"),
    Entry("low_rank", "layer", "llmcompress.layers.low_rank:LowRankLinear"),
    Entry("quantized_low_rank", "layer", "llmcompress.layers.quantized_low_rank:QuantizedLowRankLinear"),
    Entry("block_dense", "layer", "llmcompress.layers.block:BlockDenseLinear"),
    Entry("block_shuffle", "layer", "llmcompress.layers.block:BlockShuffleLinear"),
    Entry("shared", "layer", "llmcompress.layers.shared:SharedLinear"),
    Entry("sparse_low_rank", "layer", "llmcompress.layers.sparse_low_rank:SparseLowRankLinear"),
    Entry("sparse_dictionary", "layer", "llmcompress.layers.sparse_dictionary:SparseDictionaryLinear"),
)  # fmt: skip


@functools.cache
def entries() -> tuple[Entry, ...]:
    """The built-in entries followed by those of installed plug-ins.

    InputError naming the plug-in that does not load, holds no entries, or takes a name that is taken.
    """
    found = {(entry.kind, entry.port, entry.name): entry for entry in _ENTRIES}
    for point in importlib.metadata.entry_points(group="llmcompress.plugins"):
        for entry in _plugin_entries(point):
            key = (entry.kind, entry.port, entry.name)
            if key in found:
                raise InputError(f"plug-in '{point.name}': the {entry.kind} '{entry.name}' is in the catalogue already")
            found[key] = entry
    return tuple(found.values())


def _plugin_entries(point: importlib.metadata.EntryPoint) -> list[Entry]:
    try:
        loaded = point.load()
    except Exception as error:  # a plug-in is foreign code: it may raise anything
        reason = f"{type(error).__name__}: {one_line(str(error))}"
        raise InputError(f"plug-in '{point.name}' ({point.value}) does not load: {reason}") from error
    entries = list(loaded) if isinstance(loaded, (list, tuple)) else [loaded]
    if not all(isinstance(entry, Entry) for entry in entries):
        raise InputError(f"plug-in '{point.name}' ({point.value}) must be an Entry or a list of them")
    return entries


def names(kind: str, port: str | None = None) -> list[str]:
    return [e.name for e in entries() if e.kind == kind and (port is None or e.port == port)]


def nearest(name: str, known: list[str]) -> str:
    """`; did you mean 'x'?`, or the list of what is known."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"


def get(kind: str, name: str, port: str | None = None) -> Entry:
    """The entry of that kind and name. InputError offers the nearest name."""
    for entry in entries():
        named = entry.name == name or (kind == "backend" and entry.module == name)
        if entry.kind == kind and named and (port is None or entry.port == port):
            return entry
    what = port or ("method" if kind == "compressor" else kind)
    raise InputError(f"unknown {what} '{name}'{nearest(name, names(kind, port))}")
