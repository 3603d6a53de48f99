"""Where unfinished work lives: named results that appear whole or not at all, and hidden states mapped from disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmcompress.errors import RunError

Tensors = dict[str, Tensor]


class Store(Protocol):
    """Keyed results of the pipeline's steps: tensors and a JSON note each."""

    def has(self, key: str) -> bool: ...
    def put(self, key: str, tensors: Tensors, note: Any = None) -> None: ...
    def get(self, key: str) -> tuple[Tensors, Any]: ...
    def delete(self, key: str) -> None: ...
    def new_hidden(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...
    def commit_hidden(self, key: str) -> None: ...
    def open_hidden(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...


class MemoryStore:
    """The store of a run on a model that is in memory: nothing survives the process."""

    def __init__(self) -> None:
        self._results: dict[str, tuple[Tensors, Any]] = {}
        self._hidden: dict[str, Tensor] = {}

    def has(self, key: str) -> bool:
        return key in self._results or key in self._hidden

    def put(self, key: str, tensors: Tensors, note: Any = None) -> None:
        self._results[key] = (tensors, note)

    def get(self, key: str) -> tuple[Tensors, Any]:
        return self._results[key]

    def delete(self, key: str) -> None:
        self._results.pop(key, None)
        self._hidden.pop(key, None)

    def new_hidden(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self._hidden[key] = torch.empty(shape, dtype=dtype)
        return self._hidden[key]

    def commit_hidden(self, key: str) -> None:
        pass

    def open_hidden(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._hidden[key]


class DiskStore:
    """One safetensors file a result, written under a temporary name, flushed and renamed: a reader never sees half.

    Hidden states are plain files, mapped into memory: they cost disk, not RAM. Their flush runs beside the work that
    follows; no result is stored before it has ended.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._flusher = ThreadPoolExecutor(1)
        self._flush: tuple[str, Future[None]] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.rglob("*.part"):
            leftover.unlink()

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _hidden_path(self, key: str) -> Path:
        return self.folder / f"{key}.hidden"

    def has(self, key: str) -> bool:
        self._settle(key)
        return self.path(key).exists() or self._hidden_path(key).exists()

    def put(self, key: str, tensors: Tensors, note: Any = None) -> None:
        self._settle()
        target = self.path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        with disk_errors(target):
            save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, part, {"note": json.dumps(note)})
            replace_durably(part, target)

    def get(self, key: str) -> tuple[Tensors, Any]:
        path = self.path(key)
        try:
            with safe_open(path, "pt") as file:
                note = json.loads(file.metadata()["note"])
                return {name: file.get_tensor(name) for name in file.keys()}, note  # noqa: SIM118
        except SafetensorError as error:
            raise RunError(f"{path}: corrupt ({error}); remove it and run the same command again") from None

    def delete(self, key: str) -> None:
        self._settle(key)
        self.path(key).unlink(missing_ok=True)
        self._hidden_path(key).unlink(missing_ok=True)

    def new_hidden(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        part = self._hidden_path(key).with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        size = int(torch.Size(shape).numel()) * dtype.itemsize
        with disk_errors(part), part.open("wb") as file:
            # reserved now: writing to a mapped hole on a full disk would kill the process without a word
            os.posix_fallocate(file.fileno(), 0, size)
        return _map(part, shape, dtype)

    def commit_hidden(self, key: str) -> None:
        self._settle()
        self._flush = key, self._flusher.submit(self._commit, self._hidden_path(key))

    @staticmethod
    def _commit(target: Path) -> None:
        with disk_errors(target):
            replace_durably(target.with_suffix(".part"), target)

    def _settle(self, key: str | None = None) -> None:
        """Waits for the last flush, or only if it is that of `key`; raises what stopped it."""
        if self._flush is not None and key in (None, self._flush[0]):
            (_, flush), self._flush = self._flush, None
            flush.result()

    def open_hidden(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self._settle(key)
        return _map(self._hidden_path(key), shape, dtype)


def _map(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = int(torch.Size(shape).numel())
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).reshape(shape)


class disk_errors:
    """Turns a full disk or a refused write into a RunError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, RunError):
            return
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            free = shutil.disk_usage(_existing(self.path)).free / 2**20
            raise RunError(
                f"{self.path}: cannot be written ({error}; {free:.0f} MiB free); "
                "make room and run the same command again: it goes on where it stopped"
            ) from error


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def replace_durably(part: Path, target: Path) -> None:
    """Flushes `part` to disk, renames it to `target`, and flushes the folder that records the name."""
    sync(part)
    os.replace(part, target)
    sync(target.parent)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        sync(path)
    sync(folder)


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    part = path.with_name(path.name + ".part")
    with disk_errors(path):
        part.write_text(text, encoding="utf-8")
        replace_durably(part, path)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
