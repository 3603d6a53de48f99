"""Dense and compressed model on the same text, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.progress import Progress
from llmcompress_eval.perplexity import Windows, perplexity
from llmcompress_eval.speed import measure
from llmcompress_eval.tasks import evaluate_tasks

Load = Callable[[], PreTrainedModel]


def evaluate_pair(
    load_dense: Load,
    load_compressed: Load,
    texts: dict[str, Windows],
    speed: bool,
    progress: Progress,
    known: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Perplexity of both models on every text's windows, and, if asked, their speeds.

    known: source -> the dense model's figures, where they have been measured already.
    One model is in memory at a time for perplexity, both for speed. An encoder, for which neither is defined, gives
    empty results.
    """
    unknown = {source: windows for source, windows in texts.items() if source not in known}
    found = {"dense": dict(known)}
    if unknown or speed:
        dense = load_dense()
        if not dense.can_generate():
            return {}, None
        found["dense"] |= _perplexities(dense, "dense", unknown, progress)
        if not speed:
            del dense
    compressed = load_compressed()
    found["compressed"] = _perplexities(compressed, "compressed", texts, progress)
    by_source = {source: {name: found[name][source] for name in found} for source in texts}
    if not speed:
        return by_source, None
    progress.start("speed", 1)
    limit = getattr(compressed.config, "max_position_embeddings", 512)
    prompt = torch.arange(min(512, limit // 2)).unsqueeze(0) % int(compressed.config.vocab_size)
    speeds = measure({"dense": dense, "compressed": compressed}, prompt)
    progress.advance("prefill and decode")
    return by_source, {name: asdict(speed) for name, speed in speeds.items()}


def tasks_of_pair(
    load_dense: Load,
    load_compressed: Load,
    tokenizer: PreTrainedTokenizerBase,
    tasks: dict[str, Any],
    limit: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Results of both models, one in memory at a time, on tasks that `load_tasks` has loaded."""
    loads = {"dense": load_dense, "compressed": load_compressed}
    return {name: evaluate_tasks(load(), tokenizer, tasks, 1, limit, progress) for name, load in loads.items()}


def _perplexities(model: nn.Module, name: str, texts: dict[str, Windows], progress: Progress) -> dict[str, Any]:
    found = {}
    for source, windows in texts.items():
        progress.start(f"perplexity, {name}", len(windows))
        found[source] = asdict(perplexity(model, windows, advance=progress.advance))
    return found
