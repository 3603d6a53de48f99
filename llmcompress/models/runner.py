"""Running a model piece by piece: up to its first block, one block at a time, and from the last block on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.errors import RunError
from llmcompress.finite import all_finite
from llmcompress.models.load import StreamedModel
from llmcompress.models.structure import Structure, no_cache
from llmcompress.types import Site


class _Stop(Exception):
    """Raised inside the model to leave its forward pass."""


class Runner:
    """A model with its structure, in memory or streamed from disk; the same calls for both.

    Hidden states are (sequences, length, d_model). Each block is called with the arguments that the model itself
    passes to it, recorded once from a single sequence: packed sequences have no padding, so they fit every batch.
    """

    def __init__(self, model: PreTrainedModel | StreamedModel, structure: Structure) -> None:
        self.streamed = model if isinstance(model, StreamedModel) else None
        self.model: PreTrainedModel = model.model if isinstance(model, StreamedModel) else model
        self.structure = structure
        self.device = self.streamed.device if self.streamed else self.model.device
        self.dtype = self.model.dtype
        self._arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.model.get_submodule(path) for path in self.structure.blocks]

    def _outside(self, name: str) -> bool:
        return not any(name.startswith(block + ".") for block in self.structure.blocks)

    @contextmanager
    def _loaded(self, keep: Callable[[str], bool]) -> Iterator[None]:
        if self.streamed:
            self.streamed.load(keep)
        try:
            yield
        finally:
            if self.streamed:
                self.streamed.release(keep)

    @contextmanager
    def ends_loaded(self) -> Iterator[None]:
        """Everything outside the blocks (embeddings, last norm, head) in memory."""
        with self._loaded(self._outside):
            yield

    @contextmanager
    def block_loaded(self, index: int) -> Iterator[nn.Module]:
        prefix = self.structure.blocks[index] + "."
        with self._loaded(lambda name: name.startswith(prefix)):
            yield self.blocks[index]

    def weight(self, site: Site) -> Tensor:
        """The dense weight (d_out, d_in) of a site, from memory or from its file."""
        weight = self._tensor(f"{site.name}.weight")
        return weight.T if site.transposed else weight

    def bias(self, site: Site) -> Tensor | None:
        return self._tensor(f"{site.name}.bias") if site.bias else None

    def _tensor(self, name: str) -> Tensor:
        if self.streamed:
            return self.streamed.read(name).to(self.device)
        return self.model.get_parameter(name).detach()

    @contextmanager
    def _blocks_replaced(self, forward: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        blocks = self.blocks
        for index, block in enumerate(blocks):
            block.forward = forward(index)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    def _wrap(self, index: int, hidden: Tensor) -> Any:
        return (hidden,) if self.structure.tuple_output[index] else hidden

    def embed(self, tokens: Tensor) -> Tensor:
        """What the first block reads: tokens (sequences, length) int64 -> hidden states. Needs `ends_loaded`."""
        caught: list[Tensor] = []

        def forward(_: int) -> Callable[..., Any]:
            def stop(*args: Any, **kwargs: Any) -> Any:
                caught.append(_hidden(args, kwargs))
                raise _Stop

            return stop

        with self._blocks_replaced(forward), torch.no_grad():
            self._call(tokens)
        return caught[0]

    def record_arguments(self, tokens: Tensor) -> None:
        """Records what the model passes to each block beside the hidden states. Needs `ends_loaded`."""
        recorded: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        last = len(self.structure.blocks) - 1

        def forward(index: int) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                hidden = _hidden(args, kwargs)
                rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
                recorded.append((args[1:], rest))
                if index == last:
                    raise _Stop
                return self._wrap(index, hidden)

            return record

        with self._blocks_replaced(forward), torch.no_grad():
            self._call(tokens[:1])
        self._arguments = recorded

    def _call(self, tokens: Tensor) -> Any:
        try:
            return self.model(input_ids=tokens.to(self.device), **no_cache(self.model))
        except _Stop:
            return None

    def run_block(self, index: int, hidden: Tensor) -> Tensor:
        """One block on hidden states; gradients flow if they are enabled. Needs `block_loaded`."""
        args, kwargs = self._arguments[index]
        output = self.blocks[index](hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """What the model makes of the last block's output: (sequences, length, vocabulary). Needs `ends_loaded`."""
        last = len(self.structure.blocks) - 1

        def forward(index: int) -> Callable[..., Any]:
            def skip(*args: Any, **kwargs: Any) -> Any:
                return self._wrap(index, hidden if index == last else _hidden(args, kwargs))

            return skip

        with self._blocks_replaced(forward):
            output: Tensor = self._call(tokens).logits
        return output


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def check_finite(hidden: Tensor, where: str) -> None:
    """RunError naming the place unless every value is finite."""
    if not all_finite(hidden):
        raise RunError(f"{where}: its output is not finite; use dtype: float32 or bfloat16, or check the model")
