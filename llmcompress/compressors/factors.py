"""Two factors of a weight, and the pivot form of their product, which stores fewer values.

A weight (d_out, d_in) is approximated by (A B)ᵀ with A (d_in, r), B (r, d_out).
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from dataclasses import dataclass

import scipy.linalg
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

MAX_COEFFICIENT = 2.0  # pivots are swapped until no entry of the pivot form's B exceeds this


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


def fitted_to_storage(factors: PivotedFactors, gram: Tensor | None, dtype: torch.dtype) -> PivotedFactors:
    """The factors with A as `dtype` holds it and the least-squares B for that A: the rows that are no pivots undo most
    of what rounding does to those that are.

    gram (d_in, d_in) weighs the error; None counts every input the same. Nothing is done for float32 and wider.
    """
    if torch.finfo(dtype).bits >= torch.finfo(torch.float32).bits:
        return factors
    A = factors.A.to(dtype).to(factors.A)
    weighted = A.T if gram is None else A.T @ gram.to(A)
    # Directions that no input has would take any coefficient: the cut leaves theirs as they are.
    inverse = torch.linalg.pinv(weighted @ A, hermitian=True, rtol=torch.finfo(dtype).eps ** 2)
    return dataclasses.replace(factors, A=A, B=factors.B + inverse @ (weighted @ (factors.A - A) @ factors.B))


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
