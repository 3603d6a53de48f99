"""Operations a token, and how long a guided training lasts that costs what a dense one does."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from llmcompress.errors import InputError
from llmcompress.layers.base import StructuredLinear
from llmcompress.models.structure import LINEARS, dimensions


def flops_per_token(model: PreTrainedModel, length: int) -> int:
    """Multiplications and additions of a forward pass at one token of a sequence of `length` tokens.

    Products of all linear maps, the head included, and 4 length d a block for attention's scores and sums; embeddings,
    norms and activations are left out. A training step costs three times as much. Source: arXiv 2406.16450, table 1.
    """
    config = model.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return sum(map(_product_flops, model.modules())) + 4 * length * width * config.num_hidden_layers


def replaced_flops(model: nn.Module) -> int:
    """The same of the dense layers that the model's structured layers stand for."""
    return sum(2 * m.d_in * m.d_out for m in model.modules() if isinstance(m, StructuredLinear))


def equal_flops_fraction(c_dense: float, c_structured: float, c_ffn: float, stochastic: bool = True) -> float:
    """How much longer, as a share of the dense model's steps, a structured model trains for the dense model's FLOPs.

    The first such share of the steps is guided, and their data come again at the end. c_dense, c_structured: FLOPs a
    token of the models; c_ffn: of the dense layers that are replaced, which a guide costs, or half if stochastic.
    InputError unless c_structured < c_dense. Source: arXiv 2406.16450.
    """
    if not 0 < c_structured < c_dense:
        raise InputError(f"the structured model's FLOPs must be between 0 and {c_dense:g}; got {c_structured:g}")
    return (c_dense - c_structured) / (c_structured + (0.5 if stochastic else 1.0) * c_ffn)


def _product_flops(module: nn.Module) -> int:
    if isinstance(module, StructuredLinear):
        return module.flops
    if not isinstance(module, LINEARS):
        return 0
    d_in, d_out = dimensions(module)
    return 2 * d_in * d_out
