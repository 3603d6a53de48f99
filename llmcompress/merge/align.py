"""Aligning the models of a merge, sweep by sweep, with what is found kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmcompress.backends.merging.alignment import Alignment, Read, aligned, mean
from llmcompress.backends.merging.decoder_matching import match_decoder
from llmcompress.merge.recipe import Match
from llmcompress.models.symmetry import Groups
from llmcompress.progress import Progress
from llmcompress.workspace import Store

KEY = "match"


class Aligner:
    """Finds one element of the symmetry group a model, and goes on where an earlier process stopped.

    The second of two models is matched to the first. Of more, each is matched to the mean of those before it, so that
    no match begins with a mean of models in different orders, and then again and again, in random order, to the mean
    of the others until no distance falls (Git Re-Basin, arXiv 2209.04836, algorithm 3).
    """

    def __init__(
        self,
        store: Store,
        groups: Groups,
        match: Match,
        bases: Sequence[Read],
        names: Sequence[str],
        seed: int,
        progress: Progress,
    ) -> None:
        self.store, self.groups, self.match, self.bases, self.names = store, groups, match, bases, names
        self.seed, self.progress = seed, progress
        self.signed = not match.orthogonal and (groups.flips if match.signed is None else match.signed)
        self.found = [Alignment.identity(groups) for _ in bases]
        self.rounds, self.done = 0, False
        if store.has(KEY):
            tensors, (self.rounds, self.done) = store.get(KEY)
            self.found = [_unpacked(tensors, number) for number in range(len(bases))]

    def run(self) -> list[Alignment]:
        if not self.done:
            if len(self.bases) == 2:
                self._align(1, self.bases[0], self.match.max_iter - self.rounds, self._swept)
                self._keep(done=True)
            while not self.done and self.rounds < self.match.max_iter:
                self._round()
        return self.found

    def _swept(self, alignment: Alignment) -> None:
        self.found[1] = alignment
        self.rounds += 1
        self._keep(done=False)

    def _round(self) -> None:
        count, first = len(self.bases), self.rounds == 0
        generator = torch.Generator().manual_seed(self.seed + self.rounds)
        order = range(1, count) if first else torch.randperm(count, generator=generator).tolist()
        gained = False
        for number in order:
            others = [i for i in range(count) if i != number and (i < number or not first)]
            views = [aligned(self.bases[i], self.groups, self.found[i]) for i in others]
            target = mean(views, [1 / len(views)] * len(views))
            gained |= self._align(number, target, self.match.max_iter, lambda _: None)
        self.rounds += 1
        self._keep(done=not gained and not first)

    def _align(self, number: int, target: Read, sweeps: int, swept: Callable[[Alignment], None]) -> bool:
        """Whether matching model `number` to the target gained anything."""
        # one sweep, and the pass over the residual stream that finds nothing to change
        visits = len(list(self.groups.outside())) + 3 * len(self.groups.blocks)
        self.progress.start(f"match {self.names[number]}", visits)
        matched = match_decoder(
            self.groups, target, self.bases[number], self.signed, self.match.orthogonal, sweeps,
            self.found[number], self.progress.advance, swept,
        )  # fmt: skip
        self.found[number] = matched.alignment
        return bool(matched.gains)

    def _keep(self, done: bool) -> None:
        self.done = done
        tensors = {key: t for number, item in enumerate(self.found) for key, t in _packed(item, number).items()}
        self.store.put(KEY, tensors, [self.rounds, done])


def _packed(alignment: Alignment, number: int) -> dict[str, Tensor]:
    parts = {f"index.{group}": index for group, index in alignment.index.items()} | {"sign": alignment.sign}
    if alignment.rotation is not None:
        parts["rotation"] = alignment.rotation
    return {f"{number}.{key}": tensor for key, tensor in parts.items()}


def _unpacked(tensors: dict[str, Tensor], number: int) -> Alignment:
    own = {key.removeprefix(f"{number}."): t for key, t in tensors.items() if key.startswith(f"{number}.")}
    index = {key.removeprefix("index."): t for key, t in own.items() if key.startswith("index.")}
    return Alignment(index, own["sign"], own.get("rotation"))
