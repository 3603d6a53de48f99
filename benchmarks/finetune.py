"""What training after compression recovers and costs: losses, methods, optimisers, the fit of blocks, side by side.

    python benchmarks/finetune.py --data DATA --base runs/cospadi-30     # a compressed SmolLM2-135M-Instruct

Trains on WikiText-2 valid (packed sequences of 512 tokens), measures perplexity on the first 16 x 1,024 tokens of test
(and of python-docs, where methods and optimisers are not compared), from the reloaded checkpoint. Every run is a
process of its own, so that its peak memory is its own. Rows are kept in --results and not measured again. The limit of
throughput is the machine's matrix product: the table gives the share of it that a step reaches, counting the products
of the layers' factors and the head, three a training step, one for a teacher.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from llmcompress_eval.perplexity import perplexity, windows
from rich.console import Console
from rich.table import Table
from torch import nn

import llmcompress
from llmcompress.calibration.text import pack, python_docs, read_documents, tokenize
from llmcompress.finetune.save import save_trained
from llmcompress.finetune.train import train
from llmcompress.layers.base import StructuredLinear
from llmcompress.models.load import Location, load_model, load_tokenizer, locate
from llmcompress.recipe import Finetune

MODEL = "builtin:smollm2-135m-instruct"
LENGTH = 512
BOTH = ("wikitext2", "python-docs")
FIXED: dict[str, Any] = {"length": LENGTH, "batch": 1, "validation": 2, "warmup": 0.2}
#: section of the recipe for each run; `of` is what is trained
RECOVERY: dict[str, dict[str, Any]] = {
    "no training": {"of": "base", "steps": 0},
    "lrc, ce": {"of": "base", "loss": "ce", "lr": 5e-5},
    "lrc, kd": {"of": "base", "loss": "kd", "lr": 5e-5},
    "dense, no training": {"of": "dense", "steps": 0},
    "dense, full, ce": {"of": "dense", "method": "full", "loss": "ce", "lr": 2e-5},
}
METHODS: dict[str, dict[str, Any]] = {
    "lrc": {"of": "base", "method": "lrc", "loss": "ce", "lr": 5e-5},
    "full": {"of": "base", "method": "full", "loss": "ce", "lr": 5e-5},
    "lora": {"of": "base", "method": "lora", "loss": "ce", "lr": 5e-4},
}
#: learning rates are those of the optimiser's own units
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"of": "base", "loss": "kd", "lr": 5e-5, "optimizer": "adamw"},
    "muon": {"of": "base", "loss": "kd", "lr": 1e-3, "optimizer": "muon"},
    "auon": {"of": "base", "loss": "kd", "lr": 5e-3, "optimizer": "auon"},
    "mfac": {"of": "base", "loss": "kd", "lr": 1e-4, "optimizer": {"name": "mfac", "window": 16}},
}
BLOCKS: dict[str, dict[str, Any]] = {
    f"{method}{', propagate' if propagate else ''}": {"method": method, "propagate": propagate}
    for method in ("svd_llm", "cospadi")
    for propagate in (False, True)
}


class Setting:
    """Texts as tokens."""

    def __init__(self, data: Path) -> None:
        tokenizer = load_tokenizer(locate(MODEL))
        valid = tokenize(tokenizer, read_documents(str(data / "wikitext-2" / "valid.txt"), "calibration"))
        test = tokenize(tokenizer, read_documents(str(data / "wikitext-2" / "test.txt"), "evaluation"))
        self.calibration = pack(valid, 64, LENGTH, "valid.txt")
        self.training = pack(valid, valid.numel(), LENGTH, "valid.txt")
        self.windows = {
            "wikitext2": windows(test, 1024, 16, "test.txt"),
            "python-docs": windows(tokenize(tokenizer, python_docs("all")), 1024, 16, "python-docs"),
        }

    def perplexities(self, model: nn.Module, names: Sequence[str]) -> dict[str, float]:
        return {name: perplexity(model, self.windows[name]).perplexity for name in names}


def measure_training(data: Path, base: str, run: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """Trains, saves, and measures what loads."""
    setting, section = Setting(data), dict(run)
    student = load_model(locate(base if section.pop("of") == "base" else MODEL), torch.float32)
    if not section["steps"]:
        return {"cpu_seconds": 0.0, "trained": 0, "optimizer_bytes": 0, **setting.perplexities(student, texts)}
    whole = Finetune(**{**FIXED, "evaluate_every": section["steps"], **section})
    teacher = load_model(locate(MODEL)) if whole.loss == "kd" else None
    products = 3 * _flops(student) + (_flops(teacher) if teacher is not None else 0)
    rate = _product_rate()
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        training = train(student, setting.training, whole, Path(folder) / "run", teacher=teacher)
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        del teacher
        save_trained(student, Path(folder) / "model", locate(MODEL), torch.float32)
        del student
        found = setting.perplexities(load_model(Location(Path(folder) / "model")), texts)
    return {
        "cpu_seconds": seconds, "tokens_per_cpu_second": training.tokens / seconds, "peak_bytes": peak,
        "trained": training.trained_values, "optimizer_bytes": training.optimizer_bytes,
        "of_products": training.tokens * products / seconds / rate, "kept": training.kept, **found,
    }  # fmt: skip


def measure_block_fit(data: Path, step: dict[str, Any], section: dict[str, Any] | None) -> dict[str, Any]:
    """Compresses at 30 %, saves, and measures what loads."""
    setting, model = Setting(data), load_model(locate(MODEL))
    start = time.process_time()
    llmcompress.compress(model, tokens=setting.calibration, ratio=0.3, block_recovery=section, **step)
    seconds = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {"cpu_seconds": seconds, **setting.perplexities(load_model(Location(Path(folder))), BOTH)}


def _flops(model: nn.Module) -> int:
    """Multiplications and additions a token of all matrix products; attention's own are left out."""
    layers = [module for module in model.modules() if isinstance(module, (StructuredLinear, nn.Linear))]
    return sum(m.flops if isinstance(m, StructuredLinear) else 2 * m.weight.numel() for m in layers)


def _product_rate() -> float:
    """Operations a CPU second of a 1,024 x 1,024 x 1,024 product."""
    a = torch.rand(1024, 1024)
    a @ a
    start = time.process_time()
    for _ in range(20):
        a @ a
    return 20 * 2 * 1024**3 / (time.process_time() - start)


def _work(queue: Any, function: Any, arguments: tuple[Any, ...]) -> None:
    queue.put(function(*arguments))


def in_process(function: Any, *arguments: Any) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_work, args=(queue, function, arguments))
    process.start()
    found: dict[str, Any] = queue.get()
    process.join()
    return found


class Results:
    """Rows measured so far, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in map(json.loads, lines)}

    def get(self, key: str, function: Any, *arguments: Any) -> dict[str, Any]:
        if key not in self.rows:
            self.rows[key] = {"key": key, "torch": torch.__version__, **in_process(function, *arguments)}
            with self.path.open("a") as file:
                file.write(json.dumps(self.rows[key]) + "\n")
        return self.rows[key]


def recovery(results: Results, options: argparse.Namespace) -> Table:
    table = Table("training", "steps", "WikiText-2", "python-docs", "CPU s")
    for name, run in RECOVERY.items():
        steps = run.get("steps", options.steps)
        row = results.get(
            f"{name}, {steps}", measure_training, options.data, options.base, {**run, "steps": steps}, BOTH
        )
        table.add_row(name, str(steps), *_shown(row), f"{row['cpu_seconds']:.0f}")
    return table


def methods(results: Results, options: argparse.Namespace) -> Table:
    return compared(results, options, METHODS, "method")


def optimizers(results: Results, options: argparse.Namespace) -> Table:
    return compared(results, options, OPTIMIZERS, "optimizer")


def compared(results: Results, options: argparse.Namespace, runs: dict[str, dict[str, Any]], what: str) -> Table:
    """Equal steps, and as many as take the time that the first run takes for them, if it is not the same to a step."""
    columns = ("steps", "WikiText-2", "CPU s/step", "tokens/CPU s", "of GEMM rate", "trained")
    table = Table(what, *columns, "optimiser MiB", "peak GiB")
    first = None
    for name, run in runs.items():
        counts = [options.compare_steps]
        for steps in counts:
            arguments = (measure_training, options.data, options.base, {**run, "steps": steps}, BOTH[:1])
            row = results.get(f"{name}, {steps} steps", *arguments)
            first = first or row
            equal = round(options.compare_steps * first["cpu_seconds"] / row["cpu_seconds"])
            if len(counts) == 1 and abs(equal - steps) > 1:
                counts.append(equal)
            table.add_row(
                name, str(steps), f"{row['wikitext2']:.2f}", f"{row['cpu_seconds'] / steps:.1f}",
                f"{row['tokens_per_cpu_second']:.1f}", f"{row['of_products']:.0%}", f"{row['trained']:,}",
                f"{row['optimizer_bytes'] / 2**20:.0f}", f"{row['peak_bytes'] / 2**30:.1f}",
            )  # fmt: skip
    return table


def blocks(results: Results, options: argparse.Namespace) -> Table:
    table = Table("method", "block recovery", "WikiText-2", "python-docs", "CPU s")
    for name, step in BLOCKS.items():
        for section in (None, {"steps": options.fit_steps, "lr": options.fit_lr}):
            shown = f"{section['steps']} steps, lr {section['lr']:g}" if section else "none"
            row = results.get(f"{name}, {shown}", measure_block_fit, options.data, step, section)
            table.add_row(name, shown, *_shown(row), f"{row['cpu_seconds']:.0f}")
    return table


def _shown(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['wikitext2']:.2f}", f"{row['python-docs']:.2f}"


TABLES = {"recovery": recovery, "methods": methods, "optimizers": optimizers, "blocks": blocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds wikitext-2/")
    parser.add_argument("--base", required=True, help="a compressed checkpoint of the model")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--steps", type=int, default=30, help="of 512 tokens, in the table of losses")
    parser.add_argument("--compare-steps", type=int, default=16, help="of 512 tokens, for methods and optimisers")
    parser.add_argument("--fit-steps", type=int, default=64, help="a block, of 1,024 tokens")
    parser.add_argument("--fit-lr", type=float, default=1e-4)
    parser.add_argument("--results", type=Path, default=Path("finetune.jsonl"))
    options = parser.parse_args()
    results = Results(options.results)
    for name in options.only:
        Console(width=150).print(TABLES[name](results, options))


if __name__ == "__main__":
    main()
