"""Which method loses least? Perplexity of SmolLM2-135M-Instruct at equal stored values, without any training.

    python benchmarks/quality.py --data FOLDER [--ratios 0.2 0.3 0.4] [--only svd_llm ...] [--runs FOLDER]

FOLDER holds WikiText-2 as `wikitext-2/valid.txt` and `test.txt`. Setting: float32, all attention and FFN projections of
all blocks; calibrated on the first 64 x 512 tokens of the validation text; perplexity on the first 16 x 1,024 tokens of
the test text and, as a second domain, of CPython's help texts. A sweep of recipes: the statistics are gathered once for
all that are wanted, every model is saved and measured as it loads, and the same command goes on where one stopped. The
runs stay, 0.4 GB each, for `llmcompress report`.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llmcompress.pipeline import Outcome
from llmcompress.recipe import Recipe
from llmcompress.show import Bars
from llmcompress.sweep import sweep

#: label -> a compress step; a new method joins here with the settings it is meant to be used with
STEPS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd", "pivot": False},
    "asvd": {"method": "asvd", "pivot": False},
    "fwsvd": {"method": "fwsvd", "pivot": False},
    "svd_llm": {"method": "svd_llm", "pivot": False},
    "svd_llm, pivot form": {"method": "svd_llm"},
    "svd_llm, pivot form, one basis an input": {"method": "svd_llm", "share": "input"},
    "svd_llm, pivot form, refit": {"method": "svd_llm", "propagate": True, "refit": True},
    "svd_llm, pivot form, svd_llm_v2": {"method": "svd_llm", "allocation": "svd_llm_v2"},
    "svd_llm, pivot form, d_rank": {"method": "svd_llm", "allocation": "d_rank"},
    "swift_svd, pivot form": {"method": "swift_svd"},
    "basis_sharing, pivot form": {"method": "basis_sharing"},
    "svd_llm, pivot form, welore": {"method": "svd_llm", "allocation": "welore"},
    "svd_llm, pivot form, loss_aware": {"method": "svd_llm", "allocation": "loss_aware"},
    "kfac_svd, pivot form": {"method": "kfac_svd"},
    "kfac_svd, pivot form, loss_aware": {"method": "kfac_svd", "allocation": "loss_aware"},
    "kfac_svd, pivot form, one basis an input, loss_aware": {
        "method": "kfac_svd",
        "share": "input",
        "allocation": "loss_aware",
    },
    "sparse_low_rank": {"method": "sparse_low_rank"},
    "cospadi, private": {"method": "cospadi", "share": "none"},
    "cospadi, dictionaries only": {"method": "cospadi", "structure": "cospadi"},
    "cospadi": {"method": "cospadi"},
    "cospadi, diagonal output weights": {"method": "cospadi", "output_weights": "diagonal"},
    "cospadi, full output weights": {"method": "cospadi", "output_weights": "full"},
    "cospadi, diagonal output weights, loss_aware": {
        "method": "cospadi",
        "output_weights": "diagonal",
        "allocation": "loss_aware",
    },
    "cospadi, full output weights, loss_aware, 20 iterations": {
        "method": "cospadi",
        "iterations": 20,
        "output_weights": "full",
        "allocation": "loss_aware",
    },
}


def recipe(label: str, ratio: float, data: Path, output: Path) -> Recipe:
    content = {
        "model": "builtin:smollm2-135m-instruct",
        "calibration": {"dataset": str(data / "wikitext-2" / "valid.txt"), "samples": 64, "length": 512},
        "compress": [{"targets": ["attention", "ffn"], "ratio": ratio, **STEPS[label]}],
        "eval": {
            "perplexity": [str(data / "wikitext-2" / "test.txt"), "python-docs:all"],
            "length": 1024,
            "windows": 16,
        },
        "output": str(output / f"{re.sub(r'[^a-z0-9_]+', '-', label)}-{ratio:g}"),
    }
    return Recipe.parse(content, "quality.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds wikitext-2/")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.4])
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="folder of the results")
    options = parser.parse_args()
    recipes = {
        f"{label}, {ratio:.0%}": recipe(label, ratio, options.data, options.runs)
        for label in options.only
        for ratio in options.ratios
    }
    with Bars(Console(stderr=True)) as bars:
        outcomes = sweep(recipes, bars)
    Console(width=140).print(_table(outcomes))


def _table(outcomes: dict[str, Outcome]) -> Table:
    table = Table("method, removed", "removed, as stored", "WikiText-2", "python-docs", "factorised in, s")
    first = next(iter(outcomes.values()))
    table.add_row("dense", "", *_shown(first, "dense"), "")
    for name, outcome in outcomes.items():
        removed, seconds = outcome.metrics["size"]["targeted"]["removed"], outcome.seconds.get("compress")
        table.add_row(
            name, f"{removed:.2%}", *_shown(outcome, "compressed"), "before" if seconds is None else f"{seconds:.0f}"
        )
    return table


def _shown(outcome: Outcome, which: str) -> list[str]:
    return [f"{pair[which]['perplexity']:,.2f}" for pair in outcome.metrics["perplexity"].values()]


if __name__ == "__main__":
    main()
