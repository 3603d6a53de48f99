"""The top eigenvector of a stream of rows in one pass, heavy rows kept exactly (arXiv 2412.11963, 2408.10332).

Rows a_1..a_n in R^d; the leading right singular vector of the matrix that they form, from O(h d) numbers: the h rows of
largest norm as they are, and a block power method over all others. Rows in random order; for any order there is Oja's
rule over a grid of rates (Price and Xun), which needs a far larger gap and can fail without a sign of it where there is
none, or where few rows hold the mass.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from torch import Tensor

from llmcompress.backends.checks import checked_matrix, choose, generator_for
from llmcompress.backends.ports import Subject
from llmcompress.backends.report import Report
from llmcompress.backends.streaming.baselines import frequent_directions, oja_grid, price_xun, row_norm_sample
from llmcompress.backends.streaming.oja import Oja, default_etas
from llmcompress.errors import InputError

__all__ = [
    "StreamingTopEigenvector",
    "TopEigenvector",
    "TopEigenvectorOptions",
    "frequent_directions",
    "oja_grid",
    "price_xun",
    "row_norm_sample",
]

SHUFFLES = 5  # orders of the rows that an analysis averages over
CANDIDATES = 3  # leading singular vectors of the store beside the power method's vector


class TopEigenvectorOptions(BaseModel, extra="forbid"):
    order: Literal["random", "arbitrary"] = Field(
        default="random", description="of the rows; the pipeline shuffles those of each batch"
    )
    max_heavy: int = Field(default=16, ge=0, description="rows of largest norm that are kept as they are")
    holdout: float = Field(default=0.25, gt=0, lt=1, description="last part of the stream, which weighs the candidates")


class StreamingTopEigenvector(BaseEstimator):
    """Top right singular vector of rows that `partial_fit` sees once, in chunks of any size.

    order: "random" (needs n_rows) or "arbitrary" (Oja on the rates `etas`). max_heavy: rows kept. heavy_polylog: a row
    is heavy above ||A||_F² / (d polylog), ln d if None; more of them than slots set heavy_overflow_. n_blocks: power
    steps, ceil(1.5 ln d) if None. holdout: last part of the stream, that weighs the candidates. select: "ritz", the
    best combination of the candidates, or "best", the best of them. growth_threshold: Oja's least log growth, 10 ln d
    if None.
    After `finalize()`: component_ (d,), unit, in the rows' dtype; eigenvalue_, an estimate of sigma_1²; n_heavy_,
    heavy_overflow_, status_ ("ok" or "failed", with a zero component_ only if every row was zero), state_floats_.
    O(d) a row beside the store; sums in float64. InputError for bad arguments; NotFittedError before any row.
    """

    def __init__(
        self, order: str = "random", n_rows: int | None = None, max_heavy: int = 32, heavy_polylog: float | None = None,
        n_blocks: int | None = None, holdout: float = 0.25, select: str = "ritz", etas: Sequence[float] | None = None,
        growth_threshold: float | None = None, random_state: int | torch.Generator | None = 0,
    ) -> None:  # fmt: skip
        self.order, self.n_rows, self.max_heavy, self.heavy_polylog = order, n_rows, max_heavy, heavy_polylog
        self.n_blocks, self.holdout, self.select, self.etas = n_blocks, holdout, select, etas
        self.growth_threshold, self.random_state = growth_threshold, random_state

    def partial_fit(self, X: Tensor, y: Any = None) -> StreamingTopEigenvector:
        """The next rows X (b, d), float32 or float64."""
        self._dtype = torch.as_tensor(X).dtype
        X = checked_matrix(X)
        if not hasattr(self, "d_"):
            self._begin(X.shape[1], X.device)
        if X.shape[1] != self.d_:
            raise InputError(f"rows must have {self.d_} entries like those before; got {X.shape[1]}")
        if self.order == "arbitrary":
            self._oja.update(X)
            self.n_seen_ += len(X)
            return self
        if self.n_seen_ + len(X) > self.n_rows:  # type: ignore[operator]
            raise InputError(f"more rows than n_rows = {self.n_rows}")
        while len(X):
            room = next(edge for edge in self._edges if edge > self.n_seen_) - self.n_seen_
            self._consume(X[:room])
            X = X[room:]
        return self

    def _begin(self, d: int, device: torch.device) -> None:
        choose("order", self.order, ("random", "arbitrary"))
        choose("select", self.select, ("ritz", "best"))
        if not 0 < self.holdout < 1:
            raise InputError(f"holdout must be in (0, 1); got {self.holdout}")
        if self.max_heavy < 0:
            raise InputError(f"max_heavy must not be negative; got {self.max_heavy}")
        self.d_, self.n_seen_ = d, 0
        generator = generator_for(self.random_state, device)
        start = torch.randn(d, generator=generator, dtype=torch.float64, device=device)
        if self.order == "arbitrary":
            etas = default_etas() if self.etas is None else self.etas
            self._oja = Oja(torch.as_tensor(etas, dtype=torch.float64, device=device), start)
            return
        if self.n_rows is None or self.n_rows < 1:
            raise InputError("order='random' needs n_rows, the length of the stream")
        blocks = self.n_blocks if self.n_blocks is not None else max(1, math.ceil(1.5 * math.log(d)))
        if not 1 <= blocks <= self.n_rows:
            raise InputError(f"n_blocks must be between 1 and n_rows = {self.n_rows}; got {blocks}")
        self._frozen_at = max(1, int((1 - self.holdout) * self.n_rows))
        inner = {math.ceil(self._frozen_at * (i + 1) / blocks) for i in range(blocks)}
        self._edges = sorted(inner | {self._frozen_at, self.n_rows})
        self._z, self._y = start / start.norm(), torch.zeros_like(start)
        self._store, self._norms = start.new_zeros(0, d), start.new_zeros(0)
        self._light, self._hold, self._candidates = 0.0, 0.0, start.new_zeros(d, 0)
        self._moment = start.new_zeros(0, 0)
        self._large: list[float] = []  # norms² that may exceed the final threshold, the largest ones seen

    # -- the stream -------------------------------------------------------------------------------------------------

    def _consume(self, X: Tensor) -> None:
        """Rows of one block, or of the held-out part."""
        held_out = self.n_seen_ >= self._frozen_at
        light = self._keep_heavy(X)
        self.n_seen_ += len(X)
        mass = float(light.square().sum())
        if held_out:
            projected = light @ self._candidates
            self._moment += projected.T @ projected
            self._hold += mass
            return
        self._light += mass
        self._y += light.T @ (light @ self._z)
        if self.n_seen_ in self._edges:
            if float(self._y.norm()) > 0:
                self._z = self._y / self._y.norm()
            self._y = torch.zeros_like(self._y)
        if self.n_seen_ == self._frozen_at:
            self._freeze()

    def _keep_heavy(self, X: Tensor) -> Tensor:
        """The rows that do not enter the store, or leave it; a later chunk cannot change which rows those are."""
        norms = X.square().sum(1)
        self._note_large(norms)
        joined, joined_norms = torch.cat((self._store, X)), torch.cat((self._norms, norms))
        kept = torch.sort(joined_norms, descending=True, stable=True).indices[: self.max_heavy].sort().values
        light = torch.ones(len(joined), dtype=torch.bool, device=X.device)
        light[kept] = False
        self._store, self._norms = joined[kept], joined_norms[kept]
        return joined[light]

    def _note_large(self, norms: Tensor) -> None:
        largest = norms.topk(min(len(norms), self.max_heavy + 1)).values.tolist()
        self._large = sorted(self._large + largest, reverse=True)[: self.max_heavy + 1]

    def _freeze(self) -> None:
        """Candidates: the power method's vector and the store's leading singular vectors."""
        vectors = torch.linalg.svd(self._store, full_matrices=False)[2][:CANDIDATES] if len(self._store) else None
        stacked = self._z[:, None] if vectors is None else torch.cat((self._z[:, None], vectors.T), dim=1)
        self._raw = stacked
        u, s, _ = torch.linalg.svd(stacked, full_matrices=False)
        self._candidates = u[:, s > 1e-8 * s[0]]
        self._moment = stacked.new_zeros(self._candidates.shape[1], self._candidates.shape[1])

    # -- the result -------------------------------------------------------------------------------------------------

    def finalize(self) -> StreamingTopEigenvector:
        if not hasattr(self, "d_"):
            raise NotFittedError("no row was seen: call partial_fit first")
        if self.order == "arbitrary":
            return self._finalize_oja()
        if self.n_seen_ < self.n_rows:  # type: ignore[operator]
            warnings.warn(f"{self.n_seen_} of {self.n_rows} rows seen: finalised early", UserWarning, stacklevel=2)
        if self._candidates.shape[1] == 0:
            self._freeze()
        C = self._candidates
        stored = self._store @ C
        light = self._light + self._hold
        gram = (light / self._hold if self._hold > 0 else 0.0) * self._moment + stored.T @ stored
        total = light + float(self._norms.sum())
        self.state_floats_ = self._store.numel() + 2 * self.d_ + C.numel() + self._moment.numel()
        self._count_heavy(total)
        self.status_ = "ok" if total > 0 else "failed"
        values, vectors = torch.linalg.eigh(gram)
        component = C @ vectors[:, -1]
        if self.select == "best":
            inside = C.T @ (self._raw / self._raw.norm(dim=0).clamp_min(torch.finfo(C.dtype).tiny))
            quotients = ((gram @ inside) * inside).sum(0)
            component = C @ inside[:, int(quotients.argmax())]
            values = quotients.max()[None]
        self._set(component if total > 0 else torch.zeros_like(component))
        self.eigenvalue_ = float(values[-1])
        return self

    def _count_heavy(self, total: float) -> None:
        polylog = self.heavy_polylog or max(1.0, math.log(self.d_))
        if self.n_seen_ <= self.d_ * polylog:
            self.n_heavy_, self.heavy_overflow_ = len(self._store), False
            return
        threshold = total / (self.d_ * polylog)
        heavy = sum(norm >= threshold for norm in self._large)
        self.heavy_overflow_ = heavy > self.max_heavy
        self.n_heavy_ = min(heavy, self.max_heavy)

    def _set(self, component: Tensor) -> None:
        length = component.norm()
        self.component_ = (component / length if length > 0 else component).to(self._dtype)

    def _finalize_oja(self) -> StreamingTopEigenvector:
        threshold = 10 * math.log(self.d_) if self.growth_threshold is None else self.growth_threshold
        vector, rate = self._oja.smallest_growing(threshold)
        self.status_ = "failed" if rate is None else "ok"
        self._set(vector)
        self.n_heavy_, self.heavy_overflow_ = 0, False
        self.state_floats_ = self._oja.vectors.numel()
        growth = self._oja.growth_of(rate)
        self.eigenvalue_ = growth / rate if rate else math.nan
        return self


# --- the ports -------------------------------------------------------------------------------------------------------


class TopEigenvector:
    """The stream port, and an analysis: correlation with the Gram's eigenvector, with the heavy store and without."""

    Options: ClassVar[type[TopEigenvectorOptions]] = TopEigenvectorOptions

    def __init__(self, options: TopEigenvectorOptions) -> None:
        self.options = options

    def start(self, rows: int, d: int, generator: torch.Generator) -> None:
        self._stream, self._total = self._estimator(rows, generator), 0.0

    def _estimator(self, rows: int, generator: torch.Generator) -> StreamingTopEigenvector:
        options = self.options
        return StreamingTopEigenvector(
            options.order, rows, options.max_heavy, holdout=options.holdout, random_state=generator
        )

    def update(self, rows: Tensor) -> None:
        self._total += float(rows.double().square().sum())
        self._stream.partial_fit(rows)

    def finish(self) -> list[str]:
        found = self._stream.finalize()
        if found.status_ == "failed":
            return ["top direction: not found"]
        share = f"{found.eigenvalue_ / self._total:.1%} of the energy"
        heavy = f"more than {found.n_heavy_}" if found.heavy_overflow_ else str(found.n_heavy_)
        return [f"top direction holds {share}; {heavy} heavy tokens; {found.state_floats_} numbers kept"]

    def analyze(self, subject: Subject) -> Report:
        """|cosine|² with the leading eigenvector of the Gram; numbers kept over d²."""
        report = Report(
            f"top direction in one pass: squared correlation with the Gram's leading eigenvector, {SHUFFLES} orders",
            ["rows of", "gap", "heavy", "with store", "without", "Oja, median rate", "Frequent Directions",
             "numbers kept / d²"],
        )  # fmt: skip
        streams = dict(subject.inputs) | {f"output of block {i}": rows for i, rows in subject.residual.items()}
        generator = subject.generator()
        without = []
        for name, rows in streams.items():
            rows = rows.double()
            values, vectors = torch.linalg.eigh(rows.T @ rows)
            top = vectors[:, -1]
            kept = []
            for _ in range(SHUFFLES):
                shuffled = rows[torch.randperm(len(rows), generator=generator, device=rows.device)]
                found = self._estimator(len(rows), generator).partial_fit(shuffled).finalize()
                bare = StreamingTopEigenvector("random", len(rows), 0, random_state=generator)
                bare.partial_fit(shuffled).finalize()
                kept.append([float((v @ top).square()) for v in (found.component_, bare.component_)])
            cells = torch.tensor(kept).mean(0).tolist()
            oja = oja_grid(shuffled / rows.norm(dim=1).mean(), default_etas())
            sketch = torch.linalg.svd(frequent_directions(shuffled, 9), full_matrices=False)[2][0]
            without.append(cells[1] / cells[0])
            report.add(
                name, float(values[-1] / values[-2].clamp_min(1e-300)), found.n_heavy_, *cells,
                float((oja @ top).square().median()), float((sketch @ top).square()),
                found.state_floats_ / rows.shape[1] ** 2,
            )  # fmt: skip
        report.findings += [
            f"without the store of heavy rows the correlation is {min(without):.2f} of it at worst "
            f"({list(streams)[without.index(min(without))]})",
            f"Frequent Directions with 9 rows: at least {min(report.column('Frequent Directions')):.4f}",
        ]
        return report
