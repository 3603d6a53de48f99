"""Symmetric positive definite matrices under the Bures-Wasserstein geometry and its generalisation (arXiv 2504.00660).

L_P[V] solves L P + P L = V. With a parameter M and a power theta, P goes to M^-½ P^theta M^-½, where the plain
geometry applies; squared distances then carry 1 / theta². Everything is batched and in float64; matrix functions
have exact derivatives at equal eigenvalues, where those of an eigendecomposition are not defined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcompress.errors import InputError

TIE = 1e-5  # relative gap of eigenvalues below which a divided difference is the derivative between them
Function = Callable[[Tensor], Tensor]


def checked_spd(P: Tensor, name: str, definite: bool = True) -> Tensor:
    """P (..., n, n) in float64, symmetrised. InputError naming it unless symmetric to 1e-6, finite, positive definite
    (semi-definite to rounding where `definite` is false)."""
    if P.ndim < 2 or P.shape[-1] != P.shape[-2] or not P.numel():
        raise InputError(f"{name} must be square matrices (..., n, n), not empty; got shape {tuple(P.shape)}")
    if not torch.isfinite(P).all():
        raise InputError(f"{name} is not finite")
    P = P.double()
    scale = P.detach().abs().amax((-2, -1), keepdim=True)
    if ((P - P.mT).detach().abs() > 1e-6 * scale).any():
        raise InputError(f"{name} is not symmetric")
    P = (P + P.mT) / 2
    values = torch.linalg.eigvalsh(P.detach())
    bound = -1e-9 * values[..., -1]
    if (values[..., 0] <= 0).any() if definite else (values[..., 0] < bound).any():
        kind = "positive definite" if definite else "positive semi-definite"
        raise InputError(f"{name} is not {kind} (min eigenvalue {float(values[..., 0].min()):.3g})")
    return P


# --- matrix functions ------------------------------------------------------------------------------------------------


class _Spectral(torch.autograd.Function):
    """f(P) of symmetric P; its derivative by the divided differences of f (Daleckii and Krein)."""

    @staticmethod
    def forward(ctx: Any, P: Tensor, f: Function, df: Function) -> Tensor:
        values, vectors = torch.linalg.eigh(P)
        a, b = values[..., :, None], values[..., None, :]
        gap = a - b
        tied = gap.abs() <= TIE * torch.maximum(a.abs(), b.abs())
        quotient = (f(a) - f(b)) / torch.where(tied, 1.0, gap)
        ctx.save_for_backward(vectors, torch.where(tied, df((a + b) / 2), quotient))
        return (vectors * f(values)[..., None, :]) @ vectors.mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        vectors, kernel = ctx.saved_tensors
        inner = vectors.mT @ ((grads[0] + grads[0].mT) / 2) @ vectors
        return vectors @ (kernel * inner) @ vectors.mT, None, None


def spectral(P: Tensor, f: Function, df: Function) -> Tensor:
    """f applied to the eigenvalues of symmetric P (..., n, n); df its derivative. O(n³) each."""
    return _Spectral.apply(P, f, df)


def spd_power(P: Tensor, power: float) -> Tensor:
    """P^power of positive definite P (..., n, n); of semi-definite P too where power >= 0."""
    tiny = torch.finfo(torch.float64).tiny
    return spectral(
        P, lambda x: x.clamp_min(tiny if power < 0 else 0.0) ** power,
        lambda x: power * x.clamp_min(tiny) ** (power - 1),
    )  # fmt: skip


def spd_log(P: Tensor) -> Tensor:
    """The symmetric logarithm of positive definite P (..., n, n)."""
    return spectral(P, torch.log, torch.reciprocal)


def sym_exp(V: Tensor) -> Tensor:
    """The exponential of symmetric V (..., n, n), positive definite."""
    return spectral(V, torch.exp, torch.exp)


@dataclass(frozen=True)
class PairKernel:
    """k(x, y), symmetric, and its divided difference in the first argument, (k(x, y) - k(z, y)) / (x - z), as (x,
    z, y)."""

    value: Callable[[Tensor, Tensor], Tensor]
    difference: Callable[[Tensor, Tensor, Tensor], Tensor]


LYAPUNOV = PairKernel(lambda x, y: 1 / (x + y), lambda x, z, y: -1 / ((x + y) * (z + y)))
FROM_IDENTITY = PairKernel(
    lambda x, y: ((x + y) / 2).sqrt(), lambda x, z, y: 0.5 / (((x + y) / 2).sqrt() + ((z + y) / 2).sqrt())
)


class _Pair(torch.autograd.Function):
    """U (k(p_i, p_j) ∘ Uᵀ V U) Uᵀ of one P (n, n) = U diag(p) Uᵀ and V (N, n, n)."""

    @staticmethod
    def forward(ctx: Any, P: Tensor, V: Tensor, kernel: PairKernel) -> Tensor:
        values, vectors = torch.linalg.eigh(P)
        table = kernel.value(values[:, None], values[None, :])
        inner = vectors.mT @ V @ vectors
        ctx.kernel = kernel
        ctx.save_for_backward(values, vectors, table, inner)
        return vectors @ (table * inner) @ vectors.mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        values, vectors, table, inner = ctx.saved_tensors
        grad = vectors.mT @ ((grads[0] + grads[0].mT) / 2) @ vectors
        cubes = ctx.kernel.difference(values[:, None, None], values[None, :, None], values[None, None, :])
        own = 2 * (cubes * torch.einsum("nij,nkj->ikj", grad, inner)).sum(2)
        own = (own + own.mT) / 2
        return vectors @ own @ vectors.mT, vectors @ (table * grad) @ vectors.mT, None


def pair(P: Tensor, V: Tensor, kernel: PairKernel) -> Tensor:
    """V (N, n, n) scaled by kernel values of the eigenvalues of P (n, n), in the eigenbasis of P."""
    return _Pair.apply(P, V, kernel)


def lyapunov(P: Tensor, V: Tensor) -> Tensor:
    """L (..., n, n) with L P + P L = V, P (..., n, n) positive definite."""
    values, vectors = torch.linalg.eigh(P)
    return vectors @ ((vectors.mT @ V @ vectors) / (values[..., :, None] + values[..., None, :])) @ vectors.mT


# --- the geometry ----------------------------------------------------------------------------------------------------


def push(P: Tensor, M: Tensor | None, theta: float) -> Tensor:
    """M^-½ P^theta M^-½, where the plain geometry applies. InputError for theta = 0."""
    if theta == 0:
        raise InputError("theta must not be 0: in the limit the geometry is log-Euclidean")
    powered = P if theta == 1 else spd_power(P, theta)
    if M is None:
        return powered
    root = spd_power(checked_spd(M, "M"), -0.5)
    return root @ powered @ root


def pull(P: Tensor, M: Tensor | None, theta: float) -> Tensor:
    """The inverse of `push`."""
    if M is not None:
        root = spd_power(M.double(), 0.5)
        P = root @ P @ root
    return P if theta == 1 else spd_power(P, 1 / theta)


def _cross_root(P: Tensor, Q: Tensor) -> Tensor:
    """(P Q)^½ = P^½ (P^½ Q P^½)^½ P^-½."""
    root, inverse = spd_power(P, 0.5), spd_power(P, -0.5)
    return root @ spd_power(root @ Q @ root, 0.5) @ inverse


def bw_inner(P: Tensor, V: Tensor, W: Tensor) -> Tensor:
    """The metric at P: ½ tr(L_P[V] W), (...)."""
    return (lyapunov(P, V) * W).sum((-2, -1)) / 2


def bw_distance(P: Tensor, Q: Tensor, M: Tensor | None = None, theta: float = 1.0, squared: bool = False) -> Tensor:
    """Distance (...) of P (..., n, n), positive definite, and Q (..., n, n), which may be singular where theta > 0.

    d² = tr P + tr Q - 2 ||P^½ Q^½||_* of the pushed matrices, over theta²; by singular values in float64, since the
    traces cancel, and at least 0. InputError for matrices that are not (semi-)definite, or theta = 0.
    """
    P, Q = checked_spd(P, "P"), checked_spd(Q, "Q", definite=theta < 0)
    P, Q = push(P, M, theta), push(Q, M, theta)
    mixed = torch.linalg.svdvals(spd_power(P, 0.5) @ spd_power(Q, 0.5)).sum(-1)
    traces = (P + Q).diagonal(dim1=-2, dim2=-1).sum(-1)
    square = (traces - 2 * mixed).clamp_min(0) / theta**2
    return square if squared else square.sqrt()


def bw_log(P: Tensor, Q: Tensor, M: Tensor | None = None) -> Tensor:
    """The tangent vector at P that leads to Q: (PQ)^½ + (QP)^½ - 2P of the pushed matrices, pulled back."""
    P, Q = checked_spd(P, "P"), checked_spd(Q, "Q", definite=False)
    P, Q = push(P, M, 1.0), push(Q, M, 1.0)
    mixed = _cross_root(P, Q)
    return pull(mixed + mixed.mT - 2 * P, M, 1.0)


def bw_exp(P: Tensor, V: Tensor, M: Tensor | None = None) -> Tensor:
    """Where the geodesic from P with velocity V ends: P + V + L P L. InputError unless I + L_P[V] is positive
    definite."""
    P = push(checked_spd(P, "P"), M, 1.0)
    if M is not None:
        root = spd_power(M.double(), -0.5)
        V = root @ V @ root
    L = lyapunov(P, V.double())
    if not (torch.linalg.eigvalsh(L)[..., 0] > -1).all():
        raise InputError("V leads past the boundary: I + L_P[V] is not positive definite")
    return pull(P + V + L @ P @ L, M, 1.0)


def bw_geodesic(P: Tensor, Q: Tensor, t: float, M: Tensor | None = None) -> Tensor:
    """(1-t)² P + t² Q + t (1-t) [(PQ)^½ + (QP)^½] of the pushed matrices, pulled back."""
    P, Q = checked_spd(P, "P"), checked_spd(Q, "Q", definite=False)
    P, Q = push(P, M, 1.0), push(Q, M, 1.0)
    mixed = _cross_root(P, Q)
    return pull((1 - t) ** 2 * P + t**2 * Q + t * (1 - t) * (mixed + mixed.mT), M, 1.0)


def bw_transport(V: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Parallel transport of V (..., n, n) from `source` to a `target` (n, n) that commutes with it; an isometry.

    V scaled by sqrt((q_i + q_j) / (p_i + p_j)) in the common eigenbasis. InputError unless they commute.
    """
    P, Q = checked_spd(source, "source"), checked_spd(target, "target")
    product = P @ Q
    if float((product - product.mT).norm()) > 1e-8 * float(product.norm()):
        raise InputError("source and target do not commute: transport between them has no closed form")
    vectors = torch.linalg.eigh(P / P.norm() + 2**0.5 * Q / Q.norm())[1]
    p, q = (((vectors.mT @ S) * vectors.mT).sum(-1) for S in (P, Q))
    scale = ((q[:, None] + q) / (p[:, None] + p)).sqrt()
    return vectors @ (scale * (vectors.mT @ V.double() @ vectors)) @ vectors.mT


def bw_barycentre(
    X: Tensor,
    weights: Tensor | None = None,
    M: Tensor | None = None,
    theta: float = 1.0,
    max_iter: int = 100,
    tol: float = 1e-10,
) -> tuple[Tensor, dict[str, float]]:
    """The matrix (n, n) of least weighted squared distance to X (N, n, n), and {n_iter, grad_norm}.

    Fixed point G <- G^-½ [sum w_i (G^½ X_i G^½)^½]² G^-½ from the arithmetic mean, until the mean tangent vector is at
    most tol of G. weights (N,), on the simplex; equal if absent. O(N n³) an iteration.
    """
    if X.ndim != 3 or not len(X):
        raise InputError(f"X must be a batch of matrices (N, n, n), N at least 1; got shape {tuple(X.shape)}")
    X = push(checked_spd(X, "X"), M, theta)
    w = _checked_simplex(weights, len(X)).to(X)
    G, info = fixed_point(X, w, max_iter, tol)
    return pull(G, M, theta), info


def fixed_point(X: Tensor, w: Tensor, max_iter: int, tol: float) -> tuple[Tensor, dict[str, float]]:
    """`bw_barycentre` of pushed matrices."""
    G = torch.einsum("n,nij->ij", w, X)
    for iteration in range(max_iter + 1):
        root, inverse = spd_power(G, 0.5), spd_power(G, -0.5)
        mean = torch.einsum("n,nij->ij", w, spd_power(root @ X @ root, 0.5))
        mixed = root @ mean @ inverse
        gradient = float((mixed + mixed.mT - 2 * G).norm() / G.norm())
        if gradient <= tol or iteration == max_iter:
            break
        G = inverse @ mean @ mean @ inverse
        G = (G + G.mT) / 2
    return G, {"n_iter": iteration, "grad_norm": gradient}


def _checked_simplex(weights: Tensor | None, count: int) -> Tensor:
    if weights is None:
        return torch.full((count,), 1 / count, dtype=torch.float64)
    w = weights.double()
    if tuple(w.shape) != (count,) or not (w >= 0).all() or abs(float(w.sum()) - 1) > 1e-6:
        raise InputError(f"weights must be {count} numbers that are not negative and sum to 1; got {w.tolist()}")
    return w
