"""Diagonal systems close to HiPPO's: dropping its rank-one part (S4D), or perturbing before diagonalising (PTD).

A system is x' = A x + B u, y = C x. HiPPO's A is so far from normal that its eigenvectors are useless in floating
point; those of A + E, with a small E, are not, and nothing is dropped. Source: arXiv 2310.01698.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from llmcompress.backends.checks import choose, generator_for
from llmcompress.errors import InputError

Method = Literal["optimised", "ginibre"]
NEEDS_NONE = 1e4  # eigenvectors of a condition number below it are used as they are
FREQUENCIES = 64  # solved at a time


@dataclass(frozen=True)
class PTDResult:
    """A + E = V diag(eigenvalues) V⁻¹: eigenvalues (n,) and V (n, n) complex128, unit columns; E (n, n) float64.

    kappa: condition number of V; eps: ||E||_2; phi_history: kappa + gamma ||E||_2 by step, of the optimised choice.
    """

    eigenvalues: Tensor
    V: Tensor
    E: Tensor
    kappa: float
    eps: float
    phi_history: list[float] = field(default_factory=list)


def hippo(kind: Literal["legs", "legt"], n: int) -> tuple[Tensor, Tensor]:
    """A (n, n) and B (n,) of the scaled (legs) or translated (legt) Legendre measure, float64. InputError for n < 1."""
    choose("kind", kind, ("legs", "legt"))
    if n < 1:
        raise InputError(f"n must be at least 1; got {n}")
    i = torch.arange(n, dtype=torch.float64)
    B = (2 * i + 1).sqrt()
    products = torch.outer(B, B)
    if kind == "legs":
        return -products.tril(-1) - torch.diag(i + 1), B
    signs = 1 - 2 * ((i[:, None] - i) % 2)
    return -products * torch.where(i[:, None] >= i, 1.0, signs), B


def psi(s: Tensor, n: int) -> Tensor:
    """s prod_{j<n} (s - j) / prod_{j<=n} (s + j): S4D's transfer function of LegS is the exact one over 1 + psi."""
    found = s / (s + n)
    for j in range(1, n):
        found = found * (s - j) / (s + j)
    return found


def transfer_function(A: Tensor, B: Tensor, C: Tensor, s: Tensor) -> Tensor:
    """C (s - A)⁻¹ B (m,): A (n, n), or its eigenvalues (n,); B, C (n,); s (m,).

    complex128. Cost: O(m n³), or O(m n).
    """
    s, B, C = (t.to(torch.complex128) for t in (s, B, C))
    if A.ndim == 1:
        return ((C * B) / (s[:, None] - A.to(s))).sum(1)
    identity = torch.eye(len(A), dtype=s.dtype, device=A.device)
    return torch.cat([
        torch.linalg.solve(part[:, None, None] * identity - A.to(s), B.expand(len(part), -1)) @ C
        for part in s.split(FREQUENCIES)
    ])  # fmt: skip


def s4d_init(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """S4D of LegS: eigenvalues (n,) of A + B Bᵀ / 2, which is normal, B / 2 in their basis (n,), the basis (n, n)."""
    A, B = hippo("legs", n)
    normal = A + torch.outer(B, B) / 2
    skew = (normal - normal.T) / 2
    values, V = torch.linalg.eigh(-1j * skew)
    return torch.complex(torch.full_like(values, -0.5), values), V.mH @ (B / 2).to(V), V


def perturb_then_diagonalize(
    A: Tensor,
    method: Method = "optimised",
    eps: float = 0.1,
    gamma: float = 100.0,
    max_eps: float | None = None,
    steps: int = 150,
    generator: torch.Generator | None = None,
) -> PTDResult:
    """Eigenvectors of A + E, E small: Gaussian of norm eps, or optimised from there by Adam on kappa + gamma ||E||_2.

    A (n, n). The larger gamma, the smaller E and the larger kappa; max_eps bounds ||E||_2. An A whose own eigenvectors
    are well conditioned is left alone. generator: CPU, seeded with 0 if absent.
    InputError: A not square or finite, eps or gamma out of range, an eigenvalue of A + E that is not in the left half
    plane ("unstable"), singular eigenvectors. Warns where kappa exceeds what A's dtype resolves.
    Cost: O(n³), times steps where E is optimised. Source: arXiv 2310.01698.
    """
    choose("method", method, ("optimised", "ginibre"))
    if A.ndim != 2 or A.shape[0] != A.shape[1] or not A.numel():
        raise InputError(f"A must be square, of size 1 at least; got {tuple(A.shape)}")
    if not torch.isfinite(A).all():
        raise InputError("A is not finite")
    if not eps > 0 or gamma < 0 or (max_eps is not None and not max_eps > 0):
        raise InputError(f"eps and max_eps must be positive, gamma not negative; got {eps}, {max_eps}, {gamma}")
    exact, n = A.detach().double(), len(A)
    E = torch.zeros_like(exact)
    history: list[float] = []
    if not float(_kappa(exact)) <= NEEDS_NONE:
        noise = torch.randn(n, n, dtype=torch.float64, generator=generator or generator_for(0)).to(exact.device)
        E = eps * noise / torch.linalg.matrix_norm(noise, 2)
        if method == "optimised":
            E, history = _optimised(exact, E, eps, gamma, max_eps, steps)
    values, V = torch.linalg.eig(exact + E)
    kappa = float(_condition(V))
    if not kappa < float("inf"):
        raise InputError("the eigenvectors of A + E are singular: raise eps")
    if float(values.real.max()) >= 0:
        raise InputError(f"A + E is unstable: an eigenvalue has real part {float(values.real.max()):.3g}; lower eps")
    if kappa > 1 / torch.finfo(A.dtype).eps:
        warnings.warn(f"eigenvectors of condition {kappa:.1e} are not resolved in {A.dtype}", stacklevel=2)
    return PTDResult(values, V, E, kappa, float(torch.linalg.matrix_norm(E, 2)), history)


def _kappa(M: Tensor) -> Tensor:
    return _condition(torch.linalg.eig(M).eigenvectors)


def _condition(V: Tensor) -> Tensor:
    values = torch.linalg.svdvals(V)
    return values[0] / values[-1]


@torch.enable_grad()
def _optimised(
    A: Tensor, E: Tensor, eps: float, gamma: float, max_eps: float | None, steps: int
) -> tuple[Tensor, list[float]]:
    E = E.clone().requires_grad_()
    optimizer = torch.optim.Adam([E], lr=0.5 * eps / len(A) ** 0.5)
    best = E.detach().clone()
    history: list[float] = []
    for _ in range(steps + 1):
        phi = _kappa(A + E) + gamma * torch.linalg.matrix_norm(E, 2)
        if not torch.isfinite(phi):
            break
        if not history or float(phi.detach()) < min(history):
            best = E.detach().clone()
        history.append(float(phi.detach()))
        optimizer.zero_grad()
        phi.log().backward()
        optimizer.step()
        if max_eps is not None:
            with torch.no_grad():
                E.mul_((max_eps / torch.linalg.matrix_norm(E, 2)).clamp_max(1.0))
    return best, history
