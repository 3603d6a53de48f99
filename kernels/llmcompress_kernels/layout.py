"""The order in memory in which a weight (d, n) is read fastest. Shape and values stay what they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from llmcompress_kernels import dispatch

#: values of which both sides of a matrix are multiples: others run at a quarter of a GPU's speed, half of a CPU's
ALIGNED = 8


def arranged(weight: Tensor) -> Tensor:
    """weight (d, n) with each column in one piece: strides (1, d rounded up to a multiple of 8), over zeros.

    It is a view of a larger matrix, both sides multiples of 8: `whole` gives that one back.
    """
    if _is_arranged(weight):
        return weight
    d, n = weight.shape
    padded = weight.new_zeros(n + -n % ALIGNED, d + -d % ALIGNED)
    padded[:n, :d] = weight.T
    return padded[:n, :d].T


def whole(weight: Tensor) -> Tensor:
    """The padded matrix behind an arranged weight; any other as it is."""
    if not _is_arranged(weight):
        return weight
    d, n = weight.shape
    return weight.as_strided((d + -d % ALIGNED, n + -n % ALIGNED), weight.stride())


def checked(weight: Tensor) -> Tensor:
    """weight, row-major unless it is arranged: what lies behind a view's edges may be anything but zeros.

    Always row-major on a GPU, which would have to be waited for, and for tracers.
    """
    if weight.is_cuda or not dispatch.plain(weight):
        return weight.contiguous()
    (d, n), full = weight.shape, whole(weight)
    return weight.contiguous() if full is weight or full[d:].any() or full[:, n:].any() else weight


def _is_arranged(weight: Tensor) -> bool:
    d, n = weight.shape
    rows, columns = d + -d % ALIGNED, n + -n % ALIGNED
    return (
        weight.stride() == (1, rows)
        and weight.storage_offset() == 0
        and weight.untyped_storage().nbytes() >= rows * columns * weight.element_size()
    )


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, d) @ weight (d, n): (rows, n). Either side may be rounded up to a multiple of 8, x with zeros."""
    full = whole(weight)
    return x[:, : len(full)] @ full[: x.shape[1]]


def product_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight for `product` of an arranged weight, those needed; grad as wide as its result.

    A tracer sees neither padding nor views beyond their edges, which it might not keep.
    """
    d, n = weight.shape
    dense_columns = weight.stride(0) == 1 and d % ALIGNED == 0  # else torch copies a gradient that is not row-major
    weight = weight.to(grad.dtype)
    if dispatch.plain(grad):
        weight = whole(arranged(weight))
    of_x = (grad[:, : weight.shape[1]] @ weight.T)[:, : x.shape[1]] if needed[0] else None
    if of_x is not None and of_x.shape[1] < x.shape[1]:
        of_x = F.pad(of_x, (0, x.shape[1] - of_x.shape[1]))
    if not needed[1]:
        return of_x, None
    return of_x, ((grad.T @ x).T if dense_columns else x.T @ grad)[:d, :n]
