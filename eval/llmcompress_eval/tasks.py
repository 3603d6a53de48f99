"""Zero-shot tasks through lm-eval, from the hub or from a local folder.

A task is written `NAME` or `NAME=FOLDER`: the folder holds the task's records as `SPLIT.jsonl` (`valid` and `dev` stand
for validation too), and their labels in the records or as `SPLIT-labels.lst`, one a line. Prompts, scoring and metrics
are those of lm-eval's own task.
"""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.catalog import nearest
from llmcompress.errors import InputError
from llmcompress.progress import Progress

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "dev": "validation", "test": "test"}


def load_tasks(specs: list[str], at: str = "--tasks") -> dict[str, Any]:
    """The tasks as lm-eval takes them; `at`: where they are named.

    InputError: lm-eval missing, a name unknown, or its records out of reach.
    """
    try:
        import lm_eval
    except ModuleNotFoundError:
        raise InputError(f"{at}: needs lm-eval: pip install 'llmcompress[eval]'") from None
    logging.getLogger(lm_eval.__name__).setLevel(logging.ERROR)
    folders = {name: folder for name, _, folder in (spec.partition("=") for spec in specs)}
    local = {name: read_records(name, Path(folder).expanduser()) for name, folder in folders.items() if folder}
    manager = _manager(list(folders))
    for name in folders:
        if name not in manager.all_tasks:
            raise InputError(f"{at}: unknown task '{name}'{_nearest(name, manager.all_tasks)}")
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in folders:
        if name in local:  # within a group, a registered task may be given another source of records
            given: dict[str, Any] = {"task": name, "custom_dataset": functools.partial(_given, local[name])}
            if "train" not in local[name]:  # examples for prompts, and the prompts here have none
                given["training_split"] = None
            loaded["tasks"] |= _loaded(manager, {"group": "local", "task": [given]}, f"{at}: {folders[name]}")["tasks"]
        else:
            part = _loaded(manager, name, f"{at}: the hub's records (from a folder: {name}=FOLDER)")
            loaded = {key: {**loaded[key], **part[key]} for key in loaded}
    return loaded


def _loaded(manager: Any, spec: str | dict[str, Any], origin: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = manager.load([spec])
    except KeyError as error:
        raise InputError(f"{origin}: no split or field {error}, which the task reads") from None
    except Exception as error:  # datasets raises a wide family
        raise InputError(f"{origin}: {' '.join(str(error).split()) or type(error).__name__}") from error
    return found


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: dict[str, Any],
    batch: int,
    limit: int | None,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """task -> {"items": n, metric: {"value": ..., "standard_error": ... or None}}; the first `limit` items of each."""
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM

    class Told(HFLM):
        """lm-eval's model for transformers, with our progress in place of its own bar."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            progress.start("tasks", len(requests))
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            return found

    class Counter:
        """Stands where lm-eval would keep answers for another run: it is told of each."""

        def add_partial(self, *_: Any) -> None:
            progress.advance("")

    harness = Told(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    harness.cache_hook = Counter()
    results = lm_eval.evaluator.evaluate(harness, tasks, limit=limit, log_samples=False)
    found = {}
    for name, figures in results["results"].items():
        metrics = {key.removesuffix(",none"): value for key, value in figures.items() if key.endswith(",none")}
        found[name] = {"items": results["n-samples"].get(name, {}).get("effective")} | {
            metric: {"value": value, "standard_error": _number(metrics.get(f"{metric}_stderr"))}
            for metric, value in metrics.items()
            if not metric.endswith("_stderr") and _number(value) is not None
        }
    return found


def read_records(name: str, folder: Path) -> dict[str, Dataset]:
    """The splits of a local folder. InputError naming what is missing or wrong."""
    from datasets import Dataset

    if not folder.is_dir():
        raise InputError(f"task {name}={folder}: no such folder")
    found = {}
    for stem, split in SPLITS.items():
        path = folder / f"{stem}.jsonl"
        if not path.is_file():
            continue
        try:
            records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        except ValueError as error:
            raise InputError(f"{path}: not JSON lines: {error}") from None
        labels = folder / f"{stem}-labels.lst"
        if labels.is_file():
            values = labels.read_text(encoding="utf-8").split()
            if len(values) != len(records):
                raise InputError(f"{labels}: {len(values)} labels for {len(records)} records of {path.name}")
            records = [{**record, "label": _label(value)} for record, value in zip(records, values, strict=True)]
        if not records:
            raise InputError(f"{path}: holds no records")
        found[split] = Dataset.from_list(records)
    if not found:
        expected = ", ".join(f"{stem}.jsonl" for stem in SPLITS)
        raise InputError(f"task {name}={folder}: holds none of {expected}")
    return found


def _given(records: dict[str, Dataset], **_: Any) -> dict[str, Dataset]:
    """As lm-eval calls a task's `custom_dataset`."""
    return records


def _label(value: str) -> int | str:
    return int(value) if value.isdigit() else value


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _manager(names: list[str]) -> Any:
    """lm-eval's index of tasks. All 14,000 files take half a minute to read: first only those where the names lie."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = {root / part for name in names for part in (name, name.partition("_")[0]) if (root / part).is_dir()}
    quick = lm_eval.tasks.TaskManager(include_defaults=False, include_path=sorted(folders))
    return quick if set(names) <= set(quick.all_tasks) else lm_eval.tasks.TaskManager()


def _nearest(name: str, known: list[str]) -> str:
    hint = nearest(name, known)
    return hint if "did you mean" in hint else "; `lm_eval ls tasks` lists them"
