"""Learned search directions: a convolutional network for Poisson grids, a spectral map for dense Grams; their training.

Both are unsupervised: they see combinations of Ritz vectors, never the right-hand sides that are solved for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcompress.backends.checks import checked_matrix, generator_for
from llmcompress.backends.regression.dcdm import dcdm
from llmcompress.backends.regression.krylov import Operator, Ritz, lanczos_ritz, operator, ritz_samples
from llmcompress.errors import InputError

GRAM_STEPS = 300
GRAM_BATCH = 16
VALIDATION = 3  # right-hand sides that choose between the variants


# --- losses ----------------------------------------------------------------------------------------------------------


def residual_loss(q: Tensor, b: Tensor, image: Tensor) -> Tensor:
    """Mean over columns of ||b - alpha A q||² at the best alpha = q·b / q·Aq; q, b, image = A q (n, k), b unit.

    Does not depend on the scale of q, and is zero iff q is parallel to A⁻¹ b.
    """
    alpha = (q * b).sum(0) / (q * image).sum(0)
    return (b - alpha * image).square().sum(0).mean()


def energy_loss(q: Tensor, b: Tensor, image: Tensor, energy: Tensor) -> Tensor:
    """Mean of 1 - (q·b)² / ((q·Aq) b·A⁻¹b): the share of the error's A-norm² that a line search leaves; energy (k,)."""
    return (1 - (q * b).sum(0).square() / ((q * image).sum(0) * energy)).mean()


# --- Poisson ---------------------------------------------------------------------------------------------------------


class PoissonDirectionNet(nn.Module):
    """Residuals on a grid of side N in `dim` dimensions, columns (N^dim, k) -> directions (N^dim, k).

    Convolutions of width 3, residual pairs, one level of average pooling, nearest upsampling. Without biases the map is
    positively homogeneous, and the input is scaled to unit mean square: with biases, and inputs of unit norm, it would
    not train. Source: arXiv 2205.10763; two-dimensional, with fewer filters, this project's.
    """

    def __init__(self, dim: int, filters: int = 16, n_pool_pairs: int = 3, bias: bool = False) -> None:
        super().__init__()
        if dim not in (2, 3):
            raise InputError(f"dim must be 2 or 3; got {dim}")
        self.dim = dim
        conv = nn.Conv2d if dim == 2 else nn.Conv3d

        def layers(count: int) -> nn.ModuleList:
            return nn.ModuleList(conv(filters, filters, 3, padding=1, bias=bias) for _ in range(count))

        self.first = conv(1, filters, 3, padding=1, bias=bias)
        self.fine, self.coarse, self.last = layers(4), layers(1 + 2 * n_pool_pairs), layers(4)
        self.out = conv(filters, 1, 1, bias=bias)

    def forward(self, r: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask (N, ..): 1 where there is fluid, 0 in solids, where the input counts as 0 and so does the output."""
        n, k = r.shape
        side = round(n ** (1 / self.dim))
        if side**self.dim != n or side % 2:
            raise InputError(f"the grid must have a side divisible by the pooling factor 2; got {n} cells")
        grid = (side,) * self.dim
        if mask is not None and tuple(mask.shape) != grid:
            raise InputError(f"the mask must be {grid}; got {tuple(mask.shape)}")
        x = r.T.reshape(k, 1, *grid).float()
        x = x if mask is None else x * mask.float()
        x = x / x.flatten(1).square().mean(1).sqrt().clamp_min(1e-30).view(-1, *[1] * (self.dim + 1))
        a = F.relu(self.fine[0](self.first(x)))
        b = F.relu(self.fine[1](a))
        a, b = _pair(a, b, self.fine[2:])
        pool = F.avg_pool2d if self.dim == 2 else F.avg_pool3d
        c = F.relu(self.coarse[0](pool(b, 2)))
        d = c
        for i in range(1, len(self.coarse), 2):
            c, d = _pair(c, d, self.coarse[i : i + 2])
        a = F.interpolate(d, scale_factor=2, mode="nearest") + b
        b = a
        for i in (0, 2):
            a, b = _pair(a, b, self.last[i : i + 2])
        y = self.out(b)
        y = y if mask is None else y * mask.float()
        return y.reshape(k, n).T.to(r.dtype)

    def on(self, mask: Tensor) -> Callable[[Tensor], Tensor]:
        """The map on a domain with solids."""
        return lambda r: self(r, mask)


def _pair(a: Tensor, b: Tensor, layers: nn.ModuleList) -> tuple[Tensor, Tensor]:
    a = F.relu(layers[0](b)) + a
    return a, F.relu(layers[1](a))


def train_direction(
    net: nn.Module, A: Operator, R: Ritz, *, steps: int = 250, batch: int = 16, lr: float = 3e-3,
    theta_off: int | None = None, generator: torch.Generator,
) -> list[float]:  # fmt: skip
    """Trains the net in place on `ritz_samples` by the residual loss, Adam, cosine; the loss of every step."""
    product = operator(A)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    off = len(R.theta) // 20 if theta_off is None else theta_off
    for _ in range(steps):
        b = ritz_samples(R, batch, off, generator=generator).float()
        q = net(b)
        loss = residual_loss(q, b, product(q))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


# --- dense Grams -----------------------------------------------------------------------------------------------------


class GramDirection(nn.Module):
    """q = S [V e^g Vᵀ + P e^d P] S r, P = I - V Vᵀ: linear, symmetric, positive definite by construction.

    V (n, m) orthonormal, theta (m,) their Ritz values for S G S, scale (n,) the diagonal of S; learned are g (m,) and,
    with `diag`, d (n,). Starts at the inverse on V, relative to the smallest theta.
    """

    V: Tensor
    scale: Tensor

    def __init__(self, V: Tensor, theta: Tensor, scale: Tensor, diag: bool = True) -> None:
        super().__init__()
        self.register_buffer("V", V)
        self.register_buffer("scale", scale)
        self.g = nn.Parameter((theta.min() / theta).log())
        self.d = nn.Parameter(torch.zeros_like(scale), requires_grad=diag)

    def forward(self, r: Tensor) -> Tensor:
        s = self.scale[:, None] * r.to(self.V)
        inside = self.V.T @ s
        rest = self.d.exp()[:, None] * (s - self.V @ inside)
        rest = rest - self.V @ (self.V.T @ rest)
        return (self.scale[:, None] * (self.V @ (self.g.exp()[:, None] * inside) + rest)).to(r.dtype)


def fit_gram_direction(
    G: Tensor, rank: int = 64, *, loss: str = "energy", generator: torch.Generator | None = None
) -> GramDirection:
    """The learned direction for G (n, n) that needs the fewest iterations on three validation right-hand sides.

    Tried: S = I or diag(G)^-1/2, each with and without the learned diagonal. loss: energy, or residual, which weighs a
    direction by its eigenvalue squared and fails on Grams. O(3 rank n²) for Lanczos, O(n² batch) a training step.
    """
    G = checked_matrix(G, "G")
    operator(G)
    n = len(G)
    if not 1 <= rank <= n:
        raise InputError(f"rank must be between 1 and n = {n}; got {rank}")
    if (G.diagonal() <= 0).any():
        raise InputError("G is not positive definite: a diagonal entry is not positive")
    generator = generator or generator_for(0, G.device)
    right = torch.randn(n, VALIDATION, generator=generator, dtype=G.dtype, device=G.device)
    best, fewest = None, 0
    for scale in (torch.ones_like(G.diagonal()), G.diagonal().rsqrt()):
        start = torch.randn(n, generator=generator, dtype=G.dtype, device=G.device)
        scaled = scale[:, None] * G * scale
        R = lanczos_ritz(scaled, start, min(n, 3 * rank))
        top = slice(max(0, len(R.theta) - rank), None)
        for diag in (True, False):
            net = GramDirection(R.vectors[:, top], R.theta[top], scale, diag)
            _train_gram(net, G, R, scale, loss, generator)
            count = int(dcdm(G, right, net, tol=1e-4, max_iter=20 * n).n_iter.sum())
            if best is None or count < fewest:
                best, fewest = net, count
    assert best is not None
    return best


def _train_gram(net: GramDirection, G: Tensor, R: Ritz, scale: Tensor, loss: str, generator: torch.Generator) -> None:
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.02)
    root = R.theta.clamp_min(0).sqrt()
    for _ in range(GRAM_STEPS):
        z = torch.randn(len(root), GRAM_BATCH, generator=generator, dtype=G.dtype, device=G.device)
        b = R.vectors @ (root[:, None] * z) / scale[:, None]
        q = net(b)
        if loss == "energy":
            value = energy_loss(q, b, G @ q, z.square().sum(0))
        else:
            value = residual_loss(q, b / b.norm(dim=0), G @ q)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    net.requires_grad_(False)
