"""Linear measurements of a matrix: operators with their adjoints, none of which is formed where it has a structure."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from llmcompress.backends.checks import checked_matrix
from llmcompress.errors import InputError


class LinearOperator(Protocol):
    """A linear map of matrices of `shape` (n1, n2) to m numbers."""

    shape: tuple[int, int]

    def forward(self, M: Tensor) -> Tensor:
        """(n1, n2) -> (m,)."""

    def adjoint(self, v: Tensor) -> Tensor:
        """(m,) -> (n1, n2), with <forward(M), v> = <M, adjoint(v)>."""


class DenseOperator:
    """forward(M)_i = <A_i, M> for A (m, n1, n2). O(m n1 n2)."""

    def __init__(self, A: Tensor) -> None:
        if A.ndim != 3:
            raise InputError(f"A must be (m, n1, n2); got shape {tuple(A.shape)}")
        if not A.numel():
            raise InputError(f"A is empty: shape {tuple(A.shape)}")
        if not torch.isfinite(A).all():
            raise InputError("A is not finite")
        self.shape = (A.shape[1], A.shape[2])
        self.flat = A.reshape(len(A), -1)

    def forward(self, M: Tensor) -> Tensor:
        return self.flat @ M.reshape(-1)

    def adjoint(self, v: Tensor) -> Tensor:
        return (v @ self.flat).view(self.shape)


class IdentityOperator:
    """All entries of an (n1, n2) matrix."""

    def __init__(self, n1: int, n2: int) -> None:
        self.shape = (n1, n2)

    def forward(self, M: Tensor) -> Tensor:
        return M.reshape(-1)

    def adjoint(self, v: Tensor) -> Tensor:
        return v.view(self.shape)


class EntriesOperator:
    """The entries where `mask` (n1, n2) is true, times sqrt(n1 n2 / count), so that it is isotropic on average."""

    def __init__(self, mask: Tensor, dtype: torch.dtype) -> None:
        self.shape = (mask.shape[0], mask.shape[1])
        self.scaled = mask.to(dtype) * math.sqrt(mask.numel() / max(1, int(mask.sum())))

    def forward(self, M: Tensor) -> Tensor:
        return (self.scaled * M).reshape(-1)

    def adjoint(self, v: Tensor) -> Tensor:
        return self.scaled * v.view(self.shape)


class ActivationOperator:
    """forward(M) = X M / sqrt(N) for rows X (N, d) and M (d, out): a layer's outputs. Isotropic only if XᵀX = N I."""

    def __init__(self, X: Tensor, out: int) -> None:
        checked_matrix(X)
        if out < 1:
            raise InputError(f"out must be at least 1; got {out}")
        self.X, self.shape = X / math.sqrt(len(X)), (X.shape[1], out)

    def forward(self, M: Tensor) -> Tensor:
        return (self.X @ M).reshape(-1)

    def adjoint(self, v: Tensor) -> Tensor:
        return self.X.T @ v.view(-1, self.shape[1])


class WhitenedActivationOperator(ActivationOperator):
    """The same measurements of P = Lᵀ M, where XᵀX / N + ridge I = L Lᵀ: isotropic whatever X is.

    `unwhiten` maps P back to M. InputError if X has not full column rank and ridge is zero.
    """

    def __init__(self, X: Tensor, out: int, ridge: float = 0.0) -> None:
        super().__init__(X, out)
        gram = self.X.T @ self.X
        gram.diagonal().add_(ridge)
        self.lower, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            raise InputError("X has not full column rank: give a positive ridge")
        self.X = torch.linalg.solve_triangular(self.lower, self.X.T, upper=False).T

    def whiten(self, M: Tensor) -> Tensor:
        return self.lower.T @ M

    def unwhiten(self, P: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.lower.T, P, upper=True)
