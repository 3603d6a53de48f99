"""Clusters of different shapes, by iterated likelihood-adjusted semidefinite programs (arXiv 2209.15097).

Labels are the parameter: for covariances fixed, the likelihood with the means maximised out is linear in the membership
matrices, whose relaxation is tight where clusters are separated. Memberships and covariances are found in turn; there
is no centroid whose bad start could trap the search.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.cluster import AgglomerativeClustering
from sklearn.covariance import LedoitWolf
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.backends.checks import checked_matrix, choose, generator_for
from llmcompress.backends.graphs.k_means import k_means
from llmcompress.backends.graphs.la_sdp import (
    SDPResult,
    hard_memberships,
    likelihood_affinities,
    peng_wei_sdp,
    project_affine,
    solve_la_sdp,
)
from llmcompress.backends.graphs.subspaces import shared_basis_error
from llmcompress.backends.ports import Subject
from llmcompress.backends.report import Report
from llmcompress.errors import InputError
from llmcompress.models.heads import head_weights

__all__ = ["ILASDP", "ILASDPGroups", "ILASDPOptions", "SDPResult", "head_features", "likelihood_affinities",
           "peng_wei_sdp", "profile_objective", "project_affine", "solve_la_sdp", "spectral_round"]  # fmt: skip

Covariance = Literal["full", "diag", "spherical"]
LEAST = 2  # points of a cluster


class ILASDPOptions(BaseModel, extra="forbid"):
    covariance: Covariance = Field(default="full", description="shape of a cluster: full, diag or spherical")
    reg: float = Field(default=1e-3, gt=0, description="added to covariances, in units of the features' mean variance")
    max_iter: int = Field(default=10, ge=1, description="rounds of memberships and covariances at most")
    groups: int = Field(default=3, ge=2, description="analysis: groups of heads")
    blocks: int = Field(default=8, ge=1, description="analysis: blocks, evenly spread, whose heads are grouped")


# --- the parts -------------------------------------------------------------------------------------------------------


def spectral_round(Z: Tensor, K: int, random_state: int | torch.Generator | None = None) -> Tensor:
    """Labels (n,) int64 by k-means on the K leading eigenvectors of Z (n, n), or of the sum of Z (k, n, n)."""
    Z = Z.sum(0) if Z.ndim == 3 else Z
    vectors = torch.linalg.eigh((Z + Z.mT) / 2).eigenvectors[:, -K:]
    return k_means(vectors, K, 10, generator_for(random_state, Z.device)).to(Z.device)


def covariances(X: Tensor, Z: Tensor, reg: float, kind: Covariance = "full") -> Tensor:
    """Maximisers of the likelihood for memberships Z (K, n, n), plus reg times the mean variance: (K, p, p).

    X (n, p) float64. A full one of a cluster with no more points than features is shrunk by Ledoit and Wolf's rule.
    """
    p = X.shape[1]
    floor = reg * X.var(0, correction=0).mean() * torch.eye(p, dtype=X.dtype, device=X.device)
    mass = Z.sum((1, 2))
    weighted = Z.sum(2)[:, :, None] * X - Z @ X
    found = X.T @ weighted / mass[:, None, None].clamp_min(1e-12)
    found = (found + found.mT) / 2
    if kind == "full":
        for k in (mass <= p).nonzero()[:, 0].tolist():
            inside = Z[k].sum(1) > 0.5
            if int(inside.sum()) >= LEAST:
                shrunk = LedoitWolf().fit(X[inside].cpu().numpy()).covariance_
                found[k] = torch.as_tensor(shrunk).to(found)
    else:
        variances = found.diagonal(dim1=1, dim2=2)
        if kind == "spherical":
            variances = variances.mean(1, keepdim=True).expand_as(variances)
        found = torch.diag_embed(variances)
    return found + floor


def profile_objective(X: Tensor, labels: Tensor, reg: float, kind: Covariance = "full") -> float:
    """Twice the log likelihood of a partition with means and covariances maximised out, up to a constant.

    X (n, p), labels (n,) int64. -sum_k n_k (tr(S_k⁻¹ C_k) + log|S_k|), C_k a cluster's covariance, S_k the regularised.
    """
    X = checked_matrix(X)
    Z = hard_memberships(torch.as_tensor(labels), int(labels.max()) + 1)
    return float((likelihood_affinities(X, covariances(X, Z, reg, kind)) * Z).sum())


# --- the estimator ---------------------------------------------------------------------------------------------------


class ILASDP(ClusterMixin, BaseEstimator):
    """iLA-SDP: rounds of a semidefinite program for the memberships and maximum likelihood for the covariances.

    init: "sdp" (Peng-Wei and spectral rounding), "hierarchical" (Ward), or labels (n,). covariance: full, diag,
    spherical. reg: see `covariances`. tol: of the programs. update: "hard" or "soft" memberships in the covariances.
    max_sdp_points: of more points so many are drawn, and the others put where they are likeliest. After `fit(X)`,
    X (n, p) numpy or torch: labels_ (n,), memberships_ (K, m, m), covariances_ (K, p, p), means_ (K, p),
    objective_history_ (the profile objective, never falling), n_iter_, converged_. A program that does not converge
    warns. InputError for bad arguments. Cost: O(K m³) an iteration of a program, some hundreds of them a round.
    """

    def __init__(
        self, n_clusters: int, max_iter: int = 10, init: Any = "sdp", covariance: Covariance = "full",
        reg: float = 1e-3, tol: float = 1e-3, update: Literal["hard", "soft"] = "hard", max_sdp_points: int = 300,
        random_state: int | None = None,
    ) -> None:  # fmt: skip
        self.n_clusters, self.max_iter, self.init, self.covariance = n_clusters, max_iter, init, covariance
        self.reg, self.tol, self.update = reg, tol, update
        self.max_sdp_points, self.random_state = max_sdp_points, random_state

    def fit(self, X: Any, y: Any = None) -> ILASDP:
        data = self._checked(X)
        generator = generator_for(self.random_state, data.device)
        rows = torch.arange(len(data), device=data.device)
        if len(data) > self.max_sdp_points:
            drawn = torch.randperm(len(data), generator=generator, device=data.device)[: self.max_sdp_points]
            rows = drawn.sort().values
        sample = data[rows]
        self._solved = True
        labels = self._start(sample, rows, generator)
        Z = hard_memberships(labels, self.n_clusters)
        history = [profile_objective(sample, labels, self.reg, self.covariance)]
        settled = False
        for _ in range(self.max_iter):
            covs = covariances(sample, Z, self.reg, self.covariance)
            solved = self._solve(likelihood_affinities(sample, covs), labels)
            new = self._round(solved.Z, generator)
            objective = profile_objective(sample, new, self.reg, self.covariance) if new is not None else None
            if new is None or objective is None or objective < history[-1] or torch.equal(new, labels):
                settled = True
                break
            labels = new
            history.append(objective)
            Z = solved.Z if self.update == "soft" else hard_memberships(labels, self.n_clusters)
        hard = hard_memberships(labels, self.n_clusters)
        self.memberships_ = self._like(solved.Z, X)
        self._means = hard.sum(2) @ sample / hard.sum((1, 2))[:, None]
        self._covs = covariances(sample, hard, self.reg, self.covariance)
        everywhere = self._likeliest(data)
        everywhere[rows] = labels
        self.labels_, self.means_ = self._like(everywhere, X), self._like(self._means, X)
        self.covariances_, self.objective_history_ = self._like(self._covs, X), history
        self.n_iter_, self.converged_ = len(history), settled and self._solved
        return self

    def predict(self, X: Any) -> Any:
        """The likeliest cluster of each row of X (m, p)."""
        return self._like(self._likeliest(checked_matrix(X).to(self._means.device)), X)

    def _checked(self, X: Any) -> Tensor:
        data = checked_matrix(X)
        choose("covariance", self.covariance, ("full", "diag", "spherical"))
        choose("update", self.update, ("hard", "soft"))
        if len(data) < 4:
            raise InputError(f"X must have at least 4 rows; got {len(data)}")
        if not 2 <= self.n_clusters <= len(data) / 2:
            raise InputError(f"n_clusters must be between 2 and half of the {len(data)} rows; got {self.n_clusters}")
        return data

    def _start(self, sample: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
        K = self.n_clusters
        if not isinstance(self.init, str):
            labels = torch.as_tensor(self.init).to(sample.device).long()
            if labels.ndim != 1 or len(labels) < len(sample) or int(rows[-1]) >= len(labels):
                raise InputError(f"init must hold a label for every row; got {tuple(labels.shape)}")
            labels = labels[rows]
            counts = labels.bincount(minlength=K) if int(labels.min()) >= 0 else labels.new_zeros(1)
            if len(counts) != K or int(counts.min()) < LEAST:
                raise InputError(f"init must have at least {LEAST} rows in each of the {K} clusters 0..{K - 1}")
            return labels
        choose("init", self.init, ("sdp", "hierarchical"))
        if self.init == "sdp":
            solved = peng_wei_sdp(sample, K, self.tol, max_points=len(sample))
            self._note(solved)
            labels = spectral_round(solved.Z, K, generator)
        if self.init == "hierarchical" or int(labels.bincount(minlength=K).min()) < LEAST:
            labels = torch.as_tensor(AgglomerativeClustering(K).fit_predict(sample.cpu().numpy())).long()
        return _at_least_two(labels.to(sample.device), sample, K)

    def _solve(self, A: Tensor, labels: Tensor) -> SDPResult:
        start = hard_memberships(labels, self.n_clusters)
        solved = solve_la_sdp(A, self.tol, warm_start=start, max_points=A.shape[1])
        self._note(solved)
        return solved

    def _note(self, solved: SDPResult) -> None:
        if not solved.converged:
            self._solved = False
            told = f"primal residual {solved.primal_residual:.1e}, dual {solved.dual_residual:.1e}"
            warnings.warn(f"the semidefinite program did not converge: {told}", ConvergenceWarning, stacklevel=3)

    def _round(self, Z: Tensor, generator: torch.Generator) -> Tensor | None:
        """Labels by the largest membership; by spectral rounding where a cluster loses its points; None if both do."""
        for labels in (Z.sum(2).argmax(0), spectral_round(Z, self.n_clusters, generator)):
            if int(labels.bincount(minlength=self.n_clusters).min()) >= LEAST:
                return labels
        return None

    def _likeliest(self, data: Tensor) -> Tensor:
        lower = torch.linalg.cholesky(self._covs)
        centred = (data[None] - self._means[:, None]).mT
        squares = torch.linalg.solve_triangular(lower, centred, upper=False).square().sum(1)
        log_det = 2 * lower.diagonal(dim1=1, dim2=2).log().sum(1)
        return (squares + log_det[:, None]).argmin(0)

    @staticmethod
    def _like(found: Tensor, given: Any) -> Any:
        return found if isinstance(given, Tensor) else found.cpu().numpy()


def _at_least_two(labels: Tensor, X: Tensor, K: int) -> Tensor:
    """Clusters of one point take the nearest point of a cluster that can spare one."""
    labels = labels.clone()
    for k in range(K):
        while int((labels == k).sum()) < LEAST:
            own = X[labels == k].mean(0) if (labels == k).any() else X.mean(0)
            counts = labels.bincount(minlength=K)
            spare = (counts[labels] > LEAST) & (labels != k)
            distance = torch.where(spare, (X - own).square().sum(1), torch.inf)
            labels[distance.argmin()] = k
    return labels


# --- the ports -------------------------------------------------------------------------------------------------------


def spectral_features(left: Tensor, right: Tensor | None = None) -> Tensor:
    """Log Frobenius norm and log effective rank (n, 2) of leftᵀ right, or of left: (n, h, d) each, float64."""
    left = left.double()
    if right is not None:
        r, s = (torch.linalg.qr(part.double().mT).R for part in (left, right))
        left = r @ s.mT
    values = torch.linalg.svdvals(left).clamp_min(1e-300)
    p = values / values.sum(1, keepdim=True)
    return torch.stack((values.square().sum(1).sqrt().log(), -(p * p.log()).sum(1)), 1)


def standardised(features: Tensor) -> Tensor:
    """Columns of mean 0 and deviation 1; constant ones are 0."""
    centred = features.double() - features.double().mean(0)
    deviation = centred.square().mean(0).sqrt()
    return centred / torch.where(deviation > 1e-12, deviation, 1.0)


def head_features(model: PreTrainedModel, blocks: int | None = None) -> tuple[Tensor, Tensor, list[str]]:
    """Of each query head, log norm and log effective rank of W_Q W_Kᵀ and of W_O W_V, standardised: (n, 4) float64.

    blocks: so many, evenly spread; all if None. Also the heads' query weights (n, d_head, d_in) and names.
    """
    q, block, names = head_weights(model, "q")
    o, _, _ = head_weights(model, "o")
    k, v = (head_weights(model, role)[0] for role in ("k", "v"))
    count = int(block.max()) + 1
    chosen = torch.linspace(0, count - 1, min(blocks or count, count)).round().long()
    kept = torch.isin(block, chosen)
    spread = len(q) // len(k)  # neighbouring query heads share a key and a value
    k, v = (part.repeat_interleave(spread, 0) for part in (k, v))
    features = torch.cat((spectral_features(q[kept], k[kept]), spectral_features(o[kept], v[kept])), 1)
    return standardised(features), q[kept], [name for name, own in zip(names, kept.tolist(), strict=True) if own]


class ILASDPGroups:
    """The grouping port, and an analysis of a model's heads against k-means and expectation maximisation."""

    Options: ClassVar[type[ILASDPOptions]] = ILASDPOptions
    trains: ClassVar[bool] = True  # heads of all blocks are compared

    def __init__(self, options: ILASDPOptions) -> None:
        self.options = options

    def describe(self, weight: Tensor) -> Tensor:
        """Log norm and log effective rank."""
        return spectral_features(weight[None])[0]

    def groups(self, features: Tensor, count: int, generator: torch.Generator) -> Tensor:
        labels: Tensor = self._method(count, generator).fit(standardised(features)).labels_
        return labels

    def _method(self, count: int, generator: torch.Generator) -> ILASDP:
        options = self.options
        seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
        return ILASDP(count, options.max_iter, covariance=options.covariance, reg=options.reg, random_state=seed)

    def analyze(self, subject: Subject) -> Report:
        """Profile objective of the heads' groups, and the relative error of one basis a group."""
        from sklearn.mixture import GaussianMixture

        model, _ = subject.trainable()
        options = self.options
        features, weights, _ = head_features(model, options.blocks)
        features, weights = features.cpu(), weights.cpu()
        K, rank = options.groups, weights.shape[2] // 2
        generator = torch.Generator().manual_seed(subject.seed)
        own = self._method(K, generator).fit(features)
        found = {"iLA-SDP": own.labels_, "k-means": k_means(features, K, 10, generator)}
        for seed in range(4):
            mixture = GaussianMixture(K, reg_covar=options.reg, init_params="random_from_data", random_state=seed)
            labels = torch.as_tensor(mixture.fit_predict(features.numpy())).long()
            if int(labels.bincount(minlength=K).min()) >= LEAST:
                found[f"EM, start {seed}"] = labels
        report = Report(
            f"{len(features)} heads in {K} groups by 4 spectral features; one basis of {rank} inputs a group",
            ["groups", "profile objective", "basis error", "smallest", "largest"],
        )
        for name, labels in found.items():
            sizes, objective = labels.bincount(minlength=K), profile_objective(features, labels, options.reg)
            error = shared_basis_error(weights, labels, rank)
            report.add(name, objective, error, int(sizes.min()), int(sizes.max()))
        values = dict(zip(report.column("groups"), report.column("profile objective"), strict=True))
        starts = [value for name, value in values.items() if name.startswith("EM")]
        gain = values["iLA-SDP"] - values["k-means"]
        report.findings = [
            f"the profile objective is {abs(gain):.2f} {'above' if gain >= 0 else 'below'} that of k-means' groups",
            "expectation maximisation ends between "
            + (f"{min(starts):.1f} and {max(starts):.1f}, by its start" if starts else "nowhere: it loses clusters"),
        ]
        return report
