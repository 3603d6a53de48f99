"""What became of each site, and its layer as it was stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.checkpoint.install import build_layer, layer_spec, shared_tensors
from llmcompress.layers.base import StructuredLinear
from llmcompress.models.load import StreamedModel
from llmcompress.types import Site
from llmcompress.workspace import Store


@dataclass
class SiteResult:
    """What became of one site, for the report. Values and bits are those the checkpoint stores, bias left out."""

    name: str
    role: str
    block: int
    method: str
    dense_values: int
    stored_bits: int
    stored_values: float  # dense values: 16 bits of masks and narrow values are one, a full-width value is one
    error: float | None = None
    notes: list[str] = field(default_factory=list)
    spec: dict[str, Any] | None = None  # None: left dense


def site_result(
    site: Site, method: str, weight: Tensor, layer: StructuredLinear | None, error: float | None, notes: list[str]
) -> SiteResult:
    width = weight.element_size() * 8
    bits = layer.storage_bits if layer is not None else site.dense_values * width
    values = layer.storage_values if layer is not None else float(site.dense_values)
    spec = layer_spec(layer) if layer is not None else None
    return SiteResult(site.name, site.role, site.block, method, site.dense_values, bits, values, error, notes, spec)


def load_layers(results: Sequence[SiteResult], store: Store, dtype: torch.dtype) -> dict[str, StructuredLinear]:
    """The structured layers of a finished run, filled from the store."""
    layers = {r.name: build_layer(r.name, r.spec, dtype, "cpu") for r in results if r.spec is not None}
    blocks = sorted({result.block for result in results})
    tensors: dict[str, Tensor] = {}
    for block in blocks:
        tensors |= store.get(f"blocks/{block:05d}")[0]
    tied = shared_tensors(layers)
    for name, layer in layers.items():
        wanted = {key: f"{name}.{key}" for key in layer.state_dict()}
        layer.load_state_dict({key: tensors[tied.get(full, full)] for key, full in wanted.items()})
        layer.after_load()
    return layers


def size_metrics(source: StreamedModel, results: list[SiteResult], folder: Path) -> dict[str, Any]:
    """Values of the targeted matrices and of the whole model, and bytes of its tensor files, dense and compressed."""
    dense_target = sum(result.dense_values for result in results)
    stored_target = sum(result.stored_values for result in results)
    ties = source.model.all_tied_weights_keys
    whole = sum(t.numel() for name, t in source.model.state_dict().items() if name not in ties)
    return {
        "targeted": {"dense": dense_target, "compressed": stored_target, "removed": 1 - stored_target / dense_target},
        "model": {
            "dense": whole,
            "compressed": whole - dense_target + stored_target,
            "removed": (dense_target - stored_target) / whole,
        },
        "bytes": {
            "dense": sum(t.numel() * t.element_size() for n, t in source.model.state_dict().items() if n not in ties),
            "compressed": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        },
    }
