"""Two neighbouring blocks that share: aligned or not, against dropping one, and against low rank at equal values.

    python benchmarks/layer_sharing.py --data FOLDER [--pairs 10 16 22] [--windows 2]

FOLDER holds WikiText-2 as `wikitext-2/valid.txt` and `test.txt`. SmolLM2-135M-Instruct in float32; a pair is a block
and the one behind it, all attention and FFN projections; perplexity on the first windows of 1,024 tokens of the test
text, without any training. `svd_llm` keeps half of the same matrices' values, calibrated on 8 x 512 tokens of the
validation text; the sharing needs none.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from llmcompress_eval.perplexity import perplexity, windows
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import llmcompress
from llmcompress.calibration.text import pack, read_documents, tokenize
from llmcompress.models.load import load_model, load_tokenizer, locate

MODEL = "builtin:smollm2-135m-instruct"


def without_block(model: PreTrainedModel, index: int) -> PreTrainedModel:
    """The model without one of its blocks."""
    shorter = copy.deepcopy(model)
    del shorter.model.layers[index]
    for position, layer in enumerate(shorter.model.layers):
        layer.self_attn.layer_idx = position
    shorter.config.num_hidden_layers -= 1
    return shorter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", type=int, nargs="+", default=[10, 16, 22])
    parser.add_argument("--windows", type=int, default=2)
    arguments = parser.parse_args()
    location = locate(MODEL)
    tokenizer, model = load_tokenizer(location), load_model(location)
    valid, test = (
        tokenize(tokenizer, read_documents(str(arguments.data / "wikitext-2" / f"{split}.txt"), "evaluation"))
        for split in ("valid", "test")
    )
    calibration, text = pack(valid, 8, 512, "valid.txt"), windows(test, 1024, arguments.windows, "test.txt")
    table = Table(title=f"perplexity, dense {perplexity(model, text).perplexity:.2f}")
    for column in ("blocks", "as they stand", "aligned", "second dropped", "svd_llm, equal values"):
        table.add_column(column, justify="right")
    for first in arguments.pairs:
        targets = [rf"layers\.({first}|{first + 1})\."]

        def measured(method: str, ratio: float, targets: list[str] = targets, **options: Any) -> float:
            tokens = calibration if method == "svd_llm" else calibration[:1, :8]
            made = llmcompress.compress(
                copy.deepcopy(model), tokens=tokens, method=method, ratio=ratio, targets=targets, **options
            )
            return perplexity(made, text).perplexity

        found = [
            measured("layer_sharing", 0.5, match=False),
            measured("layer_sharing", 0.5),
            perplexity(without_block(model, first + 1), text).perplexity,
            measured("svd_llm", 0.5),
        ]
        table.add_row(f"{first}, {first + 1}", *[f"{value:.2f}" for value in found])
    Console().print(table)


if __name__ == "__main__":
    main()
