"""Sums over the inputs of a block's sites, gathered by hooks while calibration sequences pass through it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.errors import RunError
from llmcompress.types import Site, Statistics

FORWARD = frozenset({"gram", "abs_sum", "cross"})
BACKWARD = frozenset({"row_fisher", "column_fisher", "output_gram"})


def accumulate_gram(total: Tensor, left: Tensor, right: Tensor | None = None, parts: int = 4) -> None:
    """total += leftᵀ right for rows left, right (n, d); total (d, d) float64; without `right` the Gram of left.

    Products are float32 per call (float64 for float64 rows) and added in float64. A Gram is symmetric, so of `parts` x
    `parts` tiles only those on and above the diagonal are computed: 5/8 of the work at 4 parts.
    """
    if right is not None:
        total += left.T @ right
        return
    d = left.shape[1]
    if d < 256:
        total += left.T @ left
        return
    edges = [d * i // parts for i in range(parts + 1)]
    for a, b in itertools.pairwise(edges):
        tile = (left[:, a:b].T @ left[:, a:]).to(total.dtype)
        total[a:b, a:] += tile
        total[b:, a:b] += tile[:, b - a :].T


@contextmanager
def capture_inputs(model: nn.Module, sites: Iterable[Site], receive: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """Calls `receive(site, x)` with the rows x (n, d_in) that each distinct input's first reader sees."""

    def hook(site: Site) -> Callable[..., None]:
        return lambda module, args: receive(site, args[0].detach().reshape(-1, site.d_in))

    with ExitStack() as stack:
        for site in sites:
            if site.input == site.name:
                handle = model.get_submodule(site.name).register_forward_pre_hook(hook(site))
                stack.callback(handle.remove)
        yield


class InputStatistics:
    """Accumulates the forward statistics of a block's inputs: one `Statistics` a distinct input.

    `needs` chooses among gram, abs_sum and cross. RunError names the site whose input is not finite.
    """

    def __init__(self, sites: Iterable[Site], needs: frozenset[str], device: torch.device) -> None:
        self.needs, self.device = needs, device
        self.sites = [site for site in sites if site.input == site.name]
        self.sums = {site.name: self._empty(site) for site in self.sites}
        self._dense: dict[str, Tensor] = {}

    def _empty(self, site: Site) -> Statistics:
        shapes = {"gram": (site.d_in, site.d_in), "cross": (site.d_in, site.d_in), "abs_sum": (site.d_in,)}
        zeros: dict[str, Any] = {
            name: torch.zeros(shapes[name], dtype=torch.float64, device=self.device) for name in self.needs & FORWARD
        }
        return Statistics(**zeros)

    def receive(self, site: Site, x: Tensor) -> None:
        """Adds the rows x of an input."""
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        sums = self.sums[site.name]
        if not torch.isfinite(x.sum()):
            raise RunError(f"{site.name}: its input is not finite")
        sums.tokens += x.shape[0]
        if sums.gram is not None:
            accumulate_gram(sums.gram, x)
        if sums.abs_sum is not None:
            sums.abs_sum += x.abs().sum(0)
        if sums.cross is not None:
            accumulate_gram(sums.cross, x, self._dense.pop(site.name))

    def receive_dense(self, site: Site, x: Tensor) -> None:
        """Keeps the dense model's rows, that the next `receive` of the same tokens is crossed with."""
        self._dense[site.name] = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
