"""Merging checkpoints: open, check, align, compare functions, measure, write; killed at any instant, it goes on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.backends.merging.alignment import (
    Alignment,
    Read,
    aligned,
    check_orthogonal,
    check_signed,
    folded,
    mean,
)  # fmt: skip
from llmcompress.checkpoint.save import save_dense
from llmcompress.environment import versions
from llmcompress.finetune.stage import stored_dtype
from llmcompress.merge.align import Aligner
from llmcompress.merge.measure import check_plot, distances, measure_barrier, perplexities, save_plot, singular_vectors
from llmcompress.merge.recipe import MergeRecipe
from llmcompress.merge.report import merge_card
from llmcompress.merge.sources import Source, check_alike, check_function, check_tensors, stored_names
from llmcompress.models.load import DTYPES, Location, fingerprint, load_tokenizer, locate
from llmcompress.models.structure import Structure, analyse
from llmcompress.models.symmetry import Groups, find_groups
from llmcompress.pipeline import Outcome, Pipeline
from llmcompress.progress import Progress, Silent
from llmcompress.workspace import DiskStore, digest, disk_errors


def merge_models(
    models: Sequence[str | Path], output: str | Path, *, progress: Progress | None = None, **keys: Any
) -> Outcome:
    """Aligns models to the first one, averages them, and writes a plain checkpoint to the folder `output`.

    models: folders, hub ids, .gguf files or builtin:NAME, of one architecture. keys: those of a recipe's `merge`
    section (match, lam, weights, barrier, plot, r_metric), and the recipe's own (dtype, device, seed, eval, ...).
    InputError for bad input, before anything is written; RunError for a failure on the way, after which the same call
    goes on.
    """
    return run_merge(build_recipe([str(model) for model in models], str(output), keys, "merge_models()"), progress)


def build_recipe(models: list[str], output: str, keys: dict[str, Any], source: str) -> MergeRecipe:
    """The recipe that a call or a command stands for. InputError as for a recipe in a file."""
    own = {key: value for key, value in keys.items() if key in MergeRecipe.model_fields}
    section = {key: value for key, value in keys.items() if key not in own}
    return MergeRecipe.parse({**own, "merge": {"models": models, **section}, "output": output}, source)


def run_merge(recipe: MergeRecipe, progress: Progress | None = None) -> Outcome:
    """Runs a recipe with a `merge` section. Errors as `merge_models`."""
    return MergeRun(recipe, progress or Silent()).run()


@dataclass
class _Prepared:
    """The opened models, their common structure, and its groups (None where nothing is matched)."""

    sources: list[Source]
    structure: Structure
    groups: Groups | None
    texts: dict[str, Tensor]


class MergeRun(Pipeline):
    """One run; work in progress, the finished folder and its metrics are those of any run."""

    recipe: MergeRecipe

    def __init__(self, recipe: MergeRecipe, progress: Progress) -> None:
        self.section = recipe.merge
        self.locations = [locate(model) for model in recipe.merge.models]
        super().__init__(recipe, progress)

    def _fingerprint(self) -> str:
        """Identifies all that the merged weights depend on."""
        recipe = self.recipe.model_dump(mode="json", include={"dtype", "device", "seed"})
        section = self.section.model_dump(mode="json", include={"match"})
        models = [fingerprint(location) for location in self.locations]
        return digest([recipe, section, self.section.shares(), models, versions()])

    def _evaluation_digest(self) -> str:
        """Identifies what is measured."""
        measured = self.section.model_dump(mode="json", include={"barrier", "r_metric"})
        return digest([super()._evaluation_digest(), measured])

    def run(self) -> Outcome:
        if self.section.plot is not None:
            check_plot(Path(self.section.plot))
        finished = self._finished()
        if finished and self._measured(finished):
            self._plot(finished)
            return Outcome(self.output, finished, {})
        if not finished:
            self._check_output()
        with self.nothing_left_behind(), self._timed("load"):
            prepared = self._prepare()
        with self._timed("match"):
            alignments = self._align(prepared)
        views = self._views(prepared, alignments)
        metrics = self._measure(prepared, alignments, views)
        result = self.output
        if not finished:
            result = self.work / "result"
            with self._timed("save"), disk_errors(result):
                shutil.rmtree(result, ignore_errors=True)
                dtype = DTYPES.get(self.recipe.dtype) or stored_dtype(self.location)
                save_dense(
                    result, prepared.sources[0], mean(views, self.section.shares()), dtype, self.recipe.max_shard_size
                )
        self._publish(result, metrics)
        return Outcome(self.output, metrics, self.seconds)

    def _prepare(self) -> _Prepared:
        """All that can be wrong with the models and the texts, before anything is written but unpacked models."""
        names = self.section.models
        sources = [self._open(number, location) for number, location in enumerate(self.locations)]
        check_alike(sources, names)
        match = self.section.match
        groups = find_groups(sources[0].model) if match is not None else None
        if groups is not None and match is not None:
            if match.orthogonal:
                check_orthogonal(groups)
            elif match.signed:
                check_signed(groups)
        texts = self._texts(sources[0])
        self.progress.start("read", len(stored_names(sources[0])))
        check_tensors(sources, names, self.progress.advance)
        return _Prepared(sources, analyse(sources[0].model), groups, texts)

    def _open(self, number: int, location: Location) -> Source:
        folder = self._unpacked(location, f"source-{number}") if location.gguf else location
        scratch = self.work / f"offload-{number}"
        return Source(folder, scratch, torch.float32, self.device, self.recipe.trust_remote_code)

    def _texts(self, source: Source) -> dict[str, Tensor]:
        """Windows of the texts that losses are measured on."""
        from llmcompress_eval.perplexity import check_input
        from llmcompress_eval.text import evaluation_windows

        evaluation = self.recipe.eval
        wanted = dict.fromkeys([*evaluation.perplexity, *([self.section.barrier] if self.section.barrier else [])])
        if not wanted:
            return {}
        texts = evaluation_windows(
            load_tokenizer(source.location), list(wanted), evaluation.length, evaluation.windows, evaluation.field
        )
        for windows in texts.values():
            check_input(source.model, windows.tokens)
        return {name: windows.tokens for name, windows in texts.items()}

    # -- matching ---------------------------------------------------------------------------------------------------

    def _bases(self, prepared: _Prepared) -> list[Read]:
        """What is matched: the models, their gains folded away where the stream is rotated."""
        reads: list[Read] = [source.stored for source in prepared.sources]
        if prepared.groups is None or self.section.match is None or not self.section.match.orthogonal:
            return reads
        return [folded(read, prepared.groups) for read in reads]

    def _views(self, prepared: _Prepared, alignments: Sequence[Alignment]) -> list[Read]:
        bases = self._bases(prepared)
        if prepared.groups is None:
            return bases
        return [
            base if found.is_identity else aligned(base, prepared.groups, found)
            for base, found in zip(bases, alignments, strict=True)
        ]

    def _align(self, prepared: _Prepared) -> list[Alignment]:
        """One element a model; every finished sweep is kept on disk."""
        groups, match = prepared.groups, self.section.match
        if groups is None or match is None:
            return []
        store = DiskStore(self.work / "store")
        names = [Path(name).name for name in self.section.models]
        aligner = Aligner(store, groups, match, self._bases(prepared), names, self.recipe.seed, self.progress)
        return aligner.run()

    # -- what it is worth -------------------------------------------------------------------------------------------

    def _measure(self, prepared: _Prepared, alignments: list[Alignment], views: list[Read]) -> dict[str, Any]:
        sources, names = prepared.sources, self.section.models
        bases = self._bases(prepared)
        with self._timed("compare"):
            self.progress.start("compare", len(sources))
            differences = []
            for source, view, name in zip(sources, views, names, strict=True):
                unchanged = view == source.stored
                differences.append(0.0 if unchanged else check_function(source, prepared.structure, view, name))
                self.progress.advance(name)
        metrics: dict[str, Any] = {"fingerprint": self.fingerprint, "evaluation": self._evaluation_digest()}
        with self._timed("measure"):
            far = distances(stored_names(sources[0]), bases, views, self.progress)
            metrics["models"] = [
                {
                    "model": name, "share": share, "identity": not alignments or alignments[i].is_identity,
                    "rotated": bool(alignments) and alignments[i].rotation is not None,
                    "logits_difference": differences[i], "distance": before, "distance_matched": after,
                }
                for i, (name, share, (before, after)) in enumerate(zip(names, self.section.shares(), far, strict=True))
            ]  # fmt: skip
            if self.section.r_metric:
                metrics["r_metric"] = singular_vectors(prepared.structure, bases, views, self.progress)
            merged = mean(views, self.section.shares())
            texts = {source: prepared.texts[source] for source in self.recipe.eval.perplexity}
            metrics["perplexity"] = perplexities(sources, prepared.structure, names, merged, texts, self.progress)
            if self.section.barrier is not None:
                text = prepared.texts[self.section.barrier]
                metrics["barrier"] = measure_barrier(sources[0], prepared.structure, bases, views, text, self.progress)
        self._plot(metrics)
        return metrics

    def _plot(self, metrics: dict[str, Any]) -> None:
        if self.section.plot is not None:
            save_plot(metrics["barrier"], Path(self.section.plot))

    def _card(self, metrics: dict[str, Any]) -> str:
        return merge_card(metrics)
