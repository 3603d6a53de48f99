"""M-FAC (arXiv 2107.03356): steps by the inverse Fisher matrix of the last gradients, and pruning by it.

The products are in `fisher_inverse`, the pruning in `obs`. Damping must follow the gradients' scale: where their
squares average 1e-7, as a language model's do, 1e-5 leaves nothing of the matrix.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Optimizer
from transformers import PreTrainedModel

from llmcompress.backends.curvature.fisher_inverse import DynamicFisherInverse, StaticFisherInverse
from llmcompress.backends.curvature.obs import PruneReport, collect_gradients, obs_prune
from llmcompress.backends.ports import Subject
from llmcompress.backends.report import Report
from llmcompress.calibration.fisher import token_losses
from llmcompress.errors import InputError

__all__ = ["MFAC", "DynamicFisherInverse", "FisherOptions", "MFACFactory", "MFACOptions", "PruneReport",
           "SequenceFisher", "StaticFisherInverse", "collect_gradients", "obs_prune"]  # fmt: skip

# --- the optimiser ---------------------------------------------------------------------------------------------------


class MFAC(Optimizer):
    """w <- w - lr F⁻¹ g, F of the last `window` gradients g = grad + weight_decay w, all parameters as one vector.

    momentum: of an exponential mean of F⁻¹ g; damp: lam; sparse: weights that are zero at the start stay so. The first
    steps are about window g / ||g||²: begin with a small lr. State: window + 1 values a weight, and window² more.
    O(d window + window³) a step. InputError for bad arguments, too little memory for the window, parameters without
    gradients or with ones that are not finite, and a saved state of other parameters. Source: arXiv 2107.03356.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0, window: int = 1024,
        damp: float = 1e-5, sparse: bool = False,
    ) -> None:  # fmt: skip
        for name, value, fine in (
            ("lr", lr, lr >= 0),
            ("momentum", momentum, 0 <= momentum < 1),
            ("weight_decay", weight_decay, weight_decay >= 0),
        ):
            if not fine:
                raise InputError(f"{name} is out of range: {value}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._all = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if not self._all:
            raise InputError("no parameter requires a gradient: all are frozen")
        first, dim = self._all[0], sum(p.numel() for p in self._all)
        _check_memory(window * dim * first.element_size(), window, dim, first.device)
        self.fisher = DynamicFisherInverse(window, dim, damp, first.dtype, first.device)
        self._alive = [p.detach() != 0 for p in self._all] if sparse else None
        self._keep_state()

    def _keep_state(self) -> None:
        """The window is part of the optimiser's state, under its first parameter."""
        found = self.fisher.state_dict()
        self.state[self._all[0]].update(found | {"count": torch.tensor(found["count"])})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        slot = self.fisher.update(torch.cat([g.flatten() for g in self._gradients()]))
        self._keep_state()
        parts = iter(self.fisher.mul_slot(slot).split([p.numel() for p in self._all]))
        for index, (group, p) in enumerate(self._trained()):
            u = next(parts).view_as(p)
            if group["momentum"]:
                mean = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                u = mean.lerp_(u, 1 - group["momentum"])
            p.sub_(u if self._alive is None else u * self._alive[index], alpha=group["lr"])
        return loss

    def _trained(self) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    yield group, p

    def _gradients(self) -> Iterator[Tensor]:
        for index, (group, p) in enumerate(self._trained()):
            if p.grad is None:
                names = group.get("param_names")
                name = names[group["params"].index(p)] if names and len(self.param_groups) == 1 else index
                raise InputError(f"parameter {name} has no gradient: the window needs one of every parameter")
            g = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
            yield g if self._alive is None else g * self._alive[index]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch would round the products to the parameters' dtype: they are taken as they were saved."""
        saved = state_dict["state"][0]
        self.fisher.load_state_dict(saved)
        super().load_state_dict(state_dict)
        self._keep_state()


def _check_memory(size: int, window: int, dim: int, device: torch.device) -> None:
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if window >= 1 and size > free:
        raise InputError(
            f"window: {window} gradients of {dim:,} values take {size / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
        )


class MFACOptions(BaseModel, extra="forbid"):
    window: int = Field(default=32, ge=1, description="gradients kept: as many copies of what trains")
    damp: float = Field(default=1e-5, gt=0, description="added to the Fisher matrix's diagonal")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="decay of the mean of the steps")
    weight_decay: float = Field(default=0.0, ge=0, description="share of a weight added to its gradient")


class MFACFactory:
    """`finetune.optimizer: mfac`."""

    Options: ClassVar[type[MFACOptions]] = MFACOptions

    def __init__(self, options: MFACOptions | None = None) -> None:
        self.options = options or MFACOptions()

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], lr: float) -> Optimizer:
        return MFAC(list(parameters), lr, **self.options.model_dump())


# --- the curvature port ----------------------------------------------------------------------------------------------


class FisherOptions(BaseModel, extra="forbid"):
    damp: float | Literal["relative"] = Field(
        default="relative", description="added to the Fisher matrix's diagonal; relative: the mean squared gradient"
    )
    block_size: int | None = Field(default=64, ge=1, description="weights of a diagonal block; null: all in one")
    sparsity: float = Field(default=0.5, gt=0, lt=1, description="share of the weights that the analysis prunes")


class SequenceFisher:
    """The curvature port, and an analysis: feed-forward weights pruned by it, next to magnitudes and the diagonal."""

    Options: ClassVar[type[FisherOptions]] = FisherOptions
    trains: ClassVar[bool] = True  # gradients need the whole model

    def __init__(self, options: FisherOptions) -> None:
        self.options = options

    def fit(self, gradients: Tensor) -> None:
        damp = self.options.damp
        lam = float(gradients.square().mean()) if damp == "relative" else damp
        self._inverse = StaticFisherInverse(gradients, lam, self.options.block_size)

    def inverse_product(self, vector: Tensor) -> Tensor:
        return self._inverse.mul(vector)

    def analyze(self, subject: Subject) -> Report:
        """Perplexity of the text's second half with the sites pruned, one gradient a sequence of its first half."""
        model, tokens = subject.trainable()
        if len(tokens) < 4:
            raise InputError(f"needs at least 4 sequences, half of them for gradients; got {len(tokens)}")
        train, test = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
        sites = [site for site in subject.sites if site.role == "down"] or subject.sites
        weights = [model.get_parameter(f"{site.name}.weight") for site in sites]
        report = Report(
            f"{self.options.sparsity:.0%} of {', '.join(site.name for site in sites)} pruned, {len(train)} gradients",
            ["pruned by", "perplexity"],
        )
        with _only(model, weights):
            dense = parameters_to_vector(weights).detach().clone()
            report.add("nothing", _perplexity(model, test))
            batches = [{"input_ids": row[None], "labels": row[None]} for row in train]
            gradients = collect_gradients(model, weights, batches)
            for name, pruned in self._pruned(dense, gradients).items():
                vector_to_parameters(pruned, weights)
                report.add(name, _perplexity(model, test))
            vector_to_parameters(dense, weights)
        found = dict(zip(report.column("pruned by"), report.column("perplexity"), strict=True))
        report.findings.append(
            f"the diagonal alone {found['diagonal Fisher']:.2f}, blocks {found['M-FAC']:.2f}: "
            + ("blocks help" if found["M-FAC"] < found["diagonal Fisher"] else "blocks do not help here")
        )
        return report

    def _pruned(self, dense: Tensor, gradients: Tensor) -> dict[str, Tensor]:
        options = self.options
        kept = round((1 - options.sparsity) * len(dense))

        def by(scores: Tensor) -> Tensor:
            return torch.zeros_like(dense).index_copy(0, (top := scores.topk(kept).indices), dense[top])

        size = options.block_size or len(dense)
        common: dict[str, Any] = {"recomputations": 1, "block_size": size}
        both = {
            name: obs_prune(dense, lambda _: gradients, options.sparsity, options.damp, update=update, **common)[0]
            for name, update in (("M-FAC", True), ("M-FAC, weights left as they are", False))
        }
        fisher = gradients.square().mean(0)
        return {"magnitude": by(dense.abs()), "diagonal Fisher": by(dense.square() * (fisher + fisher.mean()))} | both


@contextmanager
def _only(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """Leaves those alone to require gradients."""
    before = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for p, required in zip(model.parameters(), before, strict=True):
            p.requires_grad_(required)


@torch.no_grad()
def _perplexity(model: PreTrainedModel, tokens: Tensor) -> float:
    total = sum(
        float(token_losses(model(input_ids=row[None], use_cache=False).logits, row[None]).sum()) for row in tokens
    )
    return float(torch.tensor(total / (len(tokens) * (tokens.shape[1] - 1)), dtype=torch.float64).exp())
