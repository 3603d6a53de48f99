"""Points with orientations: what of a pair is invariant under rotations and translations, and grids on the sphere.

Source: arXiv 2310.02970, table 1; the fourth invariant of R³xS²: arXiv 2504.03299.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from llmcompress.backends.checks import choose, generator_for
from llmcompress.errors import InputError

Space = Literal["rn", "r2s1", "r3s2", "se3"]
Kind = Literal["repulsion", "icosahedron", "dodecahedron", "circle"]
SPACES = ("rn", "r2s1", "r3s2", "se3")
KINDS = ("repulsion", "icosahedron", "dodecahedron", "circle")
PLATONIC = {"icosahedron": 12, "dodecahedron": 20}
UNIT_TOLERANCE = 1e-4
REPULSION_STEPS = 100


def norm(d: Tensor) -> Tensor:
    """Length of the last axis, with a gradient at 0."""
    return (d.square().sum(-1) + 1e-12).sqrt()


def pair_invariants(
    pos_i: Tensor,
    ori_i: Tensor | None,
    pos_j: Tensor,
    ori_j: Tensor | None,
    space: Space = "r3s2",
    universal: bool = False,
) -> Tensor:
    """Invariants (..., k) of receivers i and senders j at positions (..., n) with orientations.

    rn: the distance. r2s1, orientations (..., 2): d·o_i, d·o_i^⊥, o_i·o_j. r3s2, orientations (..., 3): d·o_i,
    length of the rest of d, o_i·o_j; with `universal` also d·o_j and det[d, o_i, o_j], which separate all orbits
    (the last changes its sign under reflections). se3, rotations (..., 3, 3): R_iᵀ d and R_iᵀ R_j. InputError for
    orientations that are not of unit length, or positions that are not finite.
    """
    choose("space", space, SPACES)
    if not (torch.isfinite(pos_i).all() and torch.isfinite(pos_j).all()):
        raise InputError("positions are not finite")
    d = pos_j - pos_i
    if space == "rn":
        return norm(d)[..., None]
    if ori_i is None or ori_j is None:
        raise InputError(f"space '{space}' needs orientations")
    if space == "se3":
        local, relative = (ori_i.mT @ d[..., None])[..., 0], (ori_i.mT @ ori_j).flatten(-2)
        shape = torch.broadcast_shapes(local.shape[:-1], relative.shape[:-1])
        return torch.cat((local.expand(*shape, 3), relative.expand(*shape, 9)), -1)
    for ori in (ori_i, ori_j):
        check_unit(ori)
    if space == "r2s1":
        side = torch.stack((-ori_i[..., 1], ori_i[..., 0]), -1)
        return torch.stack(torch.broadcast_tensors(_dot(d, ori_i), _dot(d, side), _dot(ori_i, ori_j)), -1)
    along = _dot(d, ori_i)
    found = [along, norm(d - along[..., None] * ori_i), _dot(ori_i, ori_j)]
    if universal:
        found += [_dot(d, ori_j), _dot(d, torch.linalg.cross(*torch.broadcast_tensors(ori_i, ori_j)))]
    return torch.stack(torch.broadcast_tensors(*found), -1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def check_unit(ori: Tensor) -> None:
    """InputError unless the vectors on the last axis have length 1."""
    worst = float((ori.detach().norm(dim=-1) - 1).abs().max())
    if not worst <= UNIT_TOLERANCE:
        raise InputError(f"orientations must have unit length; one is off by {worst:.3g}")


def orientation_grid(n: int, kind: Kind = "repulsion", generator: torch.Generator | None = None) -> Tensor:
    """n unit vectors (n, 3), float64, spread over the sphere (circle: (n, 2) over the plane).

    repulsion: from a random start, steps down the sum of 1 / angle². icosahedron, dodecahedron: its vertices, n =
    12 or 20. InputError for n < 1 or a solid without n vertices. Source: arXiv 2310.02970 and its code.
    """
    choose("kind", kind, KINDS)
    if n < 1:
        raise InputError(f"a grid needs one orientation at least; got {n}")
    if kind == "circle":
        angle = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
        return torch.stack((angle.cos(), angle.sin()), -1)
    if kind in PLATONIC:
        if n != PLATONIC[kind]:
            raise InputError(f"the {kind} has {PLATONIC[kind]} vertices; got {n}")
        return _icosahedron() if kind == "icosahedron" else _dodecahedron()
    return _repelled(n, generator_for(generator))


def _icosahedron() -> Tensor:
    golden = (1 + 5**0.5) / 2
    base = [(0.0, a, b * golden) for a in (-1.0, 1.0) for b in (-1.0, 1.0)]
    points = torch.tensor([p[-k:] + p[:-k] for p in base for k in range(3)], dtype=torch.float64)
    return points / points.norm(dim=1, keepdim=True)


def _dodecahedron() -> Tensor:
    """In the position in which it has the symmetries of `_icosahedron`."""
    golden = (1 + 5**0.5) / 2
    cube = [(a, b, c) for a in (-1.0, 1.0) for b in (-1.0, 1.0) for c in (-1.0, 1.0)]
    base = [(0.0, a * golden, b / golden) for a in (-1.0, 1.0) for b in (-1.0, 1.0)]
    points = torch.tensor(cube + [p[-k:] + p[:-k] for p in base for k in range(3)], dtype=torch.float64)
    return points / points.norm(dim=1, keepdim=True)


def _repelled(n: int, generator: torch.Generator) -> Tensor:
    draw = torch.randn(n, 3, dtype=torch.float64, device=generator.device, generator=generator)
    points = draw / draw.norm(dim=1, keepdim=True)
    if n == 1:
        return points
    step = 0.1
    for _ in range(REPULSION_STEPS):
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            cosine = (points @ points.T).clamp(-1 + 1e-9, 1 - 1e-9)
            i, j = torch.triu_indices(n, n, 1, device=points.device)
            energy = ((cosine[i, j].acos() / math.pi) ** -2).sum()
            (gradient,) = torch.autograd.grad(energy, points)
        gradient = gradient - (gradient * points).sum(1, keepdim=True) * points
        longest = gradient.norm(dim=1).max().clamp_min(1e-12)
        points = (points - step * gradient / longest).detach()  # a step turns no point by more than `step`
        points = points / points.norm(dim=1, keepdim=True)
        step *= 0.97
    return points
