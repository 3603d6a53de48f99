"""Which sampler keeps a model's perplexity, when calibration keeps a part of the rows?

    python benchmarks/samplers.py --data FOLDER [--only "sensitivity, leverage" ...] [--shares 4 16]

FOLDER holds WikiText-2 as `wikitext-2/valid.txt` and `test.txt`. Setting: `svd_llm`, pivot form, 30 % removed, of
SmolLM2-135M-Instruct in float32; calibrated on the first 64 x 512 tokens of the validation text, of which a sampler
keeps a quarter or a sixteenth of the rows of each input; perplexity on the first 16 x 1,024 tokens of the test text.
The dense model runs once: every sampler chooses from the same rows.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from llmcompress_eval.perplexity import perplexity, windows
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.backends.choice import Backend
from llmcompress.calibration.collect import InputStatistics, capture_inputs
from llmcompress.calibration.text import pack, read_documents, tokenize
from llmcompress.checkpoint.install import install
from llmcompress.layers.base import StructuredLinear
from llmcompress.models.load import load_model, load_tokenizer, locate
from llmcompress.models.runner import Runner
from llmcompress.models.structure import analyse
from llmcompress.plan import make_plan
from llmcompress.recipe import Compress
from llmcompress.types import Problem

MODEL = "builtin:smollm2-135m-instruct"
BATCH = 8  # sequences
SAMPLERS: dict[str, dict[str, Any] | None] = {
    "all rows": None,
    "uniform": {"name": "uniform"},
    "sensitivity, leverage": {"name": "sensitivity", "score": "leverage"},
    "sensitivity, Lewis, p = 4, rank 64": {"name": "sensitivity", "score": "lewis", "p": 4, "rank": 64},
    "volume, repeated DPP, rank 64": {"name": "volume", "rank": 64},
}
Setting = tuple[str, int]  # a sampler, and of how many rows it keeps one


class Run:
    """One setting: its sampler, the layers that it has led to so far, and the CPU seconds that its choices took."""

    def __init__(self, setting: Setting, rows: int) -> None:
        label, share = setting
        given = SAMPLERS[label]
        self.sampler = Backend(**{**given, "n_samples": rows // share}).build("sampler") if given else None
        self.layers: dict[str, StructuredLinear] = {}
        self.seconds = 0.0


def compress(model: PreTrainedModel, tokens: Tensor, runs: list[Run]) -> None:
    """Block by block: the dense model's rows, every sampler's Grams of them, and the layers that these lead to."""
    structure = analyse(model)
    runner = Runner(model, structure)
    step = Compress(method="svd_llm", ratio=0.3, targets=["attention", "ffn"])
    (planned,) = make_plan(structure, [step]).steps
    budgets = planned.allocation.allocate(planned.units, None, step.ratio)
    runner.record_arguments(tokens)
    hidden = torch.cat([runner.embed(part) for part in tokens.split(BATCH)])
    for index in range(len(structure.blocks)):
        print(f"block {index + 1} of {len(structure.blocks)}", file=sys.stderr)
        sites = structure.in_block(index)
        collectors = [
            InputStatistics(sites, frozenset({"gram"}), runner.device, run.sampler, rows=tokens.numel()) for run in runs
        ]

        def receive(site: Any, x: Tensor, collectors: list[InputStatistics] = collectors) -> None:
            for collector in collectors:
                collector.receive(site, x)

        with torch.no_grad(), capture_inputs(model, sites, receive):
            hidden = torch.cat([runner.run_block(index, part) for part in hidden.split(BATCH)])
        for run, collector in zip(runs, collectors, strict=True):
            start = time.process_time()
            collector.finish()
            run.seconds += time.process_time() - start
            for unit, budget in zip(planned.units, budgets, strict=True):
                if unit[0].block == index:
                    weights, biases = [runner.weight(s) for s in unit], [runner.bias(s) for s in unit]
                    problem = Problem(unit, weights, biases, [collector.sums[s.input] for s in unit])
                    found = planned.compressor.compress(problem, budget, torch.Generator())
                    run.layers |= {s.name: layer for s, layer in zip(unit, found.layers, strict=True) if layer}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds wikitext-2/")
    parser.add_argument("--only", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--shares", nargs="+", type=int, default=[4, 16], help="one of so many rows is kept")
    options = parser.parse_args()
    tokenizer = load_tokenizer(locate(MODEL))
    valid, test = (
        tokenize(tokenizer, read_documents(str(options.data / "wikitext-2" / f"{split}.txt"), "evaluation"))
        for split in ("valid", "test")
    )
    tokens, held_out = pack(valid, 64, 512, "valid.txt"), windows(test, 1024, 16, "test.txt")
    settings = [(label, share) for label in options.only for share in (options.shares if SAMPLERS[label] else [1])]
    runs = {setting: Run(setting, tokens.numel()) for setting in settings}
    model = load_model(locate(MODEL))
    compress(model, tokens, list(runs.values()))
    console = Console(width=120)
    table = Table("sampler", "rows kept", "perplexity", "CPU s of sampling", title="svd_llm, 30 % removed")
    for (label, share), run in runs.items():
        compressed = copy.deepcopy(model)
        install(compressed, run.layers)
        run.layers = {}
        figures = label, f"1/{share}", f"{perplexity(compressed, held_out).perplexity:.2f}", f"{run.seconds:.0f}"
        console.print(*figures)
        table.add_row(*figures)
    console.print(table)


if __name__ == "__main__":
    main()
