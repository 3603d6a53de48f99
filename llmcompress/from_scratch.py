"""Models whose feed-forward layers are structured before they are trained (arXiv 2406.16450)."""

from __future__ import annotations

import copy
import logging
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmcompress.checkpoint.install import install
from llmcompress.checkpoint.quantizer import attach
from llmcompress.compressors.low_rank import naming
from llmcompress.compressors.structured_ffn import StructuredFFN, StructuredFFNOptions, projected_layer, random_layer
from llmcompress.errors import InputError
from llmcompress.layers.base import StructuredLinear
from llmcompress.models.structure import analyse
from llmcompress.types import FFN_ROLES, Budget, Site
from llmcompress.validation import parse_section

log = logging.getLogger("llmcompress")


def structured_ffn(
    config_or_model: PretrainedConfig | PreTrainedModel,
    structure: str,
    ratio: float,
    *,
    num_blocks: int = 2,
    skip_first: bool = True,
    init: Literal["random", "project"] = "random",
    seed: int = 0,
) -> PreTrainedModel:
    """A transformers model whose feed-forward layers are low_rank, block_dense or block_shuffle, to be trained.

    config_or_model: a config, of which a causal language model with new weights is made, or a model, which is changed
    in place. ratio: fraction of the feed-forward values removed; the layers are the largest that fit, and what they
    keep is logged. num_blocks: of the block structures. skip_first: the first block stays dense, as published. init:
    "random" as published, or "project", the layers nearest to the model's own weights (`compress` goes by calibration
    text instead). Biases stay. Any Trainer trains the model; `save_pretrained` writes a compressed checkpoint.
    InputError: no feed-forward layer, blocks that do not divide its sizes, a ratio that leaves nothing.
    """
    options = parse_section(
        StructuredFFNOptions, {"structure": structure, "num_blocks": num_blocks}, "structured_ffn()"
    )
    if init not in ("random", "project"):
        raise InputError(f"structured_ffn().init: must be random or project; got {init!r}")
    model = _model(config_or_model, seed)
    sites, compressor = _sites(model, skip_first), StructuredFFN(options)
    with naming("structured_ffn()"):
        compressor.units(sites)
        levels = [compressor.level(site, Budget.for_ratio([site], ratio)) for site in sites]
    generator = torch.Generator().manual_seed(seed)
    std = getattr(model.config, "initializer_range", 0.02)
    layers: dict[str, StructuredLinear] = {}
    for site, level in zip(sites, levels, strict=True):
        assert level is not None, "a ratio above 0 leaves less than the dense weight"
        weight, bias = _dense(model, site)
        if init == "project":
            layer, _ = projected_layer(*compressor.kind, weight, level, bias)
        else:
            layer = random_layer(*compressor.kind, site.d_in, site.d_out, level, std, generator)
            layer.bias = nn.Parameter(bias.clone()) if bias is not None else None
        layers[site.name] = layer.to(weight.device, weight.dtype)
    install(model, layers)
    attach(model)
    kept = sum(layer.storage_values for layer in layers.values()) / sum(site.dense_values for site in sites)
    log.info("structured_ffn: %.2f %% of the values of %d feed-forward matrices kept", 100 * kept, len(sites))
    return model


def _model(config_or_model: PretrainedConfig | PreTrainedModel, seed: int) -> PreTrainedModel:
    if isinstance(config_or_model, PreTrainedModel):
        return config_or_model
    if not isinstance(config_or_model, PretrainedConfig):
        raise InputError(
            f"structured_ffn(): give a config or a model of transformers; got {type(config_or_model).__name__}"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(copy.deepcopy(config_or_model))


def _sites(model: PreTrainedModel, skip_first: bool) -> list[Site]:
    found = [site for site in analyse(model).sites if site.role in FFN_ROLES]
    if not found:
        raise InputError(f"structured_ffn(): {type(model).__name__} has no feed-forward layer that is understood")
    sites = [site for site in found if site.block > 0 or not skip_first]
    if not sites:
        raise InputError("structured_ffn(): the model's only block stays dense; use skip_first=False")
    return sites


def _dense(model: PreTrainedModel, site: Site) -> tuple[Tensor, Tensor | None]:
    """The weight (d_out, d_in) and bias."""
    module = model.get_submodule(site.name)
    weight, bias = module.get_parameter("weight").detach(), module.bias
    return weight.T if site.transposed else weight, bias.detach() if isinstance(bias, Tensor) else None
