"""Bad input is a ValueError that names the argument."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_input(x: Tensor, d_in: int, weight: Tensor, name: str) -> None:
    """x (..., d_in) of a floating dtype, on the device of the weight."""
    if x.ndim == 0 or x.shape[-1] != d_in:
        raise ValueError(f"x: the last dimension must be {d_in}, as {name} has it; got shape {tuple(x.shape)}")
    if x.dtype not in FLOATING:
        raise ValueError(f"x: dtype must be a floating-point one; got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x: lies on {x.device}, {name} on {weight.device}")


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape must be {shape}; got {tuple(tensor.shape)}")


def check_matrix(name: str, tensor: Tensor) -> None:
    if tensor.ndim != 2:
        raise ValueError(f"{name}: must be a matrix; got shape {tuple(tensor.shape)}")
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{name}: dtype must be a floating-point one; got {tensor.dtype}")
