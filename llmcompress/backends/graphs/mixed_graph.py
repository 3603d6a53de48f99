"""Mixed graphs of linear structural equation models, and the finite rule for their covariances (arXiv 2210.00239).

X = Lambdaᵀ X + e with Cov e = Omega: Lambda lives on directed edges (cycles allowed), Omega on bidirected ones and the
diagonal. Every entry of Sigma is a finite sum over one-connections, a simple path with disjoint cycles beside it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError

if TYPE_CHECKING:
    import networkx
    import sympy

Edge = tuple[int, int]
MAX_TERMS = 100_000


@dataclass(frozen=True)
class MixedGraph:
    """n vertices, directed edges i -> j, bidirected edges {i, j}. InputError for self-loops or unknown vertices."""

    n: int
    directed: Sequence[Edge]
    bidirected: Sequence[Edge] = ()
    names: Sequence[str] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for edges in (self.directed, self.bidirected):
            for i, j in edges:
                if not (0 <= i < self.n and 0 <= j < self.n):
                    raise InputError(f"edge ({i}, {j}): no such vertex; there are 0..{self.n - 1}")
                if i == j:
                    raise InputError(f"edge ({i}, {j}) is a self-loop")
        object.__setattr__(self, "directed", tuple(dict.fromkeys((i, j) for i, j in self.directed)))
        both = dict.fromkeys((min(i, j), max(i, j)) for i, j in self.bidirected)
        object.__setattr__(self, "bidirected", tuple(both))

    @classmethod
    def from_networkx(cls, g: networkx.DiGraph, bidirected: Sequence[tuple[Any, Any]] = ()) -> MixedGraph:
        """The graph of a networkx one, its nodes numbered in their order."""
        number = {node: index for index, node in enumerate(g.nodes)}
        pairs = [(number[a], number[b]) for a, b in g.edges]
        joined = [(number[a], number[b]) for a, b in bidirected]
        return cls(len(number), pairs, joined, [str(node) for node in g.nodes])

    def to_networkx(self) -> networkx.DiGraph:
        """Its directed edges."""
        import networkx

        graph = networkx.DiGraph()
        graph.add_nodes_from(range(self.n))
        graph.add_edges_from(self.directed)
        return graph

    @property
    def is_simple(self) -> bool:
        """Whether at most one edge, of any kind, joins two vertices."""
        pairs = [tuple(sorted(edge)) for edge in (*self.directed, *self.bidirected)]
        return len(set(pairs)) == len(pairs)

    @property
    def is_acyclic(self) -> bool:
        import networkx

        return bool(networkx.is_directed_acyclic_graph(self.to_networkx()))


@dataclass(frozen=True)
class Term:
    """sign times the product of the edges' weights."""

    sign: int
    edges: tuple[Edge, ...]


def disjoint_cycle_sets(G: MixedGraph, max_terms: int = MAX_TERMS) -> list[Term]:
    """det(I - Lambda): a term (-1)^|C| a set C of vertex-disjoint directed cycles, the empty one included.

    InputError if there are more than max_terms. Cost: as many as there are, n! in a complete graph.
    """
    return _capped(_cycle_sets(_cycles(G), 0), max_terms)


def one_connections(G: MixedGraph, i: int, j: int, max_terms: int = MAX_TERMS) -> list[Term]:
    """Entry (i, j) of the adjugate of I - Lambda: a simple path i to j and vertex-disjoint cycles beside it.

    InputError for unknown vertices, or more than max_terms. Cost: as many as there are, (n - 1)! in a complete graph.
    """
    for vertex in (i, j):
        if not 0 <= vertex < G.n:
            raise InputError(f"no vertex {vertex}; there are 0..{G.n - 1}")
    cycles = _cycles(G)

    def terms() -> Iterator[Term]:
        for path in simple_paths(G, i, j):
            edges = tuple(itertools.pairwise(path))
            for term in _cycle_sets(cycles, _mask(path)):
                yield Term(term.sign, edges + term.edges)

    return _capped(terms(), max_terms)


def simple_paths(G: MixedGraph, i: int, j: int) -> Iterator[list[int]]:
    """Directed paths without a repeated vertex; the bare vertex if i = j."""
    import networkx

    if i == j:
        return iter([[i]])
    return iter(networkx.all_simple_paths(G.to_networkx(), i, j))


def _mask(vertices: Sequence[int]) -> int:
    return functools.reduce(lambda mask, vertex: mask | 1 << vertex, vertices, 0)


def _cycles(G: MixedGraph) -> list[tuple[int, tuple[Edge, ...]]]:
    """Vertices, as a mask, and edges of every directed cycle."""
    import networkx

    found = []
    for cycle in networkx.simple_cycles(G.to_networkx()):
        found.append((_mask(cycle), tuple(itertools.pairwise([*cycle, cycle[0]]))))
    return found


def _cycle_sets(cycles: list[tuple[int, tuple[Edge, ...]]], taken: int, first: int = 0) -> Iterator[Term]:
    """Sets of disjoint cycles, from number `first` on, that avoid the vertices `taken`."""
    yield Term(1, ())
    for index in range(first, len(cycles)):
        mask, edges = cycles[index]
        if not mask & taken:
            for term in _cycle_sets(cycles, taken | mask, index + 1):
                yield Term(-term.sign, edges + term.edges)


def _capped(terms: Iterator[Term], max_terms: int) -> list[Term]:
    found: list[Term] = []
    for term in terms:
        if len(found) == max_terms:
            rest = 1 + sum(1 for _ in terms)
            raise InputError(f"{len(found) + rest} terms exceed max_terms = {max_terms}")
        found.append(term)
    return found


# --- symbols ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def numerators(G: MixedGraph) -> tuple[Any, list[list[Any]]]:
    """det(I - Lambda) and its square times Sigma (n x n), as elements of a polynomial ring over the integers."""
    from sympy import ZZ, ring

    errors = [(i, i) for i in range(G.n)] + list(G.bidirected)
    names = [f"l{i}_{j}" for i, j in G.directed] + [f"w{i}_{j}" for i, j in errors]
    R, *gens = ring(names, ZZ)
    weight = dict(zip(G.directed, gens[: len(G.directed)], strict=True))
    noise = dict(zip(errors, gens[len(G.directed) :], strict=True))

    def total(terms: list[Term]) -> Any:
        return sum((functools.reduce(lambda a, e: a * weight[e], t.edges, R(t.sign)) for t in terms), R(0))

    a = [[total(one_connections(G, i, j)) for j in range(G.n)] for i in range(G.n)]
    found: list[list[Any]] = [[R(0)] * G.n for _ in range(G.n)]
    for i in range(G.n):
        for j in range(i, G.n):
            entry = R(0)
            for (k, l), w in noise.items():
                entry += w * a[k][i] * a[l][j]
                if k != l:
                    entry += w * a[l][i] * a[k][j]
            found[i][j] = found[j][i] = entry
    return total(disjoint_cycle_sets(G)), found


def covariance_symbolic(G: MixedGraph) -> tuple[sympy.Expr, sympy.Matrix]:
    """det(I - Lambda), and det² Sigma (n, n), expanded, in the symbols l{i}_{j} and w{i}_{j} (i <= j)."""
    from sympy import Matrix

    determinant, entries = numerators(G)
    return determinant.as_expr(), Matrix([[entry.as_expr() for entry in row] for row in entries])
