"""Covariances of delay-embedded series, and classifiers of texts by them (arXiv 2302.04508).

A window of activations is a series over token positions. Its covariance forgets the order of the tokens; that of the
series stacked with `order` - 1 delayed copies of itself, `lag` positions apart, holds the autocovariances too: the
block-Toeplitz matrix of the Yule-Walker equations. Windows are told apart on the manifold of these matrices, so
that the basis of the channels does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from llmcompress.backends.geometry.delay_embedding import (
    MDOPResult,
    augment,
    augmented_covariance,
    mdop,
    select_order_lag,
    yule_walker,
)
from llmcompress.backends.geometry.series_classifiers import ACMClassifier, AugmentedCovariance
from llmcompress.backends.ports import Subject
from llmcompress.backends.report import Report
from llmcompress.backends.texts import TARGET, TextOptions
from llmcompress.errors import InputError

__all__ = ["ACMClassifier", "ACMDomains", "ACMOptions", "AugmentedCovariance", "MDOPResult", "augment",
           "augmented_covariance", "mdop", "select_order_lag", "yule_walker"]  # fmt: skip

FOLDS = 3
SHRINKAGE = 0.02


class ACMOptions(TextOptions):
    window: int = Field(default=64, ge=8, description="tokens in a window")
    channels: int = Field(default=6, ge=1, description="principal axes of the site's input, fitted on training windows")
    orders: list[int] = Field(default=[2, 3], min_length=1, description="orders compared with the plain covariance")


class ACMDomains:
    """The analysis: which text a window is from, and whether its tokens are in order, next to the plain covariance."""

    Options: ClassVar[type[ACMOptions]] = ACMOptions

    def __init__(self, options: ACMOptions) -> None:
        self.options = options

    @property
    def texts(self) -> dict[str, str]:
        """Further texts that the analysis is shown."""
        return self.options.texts

    def analyze(self, subject: Subject) -> Report:
        """Accuracies of tangent-space SVMs over held-out windows of each site's input, by order."""
        options = self.options
        orders = [1, *[order for order in options.orders if order != 1]]
        report = Report(
            f"windows of {options.window} tokens, {options.channels} channels: held-out accuracy by order of the "
            "covariance",
            ["site", "told apart", *(f"order {p}" if p > 1 else "plain covariance" for p in orders)],
        )
        for site in subject.sites:
            texts = {"analysed text": subject.inputs[site.name]}
            texts |= {name: other.inputs[site.name] for name, other in subject.others.items()}
            target = texts.pop(TARGET, None)
            windows = {name: windows_of(rows, options.window) for name, rows in texts.items()}
            generator = subject.generator()
            shuffled = torch.stack([part[torch.randperm(len(part), generator=generator, device=part.device)]
                                    for part in windows["analysed text"]])  # fmt: skip
            ordered = {"in order": windows["analysed text"], "shuffled": shuffled}
            report.add(site.name, "token order", *(self._accuracy(ordered, p, subject.seed) for p in orders))
            if len(windows) > 1:
                scores = [self._accuracy(windows, p, subject.seed) for p in orders]
                report.add(site.name, "domains", *scores)
                if target is not None:
                    best = orders[int(np.argmax(scores))]
                    report.findings.append(f"{site.name}: {self._posterior(windows, target, best, subject.seed)}")
        report.findings.append(
            "delays help where they beat the plain covariance in the same row; token order is a check of the stream"
        )
        return report

    def _accuracy(self, windows: dict[str, Tensor], order: int, seed: int) -> float:
        """Over folds of contiguous windows; the channels are fitted on the training windows alone."""
        X = torch.cat(list(windows.values())).double().cpu()
        y = np.repeat(list(windows), [len(part) for part in windows.values()])
        hits = 0
        for train, test in StratifiedKFold(FOLDS).split(X, y):
            found = _Windows(X[train], y[train], self.options.channels, order, seed)
            hits += int((found.predict(X[test]) == y[test]).sum())
        return hits / len(y)

    def _posterior(self, windows: dict[str, Tensor], target: Tensor, order: int, seed: int) -> str:
        X = torch.cat(list(windows.values())).double().cpu()
        y = np.repeat(list(windows), [len(part) for part in windows.values()])
        asked = windows_of(target, self.options.window).double().cpu()
        found = _Windows(X, y, self.options.channels, order, seed).posterior(asked).mean(0)
        shares = ", ".join(f"{name} {share:.2f}" for name, share in zip(sorted(windows), found, strict=True))
        return f"the target's windows at order {order}: {shares}"


class _Windows:
    """A linear SVM of windows (N, T, d), in the leading principal axes of those that it was fitted to."""

    def __init__(self, X: Tensor, y: np.ndarray, channels: int, order: int, seed: int) -> None:
        rows = X.flatten(0, 1)
        self.mean = rows.mean(0)
        _, vectors = torch.linalg.eigh(torch.cov(rows.T))
        self.basis = vectors[:, -min(channels, rows.shape[1]) :]
        one: dict[str, Sequence[Any]] = {"C": (1.0,), "kernel": ("linear",)}
        self.model = ACMClassifier(order, 1, param_grid=one, shrinkage=SHRINKAGE, random_state=seed)
        self.model.fit(self._series(X), y)

    def _series(self, X: Tensor) -> np.ndarray:
        return ((X - self.mean) @ self.basis).mT.numpy()

    def predict(self, X: Tensor) -> np.ndarray:
        return self.model.predict(self._series(X))

    def posterior(self, X: Tensor) -> np.ndarray:
        """Probabilities (N, classes), classes sorted."""
        return self.model.predict_proba(self._series(X))


def windows_of(rows: Tensor, window: int) -> Tensor:
    """(N, window, d) of rows (n, d), in their order; what is left over is dropped. InputError below two windows a
    fold."""
    count = len(rows) // window
    if count < 2 * FOLDS:
        raise InputError(f"{len(rows)} tokens give {count} windows of {window}; at least {2 * FOLDS} are needed")
    return rows[: count * window].view(count, window, -1)
