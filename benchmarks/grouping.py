"""Which blocks should share? Perplexity by grouping, for shared bases and shared dictionaries, at equal stored values.

    python benchmarks/grouping.py --data FOLDER [--layers 2] [--ratio 0.3] [--methods basis_sharing cospadi]
        [--only contiguous k_means ...] [--output runs/grouping]

FOLDER holds WikiText-2 as `wikitext-2/valid.txt` and `test.txt`. Setting: SmolLM2-135M-Instruct in float32, q, k, v,
gate and up of all blocks; calibrated once, on the first 64 x 512 tokens of the validation text; perplexity on the
first 16 x 1,024 tokens of the test text. It is a sweep: the finished runs in the output folder are not repeated.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llmcompress.progress import Silent
from llmcompress.recipe import Recipe
from llmcompress.sweep import sweep

GROUPINGS: dict[str, Any] = {
    "contiguous": None,
    "random": "random",
    "k_means": "k_means",
    "bootstrap_amg": "bootstrap_amg",
    "bootstrap_amg, graph alone": {"name": "bootstrap_amg", "attributes": []},
    "ila_sdp": "ila_sdp",
}
METHODS: dict[str, dict[str, Any]] = {
    "basis_sharing": {"method": "basis_sharing"},
    "cospadi": {"method": "cospadi", "share": "layers"},
}


def recipe(options: argparse.Namespace, method: str, grouping: str) -> Recipe:
    data = options.data / "wikitext-2"
    step = {**METHODS[method], "targets": ["q", "k", "v", "gate", "up"], "ratio": options.ratio}
    step |= {"layers": options.layers, **({"grouping": GROUPINGS[grouping]} if GROUPINGS[grouping] else {})}
    name = f"{method}-{options.layers}-{options.ratio:g}-{grouping.replace(', ', '-').replace(' ', '-')}"
    return Recipe.parse(
        {
            "model": "builtin:smollm2-135m-instruct",
            "calibration": {"dataset": str(data / "valid.txt"), "samples": 64, "length": 512},
            "compress": [step],
            "eval": {"perplexity": [str(data / "test.txt")], "length": 1024, "windows": 16},
            "output": str(options.output / name),
        },
        name,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds wikitext-2/")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--only", nargs="+", choices=GROUPINGS, default=list(GROUPINGS))
    parser.add_argument("--output", type=Path, default=Path("runs/grouping"))
    options = parser.parse_args()
    chosen = {(method, name): recipe(options, method, name) for method in options.methods for name in options.only}
    start = time.process_time()
    outcomes = sweep({str(key): value for key, value in chosen.items()}, Silent())
    table = Table("method", "grouping", "values stored", "perplexity", title=f"{options.layers} blocks a group")
    for method, name in chosen:
        metrics = outcomes[str((method, name))].metrics
        figures = next(iter(metrics["perplexity"].values()))
        stored = sum(site["stored_values"] for site in metrics["sites"])
        table.add_row(method, name, f"{stored:,.0f}", f"{figures['compressed']['perplexity']:,.2f}")
    console = Console(width=120)
    console.print(table)
    console.print(f"dense {figures['dense']['perplexity']:.2f}; {time.process_time() - start:.0f} CPU s")


if __name__ == "__main__":
    main()
