"""What bad workers send: each takes gradients (p, n), replaces the first f, and returns a new tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Attack = Callable[[Tensor, int, torch.Generator], Tensor]


def _replaced(G: Tensor, f: int, rows: Tensor) -> Tensor:
    return torch.cat((rows.to(G).expand(f, -1), G[f:]))


def _draw(kind: Callable[..., Tensor], G: Tensor, f: int, generator: torch.Generator) -> Tensor:
    return kind(f, G.shape[1], generator=generator, device=G.device)


def uniform(G: Tensor, f: int, generator: torch.Generator) -> Tensor:
    """Entries uniform in [0, 1)."""
    return _replaced(G, f, _draw(torch.rand, G, f, generator))


def gaussian(G: Tensor, f: int, generator: torch.Generator) -> Tensor:
    """Gaussian entries of deviation 100."""
    return _replaced(G, f, 100 * _draw(torch.randn, G, f, generator))


def reverse(G: Tensor, f: int, generator: torch.Generator) -> Tensor:
    """Their own gradients times -10."""
    return _replaced(G, f, -10 * G[:f])


def drop(G: Tensor, f: int, generator: torch.Generator) -> Tensor:
    """A tenth of their coordinates is lost."""
    return _replaced(G, f, G[:f] * (_draw(torch.rand, G, f, generator) >= 0.1))


def little(G: Tensor, f: int, generator: torch.Generator, z: float = 1.0) -> Tensor:
    """A little is enough: the honest mean less z deviations (Baruch et al., 2019)."""
    return _replaced(G, f, G[f:].mean(0) - z * G[f:].std(0))


def inner_product(G: Tensor, f: int, generator: torch.Generator) -> Tensor:
    """The honest mean times -0.1 (Xie et al., 2019)."""
    return _replaced(G, f, -0.1 * G[f:].mean(0))


def zero(G: Tensor, f: int, generator: torch.Generator) -> Tensor:
    return _replaced(G, f, torch.zeros(1, G.shape[1]))


def nan(G: Tensor, f: int, generator: torch.Generator) -> Tensor:
    return _replaced(G, f, torch.full((1, G.shape[1]), torch.nan))


ATTACKS: dict[str, Attack] = {
    "uniform": uniform,
    "gaussian": gaussian,
    "reverse": reverse,
    "drop": drop,
    "little": little,
    "inner product": inner_product,
    "zero": zero,
    "nan": nan,
}
