"""What a norm commutes with, found by trying it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_equivariant(norm: nn.Module, change: str) -> bool:
    """Whether the norm, its gain doing nothing, commutes with sign flips (a rotation) of its input."""
    parameters = list(norm.named_parameters(recurse=False))
    if len(parameters) != 1:
        return False  # a bias would have to change with the stream
    neutral = neutral_gain(norm)
    size = parameters[0][1].shape[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, size, generator=generator)
    if change == "flip":
        signs = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1
        left, right = _with_gain(norm, neutral, x * signs), _with_gain(norm, neutral, x) * signs
    else:  # a reflection is enough, and costs no d x d matrix
        normal = torch.nn.functional.normalize(torch.randn(size, generator=generator), dim=0)
        left = _with_gain(norm, neutral, x - 2 * (x @ normal)[:, None] * normal)
        right = _with_gain(norm, neutral, x)
        right = right - 2 * (right @ normal)[:, None] * normal
    return torch.allclose(left, right, rtol=1e-4, atol=1e-5)


def neutral_gain(norm: nn.Module) -> float:
    """1, or 0 where the norm adds 1 to what it stores."""
    size = next(norm.parameters(recurse=False)).shape[0]
    return 0.0 if _with_gain(norm, 0.0, torch.ones(1, size)).any() else 1.0


def _with_gain(norm: nn.Module, gain: float, x: Tensor) -> Tensor:
    name, parameter = next(norm.named_parameters(recurse=False))
    with torch.no_grad():
        output: Tensor = torch.func.functional_call(norm, {name: torch.full_like(parameter, gain)}, (x,))
    return output
