"""Kronecker products without forming them, the rivals of Kronecker SBL, and a channel that has its structure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.errors import InputError


def kron_matvec(mats: Sequence[Tensor], x: Tensor) -> Tensor:
    """(H_1 kron ... kron H_I) x by mode products, C order; x (N,) or (B, N), H_i (M_i, N_i) or (B, M_i, N_i)."""
    rows = x[None] if x.ndim == 1 else x
    tensor = rows.reshape(len(rows), *[H.shape[-1] for H in mats])
    for mode, H in enumerate(mats, 1):
        moved = tensor.movedim(mode, 1)
        product = H.to(moved.dtype) @ moved.reshape(*moved.shape[:2], -1)
        tensor = product.reshape(*product.shape[:2], *moved.shape[2:]).movedim(1, mode)
    result = tensor.flatten(1)
    return result[0] if x.ndim == 1 else result


def kron_vectors(vectors: Sequence[Tensor]) -> Tensor:
    """Kronecker product of rows: (B, n_i) each -> (B, prod n_i)."""
    product = vectors[0]
    for vector in vectors[1:]:
        product = (product[:, :, None] * vector[:, None, :]).flatten(1)
    return product


def nearest_kronecker(D: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The two matrices of the given shapes whose Kronecker product is nearest to D, columns scaled to unit length.

    Source: Van Loan and Pitsianis, 1993: the leading singular pair of the rearranged D.
    """
    (m1, n1), (m2, n2) = shapes
    if (m1 * m2, n1 * n2) != tuple(D.shape):
        raise InputError(f"factors {m1}x{n1}, {m2}x{n2} do not multiply to {tuple(D.shape)}")
    blocks = D.reshape(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)
    u, _, vh = torch.linalg.svd(blocks, full_matrices=False)
    mats = [u[:, 0].reshape(m1, n1), vh[0].reshape(m2, n2)]
    return [normalised_columns(mat) for mat in mats]


def normalised_columns(mat: Tensor) -> Tensor:
    return mat / mat.norm(dim=0).clamp_min(torch.finfo(mat.dtype).tiny)


def kron_omp(mats: Sequence[Tensor], y: Tensor, steps: int) -> Tensor:
    """Greedy baseline: each step adds the best multi-index to the modes' index sets, then least squares on their
    product; x (N,) for y (M,).
    """
    sizes = [H.shape[1] for H in mats]
    adjoint = [H.mH for H in mats]
    chosen: list[list[int]] = [[] for _ in mats]
    x, residual = y.new_zeros(math.prod(sizes)), y
    for _ in range(steps):
        flat = int(kron_matvec(adjoint, residual).abs().argmax())
        for mode in reversed(range(len(mats))):
            flat, index = divmod(flat, sizes[mode])
            if index not in chosen[mode] and len(chosen[mode]) < len(mats[mode]):
                chosen[mode].append(index)
        part = [H[:, index] for H, index in zip(mats, chosen, strict=True)]
        values = kron_matvec([torch.linalg.pinv(H) for H in part], y)
        residual = y - kron_matvec(part, values)
        tensor = y.new_zeros(sizes)
        grid = torch.meshgrid(*[torch.tensor(index) for index in chosen], indexing="ij")
        tensor[grid] = values.reshape([len(index) for index in chosen])
        x = tensor.flatten()
    return x


def classic_sbl(H: Tensor, y: Tensor, noise_var: float, iterations: int = 40) -> Tensor:
    """The baseline without structure: EM on one variance a coefficient, an M x M solve each; posterior mean (N,)."""
    gamma = torch.ones(H.shape[1], dtype=torch.float64, device=H.device)
    mean = y.new_zeros(H.shape[1])
    for _ in range(iterations + 1):
        scaled = gamma.to(H.dtype) * H
        eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
        lower = torch.linalg.cholesky(scaled @ H.mH + noise_var * eye)
        half = torch.linalg.solve_triangular(lower, torch.cat((scaled, y[:, None]), dim=1), upper=False)
        mean = half[:, :-1].mH @ half[:, -1]
        variance = gamma - half[:, :-1].abs().square().sum(0)
        gamma = variance.clamp_min(0) + mean.abs().square()
    return mean


def irs_channel(
    n_ms: int = 6, n_bs: int = 12, n_irs: int = 64, R: int = 12, pilots: int = 3, patterns: int = 5, spread: int = 3,
    snr_db: float = 15.0, *, generator: torch.Generator,
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """A cascaded uplink through a reflecting surface: factors (patterns, pilots, antennas), y (M,), truth (R³,).

    Angles on a grid of R; the surface's angle differences repeat, so that R of them suffice. One angle at the mobile,
    `spread` neighbouring ones at the surface and at the base station. complex128. Source: arXiv 2307.14719.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.complex128)

    def steering(count: int) -> Tensor:
        u = -1 + 2 * torch.arange(R, dtype=torch.float64) / R
        phase = math.pi * torch.arange(count, dtype=torch.float64)[:, None] * u
        return torch.polar(torch.full_like(phase, count**-0.5), phase)

    A_irs, A_ms, A_bs = steering(n_irs), steering(n_ms), steering(n_bs)
    theta = torch.polar(torch.ones(n_irs, patterns, dtype=torch.float64), 2 * math.pi * uniform(n_irs, patterns))
    X_p = torch.polar(torch.ones(n_ms, pilots, dtype=torch.float64), 2 * math.pi * uniform(n_ms, pilots))
    differences = A_irs[:, :1] * A_irs.conj()
    mats = [theta.T @ differences, X_p.T @ A_ms.conj(), A_bs]
    parts = []
    for width in (spread, 1, spread):
        start = int(uniform(1) * (R - width + 1))
        part = torch.zeros(R, dtype=torch.complex128)
        part[start : start + width] = normal(width)
        parts.append(part[None])
    truth = kron_vectors(parts)[0]
    clean = kron_matvec(mats, truth)
    noise = normal(len(clean))
    return mats, clean + noise * (clean.norm() / noise.norm() * 10 ** (-snr_db / 20)), truth
