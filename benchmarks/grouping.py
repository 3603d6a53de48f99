"""Which blocks should share? Perplexity by grouping, for shared bases and shared dictionaries, at equal stored values.

    python benchmarks/grouping.py --data FOLDER [--layers 2] [--ratio 0.3] [--only contiguous k_means ...]
        [--samples 64] [--windows 16] [--blocks 30] [--results grouping.jsonl]

FOLDER holds WikiText-2 as `wikitext-2/valid.txt` and `test.txt`. Setting: SmolLM2-135M-Instruct in float32, q, k, v,
gate and up of all blocks; calibrated on the first 64 x 512 tokens of the validation text; perplexity on the first
16 x 1,024 tokens of the test text. --blocks keeps the first so many blocks, for a quick look. Rows already in the
results file are not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from llmcompress_eval.perplexity import perplexity, windows
from rich.console import Console
from rich.table import Table

import llmcompress
from llmcompress.calibration.text import pack, read_documents, tokenize
from llmcompress.checkpoint.install import structured_layers
from llmcompress.models.load import load_model, load_tokenizer, locate

MODEL = "builtin:smollm2-135m-instruct"
GROUPINGS: dict[str, dict[str, Any] | None] = {
    "contiguous": None,
    "random": {"name": "random"},
    "k_means": {"name": "k_means"},
    "bootstrap_amg": {"name": "bootstrap_amg"},
    "bootstrap_amg, graph alone": {"name": "bootstrap_amg", "attributes": []},
    "ila_sdp": {"name": "ila_sdp"},
}
METHODS: dict[str, dict[str, Any]] = {
    "basis_sharing": {"method": "basis_sharing"},
    "cospadi, share: layers": {"method": "cospadi", "share": "layers"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds wikitext-2/")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--only", nargs="+", choices=GROUPINGS, default=list(GROUPINGS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=None)
    parser.add_argument("--results", type=Path, default=Path("grouping.jsonl"))
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    setting = {name: getattr(options, name) for name in ("layers", "ratio", "samples", "windows", "blocks")}
    done = {(row["method"], row["grouping"]) for row in rows if all(row[k] == v for k, v in setting.items())}
    location = locate(MODEL)
    tokenizer = load_tokenizer(location)
    valid, test = (
        tokenize(tokenizer, read_documents(str(options.data / "wikitext-2" / f"{split}.txt"), "evaluation"))
        for split in ("valid", "test")
    )
    tokens = pack(valid, options.samples, 512, "valid.txt")
    text = windows(test, 1024, options.windows, "test.txt")
    for method, step in METHODS.items():
        for name in options.only:
            if (method, name) in done:
                continue
            model = load_model(location)
            if options.blocks is not None:
                model.model.layers = model.model.layers[: options.blocks]
                model.config.num_hidden_layers = options.blocks
            start = time.process_time()
            llmcompress.compress(
                model, tokens=tokens, ratio=options.ratio, targets=["q", "k", "v", "gate", "up"],
                layers=options.layers, grouping=GROUPINGS[name], **step,
            )  # fmt: skip
            stored = sum(layer.storage_values for layer in structured_layers(model).values())
            found = {"perplexity": perplexity(model, text).perplexity, "cpu_seconds": time.process_time() - start}
            rows.append({"method": method, "grouping": name, **setting, "stored": stored, **found})
            with options.results.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    table = Table("method", "grouping", "values stored", "perplexity", "CPU s")
    for row in (row for row in rows if all(row[k] == v for k, v in setting.items())):
        cells = f"{row['stored']:,.0f}", f"{row['perplexity']:,.2f}", f"{row['cpu_seconds']:.0f}"
        table.add_row(row["method"], row["grouping"], *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
