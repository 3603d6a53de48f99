"""Orthogonal maps and contractions as products of generalised Householder factors I - b v vᵀ (arXiv 2411.12537)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.errors import InputError

Factors = tuple[Tensor, Tensor]  # betas (m,), unit vectors (m, n); the first factor stands leftmost


def householder_product(betas: Tensor, vs: Tensor) -> Tensor:
    """(I - b_1 v_1 v_1ᵀ) ... (I - b_m v_m v_mᵀ), (n, n): betas (m,), vs (m, n)."""
    if betas.ndim != 1 or vs.ndim != 2 or len(betas) != len(vs):
        raise InputError(f"betas must be (m,) and vs (m, n); got {tuple(betas.shape)}, {tuple(vs.shape)}")
    product = torch.eye(vs.shape[1], dtype=vs.dtype, device=vs.device)
    for beta, v in zip(betas, vs, strict=True):
        product = product - beta * torch.outer(product @ v, v)
    return product


def rotation_as_reflections(theta: float) -> Factors:
    """Two reflections whose product turns the plane by theta: their vectors are theta / 2 apart."""
    half = theta / 2
    vectors = [[0.0, 1.0], [math.sin(half), math.cos(half)]]
    return torch.full((2,), 2.0, dtype=torch.float64), torch.tensor(vectors, dtype=torch.float64)


def permutation_as_reflections(p: Sequence[int]) -> Factors:
    """At most n - 1 reflections (e_i - e_j) / sqrt 2 whose product moves e_i to e_p[i].

    InputError unless p is a permutation of 0..n-1.
    """
    n, left = len(p), list(p)
    if sorted(left) != list(range(n)):
        raise InputError(f"p must be a permutation of 0..{n - 1}; got {list(p)}")
    vectors = []
    for i in range(n):
        while left[i] != i:  # P = (i p_i) P', where P' leaves p_i in place
            j = left[i]
            v = torch.zeros(n, dtype=torch.float64)
            v[i], v[j] = math.sqrt(0.5), -math.sqrt(0.5)
            vectors.append(v)
            left = [{i: j, j: i}.get(k, k) for k in left]
    vs = torch.stack(vectors) if vectors else torch.zeros(0, n, dtype=torch.float64)
    return torch.full((len(vectors),), 2.0, dtype=torch.float64), vs


def orthogonal_as_reflections(Q: Tensor) -> Factors:
    """At most n reflections whose product is Q (n, n), orthogonal."""
    n, rest, vectors = len(Q), Q.double().clone(), []
    for i in range(n):
        v = rest[:, i].clone()
        v[i] -= 1
        v[:i] = 0  # rounding there would stir the columns that are done
        if float(v.norm()) > 1e-14:
            v = v / v.norm()
            rest = rest - 2 * torch.outer(v, v @ rest)
            vectors.append(v)
    vs = torch.stack(vectors) if vectors else rest.new_zeros(0, n)
    return rest.new_full((len(vectors),), 2.0), vs


def contraction_as_gh(M: Tensor) -> Factors:
    """At most 3 n factors with betas in [0, 2] whose product is M (n, n), of norm 1 at most.

    Reflections of U, I - (1 - s_i) e_i e_iᵀ, reflections of Vᵀ. InputError unless M is square and a contraction.
    """
    if M.ndim != 2 or M.shape[0] != M.shape[1] or not torch.isfinite(M).all():
        raise InputError(f"M must be square and finite; got {tuple(M.shape)}")
    U, s, Vh = torch.linalg.svd(M.double())
    if float(s[0]) > 1 + 1e-9:
        raise InputError(f"M must be a contraction; its norm is {float(s[0]):.6g}")
    left, right = orthogonal_as_reflections(U), orthogonal_as_reflections(Vh)
    betas = torch.cat((left[0], (1 - s).clamp_min(0), right[0]))
    return betas, torch.cat((left[1], torch.eye(len(M), dtype=torch.float64, device=M.device), right[1]))
