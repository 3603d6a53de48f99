"""Self-guided training: a dense guide beside each structured layer, which fades while both train (arXiv 2406.16450).

o = a W x + (1 - a) U V x, W a trainable dense weight, a from 1 to 0 in the first part of the training; then W is
deleted. In evaluation, and in what is saved, there is the structured layer alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from llmcompress.checkpoint.install import structured_layers
from llmcompress.errors import InputError, RunError
from llmcompress.layers.base import StructuredLinear
from llmcompress.workspace import disk_errors, replace_durably

GUIDE, FILE = "guide", "guides.safetensors"
Shape = Literal["cosine", "linear"]


@dataclass(frozen=True)
class GuideSchedule:
    """The guide's weight in a training of `steps` steps, of which the first `fraction` are guided.

    InputError unless steps >= 1 and 0 < fraction < 1.
    """

    steps: int
    fraction: float = 0.5
    shape: Shape = "cosine"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps must be at least 1; got {self.steps}")
        if not 0 < self.fraction < 1:
            raise InputError(f"fraction must be in (0, 1), the share of the steps with a guide; got {self.fraction}")

    @property
    def guided(self) -> float:
        """Steps after which there is no guide, T."""
        return self.fraction * self.steps

    def alpha(self, step: float) -> float:
        """(1 + cos(pi t / T)) / 2 or 1 - t / T for t < T, then 0."""
        if step >= self.guided:
            return 0.0
        share = step / self.guided
        return (1 + math.cos(math.pi * share)) / 2 if self.shape == "cosine" else 1 - share


class _Guided:
    """The forward hook of a layer with a guide."""

    def __init__(self, layer: StructuredLinear) -> None:
        self.alpha = torch.ones((), device=_guide(layer).device)
        self.open = True
        self.hooks = [
            layer.register_forward_hook(self),
            layer.register_state_dict_post_hook(_leave_out),
            layer.register_load_state_dict_pre_hook(_keep),
        ]

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not (self.open and layer.training):
            return None
        guide, bias = cast(Tensor, layer.guide), cast("Tensor | None", layer.bias)
        return output + self.alpha * (F.linear(inputs[0], guide, bias) - output)


def attach_guides(model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> list[str]:
    """Gives every structured layer a dense guide, a parameter that trains with it; returns the layers' names.

    The guide starts at the layer's product, which leaves the output as it is, or at weights[name] (d_out, d_in), such
    as the dense weight before the conversion. It counts in `parameters()`, and is no part of `state_dict()`.
    InputError: no structured layer, guides attached already, a weight of another shape.
    """
    layers = structured_layers(model)
    if not layers:
        raise InputError("self_guided: guides structured layers, and this model has none")
    for name, layer in layers.items():
        if GUIDE in layer._parameters:
            raise InputError(f"{name}: has a guide already")
        start = layer.to_dense() if weights is None or name not in weights else weights[name]
        if tuple(start.shape) != (layer.d_out, layer.d_in):
            raise InputError(f"{name}: the guide must be ({layer.d_out}, {layer.d_in}); got {tuple(start.shape)}")
        like = next(layer.parameters())
        layer.register_parameter(GUIDE, nn.Parameter(start.detach().to(like).clone()))
        layer.guidance = _Guided(layer)  # type: ignore[assignment]
    return list(layers)


def set_guides(model: nn.Module, alpha: float, generator: torch.Generator | None = None) -> None:
    """Sets all guides' weight. With a generator each layer's guide is used with probability alpha, drawn now."""
    for layer in guided_layers(model).values():
        guidance = cast(_Guided, layer.guidance)
        guidance.alpha.fill_(alpha)
        guidance.open = generator is None or float(torch.rand((), generator=generator)) < alpha


def drop_guides(model: nn.Module, optimizer: Any = None) -> None:
    """Deletes all guides and what the optimiser keeps for them.

    An empty parameter takes their place in the optimiser's groups, so that a checkpoint of it, which counts
    parameters, is loaded by an optimiser that was made before the guides went.
    """
    for layer in guided_layers(model).values():
        guide = _guide(layer)
        for hook in cast(_Guided, layer.guidance).hooks:
            hook.remove()
        del layer.guidance, layer._parameters[GUIDE]
        if optimizer is not None:
            optimizer.state.pop(guide, None)
        guide.grad = None
        guide.data = guide.data.new_empty(0)


def guided_layers(model: nn.Module) -> dict[str, StructuredLinear]:
    return {name: layer for name, layer in structured_layers(model).items() if GUIDE in layer._parameters}


class SelfGuidedCallback(TrainerCallback):
    """Self-guided training in transformers' Trainer; give it to the constructor, so that the optimiser sees the guides.

    schedule: half the Trainer's steps by a cosine if absent. stochastic: each layer uses its guide in a step with the
    probability that is its weight, which halves the cost; drawn from `seed` and the step, alike in all processes.
    weights: see `attach_guides`. Checkpoints hold the guides in a file of their own, and are gone on with from there.
    InputError when training begins, if the schedule is longer than it.
    """

    def __init__(
        self,
        schedule: GuideSchedule | None = None,
        *,
        stochastic: bool = True,
        seed: int = 0,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.schedule, self.stochastic, self.seed, self.weights = schedule, stochastic, seed, weights

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        attach_guides(kwargs["model"], self.weights)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if not guided_layers(model):
            raise InputError("self_guided: no guide is there; give the callback to a new Trainer's constructor")
        self._running, self._saved = self.schedule or GuideSchedule(state.max_steps), -1
        if self._running.guided > state.max_steps:
            raise InputError(
                f"self_guided: the guide lasts {self._running.guided:g} steps and the training {state.max_steps}; "
                "shorten the schedule"
            )
        if state.global_step:
            self._go_on(model, kwargs["optimizer"], Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _go_on(self, model: nn.Module, optimizer: Any, checkpoint: Path) -> None:
        step = int(checkpoint.name.rpartition("-")[2])
        if step >= self._running.guided:
            drop_guides(model, optimizer)
            return
        if not (checkpoint / FILE).is_file():
            raise RunError(f"{checkpoint}: holds no {FILE}, without which a guided training cannot go on")
        guides = load_file(checkpoint / FILE)
        with torch.no_grad():
            for name, layer in guided_layers(model).items():
                _guide(layer).copy_(guides[name])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        generator = torch.Generator().manual_seed((self.seed % 2**31 << 32) + state.global_step)
        alpha = self._running.alpha(state.global_step)
        set_guides(kwargs["model"], alpha, generator if self.stochastic else None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self._running.guided:
            drop_guides(kwargs["model"], kwargs["optimizer"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.save(kwargs["model"], Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def save(self, model: nn.Module, checkpoint: Path) -> None:
        """Writes the guides into a checkpoint, once; nothing where there are none any more."""
        step = int(checkpoint.name.rpartition("-")[2])
        guides = {name: _guide(layer).detach().contiguous() for name, layer in guided_layers(model).items()}
        if not guides or step == self._saved:
            return
        part = checkpoint / f"{FILE}.part"
        with disk_errors(checkpoint):
            save_file(guides, part)
            replace_durably(part, checkpoint / FILE)
        self._saved = step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        drop_guides(kwargs["model"], kwargs["optimizer"])


def _guide(layer: StructuredLinear) -> nn.Parameter:
    return cast(nn.Parameter, layer._parameters[GUIDE])


def _leave_out(layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    del state[prefix + GUIDE]


def _keep(layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A state without the guide leaves it as it is."""
    state[prefix + GUIDE] = cast(Tensor, layer.guide)
