"""Models that are another one in a different order: for what finds the order again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.backends.merging.alignment import Alignment, Read, aligned
from llmcompress.models.symmetry import Groups, find_groups
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer


def reading(model: PreTrainedModel) -> Read:
    return lambda name: model.get_parameter(name).detach()


def with_values(model: PreTrainedModel, groups: Groups, read: Read) -> PreTrainedModel:
    """A copy of the model with other values."""
    changed = copy.deepcopy(model)
    for name in groups.axes:
        changed.get_parameter(name).data.copy_(read(name))
    return changed


def scrambled(model: PreTrainedModel, seed: int = 1, signed: bool | None = None) -> tuple[PreTrainedModel, Alignment]:
    """The model under a random element of its group, sign flips included where they are allowed, and that element."""
    groups = find_groups(model)
    drawn = Alignment.random(groups, torch.Generator().manual_seed(seed), groups.flips if signed is None else signed)
    return with_values(model, groups, aligned(reading(model), groups, drawn)), drawn


def save_scrambled(folder: Path, architecture: str = "llama", seed: int = 1, **changes: object) -> Path:
    model, _ = scrambled(tiny_model(architecture, **changes), seed)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_pair(folder: Path, architecture: str = "llama", **changes: object) -> tuple[Path, Path]:
    """A tiny model and its scrambled copy."""
    return save_tiny(folder / "a", architecture, **changes), save_scrambled(folder / "b", architecture, **changes)


def noisy(share: float, seed: int) -> Callable[[Tensor], Tensor]:
    """Adds noise of that share of a tensor's standard deviation."""
    generator = torch.Generator().manual_seed(seed)

    def add(tensor: Tensor) -> Tensor:
        scale = share * (tensor.std() if tensor.numel() > 1 else 0)
        return tensor + scale * torch.randn(tensor.shape, generator=generator)

    return add
