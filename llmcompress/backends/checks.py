"""Checks of arguments that every backend makes, and the generator behind a `random_state`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.finite import all_finite


def checked_matrix(X: Any, name: str = "X", ndim: int = 2) -> Tensor:
    """X as a float64 tensor on its device. InputError unless it has `ndim` dimensions, is not empty and finite."""
    X = torch.as_tensor(X)
    if X.ndim != ndim:
        what = "a matrix" if ndim == 2 else "a vector"
        raise InputError(f"{name} must be {what}; got shape {tuple(X.shape)}")
    if not X.numel():
        raise InputError(f"{name} is empty")
    X = X.detach().double()
    if not all_finite(X):
        raise InputError(f"{name} is not finite")
    return X


def choose(name: str, value: str, known: tuple[str, ...]) -> None:
    """InputError naming what is known unless `value` is one of them."""
    if value not in known:
        raise InputError(f"unknown {name} '{value}'; known: {', '.join(known)}")


def generator_for(random_state: int | torch.Generator | None, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator itself, or a new one seeded with the number; None stands for 0, so that runs repeat."""
    if isinstance(random_state, torch.Generator):
        return random_state
    return torch.Generator(device=device).manual_seed(random_state or 0)
