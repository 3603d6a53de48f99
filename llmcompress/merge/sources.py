"""The models of a merge, streamed from their files: checked against one another, seen through views, and run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcompress.backends.merging.alignment import Read
from llmcompress.errors import InputError, RunError
from llmcompress.models.load import StreamedModel
from llmcompress.models.runner import Runner, check_finite
from llmcompress.models.structure import Structure

log = logging.getLogger("llmcompress")

PROBE = (2, 16)  # sequences and tokens on which a model and its aligned copy are compared
CLOSE = 1e-3  # of the largest logit
#: keys of a config that say nothing of what the model computes
IRRELEVANT = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}


class Source(StreamedModel):
    """A streamed model whose tensors can be seen through a view."""

    _view: Read | None = None

    def read(self, name: str) -> Tensor:
        return self._view(name) if self._view is not None else super().read(name)

    def stored(self, name: str) -> Tensor:
        """A tensor as the file has it, whatever the view, on the device of the computation."""
        return super().read(name).to(self.device)

    @contextmanager
    def seen_as(self, view: Read) -> Iterator[None]:
        """Meanwhile parts are loaded from `view`, under the names that they are stored by."""
        ties = self.model.all_tied_weights_keys
        self._view = lambda name: view(ties.get(name, name))
        try:
            yield
        finally:
            self._view = None


def check_alike(sources: Sequence[Source], names: Sequence[str]) -> None:
    """InputError naming the first tensor that differs in shape or ties; a line in the log for configs that differ."""
    first = sources[0]
    shapes = _shapes(first)
    for source, name in zip(sources, names, strict=True):
        if getattr(source.model.config, "quantization_config", None) is not None:
            raise InputError(f"{name}: is compressed or quantized; only plain dense checkpoints are merged")
    for source, name in zip(sources[1:], names[1:], strict=True):
        own = _shapes(source)
        for tensor in [*shapes, *own]:
            if tensor not in own or tensor not in shapes:
                raise InputError(f"{tensor}: only in {names[0] if tensor in shapes else name}; not one architecture")
            if shapes[tensor] != own[tensor]:
                raise InputError(f"{tensor}: shape {shapes[tensor]} in {names[0]}, {own[tensor]} in {name}")
        ties = [set(s.model.all_tied_weights_keys) for s in (first, source)]
        if different := sorted(ties[0] ^ ties[1]):
            raise InputError(f"{different[0]}: tied in {names[0] if different[0] in ties[0] else name} alone")
        if keys := _different(first.model.config.to_dict(), source.model.config.to_dict()):
            log.warning("%s: its config differs from that of %s in %s, whose is kept", name, names[0], ", ".join(keys))


def _shapes(source: Source) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in source.model.state_dict().items()}


def _different(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key) and key not in IRRELEVANT)


def check_tensors(sources: Sequence[Source], names: Sequence[str], advance: Callable[[str], None]) -> None:
    """Reads every tensor once. InputError naming the first that holds a value that is not finite."""
    for tensor in stored_names(sources[0]):
        for source, name in zip(sources, names, strict=True):
            if not torch.isfinite(source.stored(tensor)).all():
                raise InputError(f"{tensor}: not finite in {name}")
        advance(tensor)


def stored_names(source: Source) -> list[str]:
    """Tensors of the model, of tied ones that which is stored."""
    return [name for name in source.model.state_dict() if name not in source.model.all_tied_weights_keys]


def logits(source: Source, structure: Structure, tokens: Tensor) -> Iterator[Tensor]:
    """The model's logits (1, length, vocabulary) of one sequence after the other; one block in memory at a time."""
    runner = Runner(source, structure)
    with torch.no_grad():
        with runner.ends_loaded():
            runner.record_arguments(tokens)
            hidden = torch.cat([runner.embed(row[None]).cpu() for row in tokens])
        for index, block in enumerate(structure.blocks):
            with runner.block_loaded(index):
                for row in range(len(hidden)):
                    hidden[row] = runner.run_block(index, hidden[row : row + 1].to(source.device))[0].cpu()
            check_finite(hidden, block)
        with runner.ends_loaded():
            for row in range(len(hidden)):
                yield runner.logits(tokens[row : row + 1], hidden[row : row + 1].to(source.device))


def mean_loss(source: Source, structure: Structure, tokens: Tensor) -> float:
    """Cross entropy of the next token in nats, the mean over windows (windows, length)."""
    losses = [
        F.cross_entropy(found[0, :-1].float(), row[1:].to(found.device)).item()
        for found, row in zip(logits(source, structure, tokens), tokens, strict=True)
    ]
    return sum(losses) / len(losses)


def check_function(source: Source, structure: Structure, view: Read, name: str) -> float:
    """The largest difference of the logits of a model and of its view, over the largest logit.

    RunError if it is more than rounding: the view is another function.
    """
    generator = torch.Generator().manual_seed(0)
    rows = source.model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(rows, PROBE, generator=generator)
    before = torch.cat(list(logits(source, structure, tokens)))
    with source.seen_as(view):
        after = torch.cat(list(logits(source, structure, tokens)))
    difference = float((after - before).abs().max() / before.abs().max())
    if not difference <= CLOSE:
        raise RunError(
            f"{name}: its aligned copy computes something else (logits differ by {difference:.1e} of the largest); "
            "this architecture's symmetries are not understood: use match: none"
        )
    return difference
