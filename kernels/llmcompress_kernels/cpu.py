"""The CPU kernels on tensors: allocation, threads, and what happens without numba.

A call takes a few microseconds beside its work, which a small layer notices: hence few tensors and few calls.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from llmcompress_kernels.cpu_threads import Kernel, threads_for

logger = logging.getLogger("llmcompress")


@functools.cache
def available() -> bool:
    """Whether kernels can be compiled; the reason why not is logged once."""
    try:
        import numba  # noqa: F401
    except ImportError as error:
        logger.warning("CPU kernels are off, torch's own slower products are used: numba does not import (%s)", error)
        return False
    return True


@functools.cache
def _kernel(name: str) -> Kernel:
    from llmcompress_kernels import cpu_kernels

    return Kernel(cpu_kernels.compile_kernel(name))


@functools.cache
def _expand_kernel() -> tuple[Kernel, Tensor]:
    from llmcompress_kernels import cpu_kernels

    table = torch.from_numpy(cpu_kernels.shuffle_table())
    return _kernel("expand_avx2" if cpu_kernels.HAS_AVX2 else "expand_any"), table


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take their dtypes, and can be compiled."""
    widths = (torch.float32, torch.bfloat16)
    return x.dtype in widths and weight.dtype in widths and available()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight (d_in, n) in float32 for x (..., d_in) or (rows, >= d_in): (rows, n, zeros to a multiple of 8).

    weight: each column in one piece. The same for B of `low_rank_expand`.
    """
    x = _float_rows(x)
    d_in, n = weight.shape
    rows, stride = (x.shape[0], x.stride(0)) if x.ndim == 2 else (x.numel() // d_in, d_in)
    sums = torch.empty(rows, n + -n % 8)
    _product(x, rows, stride, weight, sums, 0, 0, 0, 0, 0)
    return sums


def low_rank_expand(z: Tensor, B: Tensor, places: Tensor, offset: int) -> Tensor:
    """cat(z[:, offset : offset + p], z B) in float32, column j at places[j]; p = len(places) - n, z (rows, >= r)."""
    z = _float_rows(z)
    rows, n, d_out = z.shape[0], B.shape[1], places.shape[0]
    sums, out = torch.empty(rows, n + -n % 8), torch.empty(rows, d_out)
    _product(z, rows, z.stride(0), B, sums, places.data_ptr(), d_out - n, offset, out.data_ptr(), d_out)
    return out


def _product(
    x: Tensor, rows: int, stride: int, weight: Tensor, sums: Tensor,
    places: int, pivots: int, offset: int, out: int, out_stride: int,
) -> None:  # fmt: skip
    d_in, n = weight.shape
    narrow = weight.dtype is torch.bfloat16
    threads = threads_for(d_in * n * (2 if narrow else 4))
    _kernel("product")(
        threads, x.data_ptr(), rows, stride, d_in, weight.data_ptr(), narrow, n, sums.data_ptr(), n + -n % 8,
        _chunk(n, threads, 16), places, pivots, offset, out, out_stride, weight.stride(1),
    )  # fmt: skip


def expand(z: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    """The column-sparse product in float32 of z (rows, k and zeros up to a multiple of 8): (rows, d_out).

    mask (d_out, ceil(k / 8)) uint8, s bits set in each row; values (d_out, s) bfloat16.
    """
    (d_out, s), (rows, width) = values.shape, z.shape
    kernel, table = _expand_kernel()
    out, mask_bytes = torch.empty(rows, d_out), width // 8
    threads = threads_for(d_out * (mask_bytes + 2 * s))
    kernel(
        threads, mask.data_ptr(), mask_bytes, values.data_ptr(), s, z.data_ptr(), rows, width, table.data_ptr(),
        out.data_ptr(), d_out, _chunk(d_out, threads, 16),
    )  # fmt: skip
    return out


def arrange(z: Tensor, y: Tensor, places: Tensor) -> Tensor:
    """cat(z, y) (rows, d_out) with column j moved to places[j]; values of 2 or 4 bytes, rows with a unit stride."""
    rows, n = y.shape
    out = y.new_empty(rows, len(places))
    threads = threads_for(out.numel() * out.element_size())
    _kernel("arrange")(
        threads, z.data_ptr(), z.stride(0), z.shape[1], y.data_ptr(), n, places.data_ptr(), out.data_ptr(), rows,
        _chunk(rows, threads, 1), y.element_size(), y.stride(0),
    )  # fmt: skip
    return out


def _chunk(size: int, threads: int, multiple: int) -> int:
    """Size of the parts, a multiple of `multiple` unless there is one part only."""
    return size if threads == 1 else -(-size // (threads * multiple)) * multiple


def _float_rows(x: Tensor) -> Tensor:
    """float32 with rows of a unit stride: contiguous but perhaps for a matrix's row stride."""
    if x.dtype is not torch.float32:
        x = x.float()
    return x if x.is_contiguous() or (x.ndim == 2 and x.stride(1) == 1) else x.contiguous()
