"""Tokens per second of models measured in turn, so that their ratio holds on a machine whose speed drifts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Speed:
    """Median tokens per second: `prefill` of one sequence, `decode` of one sequence with a key-value cache."""

    prefill: float
    decode: float


def measure(models: Mapping[str, nn.Module], prompt: Tensor, new_tokens: int = 16, rounds: int = 3) -> dict[str, Speed]:
    """Speeds of causal models on one prompt (1, length) int64: one round uncounted, then `rounds` in turn, medians."""
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for round_number in range(rounds + 1):
        for name, model in models.items():
            first, rest = _once(model, prompt, new_tokens)
            if round_number:
                prefill[name].append(prompt.shape[1] / first)
                decode[name].append(new_tokens / rest)
    return {name: Speed(statistics.median(prefill[name]), statistics.median(decode[name])) for name in models}


def measure_generate(
    models: Mapping[str, PreTrainedModel], prompt: Tensor, new_tokens: int = 16, rounds: int = 3, cache: str = "dynamic"
) -> dict[str, float]:
    """New tokens a second of transformers' `generate`, greedy, its prefill of the prompt (1, length) int64 included.

    cache: "dynamic" or "static"; with a static one transformers compiles the decoding step on a GPU. The first round,
    which compiles and tunes, does not count; the others are run in turn, and their medians taken.
    """
    found: dict[str, list[float]] = {name: [] for name in models}
    for round_number in range(rounds + 1):
        for name, model in models.items():
            tokens = prompt.to(model.device)
            start = _now(model.device)
            model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, cache_implementation=cache,
                min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0,
            )  # fmt: skip
            if round_number:
                found[name].append(new_tokens / (_now(model.device) - start))
    return {name: statistics.median(values) for name, values in found.items()}


def _once(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    device = next(model.parameters()).device
    prompt = prompt.to(device)
    with torch.no_grad():
        start = _now(device)
        output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        first = _now(device) - start
        start = _now(device)
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        return first, _now(device) - start


def _now(device: torch.device) -> float:
    synchronize: Callable[[], None] | None = torch.cuda.synchronize if device.type == "cuda" else None
    if synchronize:
        synchronize()
    return time.perf_counter()
