"""Which method loses least? Perplexity of SmolLM2-135M-Instruct at equal stored values, without any training.

    python benchmarks/quality.py --data FOLDER [--ratios 0.2 0.3 0.4] [--only svd_llm ...] [--results quality.jsonl]

FOLDER holds WikiText-2 as `wikitext-2/valid.txt` and `test.txt`. Setting: float32, all attention and FFN projections of
all blocks; calibrated on the first 64 x 512 tokens of the validation text; perplexity on the first 16 x 1,024 tokens of
the test text and, as a second domain, of CPython's help texts. Every model is saved and measured as `from_pretrained`
loads it. Rows already in the results file are not measured again, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from llmcompress_eval.perplexity import perplexity, windows
from rich.console import Console
from rich.table import Table

import llmcompress
from llmcompress.calibration.text import pack, python_docs, read_documents, tokenize
from llmcompress.layers.base import StructuredLinear
from llmcompress.models.load import Location, load_model, load_tokenizer, locate
from llmcompress.models.structure import analyse

MODEL = "builtin:smollm2-135m-instruct"
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
    "cospadi, full output weights, loss_aware": {
        "method": "cospadi",
        "output_weights": "full",
        "allocation": "loss_aware",
    },
}


class Setting:
    """Texts and the dense model, read once."""

    def __init__(self, data: Path) -> None:
        location = locate(MODEL)
        tokenizer = load_tokenizer(location)
        self.model = load_model(location)
        valid = tokenize(tokenizer, read_documents(str(data / "wikitext-2" / "valid.txt"), "calibration"))
        test = tokenize(tokenizer, read_documents(str(data / "wikitext-2" / "test.txt"), "evaluation"))
        self.tokens = pack(valid, 64, 512, "valid.txt")
        self.windows = {
            "wikitext2": windows(test, 1024, 16, "test.txt"),
            "python-docs": windows(tokenize(tokenizer, python_docs("all")), 1024, 16, "python-docs"),
        }

    def measure(self, step: dict[str, Any], ratio: float) -> dict[str, Any]:
        """Compresses a fresh model, saves it, and measures what loads."""
        model = load_model(locate(MODEL))
        dense = sum(site.dense_values for site in analyse(model).sites)
        start = time.process_time()
        llmcompress.compress(model, tokens=self.tokens, ratio=ratio, **step)
        seconds = time.process_time() - start
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            loaded = load_model(Location(Path(folder)))
            stored = sum(m.storage_values for m in loaded.modules() if isinstance(m, StructuredLinear))
            left = sum(s.dense_values for s in analyse(loaded).sites)
            found = {name: perplexity(loaded, tokens).perplexity for name, tokens in self.windows.items()}
        return {"removed": 1 - (stored + left) / dense, "cpu_seconds": seconds, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds wikitext-2/")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.4])
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--results", type=Path, default=Path("quality.jsonl"))
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    done = {(row["step"], row["ratio"]) for row in rows}
    wanted = [("dense", 0.0)] + [(step, ratio) for step in options.only for ratio in options.ratios]
    setting = Setting(options.data) if any(key not in done for key in wanted) else None
    for step, ratio in wanted:
        if (step, ratio) in done or setting is None:
            continue
        if step == "dense":
            found: dict[str, Any] = {
                name: perplexity(setting.model, t).perplexity for name, t in setting.windows.items()
            }
        else:
            found = setting.measure(STEPS[step], ratio)
        rows.append({"step": step, "ratio": ratio, "torch": torch.__version__, **found})
        with options.results.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    Console(width=140).print(_table(rows))


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("method", "ratio", "removed, as stored", "WikiText-2", "python-docs", "CPU s")
    for row in rows:
        removed, seconds = row.get("removed", 0.0), row.get("cpu_seconds", 0.0)
        table.add_row(
            row["step"], f"{row['ratio']:.1f}", f"{removed:.2%}",
            f"{row['wikitext2']:,.2f}", f"{row['python-docs']:,.2f}", f"{seconds:.0f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
