"""Robust aggregation of gradients by the subspace that most of them agree on: the flag aggregator (arXiv 2302.05865).

p gradients, unit columns x_i; Y (n, m) orthonormal minimises sum (1 - v_i)^(1/a), v_i = ||Yᵀ x_i||², by reweighted
singular value decompositions. What leaves Y aside is averaged away. Everything depends on K = GᵀG, (p, p), alone: Y is
never formed, O(n p² + p³), and ranks that hold parts of the gradients need only add up their K. Honest limits: at the
default m it is close to the mean of unit gradients, and rules that know how many workers are bad may be better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from llmcompress.backends.checks import choose
from llmcompress.backends.optim import attacks
from llmcompress.backends.optim.aggregators import AGGREGATORS, get_aggregator
from llmcompress.backends.ports import Subject
from llmcompress.backends.report import Report
from llmcompress.calibration.fisher import token_losses
from llmcompress.errors import InputError

__all__ = ["Flag", "FlagAggregator", "FlagOptions", "FlagSolution", "attacks", "flag_coefficients", "get_aggregator",
           "solve_flag"]  # fmt: skip

LOSSES, SCALES = ("power", "beta"), ("median", "unit", "none")
EPS = 1e-7
VANISHING = 1e-6  # of the median norm
WORKERS, LIARS = 10, 2  # of the analysis


@dataclass(frozen=True)
class FlagSolution:
    """s (p,): the aggregate is sum s_i g_i; v (p,): each worker's share inside the subspace; objective: by round."""

    s: Tensor
    v: Tensor
    objective: list[float] = field(repr=False)


def solve_flag(
    K: Tensor, m: int | None = None, n_iter: int = 5, power: float = 2.0, lam: float = 0.0, loss: str = "power",
    scale: str = "median", tol: float = 1e-10,
) -> FlagSolution:  # fmt: skip
    """From the Gram K (p, p) of the gradients, in float64.

    m: dimension, ceil((p + 1) / 2) if absent; power: a; lam: weight of the pairs' unit differences, which are columns
    of weight 2 lam / (p - 1); loss `beta`: the exact Beta(1, 1/2) likelihood, unbounded below, for diagnosis; scale, of
    the aggregate: median (the mean of the projected unit gradients times their median norm; a learning rate keeps its
    meaning), unit (their sum over m, the published code), none (the mean of the projected gradients, the paper; a huge
    gradient inside the subspace rules it). Workers that are not finite or vanish have s = v = 0.
    InputError for bad arguments. O(p³) a round, O(p⁴) with pairs. Source: arXiv 2302.05865, algorithm 1.
    """
    choose("loss", loss, LOSSES)
    choose("scale", scale, SCALES)
    p = len(K)
    if p < 2 or K.shape != (p, p):
        raise InputError(f"K must be (p, p) of at least 2 gradients; got {tuple(K.shape)}")
    if m is not None and not 1 <= m <= p:
        raise InputError(f"m must be between 1 and p = {p}; got {m}")
    if n_iter < 1 or lam < 0 or not power > 1:
        raise InputError(f"n_iter must be >= 1, lam >= 0, power > 1; got {n_iter}, {lam:g}, {power:g}")
    alive = _alive(K.diagonal())
    K = K.double()[alive][:, alive]
    norms = K.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(K / norms / norms[:, None])
    kept = values > 1e-12 * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    Z = values.sqrt()[:, None] * vectors.T  # (r, workers): unit columns with the gradients' angles
    X, c = _columns(Z, norms, lam)
    size = min(m or math.ceil((len(norms) + 1) / 2), len(Z))
    w, objective = c, []
    for _ in range(n_iter):
        Y = torch.linalg.eigh((X * w) @ X.T)[1][:, -size:]
        miss = (1 - (Y.T @ X).square().sum(0)).clamp(0, 1)
        if loss == "power":
            objective.append(float((c * miss ** (1 / power)).sum()))
            w = c / power * (miss + EPS) ** (1 / power - 1)
        else:
            objective.append(float((c * (miss + EPS).log()).sum()) / 2)
            w = c / 2 / (miss + EPS)
        if len(objective) > 1 and objective[-2] - objective[-1] < tol:
            break
    inside = Y @ (Y.T @ Z)
    total = {
        "none": lambda: (inside * norms).sum(1) / len(norms),
        "unit": lambda: inside.sum(1) / size,
        "median": lambda: inside.sum(1) * norms.median() / len(norms),
    }[scale]()
    s, v = (torch.zeros(p, dtype=K.dtype, device=K.device) for _ in range(2))
    s[alive] = vectors @ (total / values.sqrt()) / norms
    v[alive] = inside.square().sum(0).clamp(0, 1)
    return FlagSolution(s, v, objective)


def flag_coefficients(K: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """s and v of `solve_flag`, which has the arguments."""
    found = solve_flag(K, **arguments)
    return found.s, found.v


def _alive(squares: Tensor) -> Tensor:
    """Workers whose squared norm is finite and not a vanishing one. InputError if there is none."""
    finite = torch.isfinite(squares)
    positive = squares[finite & (squares > 0)]
    if not len(positive):
        raise InputError("no worker has a finite gradient that is not zero")
    return finite & (squares > VANISHING**2 * positive.median())


def _columns(Z: Tensor, norms: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """The unit columns of the objective and their weights."""
    ones = Z.new_ones(Z.shape[1])
    if not lam or len(ones) < 2:
        return Z, ones
    i, j = torch.triu_indices(len(ones), len(ones), 1, device=Z.device)
    pairs = Z[:, i] * norms[i] - Z[:, j] * norms[j]
    length = pairs.norm(dim=0)
    differ = length > 0
    pairs = pairs[:, differ] / length[differ]
    weight = 2 * lam / (len(ones) - 1)
    return torch.cat((Z, pairs), 1), torch.cat((ones, weight * pairs.new_ones(pairs.shape[1])))


class FlagAggregator:
    """`solve_flag` on gradients: call it with (p, n), or a list of p vectors; (n,) in their dtype comes back.

    Afterwards values_ (p,) names bad workers by what is near 0, weights_ (p,) are s, objective_ every round's.
    """

    def __init__(
        self, m: int | None = None, n_iter: int = 5, power: float = 2.0, lam: float = 0.0, loss: str = "power",
        scale: str = "median", tol: float = 1e-10,
    ) -> None:  # fmt: skip
        self.arguments: dict[str, Any] = {
            "m": m, "n_iter": n_iter, "power": power, "lam": lam, "loss": loss, "scale": scale, "tol": tol,
        }  # fmt: skip
        self.values_ = self.weights_ = torch.empty(0)
        self.objective_: list[float] = []

    def coefficients(self, gram: Tensor) -> Tensor:
        """s (p,) float64 for gradients of that Gram (p, p)."""
        found = solve_flag(gram, **self.arguments)
        self.values_, self.weights_, self.objective_ = found.v, found.s, found.objective
        return found.s

    def __call__(self, grads: Tensor | Sequence[Tensor]) -> Tensor:
        rows = stacked(grads)
        return combine(self.coefficients(gram(rows)), rows)

    aggregate = __call__


def stacked(grads: Tensor | Sequence[Tensor]) -> Tensor:
    """(p, n). InputError for ragged, integer, or fewer than two gradients."""
    if not isinstance(grads, Tensor):
        if len({g.numel() for g in grads}) > 1:
            raise InputError(f"the gradients differ in length: {sorted({g.numel() for g in grads})}")
        grads = torch.stack([g.flatten() for g in grads]) if len(grads) else torch.empty(0, 0)
    if grads.ndim != 2 or len(grads) < 2:
        raise InputError(f"at least 2 gradients (p, n) are needed; got shape {tuple(grads.shape)}")
    if not grads.is_floating_point():
        raise InputError(f"gradients are floating-point numbers; got {grads.dtype}")
    return grads


def gram(rows: Tensor, chunk: int = 1 << 18) -> Tensor:
    """rows rowsᵀ (p, p) float64 of rows (p, n), in pieces."""
    total = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for part in rows.split(chunk, dim=1):
        wide = part.double()
        total += wide @ wide.T
    return total


def combine(s: Tensor, rows: Tensor) -> Tensor:
    """sum s_i rows_i (n,), over those of s_i != 0: what is not finite stays out."""
    used = s != 0
    return s[used].to(rows) @ rows[used]


# --- the port --------------------------------------------------------------------------------------------------------


class FlagOptions(BaseModel, extra="forbid"):
    m: Literal["auto"] | int = Field(default="auto", description="dimension of the subspace; auto: just above half")
    n_iter: int = Field(default=5, ge=1, description="rounds; one, if gradients are noisy")
    power: float = Field(default=2.0, gt=1, description="a: larger ones are nearer to the exact likelihood")
    lam: float = Field(default=0.0, ge=0, description="weight of the differences of pairs")


class Flag(FlagAggregator):
    """The aggregator port, and an analysis: gradients of sequences under attacks, next to other rules."""

    Options: ClassVar[type[FlagOptions]] = FlagOptions
    trains: ClassVar[bool] = True  # gradients need the whole model

    def __init__(self, options: FlagOptions) -> None:
        m = None if options.m == "auto" else options.m
        super().__init__(m, options.n_iter, options.power, options.lam)

    def analyze(self, subject: Subject) -> Report:
        """Cosine of the aggregate to the honest gradients' mean: one worker a sequence, two of ten bad."""
        model, tokens = subject.trainable()
        if len(tokens) < WORKERS:
            raise InputError(f"needs {WORKERS} sequences, one a worker; got {len(tokens)}")
        weight = model.get_parameter(f"{subject.sites[0].name}.weight")
        rows = []
        for row in tokens[:WORKERS]:
            with torch.enable_grad():
                loss = token_losses(model(input_ids=row[None], use_cache=False).logits, row[None]).sum()
                rows.append(parameters_to_vector(torch.autograd.grad(loss / (len(row) - 1), [weight])))
        honest, generator = torch.stack(rows), subject.generator()
        rules = {"flag": self} | {name: get_aggregator(name, LIARS) for name in AGGREGATORS if name != "bulyan"}
        report = Report(
            f"{subject.sites[0].name}: cosine to the honest mean, {WORKERS} sequences, {LIARS} attacked",
            ["attack", *rules],
        )
        truth = honest[LIARS:].mean(0)
        for name, attack in attacks.ATTACKS.items():
            given = attack(honest, LIARS, generator)
            found = [float(torch.cosine_similarity(rule(given), truth, dim=0)) for rule in rules.values()]
            report.add(name, *found)
        worst = {name: min(report.column(name)) for name in rules}
        worst = {name: value for name, value in worst.items() if math.isfinite(value)}
        best = max(worst, key=worst.__getitem__)
        report.findings.append(f"worst cosine of the flag aggregator {worst['flag']:.2f}; of the best rule, {best}, "
                               f"{worst[best]:.2f}, if it is told how many are bad")  # fmt: skip
        return report
