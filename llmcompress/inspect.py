"""What `llmcompress inspect` shows."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from llmcompress.models.load import StreamedModel, load_model, locate
from llmcompress.models.structure import analyse


def inspect_model(model: str) -> dict[str, Any]:
    """Blocks, sites, what stays dense and what is tied, as JSON."""
    location = locate(model)
    with tempfile.TemporaryDirectory() as scratch:
        opened = load_model(location) if location.gguf else StreamedModel(location, Path(scratch)).model
        structure = analyse(opened)
        return {
            "model": model,
            "class": type(opened).__name__,
            "dtype": str(opened.dtype).removeprefix("torch."),
            "values": sum(t.numel() for n, t in opened.state_dict().items() if n not in opened.all_tied_weights_keys),
            "tied": dict(opened.all_tied_weights_keys),
            "blocks": structure.blocks,
            "sites": [asdict(site) for site in structure.sites],
            "dense": structure.dense,
        }


def structure_tables(found: dict[str, Any]) -> list[Table | str]:
    """A table a distinct block layout, then what stays dense."""
    sites = found["sites"]
    share = sum(s["d_in"] * s["d_out"] for s in sites) / found["values"]
    lines: list[Table | str] = [
        f"{found['model']}: {found['class']}, {found['dtype']}, {found['values']:,} values, {len(found['blocks'])} "
        f"blocks, {len(sites)} linear sites holding {share:.1%} of the values"
    ]
    layouts: dict[tuple[Any, ...], list[int]] = {}
    for index, block in enumerate(found["blocks"]):
        own = [s for s in sites if s["block"] == index]
        key = tuple((s["name"][len(block) + 1 :], s["role"], s["d_in"], s["d_out"], s["bias"],
                     s["input"][len(block) + 1 :]) for s in own)  # fmt: skip
        layouts.setdefault(key, []).append(index)
    for layout, indices in layouts.items():
        table = Table(title=f"blocks {_ranges(indices)} ({found['blocks'][indices[0]]})", title_justify="left")
        for column in ("site", "role", "d_out x d_in", "bias", "reads the input of"):
            table.add_column(column)
        for name, role, d_in, d_out, bias, reads in layout:
            table.add_row(name, role, f"{d_out} x {d_in}", "yes" if bias else "", reads)
        lines.append(table)
    lines += [f"tied: {name} = {owner}" for name, owner in found["tied"].items()]
    lines += [f"stays dense: {name}: {reason}" for name, reason in found["dense"].items()]
    return lines


def _ranges(indices: list[int]) -> str:
    if len(indices) > 1 and indices == list(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]}-{indices[-1]}"
    return ", ".join(map(str, indices))
