"""Do decisions that rest on a model's embeddings survive its compression? Certified by randomised smoothing.

Linear heads on mean-pooled last hidden states are trained under noise, on the whole embedding or on its even and odd
coordinates (dual smoothing, arXiv 2404.09586), and the radius that is certified for each text is compared with how far
compression moves its embedding. Source of the comparison: this project's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.backends.analysis.smoothed_classifiers import (
    Certificate,
    DualSmoothedClassifier,
    SmoothedClassifier,
    checkerboard,
    even_odd,
    fill_neighbours,
)
from llmcompress.backends.analysis.smoothing_certificates import (
    clopper_pearson,
    dual_radius,
    dual_radius_multiclass,
    radius_cap,
)
from llmcompress.backends.checks import choose
from llmcompress.backends.ports import Subject
from llmcompress.backends.report import Report
from llmcompress.errors import InputError
from llmcompress.models.load import load_model, locate

__all__ = [
    "Certificate",
    "DualSmoothedClassifier",
    "DualSmoothing",
    "DualSmoothingOptions",
    "SmoothedClassifier",
    "checkerboard",
    "clopper_pearson",
    "dual_radius",
    "dual_radius_multiclass",
    "embed",
    "embedding_robustness",
    "even_odd",
    "fill_neighbours",
    "radius_cap",
]

Method = Literal["rs", "dual"]
LR, STEPS = 5e-3, 400  # of AdamW on a head
COLUMNS = ["method", "sigma", "mean radius", "accuracy", "median drift", "certified share", "centred drift",
           "certified share "]  # fmt: skip


class DualSmoothingOptions(BaseModel, extra="forbid"):
    labels: str | None = Field(
        default=None, description="texts and their classes: a .jsonl file of {text, label}; none: passages as classes"
    )
    compare: str | None = Field(default=None, description="the compressed model: a folder or hub id; none: no drift")
    sigma: list[float] = Field(default=[0.5, 1.0, 2.0], min_length=1, description="noise, in standard deviations")
    window: int = Field(
        default=32,
        ge=1,
        description="tokens of a text, at most; without labels every sequence is a class of such texts",
    )
    draws: int = Field(default=1000, ge=1, description="noise draws behind a certificate")
    alpha: float = Field(default=1e-3, gt=0, lt=1, description="chance of a wrong certificate")
    center: bool = Field(default=True, description="also tell the drift without the mean of the other texts' drifts")


def embed(model: PreTrainedModel, texts: Tensor | Sequence[Tensor], batch: int = 16) -> Tensor:
    """Mean-pooled last hidden states, (n, d) float32, of texts (n, length) int64, or (length,) of several lengths."""
    body = model.base_model
    by_length: dict[int, list[int]] = {}
    for number, text in enumerate(texts):
        by_length.setdefault(len(text), []).append(number)
    found: dict[int, Tensor] = {}
    with torch.no_grad():
        for alike in by_length.values():
            for first in range(0, len(alike), batch):
                chosen = alike[first : first + batch]
                rows = torch.stack([texts[number] for number in chosen]).to(model.device)
                found |= zip(chosen, body(input_ids=rows).last_hidden_state.float().mean(1).cpu(), strict=True)
    return torch.stack([found[number] for number in range(len(texts))])


def read_labelled(path: Path) -> tuple[list[str], Tensor]:
    """The texts of a .jsonl file of {text, label}, and the number of each one's class, (n,) int64.

    InputError naming the line that is not so, or a file without two classes of three texts each.
    """
    texts, labels = [], []
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InputError(f"labels: {path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            text, label = row["text"], row["label"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str) or not text:
            raise InputError(f'{path}, line {number}: expected {{"text": "...", "label": ...}}')
        texts.append(text)
        labels.append(label)
    names = sorted({str(label) for label in labels})
    counts = [sum(str(label) == name for label in labels) for name in names]
    if len(names) < 2 or min(counts) < 3:
        raise InputError(
            f"{path}: needs two classes of three texts each at least; got {dict(zip(names, counts, strict=True))}"
        )
    return texts, torch.tensor([names.index(str(label)) for label in labels])


def embedding_robustness(
    reference: PreTrainedModel | Tensor,
    compressed: PreTrainedModel | Tensor | None,
    texts: Tensor | None,
    labels: Tensor,
    sigma: float,
    method: Method = "rs",
    center: bool = True,
    draws: int = 1000,
    alpha: float = 1e-3,
    seed: int = 0,
) -> Report:
    """Certified radii of a classifier on the reference's embeddings, against what compression moves them by.

    texts (n, length) int64 and labels (n,) int64; models may be given as their embeddings (n, d) of these texts, and
    `compressed` may be None. Every third text is for testing, the others train a linear head under noise of `sigma`.
    All embeddings are scaled by the reference's training mean and deviation, so that noise, radius and drift share one
    space. A share of decisions is certified: their radius exceeds the drift. InputError for fewer than two classes or
    labels that do not fit.
    """
    choose("method", method, ("rs", "dual"))
    before = _embedded(reference, texts)
    after = None if compressed is None else _embedded(compressed, texts)
    classes, targets = labels.unique(return_inverse=True)
    if len(labels) != len(before) or len(classes) < 2:
        raise InputError(f"{len(before)} texts need as many labels, of at least two classes; got {len(labels)} labels, "
                         f"{len(classes)} classes")  # fmt: skip
    if after is not None and after.shape != before.shape:
        raise InputError(f"the embeddings have shapes {tuple(before.shape)} and {tuple(after.shape)}: the "
                         "models differ in width")  # fmt: skip
    test = torch.arange(len(before)) % 3 == 2
    mean, deviation = before[~test].mean(0), before[~test].std(0).clamp_min(1e-6)
    z = (before - mean) / deviation
    generator = torch.Generator().manual_seed(seed)
    smoothed = _trained(z[~test], targets[~test], len(classes), sigma, method, generator)
    found = [smoothed.certify(x, 100, draws, alpha, generator=generator) for x in z[test]]
    radii = np.array([certificate.radius for certificate in found])
    right = np.array([c.label == int(t) for c, t in zip(found, targets[test], strict=True)])
    report = Report(f"decisions of a linear head under noise, {len(radii)} texts of {len(classes)} classes", COLUMNS)
    cells: list[float | None] = [None] * 4
    if after is not None:
        drift = ((after - before) / deviation)[test]
        cells[:2] = _against(radii, drift)
        if center:
            cells[2:] = _against(radii, drift - (drift.sum(0) - drift) / (len(drift) - 1))
    report.add(method, sigma, float(radii.mean()), float(right.mean()), *cells)
    return report


def _embedded(model: PreTrainedModel | Tensor, texts: Tensor | None) -> Tensor:
    if isinstance(model, Tensor):
        found = model.float()
    elif texts is None:
        raise InputError("a model needs the texts that it embeds")
    else:
        found = embed(model, texts)
    if found.ndim != 2 or not torch.isfinite(found).all():
        raise InputError("embeddings must be finite, (n, d)")
    return found


def _against(radii: np.ndarray, drift: Tensor) -> list[float]:
    """The median length of the drifts, and the share of decisions that are certain to survive them."""
    lengths = drift.norm(dim=1).numpy()
    return [float(np.median(lengths)), float((radii > lengths).mean())]


def _trained(
    z: Tensor, targets: Tensor, classes: int, sigma: float, method: Method, generator: torch.Generator
) -> SmoothedClassifier | DualSmoothedClassifier:
    if method == "rs":
        return SmoothedClassifier(_head(z, targets, classes, sigma, generator), classes, sigma)
    mask = even_odd(z.shape[1])
    halves = [_head(z[:, kept], targets, classes, sigma, generator) for kept in (mask, ~mask)]
    return DualSmoothedClassifier(halves[0], halves[1], mask, classes, sigma)


def _head(z: Tensor, targets: Tensor, classes: int, sigma: float, generator: torch.Generator) -> torch.nn.Linear:
    """A linear head that is trained on noised inputs, all of them at once, fresh noise each step."""
    head = torch.nn.Linear(z.shape[1], classes)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / z.shape[1] ** 0.5)
        head.bias.zero_()
    optimizer = torch.optim.AdamW(head.parameters(), lr=LR)
    with torch.enable_grad():
        for _ in range(STEPS):
            noised = z + sigma * torch.randn(z.shape, generator=generator)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(noised), targets).backward()
            optimizer.step()
    return head.requires_grad_(False)


class DualSmoothing:
    """The analysis: both kinds of smoothing, at several sizes of noise, against the drift of a compressed model."""

    Options: ClassVar[type[DualSmoothingOptions]] = DualSmoothingOptions
    trains: ClassVar[bool] = True  # the whole model is needed, for its last hidden states

    def __init__(self, options: DualSmoothingOptions) -> None:
        self.options = options

    def analyze(self, subject: Subject) -> Report:
        """Of which class is a text: those of `labels`, or of which of the calibration's sequences is it a part?"""
        options = self.options
        model, tokens = subject.trainable()
        texts, labels = self._labelled(subject) if options.labels is not None else self._passages(tokens)
        before = embed(model, texts)
        after = None
        if options.compare is not None:
            after = embed(load_model(locate(options.compare), dtype=torch.float32).to(model.device), texts)
        report = Report("", COLUMNS)
        for sigma in options.sigma:
            trials: list[tuple[Method, float]] = [("rs", sigma), ("dual", sigma), ("dual", sigma / 2**0.5)]
            for method, noise in trials:
                part = embedding_robustness(
                    before, after, None, labels, noise, method, options.center, options.draws, options.alpha,
                    subject.seed,
                )  # fmt: skip
                report.title = part.title
                report.rows += part.rows
        report.findings = _findings(report, after is not None, options.center)
        return report

    def _passages(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        window = self.options.window
        count = tokens.shape[1] // window
        if len(tokens) < 2 or count < 3:
            raise InputError(f"needs two sequences of three texts of {window} tokens each at least; got "
                             f"{tuple(tokens.shape)}: raise --samples or --length, or lower window")  # fmt: skip
        texts = tokens[:, : count * window].reshape(-1, window).cpu()
        return texts, torch.arange(len(tokens)).repeat_interleave(count)

    def _labelled(self, subject: Subject) -> tuple[list[Tensor], Tensor]:
        """The beginnings of the file's texts, shuffled: every third one is for testing."""
        if self.options.labels is None or subject.tokenizer is None:
            raise InputError("labelled texts need the model's tokenizer")
        texts, labels = read_labelled(Path(self.options.labels))
        rows = [torch.tensor(subject.tokenizer(text)["input_ids"][: self.options.window]) for text in texts]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(subject.seed)).tolist()
        return [rows[place] for place in order], labels[order]


def _findings(report: Report, compared: bool, center: bool) -> list[str]:
    best = {
        method: max(row[2] for row in report.rows if row[0] == method)  # type: ignore[type-var]
        for method in ("rs", "dual")
    }
    found = [f"mean radius at the best noise: whole inputs (rs) {best['rs']:.3f}, halves (dual) {best['dual']:.3f}"]
    if compared:
        column = "certified share " if center else "certified share"
        shares = [max(row[report.columns.index(column)] for row in report.rows if row[0] == m) for m in ("rs", "dual")]  # type: ignore[type-var]
        found.append(
            f"decisions certain to survive compression{', its common shift removed' if center else ''}: "
            f"rs {shares[0]:.0%}, dual {shares[1]:.0%}; dual needs two classifiers: use it only where it says more"
        )
    return found
