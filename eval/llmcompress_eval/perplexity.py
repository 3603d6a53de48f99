"""Perplexity over windows of text, with or without overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcompress.calibration.modes import evaluation_mode
from llmcompress.calibration.text import check_context, check_vocabulary
from llmcompress.errors import InputError, RunError
from llmcompress_eval.processes import ALONE, Processes

Advance = Callable[[str], None]


@dataclass(frozen=True)
class Windows:
    """tokens (windows, length) int64; each window begins `stride` tokens after the one before it.

    A window predicts the tokens that no window before it has predicted: the first one `length - 1`, the others their
    last `stride`, with what stands before as context. Without overlap (`stride == length`) a window's first token is
    never predicted. bytes (windows, length) int64: UTF-8 bytes of text of each token; None where they are unknown.
    """

    tokens: Tensor
    stride: int
    bytes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def scored(self, index: int) -> int:
        """How many tokens at its end window `index` predicts."""
        return self.length - 1 if index == 0 else min(self.stride, self.length - 1)

    @property
    def counts(self) -> list[int]:
        return [self.scored(index) for index in range(len(self))]

    @property
    def scored_bytes(self) -> int | None:
        """Bytes of all predicted tokens."""
        if self.bytes is None:
            return None
        return sum(int(row[self.length - self.scored(index) :].sum()) for index, row in enumerate(self.bytes))


def as_windows(given: Windows | Tensor) -> Windows:
    """A tensor (windows, length) stands for windows without overlap."""
    return given if isinstance(given, Windows) else Windows(given, given.shape[1])


def windows(stream: Tensor, length: int, count: int | None, source: str, stride: int | None = None) -> Tensor:
    """The first `count` (None: all) windows of `length` tokens, `stride` apart (None: no overlap): (windows, length).

    InputError if there is none, or if windows would leave tokens out between them.
    """
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise InputError(f"stride: {stride}; expected 1 to {length}, the window's length")
    if stream.numel() < length:
        raise InputError(f"{source}: {stream.numel()} tokens, fewer than one window of {length}")
    return stream.unfold(0, length, stride)[:count]


@dataclass(frozen=True)
class Perplexity:
    """perplexity = exp(nll), nll the mean over predicted tokens, in nats; `standard_error` is that of `nll`, from the
    spread of the windows (0 for one window). bits_per_byte = the summed loss in bits over the UTF-8 bytes of the
    predicted tokens' text, byte_perplexity = 2 to that power: comparable between tokenizers; None without a text."""

    perplexity: float
    nll: float
    standard_error: float
    windows: int
    tokens: int
    length: int
    stride: int
    bytes: int | None
    bits_per_byte: float | None
    byte_perplexity: float | None


def check_length(model: nn.Module, length: int) -> None:
    """InputError if windows are longer than the model's context, or predict nothing."""
    if length < 2:
        raise InputError(f"length: a window of {length} token predicts nothing; at least 2")
    check_context(model, length, "length: a window")


def check_input(model: nn.Module, windows: Windows | Tensor) -> None:
    """InputError unless the model is a causal language model whose context and vocabulary hold the windows."""
    if not model.can_generate():  # type: ignore[operator]
        raise InputError(f"{type(model).__name__} is no causal language model: perplexity is not defined for it")
    tokens = as_windows(windows).tokens
    check_length(model, tokens.shape[1])
    check_vocabulary(model, tokens)


def perplexity(
    model: nn.Module,
    windows: Windows | Tensor,
    batch: int = 1,
    advance: Advance = lambda _: None,
    processes: Processes = ALONE,
) -> Perplexity:
    """Token-weighted perplexity of a causal model; a tensor (windows, length) int64 is windows without overlap.

    The model is put into evaluation mode meanwhile. `processes`, where there are several, share the windows.
    InputError as in `check_input`; RunError naming the first window whose logits are not finite.
    """
    windows = as_windows(windows)
    check_input(model, windows)
    with torch.no_grad(), evaluation_mode(model):
        found = predictions([model], windows, batch, advance, processes)
        sums = collect(([loss(logits, targets)] for (logits,), targets in found), processes)
    return from_losses(sums[:, 0], windows)


def predictions(
    models: Sequence[nn.Module], windows: Windows, batch: int, advance: Advance, processes: Processes
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Of each window of this process's share: every model's logits (scored, vocabulary) float32, targets (scored,)."""
    own = processes.share(len(windows))
    for start in range(own.start, own.stop, batch):
        stop = min(start + batch, own.stop)
        rows = windows.tokens[start:stop].to(next(models[0].parameters()).device)
        logits = [model(input_ids=rows, use_cache=False).logits for model in models]
        for offset, index in enumerate(range(start, stop)):
            first = windows.length - windows.scored(index)
            yield [found[offset, first - 1 : -1].float() for found in logits], rows[offset, first:]
            advance(f"window {index + 1} of {len(windows)}")


def rows_at_once(logits: Tensor) -> int:
    """Of (scored, vocabulary): as many as a CPU's cache holds, which takes a quarter of the time of all at once."""
    return max(1, (1 << 20 if logits.device.type == "cpu" else 1 << 28) // logits.shape[1])


def loss(logits: Tensor, targets: Tensor) -> float:
    """Negative log-likelihood of the targets, summed, in nats."""
    rows = rows_at_once(logits)
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.cat([F.cross_entropy(*part, reduction="none") for part in parts]).double().sum().item()


def collect(rows: Iterable[list[float]], processes: Processes) -> Tensor:
    """The sums of every window, from all processes: (windows, quantities) float64; RunError where one is not finite."""
    own: list[list[float]] = []
    for row in rows:
        own.append(row)
        if not all(map(math.isfinite, row)):
            break  # the windows before it are whole, so that its number is its place
    sums = torch.tensor(processes.gather(own), dtype=torch.float64)
    broken = (~torch.isfinite(sums).all(1)).nonzero()
    if len(broken):
        raise RunError(f"window {int(broken[0])}: the logits are not finite")
    return sums


def mean_and_error(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    """Mean over tokens of windows' sums, and its standard error: that of a ratio of sums over windows."""
    n = len(sums)
    mean = sums.sum() / counts.sum()
    spread = (sums - mean * counts).square().sum()
    error = (spread * n / (n - 1)).sqrt() / counts.sum() if n > 1 else torch.zeros(())
    return mean.item(), error.item()


def from_losses(losses: Tensor, windows: Windows) -> Perplexity:
    counts = torch.tensor(windows.counts, dtype=torch.float64)
    nll, error = mean_and_error(losses, counts)
    size = windows.scored_bytes
    bits = losses.sum().item() / math.log(2) / size if size else None
    return Perplexity(
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        nll=nll,
        standard_error=error,
        windows=len(windows),
        tokens=int(counts.sum()),
        length=windows.length,
        stride=windows.stride,
        bytes=size,
        bits_per_byte=bits,
        byte_perplexity=None if bits is None else 2.0**bits if bits < 1000 else math.inf,
    )
