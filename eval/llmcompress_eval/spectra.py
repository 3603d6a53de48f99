"""Singular values of the compressed weights, beside those of the dense ones."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.checkpoint.install import structured_layers
from llmcompress.progress import Progress


def site_spectra(
    compressed: PreTrainedModel, dense: PreTrainedModel | None, progress: Progress, points: int = 64
) -> dict[str, dict[str, list[float]]]:
    """site -> {"compressed": ..., "dense": ...}: at most `points` singular values, evenly spaced from the largest."""
    layers = structured_layers(compressed)
    progress.start("spectra", len(layers))
    found = {}
    for name, layer in layers.items():
        with torch.no_grad():
            found[name] = {"compressed": _thinned(layer.to_dense(), points)}
            if dense is not None:
                found[name]["dense"] = _thinned(dense.get_parameter(f"{name}.weight"), points)
        progress.advance(name)
    return found


def _thinned(weight: Tensor, points: int) -> list[float]:
    values = torch.linalg.svdvals(weight.float())
    index = torch.linspace(0, len(values) - 1, min(points, len(values))).round().long()
    return [float(f"{value:.4g}") for value in values.cpu()[index]]
