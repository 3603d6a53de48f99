"""Covariances of linear structural equation models by one-connections, and residual streams (arXiv 2210.00239).

The closed form resums all cycles: contributions of paths are exact where a series over walks diverges.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from scipy.optimize import minimize
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.backends.checks import checked_matrix, choose
from llmcompress.backends.graphs.mixed_graph import (
    MixedGraph,
    Term,
    covariance_symbolic,
    disjoint_cycle_sets,
    one_connections,
    simple_paths,
)
from llmcompress.backends.graphs.vanishing_ideal import (
    Polynomial,
    is_generically_finite,
    jacobian_rank,
    vanishing_polynomials,
)
from llmcompress.backends.ports import Subject
from llmcompress.backends.report import Curve, Report
from llmcompress.errors import InputError, RunError
from llmcompress.models.structure import analyse

__all__ = ["LSEMFit", "MixedGraph", "OneConnection", "OneConnectionOptions", "PathContribution", "PathTable",
           "Polynomial", "Term", "covariance_symbolic", "disjoint_cycle_sets", "fit_lsem", "implied_covariance",
           "is_generically_finite", "jacobian_rank", "one_connections", "path_decomposition",
           "residual_stream_report", "vanishing_polynomials"]  # fmt: skip

SINGULAR = 1e12  # condition number of I - Lambda above which it is not inverted
NOT_PD = 1e12  # the likelihood's loss where Omega is not positive definite


class OneConnectionOptions(BaseModel, extra="forbid"):
    feature: Literal["target_logit", "pc1"] = Field(
        default="target_logit", description="what is projected on: the next token's output row, or the main direction"
    )
    blocks: int = Field(default=10, ge=1, description="parts that the model's blocks are taken together in")
    top_paths: int = Field(default=20, ge=1, description="paths that are listed")


# --- covariances -----------------------------------------------------------------------------------------------------


def implied_covariance(G: MixedGraph, Lambda: Tensor, Omega: Tensor) -> Tensor:
    """Sigma = (I - Lambda)⁻ᵀ Omega (I - Lambda)⁻¹ (n, n), float64.

    InputError: weights outside the graph, Omega not symmetric positive definite, I - Lambda singular, values that are
    not finite.
    """
    Lambda, Omega = _checked(G, Lambda, Omega)
    K = _inverse(Lambda)
    return K.T @ Omega @ K


@dataclass(frozen=True)
class PathContribution:
    """One summand of sigma_ij: noise of source and sink, the paths from them to i and to j, and its value."""

    source: int
    sink: int
    left: tuple[int, ...]
    right: tuple[int, ...]
    value: float


@dataclass(frozen=True)
class PathTable:
    """The largest contributions first; total: sigma_ij; remainder: of the contributions that are not listed."""

    rows: list[PathContribution]
    total: float
    remainder: float


def path_decomposition(
    G: MixedGraph, Lambda: Tensor, Omega: Tensor, i: int, j: int, top_k: int | None = None
) -> PathTable:
    """sigma_ij by pairs of simple paths from correlated noises, all cycles resummed: each counts its weights times
    det of what it leaves over det of all.

    InputError as in `implied_covariance`, for unknown vertices, and top_k below 1. Cost: the number of simple paths.
    """
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1; got {top_k}")
    for vertex in (i, j):
        if not 0 <= vertex < G.n:
            raise InputError(f"no vertex {vertex}; there are 0..{G.n - 1}")
    Lambda, Omega = _checked(G, Lambda, Omega)
    _inverse(Lambda)
    M = torch.eye(G.n, dtype=Lambda.dtype, device=Lambda.device) - Lambda
    left, right = (_path_values(G, M, Lambda, end) for end in (i, j))
    rows = [
        PathContribution(k, l, p, q, float(Omega[k, l]) * a * b)
        for k, l in itertools.product(range(G.n), repeat=2)
        if Omega[k, l] != 0
        for (p, a), (q, b) in itertools.product(left[k], right[l])
    ]
    rows.sort(key=lambda row: -abs(row.value))
    total = sum(row.value for row in rows)
    kept = rows if top_k is None else rows[:top_k]
    return PathTable(kept, total, total - sum(row.value for row in kept))


def _path_values(G: MixedGraph, M: Tensor, Lambda: Tensor, end: int) -> list[list[tuple[tuple[int, ...], float]]]:
    """For every start, its simple paths to `end` with their contributions to (I - Lambda)⁻¹."""
    whole = float(torch.linalg.det(M))
    rest: dict[frozenset[int], float] = {}
    found = []
    for start in range(G.n):
        paths = []
        for path in simple_paths(G, start, end):
            left = frozenset(range(G.n)) - set(path)
            if left not in rest:
                kept = sorted(left)
                rest[left] = float(torch.linalg.det(M[kept][:, kept])) if kept else 1.0
            weight = 1.0
            for a, b in itertools.pairwise(path):
                weight *= float(Lambda[a, b])
            paths.append((tuple(path), weight * rest[left] / whole))
        found.append(paths)
    return found


def _checked(G: MixedGraph, Lambda: Tensor, Omega: Tensor) -> tuple[Tensor, Tensor]:
    Lambda, Omega = torch.as_tensor(Lambda).double(), torch.as_tensor(Omega).double()
    for name, matrix in (("Lambda", Lambda), ("Omega", Omega)):
        if matrix.shape != (G.n, G.n) or not torch.isfinite(matrix).all():
            raise InputError(f"{name} must be ({G.n}, {G.n}) and finite; got {tuple(matrix.shape)}")
    for i, j in Lambda.nonzero().tolist():
        if (i, j) not in G.directed:
            raise InputError(f"Lambda has a weight at ({i}, {j}), outside the graph's directed edges")
    if not torch.equal(Omega, Omega.T) or torch.linalg.cholesky_ex(Omega)[1]:
        raise InputError("Omega must be symmetric positive definite")
    for i, j in Omega.triu(1).nonzero().tolist():
        if (i, j) not in G.bidirected:
            raise InputError(f"Omega has a value at ({i}, {j}), outside the graph's bidirected edges")
    return Lambda, Omega


def _inverse(Lambda: Tensor) -> Tensor:
    M = torch.eye(len(Lambda), dtype=Lambda.dtype, device=Lambda.device) - Lambda
    condition = float(torch.linalg.cond(M))
    if not condition < SINGULAR:
        raise InputError(f"I - Lambda is singular: its condition number is {condition:.1e}")
    return torch.linalg.inv(M)


# --- fitting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LSEMFit:
    """Lambda, Omega (n, n) float64; loglik a sample, up to a constant: -(log|Sigma| + tr(S Sigma⁻¹)) / 2."""

    Lambda: Tensor
    Omega: Tensor
    loglik: float


def fit_lsem(Y: Tensor, G: MixedGraph, method: Literal["ols", "ml"] = "ols", ridge: float = 1e-6) -> LSEMFit:
    """Lambda and Omega of samples Y (N, n), whose means are taken off.

    ols: every vertex on its parents, with `ridge` times their variances added to these; exact for graphs without
    cycles and bidirected edges. ml: maximum likelihood by L-BFGS, for any graph. InputError for N <= n, or OLS on
    another graph; RunError if the likelihood does not converge.
    """
    choose("method", method, ("ols", "ml"))
    Y = checked_matrix(Y, "Y")
    if Y.shape[1] != G.n:
        raise InputError(f"Y must have {G.n} columns, one a vertex; got {Y.shape[1]}")
    if len(Y) <= G.n:
        raise InputError(f"more than {G.n} samples are needed; got {len(Y)}")
    S = torch.cov(Y.T, correction=0)
    Lambda, Omega = _ols(S, G, ridge) if method == "ols" else _maximum_likelihood(S, G)
    return LSEMFit(Lambda, Omega, -_loss(S, Lambda, Omega) / 2)


def _ols(S: Tensor, G: MixedGraph, ridge: float) -> tuple[Tensor, Tensor]:
    if not G.is_acyclic or G.bidirected:
        raise InputError("ols needs an acyclic graph without bidirected edges; use ml")
    Lambda, Omega = torch.zeros_like(S), torch.zeros_like(S)
    for j in range(G.n):
        parents = [a for a, b in G.directed if b == j]
        Omega[j, j] = S[j, j]
        if parents:
            gram = S[parents][:, parents]
            weights = torch.linalg.solve(gram + ridge * torch.diag(gram.diagonal()), S[parents, j])
            Lambda[parents, j] = weights
            Omega[j, j] = S[j, j] - 2 * weights @ S[parents, j] + weights @ gram @ weights
    return Lambda, Omega


def _maximum_likelihood(S: Tensor, G: MixedGraph) -> tuple[Tensor, Tensor]:
    D, B, n = list(G.directed), list(G.bidirected), G.n
    scale = S.diagonal().sqrt()
    R = (S / scale / scale[:, None]).cpu()

    def unpack(x: Tensor) -> tuple[Tensor, Tensor]:
        Lambda = torch.zeros(n, n, dtype=torch.float64)
        if D:
            Lambda = Lambda.index_put(tuple(torch.tensor(D).T), x[: len(D)])
        Omega = torch.diag(x[len(D) : len(D) + n].exp())
        if B:
            i, j = torch.tensor(B).T
            values = x[len(D) + n :]
            Omega = Omega.index_put((i, j), values).index_put((j, i), values)
        return Lambda, Omega

    def value(x: object) -> tuple[float, object]:
        at = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        Lambda, Omega = unpack(at)
        if torch.linalg.cholesky_ex(Omega)[1]:
            return NOT_PD, at.detach().numpy() * 0
        loss = _loss_tensor(R, Lambda, Omega)
        loss.backward()
        assert at.grad is not None
        return float(loss.detach()), at.grad.numpy()

    start = torch.zeros(len(D) + n + len(B), dtype=torch.float64)
    found = minimize(value, start.numpy(), jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-14})
    if not found.success and "ABNORMAL" not in str(found.message):
        raise RunError(f"the likelihood did not converge: {found.message}")
    Lambda, Omega = (t.to(S) for t in unpack(torch.tensor(found.x)))
    return Lambda * scale / scale[:, None], Omega * scale * scale[:, None]


def _loss_tensor(S: Tensor, Lambda: Tensor, Omega: Tensor) -> Tensor:
    """log|Sigma| + tr(S Sigma⁻¹)."""
    M = torch.eye(len(S), dtype=S.dtype, device=S.device) - Lambda
    inner = torch.linalg.solve(Omega, M.T @ S @ M)
    return torch.logdet(Omega) - 2 * torch.linalg.slogdet(M).logabsdet + inner.diagonal().sum()


def _loss(S: Tensor, Lambda: Tensor, Omega: Tensor) -> float:
    return float(_loss_tensor(S, Lambda, Omega))


# --- a model's residual stream ---------------------------------------------------------------------------------------


def residual_stream_report(
    model: PreTrainedModel,
    batches: Tensor,
    feature: str | Tensor = "target_logit",
    blocks: int | None = None,
    top_paths: int = 20,
) -> Report:
    """How much of the variance of a scalar at the end of the residual stream starts in each part of the model.

    batches (rows, length) int64. Vertices: what the embedding and each of `blocks` parts add to the residual stream,
    projected; edges from every part to every later one; the output is their sum. feature: target_logit, pc1, or a
    direction (d_model,). InputError for another direction, or too few tokens.
    """
    if top_paths < 1:
        raise InputError(f"top_paths must be at least 1; got {top_paths}")
    Y, names = _projections(model, batches, feature, blocks)
    n = Y.shape[1]
    G = MixedGraph(n, [(a, b) for a in range(n) for b in range(a + 1, n)], names=names)
    fit = fit_lsem(Y, G)
    K = torch.linalg.inv(torch.eye(n, dtype=torch.float64) - fit.Lambda)
    effect, noise = K.sum(1), fit.Omega.diagonal()  # the output adds all vertices up
    implied, empirical = float((noise * effect.square()).sum()), float(Y.sum(1).var(correction=0))
    what = feature if isinstance(feature, str) else "given"
    report = Report(
        f"{batches.numel():,} tokens, feature {what}: variance of the output {empirical:.6g}, implied {implied:.6g}",
        ["part", "variance", "total effect", "innovation share", "direct share"],
        x_label="part", y_label="share",
    )  # fmt: skip
    shares = (noise * effect.square() / implied).tolist()
    for index, name in enumerate(names):
        direct = float(noise[index]) / implied
        report.add(name, float(Y[:, index].var(correction=0)), float(effect[index]), shares[index], direct)
    report.curves = [Curve("innovation share", list(range(n)), shares)]
    report.findings = [
        f"implied and empirical variance differ by {abs(implied / empirical - 1):.1e}; the shares sum to "
        f"{sum(shares):.12f}",
        "largest paths to the output, in shares: " + "; ".join(_top_paths(fit, effect, names, implied, top_paths)),
        "these shares explain a variance; they do not say which layers can be dropped",
    ]
    return report


def _projections(
    model: PreTrainedModel, batches: Tensor, feature: str | Tensor, blocks: int | None
) -> tuple[Tensor, list[str]]:
    """What the embedding and each part add (N, parts + 1) float64, centred, on the CPU; and the parts' names."""
    if isinstance(feature, str):
        choose("feature", feature, ("target_logit", "pc1"))
    paths = analyse(model).blocks
    count = min(blocks or len(paths), len(paths))
    ends = [(part + 1) * len(paths) // count - 1 for part in range(count)]
    streams: list[list[Tensor]] = [[] for _ in range(count + 1)]

    def keep(index: int, hidden: Tensor) -> None:
        streams[index].append(hidden.detach()[:, :-1].flatten(0, 1).double().cpu())

    handles = [model.get_submodule(paths[0]).register_forward_pre_hook(
        lambda _, args, kwargs: keep(0, args[0] if args else kwargs["hidden_states"]), with_kwargs=True)]  # fmt: skip
    for index, end in enumerate(ends, 1):
        handles.append(model.get_submodule(paths[end]).register_forward_hook(
            lambda _, __, out, index=index: keep(index, out[0] if isinstance(out, tuple) else out)))  # fmt: skip
    try:
        with torch.no_grad():
            for rows in batches.split(4):
                model(input_ids=rows.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    states = torch.stack([torch.cat(parts) for parts in streams])  # (parts + 1, N, d_model)
    added = torch.cat((states[:1], states[1:] - states[:-1]))
    if isinstance(feature, Tensor):
        if feature.shape != states.shape[2:]:
            raise InputError(f"feature must be ({states.shape[2]},), a direction; got {tuple(feature.shape)}")
        Y = added @ feature.double().cpu()
    elif feature == "pc1":
        last = states[-1] - states[-1].mean(0)
        Y = added @ torch.linalg.eigh(last.T @ last).eigenvectors[:, -1]
    else:
        rows = model.get_output_embeddings().weight.detach().double().cpu()[batches[:, 1:].flatten().cpu()]
        Y = (added * rows).sum(2)
    names = [f"blocks {0 if not i else ends[i - 1] + 1} to {end}" for i, end in enumerate(ends)]
    return (Y - Y.mean(1, keepdim=True)).T, ["embedding", *names]


def _top_paths(fit: LSEMFit, effect: Tensor, names: Sequence[str], variance: float, count: int) -> list[str]:
    """The paths from a part's noise through later parts to the output whose products are largest.

    A path's share is its weight times its start's total effect and noise over the variance: the shares of a start's
    paths add up to its innovation share. Of a complete order of n parts there are 2^n of them, but the heaviest are
    made of the heaviest continuations of every vertex.
    """
    n = len(names)
    best: list[list[tuple[float, tuple[int, ...]]]] = [[] for _ in range(n)]
    for a in reversed(range(n)):
        found: list[tuple[float, tuple[int, ...]]] = [(1.0, (a,))]
        for b in range(a + 1, n):
            found += [(float(fit.Lambda[a, b]) * weight, (a, *path)) for weight, path in best[b]]
        best[a] = sorted(found, key=lambda item: -abs(item[0]))[:count]
    scale = (fit.Omega.diagonal() * effect / variance).tolist()
    everything = [(scale[a] * weight, path) for a in range(n) for weight, path in best[a]]
    everything.sort(key=lambda item: -abs(item[0]))
    return [f"{' > '.join(names[i] for i in path)} {share:.1%}" for share, path in everything[:count]]


class OneConnection:
    Options: ClassVar[type[OneConnectionOptions]] = OneConnectionOptions
    trains: ClassVar[bool] = True  # the whole model is run

    def __init__(self, options: OneConnectionOptions) -> None:
        self.options = options

    def analyze(self, subject: Subject) -> Report:
        model, tokens = subject.trainable()
        options = self.options
        return residual_stream_report(model, tokens, options.feature, options.blocks, options.top_paths)
