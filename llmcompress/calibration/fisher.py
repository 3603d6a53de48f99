"""Gradient statistics: Fisher row and column weights (FWSVD, arXiv 2207.00112) and output-gradient Grams (K-FAC)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcompress.calibration.collect import BACKWARD, accumulate_gram
from llmcompress.calibration.modes import frozen
from llmcompress.errors import InputError, RunError
from llmcompress.types import Site, Statistics


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed next-token cross-entropy of each sequence (sequences,), float32.

    logits (sequences, length, vocabulary) at the positions whose next tokens are labels[:, 1:]; labels as in
    transformers: the unshifted tokens, -100 where none counts.
    """
    losses = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:].to(logits.device), ignore_index=-100, reduction="none"
    )
    return losses.sum(1)


def sample_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Labels drawn from the model's own distribution, laid out like `token_losses` expects: (sequences, length)."""
    probabilities = logits[:, :-1].float().softmax(-1)
    drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator).reshape(probabilities.shape[:2])
    return F.pad(drawn, (1, 0), value=-100)


class OutputStatistics:
    """Hooks that gather gradient statistics of sites while sequences run forward and backward through them.

    The loss that is differentiated is summed over tokens and sequences. A site's weight gradient for one sequence is
    formed from its input and output gradient, squared and summed at once: parameters need no gradient, and no more than
    one (d_out, d_in) matrix exists at a time. `lengths` (sequences,) counts the labels of each sequence and must be set
    before each backward pass: Fisher weights are those of the mean token loss.
    """

    def __init__(self, model: nn.Module, sites: Iterable[Site], needs: frozenset[str]) -> None:
        self.sites, self.needs = list(sites), needs & BACKWARD
        self.lengths: Tensor | None = None
        modules = dict(model.named_modules())
        for site in self.sites:
            if site.name not in modules:
                raise InputError(f"{site.name}: the model has no such module")
        self.sums = {
            site.name: self._empty(site, model.get_parameter(f"{site.name}.weight").device) for site in self.sites
        }
        self._inputs: dict[str, Tensor] = {}
        self._stack = ExitStack()
        for site in self.sites:
            module = modules[site.name]
            self._stack.callback(module.register_forward_hook(self._forward_hook(site)).remove)

    def _empty(self, site: Site, device: torch.device) -> Statistics:
        shapes = {"row_fisher": (site.d_in,), "column_fisher": (site.d_out,), "output_gram": (site.d_out, site.d_out)}
        zeros: dict[str, Any] = {
            name: torch.zeros(shapes[name], dtype=torch.float64, device=device) for name in self.needs
        }
        return Statistics(**zeros)

    def _forward_hook(self, site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            x = args[0].detach()
            output.register_hook(lambda gradient: self._receive(site, x, gradient))

        return hook

    def _receive(self, site: Site, x: Tensor, gradient: Tensor) -> None:
        if not torch.isfinite(gradient.sum()):
            raise RunError(f"{site.name}: the gradient at its output is not finite")
        if self.lengths is None:
            raise RunError("OutputStatistics.lengths is not set")
        sums = self.sums[site.name]
        sequences = self.lengths.numel()
        g = gradient.detach().float().reshape(sequences, -1, site.d_out)
        sums.sequences += sequences
        sums.backward_tokens += float(self.lengths.sum())
        if sums.output_gram is not None:
            accumulate_gram(sums.output_gram, g.flatten(0, 1))
        if sums.row_fisher is None and sums.column_fisher is None:
            return
        x = x.float().reshape(sequences, -1, site.d_in)
        for row, (sequence_g, sequence_x) in enumerate(zip(g, x, strict=True)):
            square = (sequence_g.T @ sequence_x).div_(self.lengths[row]).square_()
            if sums.row_fisher is not None:
                sums.row_fisher += square.sum(0, dtype=torch.float64)
            if sums.column_fisher is not None:
                sums.column_fisher += square.sum(1, dtype=torch.float64)

    def close(self) -> None:
        self._stack.close()


class FisherAccumulator:
    """Fisher weights of a model that is in memory: a context manager; `update(batch)` runs forward and backward.

    batch: input_ids and optionally labels and attention_mask, each (sequences, length) int64, one loss a sequence.
    `row_weights[site]` (d_in,), `column_weights[site]` (d_out,) are means over sequences, float64. Accumulators
    merge by `+`. A site that no gradient reaches has weights of zero. Parameters' `grad` and `requires_grad` and the
    training mode are as before afterwards; a pass that ends with an exception adds nothing.
    InputError if a sequence has no label or a site is not in the model; RunError if the loss or, naming the site, a
    gradient is not finite.
    """

    def __init__(self, model: nn.Module, sites: Iterable[Site]) -> None:
        self.model, self.sites = model, list(sites)
        self.statistics: dict[str, Statistics] = {site.name: Statistics() for site in self.sites}
        self.samples = 0  #: sequences seen

    def __enter__(self) -> FisherAccumulator:
        self._hooks = OutputStatistics(self.model, self.sites, frozenset({"row_fisher", "column_fisher"}))
        self._seen = 0
        self._frozen = frozen(self.model)
        self._frozen.__enter__()
        # The graph starts at the embeddings' output: no parameter needs a gradient
        embeddings: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        self._start = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._start.remove()
        self._hooks.close()
        if kind is None:
            self.statistics = {name: self.statistics[name] + self._hooks.sums[name] for name in self.statistics}
            self.samples += self._seen
        self._frozen.__exit__(None, None, None)

    def update(self, batch: dict[str, Tensor]) -> None:
        """Adds the sequences of a batch."""
        labels = batch.get("labels", batch["input_ids"])
        lengths = (labels[:, 1:] != -100).sum(1)
        if (lengths == 0).any():
            raise InputError("a sequence has no label: every token is -100")
        self._hooks.lengths = lengths
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        loss = token_losses(self.model(**inputs).logits, labels).sum()
        if not torch.isfinite(loss):
            raise RunError("the loss is not finite")
        loss.backward()
        self._seen += len(labels)

    @property
    def row_weights(self) -> dict[str, Tensor]:
        return self._means("row_fisher")

    @property
    def column_weights(self) -> dict[str, Tensor]:
        return self._means("column_fisher")

    def _means(self, field: str) -> dict[str, Tensor]:
        if not self.samples:
            raise InputError("no sequence was measured: call update() within the context, and read after it")
        return {name: found.require(field, name) / self.samples for name, found in self.statistics.items()}

    def __add__(self, other: FisherAccumulator) -> FisherAccumulator:
        merged = FisherAccumulator(self.model, self.sites)
        merged.statistics = {name: self.statistics[name] + other.statistics[name] for name in self.statistics}
        merged.samples = self.samples + other.samples
        return merged
