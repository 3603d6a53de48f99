"""Putting structured layers into a transformers model, and saying which tensors they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmcompress import catalog
from llmcompress.errors import InputError
from llmcompress.layers.base import StructuredLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Specs = dict[str, dict[str, Any]]


def build_layer(name: str, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> StructuredLinear:
    """An empty layer from its entry in a checkpoint's config. InputError naming the site if the entry is malformed."""
    try:
        layer: StructuredLinear = catalog.get("layer", spec["type"]).load().from_spec(spec, dtype, device)
    except (KeyError, TypeError) as error:
        raise InputError(f"config.json: quantization_config.sites.{name}: malformed ({error})") from None
    return layer


def layer_spec(layer: StructuredLinear) -> dict[str, Any]:
    """The layer's entry in a checkpoint's config."""
    spec = {"type": layer.kind, **layer.spec()}
    return {**spec, "shared": layer.shared} if layer.shared else spec


def install(model: PreTrainedModel, layers: Mapping[str, StructuredLinear]) -> None:
    """Replaces the modules at the given paths and ties what they share to its owner, for loading and saving alike.

    A layer takes over the mode, training or evaluation, of what it replaces.
    """
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        layer.train(model.get_submodule(name).training)
        setattr(model.get_submodule(parent), leaf, layer)
    tied = shared_tensors(layers)
    for name, owner in tied.items():
        holder, _, leaf = name.rpartition(".")
        parameter = model.get_parameter(owner)
        setattr(model.get_submodule(holder), leaf, parameter)
    if tied:
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **tied}
        model.all_tied_weights_keys = {**model.all_tied_weights_keys, **tied}


def shared_tensors(layers: Mapping[str, StructuredLinear]) -> dict[str, str]:
    """Full name of each shared tensor -> full name of the one that is stored."""
    return {
        f"{name}.{tensor}": f"{owner}.{tensor}"
        for name, layer in layers.items()
        for tensor, owner in layer.shared.items()
    }


def structured_layers(model: nn.Module) -> dict[str, StructuredLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, StructuredLinear)}
