"""Which polynomials vanish on all covariances of a model, and whether its parameters can be told from them.

Everything is exact, modulo a prime of 31 bits: ranks of floating-point matrices would be guesses. Source: arXiv
2210.00239.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmcompress.backends.graphs.mixed_graph import MixedGraph, numerators
from llmcompress.errors import InputError, RunError

PRIME = 2147483629
SPARE = 5  # evaluations beyond the number of unknowns, so that a null vector is none by chance
Matrix = NDArray[np.int64]
Monomial = tuple[tuple[int, int], ...]  # the entries (i, j), i <= j, of Sigma that are multiplied, in order


@dataclass(frozen=True)
class Polynomial:
    """sum of terms[monomial] times the monomial; multidegree (n,): how often each vertex occurs."""

    degree: int
    multidegree: tuple[int, ...]
    terms: dict[Monomial, int]


def jacobian_rank(G: MixedGraph, seed: int = 0) -> int:
    """Rank of the derivative of Sigma by the free entries of Lambda and Omega, at a random point.

    Cost: O((|D| + n + |B|) n⁴) at most.
    """
    K, sigma = _random_point(G, np.random.default_rng(seed))
    pairs = np.triu_indices(G.n)
    rows = []
    for a, b in G.directed:
        change = np.outer(sigma[:, a], K[b]) % PRIME
        rows.append((change + change.T)[pairs] % PRIME)
    for a, b in [(i, i) for i in range(G.n)] + list(G.bidirected):
        change = np.outer(K[a], K[b]) % PRIME
        rows.append((change if a == b else change + change.T)[pairs] % PRIME)
    return len(_reduced(np.array(rows))[1])


def is_generically_finite(G: MixedGraph) -> bool:
    """Whether a covariance comes from finitely many parameters only, but for exceptional ones."""
    return jacobian_rank(G) == G.n + len(G.directed) + len(G.bidirected)


def vanishing_polynomials(G: MixedGraph, max_degree: int, minimal: bool = True) -> list[Polynomial]:
    """Polynomials in the entries of Sigma, homogeneous in every vertex, that are zero on the model; by degree.

    minimal: only those that products of earlier ones with monomials do not span. Each is certified by expanding it in
    the numerators of Sigma. Cost: a null space of (monomials of a multidegree)² for each multidegree.
    """
    if max_degree < 1:
        raise InputError(f"max_degree must be at least 1; got {max_degree}")
    variables = list(itertools.combinations_with_replacement(range(G.n), 2))
    generator = np.random.default_rng(0)
    found: list[Polynomial] = []
    for degree in range(1, max_degree + 1):
        by_vertex: dict[tuple[int, ...], list[Monomial]] = {}
        for monomial in itertools.combinations_with_replacement(variables, degree):
            by_vertex.setdefault(_multidegree(monomial, G.n), []).append(monomial)
        count = max(map(len, by_vertex.values())) + SPARE
        points = np.stack([_random_point(G, generator)[1] for _ in range(count)])
        earlier = list(found)
        for multidegree, monomials in by_vertex.items():
            null = _null_space(_values(points, monomials))
            if not len(null):
                continue
            place = {monomial: index for index, monomial in enumerate(monomials)}
            spanned = _products(earlier, multidegree, place, G.n) if minimal else np.zeros((0, len(place)), np.int64)
            for vector in null:
                grown = np.concatenate((spanned, vector[None]))
                if len(_reduced(grown)[1]) > len(_reduced(spanned)[1]):
                    spanned = grown
                    found.append(_certified(G, degree, multidegree, monomials, vector))
    return found


def _multidegree(monomial: Monomial, n: int) -> tuple[int, ...]:
    counts = [0] * n
    for i, j in monomial:
        counts[i] += 1
        counts[j] += 1
    return tuple(counts)


def _random_point(G: MixedGraph, generator: np.random.Generator) -> tuple[Matrix, Matrix]:
    """(I - Lambda)⁻¹ and Sigma modulo the prime; drawn again should the first be singular."""
    while True:
        M = np.eye(G.n, dtype=np.int64)
        for i, j in G.directed:
            M[i, j] = generator.integers(1, PRIME)
        reduced, pivots = _reduced(np.concatenate((M, np.eye(G.n, dtype=np.int64)), 1))
        if pivots == list(range(G.n)):
            break
    K = reduced[:, G.n :]
    omega = np.diag(generator.integers(1, PRIME, G.n))
    for i, j in G.bidirected:
        omega[i, j] = omega[j, i] = generator.integers(1, PRIME)
    return K, _product(_product(K.T, omega), K)


def _product(a: Matrix, b: Matrix) -> Matrix:
    """Modulo the prime: one product of two entries fits 62 bits, a sum of several does not."""
    total = np.zeros((a.shape[0], b.shape[1]), dtype=np.int64)
    for k in range(a.shape[1]):
        total = (total + a[:, k, None] * b[k] % PRIME) % PRIME
    return total


def _reduced(matrix: Matrix) -> tuple[Matrix, list[int]]:
    """The reduced row echelon form without its zero rows, and the pivots' columns."""
    matrix = matrix.copy() % PRIME
    pivots: list[int] = []
    for column in range(matrix.shape[1]):
        row = len(pivots)
        below = np.flatnonzero(matrix[row:, column])
        if not len(below):
            continue
        matrix[[row, row + below[0]]] = matrix[[row + below[0], row]]
        matrix[row] = matrix[row] * pow(int(matrix[row, column]), -1, PRIME) % PRIME
        others = np.flatnonzero(matrix[:, column])
        others = others[others != row]
        matrix[others] = (matrix[others] - matrix[others, column, None] * matrix[row] % PRIME) % PRIME
        pivots.append(column)
        if len(pivots) == len(matrix):
            break
    return matrix[: len(pivots)], pivots


def _null_space(matrix: Matrix) -> Matrix:
    """Rows (k, columns) that span it."""
    reduced, pivots = _reduced(matrix)
    free = [column for column in range(matrix.shape[1]) if column not in pivots]
    basis = np.zeros((len(free), matrix.shape[1]), dtype=np.int64)
    for index, column in enumerate(free):
        basis[index, column] = 1
        basis[index, pivots] = -reduced[:, column] % PRIME
    return basis


def _values(points: Matrix, monomials: list[Monomial]) -> Matrix:
    """The monomials at the first five more covariances (points, n, n) than there are of them."""
    sigma = points[: len(monomials) + SPARE]
    columns = []
    for monomial in monomials:
        value = np.ones(len(sigma), dtype=np.int64)
        for i, j in monomial:
            value = value * sigma[:, i, j] % PRIME
        columns.append(value)
    return np.stack(columns, 1)


def _products(earlier: list[Polynomial], multidegree: tuple[int, ...], place: dict[Monomial, int], n: int) -> Matrix:
    """Products of earlier polynomials with monomials, of that multidegree, as rows over the monomials."""
    rows = []
    variables = list(itertools.combinations_with_replacement(range(n), 2))
    for polynomial in earlier:
        missing = [a - b for a, b in zip(multidegree, polynomial.multidegree, strict=True)]
        if min(missing) < 0:
            continue
        for factor in itertools.combinations_with_replacement(variables, sum(missing) // 2):
            if _multidegree(factor, n) != tuple(missing):
                continue
            row = np.zeros(len(place), dtype=np.int64)
            for monomial, coefficient in polynomial.terms.items():
                row[place[tuple(sorted(monomial + factor))]] += coefficient
            rows.append(row % PRIME)
    return np.array(rows, dtype=np.int64).reshape(-1, len(place))


def _certified(
    G: MixedGraph, degree: int, multidegree: tuple[int, ...], monomials: list[Monomial], vector: Matrix
) -> Polynomial:
    fractions = [_rational(int(value)) for value in vector]
    common = int(np.lcm.reduce([denominator for _, denominator in fractions]))
    integers = [numerator * (common // denominator) for numerator, denominator in fractions]
    divisor = int(np.gcd.reduce(integers))
    terms = {m: c // divisor for m, c in zip(monomials, integers, strict=True) if c}
    _, entries = numerators(G)
    total = entries[0][0] * 0
    for monomial, coefficient in terms.items():
        product = entries[0][0].ring(coefficient)
        for i, j in monomial:
            product = product * entries[i][j]
        total = total + product
    if total != 0:
        raise RunError(f"a polynomial of degree {degree} modulo the prime does not vanish over the integers")
    return Polynomial(degree, multidegree, terms)


def _rational(value: int) -> tuple[int, int]:
    """The fraction of least size that is `value` modulo the prime."""
    limit = int((PRIME / 2) ** 0.5)
    r, s, t, u = PRIME, value % PRIME, 0, 1
    while s > limit:
        quotient = r // s
        r, s, t, u = s, r - quotient * s, u, t - quotient * u
    if u == 0 or abs(u) > limit:
        raise RunError("a coefficient is no small fraction: the polynomial's coefficients are too large")
    return (s, u) if u > 0 else (-s, -u)
