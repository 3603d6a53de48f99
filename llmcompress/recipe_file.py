"""A recipe as a YAML file with overrides: its keys, unchecked."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml

from llmcompress.errors import InputError, one_line


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """The keys of a YAML recipe with the overrides in place, unchecked. InputError if it is no mapping."""
    path = Path(path)
    try:
        data = _parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except InputError as error:
        raise InputError(f"{path}: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys; see `llmcompress schema`")
    for override in overrides or []:
        _override(data, override)
    return data


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(one_line(str(error))) from None
    except (ValueError, RecursionError) as error:  # a date such as 2024-13-01, a number too long, nesting too deep
        raise InputError(f"a value that cannot be read: {one_line(str(error))}") from None


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    at = f"--set {one_line(override)}"
    if not separator or not key:
        raise InputError(f"{at}: expected KEY.PATH=VALUE, for instance compress.0.ratio=0.4")
    try:
        value = _parse_yaml(text)
    except InputError:
        raise InputError(f"{at}: the value is not YAML") from None
    *parents, last = key.split(".")
    try:
        holder: Any = functools.reduce(_child, parents, data)
        if isinstance(holder, list):
            holder[int(last)] = value
        else:
            holder[last] = value
    except (KeyError, IndexError, ValueError, TypeError):
        raise InputError(f"{at}: the recipe has no place '{one_line(key)}'") from None


def _child(holder: Any, part: str) -> Any:
    if isinstance(holder, list):
        return holder[int(part)]
    if part not in holder or holder[part] is None:
        holder[part] = {}
    return holder[part]
