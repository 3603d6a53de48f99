"""The dense model's statistics: a pass over its blocks, and one back through them where gradients are needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcompress.calibration.collect import InputStatistics, capture_inputs
from llmcompress.calibration.fisher import OutputStatistics, sample_labels, token_losses
from llmcompress.errors import InputError, RunError
from llmcompress.finite import all_finite
from llmcompress.models.runner import Runner, check_finite
from llmcompress.plan import Plan
from llmcompress.progress import Progress
from llmcompress.recipe import BlockRecovery
from llmcompress.types import Site, Statistics
from llmcompress.workspace import Store

log = logging.getLogger("llmcompress")


@dataclass(frozen=True)
class Settings:
    """How calibration runs; see `Calibration` in the recipe."""

    batch_tokens: int = 4096
    backward_samples: int | None = None
    targets: str = "labels"
    seed: int = 0
    recovery: BlockRecovery | None = None
    sampler: Any = None  # a backend that chooses calibration rows, and a maker of one that summarises each input's
    stream: Callable[[], Any] | None = None
    gram: Callable[[], Any] | None = None  # makes one recovery of an input's Gram

    def backward_sequences(self, tokens: Tensor) -> int:
        """How many of the sequences gradients are computed for."""
        return min(self.backward_samples or len(tokens), len(tokens))


class Measurement:
    """Runs the dense blocks of a plan's model over `tokens` (sequences, length) int64, and keeps sums in `store`."""

    def __init__(
        self, runner: Runner, plan: Plan, tokens: Tensor, store: Store, settings: Settings, progress: Progress
    ) -> None:
        self.runner, self.plan, self.tokens, self.store, self.settings = runner, plan, tokens, store, settings
        self.progress = progress
        self.count = len(plan.structure.blocks)
        self.batch = max(1, settings.batch_tokens // tokens.shape[1])
        self._width: int | None = None
        self._recent: dict[str, dict[str, Statistics]] = {}

    def embed(self) -> None:
        """What every pass starts with: the blocks' further arguments, and the embeddings, unless they were used up."""
        with self.runner.ends_loaded():
            self.runner.record_arguments(self.tokens)
            first = self.runner.embed(self.tokens[:1])
            self._width = first.shape[-1]
            if self.store.has("hidden/00000") or self._hidden_consumed():
                return
            hidden = self.store.new_hidden("hidden/00000", self.shape, self.runner.dtype)
            for rows in self.batches(len(self.tokens)):
                hidden[rows] = self.runner.embed(self.tokens[rows]).to(hidden)
            check_finite(hidden, "embeddings")
            self.store.commit_hidden("hidden/00000")

    def _hidden_consumed(self) -> bool:
        return self.store.has("blocks/00000") or self.store.has("statistics/00000")

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.tokens.shape, self._width or 0)

    def batches(self, total: int) -> Iterator[slice]:
        for start in range(0, total, self.batch):
            yield slice(start, min(start + self.batch, total))

    def open(self, key: str) -> Tensor:
        """A finished stream of hidden states, of `shape`."""
        return self.store.open_hidden(key, self.shape, self.runner.dtype)

    @property
    def complete(self) -> bool:
        """Whether all is in the store; gradients always look again."""
        return not self.plan.backward_needs and all(self.store.has(f"statistics/{i:05d}") for i in range(self.count))

    def measure(self) -> None:
        """The statistics of all blocks, after `embed`; goes on with the first block that is missing."""
        keep_all = bool(self.plan.backward_needs)
        self.progress.start("calibrate", self.count)
        for index in range(self.count):
            if not self.store.has(f"statistics/{index:05d}"):
                sites = self.sites_in(index)
                statistics = self.forward(index, sites, self.plan.forward_needs, f"hidden/{index:05d}", "hidden")
                self._put_statistics(f"statistics/{index:05d}", statistics)
            if not keep_all and not (index == 0 and self._runs_again):
                self.store.delete(f"hidden/{index:05d}")
            self.progress.advance(self.plan.structure.blocks[index])
        if self.plan.backward_needs:
            self._backward()
            for index in range(0 if not self._runs_again else 1, self.count + 1):
                self.store.delete(f"hidden/{index:05d}")

    @property
    def _runs_again(self) -> bool:
        """Whether the embeddings are needed when blocks are compressed, after all statistics are known."""
        return self.plan.propagate or self.settings.recovery is not None

    def sites_in(self, index: int) -> list[Site]:
        """The targeted sites of a block, and the first readers of their inputs."""
        targeted = {site.name for site in self.plan.sites}
        inputs = {site.input for site in self.plan.sites}
        return [s for s in self.plan.structure.in_block(index) if s.name in targeted or s.name in inputs]

    def forward(
        self, index: int, sites: list[Site], needs: frozenset[str], source: str, target: str
    ) -> dict[str, Statistics]:
        """Runs one dense block over `source`, gathers statistics of its inputs, writes `target/INDEX+1`."""
        hidden = self.open(source)
        following = f"{target}/{index + 1:05d}"
        output = self.store.new_hidden(following, self.shape, self.runner.dtype)
        collected = self.collector(sites, needs)
        read = sites if needs else []
        self.check_weights(sites)
        with (
            self.runner.block_loaded(index),
            capture_inputs(self.runner.model, read, collected.receive),
            torch.no_grad(),
        ):
            for rows in self.batches(len(hidden)):
                output[rows] = self.runner.run_block(index, hidden[rows].to(self.runner.device)).to(output)
        check_finite(output, self.plan.structure.blocks[index])
        self.store.commit_hidden(following)
        return sums_of(collected)

    def collector(self, sites: list[Site], needs: frozenset[str]) -> InputStatistics:
        """Empty sums of the inputs of a block's sites."""
        settings, rows = self.settings, self.tokens.numel()
        if not needs:  # rows that nothing is summed of need no choice
            return InputStatistics(sites, needs, self.runner.device)
        return InputStatistics(
            sites, needs, self.runner.device, settings.sampler, settings.stream, rows, settings.seed, settings.gram
        )

    def _put_statistics(self, key: str, statistics: dict[str, Statistics]) -> None:
        tensors = {
            f"{name}|{field_name}": value
            for name, sums in statistics.items()
            for field_name in Statistics.SUMS
            if (value := getattr(sums, field_name)) is not None
        }
        counts = {name: [sums.tokens, sums.sequences, sums.backward_tokens] for name, sums in statistics.items()}
        self.store.put(key, tensors, counts)

    def _get_statistics(self, key: str) -> dict[str, Statistics]:
        tensors, counts = self.store.get(key)
        found = {name: Statistics(count[0], count[1], count[2]) for name, count in counts.items()}
        for key_name, value in tensors.items():
            name, _, field_name = key_name.partition("|")
            setattr(found[name], field_name, value)
        return found

    def stored(self, kind: str, block: int) -> dict[str, Statistics]:
        """Statistics from the store, the last few blocks' kept in memory: a block's units are asked for one by one."""
        key = f"{kind}/{block:05d}"
        if key not in self._recent:
            if len(self._recent) >= 4:
                self._recent.clear()
            self._recent[key] = self._get_statistics(key) if self.store.has(key) else {}
        return self._recent[key]

    def check_weights(self, sites: Sequence[Site]) -> None:
        """Before a block is run: what comes out of it would not tell which of its weights is to blame."""
        for site in sites:
            if not all_finite(self.runner.weight(site)):
                raise InputError(f"{site.name}: its weight is not finite")

    # -- gradients, from the last block to the first ----------------------------------------------------------------

    def _backward(self) -> None:
        samples = self.settings.backward_sequences(self.tokens)
        shape = (samples, *self.shape[1:])
        last = f"gradient/{self.count:05d}"
        if not self.store.has(last) and not self.store.has(f"gradients/{self.count - 1:05d}"):
            self._loss_gradient(last, shape)
        self.progress.start("gradients", self.count)
        for index in reversed(range(self.count)):
            if not self.store.has(f"gradients/{index:05d}"):
                self._block_backward(index, shape)
            self.store.delete(f"gradient/{index + 1:05d}")
            self.progress.advance(self.plan.structure.blocks[index])
        self.store.delete(f"gradient/{0:05d}")

    def _loss_gradient(self, key: str, shape: tuple[int, ...]) -> None:
        hidden = self.open(f"hidden/{self.count:05d}")
        gradient = self.store.new_hidden(key, shape, torch.float32)
        generator = torch.Generator(device=self.runner.device).manual_seed(self.settings.seed)
        with self.runner.ends_loaded():
            for row in range(shape[0]):  # one sequence at a time: its logits are the largest tensor of the run
                tokens = self.tokens[row : row + 1]
                leaf = hidden[row : row + 1].to(self.runner.device).requires_grad_()
                with torch.enable_grad():
                    logits = self.runner.logits(tokens, leaf)
                    drawn = self.settings.targets == "sampled"
                    labels = sample_labels(logits.detach(), generator) if drawn else tokens
                    token_losses(logits, labels).sum().backward()
                if leaf.grad is None:
                    raise RunError("the loss does not depend on the last block")
                gradient[row] = leaf.grad[0].float().cpu()
        check_finite(gradient, "the loss gradient")
        self.store.commit_hidden(key)

    def _block_backward(self, index: int, shape: tuple[int, ...]) -> None:
        hidden = self.open(f"hidden/{index:05d}")
        incoming = self.store.open_hidden(f"gradient/{index + 1:05d}", shape, torch.float32)
        outgoing = self.store.new_hidden(f"gradient/{index:05d}", shape, torch.float32)
        sites = [site for site in self.sites_in(index) if site in self.plan.sites]
        with self.runner.block_loaded(index):
            hooks = OutputStatistics(self.runner.model, sites, self.plan.backward_needs)
            for rows in self.batches(shape[0]):
                leaf = hidden[rows].to(self.runner.device).requires_grad_()
                hooks.lengths = torch.full((len(leaf),), shape[1] - 1, device=self.runner.device)
                with torch.enable_grad():
                    output = self.runner.run_block(index, leaf)
                    output.backward(incoming[rows].to(output))
                outgoing[rows] = leaf.grad.float().cpu()  # type: ignore[union-attr]
            hooks.close()
        check_finite(outgoing, f"{self.plan.structure.blocks[index]}: the gradient at its input")
        self.store.commit_hidden(f"gradient/{index:05d}")
        self._put_statistics(f"gradients/{index:05d}", hooks.sums)


def sums_of(collected: InputStatistics) -> dict[str, Statistics]:
    """The finished sums; what samplers and streams have to tell is logged."""
    for note in collected.finish():
        log.info("%s", note)
    return collected.sums
