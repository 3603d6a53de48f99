"""Keeping a structured layer's dense product beside its factors, for the few rows at which it is the faster of the two.

The product is derived, never saved, costs the dense weight's memory, and goes as soon as a factor has changed.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from llmcompress.errors import InputError
from llmcompress.layers.base import StructuredLinear

MIN_SECONDS = 0.02  # that a timing runs


class PremergedLinear(StructuredLinear):
    """A structured layer that can keep its product: `premerge` makes it, `unmerge` drops it.

    It multiplies up to `merged_rows` rows without gradients, outside of compiled graphs; training drops it.
    """

    merged: Tensor | None
    merged_rows = 0

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out), bias added, from the factors."""

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_rows and self._serves(x):
            assert self.merged is not None
            return F.linear(x, self.merged, self.bias)
        return self.product(x)

    def premerge(self, tokens: int = 16) -> None:
        """Keeps the dense product for inputs of at most `tokens` rows. InputError unless tokens >= 1."""
        if tokens < 1:
            raise InputError(f"premerge: tokens must be at least 1; got {tokens}")
        with torch.no_grad():
            self.register_buffer("merged", self.to_dense().contiguous(), persistent=False)
        self._merged_from = self._state()
        self.merged_rows = tokens

    def unmerge(self) -> None:
        if self.merged_rows:
            del self.merged
            self.merged_rows = 0

    def train(self, mode: bool = True) -> PremergedLinear:
        if mode:
            self.unmerge()
        super().train(mode)
        return self

    def _serves(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.numel() > self.merged_rows * self.d_in:
            return False
        if self._state() != self._merged_from:
            self.unmerge()
        return self.merged_rows > 0

    def _state(self) -> list[tuple[int, int, int]]:
        """What changes when a factor does: its identity, its storage, its count of writes."""
        own = [parameter for name, parameter in self.named_parameters() if name != "bias"]
        return [(id(p), p.data_ptr(), -1 if p.is_inference() else p._version) for p in own]


@dataclass(frozen=True)
class Premerged:
    """Seconds of one layer from its factors and from its product, for 1 row and for `tokens`."""

    name: str
    factors: tuple[float, float]
    product: tuple[float, float]

    @property
    def merged(self) -> bool:
        return all(product < factors for product, factors in zip(self.product, self.factors, strict=True))


def premerge(model: nn.Module, tokens: int = 16) -> list[Premerged]:
    """Times every layer of a loaded model both ways, where it lies, and keeps the dense product where it is faster.

    tokens: the most rows that a product serves, such as the batch size of decoding; it stays where it is the faster at
    1 row and at that many. Layers of one kind, shape, dtype and device are timed once. Returns one entry a layer.
    InputError unless tokens >= 1.
    """
    timed: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {}
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, PremergedLinear):
            layer.unmerge()
            weight = next(layer.parameters())
            key = json.dumps([layer.kind, layer.spec(), str(weight.dtype), str(weight.device)])
            if key not in timed:
                timed[key] = _times(layer, tokens)
            found.append(Premerged(name, *timed[key]))
            if found[-1].merged:
                layer.premerge(tokens)
    return found


def _times(layer: PremergedLinear, tokens: int) -> tuple[tuple[float, float], tuple[float, float]]:
    weight = next(layer.parameters())
    few, many = (torch.ones(rows, layer.d_in, dtype=weight.dtype, device=weight.device) for rows in (1, tokens))
    factors = (_seconds(layer, few), _seconds(layer, many))
    layer.premerge(tokens)
    product = (_seconds(layer, few), _seconds(layer, many))
    layer.unmerge()
    return factors, product


def _seconds(layer: nn.Module, x: Tensor) -> float:
    timer = Timer("layer(x)", globals={"layer": layer, "x": x}, num_threads=torch.get_num_threads())
    with torch.no_grad():
        return float(timer.blocked_autorange(min_run_time=MIN_SECONDS).median)
