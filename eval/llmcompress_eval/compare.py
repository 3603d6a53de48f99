"""`llmcompress compare`: one table of runs and of the dense models they come from."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from llmcompress_eval.runs import Run
from llmcompress_eval.tables import text_table

Row = dict[str, Any]
WORDS = ("run", "method")
SIZE, MEMORY = "bytes on disk", "bytes in memory"


def rows_of(runs: list[Run]) -> list[Row]:
    """A row for each dense model, then one for each run: column -> plain value; a column that was not measured lacks.

    A text measured over other windows is another column, since the figures cannot be compared.
    """
    dense: dict[str, Row] = {}
    compressed = []
    for run in runs:
        if run.method != "dense":
            base = dense.setdefault(run.model, {"run": Path(run.model).name, "method": "dense"})
            base |= {column: value for column, value in _row(run, "dense").items() if column not in base}
        compressed.append({"run": run.name, "method": run.method, **_row(run, "compressed")})
    return [*dense.values(), *compressed]


def columns_of(rows: list[Row]) -> list[str]:
    """All columns, those of one text or task beside one another."""
    found = list(dict.fromkeys(column for row in rows for column in row))
    order = {
        kind: place for place, kind in enumerate((*WORDS, "removed", "values", SIZE, MEMORY, "perplexity", "bits"))
    }
    return sorted(found, key=lambda column: order.get(column, order.get(column.partition(" ")[0], len(order))))


def shown(column: str, value: Any) -> str:
    """A cell's text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if column == "removed" or column.startswith("same top token"):
        return f"{value:.1%}"
    if column.startswith("perplexity"):
        return f"{value:,.2f}"
    if isinstance(value, int) or column.endswith("tokens/s"):
        return f"{value:,.1f}" if column.endswith("tokens/s") else f"{value:,}"
    return f"{value:.4f}"


def frontier(rows: Iterable[Row], column: str) -> list[Row]:
    """The rows that no other row beats in both bytes on disk and `column`, by rising bytes."""
    known = [row for row in rows if row.get(SIZE) is not None and row.get(column) is not None]
    best: list[Row] = []
    for row in sorted(known, key=lambda row: (row[SIZE], row[column])):
        if not best or row[column] < best[-1][column]:
            best.append(row)
    return best


def comparison_table(rows: list[Row]) -> Table:
    columns = columns_of(rows)
    cells = [[shown(column, row.get(column)) for column in columns] for row in rows]
    return text_table("dense models and runs", columns, cells, words=len(WORDS))


def frontier_table(rows: list[Row]) -> list[Table | str]:
    """The whole comparison, and of each text what no other row beats in both size and perplexity."""
    tables: list[Table | str] = [comparison_table(rows)]
    for column in columns_of(rows):
        if column.startswith("perplexity"):
            cells = [
                [row["run"], row["method"], shown(SIZE, row[SIZE]), shown(column, row[column])]
                for row in frontier(rows, column)
            ]
            tables.append(text_table("frontier", ["run", "method", SIZE, column], cells, words=2))
    return tables


def as_csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns_of(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: list[Row]) -> str:
    columns = columns_of(rows)
    lines = [columns, ["---" if column in WORDS else "---:" for column in columns]]
    lines += [[shown(column, row.get(column)) for column in columns] for row in rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _row(run: Run, role: str) -> Row:
    """Columns of one model of a run; role: "dense" or "compressed"."""
    row: Row = {}
    if size := run.metrics.get("size"):
        row["removed"] = size["targeted"]["removed"] if role == "compressed" else 0.0
        row["values"] = round(size["model"][role])
        row[SIZE] = size["bytes"][role]
    elif role == "compressed":
        row[SIZE] = sum(path.stat().st_size for path in run.folder.glob("*.safetensors"))
    for source, figures in run.metrics.get("perplexity", {}).items():
        row |= _perplexity(source, figures[role])
    own = run.evaluation if role == "compressed" else run.evaluation.get("against", {})
    for source, figures in own.get("perplexity", {}).items():
        row |= _perplexity(source, figures)
    if "memory" in own:
        row[MEMORY] = own["memory"]["weights"]
    if role == "compressed":
        for source, agreed in run.evaluation.get("agreement", {}).items():
            row[f"KL {Path(source).name}"] = agreed["kl"]
            row[f"same top token {Path(source).name}"] = agreed["top1"]
    measured = run.metrics.get("tasks", {}).get(role, {}) | own.get("tasks", {})
    for task, metrics in measured.items():
        row |= {f"{task} {metric}": value["value"] for metric, value in metrics.items() if metric != "items"}
    speed = run.evaluation.get("speed", {}).get("end_to_end", {})
    for what in ("prefill", "decode"):
        rates = speed.get(what, {})
        if (rate := rates.get(role, rates.get("model"))) is not None:
            row[f"{what} tokens/s"] = rate
    return row


def _perplexity(source: str, figures: dict[str, Any]) -> Row:
    length = figures["length"]
    apart = "" if figures["stride"] == length else f" every {figures['stride']:,}"
    text = f"{Path(source).name} ({figures['windows']:,} x {length:,}{apart})"
    row = {f"perplexity {text}": figures["perplexity"]}
    if figures["bits_per_byte"] is not None:
        row[f"bits a byte {text}"] = figures["bits_per_byte"]
    return row
