"""Forest-structured blocks: their greedy choice and exact updates by message passing, linear in the block's size."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch
from scipy.sparse.csgraph import breadth_first_order, connected_components
from torch import Tensor

from llmcompress.backends.regression.block_problems import SparseQuadratic
from llmcompress.errors import InputError


def greedy_forest(order: Tensor, graph: Any) -> Tensor:
    """Vertices kept, in the order of `order`, that induce a forest: one joins if its kept neighbours lie in different
    trees. graph: symmetric scipy sparse adjacency. O(edges α) by union-find.
    """
    graph = scipy.sparse.csr_matrix(graph)
    indptr, indices = graph.indptr, graph.indices
    parent = [-1] * graph.shape[0]  # -1: not kept

    def find(v: int) -> int:
        while parent[v] != v:
            parent[v] = parent[parent[v]]
            v = parent[v]
        return v

    kept = []
    for v in order.tolist():
        near = indices[indptr[v] : indptr[v + 1]].tolist()
        roots = [find(u) for u in near if u != v and parent[u] >= 0]
        if len(set(roots)) < len(roots):
            continue
        parent[v] = v
        for root in roots:
            parent[root] = v
        kept.append(v)
    return torch.tensor(kept, dtype=torch.int64)


def forest_solve(block: Tensor, diag: Tensor, edges: Tensor, weights: Tensor, rhs: Tensor) -> Tensor:
    """Solves H_bb d = rhs where H_bb's graph is a forest: elimination from the leaves to the roots, and back; O(|b|).

    block (b,) vertices; diag (b,) their diagonal entries; edges (m, 2) pairs of positions in the block; weights (m,)
    H's entries there. InputError if the edges hold a cycle ("block is not a forest") or a pivot is not positive.
    """
    size = len(block)
    pairs = edges.numpy().reshape(-1, 2)
    graph = scipy.sparse.csr_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(size, size))
    trees, label = connected_components(graph, directed=False)
    if len(pairs) != size - trees:
        raise InputError("block is not a forest: its edges hold a cycle")
    order, parent = _breadth_first(graph, label, trees)
    entry = {(min(a, b), max(a, b)): w for (a, b), w in zip(pairs.tolist(), weights.tolist(), strict=True)}
    d, r = diag.tolist(), rhs.tolist()
    up = [0.0] * size
    for v in reversed(order):
        if d[v] <= 0:
            raise InputError("H is not positive definite on the block")
        p = parent[v]
        if p >= 0:
            up[v] = entry[min(p, v), max(p, v)]
            d[p] -= up[v] ** 2 / d[v]
            r[p] -= up[v] * r[v] / d[v]
    solution = [0.0] * size
    for v in order:
        p = parent[v]
        solution[v] = (r[v] - (up[v] * solution[p] if p >= 0 else 0.0)) / d[v]
    return torch.tensor(solution, dtype=torch.float64)


def _breadth_first(graph: Any, label: np.ndarray, trees: int) -> tuple[list[int], list[int]]:
    """All vertices, parents before children, and each one's parent or -1: one search from a root above all trees."""
    size = graph.shape[0]
    first = np.unique(label, return_index=True)[1]
    links = scipy.sparse.csr_matrix((np.ones(trees), (np.zeros(trees, int), first)), shape=(1, size))
    joined = scipy.sparse.bmat([[graph, links.T], [links, None]], format="csr")
    order, before = breadth_first_order(joined, size, directed=False)
    parent = before[:size].copy()
    parent[parent == size] = -1
    return [v for v in order.tolist() if v != size], parent.tolist()


def block_update(problem: SparseQuadratic, g: Tensor, block: Tensor) -> Tensor:
    """-H_bb⁻¹ g_b for a forest block."""
    part = problem.H[block.numpy()][:, block.numpy()].tocoo()
    upper = part.row < part.col
    edges = torch.from_numpy(np.stack((part.row[upper], part.col[upper]), 1).astype(np.int64))
    return forest_solve(block, problem.lipschitz[block], edges, torch.from_numpy(part.data[upper]), -g[block])


def label_problem(W: Any, labels: Tensor, labelled: Tensor) -> tuple[SparseQuadratic, Tensor]:
    """Label propagation as a quadratic over the unlabelled vertices, and those vertices (u,).

    W (n, n) symmetric sparse weights; labels (s,) values at the vertices `labelled` (s,). Minimises
    sum W_ij (x_i - x_j)² / 2. InputError for negative weights and components without a label.
    """
    W = scipy.sparse.csr_matrix(W)
    if W.nnz and W.data.min() < 0:
        raise InputError("label propagation needs weights that are not negative")
    known = np.zeros(W.shape[0], bool)
    known[labelled.numpy()] = True
    count, component = connected_components(W, directed=False)
    missing = set(range(count)) - set(component[known].tolist())
    if missing:
        vertex = int(np.flatnonzero(component == min(missing))[0])
        raise InputError(f"the component of vertex {vertex} has no label: its values are not determined")
    degree = scipy.sparse.diags(np.asarray(W.sum(1)).ravel())
    free = np.flatnonzero(~known)
    laplacian = (degree - W).tocsr()
    values = np.zeros(W.shape[0])
    values[labelled.numpy()] = labels.double().numpy()
    return SparseQuadratic(laplacian[free][:, free], torch.from_numpy((W @ values)[free])), torch.from_numpy(free)
