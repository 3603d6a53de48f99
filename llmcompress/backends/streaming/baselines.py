"""Other one-pass methods: Oja's rule on a grid, Price and Xun's choice of its rate, Frequent Directions, thinning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.backends.checks import checked_matrix, generator_for
from llmcompress.backends.streaming.oja import Oja
from llmcompress.errors import InputError


def oja_grid(rows: Tensor, etas: Sequence[float], start: Tensor | None = None) -> Tensor:
    """The unit vectors (k, d) that Oja's rule without decay ends at for each rate, in ascending order of the rates."""
    return _oja(rows, etas, start).vectors


def price_xun(
    rows: Tensor, etas: Sequence[float], growth_threshold: float | None = None, start: Tensor | None = None
) -> tuple[Tensor, str]:
    """Oja at the smallest rate whose log growth exceeds 10 ln d: a unit vector (d,) and "ok" or "failed".

    Source: arXiv 2408.10332. Needs a gap of about log² d, in any order of the rows.
    """
    oja = _oja(rows, etas, start)
    threshold = 10 * torch.tensor(float(rows.shape[1])).log().item() if growth_threshold is None else growth_threshold
    vector, rate = oja.smallest_growing(threshold)
    return vector, "failed" if rate is None else "ok"


def _oja(rows: Tensor, etas: Sequence[float], start: Tensor | None) -> Oja:
    rows = checked_matrix(rows, "rows")
    if start is None:
        start = torch.randn(rows.shape[1], generator=generator_for(0, rows.device), dtype=rows.dtype,
                            device=rows.device)  # fmt: skip
    oja = Oja(torch.as_tensor(etas, dtype=rows.dtype, device=rows.device), start.to(rows))
    oja.update(rows)
    return oja


def frequent_directions(rows: Tensor, l: int) -> Tensor:
    """Sketch (l, d) with 0 <= AᵀA - BᵀB <= ||A||_F² / l: an SVD of a buffer of 2 l rows, shrunk by the l-th value.

    Source: Ghashami et al., 2016. O(n d l).
    """
    rows = checked_matrix(rows, "rows")
    if l < 1:
        raise InputError(f"l must be at least 1; got {l}")
    sketch = rows.new_zeros(0, rows.shape[1])
    for chunk in rows.split(l):
        _, s, vh = torch.linalg.svd(torch.cat((sketch, chunk)), full_matrices=False)
        if len(s) > l:
            s, vh = (s[:l].square() - s[l].square()).clamp_min(0).sqrt(), vh[:l]
        sketch = s[:, None] * vh
    return sketch


def row_norm_sample(rows: Tensor, s: float, generator: torch.Generator, total: float | None = None) -> Tensor:
    """Rows a_i / sqrt(q_i) kept with q_i = min(1, s ||a_i||² / F_i): B (kept, d) with E BᵀB = AᵀA.

    F_i is the running squared norm, or `total` where ||A||_F² is known. At most about s ln(e n / s) rows;
    the spectral error is about sqrt(d ln d / s) ||A||_2².
    """
    rows = checked_matrix(rows, "rows")
    if not s > 0:
        raise InputError(f"s must be positive; got {s}")
    norms = rows.square().sum(1)
    running = norms.cumsum(0) if total is None else torch.full_like(norms, total)
    q = torch.where(norms > 0, s * norms / running.clamp_min(torch.finfo(rows.dtype).tiny), 0).clamp_max(1)
    kept = torch.rand(q.shape, generator=generator, dtype=q.dtype, device=q.device) < q
    return rows[kept] / q[kept].sqrt()[:, None]
