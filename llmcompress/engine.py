"""Calibrate, allocate, compress: block by block, with every finished part in a store."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from llmcompress.calibration.collect import InputStatistics, capture_inputs
from llmcompress.calibration.fisher import OutputStatistics, sample_labels, token_losses
from llmcompress.checkpoint.install import install, shared_tensors
from llmcompress.compressors.allocation.spectra import profile as profile_in
from llmcompress.errors import InputError, RunError
from llmcompress.finetune.block_recovery import recover_block
from llmcompress.finite import all_finite
from llmcompress.layers.base import StructuredLinear
from llmcompress.models.runner import Runner, check_finite
from llmcompress.parallel import side_by_side
from llmcompress.plan import Plan, Step
from llmcompress.progress import Progress, Silent
from llmcompress.recipe import BlockRecovery
from llmcompress.results import SiteResult, site_result
from llmcompress.types import Budget, Compressed, Problem, Profile, Site, Statistics
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


class Engine:
    """Runs a plan on a model. `tokens` (sequences, length) int64; results come from and go to `store`."""

    def __init__(
        self,
        runner: Runner,
        plan: Plan,
        tokens: Tensor,
        store: Store,
        settings: Settings,
        progress: Progress | None = None,
    ) -> None:
        self.runner, self.plan, self.tokens, self.store, self.settings = runner, plan, tokens, store, settings
        self.progress = progress or Silent()
        self.batch = max(1, settings.batch_tokens // tokens.shape[1])
        self.count = len(plan.structure.blocks)
        self._width: int | None = None
        self._recent: dict[str, dict[str, Statistics]] = {}

    def run(self) -> list[SiteResult]:
        """All results, in the order of the blocks; each finished block is in the store as `blocks/INDEX`."""
        if any(not self.store.has(f"blocks/{i:05d}") for i in range(self.count)):
            self._start()
            if self.plan.two_passes:
                self._measure()
            budgets = self._budgets()
            self._compress(budgets)
        found = [result for i in range(self.count) for result in self.store.get(f"blocks/{i:05d}")[1]]
        return [SiteResult(**result) for result in found]

    def measure(self) -> None:
        """The dense model's statistics alone, of all blocks, for runs that share them."""
        if any(not self.store.has(f"statistics/{i:05d}") for i in range(self.count)) or self.plan.backward_needs:
            self._start()
            self._measure()

    def _start(self) -> None:
        with self.runner.ends_loaded():
            self.runner.record_arguments(self.tokens)
            first = self.runner.embed(self.tokens[:1])
            self._width = first.shape[-1]
            if self.store.has("hidden/00000") or self._hidden_consumed():
                return
            hidden = self.store.new_hidden("hidden/00000", self._shape, self.runner.dtype)
            for rows in self._batches(len(self.tokens)):
                hidden[rows] = self.runner.embed(self.tokens[rows]).to(hidden)
            check_finite(hidden, "embeddings")
            self.store.commit_hidden("hidden/00000")

    def _hidden_consumed(self) -> bool:
        return self.store.has("blocks/00000") or self.store.has("statistics/00000")

    @property
    def _runs_again(self) -> bool:
        """Whether the embeddings are needed when blocks are compressed, after all statistics are known."""
        return self.plan.propagate or self.settings.recovery is not None

    @property
    def _shape(self) -> tuple[int, ...]:
        return (*self.tokens.shape, self._width or 0)

    def _batches(self, total: int) -> Iterator[slice]:
        for start in range(0, total, self.batch):
            yield slice(start, min(start + self.batch, total))

    def _open(self, key: str) -> Tensor:
        return self.store.open_hidden(key, self._shape, self.runner.dtype)

    # -- pass one: statistics of the dense model --------------------------------------------------------------------

    def _measure(self) -> None:
        keep_all = bool(self.plan.backward_needs)
        self.progress.start("calibrate", self.count)
        for index in range(self.count):
            if not self.store.has(f"statistics/{index:05d}"):
                sites = self._sites_in(index)
                statistics = self._forward(index, sites, self.plan.forward_needs, f"hidden/{index:05d}", "hidden")
                self._put_statistics(f"statistics/{index:05d}", statistics)
            if not keep_all and not (index == 0 and self._runs_again):
                self.store.delete(f"hidden/{index:05d}")
            self.progress.advance(self.plan.structure.blocks[index])
        if self.plan.backward_needs:
            self._backward()
            for index in range(0 if not self._runs_again else 1, self.count + 1):
                self.store.delete(f"hidden/{index:05d}")

    def _sites_in(self, index: int) -> list[Site]:
        """The targeted sites of a block, and the first readers of their inputs."""
        targeted = {site.name for site in self.plan.sites}
        inputs = {site.input for site in self.plan.sites}
        return [s for s in self.plan.structure.in_block(index) if s.name in targeted or s.name in inputs]

    def _forward(
        self, index: int, sites: list[Site], needs: frozenset[str], source: str, target: str
    ) -> dict[str, Statistics]:
        """Runs one dense block over `source`, gathers statistics of its inputs, writes `target/INDEX+1`."""
        hidden = self._open(source)
        following = f"{target}/{index + 1:05d}"
        output = self.store.new_hidden(following, self._shape, self.runner.dtype)
        collected = self._collector(sites, needs)
        read = sites if needs else []
        self._check_weights(sites)
        with (
            self.runner.block_loaded(index),
            capture_inputs(self.runner.model, read, collected.receive),
            torch.no_grad(),
        ):
            for rows in self._batches(len(hidden)):
                output[rows] = self.runner.run_block(index, hidden[rows].to(self.runner.device)).to(output)
        check_finite(output, self.plan.structure.blocks[index])
        self.store.commit_hidden(following)
        return self._collected(collected)

    def _collector(self, sites: list[Site], needs: frozenset[str]) -> InputStatistics:
        settings, rows = self.settings, self.tokens.numel()
        if not needs:  # rows that nothing is summed of need no choice
            return InputStatistics(sites, needs, self.runner.device)
        return InputStatistics(
            sites, needs, self.runner.device, settings.sampler, settings.stream, rows, settings.seed, settings.gram
        )

    @staticmethod
    def _collected(collected: InputStatistics) -> dict[str, Statistics]:
        for note in collected.finish():
            log.info("%s", note)
        return collected.sums

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

    # -- gradients, from the last block to the first ----------------------------------------------------------------

    def _backward(self) -> None:
        samples = min(self.settings.backward_samples or len(self.tokens), len(self.tokens))
        shape = (samples, *self._shape[1:])
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
        hidden = self._open(f"hidden/{self.count:05d}")
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
        hidden = self._open(f"hidden/{index:05d}")
        incoming = self.store.open_hidden(f"gradient/{index + 1:05d}", shape, torch.float32)
        outgoing = self.store.new_hidden(f"gradient/{index:05d}", shape, torch.float32)
        sites = [site for site in self._sites_in(index) if site in self.plan.sites]
        with self.runner.block_loaded(index):
            hooks = OutputStatistics(self.runner.model, sites, self.plan.backward_needs)
            for rows in self._batches(shape[0]):
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

    # -- allocation -------------------------------------------------------------------------------------------------

    def _budgets(self) -> list[list[Budget]]:
        if not self.plan.needs_profiles:
            return self.plan.budgets(None)
        profiles = [self._profiles(index, step) for index, step in enumerate(self.plan.steps)]
        return self.plan.budgets(profiles)

    def _profiles(self, index: int, step: Step) -> list[Profile]:
        """Of all units, a block's side by side; a block is profiled whole, so that its bits do not hang on a resume."""
        self.progress.start("profile", len(step.units))
        numbered = [(f"profiles/{index}-{n:05d}", unit) for n, unit in enumerate(step.units)]
        for _, together in itertools.groupby(numbered, key=lambda item: item[1][-1].block):
            group = list(together)
            if not all(self.store.has(key) for key, _ in group):
                problems = [self._problem(unit, None) for _, unit in group]
                found = side_by_side(
                    lambda problem: profile_in(step.compressor, problem, step.allocation.spectra),
                    problems, self.runner.device,
                )  # fmt: skip
                for (key, _), profile in zip(group, found, strict=True):
                    own = {"spectrum": profile.spectrum, "costs": profile.costs, "losses": profile.losses}
                    self.store.put(key, {name: t for name, t in own.items() if t is not None}, profile.dense)
            for _, unit in group:
                self.progress.advance(unit[0].name)
        stored = ((unit, *self.store.get(key)) for key, unit in numbered)
        return [Profile(unit, t["spectrum"], t["costs"], dense, t.get("losses")) for unit, t, dense in stored]

    # -- pass two: compression --------------------------------------------------------------------------------------

    def _compress(self, budgets: list[list[Budget]]) -> None:
        self.progress.start("compress", self.count)
        for index in range(self.count):
            if not self.store.has(f"blocks/{index:05d}"):
                self._compress_block(index, budgets)
            for stream in ("hidden", "propagated"):
                self.store.delete(f"{stream}/{index:05d}")
            self._forget_statistics(index)
            self.progress.advance(self.plan.structure.blocks[index])
        for stream in ("hidden", "propagated"):
            self.store.delete(f"{stream}/{self.count:05d}")

    def _forget_statistics(self, index: int) -> None:
        """Deletes what no unit still to come will read."""
        ends = [unit[-1].block for step in self.plan.steps for unit in step.units if unit[0].block <= index]
        if max(ends, default=0) <= index:
            for block in range(index + 1):
                self.store.delete(f"statistics/{block:05d}")
                self.store.delete(f"gradients/{block:05d}")

    def _compress_block(self, index: int, budgets: list[list[Budget]]) -> None:
        fresh = self._fresh_statistics(index)
        work = [
            (step, self._problem(unit, fresh), budget)
            for step, step_budgets in zip(self.plan.steps, budgets, strict=True)
            for unit, budget in zip(step.units, step_budgets, strict=True)
            if unit[-1].block == index
        ]
        layers: dict[str, StructuredLinear] = {}
        results: list[dict[str, Any]] = []
        for (step, problem, _), compressed in zip(work, self._compress_units(work), strict=True):
            for note in compressed.notes:
                log.info("%s", note)
            for site, weight, layer in zip(problem.sites, problem.weights, compressed.layers, strict=True):
                if layer is not None:
                    layers[site.name] = layer
                result = site_result(site, step.recipe.method, weight, layer, compressed.error, compressed.notes)
                results.append(asdict(result))
        if self.settings.recovery is not None and layers:
            self._recover(index, layers, results, self.settings.recovery)
        if self.plan.propagate:
            self._advance(index, layers)
        tied = shared_tensors(layers)
        tensors = {f"{name}.{key}": t for name, layer in layers.items() for key, t in layer.state_dict().items()}
        self.store.put(f"blocks/{index:05d}", {key: t for key, t in tensors.items() if key not in tied}, results)

    def _fresh_statistics(self, index: int) -> dict[str, Statistics] | None:
        """Statistics gathered now: of the dense model in one pass, of the compressed prefix's stream otherwise."""
        sites, needs = self._sites_in(index), self.plan.forward_needs
        if not self.plan.propagate:
            if self.plan.two_passes and self.settings.recovery is None:
                return None
            needs = frozenset() if self.plan.two_passes else needs
            found = self._forward(index, sites, needs, f"hidden/{index:05d}", "hidden")
            return None if self.plan.two_passes else found
        self._check_weights(sites)
        own = self._open(self._propagated(index))
        collected = self._collector(sites, needs)
        crossed = "cross" in needs
        both = crossed or self.settings.recovery is not None
        output = self.store.new_hidden(f"hidden/{index + 1:05d}", self._shape, self.runner.dtype) if both else None
        dense = self._open(f"hidden/{index:05d}") if both else None
        with self.runner.block_loaded(index), torch.no_grad():
            for rows in self._batches(len(own)):
                if dense is not None and output is not None:
                    with capture_inputs(self.runner.model, sites if crossed else [], collected.receive_dense):
                        output[rows] = self.runner.run_block(index, dense[rows].to(self.runner.device)).to(output)
                with capture_inputs(self.runner.model, sites, collected.receive):
                    self.runner.run_block(index, own[rows].to(self.runner.device))
        if both:
            self.store.commit_hidden(f"hidden/{index + 1:05d}")
        return self._collected(collected)

    def _propagated(self, index: int) -> str:
        return f"propagated/{index:05d}" if index else "hidden/00000"

    def _recover(
        self, index: int, layers: dict[str, StructuredLinear], results: list[dict[str, Any]], section: BlockRecovery
    ) -> None:
        """Fits the block's factors to the dense block's outputs, on the inputs that it was calibrated with."""
        inputs = self._open(self._propagated(index) if self.plan.propagate else f"hidden/{index:05d}")
        targets = self._open(f"hidden/{index + 1:05d}")
        generator = torch.Generator().manual_seed(_seed(self.settings.seed, f"recovery:{index}"))

        def run(hidden: Tensor) -> Tensor:
            return self.runner.run_block(index, hidden.to(self.runner.device))

        with self._block_with(index, layers):
            recovered = recover_block(run, layers, inputs, targets, self.batch, section, generator)
        log.info("%s: %s", self.plan.structure.blocks[index], recovered.note)
        results[0]["notes"] = [*results[0]["notes"], recovered.note]

    @contextmanager
    def _block_with(self, index: int, layers: dict[str, StructuredLinear]) -> Iterator[None]:
        """The block in memory with its compressed layers in place of the dense ones."""
        with self.runner.block_loaded(index):
            dense = {name: self.runner.model.get_submodule(name) for name in layers}
            install(self.runner.model, layers)
            try:
                yield
            finally:
                for name, module in dense.items():
                    parent, _, leaf = name.rpartition(".")
                    setattr(self.runner.model.get_submodule(parent), leaf, module)

    def _advance(self, index: int, layers: dict[str, StructuredLinear]) -> None:
        """Runs the compressed block on the compressed prefix's stream."""
        own = self._open(self._propagated(index))
        following = f"propagated/{index + 1:05d}"
        output = self.store.new_hidden(following, self._shape, self.runner.dtype)
        with self._block_with(index, layers), torch.no_grad():
            for rows in self._batches(len(own)):
                output[rows] = self.runner.run_block(index, own[rows].to(self.runner.device)).to(output)
        check_finite(output, f"{self.plan.structure.blocks[index]}, compressed")
        self.store.commit_hidden(following)

    def _stored(self, kind: str, block: int) -> dict[str, Statistics]:
        """Statistics of pass one, the last few blocks' kept in memory: a block's units are asked for one by one."""
        key = f"{kind}/{block:05d}"
        if key not in self._recent:
            if len(self._recent) >= 4:
                self._recent.clear()
            self._recent[key] = self._get_statistics(key) if self.store.has(key) else {}
        return self._recent[key]

    def _check_weights(self, sites: Sequence[Site]) -> None:
        """Before a block is run: what comes out of it would not tell which of its weights is to blame."""
        for site in sites:
            if not all_finite(self.runner.weight(site)):
                raise InputError(f"{site.name}: its weight is not finite")

    def _problem(self, unit: Sequence[Site], fresh: dict[str, Statistics] | None) -> Problem:
        device = self.runner.device
        statistics = []
        for site in unit:
            inputs = fresh if fresh is not None else self._stored("statistics", site.block)
            own = self._stored("gradients", site.block).get(site.name, Statistics())
            statistics.append(_to(inputs.get(site.input, Statistics()) + own, device))
        self._check_weights(unit)
        weights = [self.runner.weight(site) for site in unit]
        return Problem(list(unit), weights, [self.runner.bias(site) for site in unit], statistics)

    def _compress_units(self, work: list[tuple[Step, Problem, Budget]]) -> list[Compressed]:
        def compress(index: int) -> Compressed:
            step, problem, budget = work[index]
            seed = _seed(self.settings.seed, problem.sites[0].name)
            generator = torch.Generator(device=self.runner.device).manual_seed(seed)
            return step.compressor.compress(problem, budget, generator)

        largest_first = sorted(range(len(work)), key=lambda index: -sum(w.numel() for w in work[index][1].weights))
        found = dict(zip(largest_first, side_by_side(compress, largest_first, self.runner.device), strict=True))
        return [found[index] for index in range(len(work))]


def _seed(seed: int, name: str) -> int:
    """A seed of its own for each part of the work, whatever was done before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def _to(statistics: Statistics, device: torch.device) -> Statistics:
    for name in Statistics.SUMS:
        value = getattr(statistics, name)
        if value is not None and value.device != device:
            setattr(statistics, name, value.to(device))
    return statistics
