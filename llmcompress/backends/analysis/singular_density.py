"""The density and the intrinsic dimension of activations, by a deep generative model fitted to perturbed rows.

Source: arXiv 2105.04046. Measured on language models it makes no better detector of bad calibration text than the
model's own loss, and the estimates of dimension do not agree: the report prints the baselines beside.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import BaseModel, Field
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.backends.analysis.deep_density import DeepDensity, fit_together
from llmcompress.backends.analysis.intrinsic_dimension import (
    SCALES,
    jacobian_dimension,
    levina_bickel,
    perturbation_rule,
    slope_dimension,
    two_nn,
    wasserstein1,
)
from llmcompress.backends.ports import Subject
from llmcompress.backends.report import Report
from llmcompress.calibration.collect import capture_inputs
from llmcompress.calibration.fisher import token_losses
from llmcompress.errors import InputError
from llmcompress.types import Site

__all__ = ["DeepDensity", "SingularDensity", "SingularDensityOptions", "fit_together", "jacobian_dimension",
           "levina_bickel", "perturbation_rule", "slope_dimension", "two_nn", "wasserstein1"]  # fmt: skip

REPLACED = 8  # of so many tokens one is replaced in the mildest corruption


class SingularDensityOptions(BaseModel, extra="forbid"):
    axes: int = Field(default=12, ge=1, description="leading principal axes, whitened, that the density is of")
    latent: int = Field(default=12, ge=1, description="latent dimension: at or a little above the data's own")
    perturbations: list[float] = Field(
        default=[0.0, 0.1, 0.3], min_length=1, description="sizes of the noise, in deviations of an axis; all are tried"
    )
    window: int = Field(default=128, ge=2, description="tokens of a row of text that is scored as a whole")
    steps: int = Field(default=1500, ge=1, description="training steps of a density")


class SingularDensity:
    """The analysis: nats a held-out token, detection of corrupted text, and dimensions, next to simple baselines."""

    Options: ClassVar[type[SingularDensityOptions]] = SingularDensityOptions
    trains: ClassVar[bool] = True  # the whole model is needed: it is run on corrupted text

    def __init__(self, options: SingularDensityOptions) -> None:
        self.options = options

    def analyze(self, subject: Subject) -> Report:
        """Of the first site's input: fitted on the first half of the text, measured on the other."""
        model, tokens = subject.trainable()
        options, site = self.options, subject.sites[0]
        half = len(tokens) // 2
        rows = subject.inputs[site.name]
        train, test = rows.split([half * tokens.shape[1], len(rows) - half * tokens.shape[1]])
        if half < 1 or tokens.shape[1] < options.window or options.axes > rows.shape[1]:
            raise InputError(
                f"needs two sequences of {options.window} tokens at least and at most {rows.shape[1]} axes"
            )
        axes = _PrincipalAxes(train, options.axes)
        x, held_out = axes(train), axes(test)
        report = Report(
            f"{site.name}: {options.axes} leading axes, {axes.share:.1%} of the variance",
            ["measure", "deep density", "one Gaussian", "model's loss"],
        )
        count = len(options.perturbations)
        models = [DeepDensity(options.latent, options.axes).to(x.device) for _ in range(count)]
        fit_together(models, [x] * count, options.perturbations, options.steps, seeds=[subject.seed] * count)
        mean, covariance = x.mean(0), torch.cov(x.T) + 1e-6 * torch.eye(options.axes, device=x.device)
        gaussian = torch.distributions.MultivariateNormal(mean, covariance)
        nats = [float(m.score(held_out, repeats=1).mean()) for m in models]
        for perturbation, value in zip(options.perturbations, nats, strict=True):
            plain = float(gaussian.log_prob(held_out).mean())
            report.add(f"nats a held-out token, perturbation {perturbation:g}", value, plain, None)
        best = models[max(range(count), key=nats.__getitem__)]
        areas = self._detection(model, tokens[half:], site, axes, best, gaussian, subject)
        for name, cells in areas.items():
            report.add(f"AUROC, {name}", *cells)
        self._dimensions(report, models[-1], x, held_out, subject.seed)
        report.findings = [
            f"best perturbation {options.perturbations[nats.index(max(nats))]:g}: "
            + ("noise does not help here" if nats.index(max(nats)) == 0 else "noise helps here"),
            "rank calibration rows by the model's loss: "
            + "; ".join(f"{name} {deep:.2f} by density, {loss:.2f} by loss" for name, (deep, _, loss) in areas.items()),
            "the estimates of dimension rest on different assumptions: set no rank from them",
        ]
        return report

    def _detection(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        site: Site,
        axes: _PrincipalAxes,
        density: DeepDensity,
        gaussian: torch.distributions.MultivariateNormal,
        subject: Subject,
    ) -> dict[str, tuple[float, float, float]]:
        """AUROC of bad rows by density, Mahalanobis distance and loss, for three kinds of corruption."""
        window = self.options.window
        clean = tokens[:, : tokens.shape[1] // window * window].reshape(-1, window)
        generator = torch.Generator(device=tokens.device).manual_seed(subject.seed)

        def scores(rows: Tensor) -> list[Tensor]:
            inputs, loss = _run(model, rows, site)
            x = axes(inputs)
            each = (density.score(x, particles=16, repeats=1), gaussian.log_prob(x))
            return [-part.view(len(rows), window).mean(1) for part in each] + [loss]

        shuffled = torch.stack([row[torch.randperm(window, generator=generator, device=row.device)] for row in clean])
        random = torch.randint(int(tokens.max()) + 1, clean.shape, generator=generator, device=clean.device)
        replaced = torch.rand(clean.shape, generator=generator, device=clean.device) < 1 / REPLACED
        corrupted = {
            "shuffled": shuffled,
            "random tokens": random,
            f"one in {REPLACED} replaced": torch.where(replaced, random, clean),
        }
        normal, found = scores(clean), {}
        for name, rows in corrupted.items():
            pairs = zip(normal, scores(rows), strict=True)
            found[name] = tuple(_auroc(good, bad) for good, bad in pairs)
        return found  # type: ignore[return-value]

    def _dimensions(self, report: Report, model: DeepDensity, x: Tensor, held_out: Tensor, seed: int) -> None:
        spectrum = torch.linalg.svdvals(x.double() - x.double().mean(0)).square()
        linear = int((spectrum.cumsum(0) < 0.95 * spectrum.sum()).sum()) + 1
        few = held_out[:1000]
        report.add("dimension, Jacobian", jacobian_dimension(model, few), None, None)
        slope = slope_dimension(x, few, self.options.latent, SCALES, self.options.steps, seed=seed)
        report.add("dimension, slope over perturbations", slope, None, None)
        report.add("dimension, TwoNN", two_nn(held_out[:4000]), None, None)
        report.add("dimension, Levina-Bickel", levina_bickel(held_out[:4000]), None, None)
        report.add("dimension, linear (95 % of the variance)", linear, None, None)


class _PrincipalAxes:
    """Maps rows (n, d) to their leading principal axes, each of unit deviation on the rows that it was made from."""

    def __init__(self, rows: Tensor, count: int) -> None:
        self.mean = rows.mean(0)
        centred = (rows - self.mean).double()
        squares, vectors = torch.linalg.eigh(centred.T @ centred / (len(rows) - 1))
        self.share = float(squares[-count:].sum() / squares.sum())
        deviations = squares[-count:].clamp_min(1e-12 * float(squares[-1])).sqrt()
        self.basis = (vectors[:, -count:] / deviations).flip(1).float()

    def __call__(self, rows: Tensor) -> Tensor:
        return (rows - self.mean) @ self.basis


@torch.no_grad()
def _run(model: PreTrainedModel, rows: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """The site's input for every token, (rows * length, d) float32, and each row's mean next-token loss."""
    inputs: list[Tensor] = []
    losses = []
    with capture_inputs(model, [site], lambda _, x: inputs.append(x.float())):
        for part in rows.split(8):
            logits = model(input_ids=part, use_cache=False).logits
            losses.append(token_losses(logits, part) / (part.shape[1] - 1))
    return torch.cat(inputs), torch.cat(losses)


def _auroc(good: Tensor, bad: Tensor) -> float:
    labels = [0] * len(good) + [1] * len(bad)
    return float(roc_auc_score(labels, torch.cat((good, bad)).cpu()))
