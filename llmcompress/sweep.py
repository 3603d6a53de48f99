"""`llmcompress sweep`: one recipe at several ratios and with several methods, calibrated once."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmcompress import catalog
from llmcompress.calibration.collect import BACKWARD
from llmcompress.errors import InputError
from llmcompress.measurement import Measurement
from llmcompress.models.runner import Runner
from llmcompress.pipeline import Outcome, Pipeline
from llmcompress.plan import Plan, make_plan
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.workspace import DiskStore, Tensors, digest

log = logging.getLogger("llmcompress")
SHARED = ("statistics/", "gradients/")


@dataclass(frozen=True)
class SharedCalibration:
    """Statistics of the dense model that all runs of a sweep read, in a store that outlives each of them."""

    store: DiskStore

    def lend(self, own: DiskStore, plan: Plan) -> tuple[DiskStore, Plan]:
        """A run's store with the statistics in it, and its plan, which then has nothing to measure."""
        return _BorrowingStore(own, self.store, plan.needs), replace(plan, measured=True)


class _BorrowingStore(DiskStore):
    """A run's own store, with the sweep's statistics in it: of them, those that the run needs."""

    def __init__(self, own: DiskStore, shared: DiskStore, needs: frozenset[str]) -> None:
        super().__init__(own.folder)
        self._shared, self._needs = shared, needs

    def has(self, key: str) -> bool:
        if key.startswith("gradients/") and not self._needs & BACKWARD:
            return False
        return self._shared.has(key) if key.startswith(SHARED) else super().has(key)

    def get(self, key: str) -> tuple[Tensors, Any]:
        if not key.startswith(SHARED):
            return super().get(key)
        tensors, note = self._shared.get(key)
        return {name: tensor for name, tensor in tensors.items() if name.rpartition("|")[2] in self._needs}, note

    def delete(self, key: str) -> None:
        if not key.startswith(SHARED):
            super().delete(key)


def parse_ratios(text: str) -> list[float]:
    """`0.1..0.6` in steps of 0.1, `0.1..0.6:0.05` in steps of 0.05, or `0.2,0.3`.

    InputError unless all lie between 0 and 1.
    """
    at = f"--ratio {text}: "
    number = r"\d*\.?\d+"
    spread = re.fullmatch(rf"({number})\.\.({number})(?::({number}))?", text)
    try:
        if spread:
            low, high, step = (float(part) for part in (spread[1], spread[2], spread[3] or "0.1"))
            found = [round(low + step * index, 6) for index in range(int((high - low) / step + 1e-6) + 1)]
        else:
            found = [float(part) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise InputError(f"{at}expected 0.1..0.6, 0.1..0.6:0.05 or 0.2,0.3") from None
    if not found or not all(0 < ratio < 1 for ratio in found):
        raise InputError(f"{at}every ratio lies between 0 and 1, and the first is the lowest")
    return list(dict.fromkeys(found))


def sweep_recipes(base: Recipe, ratios: list[float], methods: list[str]) -> dict[str, Recipe]:
    """Name of the run's folder -> its recipe. No methods: those of the recipe.

    Another method than the recipe's takes of the step's options those that it has. InputError as for a recipe.
    """
    for method in methods:
        try:
            catalog.get("compressor", method)
        except InputError as error:
            raise InputError(f"--methods: {error}") from None
    found = {}
    names = methods or [" + ".join(step.method for step in base.compress)]
    for method in names:
        for ratio in ratios:
            data = base.model_dump(mode="json", exclude_unset=True)
            name = f"{method.replace(' + ', '-')}-{ratio:g}"
            data["compress"] = [
                _step(step.method if not methods else method, ratio, own, step.method)
                for step, own in zip(base.compress, data["compress"], strict=True)
            ]
            data["output"] = str(Path(base.output) / name)
            found[name] = type(base).parse(data, f"sweep, {name}")
    return found


def _step(method: str, ratio: float, step: dict[str, Any], before: str) -> dict[str, Any]:
    if method != before:
        known = catalog.get("compressor", method).load().Options.model_fields
        step = {key: value for key, value in step.items() if key in (*_GENERAL, *known)}
    return {**step, "method": method, "ratio": ratio}


_GENERAL = ("targets", "allocation", "propagate")


def sweep(recipes: dict[str, Recipe], progress: Progress) -> dict[str, Outcome]:
    """Runs them in turn, with one calibration and one evaluation of the dense model. Finished runs are not repeated.

    A run that propagates, or that fits its blocks afterwards, calibrates each block behind the compressed ones before
    it, and so by itself. InputError for anything wrong with any run, before the first one starts.
    """
    pipelines = {name: Pipeline(recipe, progress) for name, recipe in recipes.items()}
    sharing = [pipeline for pipeline in pipelines.values() if _shares(pipeline.recipe)]
    folder = None
    if len(sharing) > 1 and not all(pipeline.finished for pipeline in sharing):
        folder, calibration = _calibrate(sharing, progress)
        for pipeline in sharing:
            pipeline.calibration = calibration
    outcomes: dict[str, Outcome] = {}
    dense: dict[str, Any] = {}
    for name, pipeline in pipelines.items():
        log.info("%s", name)
        pipeline.dense_figures = dense
        outcomes[name] = pipeline.run()
        dense |= {source: pair["dense"] for source, pair in outcomes[name].metrics["perplexity"].items()}
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return outcomes


def _shares(recipe: Recipe) -> bool:
    return recipe.block_recovery is None and not any(step.propagate for step in recipe.compress)


def _calibrate(pipelines: list[Pipeline], progress: Progress) -> tuple[Path, SharedCalibration]:
    """Gathers what any of the runs needs. Killed and called again, it goes on with the first block that is missing."""
    first = pipelines[0]
    place = str(first.output.parent / "calibration")
    own = Pipeline(first.recipe.model_copy(update={"output": place}), progress)
    with own.nothing_left_behind():
        source, plan, tokens, _ = own.prepare()
        weight = Runner(source, plan.structure).weight
        plans = [make_plan(plan.structure, p.recipe.compress, weight, p.recipe.seed) for p in pipelines]
    everything = Plan(plan.structure, [step for found in plans for step in found.steps])
    store = DiskStore(own.work / f"statistics-{digest(sorted(everything.needs))[:12]}")
    dense = Measurement(Runner(source, plan.structure), everything, tokens, store, own.settings(), progress)
    if not dense.complete:
        dense.embed()
        dense.measure()
    for pipeline in pipelines:
        pipeline.location = source.location  # a GGUF file is unpacked once
    return own.work, SharedCalibration(store)
