"""Algebraic multigrid by compatible weighted matching, bootstrapped (arXiv 2109.09367 and its parent, BootCMatch).

A hierarchy is built for one vector w that its coarse spaces represent exactly. What a hierarchy cannot reduce becomes
the vector of the next one, and all of them together form a composite iteration. The vectors that are found on the way
are smooth: they span what the lowest eigenvectors span. Everything is float64 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import cho_factor, cho_solve

from llmcompress.backends.checks import choose
from llmcompress.errors import InputError, RunError

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Vector = NDArray[np.float64]
Composite = Literal["multiplicative", "symmetrised", "additive"]
COMPOSITES = ("multiplicative", "symmetrised", "additive")
EPS = float(np.finfo(np.float64).eps)
TINY = 1e-140  # below it an iterate is scaled up before its squares vanish
MAX_LEVELS = 39
MAX_COARSE = 10
SLOW, SLOW_COARSE = 1.2, 1000  # a sweep that shrinks by less ends the hierarchy once a level is this small
STALLED = 1.05


# --- one hierarchy ---------------------------------------------------------------------------------------------------


def spd_laplacian(A: Any) -> sparse.csr_matrix:
    """The graph Laplacian of A (n, n), made positive definite by a rank-one term at vertex 0 and its first neighbour.

    A is symmetric, not negative, without loops, and connected: otherwise the result is singular. The term cancels
    entries; their explicit zeros are removed.
    """
    A = sparse.csr_matrix(A, dtype=np.float64)
    first = A[0].indices.min()
    ones = sparse.csr_matrix((np.ones(2), ([0, first], [0, 0])), shape=(A.shape[0], 1))
    laplacian = sparse.csr_matrix(sparse.diags(np.asarray(A.sum(1)).ravel()) - A + ones @ ones.T)
    laplacian.eliminate_zeros()
    laplacian.sort_indices()
    return laplacian


def compatible_weights(L: sparse.csr_matrix, w: Vector) -> sparse.coo_matrix:
    """Positive weights of the edges i < j of L (n, n), large where joining i and j represents w (n,) well."""
    upper = sparse.triu(L, 1, format="coo")
    i, j, entries, diagonal = upper.row, upper.col, upper.data, L.diagonal()
    scale = diagonal[i] * w[i] ** 2 + diagonal[j] * w[j] ** 2
    safe = np.where(scale > EPS, scale, 1.0)
    products = np.where(scale > EPS, np.abs(1 - 2 * w[i] * w[j] * entries / safe), EPS)
    products = np.maximum(products, EPS)
    least = products.min() if len(products) else 1.0
    return sparse.coo_matrix((np.log(products / (0.999 * least)), (i, j)), shape=L.shape)


def greedy_matching(weights: sparse.coo_matrix) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (i, j) of a matching with at least half the largest total weight: edges by descending weight.

    Ties go to the edge that is stored first, so that runs repeat. Cost: O(m log m) for m edges.
    """
    order = np.argsort(-weights.data, kind="stable")
    free = [True] * weights.shape[0]
    pairs = []
    for i, j in zip(weights.row[order].tolist(), weights.col[order].tolist(), strict=True):
        if free[i] and free[j]:
            free[i] = free[j] = False
            pairs.append((i, j))
    matched = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return matched[:, 0], matched[:, 1]


def pairwise_prolongator(L: sparse.csr_matrix, w: Vector) -> sparse.csr_matrix:
    """P (n, n_c) with orthonormal columns, one a matched pair or lone vertex, whose range holds w (n,).

    A lone vertex with |w_i| <= eps has a row of zeros.
    """
    n = L.shape[0]
    i, j = greedy_matching(compatible_weights(L, w))
    lone = np.ones(n, dtype=bool)
    lone[i] = lone[j] = False
    lone &= np.abs(w) > EPS
    alone = lone.nonzero()[0]
    length = np.hypot(w[i], w[j])
    zero = length <= EPS  # both parts of w vanish: any unit vector represents them
    left = np.where(zero, 1.0, w[i]) / np.where(zero, 1.0, length)
    right = np.where(zero, 0.0, w[j]) / np.where(zero, 1.0, length)
    columns = np.arange(len(i))
    rows = np.concatenate((i, j, alone))
    places = np.concatenate((columns, columns, len(i) + np.arange(len(alone))))
    values = np.concatenate((left, right, np.sign(w[alone])))
    return sparse.csr_matrix((values, (rows, places)), shape=(n, len(i) + len(alone)))


@dataclass(frozen=True)
class Level:
    """L (n, n) and, but at the coarsest level, the prolongator P (n, n_c) from the next one."""

    L: sparse.csr_matrix
    P: sparse.csr_matrix | None = None

    @cached_property
    def R(self) -> sparse.csr_matrix:
        assert self.P is not None
        return self.P.T.tocsr()

    @cached_property
    def factor(self) -> Any:
        return cho_factor(self.L.toarray())


@dataclass(frozen=True)
class Hierarchy:
    """Levels from the finest to the coarsest."""

    levels: list[Level]

    @property
    def grid_complexity(self) -> float:
        """Unknowns of all levels over those of the first."""
        return sum(level.L.shape[0] for level in self.levels) / self.levels[0].L.shape[0]

    @property
    def operator_complexity(self) -> float:
        """Non-zeros of all levels over those of the first."""
        return sum(level.L.nnz for level in self.levels) / self.levels[0].L.nnz

    def cycle(self, x: Vector, b: Vector, index: int = 0) -> None:
        """One V-cycle on L x = b, in place: Gauss-Seidel forward before and backward after the coarse correction."""
        from pyamg.relaxation.relaxation import gauss_seidel

        level = self.levels[index]
        if level.P is None:
            x[:] = cho_solve(level.factor, b)
            return
        gauss_seidel(level.L, x, b, sweep="forward")
        coarse = np.zeros(level.P.shape[1])
        self.cycle(coarse, level.R @ (b - level.L @ x), index + 1)
        x += level.P @ coarse
        gauss_seidel(level.L, x, b, sweep="backward")


def build_hierarchy(L: sparse.csr_matrix, w: Vector, sweeps: int = 2, max_coarse: int = MAX_COARSE) -> Hierarchy:
    """The hierarchy of L (n, n), positive definite, for the vector w (n,): aggregates of up to 2^sweeps vertices.

    Cost: O(nnz log nnz). Source: arXiv 2109.09367, the official code's stopping rules.
    """
    levels: list[Level] = []
    L = sparse.csr_matrix(L)
    while L.shape[0] > max_coarse and len(levels) < MAX_LEVELS:
        fine, P, coarse, slow = L, None, L, False
        for _ in range(sweeps):
            before = coarse.shape[0]
            step = pairwise_prolongator(coarse, w)
            coarse = sparse.csr_matrix(step.T @ coarse @ step)
            coarse.sort_indices()
            w = step.T @ w
            P = step if P is None else sparse.csr_matrix(P @ step)
            slow |= before < SLOW * coarse.shape[0]
        if fine.shape[0] < STALLED * coarse.shape[0] or not coarse.shape[0]:
            break
        levels.append(Level(fine, P))
        L = coarse
        if slow and L.shape[0] <= SLOW_COARSE:
            break
    return Hierarchy([*levels, Level(L)])


# --- the bootstrap ---------------------------------------------------------------------------------------------------


@dataclass
class BootstrapResult:
    """smooth_vectors (n, q + 1): the ones, then q vectors of unit energy; rates (q,): the last iteration's reduction of
    the energy norm by the first 1..q hierarchies together; operator_complexities (q,), one a hierarchy.
    """

    smooth_vectors: Vector
    rates: list[float]
    operator_complexities: list[float]
    hierarchies: list[Hierarchy] = field(repr=False)
    composite: Composite = "multiplicative"

    def as_linear_operator(self) -> LinearOperator:
        """A preconditioner: the cycles one after the other and back again, symmetric and positive definite."""
        from scipy.sparse.linalg import LinearOperator

        n = len(self.smooth_vectors)

        def apply(b: Vector) -> Vector:
            x = np.zeros(n)
            for hierarchy in [*self.hierarchies, *self.hierarchies[::-1]]:
                hierarchy.cycle(x, np.asarray(b, dtype=np.float64).ravel())
            return x

        return LinearOperator((n, n), matvec=apply, dtype=np.float64)


def iterate(hierarchies: list[Hierarchy], x: Vector, composite: Composite) -> Vector:
    """One composite iteration on L x = 0."""
    zero = np.zeros_like(x)
    if composite == "additive":
        parts = []
        for hierarchy in hierarchies:
            own = x.copy()
            hierarchy.cycle(own, zero)
            parts.append(own)
        return np.mean(parts, axis=0)
    x = x.copy()
    back = hierarchies[::-1] if composite == "symmetrised" else []
    for hierarchy in [*hierarchies, *back]:
        hierarchy.cycle(x, zero)
    return x


def bootstrap(
    L: sparse.csr_matrix,
    tol: float = 1e-6,
    max_components: int = 40,
    test_iterations: int = 15,
    composite: Composite = "multiplicative",
    random_state: int | None = 0,
    sweeps: int = 2,
) -> BootstrapResult:
    """Smooth vectors of L (n, n), positive definite, until the composite iteration reduces the error by `tol`.

    A composite iteration on L x = 0 is run `test_iterations` times from a random start; what is left is the next smooth
    vector, and the vector of the next hierarchy. composite: multiplicative, symmetrised or additive. InputError for bad
    options, RunError for a rate that is not finite. Cost: O(nnz) a cycle, test_iterations q² / 2 cycles for q vectors.
    Source: arXiv 2109.09367.
    """
    choose("composite", composite, COMPOSITES)
    if not tol > 0 or max_components < 1 or test_iterations < 1:
        raise InputError(
            f"tol must be positive, max_components and test_iterations at least 1; got {tol}, {max_components}, "
            f"{test_iterations}"
        )
    generator = np.random.default_rng(random_state)
    n = L.shape[0]
    max_coarse = min(MAX_COARSE, n // 2)  # a graph that is its own coarsest level would be solved: no smooth vectors
    vectors = [np.ones(n)]
    rates: list[float] = []
    hierarchies: list[Hierarchy] = []
    while len(rates) < max_components:
        hierarchies.append(build_hierarchy(L, vectors[-1], sweeps, max_coarse))
        x = generator.standard_normal(n)
        before = rate = 1.0
        for _ in range(test_iterations):
            x = iterate(hierarchies, x, composite)
            energy = float(np.sqrt(max(x @ (L @ x), 0.0)))
            rate, before = energy / before if before else 0.0, energy
            if 0 < energy < TINY:
                x, before = x / energy, 1.0
        if not np.isfinite(rate) or not np.isfinite(x).all():
            raise RunError(f"the composite iteration of {len(hierarchies)} hierarchies diverged")
        rates.append(rate)
        if before == 0:  # solved to the last digit: there is nothing smooth left
            break
        vectors.append(x / before)
        if rate <= tol:
            break
    complexities = [hierarchy.operator_complexity for hierarchy in hierarchies]
    return BootstrapResult(np.stack(vectors, 1), rates, complexities, hierarchies, composite)
