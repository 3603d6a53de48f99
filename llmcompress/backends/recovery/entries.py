"""The seen entries of a matrix, and the two products that a regression on them takes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CHUNK = 1 << 17  # gathered values that are held at a time: they stay in the cache
WHOLE_SHARE = 0.1  # of the entries seen: from there on a product taken whole is faster than at the entries alone
NARROW = 1e3  # times the dtype's epsilon: a diagonal of R below that share of its largest entry is no preconditioner


class Entries(Protocol):
    """Entries of M (m, n) that are seen; `transposed` sees Mᵀ. values: theirs, in an order of its own."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def values(self) -> Tensor: ...

    @property
    def count(self) -> int: ...

    def product(self, A: Tensor, V: Tensor) -> Tensor:
        """A Vᵀ where M is seen: A (m, k), V (n, k)."""

    def adjoint(self, A: Tensor, residual: Tensor) -> Tensor:
        """(n, k): for every column j the sum over its seen rows i of residual_ij A_i."""

    def grams(self, A: Tensor) -> Tensor:
        """(n, k, k): for every column the sum over its seen rows of A_i A_iᵀ. O(seen k²)."""

    def sketched_roots(self, A: Tensor, size: int, ridge: float, generator: torch.Generator) -> Tensor:
        """Upper triangular R (n, k, k) or (1, k, k), RᵀR near the Grams plus ridge: the preconditioners."""

    def transposed(self) -> Entries: ...


class SparseEntries:
    """M[rows, cols] = values, each pair once, kept by columns. Products are those of sparse matrices, O(seen k)."""

    def __init__(self, rows: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
        self._places, order = (cols * shape[0] + rows).sort()
        self.rows, self.cols, self.values, self.shape = rows[order], cols[order], values[order], shape
        self.seen = torch.bincount(self.cols, minlength=shape[1])
        self._starts = _starts(self.seen)
        self._narrow = self.rows.int()  # what the products' libraries take as it is
        self._by_columns = _csr(self._starts, self._narrow, self.values, (shape[1], shape[0]))

    @property
    def count(self) -> int:
        return len(self.values)

    def product(self, A: Tensor, V: Tensor) -> Tensor:
        if self.count >= WHOLE_SHARE * self.shape[0] * self.shape[1]:
            return (V @ A.T).take(self._places)
        return torch.sparse.sampled_addmm(self._by_columns, V, A.T, beta=0.0).values()

    def adjoint(self, A: Tensor, residual: Tensor) -> Tensor:
        return _csr(self._starts, self._narrow, residual, self.shape[::-1]) @ A

    def _parts(self, width: int) -> list[slice]:
        step = max(1, CHUNK // width)
        return [slice(start, start + step) for start in range(0, self.count, step)]

    def grams(self, A: Tensor) -> Tensor:
        k = A.shape[1]
        total = A.new_zeros(self.shape[1], k, k)
        for p in self._parts(k * k):
            rows = A.index_select(0, self.rows[p])
            total.index_add_(0, self.cols[p], rows[:, :, None] * rows[:, None, :])
        return total

    def sketched_roots(self, A: Tensor, size: int, ridge: float, generator: torch.Generator) -> Tensor:
        """From a CountSketch of the rows that each column sees; one that sees at most `size` is not compressed."""
        n, k = self.shape[1], A.shape[1]
        first = (self.seen.cumsum(0) - self.seen)[self.cols]
        place = torch.arange(self.count, device=A.device) - first
        drawn = torch.randint(2 * size, (self.count,), generator=generator, device=A.device)
        bucket = self.cols * size + torch.where((self.seen > size)[self.cols], drawn >> 1, place)
        sign = 1 - 2 * (drawn & 1).to(A.dtype)
        sketch = A.new_zeros(n * size, k)
        for p in self._parts(k):
            sketch.index_add_(0, bucket[p], A.index_select(0, self.rows[p]).mul_(sign[p, None]))
        sketch = sketch.view(n, size, k)
        if ridge:
            shift = (ridge**0.5 * torch.eye(k, dtype=A.dtype, device=A.device)).expand(n, k, k)
            sketch = torch.cat((sketch, shift), 1)
        return torch.linalg.qr(sketch, mode="r")[1]

    def transposed(self) -> SparseEntries:
        return SparseEntries(self.cols, self.rows, self.values, (self.shape[1], self.shape[0]))

    def part(self, chosen: Tensor) -> SparseEntries:
        """Those at the positions `chosen`."""
        return SparseEntries(self.rows[chosen], self.cols[chosen], self.values[chosen], self.shape)


def _starts(counts: Tensor) -> Tensor:
    return torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    with warnings.catch_warnings(action="ignore"):  # torch calls this format a beta
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


@dataclass(frozen=True)
class MaskedEntries:
    """The entries of `values` (m, n) where `mask` is one; values are zero elsewhere. Products are dense, O(m n k).

    For a mask that sees most of the matrix: there every column's Gram is near the whole factor's, times its share.
    """

    values: Tensor
    mask: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def count(self) -> int:
        return int(self.mask.sum())

    def product(self, A: Tensor, V: Tensor) -> Tensor:
        return (A @ V.T).mul_(self.mask)

    def adjoint(self, A: Tensor, residual: Tensor) -> Tensor:
        return residual.T @ A

    def grams(self, A: Tensor) -> Tensor:
        step = max(1, CHUNK // max(1, A.numel()))
        return torch.cat([A.T @ (part[:, :, None] * A) for part in self.mask.T.split(step)])

    def sketched_roots(self, A: Tensor, size: int, ridge: float, generator: torch.Generator) -> Tensor:
        """One root for all columns, of the whole factor: no sketch of the seen rows is nearer."""
        root = (self.count / self.values.numel()) ** 0.5
        k = A.shape[1]
        shift = ridge**0.5 * torch.eye(k, dtype=A.dtype, device=A.device)
        return torch.linalg.qr(torch.cat((root * A, shift)), mode="r")[1][None]

    def transposed(self) -> MaskedEntries:
        return MaskedEntries(self.values.T.contiguous(), self.mask.T.contiguous())
