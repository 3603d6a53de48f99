"""An SE(n)-equivariant network for point clouds (PONITA, arXiv 2310.02970), and an analysis of weights as point
clouds.

The analysis asks whether the shape of a matrix's output neurons, in its three leading components, tells how much
the loss rises when that matrix alone is cut to a quarter of its rank. On language models it does not tell more
than the kind of the matrix does: the report prints the baselines and the verdict, and nothing acts on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from pydantic import BaseModel, Field
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.backends.geometry.equivariant_network import Ponita, SeparableGroupConv
from llmcompress.backends.geometry.position_orientation import orientation_grid, pair_invariants
from llmcompress.backends.ports import Subject
from llmcompress.backends.report import Report
from llmcompress.calibration.fisher import token_losses
from llmcompress.errors import InputError
from llmcompress.models.structure import analyse
from llmcompress.types import Site

__all__ = ["Ponita", "SeparableGroupConv", "WeightClouds", "WeightCloudsOptions", "orientation_grid", "pair_invariants"]

FOLDS = 5
NEIGHBOURS = 8
ROTATIONS = 5  # of each cloud, that a prediction is the mean over
LEAST_INCREASE = 1e-5  # of the loss, below which it counts as this


class WeightCloudsOptions(BaseModel, extra="forbid"):
    matrices: int = Field(default=105, ge=20, description="matrices looked at, evenly spread over the model")
    neurons: int = Field(default=32, ge=16, description="output neurons of each, drawn at random")
    rank_share: float = Field(default=0.25, gt=0, lt=1, description="share of the rank that is kept in turn")
    tokens: int = Field(default=256, ge=2, description="tokens that the loss is measured on")
    hidden: int = Field(default=16, ge=1, description="width of the networks")
    steps: int = Field(default=60, ge=1, description="training steps of a network")


class WeightClouds:
    """The analysis: predictors of the loss increase, by five folds of blocks."""

    Options: ClassVar[type[WeightCloudsOptions]] = WeightCloudsOptions
    trains: ClassVar[bool] = True  # the whole model is needed: its loss is measured

    def __init__(self, options: WeightCloudsOptions) -> None:
        self.options = options

    def analyze(self, subject: Subject) -> Report:
        """R² and rank correlation of out-of-fold predictions of the logarithm of the loss increase."""
        model, tokens = subject.trainable()
        sites = self._sites(model)
        rows = tokens.flatten()[: self.options.tokens // tokens.shape[1] * tokens.shape[1] or self.options.tokens]
        generator = torch.Generator().manual_seed(subject.seed)
        target, clouds, spectra = self._measure(model, rows.view(-1, min(len(rows), tokens.shape[1])), sites, generator)
        blocks = np.array([site.block for site in sites])
        if len(set(blocks)) < FOLDS:
            raise InputError(
                f"ponita predicts across blocks: the matrices lie in {len(set(blocks))}, fewer than {FOLDS}"
            )
        roles = sorted({site.role for site in sites})
        kinds = np.array([[float(site.role == role) for role in roles] for site in sites])
        report = Report(
            f"log loss increase of {len(sites)} matrices cut to {self.options.rank_share:.0%} of their rank",
            ["predictor", "R²", "Spearman"],
        )
        predictors: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
            "PONITA on the cloud": self._network(clouds, target, 12, subject.seed),
            "PNITA on the cloud": self._network(clouds, target, 0, subject.seed),
            "ridge on the cloud's moments": _ridge(np.stack([moments(cloud) for cloud in clouds]), target),
            "kind of matrix alone": _ridge(kinds, target),
            "seven spectral numbers": _ridge(spectra, target),
        }
        for name, predict in predictors.items():
            found = np.empty(len(target))
            for train, test in GroupKFold(FOLDS).split(target, groups=blocks):
                found[test] = predict(train, test)
            report.add(name, float(r2_score(target, found)), float(spearmanr(target, found).statistic))
        best = max(report.rows[3:], key=lambda row: float(row[1] or 0))
        helps = float(report.rows[0][1] or 0) > float(best[1] or 0)
        report.findings = [
            f"{best[0]} reaches R² {best[1]:.2f}, the equivariant network {report.rows[0][1]:.2f}: "
            + ("the clouds tell more here" if helps else "the clouds are not useful here"),
            "no recipe acts on this; allocate ranks by measured losses or spectra",
        ]
        return report

    def _sites(self, model: PreTrainedModel) -> list[Site]:
        found = analyse(model).sites
        chosen = np.unique(np.linspace(0, len(found) - 1, min(self.options.matrices, len(found))).round().astype(int))
        return [found[index] for index in chosen]

    @torch.no_grad()
    def _measure(
        self, model: PreTrainedModel, tokens: Tensor, sites: list[Site], generator: torch.Generator
    ) -> tuple[np.ndarray, list[Tensor], np.ndarray]:
        """Log loss increases (m,), clouds (n, 3), spectral numbers (m, 7)."""
        target, clouds, spectra = [], [], []
        base = _loss(model, tokens)
        for site in sites:
            parameter = model.get_submodule(site.name).weight
            assert isinstance(parameter, Tensor)
            whole = parameter.detach().clone()
            u, s, vh = torch.linalg.svd((whole.T if site.transposed else whole).float(), full_matrices=False)
            rank = max(1, int(self.options.rank_share * len(s)))
            cut = (u[:, :rank] * s[:rank]) @ vh[:rank]
            parameter.copy_(cut.T if site.transposed else cut)
            try:
                target.append(np.log(max(_loss(model, tokens) - base, LEAST_INCREASE)))
            finally:
                parameter.copy_(whole)
            chosen = torch.randperm(len(u), generator=generator)[: self.options.neurons].to(u.device)
            cloud = (u[chosen, :3] * s[:3]).cpu()
            clouds.append(cloud / cloud.square().sum(1).mean().sqrt())
            spectra.append(spectral_numbers(s.double().cpu(), rank))
        return np.array(target), clouds, np.array(spectra)

    def _network(
        self, clouds: list[Tensor], target: np.ndarray, num_ori: int, seed: int
    ) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """Trains on some clouds with random rotations, and predicts others by a mean over rotations."""
        pos = torch.stack(clouds)
        n = pos.shape[1]
        edges = torch.stack([neighbour_edges(cloud) for cloud in pos])  # (m, 2, E)

        def run(net: Ponita, chosen: np.ndarray, turn: Tensor) -> Tensor:
            index = torch.from_numpy(chosen)
            shift = n * torch.arange(len(index))
            flat = (edges[index] + shift[:, None, None]).transpose(0, 1).flatten(1)
            batch = torch.arange(len(index)).repeat_interleave(n)
            scalar, _ = net(pos.new_ones(len(batch), 1), (pos[index] @ turn).flatten(0, 1), None, flat, batch)
            assert scalar is not None
            return scalar[:, 0] / n

        def predict(train: np.ndarray, test: np.ndarray) -> np.ndarray:
            rng = np.random.default_rng(seed)
            turns = torch.from_numpy(Rotation.random(self.options.steps + ROTATIONS, rng).as_matrix()).to(pos)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                net = Ponita(1, 0, self.options.hidden, 1, 0, 2, num_ori, task="graph", grid="icosahedron")
            y = torch.from_numpy(target[train]).to(pos)
            mean, deviation = y.mean(), y.std()
            optimizer = torch.optim.Adam(net.parameters(), 5e-3)
            for turn in turns[: self.options.steps]:
                loss = (run(net, train, turn) - (y - mean) / deviation).square().mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()
            net.eval()
            with torch.no_grad():
                found = torch.stack([run(net, test, turn) for turn in turns[self.options.steps :]]).mean(0)
            return (mean + deviation * found).numpy()

        return predict


def _ridge(features: np.ndarray, target: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    def predict(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        fit = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 3, 11))).fit(features[train], target[train])
        found: np.ndarray = fit.predict(features[test])
        return found

    return predict


def _loss(model: PreTrainedModel, tokens: Tensor) -> float:
    """Mean next-token loss."""
    logits = model(input_ids=tokens, use_cache=False).logits
    return float(token_losses(logits, tokens).sum() / (tokens.numel() - len(tokens)))


def neighbour_edges(cloud: Tensor) -> Tensor:
    """(2, n NEIGHBOURS): the nearest points of each, senders over receivers; the point itself is left out."""
    near = cKDTree(cloud.numpy()).query(cloud.numpy(), NEIGHBOURS + 1)[1][:, 1:]
    receivers = np.repeat(np.arange(len(cloud)), NEIGHBOURS)
    return torch.from_numpy(np.stack((near.flatten(), receivers)))


def moments(cloud: Tensor) -> np.ndarray:
    """Rotation invariants of a cloud (n, 3): eigenvalues of its second moment, moments of the lengths, length of
    the mean."""
    second = torch.linalg.eigvalsh(cloud.T @ cloud / len(cloud))
    lengths = cloud.norm(dim=1)
    powers = torch.stack([(lengths**power).mean().log() for power in (1, 3, 4, 6)])
    return torch.cat((second, powers, cloud.mean(0).norm()[None])).double().numpy()


def spectral_numbers(s: Tensor, rank: int) -> list[float]:
    """Logs of the largest, Frobenius and nuclear norm, stable and effective rank, share kept at `rank`, log of
    s_rank."""
    squares = s.square()
    p = squares / squares.sum()
    entropy = float(-(p * p.clamp_min(1e-300).log()).sum())
    return [
        float(s[0].log()), float(squares.sum().log()) / 2, float(s.sum().log()), float(squares.sum() / squares[0]),
        entropy, float(p[:rank].sum()), float(s[rank - 1].clamp_min(1e-300).log()),
    ]  # fmt: skip
