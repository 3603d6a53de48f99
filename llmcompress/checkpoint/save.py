"""Writing the compressed model as a Hugging Face folder, tensor by tensor from the store and the source files."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.checkpoint.install import build_layer, install
from llmcompress.checkpoint.quantizer import attach
from llmcompress.checkpoint.verify import checksums
from llmcompress.checkpoint.writer import Entry, write_sharded
from llmcompress.models.load import Location, StreamedModel, load_tokenizer, quiet_transformers
from llmcompress.results import SiteResult
from llmcompress.workspace import Store


def save_streamed(
    folder: Path, source: StreamedModel, results: Sequence[SiteResult], store: Store, max_shard_size: str
) -> None:
    """Weights, config with their checksums, generation config and tokenizer; memory holds one tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = source.model.dtype
    skeleton = _skeleton(source.model)
    layers = {r.name: build_layer(r.name, r.spec, dtype, "meta") for r in results if r.spec is not None}
    install(skeleton, layers)
    entries = _entries(skeleton, source, results, store)
    write_sharded(folder, entries, max_shard_size)
    attach(skeleton)
    skeleton.config.quantization_config.checksums = checksums(folder)
    _save_configs(folder, source, skeleton, dtype)


def save_dense(
    folder: Path, source: StreamedModel, read: Callable[[str], Tensor], dtype: torch.dtype, max_shard_size: str
) -> None:
    """A plain checkpoint of the source's architecture with other values: `read` gives each tensor by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    skeleton = _skeleton(source.model)
    skipped = set(skeleton._keys_to_ignore_on_save or []) | set(skeleton.all_tied_weights_keys)
    entries = [
        Entry(name, dtype if t.is_floating_point() else t.dtype, tuple(t.shape), functools.partial(read, name))
        for name, t in skeleton.state_dict().items()
        if name not in skipped
    ]
    write_sharded(folder, entries, max_shard_size)
    _save_configs(folder, source, skeleton, dtype)


def _save_configs(folder: Path, source: StreamedModel, skeleton: PreTrainedModel, dtype: torch.dtype) -> None:
    with quiet_transformers():
        skeleton.config.architectures = [type(skeleton).__name__]
        skeleton.config.dtype = str(dtype).removeprefix("torch.")
        skeleton.config.save_pretrained(folder)
        if skeleton.can_generate():
            source.model.generation_config.save_pretrained(folder)
    _save_tokenizer(source.location, folder)


def _skeleton(model: PreTrainedModel) -> PreTrainedModel:
    with init_empty_weights():
        return type(model)(copy.deepcopy(model.config))


def _entries(
    skeleton: PreTrainedModel, source: StreamedModel, results: Sequence[SiteResult], store: Store
) -> list[Entry]:
    stored: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
    for block in sorted({result.block for result in results}):
        for name, tensor in store.get(f"blocks/{block:05d}")[0].items():
            stored[name] = (block, tensor.dtype, tuple(tensor.shape))
    dense = source.model.state_dict()
    recent: dict[int, dict[str, Tensor]] = {}

    def from_store(name: str, block: int) -> Callable[[], Tensor]:
        def read() -> Tensor:
            if block not in recent:
                recent.clear()
                recent[block] = store.get(f"blocks/{block:05d}")[0]
            return recent[block][name]

        return read

    entries = []
    skipped = set(skeleton._keys_to_ignore_on_save or []) | set(skeleton.all_tied_weights_keys)
    for name, tensor in skeleton.state_dict().items():
        if name in stored:
            block, dtype, shape = stored[name]
            entries.append(Entry(name, dtype, shape, from_store(name, block)))
        elif name not in skipped:
            entries.append(Entry(name, dense[name].dtype, tuple(tensor.shape), functools.partial(source.read, name)))
    return entries


def _save_tokenizer(location: Location, folder: Path) -> None:
    with quiet_transformers():
        load_tokenizer(location).save_pretrained(folder)
