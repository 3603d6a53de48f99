"""Linear recurrences whose transitions may have negative eigenvalues, and layers made of them (arXiv 2411.12537).

With the range scale c a gate s in [0, 1] becomes c s - (c - 1), a delta rule's write strength c times a sigmoid: c = 1
is the usual range [0, 1], c = 2 the range [-1, 1] that state tracking needs.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcompress.backends.checks import choose
from llmcompress.errors import InputError

Mode = Literal["chunk", "recurrent"]
TINY = 1e-30  # magnitudes below it are taken for it where logarithms are


def check_scale(scale: float) -> None:
    if not 1 <= scale <= 2:
        raise InputError(f"scale must be in [1, 2]: 1 keeps eigenvalues in [0, 1], 2 allows [-1, 1]; got {scale}")


def check_keys(k: Tensor, beta: Tensor) -> None:
    """InputError if a key (..., d) is longer than 1 where a write strength exceeds 1: the state could grow."""
    if float(beta.detach().max()) > 1 and float(k.detach().norm(dim=-1).max()) > 1 + 1e-3:
        raise InputError("keys must have unit norm where beta exceeds 1: the transition's norm would exceed 1")


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    state: Tensor | None = None,
    mode: Mode = "chunk",
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) (I - b_t k_t k_tᵀ) S_{t-1} + b_t k_t v_tᵀ, o_t = S_tᵀ q_t.

    q, k (B, H, T, d_k), v (B, H, T, d_v), beta and the log decay g (B, H, T), state (B, H, d_k, d_v); returns o
    (B, H, T, d_v) and the last state. InputError for shapes that do not fit, T = 0, or keys longer than 1 where beta
    exceeds 1. Cost: O(T d²) recurrent; chunks need T / chunk_size steps of matrix products instead of T.
    Source: WY form of the gated delta rule, valid for beta in [0, 2] as it stands.
    """
    choose("mode", mode, ("chunk", "recurrent"))
    shape = k.shape[:3]
    fits = k.ndim == 4 and q.shape == k.shape and v.ndim == 4 and v.shape[:3] == shape and beta.shape == shape
    if not fits or (g is not None and g.shape != shape):
        found = ", ".join(str(tuple(t.shape)) for t in (q, k, v, beta))
        raise InputError(f"q, k (B, H, T, d), v (B, H, T, e), beta and g (B, H, T) must fit one another; got {found}")
    if not shape[2]:
        raise InputError("T must be at least 1")
    check_keys(k, beta)
    S = k.new_zeros(*shape[:2], k.shape[3], v.shape[3]) if state is None else state
    g = torch.zeros_like(beta) if g is None else g
    outputs = []
    size = chunk_size if mode == "chunk" else 1
    for part in range(0, shape[2], size):
        rows = slice(part, part + size)
        if mode == "chunk":
            o, S = _chunk(q[:, :, rows], k[:, :, rows], v[:, :, rows], beta[:, :, rows], g[:, :, rows], S)
            outputs.append(o)
        else:
            decayed = g[:, :, part, None, None].exp() * S
            key = k[:, :, part]
            written = beta[:, :, part, None] * (v[:, :, part] - torch.einsum("bhkv,bhk->bhv", decayed, key))
            S = decayed + key[..., None] * written[..., None, :]
            outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, :, part])[:, :, None])
    return torch.cat(outputs, 2), S


def _chunk(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    total = g.cumsum(-1)
    decay = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    system = (beta[..., None] * (k @ k.mT) * decay).tril(-1)
    known = beta[..., None] * (v - total.exp()[..., None] * (k @ S))
    written = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    o = total.exp()[..., None] * (q @ S) + (q @ k.mT * decay) @ written
    last = (total[..., -1:] - total).exp()
    return o, total[..., -1, None, None].exp() * S + (last[..., None] * k).mT @ written


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    scale: float = 2.0,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = (c exp(dt A) - (c - 1)) h_{t-1} + dt B_t u_t, y_t = (C_t·h_t + D u_t) silu(z_t), c the range scale.

    u, dt, z (B, d, T), A (d, n) negative, B, C (B, n, T), D (d,), state (B, d, n); returns y (B, d, T) and the last
    state in float32 at least. InputError for a scale outside [1, 2], T = 0, shapes that do not fit, or a dt that is not
    finite. Cost: O(B d n T).
    """
    check_scale(scale)
    if u.ndim != 3 or dt.shape != u.shape or A.shape[0] != u.shape[1] or B.shape != C.shape:
        raise InputError(f"u, dt (B, d, T), A (d, n), B, C (B, n, T) must fit; got {tuple(u.shape)}, {tuple(A.shape)}")
    if not u.shape[2]:
        raise InputError("T must be at least 1")
    if not torch.isfinite(dt).all():
        raise InputError("dt is not finite")
    wide = torch.promote_types(u.dtype, torch.float32)
    a = scale * torch.exp(dt.to(wide)[..., None] * A.to(wide)[:, None]) - (scale - 1)  # (B, d, T, n)
    written = (dt * u).to(wide)[..., None] * B.to(wide).mT[:, None]
    h = a.new_zeros(a.shape[0], a.shape[1], a.shape[3]) if state is None else state.to(wide)
    states = []
    for t in range(u.shape[2]):
        h = a[:, :, t] * h + written[:, :, t]
        states.append(h)
    y = torch.einsum("bdtn,bnt->bdt", torch.stack(states, 2), C.to(wide))
    y = y if D is None else y + D.to(wide)[:, None] * u
    return (y if z is None else y * F.silu(z.to(wide))).to(u.dtype), h


def signed_segment_products(a: Tensor) -> Tensor:
    """P[i, j] = a_{j+1} ... a_i for j <= i, else 0: (..., T, T) of a (..., T), by logarithms of |a| and counted signs.

    What a chunked scan that multiplies decays in log space needs to take negative ones.
    """
    logs, negative = a.abs().clamp_min(TINY).log().cumsum(-1), (a < 0).to(torch.int64).cumsum(-1)
    signs = 1 - 2 * ((negative[..., :, None] - negative[..., None, :]) % 2)
    return ((logs[..., :, None] - logs[..., None, :]).tril().exp() * signs).tril()


# --- layers ----------------------------------------------------------------------------------------------------------


class DeltaNetLayer(nn.Module):
    """A delta-rule token mixer: x (B, T, d_model) -> y (B, T, d_model) and the state, with n_householder factors a
    token, one after the other (DeltaProduct); keys are normalised. InputError for a scale outside [1, 2].
    """

    def __init__(self, d_model: int, n_heads: int, scale: float = 2.0, n_householder: int = 1) -> None:
        super().__init__()
        check_scale(scale)
        if d_model % n_heads:
            raise InputError(f"n_heads must divide d_model = {d_model}; got {n_heads}")
        self.n_heads, self.scale, self.n_householder = n_heads, scale, n_householder
        self.q = nn.Linear(d_model, d_model, bias=False)
        self.k, self.v = (nn.Linear(d_model, n_householder * d_model, bias=False) for _ in range(2))
        self.beta = nn.Linear(d_model, n_householder * n_heads)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, state: Tensor | None = None, mode: Mode = "chunk") -> tuple[Tensor, Tensor]:
        batch, length, width = x.shape
        micro = length * self.n_householder

        def heads(t: Tensor) -> Tensor:
            return t.reshape(batch, micro, self.n_heads, -1).transpose(1, 2)

        k, v = F.normalize(heads(self.k(x)), dim=-1), heads(self.v(x))
        beta = self.scale * heads(self.beta(x)).sigmoid().squeeze(-1)
        q = self.q(x)[:, :, None].expand(-1, -1, self.n_householder, -1)
        o, state = delta_rule(heads(q), k, v, beta, state=state, mode=mode)
        last = o[:, :, self.n_householder - 1 :: self.n_householder]
        return self.out(last.transpose(1, 2).reshape(batch, length, width)), state


class SelectiveDiagonalLayer(nn.Module):
    """A diagonal recurrence h_t = (c s(x_t) - (c - 1)) h_{t-1} + W x_t with s a sigmoid: x (B, T, d_model) -> y of the
    same shape and the state (B, d_state). InputError for a scale outside [1, 2].
    """

    def __init__(self, d_model: int, d_state: int, scale: float = 2.0) -> None:
        super().__init__()
        check_scale(scale)
        self.scale = scale
        self.gate, self.write = nn.Linear(d_model, d_state), nn.Linear(d_model, d_state)
        self.out = nn.Linear(d_state, d_model)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a = self.scale * self.gate(x).sigmoid() - (self.scale - 1)
        written = self.write(x)
        h = torch.zeros_like(written[:, 0]) if state is None else state
        states = []
        for t in range(x.shape[1]):
            h = a[:, t] * h + written[:, t]
            states.append(h)
        return self.out(torch.stack(states, 1)), h
