"""Fitting a compressed block to the dense one: a few steps on its factors, with one block in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.finetune.losses import relative_error
from llmcompress.finetune.lrc import factors
from llmcompress.layers.base import StructuredLinear
from llmcompress.layers.sparse_dictionary import SparseDictionaryLinear
from llmcompress.plan import Plan
from llmcompress.recipe import BlockRecovery

HELD_OUT = 8  # one sequence in so many tells whether the fit is kept


@dataclass(frozen=True)
class Recovered:
    """Relative errors of the block's outputs on held-out sequences; `kept` says whether the fitted factors stay."""

    before: float
    after: float
    kept: bool

    @property
    def note(self) -> str:
        fate = "" if self.kept else "; not kept"
        return f"block recovery: relative error of the block's outputs {self.before:.4f} -> {self.after:.4f}{fate}"


def check_plan(plan: Plan) -> None:
    """InputError if a layer shares factors with another block: fitting one would change the other."""
    if plan.spans_blocks:
        raise InputError("block_recovery: a method that shares factors between blocks cannot be fitted block by block")


def recover_block(
    run: Callable[[Tensor], Tensor],
    layers: Mapping[str, StructuredLinear],
    inputs: Tensor,
    targets: Tensor,
    batch: int,
    section: BlockRecovery,
    generator: torch.Generator,
) -> Recovered:
    """Fits the factors of `layers` in place, so that `run(inputs)` comes near `targets`, by Adam under a cosine.

    run: the block with its layers installed, (sequences, length, d_model) -> the same; inputs, targets: (sequences,
    length, d_model), on any device; batch: sequences at a time where nothing is fitted. The loss is the mean over
    positions of the squared error over the squared length. Steps are taken in float32 whatever the layers' dtype;
    sparse codes keep their mask. The last eighth of the sequences is held out: a fit that is no gain there, as stored,
    is undone.
    """
    held_out = max(1, len(inputs) // HELD_OUT) if len(inputs) > 1 else 0
    fit, last = torch.arange(len(inputs) - held_out), torch.arange(len(inputs) - max(held_out, 1), len(inputs))
    stored = {name: {key: t.clone() for key, t in layer.state_dict().items()} for name, layer in layers.items()}
    before = _error(run, inputs, targets, last, batch)
    for layer in layers.values():
        if isinstance(layer, SparseDictionaryLinear):
            layer.unpack()
    _fit(run, _parameters(layers), inputs, targets, fit, section, generator)
    for layer in layers.values():
        if isinstance(layer, SparseDictionaryLinear):
            layer.pack()
    after = _error(run, inputs, targets, last, batch)
    if not after < before:
        for name, layer in layers.items():
            layer.load_state_dict(stored[name])
    return Recovered(before, after, after < before)


def _parameters(layers: Mapping[str, StructuredLinear]) -> list[nn.Parameter]:
    """Those of all layers, shared ones once."""
    return list({id(p): p for layer in layers.values() for p in factors(layer)}.values())


def _fit(
    run: Callable[[Tensor], Tensor],
    parameters: list[nn.Parameter],
    inputs: Tensor,
    targets: Tensor,
    rows: Tensor,
    section: BlockRecovery,
    generator: torch.Generator,
) -> None:
    masters = [parameter.detach().float().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(masters, section.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, section.steps)
    device = parameters[0].device
    order = rows[:0]
    for _ in range(section.steps):
        while len(order) < min(section.batch, len(rows)):
            order = torch.cat((order, rows[torch.randperm(len(rows), generator=generator)]))
        chosen, order = order[: section.batch].sort().values, order[section.batch :]
        with torch.enable_grad():
            loss = relative_error(run(inputs[chosen].to(device)), targets[chosen].to(device))
            gradients = torch.autograd.grad(loss, parameters)
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient.float()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.copy_(master)


@torch.no_grad()
def _error(run: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor, rows: Tensor, batch: int) -> float:
    parts = [
        relative_error(output := run(inputs[some]), targets[some].to(output.device)).item() * len(some)
        for some in rows.split(batch)
    ]
    return sum(parts) / len(rows)
