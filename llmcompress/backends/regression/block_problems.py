"""Convex problems for block coordinate descent: f smooth, plus a penalty that separates over the coordinates.

All have: value(x), grad(x) of the smooth part, hess_bound(block) >= its Hessian everywhere, hess(x, block), lipschitz
(the bound's diagonal), l1 and nonneg (the penalty l1 |x|, or l1 x with x >= 0). x (p,), float64.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import Tensor

from llmcompress.backends.checks import checked_matrix
from llmcompress.errors import InputError


class Problem(Protocol):
    size: int
    l1: float
    nonneg: bool
    lipschitz: Tensor
    quadratic: bool  #: the bound is the Hessian

    def smooth(self, x: Tensor) -> float: ...
    def grad(self, x: Tensor) -> Tensor: ...
    def hess_bound(self, block: Tensor | None = None) -> Tensor: ...
    def hess(self, x: Tensor, block: Tensor) -> Tensor: ...
    def value(self, x: Tensor) -> float: ...


class _Penalised:
    """The penalty, and the coordinates' proximal map."""

    def __init__(self, l1: float, nonneg: bool) -> None:
        if not l1 >= 0:
            raise InputError(f"l1 must not be negative; got {l1}")
        self.l1, self.nonneg = l1, nonneg

    def smooth(self, x: Tensor) -> float:
        raise NotImplementedError

    def value(self, x: Tensor) -> float:
        return self.smooth(x) + self.l1 * float(x.abs().sum())


def prox(problem: Problem, v: Tensor, step: Tensor) -> Tensor:
    """argmin over u of ||u - v||² / (2 step) + penalty(u), coordinate by coordinate."""
    if problem.nonneg:
        return (v - step * problem.l1).clamp_min(0)
    return torch.sign(v) * (v.abs() - step * problem.l1).clamp_min(0) if problem.l1 else v


class LeastSquares(_Penalised):
    """0.5 ||A x - b||² + penalty; A (n, p), b (n,)."""

    quadratic = True

    def __init__(self, A: Tensor, b: Tensor, l1: float = 0.0, nonneg: bool = False) -> None:
        super().__init__(l1, nonneg)
        self.A, self.b = checked_matrix(A, "A"), checked_matrix(b, "b", 1)
        if len(self.b) != len(self.A):
            raise InputError(f"A has {len(self.A)} rows and b {len(self.b)}")
        self.size, self.lipschitz = self.A.shape[1], self.A.square().sum(0)

    def smooth(self, x: Tensor) -> float:
        return 0.5 * float((self.A @ x - self.b).square().sum())

    def grad(self, x: Tensor) -> Tensor:
        return self.A.T @ (self.A @ x - self.b)

    def hess_bound(self, block: Tensor | None = None) -> Tensor:
        part = self.A if block is None else self.A[:, block]
        return part.T @ part

    def hess(self, x: Tensor, block: Tensor) -> Tensor:
        return self.hess_bound(block)


class Logistic(_Penalised):
    """sum log(1 + exp(-y A x)) + l2/2 ||x||² + penalty; A (n, p), y (n,) of ±1."""

    quadratic = False

    def __init__(self, A: Tensor, y: Tensor, l2: float = 0.0, l1: float = 0.0, nonneg: bool = False) -> None:
        super().__init__(l1, nonneg)
        self.A, self.y, self.l2 = checked_matrix(A, "A"), checked_matrix(y, "y", 1), l2
        if len(self.y) != len(self.A):
            raise InputError(f"A has {len(self.A)} rows and y {len(self.y)}")
        if not (self.y.abs() == 1).all():
            raise InputError("y must hold +1 and -1 only")
        self.size, self.lipschitz = self.A.shape[1], self.A.square().sum(0) / 4 + l2

    def smooth(self, x: Tensor) -> float:
        return float(F.softplus(-self.y * (self.A @ x)).sum() + self.l2 / 2 * x.square().sum())

    def grad(self, x: Tensor) -> Tensor:
        return self.A.T @ (-self.y * torch.sigmoid(-self.y * (self.A @ x))) + self.l2 * x

    def _weighted(self, weight: Tensor | float, block: Tensor | None) -> Tensor:
        part = self.A if block is None else self.A[:, block]
        scaled = part * (weight[:, None] if isinstance(weight, Tensor) else weight)
        return part.T @ scaled + self.l2 * torch.eye(part.shape[1], dtype=part.dtype, device=part.device)

    def hess_bound(self, block: Tensor | None = None) -> Tensor:
        return self._weighted(0.25, block)

    def hess(self, x: Tensor, block: Tensor) -> Tensor:
        s = torch.sigmoid(self.A @ x)
        return self._weighted(s * (1 - s), block)


class Softmax(_Penalised):
    """Cross entropy of k classes, summed; A (n, d), Y (n, k) one-hot; x (k d,), one class after another."""

    quadratic = False

    def __init__(self, A: Tensor, Y: Tensor) -> None:
        super().__init__(0.0, False)
        self.A, self.Y = checked_matrix(A, "A"), checked_matrix(Y, "Y")
        if len(self.Y) != len(self.A):
            raise InputError(f"A has {len(self.A)} rows and Y {len(self.Y)}")
        if not (((self.Y == 0) | (self.Y == 1)).all() and (self.Y.sum(1) == 1).all()):
            raise InputError("Y must be one-hot: a single 1 in each row")
        self.classes, self.d = self.Y.shape[1], self.A.shape[1]
        self.size = self.classes * self.d
        self.lipschitz = (self.A.square().sum(0) * 0.5 * (1 - 1 / self.classes)).repeat(self.classes)

    def _logits(self, x: Tensor) -> Tensor:
        return self.A @ x.view(self.classes, self.d).T

    def smooth(self, x: Tensor) -> float:
        logits = self._logits(x)
        return float((torch.logsumexp(logits, 1) - (logits * self.Y).sum(1)).sum())

    def grad(self, x: Tensor) -> Tensor:
        return ((torch.softmax(self._logits(x), 1) - self.Y).T @ self.A).flatten()

    def _pairs(self, block: Tensor | None) -> tuple[Tensor, Tensor]:
        block = torch.arange(self.size, device=self.A.device) if block is None else block
        return block // self.d, block % self.d

    def hess_bound(self, block: Tensor | None = None) -> Tensor:
        classes, features = self._pairs(block)
        part = self.A[:, features]
        mix = 0.5 * ((classes[:, None] == classes).double() - 1 / self.classes)
        return mix * (part.T @ part)

    def hess(self, x: Tensor, block: Tensor) -> Tensor:
        classes, features = self._pairs(block)
        P = torch.softmax(self._logits(x), 1)[:, classes]
        part = self.A[:, features]
        same = (classes[:, None] == classes).double()
        return same * (part.T @ (P * part)) - (P * part).T @ (P * part)


class SparseQuadratic(_Penalised):
    """0.5 xᵀ H x - bᵀ x; H (p, p) symmetric positive semidefinite, dense or scipy sparse; on the CPU."""

    quadratic = True

    def __init__(self, H: Any, b: Tensor) -> None:
        super().__init__(0.0, False)
        dense = H.numpy() if isinstance(H, Tensor) else H
        self.H = scipy.sparse.csr_matrix(dense).astype(np.float64)
        self.b = checked_matrix(b, "b", 1)
        if self.H.shape != (len(self.b), len(self.b)):
            raise InputError(f"H must be ({len(self.b)}, {len(self.b)}); got {self.H.shape}")
        if not np.isfinite(self.H.data).all():
            raise InputError("H is not finite")
        if abs(self.H - self.H.T).max() > 1e-10 * abs(self.H).max():
            raise InputError("H must be symmetric")
        self.size, self.lipschitz = len(self.b), torch.from_numpy(self.H.diagonal())
        self._check_semidefinite()

    def _check_semidefinite(self) -> None:
        """Diagonal dominance settles Laplacians of any size."""
        off = np.asarray(abs(self.H).sum(1)).ravel() - np.abs(self.H.diagonal())
        if (self.H.diagonal() >= off * (1 - 1e-12)).all():
            return
        if self.size <= 2000:
            least = float(np.linalg.eigvalsh(self.H.toarray())[0])
        else:
            least = float(scipy.sparse.linalg.eigsh(self.H, 1, which="SA", return_eigenvectors=False)[0])
        if least < -1e-10 * float(abs(self.H).max()):
            raise InputError(f"H must be positive semidefinite; its least eigenvalue is {least:.3g}")

    def smooth(self, x: Tensor) -> float:
        return float(0.5 * x @ torch.from_numpy(self.H @ x.numpy()) - self.b @ x)

    def grad(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.H @ x.numpy()) - self.b

    def hess_bound(self, block: Tensor | None = None) -> Tensor:
        if block is None:
            return torch.from_numpy(self.H.toarray())
        return torch.from_numpy(self.H[block.numpy()][:, block.numpy()].toarray())

    def hess(self, x: Tensor, block: Tensor) -> Tensor:
        return self.hess_bound(block)


class GramLeastSquares:
    """0.5 wᵀ G w - cᵀ w for every column c of C (p, k); mask (p, k): where w may differ from zero, everywhere if None.

    From the Gram alone: G = XᵀX, C = XᵀY. Columns choose their blocks on their own.
    """

    def __init__(self, G: Tensor, C: Tensor, mask: Tensor | None = None) -> None:
        self.G, self.C = checked_matrix(G, "G"), checked_matrix(C, "C")
        if self.G.shape != (len(self.C), len(self.C)):
            raise InputError(f"G must be ({len(self.C)}, {len(self.C)}); got {tuple(self.G.shape)}")
        if (self.G - self.G.T).abs().max() > 1e-8 * self.G.abs().max():
            raise InputError("G must be symmetric")
        if mask is not None and mask.shape != self.C.shape:
            raise InputError(f"the mask must be {tuple(self.C.shape)}; got {tuple(mask.shape)}")
        self.mask = torch.ones_like(self.C, dtype=torch.bool) if mask is None else mask.bool()
        self.size, self.lipschitz = len(self.C), self.G.diagonal()

    def value(self, W: Tensor) -> Tensor:
        """(k,)"""
        return (W * (0.5 * self.G @ W - self.C)).sum(0)

    def grad(self, W: Tensor) -> Tensor:
        return self.G @ W - self.C
