"""What do structured feed-forward layers cost and give, trained from scratch and after a conversion?

    python benchmarks/structured_ffn.py scratch --data FOLDER [--minutes 25]
    python benchmarks/structured_ffn.py convert --data FOLDER [--minutes 10]

FOLDER holds WikiText-2 as `wikitext-2/valid.txt` and `test.txt`.

scratch: a small Llama that predicts bytes is trained on the validation text, dense and with each structure at 63 % and
32 % of its feed-forward values kept (the first block dense, as published), with and without self-guidance, all for the
FLOPs that the dense model takes: without a guide a structured model trains for more steps, with one for fewer more, the
first part of them guided and its data repeated at the end. The paper's width scaling comes last: the widest low-rank
model that has no more parameters than the dense one. Bits a byte on the first 512 windows of the test text.

convert: SmolLM2-135M-Instruct, feed-forward layers alone, both sizes, before and after so many CPU minutes of training
on the validation text (cross entropy), with and without a guide, against `svd_llm` on the same sites at the same size.

Rows are kept in --results and not measured again. CPU seconds, since the machine may be shared.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from llmcompress_eval.perplexity import Windows, perplexity, windows
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, get_cosine_with_min_lr_schedule_with_warmup

import llmcompress
from llmcompress.calibration.text import pack, read_documents, tokenize
from llmcompress.finetune.flops import equal_flops_fraction, flops_per_token, replaced_flops
from llmcompress.finetune.losses import next_token_loss
from llmcompress.finetune.self_guided import GuideSchedule, attach_guides, drop_guides, guided_layers, set_guides
from llmcompress.finetune.train import train
from llmcompress.layers.base import StructuredLinear
from llmcompress.models.load import load_model, load_tokenizer, locate
from llmcompress.recipe import Finetune

MODEL = "builtin:smollm2-135m-instruct"
STRUCTURES = ("low_rank", "block_dense", "block_shuffle")
#: share of feed-forward values removed -> blocks, as published
SIZES = {0.375: 2, 0.6875: 4}
LENGTH, BATCH, LR = 64, 32, 3e-3
#: after a conversion; of 5e-5, 2e-4 and 8e-4 the best for both kinds of layer in twenty steps
TRAINING: dict[str, Any] = {
    "method": "lrc", "loss": "ce", "lr": 2e-4, "warmup": 0.2, "length": 512, "batch": 1, "validation": 0,
}  # fmt: skip


# --- from scratch ----------------------------------------------------------------------------------------------------


def config(width: int, blocks: int) -> LlamaConfig:
    """Bytes as tokens; a gated FFN of 8/3 the width has as many values as the paper's plain one of 4."""
    return LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=width * 8 // 3 // 8 * 8, num_hidden_layers=blocks,
        num_attention_heads=width // 16, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def build(run: dict[str, Any]) -> PreTrainedModel:
    shape = config(run["width"], run["blocks"])
    if run["structure"] == "dense":
        with torch.random.fork_rng():
            torch.manual_seed(run["seed"])
            return LlamaForCausalLM(shape)
    return llmcompress.structured_ffn(
        shape, run["structure"], run["ratio"], num_blocks=SIZES[run["ratio"]], seed=run["seed"]
    )


def steps_for(run: dict[str, Any], dense_steps: int, c_dense: int) -> tuple[int, int]:
    """Steps for the dense model's FLOPs, and how many of them are guided."""
    model = build(run)
    own = flops_per_token(model, LENGTH)
    if not run["guided"]:
        return round(dense_steps * c_dense / own), 0
    share = equal_flops_fraction(c_dense, own, replaced_flops(model))
    return round(dense_steps * (1 + share)), round(dense_steps * share)


def batches(text: Tensor, seed: int, steps: int, repeated: int) -> Iterator[Tensor]:
    """Random windows; the first `repeated` ones come again at the end."""
    for step in range(steps):
        again = step - (steps - repeated)
        generator = torch.Generator().manual_seed((seed << 32) + (again if again >= 0 else step))
        yield text[torch.randint(len(text) - LENGTH, (BATCH, 1), generator=generator) + torch.arange(LENGTH)]


def fit(run: dict[str, Any], text: Tensor, steps: int, guided: int) -> PreTrainedModel:
    model = build(run)
    schedule = GuideSchedule(steps, guided / steps) if guided else None
    if schedule:
        attach_guides(model)
    optimizer = torch.optim.AdamW(model.parameters(), LR, (0.9, 0.999), weight_decay=0.1)
    rate = get_cosine_with_min_lr_schedule_with_warmup(optimizer, steps // 10, steps, min_lr_rate=0.1)
    gates = torch.Generator().manual_seed(run["seed"])
    model.train()
    for step, rows in enumerate(batches(text, run["seed"], steps, guided)):
        if schedule and step < guided:
            set_guides(model, schedule.alpha(step), gates)
        elif guided_layers(model):
            drop_guides(model, optimizer)
        optimizer.zero_grad()
        next_token_loss(model(input_ids=rows, use_cache=False).logits, rows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return model.eval()


def measure_scratch(run: dict[str, Any], texts: dict[str, Tensor], dense_steps: int, c_dense: int) -> dict[str, Any]:
    steps, guided = steps_for(run, dense_steps, c_dense)
    start = time.process_time()
    model = fit(run, texts["valid"], steps, guided)
    seconds = time.process_time() - start
    rows = texts["test"][: 512 * LENGTH].view(-1, LENGTH)
    with torch.no_grad():
        losses = [float(next_token_loss(model(input_ids=part).logits, part)) for part in rows.split(64)]
    layers = [m for m in model.modules() if isinstance(m, StructuredLinear)]
    return {
        **run, "steps": steps, "guided_steps": guided, "parameters": sum(p.numel() for p in model.parameters()),
        "kept": kept_share(layers),
        "gflops_a_step": 3 * flops_per_token(model, LENGTH) * LENGTH * BATCH / 1e9, "cpu_seconds": seconds,
        "bits_a_byte": sum(losses) / len(losses) / math.log(2),
    }  # fmt: skip


def kept_share(layers: list[StructuredLinear]) -> float:
    return sum(m.storage_values for m in layers) / sum(m.d_in * m.d_out for m in layers) if layers else 1.0


def scratch_runs(options: argparse.Namespace) -> list[dict[str, Any]]:
    base = {"width": options.width, "blocks": options.blocks, "seed": 0, "ratio": 0.0, "guided": False}
    runs = [{**base, "structure": "dense"}]
    for ratio in options.ratios:
        for structure in STRUCTURES:
            runs += [{**base, "structure": structure, "ratio": ratio, "guided": guided} for guided in (False, True)]
        runs += wider({**base, "structure": "low_rank", "ratio": ratio})
    return runs


def wider(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The widest model of as many blocks whose parameters are at most those of the dense one, if it is any wider."""
    limit = build({**run, "structure": "dense"}).num_parameters()
    width = run["width"]
    while build({**run, "width": width + 16}).num_parameters() <= limit:
        width += 16
    return [{**run, "width": width}] if width > run["width"] else []


def scratch(options: argparse.Namespace) -> Table:
    folder = options.data / "wikitext-2"
    texts = {n: torch.tensor(list((folder / f"{n}.txt").read_bytes()), dtype=torch.long) for n in ("valid", "test")}
    results, runs = Results(options.results), scratch_runs(options)
    c_dense = flops_per_token(build(runs[0]), LENGTH)
    dense_steps = options.steps or _affordable(runs, c_dense, texts["valid"], 60 * options.minutes)
    columns = ("width", "kept", "parameters", "steps", "guided", "GFLOPs a step", "CPU s", "bits a byte")
    table = Table("feed-forward layers", *columns)
    for run in runs:
        key = json.dumps([run, dense_steps])
        row = results.get(key, measure_scratch, run, texts, dense_steps, c_dense)
        table.add_row(
            run["structure"] + (", guided" if run["guided"] else ""), str(run["width"]), f"{row['kept']:.1%}",
            f"{row['parameters']:,}", str(row["steps"]), str(row["guided_steps"]), f"{row['gflops_a_step']:.2f}",
            f"{row['cpu_seconds']:.0f}", f"{row['bits_a_byte']:.3f}",
        )  # fmt: skip
    return table


def _affordable(runs: list[dict[str, Any]], c_dense: int, text: Tensor, seconds: float) -> int:
    """Steps of the dense model such that all runs together take about that long."""
    probe = 4
    start = time.process_time()
    for run in runs:
        fit(run, text, probe, 0)
    per_step = (time.process_time() - start) / probe  # one step of every model
    longer = sum(steps_for(run, 1000, c_dense)[0] / 1000 for run in runs) / len(runs)
    return max(20, int(seconds / (per_step * longer * 1.2)))


# --- after a conversion ----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def conversion(step: str, data: Path) -> tuple[PreTrainedModel, dict[str, float], Tensor, Windows | Tensor]:
    """The converted model, what is kept and its perplexity; tokens to train on and windows to measure on."""
    tokenizer = load_tokenizer(locate(MODEL))
    valid = tokenize(tokenizer, read_documents(str(data / "wikitext-2" / "valid.txt"), "calibration"))
    test = tokenize(tokenizer, read_documents(str(data / "wikitext-2" / "test.txt"), "evaluation"))
    held_out = windows(test, 1024, 16, "test.txt")
    model = load_model(locate(MODEL), torch.float32)
    llmcompress.compress(model, tokens=pack(valid, 64, 512, "valid.txt"), targets=["ffn"], **json.loads(step))
    layers = [m for m in model.modules() if isinstance(m, StructuredLinear)]
    before = {"kept": kept_share(layers), "before": perplexity(model, held_out).perplexity}
    return model, before, pack(valid, valid.numel(), 512, "valid.txt"), held_out


def measure_conversion(step: str, guided: bool, minutes: float, data: Path) -> dict[str, Any]:
    """Perplexity before and after `minutes` CPU minutes of training; the steps come from a timing of four."""
    converted, before, training, held_out = conversion(step, data)
    section: dict[str, Any] = {**TRAINING, "self_guided": {} if guided else None}
    model = copy.deepcopy(converted)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        train(model, training[:4], Finetune(**{**section, "steps": 4, "lr": 1e-12}), Path(folder) / "probe")
        steps = max(4, round(60 * minutes / (time.process_time() - start) * 4))
        start = time.process_time()
        train(model, training, Finetune(**section, steps=steps), Path(folder) / "run")
    found = {**before, "steps": steps, "cpu_seconds": time.process_time() - start}
    return found | {"after": perplexity(model, held_out).perplexity}


def convert(options: argparse.Namespace) -> Table:
    results = Results(options.results)
    table = Table("feed-forward layers", "guide", "kept", "before", "steps", "CPU s", "after")
    for ratio in options.ratios:
        steps: dict[str, dict[str, Any]] = {
            f"structured_ffn, {name}": {"method": "structured_ffn", "structure": name, "num_blocks": SIZES[ratio]}
            for name in STRUCTURES
        }
        steps["svd_llm, pivot form"] = {"method": "svd_llm"}
        for name, step in steps.items():
            for guided in (False, True) if step["method"] == "structured_ffn" else (False,):
                key = json.dumps([name, ratio, guided, options.minutes])
                arguments = (json.dumps({**step, "ratio": ratio}), guided, options.minutes, options.data)
                row = results.get(key, measure_conversion, *arguments)
                table.add_row(
                    name, "yes" if guided else "", f"{row['kept']:.1%}", f"{row['before']:.2f}", str(row["steps"]),
                    f"{row['cpu_seconds']:.0f}", f"{row['after']:.2f}",
                )  # fmt: skip
    return table


class Results:
    """Rows measured so far, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in map(json.loads, lines)}

    def get(self, key: str, function: Any, *arguments: Any) -> dict[str, Any]:
        if key not in self.rows:
            self.rows[key] = {"key": key, "torch": torch.__version__, **function(*arguments)}
            with self.path.open("a") as file:
                file.write(json.dumps(self.rows[key]) + "\n")
        return self.rows[key]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", choices=["scratch", "convert"])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds wikitext-2/")
    parser.add_argument("--ratios", type=float, nargs="+", choices=SIZES, default=list(SIZES), help="removed")
    parser.add_argument("--minutes", type=float, help="CPU minutes: of all scratch runs (25), of each conversion (10)")
    parser.add_argument("--steps", type=int, help="scratch: steps of the dense model, in place of --minutes")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--results", type=Path, default=Path("structured_ffn.jsonl"))
    options = parser.parse_args(arguments)
    options.minutes = options.minutes or {"scratch": 25.0, "convert": 10.0}[options.table]
    Console(width=150).print({"scratch": scratch, "convert": convert}[options.table](options))


if __name__ == "__main__":
    main()
