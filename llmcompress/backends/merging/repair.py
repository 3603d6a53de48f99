"""What an interpolated network's statistics lose, put back: REPAIR, and batch norm's own.

Source: Jordan et al., REPAIR, arXiv 2211.08403.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcompress.errors import InputError

SMALLEST = 1e-6  # of the target's: a standard deviation below it is that of a dead channel


@dataclass(frozen=True)
class _Moments:
    """Mean and standard deviation (channels,) of a layer's outputs, float64."""

    mean: Tensor
    std: Tensor


def repair(
    merged: nn.Module, a: nn.Module, b: nn.Module, layers: Sequence[str], batches: Iterable[Tensor], lam: float = 0.5
) -> nn.Module:
    """A copy of `merged` whose named layers' outputs have the endpoints' interpolated means and standard deviations.

    layers: linear maps or convolutions, with biases, in the order in which they run; each is rescaled by an affine map
    a channel, measured after those before it were repaired. a, b: the endpoints, b matched. batches: inputs.
    Not for RMSNorm decoders, whose merges it makes worse. InputError for a layer of another kind or without a bias, or
    a channel that a layer of `merged` never changes while the endpoints' does.
    Source: arXiv 2211.08403, section 3.
    """
    repaired, data = copy.deepcopy(merged), list(batches)
    for name in layers:
        layer = repaired.get_submodule(name)
        if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)) or layer.bias is None:
            raise InputError(f"{name}: REPAIR rescales linear maps and convolutions with biases; got {layer}")
        found, first, second = (_moments(model, name, data) for model in (repaired, a, b))
        mean = (1 - lam) * first.mean + lam * second.mean
        std = (1 - lam) * first.std + lam * second.std
        dead = found.std <= SMALLEST * std
        if (dead & (std > 0)).any():
            raise InputError(f"{name}: channel {int(dead.nonzero()[0])} of the merged model is constant on this data")
        scale = torch.where(std > 0, std / found.std.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
        with torch.no_grad():
            columns = (-1, *[1] * (layer.weight.ndim - 1))
            layer.weight.mul_(scale.view(columns).to(layer.weight))
            layer.bias.copy_((scale * (layer.bias.double() - found.mean) + mean).to(layer.bias))
    return repaired


def reset_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Recomputes the running statistics of all batch norms, in place: those of a merge are neither endpoint's."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta, training = [norm.momentum for norm in norms], model.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average over all batches
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    model.train(training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _moments(model: nn.Module, name: str, batches: Sequence[Tensor]) -> _Moments:
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    axis = 1 if isinstance(layer, (nn.Conv1d, nn.Conv2d)) else -1

    def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        rows = output.detach().movedim(axis, 0).flatten(1).double()
        seen.append(torch.stack((rows.sum(1), rows.square().sum(1), torch.full((len(rows),), rows.shape[1]).double())))

    handle = layer.register_forward_hook(hook)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    total, squares, count = torch.stack(seen).sum(0)
    mean = total / count
    return _Moments(mean, (squares / count - mean.square()).clamp_min(0).sqrt())
