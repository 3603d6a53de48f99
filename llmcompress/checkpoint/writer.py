"""Writing safetensors files tensor by tensor: memory holds one tensor, whatever the size of the file."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.workspace import disk_errors, sync

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: where it comes from is asked only when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def size(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def parse_size(text: str) -> int:
    """Bytes of "5GB", "200MB", ... (powers of ten, as in transformers)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B", text)
    if not match:
        raise InputError(f"max_shard_size: {text} is not a size such as 5GB or 200MB")
    return int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2]])


def write_sharded(folder: Path, entries: Iterable[Entry], max_shard_size: str) -> None:
    """Writes `model.safetensors`, or numbered shards with an index where one file would exceed `max_shard_size`."""
    shards = _split(list(entries), parse_size(max_shard_size))
    if len(shards) == 1:
        write_file(folder / "model.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard)
        weight_map |= {entry.name: name for entry in shard}
    total = sum(entry.size for shard in shards for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _split(entries: list[Entry], limit: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.size
    return shards


def write_file(path: Path, entries: list[Entry]) -> None:
    """One safetensors file: an 8-byte header length, a JSON header, then the tensors' bytes, little-endian."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    # widest first: every tensor then begins at a multiple of its own item size
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    for entry in ordered:
        offsets = [position, position + entry.size]
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        position += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with disk_errors(path), path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in ordered:
            tensor = entry.read().detach().to(device="cpu", dtype=entry.dtype).contiguous()
            if tuple(tensor.shape) != entry.shape:
                raise InputError(f"{entry.name}: shape {tuple(tensor.shape)}, expected {entry.shape}")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        sync(path)
