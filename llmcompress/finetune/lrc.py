"""What trains: the low-rank components alone (LRC, arXiv 2407.11239), or all."""

from __future__ import annotations

import torch
from torch import nn

from llmcompress.checkpoint.install import structured_layers
from llmcompress.errors import InputError
from llmcompress.finetune.optimizers import Named
from llmcompress.layers.base import StructuredLinear
from llmcompress.layers.converted import added_parameters
from llmcompress.layers.sparse_dictionary import SparseDictionaryLinear


def freeze_to_lrc(model: nn.Module) -> Named:
    """Leaves only the factors of structured layers to train; embeddings, head, dense sites, norms, biases are frozen.

    Sparse codes keep their mask. A tensor that several layers share is one parameter, named once. Adapters that were
    added train too. InputError if the model has neither. Source: arXiv 2407.11239, section 3.2.
    """
    layers, added = structured_layers(model), added_parameters(model)
    if not layers and not added:
        raise InputError("finetune.method: lrc trains compressed sites, and this model has none; use full")
    model.requires_grad_(False)
    for layer in layers.values():
        for parameter in factors(layer):
            parameter.requires_grad_(True)
    for parameter in added:
        parameter.requires_grad_(True)
    return trainable(model)


def factors(layer: StructuredLinear) -> list[nn.Parameter]:
    """The layer's parameters, its bias left out; those it shares are among them."""
    return [parameter for name, parameter in layer.named_parameters() if name != "bias"]


def trainable(model: nn.Module) -> Named:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def unpack_layers(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Turns all sparse dictionaries to their trainable form, in `dtype` (the model's if absent)."""
    for layer in structured_layers(model).values():
        if isinstance(layer, SparseDictionaryLinear):
            layer.unpack(dtype)


def pack_layers(model: nn.Module) -> None:
    """Rounds all sparse dictionaries to the form that a checkpoint holds."""
    for layer in structured_layers(model).values():
        if isinstance(layer, SparseDictionaryLinear):
            layer.pack()


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that the optimiser keeps beside the weights, counters left out."""
    states = [state for state in optimizer.state.values() for state in state.values()]
    return sum(s.numel() * s.element_size() for s in states if torch.is_tensor(s) and s.numel() > 1)
