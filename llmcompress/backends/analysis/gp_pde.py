"""Spectral-mixture Gaussian processes: high-frequency equations (GP-HM, arXiv 2311.04465), and unknown series.

As an analysis: a head's mean attention logit by relative distance, three quarters of it hidden and filled in. The model
knows its own rotary frequencies; a ridge on these is the baseline that a spectrum learnt from the data has to face.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from sklearn.linear_model import RidgeCV
from torch import Tensor, nn

from llmcompress.backends.analysis.depth_profile import depth_profile
from llmcompress.backends.analysis.gp_hm import GPHM, FitLog
from llmcompress.backends.analysis.gp_series import SeriesFit, fit_series
from llmcompress.backends.analysis.spectral_kernels import KINDS, spectral_kernel
from llmcompress.backends.ports import Subject
from llmcompress.backends.report import Curve, Report
from llmcompress.errors import InputError
from llmcompress.models.structure import analyse
from llmcompress.types import Site

__all__ = [
    "GPHM",
    "GPPDE",
    "FitLog",
    "GPPDEOptions",
    "SeriesFit",
    "fit_series",
    "mean_attention_logits",
    "spectral_kernel",
]  # fmt: skip

RIDGES = (1e-4, 1e-2, 1.0)


class GPPDEOptions(BaseModel, extra="forbid"):
    signal: Literal["positional_attention", "depth_profile"] = Field(
        default="positional_attention", description="mean attention logits by distance, or truncation errors by block"
    )
    ratio: float = Field(default=0.3, gt=0, lt=1, description="depth_profile: share of the values removed")
    heads: int = Field(default=4, ge=1, description="heads of the block that are looked at")
    distances: int = Field(default=256, ge=8, description="relative distances, from 0 on")
    seen: int = Field(default=64, ge=4, description="distances whose logit is shown; the others are filled in")


class GPPDE:
    """The analysis of positional attention; `GPHM` solves equations and `fit_series` fills in any series alone."""

    Options: ClassVar[type[GPPDEOptions]] = GPPDEOptions
    trains: ClassVar[bool] = True  # the whole model is needed, for its rotary embedding

    def __init__(self, options: GPPDEOptions) -> None:
        self.options = options

    def analyze(self, subject: Subject) -> Report:
        """Relative errors on hidden distances, head by head, at the first of the subject's blocks; or the profile."""
        if self.options.signal == "depth_profile":
            return depth_profile(subject, self.options.ratio)
        model, tokens = subject.trainable()
        options = self.options
        if options.seen >= options.distances or options.distances > tokens.shape[1]:
            raise InputError(f"seen < distances <= the sequences' {tokens.shape[1]} tokens is needed; got "
                             f"{options.seen}, {options.distances}")  # fmt: skip
        block = subject.sites[0].block
        sites = {site.role: site for site in analyse(model).in_block(block)}
        if not {"q", "k"} <= sites.keys():
            raise InputError(f"block {block} has no query and key projections of its own")
        x = subject.inputs.get(sites["q"].input)
        if x is None:
            raise InputError(f"the analysis reads the input of {sites['q'].name}: choose it by --site")
        logits = mean_attention_logits(model, sites, x.view(*tokens.shape, -1), options.distances)[: options.heads]
        draw = subject.generator()
        seen = torch.zeros(options.distances, dtype=torch.bool, device=logits.device)
        seen[torch.randperm(options.distances, generator=draw, device=logits.device)[: options.seen]] = True
        filled = {kind: fit_series(logits, seen, kind).mean for kind in KINDS}
        filled["linear"] = _interpolated(logits, seen)
        filled["rotary ridge"] = _ridge_on_rotary(model, logits, seen)
        report = Report(
            f"mean attention logit by distance, block {block}: relative error of {options.distances - options.seen} "
            f"distances from {options.seen} others",
            ["head", *filled],
        )
        for head in range(len(logits)):
            report.add(head, *[_relative(fit[head], logits[head], seen) for fit in filled.values()])
        means = {name: float(np.mean(report.column(name))) for name in filled}
        best = min(KINDS, key=lambda kind: means[kind])
        report.findings.append(
            f"mean error: best spectral kernel {best} {means[best]:.3f}, linear {means['linear']:.3f}, a ridge on the "
            f"model's own rotary frequencies {means['rotary ridge']:.3f}"
            + (
                ": use that one, a learnt spectrum is for unknown frequencies"
                if means["rotary ridge"] < means[best]
                else ""
            )
        )
        report.x_label, report.y_label = "distance", "mean logit, head 0"
        distances = list(map(float, range(options.distances)))
        report.curves = [Curve("measured", distances, logits[0].tolist())]
        report.curves += [Curve(name, distances, filled[name][0].tolist()) for name in (best, "rotary ridge")]
        return report


def mean_attention_logits(model: nn.Module, sites: dict[str, Site], x: Tensor, distances: int) -> Tensor:
    """The mean of q_i · k_(i - j) / sqrt(head size) over all i, by distance j < distances: (heads, distances) float64.

    x (sequences, length, d): the input of the block's query and key projections, `sites` by role. Rotary embeddings and
    norms of queries and keys are applied as the model does. InputError for a model without a rotary embedding.
    """
    rotary = getattr(getattr(model, "base_model", model), "rotary_emb", None)
    if rotary is None or not hasattr(rotary, "inv_freq"):
        raise InputError("positional attention is that of rotary embeddings, and this model has none")
    size = 2 * len(rotary.inv_freq)
    attention = model.get_submodule(sites["q"].name.rpartition(".")[0])
    total = torch.zeros(0, dtype=torch.float64, device=x.device)
    with torch.no_grad():
        positions = torch.arange(x.shape[1], device=x.device)[None]
        cosine, sine = (part.float() for part in rotary(x, positions))
        for row in x:
            states = {role: model.get_submodule(sites[role].name)(row).view(len(row), -1, size) for role in ("q", "k")}
            for role, norm in (("q", "q_norm"), ("k", "k_norm")):
                if hasattr(attention, norm):
                    states[role] = getattr(attention, norm)(states[role])
            q, k = (_rotated(states[role].float(), cosine[0], sine[0]).transpose(0, 1) for role in ("q", "k"))
            k = k.repeat_interleave(len(q) // len(k), dim=0)
            logits = (q @ k.transpose(1, 2)).double() / math.sqrt(size)
            means = torch.stack([logits.diagonal(-j, 1, 2).mean(1) for j in range(distances)], dim=1)
            total = total + means / len(x) if total.numel() else means / len(x)
    return total


def _rotated(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """states (length, heads, size) turned by their positions, halves of the size as real and imaginary parts."""
    half = states.shape[-1] // 2
    turned = torch.cat((-states[..., half:], states[..., :half]), -1)
    return states * cosine[:, None] + turned * sine[:, None]


def _relative(found: Tensor, exact: Tensor, seen: Tensor) -> float:
    hidden = exact[~seen]
    return float((found[~seen] - hidden).norm() / (hidden - hidden.mean()).norm())


def _interpolated(values: Tensor, seen: Tensor) -> Tensor:
    x = np.arange(values.shape[1])
    known = seen.cpu().numpy()
    rows = [np.interp(x, x[known], row[known]) for row in values.cpu().numpy()]
    return torch.tensor(np.stack(rows), device=values.device)


def _ridge_on_rotary(model: Any, values: Tensor, seen: Tensor) -> Tensor:
    """Least squares on the cosines and sines of the model's frequencies; the ridge by leave-one-out errors."""
    frequencies = model.base_model.rotary_emb.inv_freq.double().to(values.device)
    angles = torch.arange(values.shape[1], device=values.device, dtype=torch.float64)[:, None] * frequencies
    features = torch.cat((angles.cos(), angles.sin()), 1)
    ridge = RidgeCV(alphas=RIDGES, alpha_per_target=True).fit(features[seen].cpu(), values[:, seen].T.cpu())
    return torch.tensor(ridge.predict(features.cpu()).T, device=values.device)
