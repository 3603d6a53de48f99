"""Which block to update: partitions, and the greedy rules by the progress that they promise (arXiv 1712.08859)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.backends.checks import choose
from llmcompress.backends.regression.block_problems import Problem, prox
from llmcompress.errors import InputError

RULES = ("random", "cyclic", "lipschitz", "gs", "gsl", "gsd", "gsq", "mi", "prox")
THRESHOLDING_STEPS = 10


def partition(L: Tensor, size: int, how: str = "sort") -> list[Tensor]:
    """Fixed blocks of `size` coordinates (the last may be shorter): order; sort by L; avg, largest with smallest L."""
    choose("partition", how, ("order", "sort", "avg"))
    check_size(size, len(L))
    order = torch.arange(len(L), device=L.device) if how == "order" else torch.argsort(L, descending=True, stable=True)
    if how == "avg":
        half = (len(order) + 1) // 2
        mixed = torch.empty_like(order)
        mixed[::2], mixed[1::2] = order[:half], order[half:].flip(0)
        order = mixed
    return list(order.split(size))


def check_size(size: int, n: int) -> None:
    if not 1 <= size <= n:
        raise InputError(f"block_size must be between 1 and the {n} coordinates; got {size}")


class Bounds:
    """What rules need of a problem and its fixed blocks, computed once and only if asked for."""

    def __init__(self, problem: Problem, blocks: Sequence[Tensor] | None) -> None:
        self.problem, self.blocks = problem, blocks
        self._row_sums: Tensor | None = None
        self._largest: Tensor | None = None
        self._hessians: list[Tensor] | None = None
        self._inverses: Tensor | None = None
        self._spectral: float | None = None
        self.full: Tensor | None = None
        self.order: Tensor | None = None  # of the cyclic rule

    @property
    def row_sums(self) -> Tensor:
        """sum_j |H_ij|: a diagonal matrix of these is above H."""
        if self._row_sums is None:
            self._row_sums = self.matrix.abs().sum(1)
        return self._row_sums

    @property
    def matrix(self) -> Tensor:
        if self.full is None:
            self.full = self.problem.hess_bound()
        return self.full

    @property
    def spectral(self) -> float:
        if self._spectral is None:
            self._spectral = float(torch.linalg.matrix_norm(self.matrix, 2))
        return self._spectral

    @property
    def hessians(self) -> list[Tensor]:
        if self._hessians is None:
            self._hessians = [self.problem.hess_bound(block) for block in self.blocks or ()]
        return self._hessians

    @property
    def padded(self) -> Tensor:
        """Fixed blocks as rows of equal length, filled up with the index behind the last coordinate."""
        return torch.nn.utils.rnn.pad_sequence(list(self.blocks or ()), True, self.problem.size)

    @property
    def inverses(self) -> Tensor:
        """Pseudo-inverses of the fixed blocks' bounds, filled up with zeros."""
        if self._inverses is None:
            size = max(len(H) for H in self.hessians)
            self._inverses = torch.zeros(len(self.hessians), size, size, dtype=torch.float64)
            for inverse, H in zip(self._inverses, self.hessians, strict=True):
                inverse[: len(H), : len(H)] = torch.linalg.pinv(H, hermitian=True)
            self._inverses = self._inverses.to(self.hessians[0])
        return self._inverses

    @property
    def largest(self) -> Tensor:
        """lambda_max of every fixed block."""
        if self._largest is None:
            self._largest = torch.stack([torch.linalg.eigvalsh(H)[-1] for H in self.hessians])
        return self._largest


def select_block(
    problem: Problem, x: Tensor, g: Tensor, rule: str, size: int, blocks: Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None, bounds: Bounds | None = None,
) -> Tensor:  # fmt: skip
    """Coordinates of the block that the rule chooses, among fixed `blocks` or of any `size` if None.

    x, g (p,): the point and the smooth part's gradient there. gs: ||g_b||; gsl: ||g_b||² / L_b; gsd: sum g_i² / L_i;
    gsq: g_bᵀ H_b⁻¹ g_b; mi: the largest true decrease (fixed blocks); prox: the decrease of the model with diagonal H.
    Of variable blocks gsl weighs by the rows' absolute sums, and gsq is a search by hard thresholding.
    """
    choose("rule", rule, RULES)
    bounds = bounds or Bounds(problem, blocks)
    if rule in ("random", "cyclic", "lipschitz"):
        return _blind(problem, rule, size, blocks, generator, bounds)
    usable = torch.where(problem.lipschitz > 0, problem.lipschitz, torch.inf)  # a zero column moves nothing
    if rule == "prox":
        step = 1 / usable
        d = prox(problem, x - step * g, step) - x
        d = torch.where(problem.lipschitz > 0, d, 0)
        gain = -(g * d + problem.lipschitz * d.square() / 2 + problem.l1 * ((x + d).abs() - x.abs()))
        return _best(gain, size, blocks)
    if blocks is None:
        return _variable(g, rule, size, usable, bounds)
    if rule in ("gs", "gsd"):
        return _best(g.square() / (1 if rule == "gs" else usable), size, blocks)
    if rule == "gsl":
        norms = torch.stack([g[block].square().sum() for block in blocks])
        return blocks[int((norms / bounds.largest.clamp_min(1e-300)).argmax())]
    if rule == "mi":
        from llmcompress.backends.regression.block_updates import update_block

        trials = [problem.value(update_block(problem, x, g, block, "matrix")) for block in blocks]
        return blocks[min(range(len(trials)), key=trials.__getitem__)]
    padded = torch.cat((g, g.new_zeros(1)))[bounds.padded]
    return blocks[int(torch.einsum("bi,bij,bj->b", padded, bounds.inverses, padded).argmax())]


def quadratic_gain(H: Tensor, g: Tensor) -> float:
    """g ᵀ H⁻¹ g, twice what the block's exact update gains; by least squares where H is singular."""
    return float(g @ solve_block(H, g))


def solve_block(H: Tensor, g: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(H)
    if failed or factor.diagonal().min() <= 1e-7 * factor.diagonal().max():
        return torch.linalg.lstsq(H, g[:, None], driver="gelsd" if H.device.type == "cpu" else None).solution[:, 0]
    return torch.cholesky_solve(g[:, None], factor)[:, 0]


def _best(scores: Tensor, size: int, blocks: Sequence[Tensor] | None) -> Tensor:
    if blocks is None:
        return scores.topk(size).indices
    sums = torch.stack([scores[block].sum() for block in blocks])
    return blocks[int(sums.argmax())]


def _blind(
    problem: Problem, rule: str, size: int, blocks: Sequence[Tensor] | None, generator: torch.Generator | None,
    bounds: Bounds,
) -> Tensor:  # fmt: skip
    n, device = problem.size, problem.lipschitz.device
    if rule == "lipschitz":
        weights = bounds.largest if blocks is not None else problem.lipschitz
        drawn = torch.multinomial(weights.clamp_min(1e-300), 1 if blocks is not None else size, generator=generator)
        return blocks[int(drawn[0])] if blocks is not None else drawn
    if rule == "random":
        order = torch.randperm(n if blocks is None else len(blocks), generator=generator, device=device)
        return order[:size] if blocks is None else blocks[int(order[0])]
    if bounds.order is None or not len(bounds.order):  # a new permutation after every pass
        bounds.order = torch.randperm(n if blocks is None else len(blocks), generator=generator, device=device)
    taken, bounds.order = bounds.order[: size if blocks is None else 1], bounds.order[size if blocks is None else 1 :]
    return taken if blocks is None else blocks[int(taken[0])]


def _variable(g: Tensor, rule: str, size: int, usable: Tensor, bounds: Bounds) -> Tensor:
    if rule == "gs":
        return g.abs().topk(size).indices
    if rule == "gsl":
        return (g.square() / torch.where(bounds.row_sums > 0, bounds.row_sums, torch.inf)).topk(size).indices
    if rule == "mi":
        raise InputError("rule mi needs fixed blocks")
    block = (g.square() / usable).topk(size).indices
    if rule == "gsd":
        return block
    best, gain = block, quadratic_gain(bounds.matrix[block][:, block], g[block])
    d = torch.zeros_like(g)
    d[block] = -g[block] / usable[block]
    for _ in range(THRESHOLDING_STEPS):
        moved = d - (g + bounds.matrix @ d) / bounds.spectral
        block = moved.abs().topk(size).indices
        d = torch.zeros_like(g)
        d[block] = moved[block]
        found = quadratic_gain(bounds.matrix[block][:, block], g[block])
        if found > gain:
            best, gain = block, found
    return best
