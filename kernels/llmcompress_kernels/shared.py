"""x W for few rows, computed once for all layers that read the same x and share W.

Bytes read: those of W, which may be bfloat16 under a float32 x.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels import cpu, dispatch


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., d_in) @ weight (d_in, n), in x's dtype."""
    return x @ weight.to(x.dtype)


def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does to a matrix product's operands."""
    width = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(tensor.to(width) for tensor in tensors)


@torch.library.custom_op("llmcompress::product", mutates_args=(), device_types="cpu")
def _product(x: Tensor, weight: Tensor) -> Tensor:
    if not cpu.supports(x, weight):
        return reference(x, weight)
    return cpu.product(x, weight)[:, : weight.shape[1]].to(x.dtype).contiguous()


@_product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), weight.shape[1])


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    return grad @ weight.to(grad.dtype).T, (x.T @ grad).to(weight.dtype)


_product.register_autograd(_backward, setup_context=_setup)


class _Last(threading.local):
    """The last product of this thread: what it was made of (weakly held) and what came out."""

    entry: tuple[Any, int, Any, int, dispatch.Path, Tensor] | None = None


_last = _Last()


def shared_product(x: Tensor, weight: Tensor, path: dispatch.Path) -> Tensor:
    """`product` outside of tracing and differentiation; the last result is given again for the same x and weight.

    So siblings (q, k, v; gate, up) pay once. A compiler finds their common product itself.
    """
    if x.is_inference() or weight.is_inference() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return product(x, weight, path)  # changes are not counted, or what is recorded must hold its own work
    entry = _last.entry
    if (
        entry is None or entry[0]() is not x or entry[2]() is not weight
        or entry[1] != x._version or entry[3] != weight._version or entry[4] != path
    ):  # fmt: skip
        result = product(x, weight, path)
        _last.entry = (weakref.ref(x), x._version, weakref.ref(weight), weight._version, path, result)
        return result
    return entry[5]


def product(x: Tensor, weight: Tensor, path: dispatch.Path) -> Tensor:
    """x (..., d_in) @ weight (d_in, n): (rows, >= n), with zeros after n; float32 where the CPU kernel made it."""
    if path == "kernel" and x.device.type == "cpu" and cpu.supports(x, weight):
        return cpu.product(x, weight)
    return reference(x.reshape(-1, x.shape[-1]), weight)


def traced_product(x: Tensor, weight: Tensor, path: dispatch.Path) -> Tensor:
    """The same for tracers and autograd: (rows, n) in x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    return _product(rows, weight) if path == "kernel" and x.device.type == "cpu" else reference(rows, weight)
