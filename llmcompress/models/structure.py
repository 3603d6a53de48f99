"""What a model is made of: its blocks, its linear sites with their roles, and which of them read the same tensor.

Nothing here knows a model by name. A weightless copy of the model is run once on four tokens: its linear maps return
zeros of the right shape, so that the run costs nothing for a model of any size and shows which linear is called when,
on which tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmcompress.errors import InputError
from llmcompress.types import Site

LINEARS = (nn.Linear, Conv1D)


@dataclass
class Structure:
    """blocks: module paths in the order in which they run. sites: in the order in which they are called.

    dense: what is left alone, path -> reason. tuple_output: whether a block returns a tuple, one flag a block.
    """

    blocks: list[str]
    sites: list[Site]
    dense: dict[str, str] = field(default_factory=dict)
    tuple_output: list[bool] = field(default_factory=list)

    def in_block(self, index: int) -> list[Site]:
        return [site for site in self.sites if site.block == index]


@dataclass
class _Call:
    name: str
    module: nn.Module
    input: Tensor  # kept alive, so that identity is meaningful


def analyse(model: PreTrainedModel) -> Structure:
    """The structure of a model, from its class and config alone; its weights may lie anywhere.

    InputError if the model has no stack of repeated blocks with linear maps in them.
    """
    skeleton = weightless(model)
    blocks = _find_blocks(skeleton)
    try:
        calls, tuple_output = _trace(skeleton, blocks)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        reason = f"its forward pass could not be followed: {str(error).splitlines()[0]}"
        return Structure(blocks, [], dense=dict.fromkeys(blocks, reason), tuple_output=[False] * len(blocks))
    sites = [site for index, block in enumerate(blocks) for site in _block_sites(index, block, calls)]
    sites = [replace(site, d_head=_head_width(skeleton, site, sites)) if site.role == "o" else site for site in sites]
    structure = Structure(blocks, sites, tuple_output=tuple_output)
    _list_dense(model, skeleton, structure)
    return structure


def dimensions(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear map."""
    rows, columns = module.get_parameter("weight").shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def weightless(model: PreTrainedModel) -> PreTrainedModel:
    with init_empty_weights(include_buffers=False):
        skeleton = type(model)(model.config)
    for _, module in skeleton.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim <= 1:  # norm gains and biases: small, and used by elementwise operations
                zeros = torch.zeros(parameter.shape, dtype=torch.float32)
                setattr(module, name, nn.Parameter(zeros, requires_grad=False))
        width = _output_width(module)
        if width is not None:
            module.forward = _zeros_forward(width)
        elif any(p.ndim >= 3 and p.is_meta for p in module.parameters(recurse=False)):
            module.forward = _zeros_forward(None)
    return skeleton.eval()


def _output_width(module: nn.Module) -> int | None:
    if isinstance(module, LINEARS):
        return dimensions(module)[1]
    return module.embedding_dim if isinstance(module, nn.Embedding) else None


def _zeros_forward(width: int | None) -> Callable[..., Tensor]:
    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        if width is None:
            return torch.zeros_like(x)
        leading = x.shape[:-1] if x.is_floating_point() else x.shape
        return torch.zeros(*leading, width)

    return forward


def _find_blocks(skeleton: nn.Module) -> list[str]:
    """The ModuleList whose members hold the most values and linear maps: the stack of decoder (encoder) blocks."""
    best: tuple[int, list[str]] = (0, [])
    for path, module in skeleton.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and any(isinstance(m, LINEARS) for m in module.modules()):
            size = sum(p.numel() for p in module.parameters())
            if size > best[0]:
                best = (size, [f"{path}.{i}" for i in range(len(module))])
    if not best[1]:
        raise InputError(f"{type(skeleton).__name__}: no stack of blocks with linear maps found; nothing to compress")
    return best[1]


def _trace(skeleton: PreTrainedModel, blocks: list[str]) -> tuple[list[_Call], list[bool]]:
    calls: list[_Call] = []
    outputs: dict[str, bool] = {}

    def linear_hook(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: calls.append(_Call(name, module, args[0] if args else kwargs["input"]))

    def block_hook(path: str) -> Callable[..., None]:
        return lambda module, args, output: outputs.__setitem__(path, isinstance(output, tuple))

    for name, module in skeleton.named_modules():
        if isinstance(module, LINEARS):
            module.register_forward_pre_hook(linear_hook(name), with_kwargs=True)
        if name in blocks:
            module.register_forward_hook(block_hook(name))
    with torch.no_grad():
        skeleton(input_ids=torch.ones(1, 4, dtype=torch.long), **no_cache(skeleton))
    return calls, [outputs.get(path, False) for path in blocks]


def no_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Keyword arguments that keep a forward pass from building a key-value cache."""
    return {"use_cache": False} if model.can_generate() else {}


def _block_sites(index: int, block: str, calls: list[_Call]) -> list[Site]:
    inside = [call for call in calls if call.name.startswith(block + ".")]
    repeated = {name for name, count in Counter(call.name for call in inside).items() if count > 1}
    inside = [call for call in inside if call.name not in repeated]
    first_reader: dict[int, str] = {}
    readers: dict[str, list[_Call]] = {}
    for call in inside:
        reader = first_reader.setdefault(id(call.input), call.name)
        readers.setdefault(reader, []).append(call)
    roles = _roles(block, readers)
    sites = []
    for call in inside:
        d_in, d_out = dimensions(call.module)
        sites.append(
            Site(
                name=call.name,
                role=roles.get(call.name, "other"),
                block=index,
                d_in=d_in,
                d_out=d_out,
                input=first_reader[id(call.input)],
                bias=getattr(call.module, "bias", None) is not None,
                transposed=isinstance(call.module, Conv1D),
                block_roles=tuple(roles.get(other.name, "other") for other in inside),
            )
        )
    return sites


def _head_width(skeleton: PreTrainedModel, output: Site, sites: list[Site]) -> int:
    """Width of a head's values, by the map that reads them; 0 if a norm of all heads tells them apart."""
    heads = getattr(skeleton.config, "num_attention_heads", None)
    query = next(site for site in sites if site.block == output.block and site.role in ("q", "qkv"))
    if not isinstance(heads, int) or output.d_in % heads:
        return 0
    width = output.d_in // heads
    beside = skeleton.get_submodule(query.name.rpartition(".")[0]).children()
    norms = [gain for m in beside if not isinstance(m, LINEARS) for gain in m.parameters(recurse=False)]
    return 0 if any(gain.shape != (width,) for gain in norms) else width


def _roles(block: str, readers: dict[str, list[_Call]]) -> dict[str, str]:
    """Roles from the data flow: what attention reads first and last, what the FFN reads first and last."""
    attention = [group for group in readers.values() if _in_attention(block, group[0].name)]
    ffn = [group for group in readers.values() if not _in_attention(block, group[0].name)]
    roles: dict[str, str] = {}
    if len(attention) == 2 and len(attention[1]) == 1:
        roles[attention[1][0].name] = "o"
        if len(attention[0]) == 3:
            roles |= _named(attention[0], ("q", "k", "v"))
        elif len(attention[0]) == 1:
            roles[attention[0][0].name] = "qkv"
    if len(ffn) == 2 and len(ffn[1]) == 1:
        down = ffn[1][0]
        roles[down.name] = "down"
        width = dimensions(down.module)[0]
        if len(ffn[0]) == 2:
            roles |= _named(ffn[0], ("gate", "up"))
        elif len(ffn[0]) == 1:
            roles[ffn[0][0].name] = "gate_up" if dimensions(ffn[0][0].module)[1] == 2 * width else "up"
    return roles


def _in_attention(block: str, name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name[len(block) + 1 :].lower().split("."))


def _named(group: list[_Call], roles: tuple[str, ...]) -> dict[str, str]:
    """The calls' roles: by the leaf name where it begins with the role, otherwise by the order of the calls."""
    leaves = [call.name.rsplit(".", 1)[1].lower() for call in group]
    by_name = {role: [call.name for call, leaf in zip(group, leaves, strict=True) if leaf.startswith(role)]
               for role in roles}  # fmt: skip
    if all(len(found) == 1 for found in by_name.values()):
        return {found[0]: role for role, found in by_name.items()}
    return {call.name: role for call, role in zip(group, roles, strict=True)}


def _list_dense(model: PreTrainedModel, skeleton: PreTrainedModel, structure: Structure) -> None:
    known = {site.name for site in structure.sites}
    modules = dict(model.named_modules())
    for site in list(structure.sites):
        if not isinstance(modules.get(site.name), LINEARS):
            structure.sites.remove(site)
            structure.dense[site.name] = f"is a {type(modules.get(site.name)).__name__} already"
        elif site.role == "other":
            structure.dense[site.name] = "role not understood; compressed only where a target names it"
    for name, module in skeleton.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 3:
                structure.dense[f"{name}.{parameter_name}"] = f"{parameter.ndim}-dimensional tensor (experts?)"
        if name in known or not isinstance(module, (*LINEARS, nn.Embedding)):
            continue
        if any(name.startswith(block + ".") for block in structure.blocks):
            structure.dense[name] = "not called, or called more than once, in one pass"
        else:
            structure.dense[name] = "outside the blocks"
