"""Tokens per second of models measured in turn, so that their ratio holds on a machine whose speed drifts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
