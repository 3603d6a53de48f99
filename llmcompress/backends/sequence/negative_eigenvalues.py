"""Negative eigenvalues for the linear recurrences of pretrained models (arXiv 2411.12537).

A range scale c in [1, 2] is given to the layers of a transformers model, in memory: gated delta rules multiply their
write strength by it, selective scans turn a gate s into c s - (c - 1), in prefill and in decoding alike. The kernels
that a layer calls are looked up in its modelling file; they do what they did for every layer that has no scale.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from llmcompress.backends.ports import Subject
from llmcompress.backends.report import Curve, Report
from llmcompress.backends.sequence.householder import (
    contraction_as_gh,
    householder_product,
    permutation_as_reflections,
    rotation_as_reflections,
)
from llmcompress.backends.sequence.linear_rnn import (
    DeltaNetLayer,
    SelectiveDiagonalLayer,
    check_keys,
    check_scale,
    delta_rule,
    selective_scan,
    signed_segment_products,
)
from llmcompress.backends.sequence.state_tracking import StateTrackingProbe
from llmcompress.errors import InputError
from llmcompress.layers.converted import mark

__all__ = ["ConversionReport", "DeltaNetLayer", "NegativeEigenvalues", "NegativeEigenvaluesOptions", "RangeAnneal",
           "SelectiveDiagonalLayer", "StateTrackingProbe", "contraction_as_gh", "delta_rule", "eigenvalue_report",
           "extend_range", "householder_product", "permutation_as_reflections", "rotation_as_reflections",
           "selective_scan", "set_range_scale", "signed_segment_products", "supported_layers"]  # fmt: skip

NAME = "negative_eigenvalues"
DELTA = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
DIAGONAL = ("mamba_selective_scan", "mamba_selective_state_update")
FUSED = "mamba_inner_fn"  # prefill in one kernel, which knows only the usual range

_scale: ContextVar[float] = ContextVar("range scale", default=1.0)
_recorder: ContextVar[Callable[[Tensor], None] | None] = ContextVar("recorder of eigenvalues", default=None)


class NegativeEigenvaluesOptions(BaseModel, extra="forbid"):
    scale: float = Field(default=2.0, ge=1, le=2, description="range scale: 1 as pretrained, 2 eigenvalues in [-1, 1]")
    anneal: float = Field(default=0.1, ge=0, le=1, description="share of the steps in which the scale rises from 1")
    layers: list[int] | None = Field(default=None, description="blocks that are changed; all that can be if absent")


@dataclass(frozen=True)
class ConversionReport:
    """names: paths of the changed layers; kind: delta or diagonal, of each; scale."""

    names: list[str]
    kind: list[str]
    scale: float


# --- finding layers --------------------------------------------------------------------------------------------------


def supported_layers(model: nn.Module) -> dict[str, str]:
    """Path -> "delta" or "diagonal" of the layers that `extend_range` can change."""
    found = {}
    for name, module in model.named_modules():
        called = _called(type(module))
        for kind, kernels in (("delta", DELTA), ("diagonal", DIAGONAL)):
            if set(kernels) <= called:
                found[name] = kind
    return found


def _called(cls: type) -> set[str]:
    """Names that the methods of a class use."""
    methods = [inspect.unwrap(m) for m in vars(cls).values() if inspect.isfunction(m)]
    return {name for method in methods for name in method.__code__.co_names}


def _no_layers(model: nn.Module) -> InputError:
    classes = {type(module).__name__ for module in model.modules()}
    recurrent = sorted(c for c in classes if re.search(r"Mamba|Mixer|Delta|SSM|Recurrent|RWKV|LSTM|KDA", c))
    if any("Mamba2" in c or c in ("BambaMixer", "FalconH1Mixer") for c in classes) or any(
        getattr(getattr(module, "A_log", None), "ndim", 0) == 1 for module in model.modules()
    ):
        return InputError(
            f"{', '.join(recurrent)}: multiplies its decays in log-space, where they cannot be negative; it would need "
            "a scan with signs"
        )
    found = ", ".join(recurrent) or "none, but " + ", ".join(sorted(c for c in classes if "Attention" in c))
    return InputError(f"no layer whose range can be extended; recurrent layers found: {found}")


def _block(name: str) -> int:
    numbers = re.findall(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(numbers[0]) if numbers else -1


# --- the kernels -----------------------------------------------------------------------------------------------------


def _delta_kernel(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def scaled(query: Tensor, key: Tensor, value: Tensor, *args: Any, beta: Tensor, **kwargs: Any) -> Any:
        c, recorder = _scale.get(), _recorder.get()
        if c != 1:
            beta = beta * c
            if not kwargs.get("use_qk_l2norm_in_kernel", False):
                check_keys(key, beta)
        if recorder is not None:
            g = kwargs.get("g", args[0] if args else None)
            along = 1 - beta.float()
            recorder(along if g is None else along * g.float().exp())
        return kernel(query, key, value, *args, beta=beta, **kwargs)

    return scaled


def _time_step(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    if bias is not None:
        dt = dt + bias.to(dt.dtype).view(-1, *[1] * (dt.ndim - 2))
    return F.softplus(dt) if softplus else dt


def _record_gates(dt: Tensor, A: Tensor) -> None:
    recorder, c = _recorder.get(), _scale.get()
    if recorder is not None:
        recorder(c * torch.exp(dt.float()[..., None] * A.float()[:, None]) - (c - 1))


def _scan_kernel(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def scaled(
        u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
        delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False, **kwargs: Any,
    ) -> Any:  # fmt: skip
        c = _scale.get()
        if _recorder.get() is not None:
            _record_gates(_time_step(dt, delta_bias, delta_softplus), A)
        if c == 1:
            return kernel(
                u, dt, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus,
                return_last_state=return_last_state, **kwargs,
            )  # fmt: skip
        y, state = selective_scan(u, _time_step(dt, delta_bias, delta_softplus), A, B, C, D, z, c)
        return (y, state) if return_last_state else y

    return scaled


def _step_kernel(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def scaled(
        state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
        dt_bias: Tensor | None = None, dt_softplus: bool = False, z: Tensor | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        c = _scale.get()
        if c == 1:
            out: Tensor = kernel(state, u, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus, z=z, **kwargs)
            return out
        step, gate = _time_step(dt, dt_bias, dt_softplus), None if z is None else z[..., None]
        y, new = selective_scan(u[..., None], step[..., None], A, B[..., None], C[..., None], D, gate, c, state)
        state.copy_(new)
        return y[..., 0]

    return scaled


def _fused_kernel(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def scaled(*args: Any, **kwargs: Any) -> Any:
        """None sends the layer to the scan of its own."""
        return kernel(*args, **kwargs) if _scale.get() == 1 and _recorder.get() is None else None

    return scaled


WRAPPERS = dict.fromkeys(DELTA, _delta_kernel) | {
    DIAGONAL[0]: _scan_kernel, DIAGONAL[1]: _step_kernel, FUSED: _fused_kernel
}  # fmt: skip


def _wrap_kernels(cls: type) -> None:
    """Puts the kernels that the class's modelling file names behind functions that know of a scale, once."""
    source = sys.modules[cls.__module__]
    for name in _called(cls) & set(WRAPPERS):
        kernel = getattr(source, name, None)
        if kernel is not None and not getattr(kernel, "knows_scale", False):
            wrapped = WRAPPERS[name](kernel)
            wrapped.knows_scale = True  # type: ignore[attr-defined]
            setattr(source, name, wrapped)


# --- conversion ------------------------------------------------------------------------------------------------------


def extend_range(model: nn.Module, scale: float = 2.0, layers: Sequence[int] | None = None) -> ConversionReport:
    """Gives the recurrences of a model, or of the blocks `layers`, the range scale; 1 leaves every bit as it is.

    Changed layers keep it through `save_pretrained` and `from_pretrained` once `llmcompress` marks the checkpoint as
    its own (`llmcompress.checkpoint.quantizer.attach`). InputError: a scale outside [1, 2], a model without such
    layers, one that multiplies decays in log space.
    """
    check_scale(scale)
    supported = supported_layers(model)
    if not supported:
        raise _no_layers(model)
    chosen = {name: kind for name, kind in supported.items() if layers is None or _block(name) in layers}
    missing = sorted(set(layers or []) - {_block(name) for name in chosen})
    if missing:
        known = ", ".join(str(_block(name)) for name in supported)
        raise InputError(f"layers: block {missing[0]} has no such recurrence; those that have: {known}")
    for name in chosen:
        _give_scale(model.get_submodule(name), scale)
    return ConversionReport(list(chosen), list(chosen.values()), scale)


def set_range_scale(model: nn.Module, c: float) -> None:
    """Another scale for the layers that have one."""
    check_scale(c)
    for module in model.modules():
        if vars(module).get("conversion", {}).get("type") == NAME:
            mark(module, NAME, scale=float(c))


def _give_scale(module: nn.Module, scale: float) -> None:
    first = "conversion" not in vars(module)
    mark(module, NAME, scale=float(scale))
    if first:
        _wrap_kernels(type(module))
        tokens: list[Any] = []
        # OlmoHybrid's layers double their write strength themselves where their config says so
        native = 2.0 if getattr(module, "allow_neg_eigval", False) else 1.0

        def enter(layer: nn.Module, _: Any) -> None:
            tokens.append(_scale.set(vars(layer)["conversion"]["scale"] / native))

        def leave(*_: Any) -> None:
            _scale.reset(tokens.pop())

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)


class RangeAnneal(TrainerCallback):
    """Raises the scale from `start` to `end` in the first `fraction` of a Trainer's steps."""

    def __init__(self, start: float = 1.0, end: float = 2.0, fraction: float = 0.1) -> None:
        check_scale(start)
        check_scale(end)
        self.start, self.end, self.fraction = start, end, fraction

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = self.fraction * state.max_steps
        share = min(1.0, state.global_step / steps) if steps else 1.0
        set_range_scale(kwargs["model"], self.start + share * (self.end - self.start))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_range_scale(kwargs["model"], self.end)


# --- the ports -------------------------------------------------------------------------------------------------------


@contextmanager
def _recording(receive: Callable[[Tensor], None]) -> Iterator[None]:
    token = _recorder.set(receive)
    try:
        yield
    finally:
        _recorder.reset(token)


def eigenvalue_report(model: PreTrainedModel, tokens: Tensor, bins: int = 20) -> Report:
    """The transitions' eigenvalues that occur on tokens (rows, length), layer by layer: share below 0, extremes."""
    supported = supported_layers(model)
    if not supported:
        raise _no_layers(model)
    report = Report(
        f"eigenvalues of {len(supported)} recurrences on {tokens.numel():,} tokens",
        ["layer", "kind", "scale", "share below 0", "least", "median", "largest"],
        x_label="eigenvalue", y_label="share",
    )  # fmt: skip
    found: dict[str, list[Tensor]] = {name: [] for name in supported}
    current: list[str] = []
    handles = []
    for name in supported:
        module = model.get_submodule(name)
        _wrap_kernels(type(module))
        handles.append(module.register_forward_pre_hook(lambda _, __, name=name: current.append(name)))
    try:
        with _recording(lambda values: found[current[-1]].append(values.detach().flatten().cpu())), torch.no_grad():
            for row in tokens.split(4):
                model(input_ids=row.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    edges = torch.linspace(-1, 1, bins + 1)
    for name, kind in supported.items():
        values = torch.cat(found[name])
        scale = vars(model.get_submodule(name)).get("conversion", {}).get("scale", 1.0)
        below = float((values < 0).double().mean())
        report.add(name, kind, scale, below, float(values.min()), float(values.median()), float(values.max()))
        shares = torch.histc(values, bins, -1, 1) / len(values)
        report.curves.append(Curve(name, ((edges[1:] + edges[:-1]) / 2).tolist(), shares.tolist()))
    negative = sum(1 for share in report.column("share below 0") if share > 0)
    report.findings.append(
        f"{negative} of {len(supported)} layers use negative eigenvalues"
        + ("" if negative else ": no state that a parity needs can be tracked at all lengths; see extend_range")
    )
    return report


class NegativeEigenvalues:
    """The layer port: a recipe's `convert` extends the range before fine-tuning; and an analysis of eigenvalues."""

    Options: ClassVar[type[NegativeEigenvaluesOptions]] = NegativeEigenvaluesOptions
    trains: ClassVar[bool] = True  # the whole model is run

    def __init__(self, options: NegativeEigenvaluesOptions) -> None:
        self.options = options

    def convert(self, model: PreTrainedModel, generator: torch.Generator) -> list[str]:
        scale = 1.0 if self.options.anneal else self.options.scale
        return extend_range(model, scale, self.options.layers).names

    def callbacks(self) -> list[TrainerCallback]:
        if not self.options.anneal:
            return []
        return [RangeAnneal(1.0, self.options.scale, self.options.anneal)]

    def undo(self, model: PreTrainedModel) -> None:
        """Back to what the weights were trained with."""
        set_range_scale(model, 1.0)

    @staticmethod
    def restore(module: nn.Module, spec: dict[str, Any]) -> None:
        if not supported_layers(module):
            raise InputError(f"{type(module).__name__}: its range cannot be extended")
        _give_scale(module, spec["scale"])

    def analyze(self, subject: Subject) -> Report:
        model, tokens = subject.trainable()
        return eigenvalue_report(model, tokens)
