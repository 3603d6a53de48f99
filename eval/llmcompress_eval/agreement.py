"""How far a compressed model's predictions are from the dense one's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcompress.calibration.modes import evaluation_mode
from llmcompress.errors import InputError
from llmcompress_eval.perplexity import (
    Advance,
    Perplexity,
    Windows,
    as_windows,
    check_input,
    collect,
    from_losses,
    loss,
    mean_and_error,
    predictions,
    rows_at_once,
)  # fmt: skip
from llmcompress_eval.processes import ALONE, Processes


@dataclass(frozen=True)
class Agreement:
    """Over the same predictions: kl, the mean of KL(dense || compressed) in nats, and top1, the share of tokens for
    which both models find the same one likeliest; each with its standard error from the spread of the windows."""

    kl: float
    kl_standard_error: float
    top1: float
    top1_standard_error: float
    tokens: int


def agreement(
    dense: nn.Module,
    compressed: nn.Module,
    windows: Windows | Tensor,
    batch: int = 1,
    advance: Advance = lambda _: None,
    processes: Processes = ALONE,
) -> tuple[Perplexity, Perplexity, Agreement]:
    """Both models' perplexities and their agreement, one pass over the windows; otherwise as `perplexity`.

    InputError if their vocabularies differ in size.
    """
    windows = as_windows(windows)
    for model in (dense, compressed):
        check_input(model, windows)
    sizes = [int(model.get_output_embeddings().weight.shape[0]) for model in (dense, compressed)]  # type: ignore[operator]
    if sizes[0] != sizes[1]:
        raise InputError(f"--against: a vocabulary of {sizes[0]} tokens, and the model's has {sizes[1]}: no comparison")
    with torch.no_grad(), evaluation_mode(dense), evaluation_mode(compressed):
        found = predictions([dense, compressed], windows, batch, advance, processes)
        sums = collect((_distances(logits, targets) for logits, targets in found), processes)
    counts = torch.tensor(windows.counts, dtype=torch.float64)
    agreed = Agreement(*mean_and_error(sums[:, 2], counts), *mean_and_error(sums[:, 3], counts), int(counts.sum()))
    return from_losses(sums[:, 0], windows), from_losses(sums[:, 1], windows), agreed


def _distances(logits: list[Tensor], targets: Tensor) -> list[float]:
    """Both losses, KL(dense || compressed) and the number of equal likeliest tokens, each summed over the window."""
    dense, compressed = logits
    losses = [loss(dense, targets), loss(compressed, targets)]
    kl, equal = 0.0, 0
    for left, right in zip(*(both.split(rows_at_once(both)) for both in logits), strict=True):
        p, q = F.log_softmax(left, -1), F.log_softmax(right, -1)
        kl += F.kl_div(q, p, reduction="none", log_target=True).sum(-1).double().sum().item()
        equal += int((left.argmax(-1) == right.argmax(-1)).sum())
    return [*losses, kl, equal]
