"""Low-rank adapters on a compressed model (LoRA, arXiv 2106.09685): trained by peft, then made part of the layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.checkpoint.install import install, structured_layers
from llmcompress.compressors.factors import LowRankFactors, pivot
from llmcompress.compressors.low_rank import build_layers
from llmcompress.errors import InputError
from llmcompress.layers.base import StructuredLinear
from llmcompress.layers.low_rank import LowRankLinear, unpack_mask
from llmcompress.layers.sparse_dictionary import SparseDictionaryLinear, unpack_codes, widen
from llmcompress.layers.sparse_low_rank import SparseLowRankLinear
from llmcompress.types import Problem, Site

ADAPTER = "default"
Unit = dict[str, StructuredLinear]  # layers that share a tensor, its owner first


def add_adapters(model: PreTrainedModel, rank: int, seed: int) -> nn.Module:
    """A peft model around `model`, with an adapter of that rank on every compressed site; all else is frozen.

    InputError if no site is compressed, peft is not installed, or a layer has no room for the rank.
    """
    layers = structured_layers(model)
    if not layers:
        raise InputError("finetune.method: lora adapts compressed sites, and this model has none; use full")
    for unit in units(layers):
        _check_room(unit, rank)
    try:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora.layer import Linear, LoraLayer
    except ModuleNotFoundError:
        raise InputError("finetune.method: lora needs the package peft: pip install 'llmcompress[finetune]'") from None

    class Adapted(Linear):
        """peft's adapter around a structured layer, which has no `weight` for it to look at."""

        def __init__(self, base: StructuredLinear, name: str, config: Any, r: int, lora_alpha: int, **_: Any) -> None:
            nn.Module.__init__(self)
            LoraLayer.__init__(self, base)
            self.in_features, self.out_features = base.d_in, base.d_out
            self.fan_in_fan_out, self._active_adapter = False, name
            self.update_layer(name, r, lora_alpha=lora_alpha, config=config)

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(layers), task_type="CAUSAL_LM")
    config._register_custom_module({StructuredLinear: Adapted})
    # peft warns of a layer type that it does not know
    with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
        torch.manual_seed(seed)
        adapted: nn.Module = get_peft_model(model, config)
    return adapted


def units(layers: dict[str, StructuredLinear]) -> list[Unit]:
    """The layers by the owner of what they share."""
    found: dict[str, Unit] = {}
    for name, layer in layers.items():
        owner = next(iter(layer.shared.values()), name)
        found.setdefault(owner, {})[name] = layer
    return [{owner: unit[owner], **unit} for owner, unit in found.items()]


def _check_room(unit: Unit, rank: int) -> None:
    for name, layer in unit.items():
        if type(layer) not in FOLDS:
            raise InputError(
                f"finetune.method: lora cannot make an adapter part of a {layer.kind} layer; use lrc or full"
            )
        if isinstance(layer, (LowRankLinear, SparseLowRankLinear)):
            most = min(layer.d_in, sum(member.d_out for member in unit.values()))
            if layer.rank + len(unit) * rank > most:
                room = (most - layer.rank) // len(unit)
                raise InputError(f"finetune.lora_rank: {name} of rank {layer.rank} has room for {room}; got {rank}")


def fold_adapters(adapted: nn.Module) -> None:
    """Makes the adapters of a peft model part of the layers of the model within, as directions or atoms of their own.

    A low-rank layer grows by the adapter's rank, the layers of a unit by those of all its members; a dictionary by
    as many atoms, of which each layer's outputs use those of its own adapter; low rank plus sparse keeps its entries.
    """
    model, wrapped = _within(adapted)
    layers = {name: module.base_layer for name, module in wrapped.items()}
    with torch.no_grad():
        for unit in units(layers):
            pairs = [_adapter(wrapped[name]) for name in unit]
            install(model, FOLDS[type(next(iter(unit.values())))](unit, pairs))


def drop_adapters(adapted: nn.Module) -> None:
    """Leaves the layers as they were before `add_adapters`."""
    model, wrapped = _within(adapted)
    install(model, {name: module.base_layer for name, module in wrapped.items()})


def _within(adapted: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model inside a peft model, which forgets that it was in one, and its wrapped layers."""
    model = adapted.get_base_model()
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model, {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def _adapter(module: Any) -> tuple[Tensor, Tensor]:
    """(d_in, q) and (q, d_out): y gains x L R."""
    scale = module.scaling[ADAPTER]
    return module.lora_A[ADAPTER].weight.T, scale * module.lora_B[ADAPTER].weight.T


def fold_low_rank(unit: Unit, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, StructuredLinear]:
    """Layers of A B + L R: rank r + m q for m layers of one A and adapters of rank q; in pivot form if they were."""
    layers = cast("list[LowRankLinear]", list(unit.values()))
    dtype = layers[0].B.dtype
    A = torch.cat([layers[0].A, *(left for left, _ in pairs)], 1).double()
    right = torch.block_diag(*(right for _, right in pairs)).double()
    B = torch.cat([torch.cat([_plain_B(layer) for layer in layers], 1).double(), right])
    factors = LowRankFactors(A, B, A.new_empty(0))
    sites = [Site(name, "other", 0, layer.d_in, layer.d_out, name) for name, layer in unit.items()]
    problem = Problem(sites, [A.new_empty(0, dtype=dtype)], [layer.bias for layer in layers], [])
    built = build_layers(problem, pivot(factors) if any(layer.pivot_count for layer in layers) else factors)
    return {name: layer.to(A.device) for name, layer in zip(unit, built, strict=True)}


def _plain_B(layer: LowRankLinear) -> Tensor:
    """(r, d_out): the second factor with the pivots' unit columns."""
    if not layer.pivot_count:
        return layer.B
    pivots = unpack_mask(layer.pivots, layer.d_out)
    own = torch.eye(layer.rank, dtype=layer.B.dtype, device=layer.B.device)
    plain = layer.B.new_empty(layer.rank, layer.d_out)
    plain[:, pivots] = own[:, layer.offset : layer.offset + layer.pivot_count]
    plain[:, ~pivots] = layer.B
    return plain


def fold_dictionary(unit: Unit, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, StructuredLinear]:
    """Layers of D S + L R: every output of a layer uses all q atoms that its adapter adds."""
    layers = cast("list[SparseDictionaryLinear]", list(unit.values()))
    atoms, (owner, *_) = layers[0].atoms, unit
    wide = torch.cat([layers[0].dictionary.float(), *(left.float() for left, _ in pairs)], 1)
    dictionary = nn.Parameter(wide.to(torch.bfloat16), requires_grad=False)
    folded: dict[str, StructuredLinear] = {}
    for name, layer, (_, right) in zip(unit, layers, pairs, strict=True):
        rank = len(right)
        own = torch.arange(atoms, atoms + rank, device=right.device).expand(layer.d_out, rank)
        values = widen(unpack_codes(layer.values, layer.value_bits, layer.nonzeros), layer.value_bits)
        folded[name] = SparseDictionaryLinear.from_factors(
            dictionary, torch.cat((layer._indices(), own), 1), torch.cat((values, right.T.float()), 1), layer.bias,
            value_bits=layer.value_bits, shared={"dictionary": owner} if folded else None, dtype=layer.dense.dtype,
        )  # fmt: skip
        atoms += rank
    return folded


def fold_sparse_low_rank(unit: Unit, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, StructuredLinear]:
    """The layer of A B + L R + S, of rank r + q, with the same entries of their own."""
    ((name, layer),) = cast("dict[str, SparseLowRankLinear]", unit).items()
    ((left, right),) = pairs
    A, B = torch.cat((layer.A, left.to(layer.A)), 1), torch.cat((layer.B, right.to(layer.B)))
    empty, places = A.new_zeros(layer.d_out, layer.d_in), tuple(layer.places)
    entries = empty.index_put(places, layer.values)
    mask = empty.bool().index_put(places, torch.tensor(True, device=A.device))
    return {name: SparseLowRankLinear.from_factors(A, B, entries, mask, layer.bias)}


FOLDS: dict[type[StructuredLinear], Callable[[Unit, list[tuple[Tensor, Tensor]]], dict[str, StructuredLinear]]] = {
    LowRankLinear: fold_low_rank,
    SparseDictionaryLinear: fold_dictionary,
    SparseLowRankLinear: fold_sparse_low_rank,
}
