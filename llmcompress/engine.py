"""Calibrate, allocate, compress: block by block, with every finished part in a store."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from llmcompress.calibration.collect import capture_inputs
from llmcompress.checkpoint.install import install, shared_tensors
from llmcompress.compressors.allocation.curves import measured_for
from llmcompress.compressors.allocation.spectra import profile as profile_in
from llmcompress.finetune.block_recovery import recover_block
from llmcompress.layers.base import StructuredLinear
from llmcompress.measurement import Measurement, Settings, sums_of
from llmcompress.models.runner import Runner, check_finite
from llmcompress.parallel import side_by_side
from llmcompress.plan import Plan, Step
from llmcompress.progress import Progress, Silent
from llmcompress.recipe import BlockRecovery
from llmcompress.results import SiteResult, site_result
from llmcompress.types import Budget, Compressed, Problem, Profile, Site, Statistics
from llmcompress.workspace import Store

log = logging.getLogger("llmcompress")


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
        self.dense = Measurement(runner, plan, tokens, store, settings, self.progress)
        self.count = self.dense.count

    def run(self) -> list[SiteResult]:
        """All results, in the order of the blocks; each finished block is in the store as `blocks/INDEX`."""
        if any(not self.store.has(f"blocks/{i:05d}") for i in range(self.count)):
            self.dense.embed()
            if self.plan.two_passes:
                self.dense.measure()
            budgets = self._budgets()
            self._compress(budgets)
        found = [result for i in range(self.count) for result in self.store.get(f"blocks/{i:05d}")[1]]
        return [SiteResult(**result) for result in found]

    # -- allocation -------------------------------------------------------------------------------------------------

    def _budgets(self) -> list[list[Budget]]:
        if not self.plan.needs_profiles:
            return self.plan.budgets(None)
        profiles = [self._profiles(index, step) for index, step in enumerate(self.plan.steps)]
        return self.plan.budgets(profiles)

    def _profiles(self, index: int, step: Step) -> list[Profile]:
        """Of all units, a block's side by side; a block is profiled whole, so that its bits do not hang on a resume.

        Units whose curves others follow come first.
        """
        self.progress.start("profile", len(step.units))
        measured = measured_for(step.units)

        def follows(number: int) -> tuple[bool, int]:
            return measured[number] != number, step.units[number][-1].block

        keys = [f"profiles/{index}-{number:05d}" for number in range(len(step.units))]
        for _, together in itertools.groupby(sorted(range(len(step.units)), key=follows), key=follows):
            group = list(together)
            if not all(self.store.has(keys[number]) for number in group):
                problems = [self._problem(step.units[number], None) for number in group]
                for problem, number in zip(problems, group, strict=True):
                    if measured[number] != number:
                        problem.like = self._stored_profile(keys[measured[number]], step.units[measured[number]])
                found = side_by_side(
                    lambda problem: profile_in(step.compressor, problem, step.allocation.spectra),
                    problems, self.runner.device,
                )  # fmt: skip
                for number, profile in zip(group, found, strict=True):
                    own = {"spectrum": profile.spectrum, "costs": profile.costs, "losses": profile.losses}
                    self.store.put(keys[number], {name: t for name, t in own.items() if t is not None}, profile.dense)
            for number in group:
                self.progress.advance(step.units[number][0].name)
        return [self._stored_profile(key, unit) for key, unit in zip(keys, step.units, strict=True)]

    def _stored_profile(self, key: str, unit: list[Site]) -> Profile:
        tensors, dense = self.store.get(key)
        return Profile(unit, tensors["spectrum"], tensors["costs"], dense, tensors.get("losses"))

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
        sites, needs = self.dense.sites_in(index), self.plan.forward_needs
        if not self.plan.propagate:
            if self.plan.two_passes and self.settings.recovery is None:
                return None
            needs = frozenset() if self.plan.two_passes else needs
            found = self.dense.forward(index, sites, needs, f"hidden/{index:05d}", "hidden")
            return None if self.plan.two_passes else found
        self.dense.check_weights(sites)
        own = self.dense.open(self._propagated(index))
        collected = self.dense.collector(sites, needs)
        crossed = "cross" in needs
        both = crossed or self.settings.recovery is not None
        output = self.store.new_hidden(f"hidden/{index + 1:05d}", self.dense.shape, self.runner.dtype) if both else None
        dense = self.dense.open(f"hidden/{index:05d}") if both else None
        with self.runner.block_loaded(index), torch.no_grad():
            for rows in self.dense.batches(len(own)):
                if dense is not None and output is not None:
                    with capture_inputs(self.runner.model, sites if crossed else [], collected.receive_dense):
                        output[rows] = self.runner.run_block(index, dense[rows].to(self.runner.device)).to(output)
                with capture_inputs(self.runner.model, sites, collected.receive):
                    self.runner.run_block(index, own[rows].to(self.runner.device))
        if both:
            self.store.commit_hidden(f"hidden/{index + 1:05d}")
        return sums_of(collected)

    def _propagated(self, index: int) -> str:
        return f"propagated/{index:05d}" if index else "hidden/00000"

    def _recover(
        self, index: int, layers: dict[str, StructuredLinear], results: list[dict[str, Any]], section: BlockRecovery
    ) -> None:
        """Fits the block's factors to the dense block's outputs, on the inputs that it was calibrated with."""
        inputs = self.dense.open(self._propagated(index) if self.plan.propagate else f"hidden/{index:05d}")
        targets = self.dense.open(f"hidden/{index + 1:05d}")
        generator = torch.Generator().manual_seed(_seed(self.settings.seed, f"recovery:{index}"))

        def run(hidden: Tensor) -> Tensor:
            return self.runner.run_block(index, hidden.to(self.runner.device))

        with self._block_with(index, layers):
            recovered = recover_block(run, layers, inputs, targets, self.dense.batch, section, generator)
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
        own = self.dense.open(self._propagated(index))
        following = f"propagated/{index + 1:05d}"
        output = self.store.new_hidden(following, self.dense.shape, self.runner.dtype)
        with self._block_with(index, layers), torch.no_grad():
            for rows in self.dense.batches(len(own)):
                output[rows] = self.runner.run_block(index, own[rows].to(self.runner.device)).to(output)
        check_finite(output, f"{self.plan.structure.blocks[index]}, compressed")
        self.store.commit_hidden(following)

    def _problem(self, unit: Sequence[Site], fresh: dict[str, Statistics] | None) -> Problem:
        device = self.runner.device
        statistics = []
        for site in unit:
            inputs = fresh if fresh is not None else self.dense.stored("statistics", site.block)
            own = self.dense.stored("gradients", site.block).get(site.name, Statistics())
            statistics.append(_to(inputs.get(site.input, Statistics()) + own, device))
        self.dense.check_weights(unit)
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
