"""What lies between two models: the loss barrier, their distance, and how their singular vectors meet.

Source: Ito, Yamada, Kumagai, arXiv 2402.04051 (barrier, R metric).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.backends.merging.permutations import State, check_states, squared_distance
from llmcompress.backends.merging.weight_matching import merge
from llmcompress.errors import InputError

POINTS = 11


@dataclass(frozen=True)
class Barrier:
    """Losses along the path from a (lam 0) to b (lam 1), and the largest excess over the straight line between them."""

    lams: list[float]
    losses: list[float]

    @property
    def height(self) -> float:
        first, last = self.losses[0], self.losses[-1]
        line = [(1 - lam) * first + lam * last for lam in self.lams]
        return max(loss - on_line for loss, on_line in zip(self.losses, line, strict=True))


def barrier(a: State, b: State, loss: Callable[[dict[str, Tensor]], float], points: int = POINTS) -> Barrier:
    """The loss of (1 - lam) a + lam b at evenly spaced lam. InputError for fewer than 3 points."""
    return barrier_along(lambda lam: loss(merge(a, b, lam)), points)


def barrier_along(loss: Callable[[float], float], points: int = POINTS) -> Barrier:
    """As `barrier`, of a loss that is given at any lam."""
    if points < 3:
        raise InputError(f"a barrier needs at least 3 points of the path; got {points}")
    lams = torch.linspace(0, 1, points, dtype=torch.float64).tolist()
    return Barrier(lams, [loss(lam) for lam in lams])


def l2_ratio(a: State, b: State, matched: State) -> float:
    """Distance of a to the matched model over its distance to b; 1 where both are equal to a."""
    check_states([a, b, matched])
    before, after = (sum(squared_distance(a[name], other[name]) for name in a) for other in (b, matched))
    return (after / before) ** 0.5 if before else 1.0


@dataclass(frozen=True)
class SingularVectors:
    """Of a matrix (m, n): left (m, p), right (p, n), values (p,) descending, float64."""

    left: Tensor
    right: Tensor
    values: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> SingularVectors:
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        return cls(u, vh, s)

    def kept(self, gamma: float) -> int:
        """How many singular values are at least gamma of the largest. InputError unless 0 <= gamma <= 1."""
        if not 0 <= gamma <= 1:
            raise InputError(f"gamma must be in [0, 1], a share of the largest singular value; got {gamma}")
        return int((self.values >= gamma * self.values[0]).sum())

    def meets(self, other: SingularVectors, gamma: float) -> tuple[float, float]:
        """sum_ij (u_i . u'_j)(v_i . v'_j) over the k and k' kept vectors, and sqrt(k k'), which it cannot exceed."""
        k, l = self.kept(gamma), other.kept(gamma)
        left, right = self.left[:, :k].T @ other.left[:, :l], self.right[:k] @ other.right[:l].T
        return float((left * right).sum()), (k * l) ** 0.5


def r_metric(a: State, b: State, names: Sequence[str], gamma: float = 0.0) -> float:
    """How far the singular vectors of two models' matrices agree: 1 for equal models, about 0 for unrelated ones.

    sum over layers of sum_ij (u_i . u'_j)(v_i . v'_j), over sum of sqrt(k k'), with the k and k' vectors whose
    singular values are at least gamma of the layer's largest; convolutions as (channels, the rest). float64.
    Source: arXiv 2402.04051, section 4 (the normaliser is this project's, so that R(a, a) = 1).
    """
    pairs = [
        SingularVectors.of(a[name].flatten(1)).meets(SingularVectors.of(b[name].flatten(1)), gamma) for name in names
    ]
    return sum(met for met, _ in pairs) / sum(bound for _, bound in pairs)
