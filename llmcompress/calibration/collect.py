"""Sums over the inputs of a block's sites, gathered by hooks while calibration sequences pass through it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.backends.ports import GramRecovery, Sampler, Stream
from llmcompress.errors import InputError, RunError
from llmcompress.types import Site, Statistics

FORWARD = frozenset({"gram", "abs_sum", "cross"})
BACKWARD = frozenset({"row_fisher", "column_fisher", "output_gram"})
CHUNK = 4096  # sampled rows summed in float32 at a time


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

    `needs` chooses among gram, abs_sum and cross. With a sampler the rows are held until `finish`, and the sums are
    those of the weighted rows that it keeps; `stream` makes one summary an input, `gram` one recovery of its Gram,
    which then is not summed. `rows`: how many rows will come.
    RunError names the site whose input is not finite.
    """

    def __init__(
        self,
        sites: Iterable[Site],
        needs: frozenset[str],
        device: torch.device,
        sampler: Sampler | None = None,
        stream: Callable[[], Stream] | None = None,
        rows: int = 0,
        seed: int = 0,
        gram: Callable[[], GramRecovery] | None = None,
    ) -> None:
        self.needs, self.device, self.sampler, self.seed = needs, device, sampler, seed
        self.sites = [site for site in sites if site.input == site.name]
        self.sums = {site.name: self._empty(site) for site in self.sites}
        self._dense: dict[str, Tensor] = {}
        self._held: dict[str, list[tuple[Tensor, Tensor | None]]] = {site.name: [] for site in self.sites}
        self._generators = {site.name: self._generator(site) for site in self.sites}
        self._streams = {site.name: stream() for site in self.sites} if stream else {}
        for site in self.sites if stream else ():
            self._streams[site.name].start(rows, site.d_in, self._generators[site.name])
        self._grams = {site.name: gram() for site in self.sites} if gram and "gram" in needs else {}
        for site in self.sites if self._grams else ():
            self._grams[site.name].start(rows, site.d_in, self._generators[site.name])

    def _generator(self, site: Site) -> torch.Generator:
        """One an input, so that a resumed run draws what an undisturbed one does."""
        digest = hashlib.sha256(f"calibration:{self.seed}:{site.name}".encode()).digest()
        return torch.Generator(device=self.device).manual_seed(int.from_bytes(digest[:7], "big"))

    def _empty(self, site: Site) -> Statistics:
        shapes = {"gram": (site.d_in, site.d_in), "cross": (site.d_in, site.d_in), "abs_sum": (site.d_in,)}
        zeros: dict[str, Any] = {
            name: torch.zeros(shapes[name], dtype=torch.float64, device=self.device) for name in self.needs & FORWARD
        }
        return Statistics(**zeros)

    def receive(self, site: Site, x: Tensor) -> None:
        """Adds the rows x of an input."""
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if not torch.isfinite(x.sum()):
            raise RunError(f"{site.name}: its input is not finite")
        dense = self._dense.pop(site.name) if "cross" in self.needs else None
        if site.name in self._streams:
            order = torch.randperm(len(x), generator=self._generators[site.name], device=x.device)
            self._streams[site.name].update(x[order])
        if self.sampler is not None:
            self._held[site.name].append((x, dense))
            return
        self.sums[site.name].tokens += len(x)
        self._add(site, x, x, dense)

    def _add(self, site: Site, x: Tensor, magnitudes: Tensor, dense: Tensor | None) -> None:
        """Rows x and, where they are weighted by their squares, what `abs_sum` counts instead."""
        sums = self.sums[site.name]
        if site.name in self._grams:
            self._grams[site.name].update(x)
        elif sums.gram is not None:
            accumulate_gram(sums.gram, x)
        if sums.abs_sum is not None:
            sums.abs_sum += magnitudes.abs().sum(0)
        if sums.cross is not None:
            accumulate_gram(sums.cross, x, dense)

    def finish(self) -> list[str]:
        """After the last row: samples the held ones, ends streams and recoveries. Findings, one line each."""
        notes = []
        for site in self.sites:
            if self.sampler is not None and self._held[site.name]:
                notes += [f"{site.name}: {note}" for note in self._sample(site, self.sampler)]
            if site.name in self._streams:
                notes += [f"{site.name}: {note}" for note in self._streams[site.name].finish()]
            if site.name in self._grams and self.sums[site.name].tokens:
                self.sums[site.name].gram, found = self._grams[site.name].gram()
                notes += [f"{site.name}: {note}" for note in found]
        return notes

    def _sample(self, site: Site, sampler: Sampler) -> list[str]:
        held = self._held.pop(site.name)
        x = torch.cat([rows for rows, _ in held])
        dense = torch.cat([rows for _, rows in held if rows is not None]) if "cross" in self.needs else None
        try:
            found = sampler.sample(x, self._generators[site.name])
        except InputError as error:
            raise InputError(f"{site.name}: {error}") from None
        self.sums[site.name].tokens += float(found.weights.sum())
        for indices, weights in zip(found.indices.split(CHUNK), found.weights.split(CHUNK), strict=True):
            weight = weights.to(x)[:, None]
            root = weight.sqrt()  # a Gram sums weight times x xᵀ
            other = root * dense[indices] if dense is not None else None
            self._add(site, root * x[indices], weight * x[indices], other)
        return found.notes

    def receive_dense(self, site: Site, x: Tensor) -> None:
        """Keeps the dense model's rows, that the next `receive` of the same tokens is crossed with."""
        self._dense[site.name] = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
