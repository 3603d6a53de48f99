"""Clustering of graphs whose vertices have attributes, by bootstrap algebraic multigrid (arXiv 2109.09367).

Every value of an attribute becomes a vertex of an augmented graph. The smooth vectors of its Laplacian, which a
multigrid bootstrap finds in linear time, take the place of eigenvectors; k-means works on blocks, a vertex's own row
of them and the rows of its attributes' values.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.backends.checks import choose
from llmcompress.backends.graphs.amg import (
    BootstrapResult,
    Vector,
    bootstrap,
    build_hierarchy,
    compatible_weights,
    pairwise_prolongator,
    spd_laplacian,
)
from llmcompress.backends.graphs.k_means import k_means
from llmcompress.backends.graphs.random_groups import RandomGroups, RandomOptions
from llmcompress.backends.graphs.subspaces import affinities, contiguous_labels, shared_basis_error, sketch
from llmcompress.backends.ports import Subject
from llmcompress.backends.report import Report
from llmcompress.errors import InputError
from llmcompress.models.heads import head_weights

__all__ = ["BootstrapAMG", "BootstrapAMGClustering", "BootstrapAMGOptions", "BootstrapResult", "augment_graph",
           "bootstrap", "build_hierarchy", "compatible_weights", "entropy", "head_affinity_graph", "modularity",
           "neighbour_graph", "pairwise_prolongator", "spd_laplacian"]  # fmt: skip

Distance = Literal["block", "vertex"]
TERCILES = 3


class BootstrapAMGOptions(BaseModel, extra="forbid"):
    rank: int = Field(default=16, ge=1, description="leading right singular directions that stand for a weight")
    neighbors: int = Field(default=8, ge=1, description="nearest members that each one is joined to, at least")
    attributes: list[Literal["depth", "norm"]] = Field(
        default=["depth", "norm"], description="terciles that join members of the same third; [] for the graph alone"
    )
    distance: Distance = Field(default="block", description="block: attributes' rows count too, as published; vertex")
    max_components: int = Field(default=12, ge=1, description="smooth vectors at most")
    n_init: int = Field(default=40, ge=1, description="k-means starts, of which the largest modularity is kept")


# --- graphs ----------------------------------------------------------------------------------------------------------


def augment_graph(A: Any, attributes: Any) -> tuple[sparse.csr_matrix, NDArray[np.int64]]:
    """The graph with a vertex for each attribute value, joined to its vertices by weight 1; and index (n, m) of those.

    A (n, n) as in `BootstrapAMGClustering`; attributes (n, m) of integers. Errors as there.
    """
    A = checked_graph(A)
    values = checked_attributes(attributes, A.shape[0])
    n, m = values.shape
    index = np.empty((n, m), dtype=np.int64)
    size = n
    for t in range(m):
        _, codes = np.unique(values[:, t], return_inverse=True)
        index[:, t] = size + codes
        size += int(codes.max()) + 1
    rows = np.repeat(np.arange(n), m)
    joined = sparse.coo_matrix((np.ones(n * m), (rows, index.ravel())), shape=(size, size))
    grown = A.copy()
    grown.resize((size, size))
    return sparse.csr_matrix(grown + joined + joined.T), index


def checked_graph(A: Any) -> sparse.csr_matrix:
    """A as a csr matrix in float64. InputError unless it is square, symmetric, finite, not negative, without loops,
    connected, and of three vertices at least.
    """
    if isinstance(A, Tensor):
        A = A.detach().cpu().numpy()
    A = sparse.csr_matrix(A, dtype=np.float64)
    if A.shape[0] != A.shape[1]:
        raise InputError(f"A must be square; got shape {A.shape}")
    if A.shape[0] < 3:
        raise InputError(f"A must have at least 3 vertices; got {A.shape[0]}")
    if not np.isfinite(A.data).all():
        raise InputError("A has weights that are not finite")
    if (A.data < 0).any():
        raise InputError("A has negative weights")
    if A.diagonal().any():
        raise InputError("A has self-loops: its diagonal must be zero")
    if abs(A - A.T).max() > 1e-12 * max(float(A.max()), 1e-300):
        raise InputError("A must be symmetric")
    A.eliminate_zeros()
    A.sort_indices()
    count, component = connected_components(A, directed=False)
    if count > 1:
        sizes = ", ".join(str(size) for size in sorted(np.bincount(component).tolist(), reverse=True)[:10])
        raise InputError(f"A must be connected; it has {count} components, of sizes {sizes}: cluster each on its own")
    return A


def checked_attributes(attributes: Any, n: int) -> NDArray[Any]:
    """(n, m). InputError for another length, or an attribute that is missing."""
    if isinstance(attributes, Tensor):
        attributes = attributes.detach().cpu().numpy()
    values = np.asarray(attributes)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or len(values) != n:
        raise InputError(f"attributes must be ({n}, m), a row a vertex; got shape {values.shape}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InputError("attributes have NaN: give what is missing a value of its own")
    return values


def neighbour_graph(affinity: Tensor, neighbors: int) -> sparse.csr_matrix:
    """Each vertex joined to its nearest `neighbors`, and to more of them until the graph is connected.

    affinity (n, n) not negative; weights are affinities over their mean: an attribute's edge, of weight 1, is of their
    size.
    """
    n = len(affinity)
    weights = affinity.double().cpu().clone().fill_diagonal_(-1)
    order = weights.argsort(dim=1, descending=True, stable=True)
    for count in range(min(neighbors, n - 1), n):
        nearest = order[:, :count]
        graph = torch.zeros_like(weights).scatter(1, nearest, weights.gather(1, nearest).clamp_min(1e-12))
        A = sparse.csr_matrix(torch.maximum(graph, graph.T).numpy())
        if connected_components(A, directed=False)[0] == 1:
            break
    return A / A.data.mean()


def head_affinity_graph(
    model: PreTrainedModel, matrix: str = "q_proj", rank: int = 16, n_neighbors: int = 8
) -> tuple[sparse.csr_matrix, NDArray[np.int64], list[str]]:
    """Heads joined by the affinity of the subspaces that they read; attributes (n, 2): terciles of depth and of norm.

    matrix: leaf name or role of the map whose rows the heads are. The names are PATH[HEAD]. InputError if no block has
    such a map, or heads cannot be told apart in it.
    """
    heads, blocks, names = head_weights(model, matrix)
    sketches = torch.stack([sketch(weight, min(rank, *weight.shape)) for weight in heads])
    A = neighbour_graph(affinities(sketches), n_neighbors)
    return A, torch.stack((terciles(blocks), terciles(heads.flatten(1).norm(dim=1))), 1).numpy(), names


def terciles(values: Tensor) -> Tensor:
    """0, 1 or 2 (n,) int64 by rank, ties in order."""
    ranks = values.argsort(stable=True).argsort()
    return ranks * TERCILES // len(values)


# --- clustering ------------------------------------------------------------------------------------------------------


def modularity(A: sparse.csr_matrix, labels: NDArray[np.int64]) -> float:
    """sum over clusters of the share of weight inside less the square of the share of weight that touches them."""
    clusters = sparse.csr_matrix((np.ones(len(labels)), (np.arange(len(labels)), labels)))
    shares = (clusters.T @ A @ clusters).toarray() / A.sum()
    return float(np.trace(shares) - np.square(shares.sum(1)).sum())


def entropy(labels: NDArray[np.int64], attributes: NDArray[Any]) -> float:
    """Bits of the attributes (n, m) within a cluster, summed over attributes, averaged over clusters by size."""
    total = 0.0
    for label in np.unique(labels):
        inside = attributes[labels == label]
        for t in range(attributes.shape[1]):
            _, counts = np.unique(inside[:, t], return_counts=True)
            p = counts / len(inside)
            total -= len(inside) / len(labels) * float((p * np.log2(p)).sum())
    return total


class BootstrapAMGClustering(ClusterMixin, BaseEstimator):
    """Clusters of a graph, with or without attributes.

    distance: "block" compares attributes' rows too, "vertex" only the vertex's own row of the augmented graph's
    vectors. n_init, max_iter: k-means starts and rounds; the start of the largest modularity is kept. tol,
    max_components, sweeps: of the bootstrap. After `fit(A, attributes)`, A (n, n) sparse, numpy or torch, undirected
    and connected, attributes (n, m) of integers or None: labels_ (n,) int64, embedding_ (n, d), smooth_vectors_
    (N, q + 1), convergence_rates_, modularity_, entropy_ (None without attributes).
    InputError for a graph or attributes that are malformed, or n_clusters outside 2..n.
    Cost: O(nnz) a cycle and 7.5 q² cycles for q vectors; n_init k-means of (n, (q + 1)(m + 1)).
    """

    def __init__(
        self, n_clusters: int, distance: Distance = "block", n_init: int = 100, max_iter: int = 10, tol: float = 1e-6,
        max_components: int = 40, sweeps: int = 2, random_state: int | None = None,
    ) -> None:  # fmt: skip
        self.n_clusters, self.distance, self.n_init, self.max_iter = n_clusters, distance, n_init, max_iter
        self.tol, self.max_components, self.sweeps, self.random_state = tol, max_components, sweeps, random_state

    def fit(self, A: Any, y: Any = None, *, attributes: Any = None) -> BootstrapAMGClustering:
        choose("distance", self.distance, ("block", "vertex"))
        graph = checked_graph(A)
        n = graph.shape[0]
        if not 2 <= self.n_clusters <= n:
            raise InputError(f"n_clusters must be between 2 and the {n} vertices; got {self.n_clusters}")
        seed = self.random_state or 0
        index = np.empty((n, 0), dtype=np.int64)
        grown = graph
        if attributes is not None:
            grown, index = augment_graph(graph, attributes)
        found = bootstrap(spd_laplacian(grown), self.tol, self.max_components, random_state=seed, sweeps=self.sweeps)
        self.smooth_vectors_, self.convergence_rates_ = found.smooth_vectors, found.rates
        self.embedding_ = self._embedding(found.smooth_vectors, index)
        labels, self.modularity_ = self._best(graph, seed)
        checked = checked_attributes(attributes, n) if attributes is not None else None
        self.entropy_ = None if checked is None else entropy(labels, checked)
        self.labels_ = torch.from_numpy(labels) if isinstance(A, Tensor) else labels
        return self

    def fit_predict(self, A: Any, y: Any = None, *, attributes: Any = None) -> Any:
        return self.fit(A, attributes=attributes).labels_

    def _embedding(self, vectors: Vector, index: NDArray[np.int64]) -> Vector:
        basis = np.linalg.svd(vectors, full_matrices=False)[0]
        n = len(index)
        parts = [basis[:n]]
        if self.distance == "block":
            parts += [basis[index[:, t]] for t in range(index.shape[1])]
        return np.concatenate(parts, axis=1)

    def _best(self, graph: sparse.csr_matrix, seed: int) -> tuple[NDArray[np.int64], float]:
        from sklearn.cluster import KMeans

        seeds = np.random.default_rng(seed).integers(2**31, size=self.n_init)
        best: tuple[NDArray[np.int64] | None, float] = (None, -np.inf)
        for start in seeds.tolist():
            method = KMeans(self.n_clusters, init="random", n_init=1, max_iter=self.max_iter, tol=0, random_state=start)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters: seen below
                labels = method.fit_predict(self.embedding_).astype(np.int64)
            if len(np.unique(labels)) == self.n_clusters and (value := modularity(graph, labels)) > best[1]:
                best = labels, value
        if best[0] is None:
            raise InputError(f"fewer than {self.n_clusters} distinct vertices: ask for fewer clusters")
        return best[0], best[1]


# --- the ports -------------------------------------------------------------------------------------------------------


class BootstrapAMG:
    """The grouping port, and an analysis of a model's query heads: one basis a group, against simpler groupings."""

    Options: ClassVar[type[BootstrapAMGOptions]] = BootstrapAMGOptions
    trains: ClassVar[bool] = True  # heads of all blocks are compared

    def __init__(self, options: BootstrapAMGOptions) -> None:
        self.options = options

    def describe(self, weight: Tensor) -> Tensor:
        return sketch(weight, min(self.options.rank, *weight.shape))

    def groups(self, features: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """features (n, r, d_in): the members' `describe`, in order of depth."""
        norms = features.flatten(1).norm(dim=1).cpu()
        columns = {"depth": torch.arange(len(features)), "norm": norms}
        attributes = [terciles(columns[name]) for name in self.options.attributes]
        return self._labels(affinities(features).cpu(), attributes, count, generator).to(features.device)

    def _labels(self, affinity: Tensor, attributes: Sequence[Tensor], count: int, generator: torch.Generator) -> Tensor:
        options = self.options
        seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
        components = min(options.max_components, count)  # all count alike: more than groups would drown these
        method = BootstrapAMGClustering(
            count, options.distance, options.n_init, max_components=components, random_state=seed
        )
        graph = neighbour_graph(affinity, options.neighbors)
        given = torch.stack(list(attributes), 1) if attributes else None
        return torch.from_numpy(method.fit(graph, attributes=given).labels_)

    def analyze(self, subject: Subject) -> Report:
        """Relative error of one basis a group of query heads, for groups of every kind, at equal count and rank."""
        model, _ = subject.trainable()
        heads, blocks, _ = head_weights(model, "q")
        heads, blocks = heads.cpu(), blocks.cpu()
        n, count = len(heads), min(10, len(heads) // 2)
        rank = min(96, heads.shape[2] // 2)
        sketches = torch.stack([self.describe(weight) for weight in heads])
        affinity, norm = affinities(sketches), heads.flatten(1).norm(dim=1)
        columns = {"depth": terciles(blocks), "norm": terciles(norm)}
        generator = torch.Generator().manual_seed(subject.seed)
        attributes = [columns[name] for name in self.options.attributes]
        found = {
            "bootstrap AMG": self._labels(affinity, attributes, count, generator),
            "bootstrap AMG, graph alone": self._labels(affinity, [], count, generator),
            "contiguous": contiguous_labels(n, count),
            "k-means": k_means(affinity, count, 20, generator),
            "random": RandomGroups(RandomOptions()).groups(heads, count, generator),
        }
        report = Report(
            f"{n} query heads in {count} groups: relative error of one basis of {rank} inputs a group",
            ["groups", "error", "modularity", "smallest", "largest"],
        )
        graph = neighbour_graph(affinity, self.options.neighbors)
        for name, labels in found.items():
            sizes = labels.bincount()
            error = shared_basis_error(heads, labels, rank)
            report.add(name, error, modularity(graph, labels.numpy()), int(sizes.min()), int(sizes.max()))
        errors = dict(zip(report.column("groups"), report.column("error"), strict=True))
        gain = errors["contiguous"] / errors["bootstrap AMG"] - 1
        verdict = "group by this graph" if gain > 0.01 else "neighbouring blocks do as well"
        report.findings.append(f"depth order errs by {abs(gain):.1%} {'more' if gain > 0 else 'less'}: {verdict}")
        return report
