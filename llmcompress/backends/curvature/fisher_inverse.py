"""Products with F⁻¹, F = lam I + (1/m) sum g_i g_iᵀ over m gradients, F never formed (M-FAC, arXiv 2107.03356)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from llmcompress.backends.checks import checked_matrix
from llmcompress.errors import InputError


class StaticFisherInverse:
    """Of fixed gradients (m, d), in their dtype; per diagonal block of `block_size` weights if given. damp: lam.

    v_i = F_{i-1}⁻¹ g_i by the recursion of rank-one updates, q_i = m + g_i·v_i. O(d m²) to build, O(d m) a product,
    O(m) an entry, m d values of memory. InputError for bad gradients, damp or sizes. Source: arXiv 2107.03356, static.
    """

    def __init__(self, grads: Tensor, damp: float, block_size: int | None = None) -> None:
        checked_matrix(grads, "the gradients")
        check_damp(damp)
        m, self.dim = grads.shape
        size = self.dim if block_size is None else min(block_size, self.dim)
        if size < 1:
            raise InputError(f"block_size must be at least 1; got {block_size}")
        self.damp, self.size = damp, size
        g = self._blocks(grads).transpose(0, 1)  # (blocks, m, size)
        self.v = torch.empty_like(g)
        self.q = g.new_empty(g.shape[:2])
        for i in range(m):
            before = self.v[:, :i]
            weights = (before @ g[:, i, :, None]) / self.q[:, :i, None]
            self.v[:, i] = g[:, i] / damp - (before.mT @ weights)[:, :, 0]
            self.q[:, i] = m + torch.linalg.vecdot(g[:, i], self.v[:, i])

    def _blocks(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., blocks, size), the last one filled up with zeros."""
        pad = -self.dim % self.size
        return torch.nn.functional.pad(x, (0, pad)).unflatten(-1, (-1, self.size))

    def mul(self, x: Tensor) -> Tensor:
        """F⁻¹ x for x (d,) or (d, k)."""
        if x.shape[0] != self.dim:
            raise InputError(f"x must have the gradients' {self.dim} values; got shape {tuple(x.shape)}")
        columns = self._blocks(x.reshape(self.dim, -1).T).permute(1, 2, 0)  # (blocks, size, k)
        found = columns / self.damp - self.v.mT @ ((self.v @ columns) / self.q[:, :, None])
        return found.flatten(0, 1)[: self.dim].view(x.shape)

    def diag(self) -> Tensor:
        """The diagonal of F⁻¹, (d,)."""
        return (1 / self.damp - (self.v.square() / self.q[:, :, None]).sum(1)).flatten()[: self.dim]

    def element(self, i: int, j: int) -> float:
        """[F⁻¹]_ij; 0 across blocks."""
        (a, row), (b, column) = divmod(i, self.size), divmod(j, self.size)
        if a != b:
            return 0.0
        return float((i == j) / self.damp - (self.v[a, :, row] * self.v[a, :, column] / self.q[a]).sum())


class DynamicFisherInverse:
    """Of the last `window` gradients of `dim` values, m = window even while rows are missing (they are zero).

    Keeps the gradients G (m, d) in `dtype` and K = G Gᵀ in work_dtype: O(d m + m³) an update or a product.
    InputError for bad sizes, damp and gradients, and for a saved window of another layout.
    """

    def __init__(
        self, window: int, dim: int, damp: float, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu", work_dtype: torch.dtype = torch.float64,
    ) -> None:  # fmt: skip
        check_damp(damp)
        if window < 1 or dim < 1:
            raise InputError(f"window and dim must be at least 1; got {window} and {dim}")
        self.window, self.dim, self.damp, self.count = window, dim, damp, 0
        self.G = torch.zeros(window, dim, dtype=dtype, device=device)
        self.K = torch.zeros(window, window, dtype=work_dtype, device=device)

    def update(self, g: Tensor) -> int:
        """Puts g (d,) in the place of the oldest gradient, and returns its slot."""
        if tuple(g.shape) != (self.dim,):
            raise InputError(f"the gradient must have {self.dim} values; got shape {tuple(g.shape)}")
        if not torch.isfinite(g).all():
            raise InputError("the gradient is not finite")
        slot = self.count % self.window
        self.G[slot] = g
        products = (self.G @ self.G[slot]).to(self.K)
        self.K[slot], self.K[:, slot] = products, products
        self.count += 1
        return slot

    def _factor(self) -> Tensor:
        """C with C Cᵀ = m I + K / lam."""
        shifted = self.K / self.damp
        shifted.diagonal().add_(self.window)
        factor: Tensor = torch.linalg.cholesky(shifted)
        return factor

    def mul(self, x: Tensor) -> Tensor:
        """F⁻¹ x for x (d,). Digits cancel where x is a combination of the gradients: see `mul_slot`."""
        if tuple(x.shape) != (self.dim,):
            raise InputError(f"x must have {self.dim} values; got shape {tuple(x.shape)}")
        inner = torch.cholesky_solve((self.G @ x.to(self.G)).to(self.K)[:, None], self._factor())[:, 0]
        return x / self.damp - (self.G.T @ inner.to(self.G)).to(x) / self.damp**2

    def mul_slot(self, slot: int) -> Tensor:
        """F⁻¹ g of the gradient in that slot, (m / lam) Gᵀ (m I + K / lam)⁻¹ e_slot: nothing cancels."""
        unit = torch.zeros(self.window, 1, dtype=self.K.dtype, device=self.K.device)
        unit[slot] = self.window / self.damp
        return self.G.T @ torch.cholesky_solve(unit, self._factor())[:, 0].to(self.G)

    def coefficients(self, method: Literal["cholesky", "recursion"] = "cholesky") -> tuple[Tensor, Tensor, Tensor]:
        """D, B (m, m) and q (m,): D_ij = g_iᵀ F_{i-1}⁻¹ g_j for i <= j, v_i = (B G)_i, q_i = m + D_ii.

        By one Cholesky factor, or by the paper's recursion over rank-one updates (dynamic algorithm), which agree.
        """
        m, identity = self.window, torch.eye(self.window, dtype=self.K.dtype, device=self.K.device)
        if method == "cholesky":
            factor = self._factor()
            diagonal = factor.diagonal()
            q = diagonal.square()
            B = torch.linalg.solve_triangular(factor / diagonal, identity, upper=False) / self.damp
            return ((factor * diagonal).T - m * identity).triu(), B, q
        D = self.K / self.damp
        for i in range(m - 1):
            row = D[i, i + 1 :].clone()
            D[i + 1 :, i + 1 :] -= row[:, None] * row / (m + D[i, i])
        D, q = D.triu(), m + D.diagonal()
        B = identity / self.damp
        for i in range(1, m):
            B[i] -= (D[:i, i] / q[:i]) @ B[:i]
        return D, B, q

    def state_dict(self) -> dict[str, Any]:
        return {"gradients": self.G, "products": self.K, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["gradients"].shape != self.G.shape:
            saved = tuple(state["gradients"].shape)
            raise InputError(f"the saved window is {saved}, of other parameters than these: {tuple(self.G.shape)}")
        self.G.copy_(state["gradients"])
        self.K.copy_(state["products"])
        self.count = int(state["count"])


def check_damp(damp: float) -> None:
    if not damp > 0:
        raise InputError(f"damp must be positive; got {damp}")
