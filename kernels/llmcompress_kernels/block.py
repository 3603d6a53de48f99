"""Block-diagonal products: block_dense_linear and block_shuffle_linear (arXiv 2406.16450; Monarch, arXiv 2204.00595).

BlockDense: y = U blkdiag(V) x. BlockShuffle: y = P' blkdiag(U) P blkdiag(V) x, where P puts coordinate j into block
j mod B and P' interleaves the blocks' outputs. Bytes read for few rows: those of U and V.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcompress_kernels import dispatch
from llmcompress_kernels.checks import check_input, check_shape
from llmcompress_kernels.shared import cast


def reference(x: Tensor, weight: Tensor, interleaved: bool) -> Tensor:
    """x (rows, B * p) times the block-diagonal weight (B, q, p): (rows, B * q).

    interleaved: block l has the coordinates l, l + B, l + 2 B, ... of both x and the result.
    """
    blocks, n, inner = weight.shape
    if interleaved:
        parts = x.view(len(x), inner, blocks).permute(2, 0, 1)
        return torch.bmm(parts, weight.mT).permute(1, 2, 0).reshape(len(x), blocks * n)
    parts = x.view(len(x), blocks, inner).transpose(0, 1)
    return torch.bmm(parts, weight.mT).transpose(0, 1).reshape(len(x), blocks * n)


@torch.library.custom_op("llmcompress::block_product", mutates_args=(), device_types="cpu")
def block_product(x: Tensor, weight: Tensor, interleaved: bool) -> Tensor:
    return reference(x.contiguous(), weight, interleaved).clone()


@block_product.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, interleaved: bool) -> Tensor:
    from llmcompress_kernels import gpu

    return gpu.block_product(x, weight, interleaved)


@block_product.register_fake
def _(x: Tensor, weight: Tensor, interleaved: bool) -> Tensor:
    return x.new_empty(len(x), weight.shape[0] * weight.shape[1])


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    x, weight, interleaved = inputs
    ctx.save_for_backward(x, weight)
    ctx.interleaved = interleaved


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    blocks, n, inner = weight.shape

    def split(rows: Tensor, size: int) -> Tensor:
        """(B, rows, size)"""
        if ctx.interleaved:
            return rows.reshape(-1, size, blocks).permute(2, 0, 1)
        return rows.reshape(-1, blocks, size).transpose(0, 1)

    grad_x = reference(grad.contiguous(), weight.mT, ctx.interleaved)
    return grad_x, torch.bmm(split(grad, n).mT, split(x, inner)), None


block_product.register_autograd(_backward, setup_context=_setup)


def _product(x: Tensor, weight: Tensor, interleaved: bool) -> Tensor:
    if dispatch.plan("block", len(x), x.device.type, x.dtype) == "kernel":
        return block_product(x, weight, interleaved)
    return reference(x, weight, interleaved)


def block_dense_linear(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None = None) -> Tensor:
    """U blkdiag(V) x + bias.

    x (..., d_in), any strides; V (B, r / B, d_in / B); U (d_out, r); bias (d_out,). Accumulates in float32.
    Differentiable in x, V, U and bias. ValueError naming the argument if shapes, dtypes or devices do not fit.
    """
    if torch.is_autocast_enabled(x.device.type):
        x, V, U = cast(x, V, U)
    _check(x, V, U, bias, 2)
    check_shape("U", U, (U.shape[0], V.shape[0] * V.shape[1]))
    check_shape("bias", bias, (U.shape[0],))
    z = _product(x.reshape(-1, x.shape[-1]), V, False)
    return F.linear(z, U, bias).view(*x.shape[:-1], len(U))


def block_shuffle_linear(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None = None) -> Tensor:
    """P' blkdiag(U) P blkdiag(V) x + bias.

    x (..., d_in), any strides; V (B, h, d_in / B); U (B, d_out / B, h); bias (d_out,). Accumulates in float32.
    Differentiable in x, V, U and bias. ValueError naming the argument if shapes, dtypes or devices do not fit.
    """
    if torch.is_autocast_enabled(x.device.type):
        x, V, U = cast(x, V, U)
    _check(x, V, U, bias, 3)
    check_shape("U", U, (V.shape[0], U.shape[1], V.shape[1]))
    d_out = U.shape[0] * U.shape[1]
    check_shape("bias", bias, (d_out,))
    z = _product(x.reshape(-1, x.shape[-1]), V, False)
    y = _product(z, U, True).view(*x.shape[:-1], d_out)
    return y if bias is None else y + bias.to(y.dtype)


def _check(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None, dimensions: int) -> None:
    if V.ndim != 3:
        raise ValueError(f"V: must have 3 dimensions (blocks, outputs, inputs); got shape {tuple(V.shape)}")
    if U.ndim != dimensions:
        raise ValueError(f"U: must have {dimensions} dimensions; got shape {tuple(U.shape)}")
    check_input(x, V.shape[0] * V.shape[2], V, "V")
    if not x.dtype == V.dtype == U.dtype:
        raise ValueError(f"x, V and U must have one dtype; got {x.dtype}, {V.dtype} and {U.dtype}")
