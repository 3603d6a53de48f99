"""Greedy block coordinate descent: which block, which update, when the support is found (arXiv 1712.08859)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from llmcompress.backends.checks import choose, generator_for
from llmcompress.backends.ports import Solution, Subject
from llmcompress.backends.regression.block_problems import (
    GramLeastSquares,
    LeastSquares,
    Logistic,
    Problem,
    Softmax,
    SparseQuadratic,
    prox,
)
from llmcompress.backends.regression.block_rules import RULES, Bounds, check_size, partition, select_block
from llmcompress.backends.regression.block_updates import UPDATES, update_block
from llmcompress.backends.regression.forests import block_update, forest_solve, greedy_forest, label_problem
from llmcompress.backends.report import Curve, Report
from llmcompress.errors import InputError, RunError

__all__ = [
    "BCDResult",
    "BlockCoordinate",
    "BlockCoordinateOptions",
    "GramLeastSquares",
    "LeastSquares",
    "Logistic",
    "Softmax",
    "SparseQuadratic",
    "bcd",
    "forest_solve",
    "greedy_forest",
    "label_propagation",
    "partition",
    "select_block",
    "solve_gram",
    "update_block",
]

ROUNDING = 1e-13
COLUMN_RULES = ("gs", "gsd", "random", "cyclic")


class BlockCoordinateOptions(BaseModel, extra="forbid"):
    rule: Literal["gs", "gsd", "random", "cyclic"] = Field(default="gsd", description="which coordinates a step takes")
    update: Literal["matrix"] = Field(default="matrix", description="a block is solved exactly")
    block_size: int = Field(default=32, ge=1, description="coordinates a step")
    max_iter: int = Field(default=1000, ge=1, description="steps at most")
    tol: float = Field(default=1e-8, gt=0, lt=1, description="gradient over its start at which a column stops")


@dataclass(frozen=True)
class BCDResult:
    """x (p,); fun, the objective; history of it, start included; support_history: non-zeros after every step.

    converged: whether the gradient (the proximal step) fell below the tolerance; active_set_iter: the last step that
    changed which coordinates are zero.
    """

    x: Tensor
    fun: float
    history: list[float]
    support_history: list[int]
    n_iter: int
    converged: bool
    active_set_iter: int


def bcd(
    problem: Problem, x0: Tensor | None = None, rule: str = "gsq", update: str = "matrix",
    blocks: str | Sequence[Tensor] = "variable", block_size: int = 32, max_iter: int = 1000, tol: float = 1e-10,
    generator: torch.Generator | None = None,
) -> BCDResult:  # fmt: skip
    """Block coordinate descent from x0 (zero if None); the objective never rises.

    blocks: "variable", a partition ("order", "sort", "avg"), "forest" (SparseQuadratic: greedy forests by the rule's
    scores, gs, gsl or random), or blocks of one's own, visited by the rule. tol: of the gradient's norm over its start.
    A step costs a gradient and O(|b|³), forests O(|b|). InputError for unknown names and bad sizes.
    """
    choose("rule", rule, RULES)
    choose("update", update, UPDATES)
    check_size(block_size, problem.size)
    x = torch.zeros(problem.size, dtype=torch.float64) if x0 is None else x0.double().clone()
    generator = generator or generator_for(0)
    choose_block = _chooser(problem, rule, blocks, block_size, generator)
    estimates = torch.ones_like(x)
    history, support, changed = [problem.value(x)], [int((x != 0).sum())], 0
    start = stationarity(problem, x, problem.grad(x))
    converged, step = start == 0, 0
    while step < max_iter and not converged:
        step += 1
        g = problem.grad(x)
        block = choose_block(x, g)
        if isinstance(problem, SparseQuadratic) and blocks == "forest":
            moved = x.clone()
            moved[block] += block_update(problem, g, block)
        else:
            moved = update_block(problem, x, g, block, update, estimates)
        value = problem.value(moved)
        if value > history[-1] + ROUNDING * max(abs(history[-1]), abs(history[0])):
            raise RunError(f"the objective rose from {history[-1]:.6g} to {value:.6g} at step {step}")
        if ((moved != 0) != (x != 0)).any():
            changed = step
        x = moved
        history.append(min(value, history[-1]))  # above it by rounding alone
        support.append(int((x != 0).sum()))
        converged = stationarity(problem, x, problem.grad(x)) <= tol * start
    return BCDResult(x, history[-1], history, support, step, bool(converged), changed)


def stationarity(problem: Problem, x: Tensor, g: Tensor) -> float:
    """||prox(x - g / L) - x|| in units of the gradient: the gradient's norm where there is no penalty."""
    usable = problem.lipschitz > 0
    step = 1 / torch.where(usable, problem.lipschitz, 1)
    return float(torch.where(usable, (x - prox(problem, x - step * g, step)) / step, 0).norm())


def _chooser(
    problem: Problem, rule: str, blocks: str | Sequence[Tensor], size: int, generator: torch.Generator
) -> Callable[[Tensor, Tensor], Tensor]:
    if blocks == "forest":
        return _forest_chooser(problem, rule, generator)
    if isinstance(blocks, str):
        choose("blocks", blocks, ("variable", "order", "sort", "avg", "forest"))
        fixed = None if blocks == "variable" else partition(problem.lipschitz, size, blocks)
    else:
        fixed = [block.long() for block in blocks]
    bounds = Bounds(problem, fixed)
    return lambda x, g: select_block(problem, x, g, rule, size, fixed, generator, bounds)


def _forest_chooser(problem: Problem, rule: str, generator: torch.Generator) -> Callable[[Tensor, Tensor], Tensor]:
    if not isinstance(problem, SparseQuadratic):
        raise InputError("forest blocks need a SparseQuadratic")
    if rule not in ("gs", "gsl", "random"):
        raise InputError(f"forest blocks are ordered by gs, gsl or random; got {rule}")
    root = problem.lipschitz.sqrt()

    def chosen(x: Tensor, g: Tensor) -> Tensor:
        if rule == "random":
            order = torch.randperm(len(g), generator=generator)
        else:
            order = (g.abs() / (1 if rule == "gs" else root)).argsort(descending=True)
        return greedy_forest(order, problem.H)

    return chosen


def label_propagation(
    W: Any, labels: Tensor, labelled: Tensor, max_iter: int = 1000, tol: float = 1e-8
) -> tuple[Tensor, BCDResult]:
    """Values (n,) of all vertices that vary least along the edges, given `labels` (s,) at the vertices `labelled` (s,).

    Greedy forest updates. W (n, n): symmetric sparse weights, not negative. InputError if a component has no label.
    """
    problem, free = label_problem(W, labels, labelled)
    result = bcd(problem, rule="gsl", blocks="forest", block_size=1, max_iter=max_iter, tol=tol)
    values = torch.zeros(W.shape[0], dtype=torch.float64)
    values[labelled], values[free] = labels.double(), result.x
    return values, result


# --- many columns from one Gram --------------------------------------------------------------------------------------


def solve_gram(
    problem: GramLeastSquares, rule: str = "gsd", block_size: int = 32, max_iter: int = 1000, tol: float = 1e-8,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, list[float], bool]:  # fmt: skip
    """W (p, k), the summed objective after every step, and whether every column's gradient fell to `tol` of its start.

    Every column chooses its own block of `block_size` coordinates within its mask and solves it exactly, all at once:
    O(k |b|³ + k p |b|) a step.
    """
    choose("rule", rule, COLUMN_RULES)
    check_size(block_size, problem.size)
    generator = generator or generator_for(0, problem.G.device)
    G, mask = problem.G, problem.mask & (problem.lipschitz > 0)[:, None]
    W = torch.zeros_like(problem.C)
    gradient = torch.where(mask, -problem.C, 0)
    full = -problem.C.clone()
    start = gradient.norm(dim=0)
    history = [0.0]
    turn = _Turns(mask, block_size, generator)
    for _ in range(max_iter):
        block, inside = turn.next(gradient, problem.lipschitz, rule)
        H = G[block[:, :, None], block[:, None, :]]
        both = inside[:, :, None] & inside[:, None, :]
        H = torch.where(both, H, torch.eye(block.shape[1], dtype=G.dtype, device=G.device))
        g = torch.where(inside, full.T.gather(1, block), 0)
        step = -_solve_many(H, g)
        W.T.scatter_add_(1, block, torch.where(inside, step, 0))
        full += torch.einsum("kbp,kb->pk", G[block], torch.where(inside, step, 0))
        gradient = torch.where(mask, full, 0)
        history.append(float((W * (full - problem.C)).sum()) / 2)
        if (gradient.norm(dim=0) <= tol * start).all():
            return W, history, True
    return W, history, False


def _solve_many(H: Tensor, g: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(H)
    solved = torch.cholesky_solve(g[:, :, None], factor)[:, :, 0]
    for i in failed.nonzero()[:, 0].tolist():
        solved[i] = torch.linalg.pinv(H[i], hermitian=True) @ g[i]
    return solved


class _Turns:
    """Blocks (k, b) of every column, and which of their coordinates lie in its mask."""

    def __init__(self, mask: Tensor, size: int, generator: torch.Generator) -> None:
        self.mask, self.size, self.generator = mask.T, size, generator
        self.position, self.order = 0, self._shuffled()

    def _shuffled(self) -> Tensor:
        """A permutation of each column's coordinates, those of its mask first."""
        keys = torch.rand(self.mask.shape, generator=self.generator, device=self.mask.device)
        return (keys + ~self.mask * 2).argsort(dim=1)

    def next(self, gradient: Tensor, diagonal: Tensor, rule: str) -> tuple[Tensor, Tensor]:
        if rule == "random":
            block = self._shuffled()[:, : self.size]
        elif rule == "cyclic":
            if self.position >= int(self.mask.sum(1).max()):
                self.position, self.order = 0, self._shuffled()
            block = self.order[:, self.position : self.position + self.size]
            self.position += self.size
        else:
            scores = gradient.abs() if rule == "gs" else gradient.square() / diagonal.clamp_min(1e-300)[:, None]
            block = torch.where(self.mask, scores.T, -1).topk(self.size, dim=1).indices
        return block, self.mask.gather(1, block)


# --- the ports -------------------------------------------------------------------------------------------------------


class BlockCoordinate:
    """The solver port, and an analysis: the refit of half-pruned weights from the Gram alone."""

    Options: ClassVar[type[BlockCoordinateOptions]] = BlockCoordinateOptions

    def __init__(self, options: BlockCoordinateOptions) -> None:
        self.options = options

    def solve(self, design: Tensor, target: Tensor, generator: torch.Generator) -> Solution:
        """On the normal equations, their columns scaled to unit length."""
        options = self.options
        scale = design.norm(dim=0).clamp_min(torch.finfo(design.dtype).tiny)
        scaled = design / scale
        problem = GramLeastSquares(scaled.T @ scaled, scaled.T @ target)
        size = min(options.block_size, problem.size)
        W, history, converged = solve_gram(problem, options.rule, size, options.max_iter, options.tol, generator)
        note = f"block coordinate descent: {len(history) - 1} steps of {size} coordinates"
        return Solution(W / scale[:, None], [note if converged else f"{note}, not converged to {options.tol:g}"])

    def analyze(self, subject: Subject) -> Report:
        """Relative output error of 24 rows pruned by |w| times the input's norm to a half, then refitted."""
        size, steps = self.options.block_size, 20
        report = Report(
            f"half of 24 rows pruned, refitted by {steps} blocks of {size}: relative output error",
            ["site", "pruned", "greedy", "random", "cyclic", "exact"],
            x_label="block updates", y_label="relative output error",
        )  # fmt: skip
        for site in subject.sites:
            rows, weight = subject.inputs[site.name].double(), subject.weights[site.name][:24].double()
            G, masked, errors = _pruned(rows, weight)
            cells = [errors[0]]
            for rule in ("gsd", "random", "cyclic"):
                _, history, _ = solve_gram(masked, rule, min(size, len(G)), steps, 1e-14, subject.generator())
                curve = [errors[2](value) for value in history]
                cells.append(curve[-1])
                if rule != "cyclic" and len(report.curves) < 6:
                    label = f"{site.name}, {'greedy' if rule == 'gsd' else rule}"
                    report.curves.append(Curve(label, list(range(len(curve))), curve))
            report.add(site.name, *cells, errors[1])
        ratios = [r / g for r, g in zip(report.column("random"), report.column("greedy"), strict=True)]
        report.findings.append(
            f"error of random blocks over the greedy rule's: {min(ratios):.2f} to {max(ratios):.2f}, most at "
            f"{report.rows[ratios.index(max(ratios))][0]}"
        )
        return report


def _pruned(rows: Tensor, weight: Tensor) -> tuple[Tensor, GramLeastSquares, tuple[float, float, Callable[..., float]]]:
    """The Gram, the correction's problem, and the errors of the mask alone, of the exact refit, of an objective."""
    G = rows.T @ rows
    scores = weight.abs() * G.diagonal().sqrt()
    keep = torch.zeros_like(weight, dtype=torch.bool)
    keep.scatter_(1, scores.topk(weight.shape[1] // 2, dim=1).indices, True)
    pruned = weight * keep
    total = float(((weight @ G) * weight).sum())
    lost = weight - pruned
    start = float(((lost @ G) * lost).sum())
    problem = GramLeastSquares(G, G @ lost.T, keep.T)

    def error(objective: float) -> float:
        """||X (lost - correction)||² = ||X lost||² + 2 objective."""
        return float(max(start + 2 * objective, 0.0) / total) ** 0.5

    gain = 0.0
    for row, kept in zip(lost, keep, strict=True):
        index = kept.nonzero()[:, 0]
        c = (G @ row)[index]
        H = G[index][:, index]
        solved = torch.linalg.lstsq(H + 1e-12 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype), c).solution
        gain += float(c @ solved) / 2
    return G, problem, (error(0.0), error(-gain), error)
