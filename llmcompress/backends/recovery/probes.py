"""Symmetric linear measurements of (d, d) matrices, for descents on a factor."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from llmcompress.backends.recovery import operators
from llmcompress.errors import InputError


class Probes(Protocol):
    """m symmetric measurements of (d, d) matrices."""

    m: int
    d: int

    def read(self, U: Tensor) -> Tensor:
        """<A_i, U Uᵀ> (m,) for U (d, r')."""

    def combine(self, v: Tensor, U: Tensor) -> Tensor:
        """(sum v_i A_i) U, (d, r')."""

    def adjoint(self, v: Tensor) -> Tensor:
        """sum v_i A_i, (d, d)."""


class DenseOperator(operators.DenseOperator):
    """A (m, d, d), made symmetric: its skew parts measure nothing. O(m d²) a reading."""

    def __init__(self, A: Tensor) -> None:
        if A.ndim != 3 or A.shape[1] != A.shape[2]:
            raise InputError(f"A must be (m, d, d); got shape {tuple(A.shape)}")
        super().__init__((A + A.mT) / 2)
        self.m, self.d = len(A), A.shape[1]

    def read(self, U: Tensor) -> Tensor:
        return self.forward(U @ U.T)

    def combine(self, v: Tensor, U: Tensor) -> Tensor:
        return self.adjoint(v) @ U


class QuadraticProbes:
    """A_i = (a_i a_iᵀ - b_i b_iᵀ) / sqrt 2 for a, b (m, d): never formed, O(m d r') a reading."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        if a.ndim != 2 or a.shape != b.shape:
            raise InputError(f"a and b must be (m, d); got {tuple(a.shape)} and {tuple(b.shape)}")
        if not a.numel():
            raise InputError(f"there are no probes: a is {tuple(a.shape)}")
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise InputError("the probes are not finite")
        self.m, self.d = a.shape[0], a.shape[1]
        self.both = torch.cat((a, b))

    def _weights(self, v: Tensor) -> Tensor:
        return torch.cat((v, -v))[:, None] / math.sqrt(2)

    def read(self, U: Tensor) -> Tensor:
        squares = (self.both @ U).square().sum(1)
        return (squares[: self.m] - squares[self.m :]) / math.sqrt(2)

    def combine(self, v: Tensor, U: Tensor) -> Tensor:
        return self.both.T @ (self._weights(v) * (self.both @ U))

    def adjoint(self, v: Tensor) -> Tensor:
        return self.both.T @ (self._weights(v) * self.both)
