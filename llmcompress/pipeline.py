"""Runs a recipe: load, calibrate, allocate, compress, save, fine-tune, evaluate; killed at any instant, it goes on."""

from __future__ import annotations

import glob
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from llmcompress_eval.runs import METRICS
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.backends.report import Report
from llmcompress.calibration import text
from llmcompress.checkpoint.card import model_card
from llmcompress.checkpoint.save import save_streamed
from llmcompress.engine import Engine
from llmcompress.environment import choose_device, versions
from llmcompress.errors import InputError
from llmcompress.finetune.block_recovery import check_plan
from llmcompress.finetune.data import check_teacher, check_tokens, read_tokens, teacher_config
from llmcompress.finetune.stage import convert_layers, current_results, read_report, train_checkpoint
from llmcompress.measurement import Settings
from llmcompress.mixture import calibration_tokens
from llmcompress.models.files import file_digest
from llmcompress.models.load import (
    DTYPES,
    Location,
    StreamedModel,
    check_path,
    fingerprint,
    load_model,
    load_tokenizer,
    locate,
    unpack_gguf,
)  # fmt: skip
from llmcompress.models.runner import Runner
from llmcompress.models.structure import analyse, weightless
from llmcompress.plan import Plan, make_plan
from llmcompress.progress import Progress, Silent
from llmcompress.recipe import Recipe
from llmcompress.results import size_metrics
from llmcompress.workspace import DiskStore, digest, disk_errors, replace_durably, sync, sync_folder, write_text

if TYPE_CHECKING:
    from llmcompress_eval.perplexity import Windows

    from llmcompress.sweep import SharedCalibration

log = logging.getLogger("llmcompress")

ANALYSIS = "analysis.json"


@dataclass
class Outcome:
    """What `apply` made: the folder, the deterministic metrics stored in it, and the seconds each stage took."""

    folder: Path
    metrics: dict[str, Any]
    seconds: dict[str, float]
    speed: dict[str, Any] | None = None
    reports: list[Report] = field(default_factory=list)


def apply(
    recipe: Recipe | str | Path, *, overrides: list[str] | None = None, progress: Progress | None = None
) -> Outcome:
    """Runs a recipe (or the YAML file at a path) from the model to the evaluated checkpoint.

    InputError for bad input, before anything is written; RunError for a failure on the way, after which the same call
    goes on with the first unfinished part.
    """
    loaded = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, overrides)
    return Pipeline(loaded, progress or Silent()).run()


class Pipeline:
    """One run of a recipe. Work in progress lies in a folder beside the output, named after the run's fingerprint."""

    def __init__(self, recipe: Recipe, progress: Progress) -> None:
        self.recipe, self.progress = recipe, progress
        self.output = Path(recipe.output).expanduser().absolute()
        check_path(self.output.with_name(f".{self.output.name}.work-{'0' * 12}"), "output")
        self.location = locate(recipe.model)
        self.device = choose_device(recipe.device)
        self.fingerprint = self._fingerprint()
        self.work = self.output.parent / f".{self.output.name}.work-{self.fingerprint[:12]}"
        self.seconds: dict[str, float] = {}
        self._training_tokens: Tensor | None = None
        self._tasks: dict[str, Any] = {}
        self.calibration: SharedCalibration | None = None  # set by a sweep, and the dense model's known perplexities
        self.dense_figures: dict[str, Any] = {}

    def _fingerprint(self) -> str:
        """Identifies all that the compressed weights depend on, so that old work of another run is never mixed in."""
        recipe = self.recipe.model_dump(mode="json", exclude={"output", "eval", "analysis", "model", "max_shard_size"})
        sources = [Path(source).expanduser() for source in self.recipe.calibration.sources]
        models = [fingerprint(self.location)]
        if (section := self.recipe.finetune) is not None:
            sources += [Path(section.dataset).expanduser()] if section.dataset else []
            models += [fingerprint(locate(section.teacher))] if section.teacher else []
        texts = [file_digest(path) for path in sources if path.is_file()]
        return digest([recipe, models, texts, versions()])

    # -- the run ----------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether `run` has nothing left to do."""
        return self._measured(self._finished())

    def _measured(self, finished: dict[str, Any] | None) -> bool:
        """Whether the metrics of a finished run, if there are any, hold all that this recipe measures."""
        return finished is not None and finished["evaluation"] == self._evaluation_digest()

    def settings(self) -> Settings:
        calibration = self.recipe.calibration
        return Settings(
            calibration.batch_tokens, calibration.backward_samples, calibration.targets, self.recipe.seed,
            self.recipe.block_recovery, calibration.build_sampler(), calibration.stream_factory(),
            calibration.gram_factory(),
        )  # fmt: skip

    def run(self) -> Outcome:
        finished = self._finished()
        if finished and self._measured(finished):
            log.info("%s: already finished for this recipe and model", self.output)
            return Outcome(self.output, finished, {})
        if not finished:
            self._check_output()
        source, plan, tokens, texts = self.prepare()
        if finished:
            return self._evaluate_again(source, finished, texts)
        store = DiskStore(self.work / "store")
        if self.calibration is not None:
            store, plan = self.calibration.lend(store, plan)
        runner = Runner(source, plan.structure)
        with self._timed("compress"):
            results = Engine(runner, plan, tokens, store, self.settings(), self.progress).run()
        result = self.work / "result"
        with self._timed("save"), disk_errors(result):
            shutil.rmtree(result, ignore_errors=True)
            save_streamed(result, source, results, store, self.recipe.max_shard_size)
        metrics: dict[str, Any] = {"fingerprint": self.fingerprint, "dense_sites": plan.structure.dense}
        if self._training_tokens is not None:
            with self._timed("fine-tune"):
                result, metrics["finetune"] = self._finetune(source, result, self._training_tokens)
            results = current_results(results, result, source.model.dtype)
        metrics |= {
            "size": size_metrics(source, results, result),
            "sites": [asdict(item) for item in results],
        }
        speed = self._evaluate(source, result, metrics, texts)
        reports = self._analyse(source, result)
        self._publish(result, metrics)
        return Outcome(self.output, metrics, self.seconds, speed, reports)

    def _finetune(self, source: StreamedModel, result: Path, tokens: Tensor) -> tuple[Path, dict[str, Any]]:
        """The folder of the trained model and what its training reports."""
        section, recipe = self.recipe.finetune, self.recipe
        assert section is not None
        teacher = locate(section.teacher) if section.teacher else source.location
        tuned = train_checkpoint(
            Location(result), teacher, tokens, section, self.work,
            dtype=source.model.dtype, device=self.device, seed=recipe.seed, max_shard_size=recipe.max_shard_size,
            progress=self.progress, trust_remote_code=recipe.trust_remote_code, convert=recipe.convert,
        )  # fmt: skip
        return tuned, read_report(self.work)

    def _evaluate_again(self, source: StreamedModel, metrics: dict[str, Any], texts: dict[str, Windows]) -> Outcome:
        """The weights are there; only what is measured is another."""
        log.info("%s: compressed already; only evaluated again", self.output)
        speed = self._evaluate(source, self.output, metrics, texts)
        reports = self._analyse(source, self.output)
        self._publish(self.output, metrics)
        return Outcome(self.output, metrics, self.seconds, speed, reports)

    def prepare(self) -> tuple[StreamedModel, Plan, Tensor, dict[str, Windows]]:
        """Opens the model, plans the steps, reads the calibration and evaluation texts: all that can be wrong.

        Bad input leaves nothing behind.
        """
        with self.nothing_left_behind(), self._timed("load"):
            source = self.open_model()
            structure = analyse(source.model)
            plan = make_plan(structure, self.recipe.compress, Runner(source, structure).weight, self.recipe.seed)
            if self.recipe.block_recovery is not None:
                check_plan(plan)
            if self.recipe.convert:
                convert_layers(weightless(source.model), self.recipe.convert, self.recipe.seed)
            texts = self._evaluation_texts(source)
            if self.recipe.eval.tasks:
                from llmcompress_eval.tasks import load_tasks

                self._tasks = load_tasks(self.recipe.eval.tasks, "eval.tasks")
            tokens = self._calibration_tokens(source)
            self._training_tokens = self._read_training_tokens(source)
        return source, plan, tokens, texts

    @contextmanager
    def nothing_left_behind(self) -> Iterator[None]:
        """Removes the work folder again if input turns out to be bad, unless it holds earlier work."""
        fresh = not self.work.exists()
        try:
            yield
        except InputError:
            if fresh:
                shutil.rmtree(self.work, ignore_errors=True)
            raise

    def open_model(self) -> StreamedModel:
        location = self.location
        if location.gguf:
            location = self._unpacked(location, "source")
        dtype = DTYPES.get(self.recipe.dtype, "auto")
        scratch = self.work / "offload"
        return StreamedModel(location, scratch, dtype, self.device, self.recipe.trust_remote_code)

    def _unpacked(self, gguf: Location, name: str) -> Location:
        """The GGUF model as a safetensors folder of that name, made once a run."""
        folder = self.work / name
        if not folder.exists():
            part = self.work / f"{name}.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            with disk_errors(part):
                unpack_gguf(gguf, part)
                sync_folder(part)
                replace_durably(part, folder)
        return Location(folder)

    def _calibration_tokens(self, source: StreamedModel) -> Tensor:
        calibration = self.recipe.calibration
        text.check_context(source.model, calibration.length, "calibration.length: a sequence")
        tokenizer = load_tokenizer(source.location)
        if calibration.dataset == "self":
            start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            return text.generate_text(
                lambda: load_model(source.location, source.model.dtype).to(self.device),
                start, calibration.samples, calibration.length, self.recipe.seed,
            )  # fmt: skip
        tokens, note = calibration_tokens(calibration, source, tokenizer, self.recipe.seed, self.progress)
        if note:
            log.info("%s", note)
        text.check_vocabulary(source.model, tokens)
        if len(tokens) < calibration.samples:
            log.warning("%s: text for %d of %d sequences only", calibration.dataset, len(tokens), calibration.samples)
        return tokens

    def _read_training_tokens(self, source: StreamedModel) -> Tensor | None:
        section = self.recipe.finetune
        if section is None or section.method == "none":
            return None
        tokens = read_tokens(section, self.recipe.calibration.dataset, load_tokenizer(source.location))
        check_tokens(source.model, tokens)
        if section.loss == "kd" and section.teacher is not None:
            check_teacher(source.model.config, teacher_config(locate(section.teacher)))
        return tokens

    def _evaluation_texts(self, source: StreamedModel) -> dict[str, Windows]:
        from llmcompress_eval.perplexity import check_length
        from llmcompress_eval.text import evaluation_windows

        evaluation = self.recipe.eval
        if evaluation.perplexity:
            check_length(source.model, evaluation.length)
        return evaluation_windows(
            load_tokenizer(source.location),
            evaluation.perplexity,
            evaluation.length,
            evaluation.windows,
            evaluation.field,
        )

    # -- the result -------------------------------------------------------------------------------------------------

    def _evaluation_digest(self) -> str:
        """Identifies what is measured. Speed is not: it is printed, and no part of the files."""
        evaluation = self.recipe.eval.model_dump(mode="json", exclude={"speed"})
        analyses = [chosen.model_dump(mode="json") for chosen in self.recipe.analysis]
        from llmcompress_eval.perplexity import Perplexity

        texts = [file_digest(path) for path in map(Path, self.recipe.eval.perplexity) if path.is_file()]
        return digest([evaluation, analyses, texts, [figure.name for figure in fields(Perplexity)]])

    def _evaluate(
        self, source: StreamedModel, result: Path, metrics: dict[str, Any], texts: dict[str, Windows]
    ) -> dict[str, Any] | None:
        """Adds the perplexities to the metrics; returns the speeds."""
        from llmcompress_eval.pair import evaluate_pair, tasks_of_pair

        metrics |= {"evaluation": self._evaluation_digest(), "perplexity": {}}
        metrics.pop("tasks", None)
        evaluation = self.recipe.eval
        speed = None
        dtype = source.model.dtype
        loads = partial(self._loaded, source.location, dtype), partial(self._loaded, Location(result), dtype)
        if evaluation.perplexity or evaluation.speed:
            with self._timed("evaluate"):
                metrics["perplexity"], speed = evaluate_pair(
                    *loads, texts, evaluation.speed, self.progress, self.dense_figures
                )
        if self._tasks:
            with self._timed("tasks"):
                tokenizer = load_tokenizer(source.location)
                metrics["tasks"] = tasks_of_pair(*loads, tokenizer, self._tasks, evaluation.limit, self.progress)
        return speed

    def _loaded(self, location: Location, dtype: torch.dtype) -> PreTrainedModel:
        model: PreTrainedModel = load_model(location, dtype).to(self.device)
        return model

    def _analyse(self, source: StreamedModel, result: Path) -> list[Report]:
        """Runs the analyses on the dense model; reports hold times, so that they are no part of the metrics."""
        from llmcompress.analyze import analyze_model

        if not self.recipe.analysis:
            return []
        with self._timed("analyse"):
            reports = [
                analyze_model(
                    str(source.location.folder), chosen.name, chosen.options, chosen.dataset, samples=chosen.samples,
                    length=chosen.length, sites=chosen.sites, seed=self.recipe.seed, device=self.recipe.device,
                    progress=self.progress,
                )
                for chosen in self.recipe.analysis
            ]  # fmt: skip
        with disk_errors(result):
            write_text(result / ANALYSIS, json.dumps([report.as_json() for report in reports], indent=1) + "\n")
        return reports

    def _describe(self, result: Path, metrics: dict[str, Any]) -> None:
        """The recipe as run, the metrics and the model card; the metrics last, since they say that all is there."""
        recipe = self.recipe.model_dump(mode="json", exclude={"output"})
        header = "# The recipe as run; the folder it was written to is left out.\n"
        header += "".join(f"# {name} {version}\n" for name, version in versions().items())
        write_text(result / "recipe.yaml", header + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
        write_text(result / "README.md", self._card(metrics))
        write_text(result / METRICS, json.dumps(metrics, indent=1, sort_keys=True) + "\n")

    def _publish(self, result: Path, metrics: dict[str, Any]) -> None:
        """Describes the result, puts it into its place unless it lies there already, and ends the run."""
        with disk_errors(result):
            self._describe(result, metrics)
            if result != self.output:
                sync_folder(result)
                os.replace(result, self.output)
                sync(self.output.parent)
        self._remove_work()

    def _card(self, metrics: dict[str, Any]) -> str:
        return model_card(self.recipe, metrics)

    def _remove_work(self) -> None:
        for folder in self._all_work():
            shutil.rmtree(folder, ignore_errors=True)

    def _all_work(self) -> Iterable[Path]:
        return sorted(self.output.parent.glob(f".{glob.escape(self.output.name)}.work-*"))

    def _finished(self) -> dict[str, Any] | None:
        """The metrics of this very run, if the output folder is its result."""
        path = self.output / METRICS
        if not path.is_file():
            return None
        try:
            metrics: dict[str, Any] = json.loads(path.read_text())
            return metrics if metrics["fingerprint"] == self.fingerprint else None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            return None

    def _check_output(self) -> None:
        if self.output.is_file():
            raise InputError(f"output: {self.output} is a file; name a folder")
        if self.output.is_dir() and any(self.output.iterdir()):
            raise InputError(
                f"output: {self.output} holds something else already; name another folder or remove this one"
            )
        others = [folder for folder in self._all_work() if folder != self.work]
        if others:
            log.warning(
                "%s: unfinished work of another recipe or model; not used, removed when this run ends", others[0]
            )

    def _timed(self, stage: str) -> _Timer:
        return _Timer(self.seconds, stage)


class _Timer:
    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self.seconds, self.stage = seconds, stage

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + time.perf_counter() - self._start
