"""What may be permuted in a transformer without changing what it computes, found by structure: no model by name.

A weightless copy is run once, which shows what each norm and each map reads and feeds.

Groups: FFN neurons; key-value groups, query heads inside a group, value dimensions inside a group; the residual
stream, with sign flips where the norms allow them. Dimensions of queries and keys stay: rotary positions fix them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.errors import InputError
from llmcompress.models.heads import Heads, find_heads
from llmcompress.models.norms import is_equivariant, neutral_gain
from llmcompress.models.structure import LINEARS, Structure, analyse, no_cache, weightless
from llmcompress.types import Site

RESIDUAL = "residual"
TAIL = "tail"  # prefix of the streams between linear maps that follow the last block
Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class Block:
    """One block: its sites by role (q k v o, or qkv o; gate up down, up down, or gate_up down), and its heads."""

    index: int
    sites: dict[str, Site]
    heads: Heads

    def group(self, role: str) -> str:
        """The name of the group on the inner axis of the site of that role; what down reads is `ffn`."""
        return f"{self.index}.{'ffn' if role in ('gate', 'up', 'down') else role}"


@dataclass(frozen=True)
class Groups:
    """axes[parameter]: the group of each of its axes: `residual`, `INDEX.GROUP` of a block, or None.

    gains: parameters that follow the residual stream's order and not its signs. flips: whether signs may flip.
    folds[gain] = (value of a gain that does nothing, weights that read what it scales); no_fold says why gains cannot
    be folded away, otherwise None. tied: further names of parameters -> the one in `axes`.
    """

    width: int
    axes: dict[str, Axes]
    gains: frozenset[str]
    flips: bool
    folds: dict[str, tuple[float, list[str]]]
    no_fold: str | None
    blocks: list[Block]
    tied: dict[str, str]

    def outside(self) -> Iterable[str]:
        """Parameters outside the blocks."""
        inside = {f"{site.name}." for block in self.blocks for site in block.sites.values()}
        return [name for name in self.axes if not any(name.startswith(prefix) for prefix in inside)]


@dataclass
class _Norm:
    name: str
    module: nn.Module
    input: Tensor
    output: Tensor
    order: int


@dataclass
class _Trace:
    """Calls of one run. Tensors are kept, so that equal storage means equal tensor."""

    norms: list[_Norm] = field(default_factory=list)
    linears: dict[str, tuple[Tensor, Tensor, int]] = field(default_factory=dict)  # input, output, order
    first_block: int = 0
    last_block: int = 0


def find_groups(model: PreTrainedModel) -> Groups:
    """The groups of a model, from its class and config; its weights may lie anywhere.

    InputError naming the first parameter, or block, that is not understood.
    """
    structure = analyse(model)
    skeleton = weightless(model)
    trace = _run(skeleton, structure)
    blocks = _blocks(structure, skeleton)
    width = blocks[0].sites["q" if "q" in blocks[0].sites else "qkv"].d_in
    tied = dict(model.all_tied_weights_keys)
    axes = _site_axes(blocks)
    axes |= _outer_axes(skeleton, structure, trace, width, tied)
    axes |= _norm_axes(blocks, trace, width, set(axes))
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for name in names:
        if name not in axes and name not in tied:
            raise InputError(f"{name}: its place among the model's symmetries is not understood; use match: none")
    axes = {name: axes[name] for name in names if name not in tied}
    on_stream = [norm for norm in trace.norms if axes[_parameters(norm)[0]] == (RESIDUAL,)]
    gains = frozenset(name for norm in on_stream for name in _parameters(norm))
    twice = any(groups.count(RESIDUAL) > 1 for groups in axes.values())
    flips = not twice and all(is_equivariant(norm.module, "flip") for norm in on_stream)
    folds, reason = _folds(on_stream, trace, blocks, axes, tied, twice)
    return Groups(width, axes, gains, flips, folds, reason, blocks, tied)


# --- tracing ---------------------------------------------------------------------------------------------------------


def _run(skeleton: PreTrainedModel, structure: Structure) -> _Trace:
    trace = _Trace()
    count = iter(range(10**9))
    handles = []

    def linear_hook(name: str) -> Callable[..., None]:
        return lambda _, args, output: trace.linears.__setitem__(name, (args[0], output, next(count)))

    def norm_hook(name: str) -> Callable[..., None]:
        return lambda module, args, output: trace.norms.append(_Norm(name, module, args[0], output, next(count)))

    def mark(attribute: str) -> Callable[..., None]:
        return lambda *_: setattr(trace, attribute, next(count))

    for name, module in skeleton.named_modules():
        if isinstance(module, LINEARS):
            handles.append(module.register_forward_hook(linear_hook(name)))
        elif not isinstance(module, nn.Embedding) and any(p.ndim == 1 for p in module.parameters(recurse=False)):
            handles.append(module.register_forward_hook(norm_hook(name)))
    blocks = [skeleton.get_submodule(path) for path in structure.blocks]
    handles.append(blocks[0].register_forward_pre_hook(mark("first_block")))
    handles.append(blocks[-1].register_forward_hook(mark("last_block")))
    with torch.no_grad():
        skeleton(input_ids=torch.ones(1, 4, dtype=torch.long), **no_cache(skeleton))
    for handle in handles:
        handle.remove()
    return trace


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether one is the other, or a view of it."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


# --- blocks ----------------------------------------------------------------------------------------------------------


def _blocks(structure: Structure, skeleton: PreTrainedModel) -> list[Block]:
    found = [{site.role: site for site in structure.in_block(index)} for index in range(len(structure.blocks))]
    for name, sites in zip(structure.blocks, found, strict=True):
        attention = {"q", "k", "v", "o"} <= sites.keys() or {"qkv", "o"} <= sites.keys()
        if "other" in sites or not attention or "down" not in sites:
            raise InputError(f"{name}: its attention and FFN are not understood; use match: none")
    heads = find_heads(found, skeleton)
    return [Block(index, sites, own) for index, (sites, own) in enumerate(zip(found, heads, strict=True))]


def _site_axes(blocks: Sequence[Block]) -> dict[str, Axes]:
    axes: dict[str, Axes] = {}
    for block in blocks:
        for role, site in block.sites.items():
            inner = block.group(role)
            made, read = (RESIDUAL, inner) if role in ("o", "down") else (inner, RESIDUAL)
            axes[f"{site.name}.weight"] = (read, made) if site.transposed else (made, read)
            if site.bias:
                axes[f"{site.name}.bias"] = (made,)
    return axes


# --- outside the blocks ----------------------------------------------------------------------------------------------


def _outer_axes(
    skeleton: PreTrainedModel, structure: Structure, trace: _Trace, width: int, tied: dict[str, str]
) -> dict[str, Axes]:
    """Embeddings, and what follows the last block: maps one after the other, each with a stream of its own behind it.

    A map that is tied to an embedding reads the residual stream's order, whatever lies between.
    """
    axes: dict[str, Axes] = {}
    for name, module in skeleton.named_modules():
        if isinstance(module, nn.Embedding):
            axes[f"{name}.weight"] = (None, RESIDUAL if module.embedding_dim == width else None)
    inside = tuple(f"{block}." for block in structure.blocks)
    calls: list[tuple[int, str, nn.Module]] = [
        (order, name, skeleton.get_submodule(name))
        for name, (_, _, order) in trace.linears.items()
        if not name.startswith(inside)
    ]
    calls += [(norm.order, norm.name, norm.module) for norm in trace.norms if not norm.name.startswith(inside)]
    for order, name, module in sorted(calls, key=lambda call: call[0]):
        if order < trace.first_block and isinstance(module, LINEARS):
            made = module.get_parameter("weight").shape[0]
            if made != width or module.get_parameter("weight").shape[1] == width:
                raise InputError(f"{name}: a map before the blocks that is not understood; use match: none")
            axes |= _map_axes(name, module, RESIDUAL, None)
    stream, found = RESIDUAL, dict[str, Axes]()
    for number, (order, name, module) in enumerate(sorted(calls, key=lambda call: call[0])):
        if order < trace.last_block:
            continue
        if isinstance(module, LINEARS):
            made = f"{TAIL}{number}"
            found |= _map_axes(name, module, made, stream)
            owner = tied.get(f"{name}.weight")
            if owner in axes and axes[owner] == (None, RESIDUAL) and stream != RESIDUAL:
                found = {key: tuple(RESIDUAL if g == stream else g for g in groups) for key, groups in found.items()}
            stream = made
        else:
            found |= {f"{name}.{key}": (stream,) for key, _ in module.named_parameters(recurse=False)}
    fixed = {
        key: tuple(None if group is not None and group.startswith(TAIL) else group for group in groups)
        for key, groups in found.items()
    }
    # a bias may stand beside the map's own, tied to it, in a module that is never called
    return axes | fixed | {owner: fixed[name] for name, owner in tied.items() if name in fixed and owner not in axes}


def _map_axes(name: str, module: nn.Module, made: str | None, read: str | None) -> dict[str, Axes]:
    weight = (made, read) if isinstance(module, nn.Linear) else (read, made)
    bias = {f"{name}.bias": (made,)} if getattr(module, "bias", None) is not None else {}
    return {f"{name}.weight": weight, **bias}


# --- norms -----------------------------------------------------------------------------------------------------------


def _parameters(norm: _Norm) -> list[str]:
    return [f"{norm.name}.{key}" for key, _ in norm.module.named_parameters(recurse=False)]


def _norm_axes(blocks: Sequence[Block], trace: _Trace, width: int, known: set[str]) -> dict[str, Axes]:
    """The group that each norm's parameters follow, by what the norm reads and feeds."""
    axes: dict[str, Axes] = {}
    for norm in trace.norms:
        if not set(_parameters(norm)) <= known:
            size = next(norm.module.parameters(recurse=False)).shape[0]
            axes |= dict.fromkeys(_parameters(norm), (_followed(norm, size, blocks, trace, width),))
    return axes


def _followed(norm: _Norm, size: int, blocks: Sequence[Block], trace: _Trace, width: int) -> str | None:
    for block in blocks:
        for role, site in block.sites.items():
            read, made, _ = trace.linears[site.name]
            if role in ("q", "k") and _same(norm.input, made):
                if size == site.d_out:
                    return block.group(role)
                if size == block.heads.k.shape[1]:
                    return None  # one gain for all heads
            if role in ("down", "o") and _same(norm.output, read) and size == site.d_in:
                return block.group(role)
    if size == width and norm.input.shape[-1] == width:
        return RESIDUAL
    raise InputError(f"{norm.name}: what this norm reads is not understood; use match: none")


def _folds(
    norms: Iterable[_Norm],
    trace: _Trace,
    blocks: Sequence[Block],
    axes: dict[str, Axes],
    tied: dict[str, str],
    twice: bool,
) -> tuple[dict[str, tuple[float, list[str]]], str | None]:
    """What each gain on the residual stream is folded into, or why an orthogonal map of the stream is impossible."""
    folds: dict[str, tuple[float, list[str]]] = {}
    weights = {name: tied.get(f"{name}.weight", f"{name}.weight") for name in trace.linears}
    readers = [name for name in trace.linears if RESIDUAL in axes[weights[name]] and _reads(trace, name, blocks)]
    for norm in norms:
        if not is_equivariant(norm.module, "rotate"):
            return {}, f"{norm.name} is no RMSNorm: a rotation of its input does not rotate its output"
        fed = [name for name in readers if _same(trace.linears[name][0], norm.output)]
        if not fed:
            return {}, f"{norm.name} is followed by no linear map that its gain could be folded into"
        if shared := next((name for name in fed if f"{name}.weight" in tied), None):
            return {}, f"{shared} is tied to the embedding, which its norm's gain must not change"
        folds[_parameters(norm)[0]] = (neutral_gain(norm.module), [f"{name}.weight" for name in sorted(fed)])
    folded = {weight for _, fed in folds.values() for weight in fed}
    loose = next((name for name in readers if f"{name}.weight" not in folded), None)
    if twice or loose:
        return {}, f"{loose or 'a map behind the last block'} reads the residual stream without a norm before it"
    return folds, None


def _reads(trace: _Trace, name: str, blocks: Sequence[Block]) -> bool:
    """Whether a map with one axis on the residual stream reads it."""
    role = next((r for block in blocks for r, site in block.sites.items() if site.name == name), None)
    if role is not None:
        return role not in ("o", "down")
    return trace.linears[name][2] > trace.last_block
