"""Perplexity over non-overlapping windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcompress.calibration.modes import evaluation_mode
from llmcompress.calibration.text import check_context, check_vocabulary
from llmcompress.errors import InputError, RunError


@dataclass(frozen=True)
class Perplexity:
    """perplexity = exp(nll), nll the mean over predicted tokens, in nats; `standard_error` is that of `nll`, from the
    spread of the windows' means (0 for one window)."""

    perplexity: float
    nll: float
    standard_error: float
    windows: int
    tokens: int


def windows(stream: Tensor, length: int, count: int | None, source: str) -> Tensor:
    """The first `count` (None: all) windows of `length` tokens: (windows, length). InputError if there is none."""
    available = stream.numel() // length
    if available < 1:
        raise InputError(f"{source}: {stream.numel()} tokens, fewer than one window of {length}")
    number = available if count is None else min(count, available)
    return stream[: number * length].reshape(number, length)


def check_length(model: nn.Module, length: int) -> None:
    """InputError if windows are longer than the model's context, or predict nothing."""
    if length < 2:
        raise InputError(f"length: a window of {length} token predicts nothing; at least 2")
    check_context(model, length, "length: a window")


def check_input(model: nn.Module, tokens: Tensor) -> None:
    """InputError unless the model is a causal language model whose context and vocabulary hold the windows."""
    if not model.can_generate():  # type: ignore[operator]
        raise InputError(f"{type(model).__name__} is no causal language model: perplexity is not defined for it")
    check_length(model, tokens.shape[1])
    check_vocabulary(model, tokens)


def perplexity(
    model: nn.Module, tokens: Tensor, batch: int = 1, advance: Callable[[str], None] = lambda _: None
) -> Perplexity:
    """Token-weighted perplexity of a causal model on tokens (windows, length) int64; each window predicts length - 1.

    The model is put into evaluation mode meanwhile.
    InputError as in `check_input`; RunError naming the window whose logits are not finite.
    """
    check_input(model, tokens)
    means: list[float] = []
    device = next(model.parameters()).device
    with torch.no_grad(), evaluation_mode(model):
        for start in range(0, len(tokens), batch):
            rows = tokens[start : start + batch].to(device)
            logits = model(input_ids=rows, use_cache=False).logits
            for index, (row_logits, row) in enumerate(zip(logits, rows, strict=True)):
                nll = F.cross_entropy(row_logits[:-1].float(), row[1:]).item()
                if not math.isfinite(nll):
                    raise RunError(f"window {start + index}: the logits are not finite")
                means.append(nll)
                advance(f"window {start + index + 1} of {len(tokens)}")
    values = torch.tensor(means, dtype=torch.float64)
    nll = values.mean().item()
    error = (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else 0.0
    return Perplexity(math.exp(nll) if nll < 700 else math.inf, nll, error, len(values), tokens[:, 1:].numel())
