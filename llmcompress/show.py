"""What the command line prints: progress bars and tables."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)  # fmt: skip
from rich.table import Table
from rich.text import Text


class Bars:
    """Progress of the pipeline's stages as rich bars, with an estimate of what remains.

    Nothing is shown before the first stage, so that an error in the input is one line.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[detail]}", style="dim", markup=False),
            console=console,
        )  # fmt: skip
        self._task: TaskID | None = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._progress.stop()

    def start(self, stage: str, total: int) -> None:
        self._progress.start()
        self._task = self._progress.add_task(stage, total=total, detail="")

    def advance(self, detail: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, advance=1, detail=detail)


def result_table(folder: Path, metrics: dict[str, Any], speed: dict[str, Any] | None) -> Table:
    """Dense against compressed: parameters, bytes, perplexity, tokens per second."""
    table = Table(title=Text(str(folder)), title_justify="left")
    for column in ("", "dense", "compressed", ""):
        table.add_column(column, justify="left" if not column else "right")
    size = metrics["size"]
    for key, label in (("targeted", "values, targeted matrices"), ("model", "values, whole model")):
        part = size[key]
        table.add_row(label, f"{part['dense']:,}", f"{part['compressed']:,.0f}", f"-{part['removed']:.1%}")
    dense, compressed = size["bytes"]["dense"], size["bytes"]["compressed"]
    table.add_row("bytes on disk", f"{dense:,}", f"{compressed:,}", f"-{1 - compressed / dense:.1%}")
    for source, pair in metrics.get("perplexity", {}).items():
        a, b = pair["dense"]["perplexity"], pair["compressed"]["perplexity"]
        table.add_row(Text(f"perplexity, {Path(source).name}"), f"{a:.2f}", f"{b:.2f}", f"x{b / a:.2f}")
    tasks = metrics.get("tasks", {"dense": {}})
    for task, found in tasks["dense"].items():
        for metric in sorted(found.keys() - {"items"}):
            a, b = (tasks[role][task][metric]["value"] for role in ("dense", "compressed"))
            table.add_row(Text(f"{task}, {metric}"), f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}")
    for key in ("prefill", "decode") if speed else ():
        a, b = speed["dense"][key], speed["compressed"][key]  # type: ignore[index]
        table.add_row(f"{key}, tokens/s", f"{a:,.1f}", f"{b:,.1f}", f"x{b / a:.2f}")
    return table


def kept_table(sites: list[dict[str, Any]]) -> Table:
    """Where the budget went: kept shares by role (of all that share factors) and depth, and how many stayed dense."""
    units: dict[str, list[dict[str, Any]]] = {}
    for site in sites:
        owner = next(iter(((site["spec"] or {}).get("shared") or {}).values()), site["name"])
        units.setdefault(owner, []).append(site)
    labels = [" ".join(site["role"] for site in unit) for unit in units.values()]
    roles: dict[str, list[dict[str, Any]]] = {}
    for (
        site
    ) in sites:  # of a unit left dense, nothing says that its sites were one: they join the others of their roles
        label = max((label for label in labels if site["role"] in label.split()), key=len)
        roles.setdefault(label, []).append(site)
    depth = 1 + max(site["block"] for site in sites)
    table = Table(title="kept of the dense values", title_justify="left")
    for column in ("", "first third of blocks", "middle", "last", "all", "left dense"):
        table.add_column(column, justify="left" if not column else "right")
    for role, own in roles.items():
        thirds = [[site for site in own if 3 * site["block"] // depth == third] for third in range(3)]
        dense = sum(site["spec"] is None for site in own)
        table.add_row(
            role, *[f"{_kept(part):.1%}" if part else "" for part in (*thirds, own)], f"{dense} of {len(own)}"
        )
    return table


def _kept(sites: list[dict[str, Any]]) -> float:
    return float(sum(site["stored_values"] for site in sites) / sum(site["dense_values"] for site in sites))


def seconds_line(seconds: dict[str, float]) -> str:
    parts = ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items())
    return f"{sum(seconds.values()):.0f} s: {parts}"
