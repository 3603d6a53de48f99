"""Low rank, y = x A B, and its pivot form: y[places] = cat(z[offset : offset + p], z B) with z = x A.

Bytes read for few rows: those of A and B, 4 or 2 r (d_in + d_out - p). p of the outputs are coordinates of z, so that
their part is a copy, not a product. Formula: gauge freedom of a rank-r product, arXiv 2512.03062.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcompress_kernels import cpu, dispatch, layout
from llmcompress_kernels.checks import check_input, check_matrix, check_shape
from llmcompress_kernels.shared import cast, product, shared_product, traced_product


def reference(x: Tensor, A: Tensor, B: Tensor, places: Tensor | None, offset: int, bias: Tensor | None) -> Tensor:
    """The definition, in torch's own operations."""
    y = reference_expand(x @ A, B, places, offset)
    return y if bias is None else y + bias


def reference_expand(z: Tensor, B: Tensor, places: Tensor | None, offset: int) -> Tensor:
    """z (..., r), B (r, d_out - p), places (d_out,) a permutation or None for p = 0: (..., d_out)."""
    y = z @ B
    if places is None:
        return y
    columns = torch.cat((z[..., offset : offset + len(places) - B.shape[1]], y), -1)
    return columns.index_select(-1, places.argsort())


@torch.library.custom_op("llmcompress::low_rank_expand", mutates_args=(), device_types="cpu")
def low_rank_expand(z: Tensor, B: Tensor, places: Tensor, offset: int) -> Tensor:
    """The second half of the pivot form, for z (rows, r): (rows, d_out) in z's dtype."""
    return _expand_cpu(z, B, places, offset, dispatch.plan("low_rank", len(z), "cpu", z.dtype)).to(z.dtype)


def _expand_cpu(z: Tensor, B: Tensor, places: Tensor, offset: int, path: dispatch.Path) -> Tensor:
    if not cpu.supports(z, B):
        return reference_expand(z[:, : len(B)], B, places, offset)
    if path == "kernel" and B.stride(0) == 1:
        return cpu.low_rank_expand(z, B, places, offset)
    y = layout.product(z, B)[:, : B.shape[1]]
    return cpu.arrange(z[:, offset : offset + len(places) - B.shape[1]], y, places)


@low_rank_expand.register_kernel("cuda")
def _(z: Tensor, B: Tensor, places: Tensor, offset: int) -> Tensor:
    return _expand_cuda(z, B, places, offset, dispatch.plan("low_rank", len(z), "cuda", z.dtype))


def _expand_cuda(z: Tensor, B: Tensor, places: Tensor, offset: int, path: dispatch.Path) -> Tensor:
    from llmcompress_kernels import gpu

    if path == "kernel" and len(z) == 1 and B.stride(0) == 1:
        return gpu.one_row(z, B, places, offset)
    return gpu.place(z, layout.product(z, B)[:, : B.shape[1]], places, offset)


@low_rank_expand.register_fake
def _(z: Tensor, B: Tensor, places: Tensor, offset: int) -> Tensor:
    return z.new_empty(len(z), len(places))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    z, B, places, offset = inputs
    ctx.save_for_backward(z, B, places)
    ctx.offset = offset


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    z, B, places = ctx.saved_tensors
    columns, n = grad.index_select(-1, places), B.shape[1]
    pivots = len(places) - n
    rest = F.pad(columns[:, pivots:], (0, -n % layout.ALIGNED))  # a copy either way: a split has rows apart
    of_z, of_b = layout.product_backward(rest, z, B, ctx.needs_input_grad)
    if of_z is not None:
        of_z[:, ctx.offset : ctx.offset + pivots] += columns[:, :pivots]
    return of_z, of_b, None, None


low_rank_expand.register_autograd(_backward, setup_context=_setup)


def low_rank_linear(
    x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None, places: Tensor | None = None, offset: int = 0
) -> Tensor:
    """x A B + bias, or the pivot form where `places` is given.

    x (..., d_in), any strides; A (d_in, r), B (r, d_out - p) of x's dtype; places (d_out,) int64, a permutation: where
    column j of cat(z[offset : offset + p], z B) goes; bias (d_out,). Accumulates in float32. Differentiable.
    Few rows are fastest with A and B as `layout.arranged` gives them.
    ValueError naming the argument if shapes, dtypes or devices do not fit.
    """
    _check(x, A, B, bias, places, offset)
    return low_rank_forward(x, layout.checked(A), layout.checked(B), bias, places, offset)


def low_rank_forward(
    x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, places: Tensor | None, offset: int
) -> Tensor:
    """`low_rank_linear` for a caller whose tensors are known to fit."""
    if torch.is_autocast_enabled(x.device.type):
        x, A, B = cast(x, A, B)
    path = dispatch.plan("low_rank", x.numel() // x.shape[-1], x.device.type, x.dtype)
    if dispatch.eager(x):
        z = shared_product(x, A, path)
        if places is None:
            y = product(z, B, path)
        elif x.device.type in ("cpu", "cuda"):
            y = (_expand_cuda if x.is_cuda else _expand_cpu)(z, B, places, offset, path)
        else:
            y = low_rank_expand(z, B, places, offset)
        y = y if y.dtype is x.dtype else y.to(x.dtype)
    else:
        z = traced_product(x, A, path)
        y = traced_product(z, B, path) if places is None else low_rank_expand(z, B, places, offset)
    if places is None:
        y = y[:, : B.shape[1]]
    if x.ndim != 2:
        y = y.view(x.shape[:-1] + y.shape[1:])
    return y if bias is None else y + bias


def _check(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, places: Tensor | None, offset: int) -> None:
    check_matrix("A", A)
    check_matrix("B", B)
    check_input(x, A.shape[0], A, "A")
    d_out = B.shape[1] if places is None else places.numel()
    check_shape("B", B, (A.shape[1], B.shape[1]))
    check_shape("bias", bias, (d_out,))
    if not x.dtype == A.dtype == B.dtype:
        raise ValueError(f"x, A and B must have one dtype; got {x.dtype}, {A.dtype} and {B.dtype}")
    if places is None:
        return
    if places.dtype != torch.int64 or places.ndim != 1 or d_out < B.shape[1]:
        raise ValueError(
            f"places: must be int64 (d_out,) with d_out >= {B.shape[1]}; got {places.dtype} {tuple(places.shape)}"
        )
    if not torch.compiler.is_compiling() and not torch.equal(
        places.sort().values, torch.arange(d_out).to(places.device)
    ):
        raise ValueError(f"places: must be a permutation of 0 to {d_out - 1}")
    if not 0 <= offset <= A.shape[1] - (d_out - B.shape[1]):
        raise ValueError(f"offset: {d_out - B.shape[1]} pivots from {offset} on do not fit rank {A.shape[1]}")
