"""Classifiers of multichannel series by their augmented covariances, on pyriemann and scikit-learn (arXiv
2302.04508)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pyriemann.classification import MDM
from pyriemann.geometry.mean import mean_riemann
from pyriemann.geometry.tangentspace import tangent_space
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import SVC
from torch import Tensor

from llmcompress.backends.checks import choose
from llmcompress.backends.geometry.delay_embedding import (
    MDOPResult,
    augmented_covariance,
    checked_series,
    mdop,
    mdop_order_lag,
    select_order_lag,
)
from llmcompress.errors import InputError

METHODS = ("ts_svm", "mdm")
SELECTIONS = ("grid", "mdop", "mdop_nonuniform", "afnn")
MEAN_TOLERANCE, MEAN_ITERATIONS = 1e-6, 300  # pyriemann's own 50 do not do for large orders
GRID: dict[str, Sequence[Any]] = {
    "order": range(1, 11), "lag": range(1, 11), "C": (0.5, 1.0, 1.5), "kernel": ("linear", "rbf"),
}  # fmt: skip


class AugmentedCovariance(BaseEstimator, TransformerMixin):
    """Series (N, d, T) -> augmented covariances (N, m, m), numpy float64, as a scikit-learn transformer."""

    def __init__(self, order: int = 1, lag: int = 1, shrinkage: float = 0.0) -> None:
        self.order, self.lag, self.shrinkage = order, lag, shrinkage

    def fit(self, X: Any, y: Any = None) -> AugmentedCovariance:
        """Checks the series; there is nothing to learn."""
        checked_series(torch.as_tensor(X), self.order, self.lag)
        return self

    def transform(self, X: Any) -> np.ndarray:
        X = torch.as_tensor(X).double()
        return augmented_covariance(X, self.order, self.lag, self.shrinkage).cpu().numpy()


class TangentPlane(BaseEstimator, TransformerMixin):
    """Covariances (N, m, m) -> tangent vectors (N, m (m + 1) / 2) at the affine-invariant mean of those fitted."""

    def fit(self, X: np.ndarray, y: Any = None) -> TangentPlane:
        self.mean_ = mean_riemann(X, tol=MEAN_TOLERANCE, maxiter=MEAN_ITERATIONS)
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:
        found: np.ndarray = tangent_space(X, self.mean_, metric="riemann")
        return found


class ACMClassifier(BaseEstimator, ClassifierMixin):
    """Classes of series (N, d, T) by augmented covariances: an SVM in the tangent space at the training mean, or the
    nearest class mean (affine-invariant metric both).

    order, lag: whole numbers, or `grid`: chosen as `selection` says, from the training series alone. grid:
    cross-validated over `param_grid` (order, lag, C, kernel; 1..10 and the paper's); mdop: means over series of
    maximised derivatives; mdop_nonuniform: stacks the delayed channels that MDOP finds in the series of median
    order; afnn: mutual information and Cao's E1. taus: MDOP's candidates; share: of the training series that MDOP
    and afnn look at. After `fit`: order_, lag_, classes_. InputError for fewer than two classes, or where no order
    and lag fits the series.
    """

    def __init__(
        self,
        order: int | Literal["grid"] = "grid",
        lag: int | Literal["grid"] = "grid",
        method: str = "ts_svm",
        selection: str = "grid",
        param_grid: dict[str, Sequence[Any]] | None = None,
        cv: int = 3,
        random_state: int | None = None,
        shrinkage: float = 0.0,
        taus: Sequence[int] | None = None,
        share: float = 1.0,
    ) -> None:
        self.order, self.lag, self.method, self.selection = order, lag, method, selection
        self.param_grid, self.cv, self.random_state = param_grid, cv, random_state
        self.shrinkage, self.taus, self.share = shrinkage, taus, share

    # --- fitting -----------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any) -> ACMClassifier:
        choose("method", self.method, METHODS)
        choose("selection", self.selection, SELECTIONS)
        series, y = checked_series(torch.as_tensor(X).double(), 1, 1), np.asarray(y)
        self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise InputError(f"y must hold two classes at least; got {self.classes_.tolist()}")
        self._stack: MDOPResult | None = None
        self.__dict__.pop("_calibrated", None)
        self._choose(series, y)
        covariances = self._covariances(series, self.order_, self.lag_)
        self._model = self._classifier(self.C_, self.kernel_).fit(covariances, y)
        self._seen = (covariances, y)
        return self

    def _choose(self, series: Tensor, y: np.ndarray) -> None:
        grid = {**GRID, **(self.param_grid or {})}
        if self.method == "mdm":
            grid |= {"C": (1.0,), "kernel": ("linear",)}
        for name, given in (("order", self.order), ("lag", self.lag)):
            if given != "grid":
                grid[name] = (given,)
        if "grid" in (self.order, self.lag) and self.selection != "grid":
            found = dict(zip(("order", "lag"), self._selected(series), strict=True))
            grid |= {name: (value,) for name, value in found.items() if getattr(self, name) == "grid"}
        self.order_, self.lag_, self.C_, self.kernel_ = self._search(series, y, grid)

    def _selected(self, series: Tensor) -> tuple[int, int]:
        count = max(1, round(self.share * len(series)))
        chosen = np.random.default_rng(self.random_state).permutation(len(series))[:count]
        some = series[torch.from_numpy(np.sort(chosen))]
        if self.selection == "afnn":
            return select_order_lag(some, "afnn")
        results = [mdop(one.T.numpy(), self.taus) for one in some]
        if self.selection == "mdop_nonuniform":
            results.sort(key=lambda result: len(result.delays))
            self._stack = results[len(results) // 2]
        return mdop_order_lag(results, series.shape[2])

    def _search(self, series: Tensor, y: np.ndarray, grid: dict[str, Sequence[Any]]) -> tuple[int, int, float, str]:
        """The first best of the grid by mean accuracy over folds; each tangent space is made once for all its SVMs."""
        settings = list(itertools.product(grid["C"], grid["kernel"]))
        pairs = [
            pair for pair in itertools.product(grid["order"], grid["lag"]) if pair[0] > 1 or pair[1] == min(grid["lag"])
        ]
        if len(pairs) == len(settings) == 1:
            return (*pairs[0], *settings[0])
        best: tuple[float, tuple[int, int, float, str]] | None = None
        refused = ""
        for order, lag in pairs:
            try:
                covariances = self._covariances(series, order, lag)
            except InputError as error:
                refused = str(error)
                continue
            hits = np.zeros(len(settings))
            for train, test in self._folds().split(covariances, y):
                hits += self._hits(covariances, y, train, test, settings)
            if best is None or hits.max() > best[0]:
                best = (float(hits.max()), (order, lag, *settings[int(hits.argmax())]))
        if best is None:
            raise InputError(f"no order and lag of the grid fits these series: {refused}")
        return best[1]

    def _hits(
        self, C: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, settings: list[tuple[float, str]]
    ) -> list[int]:
        if self.method == "mdm":
            return [int((MDM(metric="riemann").fit(C[train], y[train]).predict(C[test]) == y[test]).sum())]
        tangent = TangentPlane().fit(C[train])
        known, asked = tangent.transform(C[train]), tangent.transform(C[test])
        fits = [SVC(C=c, kernel=kernel).fit(known, y[train]) for c, kernel in settings]
        return [int((fit.predict(asked) == y[test]).sum()) for fit in fits]

    def _folds(self) -> StratifiedKFold:
        return StratifiedKFold(self.cv, shuffle=True, random_state=self.random_state or 0)

    def _classifier(self, C: float, kernel: str) -> MDM | Pipeline:
        if self.method == "mdm":
            return MDM(metric="riemann")
        return make_pipeline(TangentPlane(), SVC(C=C, kernel=kernel))

    def _covariances(self, series: Tensor, order: int, lag: int) -> np.ndarray:
        if self._stack is not None:
            last = series.shape[2] - max(self._stack.delays)
            parts = zip(self._stack.channels, self._stack.delays, strict=True)
            series = torch.stack([series[:, channel, tau : tau + last] for channel, tau in parts], dim=1)
            order = lag = 1
        return AugmentedCovariance(order, lag, self.shrinkage).transform(series)

    # --- predicting --------------------------------------------------------------------------------------------------

    def predict(self, X: Any) -> np.ndarray:
        return self._model.predict(self._covariances(torch.as_tensor(X).double(), self.order_, self.lag_))

    def predict_proba(self, X: Any) -> np.ndarray:
        """(N, classes), in the order of `classes_`; of the SVM by a sigmoid fitted to held-out folds."""
        covariances = self._covariances(torch.as_tensor(X).double(), self.order_, self.lag_)
        if self.method == "mdm":
            return self._model.predict_proba(covariances)
        if not hasattr(self, "_calibrated"):
            calibrated = CalibratedClassifierCV(self._model, cv=self._folds(), ensemble=False)
            self._calibrated = calibrated.fit(*self._seen)
        return self._calibrated.predict_proba(covariances)
