"""How transformers reads a GGUF file, without doing anything twice."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import numpy as np


@contextmanager
def read_once() -> Iterator[None]:
    """Meanwhile a file's header is parsed once, and the names of an architecture's tensors are listed once.

    transformers does the first for config, weights and tokenizer each, the second for every module: three quarters of
    the time of unpacking a small model. It also shows a bar that no setting turns off, which goes nowhere here.
    """
    import gguf

    read, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = functools.cache(_plain(read)), functools.cache(names)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = read, names


def _plain(reader: Any) -> Any:
    """The reader over a plain array of the mapped file: a memmap takes three times as long to cut a vocabulary from."""
    if not isinstance(reader, type):
        return reader  # an outer `read_once`

    class Plain(reader):
        @property
        def data(self) -> np.ndarray[Any, Any]:
            return self._data

        @data.setter
        def data(self, mapped: np.ndarray[Any, Any]) -> None:
            self._data = np.asarray(mapped)

    return Plain
