"""What runs left in their folders: `metrics.json` of `apply`, `evaluation.json` of `eval --save`, the recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmcompress.errors import InputError

METRICS, EVALUATION = "metrics.json", "evaluation.json"


@dataclass(frozen=True)
class Run:
    """A run's files, read; `evaluation` is empty without `eval --save`, `metrics` for a model that no run made."""

    name: str
    folder: Path
    metrics: dict[str, Any]
    evaluation: dict[str, Any]
    recipe_text: str
    recipe: dict[str, Any]

    @property
    def model(self) -> str:
        """The dense model."""
        against = self.evaluation.get("against", {}).get("model")
        return str(self.recipe.get("model") or against or self.name)

    @property
    def method(self) -> str:
        steps = self.recipe.get("compress") or []
        methods = list(dict.fromkeys(str(step["method"]) for step in steps))
        methods += ["fine-tuned"] if "finetune" in self.metrics else []
        return " + ".join(methods) if self.metrics else "dense"


def read_run(folder: Path, name: str | None = None) -> Run:
    """InputError naming the folder and what it lacks."""
    metrics, evaluation = (_read(folder / file) for file in (METRICS, EVALUATION))
    if not metrics and not evaluation:
        raise InputError(f"{folder}: incomplete: it holds neither {METRICS} nor {EVALUATION}")
    path = folder / "recipe.yaml"
    if metrics and not path.is_file():
        raise InputError(f"{folder}: incomplete: it holds no recipe.yaml")
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    try:
        recipe = yaml.safe_load(text) or {}
    except yaml.YAMLError:
        raise InputError(f"{path}: not YAML") from None
    missing = [key for key in ("perplexity", "size", "sites") if metrics and key not in metrics]
    if missing and "finetune" not in metrics:
        raise InputError(f"{folder}: incomplete: its {METRICS} holds no {missing[0]}")
    if any("length" not in figures for pair in metrics.get("perplexity", {}).values() for figures in pair.values()):
        raise InputError(f"{folder}: its {METRICS} is of an earlier version; run its recipe again to evaluate anew")
    return Run(name or folder.resolve().name, folder, metrics, evaluation, text, recipe)


def read_runs(folders: list[Path]) -> tuple[list[Run], list[str]]:
    """The runs that can be read, and one line on each that cannot. InputError if none can."""
    names = [folder.resolve().name for folder in folders]
    runs, problems = [], []
    for folder, name in zip(folders, names, strict=True):
        try:
            runs.append(read_run(folder, str(folder) if names.count(name) > 1 else name))
        except InputError as error:
            problems.append(str(error))
    if not runs:
        raise InputError(problems[0] if problems else "no run given")
    return runs, problems


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path}: not JSON") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no figures")
    return found
