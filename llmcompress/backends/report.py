"""What an analysis hands back: a table, findings, and curves for a plot."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError, RunError

if TYPE_CHECKING:
    from rich.table import Table

Cell = str | int | float | None


@dataclass(frozen=True)
class Curve:
    """One line of a plot: y over x."""

    label: str
    x: list[float]
    y: list[float]


@dataclass
class Report:
    """title; a table (columns, rows of as many cells); findings, one line each; curves on logarithmic axes."""

    title: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    x_label: str = ""
    y_label: str = ""

    def add(self, *cells: Cell) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(list(cells))

    def column(self, name: str) -> list[Any]:
        """The cells of a column, top to bottom."""
        index = self.columns.index(name)
        return [row[index] for row in self.rows]

    def as_json(self) -> dict[str, Any]:
        """Plain data; a number that is not finite becomes null."""
        data = asdict(self)
        data["rows"] = [[_finite(cell) for cell in row] for row in self.rows]
        return data

    def table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.title), title_justify="left")
        for index, column in enumerate(self.columns):
            words = any(isinstance(row[index], str) for row in self.rows)
            table.add_column(column, justify="left" if words else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*[Text(_shown(cell)) for cell in row])
        return table

    def save_plot(self, path: Path) -> None:
        """Draws the curves. InputError if there are none, or matplotlib is not installed; RunError if it fails."""
        if not self.curves:
            raise InputError("--plot: this analysis has no curves, its table says all")
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            raise InputError("--plot: needs matplotlib: pip install 'llmcompress[report]'") from None
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for curve in self.curves:
            axes.plot(curve.x, curve.y, marker=".", label=curve.label)
        positive = all(value > 0 for curve in self.curves for value in curve.y)
        axes.set_title(self.title, fontsize="small", wrap=True)
        axes.set(xlabel=self.x_label, ylabel=self.y_label, yscale="log" if positive else "linear")
        axes.legend(fontsize="small")
        try:
            figure.savefig(path)
        except (OSError, ValueError) as error:
            raise RunError(f"--plot {path}: cannot be written: {error}") from error


def _finite(cell: Cell) -> Cell:
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def _shown(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else cell
