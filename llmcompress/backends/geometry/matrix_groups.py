"""GL+(n) and SL(n) as symmetric-positive times rotation: coordinates, Haar sampling, convolution (arXiv
2310.11366)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import scipy.linalg
import torch
from torch import Tensor

from llmcompress.backends.checks import choose
from llmcompress.backends.geometry.gauge import haar_so
from llmcompress.errors import InputError

log = logging.getLogger("llmcompress")

Group = Literal["gl", "sl"]
GROUPS = ("gl", "sl")
VARIANCE = 0.1  # of a coordinate of log(g gᵀ), as the paper's code draws it
SL_TOLERANCE = 1e-6  # of |det - 1|
NEAR_HALF_TURN = 1e-2  # rotations closer to pi take their axis from the symmetric part


class GroupSamples(NamedTuple):
    """g and its inverse (N, n, n); weights (N,), the Haar measure over the density that they were drawn from."""

    g: Tensor
    g_inv: Tensor
    weights: Tensor


def checked_elements(g: Tensor, group: Group = "gl") -> Tensor:
    """g (..., n, n), float32 becoming float64. InputError unless square, finite, of positive determinant (SL: of
    1)."""
    choose("group", group, GROUPS)
    if g.ndim < 2 or g.shape[-1] != g.shape[-2] or not g.shape[-1]:
        raise InputError(f"group elements must be square matrices (..., n, n); got shape {tuple(g.shape)}")
    if not torch.isfinite(g).all():
        raise InputError("a group element is not finite")
    g = g.double()
    det = torch.linalg.det(g)
    if not (det > 0).all():
        raise InputError(f"GL+ needs positive determinant; got {float(det.min()):.4g}")
    if group == "sl" and (worst := float((det - 1).abs().max())) > SL_TOLERANCE:
        raise InputError(f"SL needs determinant 1; one is off by {worst:.3g}")
    return g


def polar_cartan(g: Tensor) -> tuple[Tensor, Tensor]:
    """g (..., n, n) = exp(X) R: X symmetric, R a rotation, float64. By the SVD of g; tr X = log det g. O(n³) each.

    An eigendecomposition of g gᵀ would square the condition number. InputError as `checked_elements`.
    """
    u, s, vh = torch.linalg.svd(checked_elements(g))
    return (u * s.log()[..., None, :]) @ u.mT, u @ vh


def split_det(g: Tensor) -> tuple[Tensor, Tensor]:
    """GL+ = R+ x SL: det(g)^(1/n) (...), and g over it (..., n, n)."""
    g = checked_elements(g)
    root = torch.linalg.det(g) ** (1 / g.shape[-1])
    return root, g / root[..., None, None]


def xi(A: Tensor) -> Tensor:
    """exp(symmetric part) exp(skew part) of A (..., n, n): onto GL+, where the plain exponential is not."""
    symmetric, skew = (A + A.mT) / 2, (A - A.mT) / 2
    return torch.linalg.matrix_exp(symmetric) @ torch.linalg.matrix_exp(skew)


def xi_inv(g: Tensor) -> Tensor:
    """X + log R of g (..., n, n), which `xi` takes back to g, float64."""
    X, R = polar_cartan(g)
    return X + rotation_log(R)


def rotation_log(R: Tensor) -> Tensor:
    """The skew logarithm (..., n, n) of rotations, angles in [-pi, pi]: closed for n = 2, 3, by Schur form above."""
    n = R.shape[-1]
    if n == 1:
        return torch.zeros_like(R)
    if n == 2:
        angle = torch.atan2(R[..., 1, 0] - R[..., 0, 1], R[..., 0, 0] + R[..., 1, 1])
        return angle[..., None, None] * R.new_tensor([[0.0, -1.0], [1.0, 0.0]])
    if n == 3:
        return _rodrigues_log(R)
    flat = R.reshape(-1, n, n).cpu()
    return torch.stack([_schur_log(one) for one in flat]).to(R).view(R.shape)


def _rodrigues_log(R: Tensor) -> Tensor:
    skew = (R - R.mT) / 2
    vector = torch.stack((skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]), -1)  # the axis times the sine
    sine = vector.norm(dim=-1)
    cosine = (R.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
    angle = torch.atan2(sine, cosine)
    series = 1 + angle**2 / 6 + 7 * angle**4 / 360
    factor = torch.where(angle < 1e-3, series, angle / sine.clamp_min(1e-300))
    plain = factor[..., None] * vector
    outer = ((R + R.mT) / 2 - cosine[..., None, None] * torch.eye(3).to(R)) / (1 - cosine)[..., None, None]
    column = outer.diagonal(dim1=-2, dim2=-1).argmax(-1)
    axis = torch.gather(outer, -1, column[..., None, None].expand(*outer.shape[:-1], 1))[..., 0]
    axis = axis / axis.norm(dim=-1, keepdim=True)
    axis = torch.where((axis * vector).sum(-1, keepdim=True) < 0, -axis, axis)
    w = torch.where((angle > math.pi - NEAR_HALF_TURN)[..., None], angle[..., None] * axis, plain)
    zero = torch.zeros_like(angle)
    rows = (zero, -w[..., 2], w[..., 1], w[..., 2], zero, -w[..., 0], -w[..., 1], w[..., 0], zero)
    return torch.stack(rows, -1).view(R.shape)


def _schur_log(R: Tensor) -> Tensor:
    """Of one rotation: a real Schur form of a normal matrix has rotations by an angle, 1 and pairs of -1."""
    n = len(R)
    T, Z = scipy.linalg.schur(R.numpy(), output="real")
    generator = torch.zeros(n, n, dtype=R.dtype)
    half_turns, i = [], 0
    while i < n:
        if i + 1 < n and abs(T[i + 1, i]) > 1e-12:
            angle = math.atan2(T[i + 1, i] - T[i, i + 1], T[i, i] + T[i + 1, i + 1])
            generator[i + 1, i], generator[i, i + 1] = angle, -angle
            i += 2
            continue
        if T[i, i] < 0:
            half_turns.append(i)
        i += 1
    for a, b in zip(half_turns[::2], half_turns[1::2], strict=True):
        generator[b, a], generator[a, b] = math.pi, -math.pi
    basis = torch.from_numpy(Z).to(R)
    return basis @ generator @ basis.T


def coordinates(A: Tensor, group: Group = "gl") -> Tensor:
    """Those of algebra elements (..., n, n) in a basis orthonormal for the trace: (..., n²), SL without the trace,
    n² - 1.

    Traceless diagonal, then (E_ij + E_ji)/√2, then (E_ji - E_ij)/√2 for i < j, then for GL the trace over √n.
    """
    n = A.shape[-1]
    i, j = torch.triu_indices(n, n, 1, device=A.device)
    diagonal = A.diagonal(dim1=-2, dim2=-1) @ _traceless(n).to(A)
    parts = [diagonal, (A[..., i, j] + A[..., j, i]) / 2**0.5, (A[..., j, i] - A[..., i, j]) / 2**0.5]
    if group == "gl":
        parts.append(A.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) / n**0.5)
    return torch.cat(parts, -1)


def _traceless(n: int) -> Tensor:
    """Orthonormal basis (n, n - 1) of vectors that sum to zero."""
    return torch.from_numpy(scipy.linalg.helmert(n)).T


def symmetric_from(coordinates: Tensor, n: int, group: Group) -> Tensor:
    """Symmetric matrices (N, n, n) from their coordinates: traceless diagonal, off-diagonal, for GL the trace."""
    i, j = torch.triu_indices(n, n, 1)
    Y = coordinates.new_zeros(len(coordinates), n, n)
    diagonal = coordinates[:, : n - 1] @ _traceless(n).to(coordinates).T
    if group == "gl":
        diagonal = diagonal + coordinates[:, -1:] / n**0.5
    Y.diagonal(dim1=1, dim2=2).copy_(diagonal)
    Y[:, i, j] = Y[:, j, i] = coordinates[:, n - 1 : n - 1 + len(i)] / 2**0.5
    return Y


def sample_group(
    N: int,
    n: int,
    group: Group = "gl",
    sigma: float = VARIANCE**0.5,
    rotation: Literal["equidistant", "haar"] = "equidistant",
    generator: torch.Generator | None = None,
) -> GroupSamples:
    """N elements g = exp(Y/2) R, float64: Y of normal orthonormal coordinates of deviation sigma, R a rotation.

    equidistant: N angles on the circle from a random first one (n = 2); haar: drawn from SO(n). The mean of
    weights f(g) estimates the integral of f against dY sinh-factor dR, with S = exp(Y) the invariant measure
    det(S)^(-(n+1)/2) dS, and with dR of mass 1: for GL+(2) pi/2 times it is |det g|⁻² dg. Means without weights
    are no integrals against the Haar measure, and no convolution with them is invariant. The measure of the whole
    group is infinite: the weights alone are heavy-tailed for every sigma, and only with a function that decays are
    they few or many, `effective_sample_size`.
    """
    choose("group", group, GROUPS)
    choose("rotation", rotation, ("equidistant", "haar"))
    if N < 1 or n < 2 or not sigma > 0:
        raise InputError(f"N must be at least 1, n at least 2 and sigma positive; got {N}, {n}, {sigma}")
    if rotation == "equidistant" and n != 2:
        raise InputError(f"equidistant rotations are those of the plane; use rotation 'haar' for n = {n}")
    generator = generator or torch.Generator().manual_seed(0)
    device = generator.device
    dimensions = n * (n + 1) // 2 - (group == "sl")
    draw = torch.randn(N, dimensions, dtype=torch.float64, device=device, generator=generator)
    values, vectors = torch.linalg.eigh(symmetric_from(sigma * draw, n, group))
    if rotation == "haar":
        R = haar_so(N, n, generator)
    else:
        first = torch.rand(1, dtype=torch.float64, device=device, generator=generator)
        angle = 2 * math.pi * (first + torch.arange(N, dtype=torch.float64, device=device)) / N
        R = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), -1).view(N, 2, 2)
    half = (values / 2).exp()[:, None, :]
    return GroupSamples(
        (vectors * half) @ vectors.mT @ R, R.mT @ (vectors / half) @ vectors.mT, _weights(draw, values, n, sigma)
    )


def _weights(draw: Tensor, values: Tensor, n: int, sigma: float) -> Tensor:
    """Haar over Gaussian density: draw (N, p) standard normal coordinates, values (N, n) eigenvalues of Y."""
    i, j = torch.triu_indices(n, n, 1)
    half = (values[:, i] - values[:, j]).abs() / 2
    sinh = torch.where(half > 1e-4, half.sinh() / half.clamp_min(1e-300), 1 + half**2 / 6).prod(1)
    log_density = -draw.square().sum(1) / 2 - draw.shape[1] * (math.log(sigma) + math.log(2 * math.pi) / 2)
    return sinh * 2 ** (-n * (n - 1) / 4) * (-log_density).exp()


def effective_sample_size(terms: Tensor) -> float:
    """(sum |t|)² / sum t² of the weighted values (..., N) of an integrand, the least over the leading axes.

    Below N / 100 it is warned of: a few samples carry the integral.
    """
    size = float((terms.abs().sum(-1) ** 2 / terms.square().sum(-1)).min())
    if size < terms.shape[-1] / 100:
        log.warning("group integral: effective sample size %.1f of %d; change sigma", size, terms.shape[-1])
    return size


def haar_convolution(
    F: Callable[[Tensor], Tensor], k: Callable[[Tensor], Tensor], g: Tensor, s: GroupSamples
) -> Tensor:
    """(F ⋆ k)(g) = integral of F(h) k(g⁻¹ h) dmu(h) at g (m, n, n), as the weighted mean over samples: (m,).

    F and k take elements (..., n, n) to values (...). Source: arXiv 2310.11366, the group convolution without
    positions.
    """
    terms = k(torch.linalg.inv(g)[:, None] @ s.g) * F(s.g) * s.weights
    effective_sample_size(terms)
    return terms.mean(1)


def lift(
    f: Callable[[Tensor], Tensor], k: Callable[[Tensor], Tensor], x: Tensor, g: Tensor, nodes: Tensor, weights: Tensor
) -> Tensor:
    """F(x, g) = |det g|⁻¹ integral of f(y) k(g⁻¹ (y - x)) dy by quadrature at positions x (m, n), elements g (m,
    n, n).

    nodes (q, n), weights (q,): the quadrature. Source: arXiv 2310.11366, the lifting layer.
    """
    offset = torch.linalg.solve(g, (nodes - x[:, None]).mT).mT
    return (f(nodes) * k(offset) * weights).sum(1) / torch.linalg.det(g).abs()
