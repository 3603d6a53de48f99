"""Modules that a backend of the port `layer` has changed in place, and how a checkpoint's config says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from llmcompress import catalog
from llmcompress.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Specs = dict[str, dict[str, Any]]


def mark(module: nn.Module, backend: str, **spec: Any) -> None:
    """Notes on the module what the backend of that name needs to do the same to a new one."""
    module.conversion = {"type": backend, **spec}  # type: ignore[assignment]


def converted_modules(model: nn.Module) -> Specs:
    """Path of each changed module -> its note."""
    return {name: dict(vars(m)["conversion"]) for name, m in model.named_modules() if "conversion" in vars(m)}


def added_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of modules that were added, as the notes name them."""
    added = [f"{name}.{spec['added']}" for name, spec in converted_modules(model).items() if "added" in spec]
    return [parameter for name in added for parameter in model.get_submodule(name).parameters()]


def restore(model: PreTrainedModel, specs: Specs) -> None:
    """Changes a new model as the notes say, before its weights are loaded. InputError if they do not fit it."""
    for name, spec in specs.items():
        try:
            module = model.get_submodule(name)
            catalog.get("backend", spec["type"], "layer").load().restore(module, spec)
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(f"config.json: quantization_config.converted.{name}: does not fit: {error}") from None
