"""Long-memory adapters by perturb-then-diagonalise state-space models (S5-PTD, S4-PTD; arXiv 2310.01698)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, TrainerCallback

from llmcompress.backends.ports import Subject
from llmcompress.backends.report import Curve, Report
from llmcompress.backends.sequence.diagonal_ssm import DiagonalSSM, Init, SSMAdapter
from llmcompress.backends.sequence.ssm import (
    NEEDS_NONE,
    PTDResult,
    hippo,
    perturb_then_diagonalize,
    psi,
    s4d_init,
    transfer_function,
)
from llmcompress.errors import InputError
from llmcompress.layers.converted import mark
from llmcompress.models.structure import analyse

__all__ = ["PTD", "DiagonalSSM", "PTDOptions", "PTDResult", "SSMAdapter", "frequency_report", "hippo",
           "perturb_then_diagonalize", "psi", "s4d_init", "transfer_function"]  # fmt: skip

ADAPTER = "ssm_adapter"
STATES = "ssm_states"  # an attribute of a model's cache: what the adapters remember of its sequences


class PTDOptions(BaseModel, extra="forbid"):
    init: Init = Field(default="s5-ptd", description="s5-ptd: one system for all channels; s4-ptd, s4d: one a channel")
    layers: list[int] | None = Field(
        default=None, description="blocks that get one; that at a third of the way if absent"
    )
    d_state: int = Field(default=64, ge=1, description="states of a system")
    dt_min: float = Field(default=1e-3, gt=0, description="shortest step")
    dt_max: float = Field(default=1e-1, gt=0, description="longest step")


# --- adapters --------------------------------------------------------------------------------------------------------


def add_adapter(block: nn.Module, adapter: SSMAdapter) -> None:
    """Adds the adapter to what the block returns, and notes on the block how to build it again.

    In generation its state lies with the model's cache: beams that are reordered, and caches that are cut, it does not
    follow.
    """
    block.add_module(ADAPTER, adapter)
    ssm = adapter.ssm
    mark(block, "ptd", added=ADAPTER, d_model=ssm.d_model, d_state=ssm.d_state, init=ssm.init)
    block.register_forward_hook(_add, with_kwargs=True)


def _add(block: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    adapter = block.get_submodule(ADAPTER)
    cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
    states: dict[int, Tensor] = {} if cache is None else vars(cache).setdefault(STATES, {})
    added, states[id(adapter)] = adapter(hidden, states.get(id(adapter)))
    return (hidden + added, *output[1:]) if isinstance(output, tuple) else hidden + added


class PTD:
    """The layer port: a recipe's `convert` adds adapters that training fills; and an analysis of eigenvectors."""

    Options: ClassVar[type[PTDOptions]] = PTDOptions

    def __init__(self, options: PTDOptions) -> None:
        self.options = options

    def convert(self, model: PreTrainedModel, generator: torch.Generator) -> list[str]:
        options, blocks = self.options, analyse(model).blocks
        layers = [len(blocks) // 3] if options.layers is None else options.layers
        for index in layers:
            if not 0 <= index < len(blocks):
                raise InputError(f"layers: {index} is no block of this model; it has 0..{len(blocks) - 1}")
            block = model.get_submodule(blocks[index])
            if "conversion" in vars(block):
                raise InputError(f"layers: {blocks[index]} has an adapter already")
            ssm = DiagonalSSM(
                model.config.hidden_size, options.d_state, options.init, options.dt_min, options.dt_max,
                generator=generator,
            )  # fmt: skip
            like = next(block.parameters())
            add_adapter(block, SSMAdapter(ssm.d_model, ssm).to(like.device, like.dtype))
        return [blocks[index] for index in layers]

    def callbacks(self) -> list[TrainerCallback]:
        return []

    def undo(self, model: PreTrainedModel) -> None:
        """Nothing: the restored output maps are zero."""

    @staticmethod
    def restore(module: nn.Module, spec: dict[str, Any]) -> None:
        ssm = DiagonalSSM(spec["d_model"], spec["d_state"], spec["init"], initialise=False)
        add_adapter(module, SSMAdapter(spec["d_model"], ssm))

    def analyze(self, subject: Subject) -> Report:
        """HiPPO's systems, and the token-to-token maps of the model's residual stream."""
        report = frequency_report(self.options.d_state)
        found = []
        for block, rows in subject.residual.items():
            n = min(self.options.d_state, rows.shape[1])
            x = rows.double() - rows.double().mean(0)
            x = x @ torch.linalg.eigh(x.T @ x).eigenvectors[:, -n:]
            A = torch.linalg.lstsq(x[:-1], x[1:]).solution.T
            kappa = float(torch.linalg.cond(torch.linalg.eig(A).eigenvectors))
            report.add(f"token to token, output of block {block}", n, kappa, None, None, None)
            found.append(kappa)
        report.findings.append(
            f"the model's fitted maps have eigenvectors of condition {min(found):.3g} to {max(found):.3g}: "
            + ("they need no perturbation" if max(found) <= NEEDS_NONE else "perturb before diagonalising")
        )
        return report


def frequency_report(largest: int = 64, eps: float = 0.01) -> Report:
    """Condition of the eigenvectors, and the largest gap over frequencies to the exact LegS system, of S4D and PTD."""
    report = Report(
        f"LegS made diagonal: sup over frequencies of the gap over ||B||, C = B / ||B||, ||E|| = {eps:g}",
        ["system", "states", "condition of V", "condition of V, PTD", "S4D gap", "PTD gap"],
        x_label="frequency", y_label="gap over ||B||",
    )  # fmt: skip
    for size in [8 * 2**power for power in range(8) if power == 0 or 8 * 2**power <= largest]:
        A, B = hippo("legs", size)
        C = B / B.norm()
        values, half, V = s4d_init(size)
        omega = torch.cat((torch.logspace(-1, 4, 400, dtype=torch.float64), values.imag[values.imag > 0])).sort().values
        exact = transfer_function(A, B, C, 1j * omega)
        ptd = perturb_then_diagonalize(A, "ginibre", eps)
        turned = torch.linalg.solve(ptd.V, B.to(ptd.V)), C.to(ptd.V) @ ptd.V
        gaps = {
            "S4D": (transfer_function(values, half, C.to(V) @ V, 1j * omega) - exact).abs() / B.norm(),
            "PTD": (transfer_function(ptd.eigenvalues, *turned, 1j * omega) - exact).abs() / B.norm(),
        }
        own = float(torch.linalg.cond(torch.linalg.eig(A).eigenvectors))
        report.add("HiPPO LegS", size, own, ptd.kappa, float(gaps["S4D"].max()), float(gaps["PTD"].max()))
    report.curves = [Curve(name, omega.tolist(), gap.tolist()) for name, gap in gaps.items()]
    report.findings.append("S4D's gap does not shrink with the number of states; that of PTD is set by ||E||")
    return report
