"""`llmcompress eval --speed`: prefill, decoding and generation of one or two models in one run, and the byte limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from llmcompress.models.load import quiet_transformers
from llmcompress.progress import Progress
from llmcompress_eval.memory import decode_bytes
from llmcompress_eval.speed import measure, measure_generate
from llmcompress_eval.speed_modules import ModuleSpeed, copy_bandwidth, measure_modules, module_table
from llmcompress_eval.tables import text_table

STATIC = "generate, static cache"


def measure_speed(models: Mapping[str, PreTrainedModel], progress: Progress, rounds: int = 3) -> dict[str, Any]:
    """Tokens a second by row ("prefill", ...) and model; of "dense" and "compressed", the times of their modules too.

    `limit` is tokens a second if decoding did nothing but read each stored weight once, at the bandwidth of a copy.
    """
    first = next(iter(models.values()))
    pair = "dense" in models and "compressed" in models
    progress.start("speed", 3 + pair)
    context = getattr(first.config, "max_position_embeddings", 512)
    prompt = torch.arange(min(512, context // 2)).unsqueeze(0) % int(first.config.vocab_size)
    short = prompt[:, : max(1, min(16, prompt.shape[1] - 16))]
    new_tokens = min(16, context - prompt.shape[1])
    bandwidth = copy_bandwidth(first.device)
    speeds = measure(models, prompt, new_tokens, rounds)
    progress.advance("prefill and decode")
    rows = {what: {name: getattr(speed, what) for name, speed in speeds.items()} for what in ("prefill", "decode")}
    for label, cache in (("generate", "dynamic"), (STATIC, "static")):
        with quiet_transformers():
            rows[label] = measure_generate(models, short, new_tokens, rounds, cache)
        progress.advance(label)
    modules: list[ModuleSpeed] = []
    if pair:
        modules = measure_modules(models["dense"], models["compressed"], [1, prompt.shape[1]], rounds, bandwidth)
        progress.advance("modules")
    return {
        "device": torch.cuda.get_device_name(first.device) if first.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(first.dtype).removeprefix("torch."),
        "prompt": prompt.shape[1],
        "bandwidth": bandwidth,
        "end_to_end": rows,
        "limit": {name: bandwidth / decode_bytes(model) for name, model in models.items()},
        "modules": [asdict(module) for module in modules],
    }


def speed_tables(found: dict[str, Any]) -> list[Table]:
    tables = [end_to_end_table(found)]
    if found["modules"]:
        tables.append(module_table([ModuleSpeed(**module) for module in found["modules"]]))
    return tables


def end_to_end_table(found: dict[str, Any]) -> Table:
    """Tokens a second; the byte limit bounds decoding and generation, one sequence at a time."""
    place = f"{found['dtype']}, {found['device']}" + (
        f", {found['threads']} threads" if found["device"] == "cpu" else ""
    )
    title = f"tokens a second, end to end ({place})"
    names = list(found["limit"])
    pair = len(names) == 2
    limit = f"decode, byte limit at {found['bandwidth'] / 1e9:,.1f} GB/s"
    labels = {"prefill": f"prefill, {found['prompt']} tokens"}
    if found["device"] != "cpu":
        labels[STATIC] = f"{STATIC}, compiled"
    rows = []
    for row, rates in {**found["end_to_end"], limit: found["limit"]}.items():
        ratio = [f"{rates[names[1]] / rates[names[0]]:.2f}x"] if pair else []
        rows.append([labels.get(row, row), *[f"{rates[name]:,.1f}" for name in names], *ratio])
    return text_table(title, ["", *names, *(["ratio"] if pair else [])], rows)
