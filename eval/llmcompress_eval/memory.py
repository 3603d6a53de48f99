"""Bytes of a model's weights: what they take in memory, and what decoding one token reads at the least."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from llmcompress.checkpoint.install import structured_layers


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, what layers derive at load included; a tied tensor counts once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def decode_bytes(model: PreTrainedModel) -> float:
    """Bytes of weights, as stored, that decoding one token reads: each once, of an input embedding a row at most."""
    layers = structured_layers(model)
    read = sum(layer.storage_bits / 8 for layer in layers.values())
    counted = {
        id(parameter)
        for layer in layers.values()
        for name, parameter in layer.named_parameters(remove_duplicate=False)
        if name != "bias"
    }
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings().weight
    if head is None or head.weight is not embedding:
        counted.add(id(embedding))
    return read + sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in counted)
