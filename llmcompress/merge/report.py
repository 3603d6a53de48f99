"""What a merge says of itself: a table on the screen, and the card beside the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text


def merge_table(folder: Path, metrics: dict[str, Any]) -> Table:
    """A row a model; perplexities where they were measured."""
    table = Table(title=Text(str(folder)), title_justify="left")
    columns, rows = _figures(metrics)
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if index else "left")
    for row in rows:
        table.add_row(*[Text(cell) for cell in row])
    return table


def _figures(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    texts = metrics["perplexity"]
    columns = ["model", "share", "aligned by", "distance to the first", "matched"]
    columns += [f"perplexity, {Path(text).name}" for text in texts]
    rows = []
    for item in metrics["models"]:
        moved = "identity" if item["identity"] else "a rotation" if item["rotated"] else "a permutation"
        figures = [f"{texts[text][item['model']]:.3f}" for text in texts]
        distance = [f"{item[key]:.4g}" for key in ("distance", "distance_matched")]
        rows.append([item["model"], f"{item['share']:.3g}", moved, *distance, *figures])
    rows.append(["merged", "", "", "", "", *[f"{texts[text]['merged']:.3f}" for text in texts]])
    return columns, rows


def findings(metrics: dict[str, Any]) -> list[str]:
    """One line each: how far matching brought the models, and what a merge of them is worth."""
    models, lines = metrics["models"], []
    if all(item["identity"] for item in models):
        lines.append("nothing to permute: the models share a basis, as fine-tunes of one model do; this is their mean")
    for item in models[1:]:
        if item["distance"] and not item["identity"]:
            ratio = item["distance_matched"] / item["distance"]
            lines.append(f"{item['model']}: distance to the first model x{ratio:.3f} by matching")
    if found := metrics.get("barrier"):
        given, matched = found["as_given"]["barrier"], found["matched"]["barrier"]
        lines.append(f"barrier: {given:.3f} nats as given, {matched:.3f} matched")
    if found := metrics.get("r_metric"):
        for gamma, before, after in zip(*[found[-1][key] for key in ("gamma", "before", "after")], strict=True):
            lines.append(f"R metric, singular values from {gamma:.0%} of the largest on: {before:.3f} -> {after:.3f}")
    return lines


def merge_card(metrics: dict[str, Any]) -> str:
    """Markdown with the facts of a merge."""
    columns, rows = _figures(metrics)
    lines = ["---", "library_name: transformers", "tags: [llmcompress, merge]", "---", ""]
    lines += [f"# Merge of {len(metrics['models'])} models", ""]
    lines += ["Aligned and averaged by llmcompress; the recipe is in `recipe.yaml`, all figures in `metrics.json`.", ""]
    lines += ["| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows]]
    lines += ["", *[f"- {line}" for line in findings(metrics)], ""]
    return "\n".join(lines)
