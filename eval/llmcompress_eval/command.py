"""`llmcompress eval`: one model, alone or against its dense original, on any text, on tasks, and for speed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from transformers import PreTrainedModel

from llmcompress.environment import choose_device, versions
from llmcompress.errors import InputError
from llmcompress.finetune.command import compressed_sites
from llmcompress.models.load import DTYPES, Location, load_model, load_tokenizer, locate
from llmcompress.progress import Progress
from llmcompress.workspace import write_text
from llmcompress_eval import tasks
from llmcompress_eval.agreement import agreement
from llmcompress_eval.memory import resident_bytes
from llmcompress_eval.perplexity import check_input, perplexity
from llmcompress_eval.processes import Processes, join, leave
from llmcompress_eval.runs import EVALUATION
from llmcompress_eval.samples import continuations
from llmcompress_eval.spectra import site_spectra
from llmcompress_eval.speed_command import measure_speed, speed_tables
from llmcompress_eval.tables import text_table
from llmcompress_eval.text import evaluation_windows


@dataclass(frozen=True)
class Request:
    """What `llmcompress eval` is asked: see its options."""

    model: str
    against: str | None = None
    perplexity: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    speed: bool = False
    samples: int = 0
    spectra: bool = False
    length: int = 1024
    stride: int | None = None
    windows: int | None = 16
    batch: int = 1
    limit: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    field: str = "text"
    trust_remote_code: bool = False
    save: bool = False


def evaluate_model(request: Request, progress: Progress) -> dict[str, Any] | None:
    """Measures what is asked; docs/evaluation.md describes the result. None in all but the first of several processes.

    InputError for anything wrong with the request, before a model is loaded where that can be told.
    """
    _check(request)
    location = locate(request.model)
    if request.save and (location.gguf or not Path(request.model).is_dir()):
        raise InputError(f"--save: {request.model} is no folder that figures could be kept in; use --json FILE")
    reference = _reference(request, location)
    group = join(request.device)
    try:
        found = _measure(request, location, reference, group, progress)
    finally:
        leave(group)
    if group.rank:
        return None
    if request.save:
        _save(location.folder / EVALUATION, found)
    return found


def _measure(
    request: Request, location: Location, reference: Location | None, group: Processes, progress: Progress
) -> dict[str, Any]:
    own_gpu = group.device if request.device == "auto" else None
    where = own_gpu or choose_device(request.device)
    tokenizer = load_tokenizer(location)
    texts = evaluation_windows(
        tokenizer, request.perplexity, request.length, request.windows, request.field, request.stride
    )
    loaded_tasks = tasks.load_tasks(request.tasks) if request.tasks else {}

    def load(place: Location) -> PreTrainedModel:
        dtype = DTYPES.get(request.dtype, "auto")
        model: PreTrainedModel = load_model(place, dtype, trust_remote_code=request.trust_remote_code).to(where)
        for windows in texts.values():
            check_input(model, windows)
        return model

    compressed = load(location)
    dense = load(reference) if reference else None
    compared = dense if request.against else None
    found: dict[str, Any] = {"model": request.model, "versions": versions(), **_figures(compressed)}
    if compared is not None:
        found["against"] = {"model": request.against, **_figures(compared)}
    for source, windows in texts.items():
        progress.start("perplexity", len(windows))
        if compared is None:
            own = perplexity(compressed, windows, request.batch, progress.advance, group)
        else:
            other, own, agreed = agreement(compared, compressed, windows, request.batch, progress.advance, group)
            found["against"]["perplexity"][source] = asdict(other)
            found.setdefault("agreement", {})[source] = asdict(agreed)
        found["perplexity"][source] = asdict(own)
    if loaded_tasks:
        for entry, model in ((found, compressed), (found.get("against"), compared)):
            if entry is not None and model is not None:
                entry["tasks"] = tasks.evaluate_tasks(
                    model, tokenizer, loaded_tasks, request.batch, request.limit, progress
                )
    models = {"compressed" if reference else "model": compressed}
    if request.samples:
        shown = models if compared is None else {"dense": compared, **models}
        found["samples"] = continuations(shown, tokenizer, next(iter(texts.values())), request.samples)
    if request.spectra:
        found["spectra"] = site_spectra(compressed, compared, progress)
    if request.speed:
        found["speed"] = measure_speed(models if dense is None else {"dense": dense, **models}, progress)
    return found


def _check(request: Request) -> None:
    if not (request.perplexity or request.tasks or request.speed or request.spectra):
        raise InputError("nothing to measure: give --perplexity, --tasks, --speed or --spectra")
    if request.dtype != "auto" and request.dtype not in DTYPES:
        raise InputError(f"--dtype {request.dtype}: expected auto, {', '.join(DTYPES)}")
    if request.samples and not request.perplexity:
        raise InputError("--samples: continues the text of --perplexity, which is not given")


def _reference(request: Request, location: Location) -> Location | None:
    """The dense model: as given, otherwise, for speed, the one that the checkpoint's recipe names."""
    if request.against is not None:
        return locate(request.against)
    if not request.speed or not compressed_sites(location):
        return None
    path = location.folder / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    if not isinstance(recipe, dict) or not isinstance(recipe.get("model"), str):
        raise InputError(f"--speed: {location.folder} names no dense model; name it with --against")
    return locate(recipe["model"])


def _figures(model: PreTrainedModel) -> dict[str, Any]:
    return {"memory": {"weights": resident_bytes(model)}, "perplexity": {}}


def _save(path: Path, found: dict[str, Any]) -> None:
    """Adds the figures to those that the file holds: a text or task measured again replaces its old figures alone."""
    try:
        old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        raise InputError(f"{path}: holds no JSON; remove it") from None
    if old.get("against", {}).get("model") != found.get("against", old.get("against", {})).get("model"):
        old = {key: value for key, value in old.items() if key not in ("against", "agreement")}
    write_text(path, json.dumps(_merged(old, found), indent=1) + "\n")


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    nested = {key for key in ("perplexity", "tasks", "agreement", "against") if key in old and key in new}
    return {**old, **new, **{key: _merged(old[key], new[key]) for key in nested}}


def evaluation_tables(found: dict[str, Any]) -> list[Table]:
    """What the terminal shows."""
    models = [found, *([found["against"]] if "against" in found else [])]
    tables: list[Table] = []
    if found["perplexity"]:
        rows = [
            [Path(model["model"]).name, source, *_perplexity_cells(figures)]
            for source in found["perplexity"]
            for model in models
            if (figures := model["perplexity"].get(source))
        ]
        columns = ["perplexity", "text", "", "nll", "± (standard error)", "bits a byte", "windows", "tokens"]
        tables.append(text_table(found["model"], columns, rows, words=2))
    if "agreement" in found:
        rows = [
            [
                source,
                f"{a['kl']:.4f}",
                f"{a['kl_standard_error']:.4f}",
                f"{a['top1']:.2%}",
                f"{a['top1_standard_error']:.2%}",
            ]
            for source, a in found["agreement"].items()
        ]
        title = f"agreement with {found['against']['model']}"
        tables.append(text_table(title, ["text", "KL(dense || compressed)", "±", "same top token", "±"], rows))
    if "tasks" in found:
        rows = [
            [
                task,
                metric,
                Path(model["model"]).name,
                f"{value['value']:.4f}",
                _optional(value["standard_error"], ".4f"),
            ]
            for task in found["tasks"]
            for metric in found["tasks"][task]
            if metric != "items"
            for model in models
            for value in [model["tasks"][task][metric]]
        ]
        tables.append(text_table("tasks", ["task", "metric", "model", "", "±"], rows, words=3))
    if "speed" in found:
        tables += speed_tables(found["speed"])
    if "samples" in found:
        names = list(found["samples"][0])
        rows = [[" ".join(sample[name].split()) for name in names] for sample in found["samples"]]
        tables.append(text_table("greedy continuations", names, rows, words=len(names)))
    return tables


def _perplexity_cells(figures: dict[str, Any]) -> list[str]:
    return [
        f"{figures['perplexity']:.3f}", f"{figures['nll']:.4f}", f"{figures['standard_error']:.4f}",
        _optional(figures["bits_per_byte"], ".4f"), str(figures["windows"]), f"{figures['tokens']:,}",
    ]  # fmt: skip


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
