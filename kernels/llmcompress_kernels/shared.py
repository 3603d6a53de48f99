"""x W for few rows, computed once for all layers that read the same x and share W.

Bytes read: those of W, which may be bfloat16 under a float32 x.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcompress_kernels import cpu, dispatch, layout


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., d_in) @ weight (d_in, n), in x's dtype."""
    return x @ weight.to(x.dtype)


def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does to a matrix product's operands."""
    width = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(tensor.to(width) for tensor in tensors)


@torch.library.custom_op("llmcompress::product", mutates_args=(), device_types=("cpu", "cuda"))
def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, d_in, or zeros up to a multiple of 8) @ weight (d_in, n): (rows, n and zeros up to a multiple of 8)."""
    path = dispatch.plan("low_rank", len(x), x.device.type, x.dtype)
    if path == "library":
        weight = layout.arranged(weight.to(x.dtype))
    found = product(x, weight, path).to(x.dtype)
    missing = _width(weight) - found.shape[1]
    return F.pad(found, (0, missing)) if missing else found.contiguous()


@_product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), _width(weight))


def _width(weight: Tensor) -> int:
    return weight.shape[1] + -weight.shape[1] % layout.ALIGNED


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    of_x, of_weight = layout.product_backward(grad, x, weight, ctx.needs_input_grad)
    return of_x, of_weight.to(weight.dtype) if of_weight is not None else None


_product.register_autograd(_backward, setup_context=_setup)


class _Last(threading.local):
    """The last product of this thread: what it was made of (weakly held) and what came out."""

    entry: tuple[Any, int, Any, int, dispatch.Path, int, Tensor] | None = None


_last = _Last()


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _recording(x: Tensor) -> int:
    """The number of the CUDA graph that is being recorded on x's device, 0 outside of one.

    A graph must hold its own work: what was computed outside of it, or for another one, is stale when it is replayed.
    """
    if not x.is_cuda or not torch.cuda.is_current_stream_capturing():
        return 0
    status, number = ctypes.c_int(), ctypes.c_uint64()
    stream = ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream)
    if _driver().cuStreamGetCaptureInfo(stream, ctypes.byref(status), ctypes.byref(number)):
        raise RuntimeError("the driver does not say which CUDA graph is being recorded")
    return number.value


def shared_product(x: Tensor, weight: Tensor, path: dispatch.Path, width: int = 0) -> Tensor:
    """`product` outside of tracing and differentiation; the last result is given again for the same x and weight.

    So siblings (q, k, v; gate, up) pay once. A compiler finds their common product itself.
    """
    if x.is_inference() or weight.is_inference():
        return product(x, weight, path, width)  # changes are not counted
    entry, recording = _last.entry, _recording(x)
    if (
        entry is None or entry[0]() is not x or entry[2]() is not weight
        or entry[1] != x._version or entry[3] != weight._version or entry[4:6] != (path, recording)
    ):  # fmt: skip
        result = product(x, weight, path, width)
        _last.entry = (weakref.ref(x), x._version, weakref.ref(weight), weight._version, path, recording, result)
        return result
    return entry[6]


def product(x: Tensor, weight: Tensor, path: dispatch.Path, width: int = 0) -> Tensor:
    """x (..., d_in) @ weight (d_in, n): (rows, >= n), with zeros after n; float32 where the CPU kernel made it.

    width: how wide a GPU's kernel for one row makes it.
    """
    if path == "kernel" and x.device.type == "cpu" and weight.stride(0) == 1 and cpu.supports(x, weight):
        return cpu.product(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda and path == "kernel" and len(rows) == 1 and weight.stride(0) == 1:
        from llmcompress_kernels import gpu

        return gpu.one_row(rows, weight, width=max(width, _width(weight)))
    return layout.product(rows, weight.to(x.dtype))


def traced_product(x: Tensor, weight: Tensor, path: dispatch.Path) -> Tensor:
    """The same for tracers and autograd: (rows, >= n) in x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    seen_through = path == "library" and not x.is_cuda and not dispatch.plain(x)
    return reference(rows, weight) if seen_through else _product(rows, weight)
