"""Oja's rule without decay for many rates at once."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.errors import InputError

BLOCK = 16  # rows applied together, by their Gram


def default_etas() -> list[float]:
    """Rates 2^j that cover rows of any scale from 1e-9 to 1e6."""
    return [2.0**j for j in range(-30, 21)]


class Oja:
    """v <- v + eta a <a, v>, for rates etas (k,) from one start (d,): vectors (k, d) kept unit, their growth in logs.

    A factor of a row is 1 + eta ||a||² at most, so vectors are renormalised after every row: nothing overflows.
    InputError unless the rates are positive and finite.
    """

    def __init__(self, etas: Tensor, start: Tensor) -> None:
        if not len(etas) or not (torch.isfinite(etas) & (etas > 0)).all():
            raise InputError("etas must be positive and finite")
        self.etas = etas.sort().values
        self.vectors = (start / start.norm()).repeat(len(etas), 1)
        self.growth = torch.zeros_like(self.etas)

    def update(self, rows: Tensor) -> None:
        """Rows (b, d), one after another.

        Within a block of rows the products <a_i, v> follow from those with the block's start and the rows' Gram, so
        that d enters by matrix products alone: O(k b d) for b rows and k rates.
        """
        for block in rows.split(BLOCK):
            gram = block @ block.T
            products = self.vectors @ block.T  # (k, b), of the vectors at the block's start
            scale = torch.ones_like(self.etas)  # the start's share of the vector, as it is renormalised
            coefficients = torch.zeros_like(products)
            log_scale = torch.zeros_like(self.etas)
            for i in range(len(block)):
                inner = scale * products[:, i] + coefficients @ gram[:, i]
                step = self.etas * inner
                length = (1 + 2 * step * inner + step.square() * gram[i, i]).sqrt()
                coefficients[:, i] = step
                coefficients /= length[:, None]
                scale = scale / length
                log_scale = log_scale + length.log()
            vectors = scale[:, None] * self.vectors + coefficients @ block
            drift = vectors.norm(dim=1)
            self.vectors = vectors / drift[:, None]
            self.growth += log_scale + drift.log()

    def smallest_growing(self, threshold: float) -> tuple[Tensor, float | None]:
        """The vector of the smallest rate whose log growth exceeds the threshold, and the rate; the largest's, None."""
        grown = (self.growth > threshold).nonzero()[:, 0]
        if not len(grown):
            return self.vectors[-1], None
        return self.vectors[grown[0]], float(self.etas[grown[0]])

    def growth_of(self, rate: float | None) -> float:
        return float(self.growth[self.etas == rate][0]) if rate is not None else 0.0
