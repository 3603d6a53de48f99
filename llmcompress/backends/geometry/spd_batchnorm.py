"""Bures-Wasserstein geometry of Grams: batch normalisation of SPD matrices, distances and mixtures of text domains.

Source: arXiv 2504.00660 for the geometry and the normalisation. On a language model the Grams are those of a site's
inputs: how far apart two texts lie, and which mixture of domains looks like a target text. The barycentre is no
calibration Gram: the arithmetic mean is the best one for a summed error.
"""

from __future__ import annotations

import itertools
from typing import ClassVar

import numpy as np
import scipy.optimize
import torch
from pydantic import Field
from torch import Tensor

from llmcompress.backends.geometry.spd import (
    bw_barycentre,
    bw_distance,
    bw_exp,
    bw_geodesic,
    bw_inner,
    bw_log,
    bw_transport,
    checked_spd,
    spd_log,
    spd_power,
    sym_exp,
)
from llmcompress.backends.geometry.spd_layers import BiMap, GBWBatchNorm, LogEig, ReEig
from llmcompress.backends.ports import Subject
from llmcompress.backends.report import Report
from llmcompress.backends.texts import TARGET, TextOptions
from llmcompress.compressors.block_projection import relative_output_error
from llmcompress.compressors.svd_llm import svd_llm_factorize
from llmcompress.errors import InputError

__all__ = ["BiMap", "Bures", "BuresOptions", "GBWBatchNorm", "LogEig", "ReEig", "bures_mix_weights", "bw_barycentre",
           "bw_distance", "bw_exp", "bw_geodesic", "bw_inner", "bw_log", "bw_transport", "drift_report", "spd_log",
           "spd_power", "sym_exp"]  # fmt: skip

RANGE = 1e-10  # eigenvalues of a target below this share of its largest count as zero


class BuresOptions(TextOptions):
    tokens: int = Field(default=400, ge=2, description="tokens of the target that the mixture is fitted to")
    rank: int = Field(default=192, ge=1, description="rank whose output error under wrong domains is measured")


# --- Grams -----------------------------------------------------------------------------------------------------------


def bures_mix_weights(grams: Tensor, target: Tensor, iters: int = 300) -> Tensor:
    """w (K,) on the simplex minimising d²(sum w_k G_k, T), a convex problem, float64.

    grams (K, d, d) positive definite and target (d, d), which may be singular (fewer tokens than channels), each
    over its tokens. dF/dw_k = tr G_k - tr[(T^½ G_w T^½)^-½ T^½ G_k T^½], on the range of T; by sequential
    quadratic programming of at most `iters` steps, from equal weights. O(K d² m) once and O(m³) a step, m the rank
    of T. InputError for matrices that are not (semi-)definite, or shapes that differ.
    """
    if grams.ndim != 3 or not len(grams):
        raise InputError(f"grams must be (K, d, d), K at least 1; got shape {tuple(grams.shape)}")
    G, T = checked_spd(grams, "grams"), checked_spd(target, "target", definite=False)
    if T.shape != G.shape[1:]:
        raise InputError(f"target must be {tuple(G.shape[1:])}; got {tuple(T.shape)}")
    values, vectors = torch.linalg.eigh(T)
    kept = values > RANGE * values[-1]
    root = vectors[:, kept] * values[kept].sqrt()
    inner, traces = root.T @ G @ root, G.diagonal(dim1=1, dim2=2).sum(1)
    total = float(values.sum())

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(w).to(G)
        mixed = torch.einsum("k,kij->ij", weights, inner)
        s, u = torch.linalg.eigh(mixed)
        root_s = s.clamp_min(1e-14 * float(s[-1])).sqrt()
        slopes = torch.einsum("ij,kij->k", (u / root_s) @ u.T, inner)
        value = float(weights @ traces) + total - 2 * float(root_s.sum())
        return value / total, ((traces - slopes) / total).cpu().numpy()

    K = len(G)
    found = scipy.optimize.minimize(
        objective, np.full(K, 1 / K), jac=True, method="SLSQP", bounds=[(0, 1)] * K,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(K)},
        options={"maxiter": iters, "ftol": 1e-12},
    )  # fmt: skip
    w = torch.from_numpy(found.x.clip(0)).to(G)
    return w / w.sum()


def normalised_distance(P: Tensor, Q: Tensor) -> float:
    """d(P, Q) / (tr P tr Q)^(1/4) of Grams over their tokens, P positive definite."""
    scale = (P.diagonal().sum() * Q.diagonal().sum()) ** 0.25
    return float(bw_distance(P, Q) / scale)


def drift_report(grams: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Normalised distances between Grams (d, d) by name; each is divided by its trace first, so that shapes
    compare."""
    unit = {name: G.double() / G.double().diagonal().sum() for name, G in grams.items()}
    found: dict[str, dict[str, float]] = {name: {name: 0.0} for name in grams}
    for a, b in itertools.combinations(unit, 2):
        found[a][b] = found[b][a] = normalised_distance(unit[a], unit[b])
    return found


def gram_of(rows: Tensor) -> Tensor:
    """Mean of x xᵀ (d, d) of rows (n, d), float64, with a millionth of its mean diagonal added: definite at any n."""
    return _damped(rows.double().T @ rows.double() / len(rows))


def _damped(G: Tensor) -> Tensor:
    return G + 1e-6 * G.diagonal().mean() * torch.eye(len(G), dtype=G.dtype, device=G.device)


# --- the ports -------------------------------------------------------------------------------------------------------


class Bures:
    """The stream port: how far the Gram drifts between halves of the calibration rows. An analysis of text domains."""

    Options: ClassVar[type[BuresOptions]] = BuresOptions

    def __init__(self, options: BuresOptions) -> None:
        self.options = options

    @property
    def texts(self) -> dict[str, str]:
        """Further texts that the analysis is shown."""
        return self.options.texts

    def start(self, rows: int, d: int, generator: torch.Generator) -> None:
        self._half, self._seen = rows // 2, 0
        self._grams = torch.zeros(2, d, d, dtype=torch.float64, device=generator.device)

    def update(self, rows: Tensor) -> None:
        first = rows[: max(0, self._half - self._seen)]
        for total, part in zip(self._grams, (first, rows[len(first) :]), strict=True):
            total += (part.T @ part).double()
        self._seen += len(rows)

    def finish(self) -> list[str]:
        if self._seen < 2:
            return ["Bures drift: too few rows"]
        counts = (min(self._half, self._seen), self._seen - min(self._half, self._seen))
        halves = [G / max(1, n) for G, n in zip(self._grams, counts, strict=True)]
        if not all(G.any() for G in halves):
            return ["Bures drift: a half of the rows is zero"]
        distance = normalised_distance(*(_damped(G) for G in halves))
        return [f"Bures drift between halves of the rows: {distance:.3f}"]

    def analyze(self, subject: Subject) -> Report:
        """Distances between domains, what calibrating on the wrong one costs, and the target's mixture."""
        options = self.options
        if not options.domains:
            raise InputError(
                "spd_batchnorm compares texts: give others beside the analysed one, domains=[a.txt, b.txt]"
            )
        report = Report(
            "Grams of texts: Bures-Wasserstein distance over (tr tr)^(1/4); output error when calibrated on another",
            ["site", "domain", "other", "distance", "error, times own"],
        )
        target = subject.others.get(TARGET)
        for site in subject.sites:
            rows = {"analysed text": subject.inputs[site.name]}
            rows |= {name: other.inputs[site.name] for name, other in subject.others.items() if name != TARGET}
            grams = {name: gram_of(part) for name, part in rows.items()}
            self._distances(report, site.name, rows, grams, subject.weights[site.name].double())
            if target is not None:
                self._mixture(report, site.name, grams, target.inputs[site.name], subject.weights[site.name].double())
        report.findings.append("the barycentre is no calibration Gram: sum the domains' Grams, weighted by the mixture")
        return report

    def _distances(
        self, report: Report, site: str, rows: dict[str, Tensor], grams: dict[str, Tensor], weight: Tensor
    ) -> None:
        rank = min(self.options.rank, *weight.shape)
        fits = {name: svd_llm_factorize(weight, G, rank).to_dense() for name, G in grams.items()}
        costs = []
        for name, part in rows.items():
            halves = [gram_of(half) for half in part.chunk(2)]
            report.add(site, name, f"{name}, other half", normalised_distance(*halves), None)
        for a, b in itertools.permutations(grams, 2):
            wrong, right = (relative_output_error(weight, fits[name], grams[a]) for name in (b, a))
            costs.append(wrong / max(right, 1e-12))
            report.add(site, a, b, normalised_distance(grams[a], grams[b]), costs[-1])
        report.findings.append(
            f"{site}: calibrating on another domain costs {min(costs):.2f} to {max(costs):.2f} times"
        )

    def _mixture(self, report: Report, site: str, grams: dict[str, Tensor], target: Tensor, weight: Tensor) -> None:
        """Weights from the first tokens of the target, judged on the rest of it."""
        few, rest = target[: self.options.tokens], target[self.options.tokens :]
        G = torch.stack(list(grams.values()))
        w = bures_mix_weights(G, few.double().T @ few.double() / len(few))
        told = ", ".join(f"{name} {float(part):.2f}" for name, part in zip(grams, w, strict=True))
        finding = f"{site}: the target is a mixture of {told}"
        if len(rest):
            rank, judge = min(self.options.rank, *weight.shape), gram_of(rest)
            candidates = {
                "fitted": torch.einsum("k,kij->ij", w, G), "uniform": G.mean(0), "target alone": gram_of(few),
            }  # fmt: skip
            errors = {
                name: relative_output_error(weight, svd_llm_factorize(weight, Gram, rank).to_dense(), judge)
                for name, Gram in candidates.items()
            }
            listed = ", ".join(f"{name} {value:.4f}" for name, value in errors.items())
            finding += f"; output error at rank {rank} on the rest of it: {listed}"
        report.findings.append(finding)
