"""The balanced gauge of a pair of low-rank factors, and rotations within it.

A pair A B is equal to (A G)(G⁻¹ B) for every invertible G. The sum of the squared norms is least, twice the
nuclear norm of A B, exactly where the Grams of both factors agree, which fixes G up to a rotation. The rotation is
free: an orthogonal matrix with flat columns spreads outliers over all r coordinates, which is what narrow storage
needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import scipy.linalg
import torch
from torch import Tensor

from llmcompress.backends.checks import checked_matrix, choose, generator_for
from llmcompress.errors import InputError

Rotation = Literal["hadamard", "random", "svd", "symmetric"]
ROTATIONS = ("hadamard", "random", "svd", "symmetric")


@dataclass(frozen=True)
class GaugeResult:
    """A (m, r) and B (r, k) of the same product with equal Grams, and G (r, r): A = A_given G, B = G⁻¹ B_given."""

    A: Tensor
    B: Tensor
    G: Tensor


def balanced_gauge(A: Tensor, B: Tensor, rotation: Rotation = "hadamard", seed: int = 0) -> GaugeResult:
    """Factors of the same product with AᵀA = BBᵀ, float64.

    A (m, r), B (r, k). rotation: `svd`, the scaled singular vectors of the product (canonical up to signs);
    `symmetric`, the nearest to the given factors (G symmetric positive definite); `random`, a Haar rotation of
    those; `hadamard`, two overlapping Hadamard blocks with random signs, of the largest power of two in r. det G >
    0. O((m + k) r² + r³). InputError for shapes that do not fit, r > min(m, k), values that are not finite, or a
    product of rank below r. Source: the polar factorisation G = S^½ R of arXiv 2310.11366, with S the geometric
    mean (AᵀA)⁻¹ # (BBᵀ).
    """
    choose("rotation", rotation, ROTATIONS)
    A, B = checked_matrix(A, "A"), checked_matrix(B, "B")
    (m, r), (inner, k) = A.shape, B.shape
    if r != inner:
        raise InputError(f"the inner dimensions differ: A {tuple(A.shape)}, B {tuple(B.shape)}")
    if r > min(m, k):
        raise InputError(f"rank {r} exceeds min(m, k) = {min(m, k)}")
    left, upper_a = torch.linalg.qr(A)
    right, upper_b = torch.linalg.qr(B.T)
    u, s, vh = torch.linalg.svd(upper_a @ upper_b.T)
    tolerance = max(m, k) * torch.finfo(s.dtype).eps * float(s[0])
    if float(s[-1]) <= tolerance:
        raise InputError(f"gauge undefined: singular value {float(s[-1]):.3g} below tolerance {tolerance:.3g}")
    root = s.sqrt()
    G = upper_b.T @ vh.T / root
    if torch.linalg.slogdet(G).sign < 0:  # the last pair of singular vectors changes its sign
        G[:, -1], u[:, -1], vh[-1] = -G[:, -1], -u[:, -1], -vh[-1]
    R = _rotation(G, rotation, seed)
    return GaugeResult(left @ (u * root) @ R, R.T @ (root[:, None] * vh) @ right.T, G @ R)


def _rotation(G: Tensor, rotation: Rotation, seed: int) -> Tensor:
    r = len(G)
    if rotation == "svd":
        return torch.eye(r, dtype=G.dtype, device=G.device)
    if rotation == "symmetric":
        u, _, vh = torch.linalg.svd(G)
        return vh.T @ u.T
    generator = generator_for(seed, G.device)
    if rotation == "random":
        return haar_so(1, r, generator)[0].to(G)
    return signed_hadamard(r, generator).to(G)


def haar_so(N: int, n: int, generator: torch.Generator) -> Tensor:
    """N rotations (N, n, n) from the Haar measure of SO(n), float64: QR of Gaussians, signs fixed."""
    draw = torch.randn(N, n, n, dtype=torch.float64, device=generator.device, generator=generator)
    q, upper = torch.linalg.qr(draw)
    q = q * upper.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    q[:, :, 0] *= torch.linalg.det(q).sign()[:, None]
    return q


def signed_hadamard(r: int, generator: torch.Generator) -> Tensor:
    """A rotation (r, r), float64, without large entries: random signs, a Hadamard block on the first 2^p coordinates,
    and where that is not all of them signs again and one on the last 2^p, 2^p <= r < 2^(p + 1)."""
    order = 1 << (r.bit_length() - 1)
    block = torch.from_numpy(scipy.linalg.hadamard(order)).double().to(generator.device) / order**0.5
    R = torch.eye(r, dtype=torch.float64, device=generator.device)
    for first in {0, r - order}:
        signs = torch.randint(0, 2, (r,), device=generator.device, generator=generator).double() * 2 - 1
        R = R * signs
        R[:, first : first + order] = R[:, first : first + order] @ block
    R[:, 0] *= torch.linalg.slogdet(R).sign
    return R
