"""Figures of a merge: distances, singular vectors, losses of the models, of the result, and along the path."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.backends.merging.alignment import Read, mean
from llmcompress.backends.merging.connectivity import POINTS, SingularVectors, barrier_along
from llmcompress.backends.merging.permutations import squared_distance
from llmcompress.backends.report import Curve, Report
from llmcompress.errors import InputError
from llmcompress.merge.sources import Source, mean_loss
from llmcompress.models.structure import Structure
from llmcompress.progress import Progress

GAMMAS = (0.0, 0.3, 0.5)
PLOTS = (".png", ".svg", ".pdf")


def distances(
    names: Sequence[str], bases: Sequence[Read], views: Sequence[Read], progress: Progress
) -> list[tuple[float, float]]:
    """The distance of every model to the first, as given and as matched; one tensor of each at a time."""
    squares = torch.zeros(len(bases), 2, dtype=torch.float64)
    progress.start("distances", len(names))
    for name in names:
        for column, reads in enumerate((bases, views)):
            first = reads[0](name)
            squares[1:, column] += torch.tensor(
                [squared_distance(read(name), first) for read in reads[1:]], dtype=torch.float64
            )
        progress.advance(name)
    return [(row[0], row[1]) for row in squares.sqrt().tolist()]


def singular_vectors(
    structure: Structure, bases: Sequence[Read], views: Sequence[Read], progress: Progress
) -> list[dict[str, Any]]:
    """The R metric of the first two models at several gamma, for every linear map, before and after the match.

    The last row is the whole model's. See `r_metric`.
    """
    rows: list[dict[str, Any]] = []
    met, bound = torch.zeros(2, len(GAMMAS), dtype=torch.float64), torch.zeros(2, len(GAMMAS), dtype=torch.float64)
    progress.start("singular vectors", len(structure.sites))
    for site in structure.sites:
        name = f"{site.name}.weight"
        own = torch.zeros(2, len(GAMMAS), dtype=torch.float64)
        for stage, reads in enumerate((bases, views)):
            pair = [SingularVectors.of(read(name)) for read in reads[:2]]
            for column, gamma in enumerate(GAMMAS):
                value, most = pair[0].meets(pair[1], gamma)
                own[stage, column] = value / most
                met[stage, column] += value
                bound[stage, column] += most
        rows.append(_row(site.name, own))
        progress.advance(site.name)
    return [*rows, _row("all", met / bound)]


def _row(name: str, values: Tensor) -> dict[str, Any]:
    before, after = values.tolist()
    return {"site": name, "gamma": list(GAMMAS), "before": before, "after": after}


def perplexities(
    sources: Sequence[Source],
    structure: Structure,
    names: Sequence[str],
    merged: Read,
    texts: dict[str, Tensor],
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Perplexity of every model and of the merged one on each text's windows."""
    found: dict[str, dict[str, float]] = {}
    for text, windows in texts.items():
        progress.start("perplexity", len(sources) + 1)
        found[text] = {}
        for source, name in zip(sources, names, strict=True):
            found[text][name] = _perplexity(mean_loss(source, structure, windows))
            progress.advance(name)
        with sources[0].seen_as(merged):
            found[text]["merged"] = _perplexity(mean_loss(sources[0], structure, windows))
        progress.advance("merged")
    return found


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def measure_barrier(
    source: Source,
    structure: Structure,
    bases: Sequence[Read],
    views: Sequence[Read],
    windows: Tensor,
    progress: Progress,
) -> dict[str, Any]:
    """Losses in nats at evenly spaced points of the path, of the models as given and as matched, and both barriers.

    The ends are measured once: a matched model is the same function.
    """
    progress.start("barrier", 2 * POINTS - 2)
    ends: dict[float, float] = {}

    def along(reads: Sequence[Read], label: str) -> dict[str, Any]:
        def loss(lam: float) -> float:
            if lam not in ends:
                with source.seen_as(mean(reads, [1 - lam, lam])):
                    value = mean_loss(source, structure, windows)
                progress.advance(f"{label}, lam {lam:.1f}")
                if lam not in (0.0, 1.0):
                    return value
                ends[lam] = value
            return ends[lam]

        found = barrier_along(loss)
        return {"lam": found.lams, "loss": found.losses, "barrier": found.height}

    return {"as_given": along(bases, "as given"), "matched": along(views, "matched")}


def check_plot(path: Path) -> None:
    """InputError, before anything is computed, if no plot can be drawn there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("merge.plot: needs matplotlib: pip install 'llmcompress[report]'")
    if path.suffix not in PLOTS or not path.absolute().parent.is_dir():
        raise InputError(f"merge.plot: {path} is no {', '.join(PLOTS)} file in an existing folder")


def save_plot(found: dict[str, Any], path: Path) -> None:
    """Draws the losses along both paths. RunError if that fails."""
    report = Report("loss between two models", ["lam"], x_label="share of the second model", y_label="loss, nats")
    report.curves = [Curve(key.replace("_", " "), part["lam"], part["loss"]) for key, part in found.items()]
    report.save_plot(path)
