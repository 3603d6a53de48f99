"""The order in memory in which a device reads a weight (d, n) fastest. Shape and values stay what they are."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

#: values of which both sides of a matrix are multiples: others run at a quarter of a GPU's speed, half of a CPU's
ALIGNED = 8


def arranged(weight: Tensor) -> Tensor:
    """weight (d, n) in its device's order: row-major on a CPU, on a GPU each column in a piece, padded with zeros.

    It is a view of a larger matrix, both sides multiples of 8: `whole` gives that one back.
    """
    if _is_arranged(weight, weight.is_cuda):
        return weight
    return columns_in_pieces(weight) if weight.is_cuda else rows_in_pieces(weight)


def rows_in_pieces(weight: Tensor) -> Tensor:
    """weight (d, n) with strides (n rounded up to a multiple of 8, 1), over zeros."""
    d, n = weight.shape
    return F.pad(weight, (0, -n % ALIGNED, 0, -d % ALIGNED)).contiguous()[:d, :n]


def columns_in_pieces(weight: Tensor) -> Tensor:
    """weight (d, n) with strides (1, d rounded up to a multiple of 8), over zeros."""
    d, n = weight.shape
    padded = weight.new_zeros(n + -n % ALIGNED, d + -d % ALIGNED)
    padded[:n, :d] = weight.T
    return padded[:n, :d].T


def whole(weight: Tensor) -> Tensor:
    """The padded matrix behind a weight that is arranged by columns or by rows; any other as it is."""
    if not (_is_arranged(weight, True) or _is_arranged(weight, False)):
        return weight
    d, n = weight.shape
    return weight.as_strided((d + -d % ALIGNED, n + -n % ALIGNED), weight.stride())


def _is_arranged(weight: Tensor, by_columns: bool) -> bool:
    d, n = weight.shape
    rows, columns = d + -d % ALIGNED, n + -n % ALIGNED
    return (
        weight.stride() == ((1, rows) if by_columns else (columns, 1))
        and weight.storage_offset() == 0
        and weight.untyped_storage().nbytes() >= rows * columns * weight.element_size()
    )


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, d) @ weight (d, n): (rows, n). Either side may be rounded up to a multiple of 8, x with zeros."""
    full = whole(weight)
    return x[:, : len(full)] @ full[: x.shape[1]]
