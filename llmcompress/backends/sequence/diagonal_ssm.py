"""State-space layers with a diagonal state matrix (S4-PTD, S5-PTD, S4D), and an adapter made of one."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from llmcompress.backends.checks import choose, generator_for
from llmcompress.backends.sequence.ssm import Method, hippo, perturb_then_diagonalize, s4d_init
from llmcompress.errors import InputError

Init = Literal["s5-ptd", "s4-ptd", "s4d"]
LR_SHARE = 0.1  # of the learning rate, for what makes up the dynamics; without weight decay


class DiagonalSSM(nn.Module):
    """x' = diag(lambda) x + B u, y = Re(C x) + D u, discretised with a hold: u (batch, L, d_model) -> y of its shape.

    init "s5-ptd": one system for all channels; "s4-ptd", "s4d": one a channel, each with the same lambda and B to begin
    with. Steps are drawn log-uniformly from [dt_min, dt_max]. method, eps: of the perturbation. Trained are
    log(-Re lambda), Im lambda, B, C, D and the logarithms of the steps; complex tensors are stored with a last
    dimension of 2. initialise: leaves the tensors unset if false. The state is (batch, d_state) or
    (batch, d_model, d_state), complex. InputError for bad sizes, steps or inputs.
    Cost: O(L log L) a state for "fft", O(L) for "scan"; a start of O(d_state³).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        init: Init = "s5-ptd",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        *,
        method: Method = "optimised",
        eps: float = 0.1,
        generator: torch.Generator | None = None,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        choose("init", init, ("s5-ptd", "s4-ptd", "s4d"))
        if d_model < 1 or d_state < 1:
            raise InputError(f"d_model and d_state must be at least 1; got {d_model}, {d_state}")
        if not 0 < dt_min <= dt_max:
            raise InputError(f"dt_min must be positive and at most dt_max; got {dt_min}, {dt_max}")
        self.d_model, self.d_state, self.init = d_model, d_state, init
        self.many = init != "s5-ptd"
        lead = (d_model,) if self.many else ()
        self.log_decay, self.frequency = (nn.Parameter(torch.empty(*lead, d_state)) for _ in range(2))
        self.B = nn.Parameter(torch.empty(d_model, d_state, 2) if self.many else torch.empty(d_state, d_model, 2))
        self.C = nn.Parameter(torch.empty(d_model, d_state, 2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.log_step = nn.Parameter(torch.empty(d_model if self.many else d_state))
        for parameter in (self.log_decay, self.frequency, self.B, self.log_step):
            parameter.lr_share = LR_SHARE  # type: ignore[attr-defined]
        if initialise:
            self._initialise(method, eps, dt_min, dt_max, generator or generator_for(0))

    @torch.no_grad()
    def _initialise(self, method: Method, eps: float, dt_min: float, dt_max: float, generator: torch.Generator) -> None:
        n, H = self.d_state, self.d_model
        if self.init == "s4d":
            values, B, V = s4d_init(n)
        else:
            A, b = hippo("legs", n)
            found = perturb_then_diagonalize(A, method, eps, generator=generator)
            values, V = found.eigenvalues, found.V
            if self.init == "s5-ptd":
                B = b[:, None] * torch.randn(n, H, dtype=torch.float64, generator=generator) / math.sqrt(H)
            else:
                B = b
            B = torch.linalg.solve(V, B.to(V))
        C = torch.randn(H, n, dtype=torch.float64, generator=generator).to(V) @ V / math.sqrt(n)
        self.log_decay.copy_((-values.real).log().expand_as(self.log_decay))
        self.frequency.copy_(values.imag.expand_as(self.frequency))
        self.B.copy_(torch.view_as_real(B).expand_as(self.B))
        self.C.copy_(torch.view_as_real(C))
        self.D.copy_(torch.randn(H, generator=generator))
        spread = math.log(dt_max) - math.log(dt_min)
        self.log_step.copy_(math.log(dt_min) + spread * torch.rand(len(self.log_step), generator=generator))

    def _system(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """lambda, B, C complex, and the steps by state, all in float32 at least."""
        wide = torch.promote_types(self.D.dtype, torch.float32)
        values = torch.complex(-self.log_decay.to(wide).exp(), self.frequency.to(wide))
        step = self.log_step.to(wide).exp()
        B, C = (torch.view_as_complex(t.to(wide).contiguous()) for t in (self.B, self.C))
        return values, B, C, step[:, None] if self.many else step

    def _discrete(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """lambda dt, exp of it, the input's gain, and C."""
        values, B, C, step = self._system()
        exponent = values * step
        gain = _expm1(exponent) / values
        return exponent, exponent.exp(), gain * B if self.many else gain[:, None] * B, C

    def forward(
        self, u: Tensor, state: Tensor | None = None, mode: Literal["fft", "scan"] = "fft"
    ) -> tuple[Tensor, Tensor]:
        """y (batch, L, d_model) in u's dtype, and the state behind the last input."""
        choose("mode", mode, ("fft", "scan"))
        if u.ndim != 3 or u.shape[2] != self.d_model or not u.shape[1]:
            raise InputError(f"u must be (batch, L, {self.d_model}) with L at least 1; got {tuple(u.shape)}")
        exponent, a, B, C = self._discrete()
        wide = u.to(self._wide)
        if self.many and mode == "fft":
            y, last = self._by_kernel(exponent, B, C, wide, state)
            return (y + wide * self.D.to(wide)).to(u.dtype), last
        driven = wide[..., None] * B if self.many else wide.to(B.dtype) @ B.mT  # (batch, L, [d_model,] d_state)
        x = self._convolved(exponent, driven, state) if mode == "fft" else self._scanned(a, driven, state)
        y = self._read(C, x) + wide * self.D.to(wide)
        return y.to(u.dtype), x[:, -1]

    def step(self, u_t: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """One input (batch, d_model): y (batch, d_model) and the next state."""
        y, state = self(u_t[:, None], state, "scan")
        return y[:, 0], state

    def frequency_response(self, omega: Tensor) -> Tensor:
        """Of the continuous system at i omega (m,): (m, d_model, d_model), or (m, d_model) with a system a channel."""
        values, B, C, _ = self._system()
        resolvent = 1 / (1j * omega.to(values.real)[:, None, None] - values)  # (m, 1 or d_model, d_state)
        D = self.D.to(values.real)
        if self.many:
            return (C * B * resolvent).sum(-1) + D
        return (C * resolvent) @ B + torch.diag(D).to(B)

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.D.dtype, torch.float32)

    def _read(self, C: Tensor, x: Tensor) -> Tensor:
        return (x * C).sum(-1).real if self.many else (x @ C.mT).real

    @staticmethod
    def _scanned(a: Tensor, driven: Tensor, state: Tensor | None) -> Tensor:
        x = torch.zeros_like(driven[:, 0]) if state is None else state.to(driven)
        states = []
        for t in range(driven.shape[1]):
            x = a * x + driven[:, t]
            states.append(x)
        return torch.stack(states, 1)

    @staticmethod
    def _convolved(exponent: Tensor, driven: Tensor, state: Tensor | None) -> Tensor:
        length = driven.shape[1]
        times = torch.arange(length, device=driven.device).view(-1, *[1] * exponent.ndim)
        powers = (exponent * times).exp()
        spectrum = torch.fft.fft(powers, 2 * length, dim=0) * torch.fft.fft(driven, 2 * length, dim=1)
        x = torch.fft.ifft(spectrum, dim=1)[:, :length]
        return x if state is None else x + (exponent * (times + 1)).exp() * state.to(driven)[:, None]

    @staticmethod
    def _by_kernel(exponent: Tensor, B: Tensor, C: Tensor, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """By a kernel a channel: the states of all steps would take d_state times the memory of the input."""
        length = u.shape[1]
        powers = (exponent * torch.arange(length, device=u.device)[:, None, None]).exp()  # (L, d_model, d_state)
        kernel = (powers * (C * B)).sum(-1).real
        spectrum = torch.fft.rfft(kernel, 2 * length, dim=0) * torch.fft.rfft(u, 2 * length, dim=1)
        y = torch.fft.irfft(spectrum, 2 * length, dim=1)[:, :length]
        last = B * torch.einsum("blh,lhn->bhn", u.to(powers), powers.flip(0))
        if state is not None:
            carried = powers * exponent.exp()
            y = y + torch.einsum("lhn,bhn->blh", carried * C, state.to(powers)).real
            last = last + carried[-1] * state.to(powers)
        return y, last


class SSMAdapter(nn.Module):
    """W_out SSM(RMSNorm(h)), added to a block's output h: zero to begin with, since W_out is."""

    def __init__(self, d_model: int, ssm: DiagonalSSM) -> None:
        super().__init__()
        self.norm, self.ssm = nn.RMSNorm(d_model), ssm
        self.out = nn.Linear(d_model, d_model, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, h: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, state = self.ssm(self.norm(h), state)
        return self.out(y), state


def _expm1(z: Tensor) -> Tensor:
    """exp(z) - 1 of complex z, accurate near 0."""
    x, y = z.real, z.imag
    return torch.complex(torch.expm1(x) * y.cos() - 2 * (y / 2).sin().square(), x.exp() * y.sin())
