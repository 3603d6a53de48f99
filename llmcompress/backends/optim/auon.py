"""Momentum of unit Frobenius norm over the root mean square of its cosh: AuON and Hybrid-AuON (arXiv 2509.24320).

What the formula does, which its name does not tell: with X = M / ||M||_F of N entries, R = sqrt(mean cosh²(gamma X)) is
between cosh(gamma / sqrt N) and sqrt(1 + sinh²(gamma) / N): one, to six digits, for the matrices of a model. So `paper`
is normalised momentum, `repo` (the published code) is plain momentum, neither with a brake that acts; one Newton-Schulz
step (Hybrid) multiplies small singular values alike by 3.4, a larger learning rate and a slightly flatter spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.optim import Optimizer

from llmcompress.backends.checks import choose
from llmcompress.backends.optim.split import split_parameters, with_adamw
from llmcompress.errors import InputError

__all__ = ["AuON", "AuONFactory", "AuONOptions", "HybridAuON", "HybridAuONFactory", "HybridAuONOptions", "Muon",
           "MuonFactory", "MuonOptions", "auon_update", "cosh_rms", "cosh_rms_bounds", "newton_schulz",
           "split_parameters"]  # fmt: skip

VARIANTS = ("paper", "repo", "hybrid", "rms", "muon")
NORM_EPS = 1e-7
QUINTIC = (3.4445, -4.7750, 2.0315)
LARGE = 20.0  # from there on cosh² is summed by its logarithm


# --- the update ------------------------------------------------------------------------------------------------------


def cosh_rms(X: Tensor, gamma: float) -> Tensor:
    """R = sqrt(mean of cosh²(gamma X)), a scalar of X's dtype; never overflows. Source: arXiv 2509.24320."""
    return 1 + _brake(X, gamma)


def _brake(X: Tensor, gamma: float) -> Tensor:
    """R - 1, to full accuracy where that is small: cosh² = 1 + sinh²."""
    z = (gamma * X).abs()
    if z.max() <= LARGE:
        return torch.expm1(0.5 * torch.log1p(z.sinh().square().mean()))
    logs = 2 * (z + torch.log1p(torch.exp(-2 * z)) - math.log(2))
    return torch.exp(0.5 * (torch.logsumexp(logs.flatten(), 0) - math.log(X.numel()))) - 1


def cosh_rms_bounds(numel: int, gamma: float) -> tuple[float, float]:
    """Between which R lies for any X of unit Frobenius norm: all entries alike, and a single one."""
    return math.cosh(gamma / math.sqrt(numel)), math.sqrt(1 + math.sinh(gamma) ** 2 / numel)


def newton_schulz(M: Tensor, steps: int) -> Tensor:
    """M (a, b) over its Frobenius norm after `steps` of the quintic iteration towards its orthogonal factor.

    Each maps a singular value s to 3.4445 s - 4.775 s³ + 2.0315 s⁵, at most 1.2024 on [0, 1]. O(a b min(a, b)) a step.
    """
    a, b, c = QUINTIC
    Y = M / (M.norm() + NORM_EPS)
    tall = Y.shape[0] > Y.shape[1]
    Y = Y.T if tall else Y
    for _ in range(steps):
        A = Y @ Y.T
        Y = a * Y + torch.addmm(A, A, A, beta=b, alpha=c) @ Y
    return Y.T if tall else Y


def auon_update(
    M: Tensor, variant: str = "paper", gamma: float | None = None, ns_steps: int = 1, eps: float = 1e-8
) -> tuple[Tensor, Tensor]:
    """U (a, b) from the momentum M (a, b), and R - 1. M is float32 or float64, and not zero.

    paper: X / R; repo: M / R with gamma 1.5; hybrid: Newton-Schulz of X, over its R; rms (an extension): gamma =
    sqrt N, under which R grows with the heaviest entries; muon: Newton-Schulz of X alone. O(a b); hybrid and muon add
    O(a b min(a, b)) a step.
    """
    if variant == "muon":
        return newton_schulz(M.bfloat16() if M.is_cuda else M, ns_steps).to(M), M.new_zeros(())
    if variant == "hybrid":
        Y = newton_schulz(M, ns_steps)
        brake = _brake(Y, gamma or 1.0)
        return Y / (1 + brake + eps), brake
    X = M / (M.norm() + NORM_EPS)
    brake = _brake(X, gamma or {"paper": 1.0, "repo": 1.5, "rms": math.sqrt(M.numel())}[variant])
    return (M if variant == "repo" else X) / (1 + brake + eps), brake


# --- the optimisers --------------------------------------------------------------------------------------------------


class AuON(Optimizer):
    """w <- (1 - lr wd) w - lr sqrt(max(1, rows / columns)) U(M), M the (Nesterov) mean of the gradients.

    For matrices; more dimensions are flattened to (first, rest). Embeddings, head, norms and biases belong to AdamW
    (`split_parameters`). variant, gamma: see `auon_update`; shape_scale: the square root above. State: one buffer, and
    `brake`, R - 1 of the last step. Clip gradients first: the buffer keeps a spike's direction for a hundred steps.
    InputError for bad arguments, parameters that are no matrices, and sparse or non-finite gradients, by name.
    """

    def __init__(
        self, params: Any, lr: float = 0.05, momentum: float = 0.95, nesterov: bool = True, weight_decay: float = 0.0,
        variant: str = "paper", gamma: float | None = None, shape_scale: bool = True, eps: float = 1e-8,
        ns_steps: int = 1,
    ) -> None:  # fmt: skip
        choose("variant", variant, VARIANTS)
        for name, value, fine in (
            ("lr", lr, lr >= 0),
            ("momentum", momentum, 0 <= momentum < 1),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("gamma", gamma, gamma is None or gamma > 0),
            ("ns_steps", ns_steps, ns_steps >= 1),
        ):
            if not fine:
                raise InputError(f"{name} is out of range: {value}")
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "variant": variant,
            "gamma": gamma, "shape_scale": shape_scale, "eps": eps, "ns_steps": ns_steps,
        }  # fmt: skip
        super().__init__(params, defaults)
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                if p.ndim < 2:
                    what = f"{_name(group, index)} of shape {tuple(p.shape)}"
                    raise InputError(f"{what} is no matrix: give it to AdamW (split_parameters tells them apart)")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                if p.grad is not None:
                    if p.grad.is_sparse:
                        raise InputError(f"the gradient of {_name(group, index)} is sparse, which a norm is not for")
                    if not torch.isfinite(p.grad).all():
                        raise InputError(f"the gradient of {_name(group, index)} is not finite")
                    self._move(p, p.grad, group)
        return loss

    def _move(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, beta, lr = self.state[p], group["momentum"], group["lr"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        mean: Tensor = state["momentum_buffer"].lerp_(gradient, 1 - beta)
        M = gradient.lerp(mean, beta) if group["nesterov"] else mean
        M = (M if M.dtype == torch.float64 else M.float()).flatten(1)
        p.mul_(1 - lr * group["weight_decay"])
        if not M.any():
            return
        U, state["brake"] = auon_update(M, group["variant"], group["gamma"], group["ns_steps"], group["eps"])
        scale = math.sqrt(max(1.0, M.shape[0] / M.shape[1])) if group["shape_scale"] else 1.0
        p.add_(U.view(p.shape).to(p.dtype), alpha=-lr * scale)


class HybridAuON(AuON):
    """AuON after `ns_steps` Newton-Schulz steps (1 in the paper, 5 in the published code)."""

    def __init__(
        self, params: Any, lr: float = 0.05, momentum: float = 0.95, nesterov: bool = True, weight_decay: float = 0.0,
        gamma: float | None = None, shape_scale: bool = True, eps: float = 1e-8, ns_steps: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, momentum, nesterov, weight_decay, "hybrid", gamma, shape_scale, eps, ns_steps)


class Muon(AuON):
    """Muon: `ns_steps` Newton-Schulz steps of the mean of the gradients (arXiv 2502.16982).

    In bfloat16 on a GPU, as `torch.optim.Muon` everywhere; on a CPU in float32, whose products are 20 times as fast
    where the processor has none of bfloat16.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, momentum: float = 0.95, nesterov: bool = True, weight_decay: float = 0.0,
        shape_scale: bool = True, eps: float = 1e-8, ns_steps: int = 5,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, momentum, nesterov, weight_decay, "muon", None, shape_scale, eps, ns_steps)


def _name(group: dict[str, Any], index: int) -> str:
    return str(group["param_names"][index]) if "param_names" in group else f"parameter {index}"


# --- for recipes -----------------------------------------------------------------------------------------------------

Named = Sequence[tuple[str, nn.Parameter]]


class MatrixOptions(BaseModel, extra="forbid"):
    momentum: float = Field(default=0.95, ge=0, lt=1, description="decay of the mean of the gradients")
    nesterov: bool = Field(default=True, description="look one gradient ahead of that mean")
    weight_decay: float = Field(default=0.0, ge=0, description="share of a weight taken off, times the learning rate")
    other_lr: float = Field(
        default=1e-4, gt=0, description="peak learning rate of AdamW for embeddings, head, norms and biases"
    )


class AuONOptions(MatrixOptions):
    variant: Literal["paper", "repo", "rms"] = Field(
        default="paper", description="paper: unit norm; repo: plain momentum; rms: a brake on heavy entries"
    )


class HybridAuONOptions(MatrixOptions):
    ns_steps: int = Field(default=1, ge=1, description="Newton-Schulz steps")


class MuonOptions(MatrixOptions):
    ns_steps: int = Field(default=5, ge=1, description="Newton-Schulz steps")


class AuONFactory:
    """`finetune.optimizer: auon`."""

    Options: ClassVar[type[AuONOptions]] = AuONOptions

    def __init__(self, options: AuONOptions | None = None) -> None:
        self.options = options or AuONOptions()

    def build(self, parameters: Named, lr: float) -> Optimizer:
        given = self.options.model_dump(exclude={"other_lr"})
        return with_adamw(parameters, self.options.other_lr, lambda matrix: AuON(matrix, lr, **given))


class HybridAuONFactory:
    """`finetune.optimizer: hybrid_auon`."""

    Options: ClassVar[type[HybridAuONOptions]] = HybridAuONOptions

    def __init__(self, options: HybridAuONOptions | None = None) -> None:
        self.options = options or HybridAuONOptions()

    def build(self, parameters: Named, lr: float) -> Optimizer:
        given = self.options.model_dump(exclude={"other_lr"})
        return with_adamw(parameters, self.options.other_lr, lambda matrix: HybridAuON(matrix, lr, **given))


class MuonFactory:
    """`finetune.optimizer: muon`."""

    Options: ClassVar[type[MuonOptions]] = MuonOptions

    def __init__(self, options: MuonOptions | None = None) -> None:
        self.options = options or MuonOptions()

    def build(self, parameters: Named, lr: float) -> Optimizer:
        given = self.options.model_dump(exclude={"other_lr"})
        return with_adamw(parameters, self.options.other_lr, lambda matrix: Muon(matrix, lr, **given))
