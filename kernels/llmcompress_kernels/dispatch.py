"""Which implementation runs: the kernels for few rows or the libraries' matrix products for many.

Measured crossover points (benchmarks/kernels.py): one row of x is one token of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor

Path = Literal["kernel", "library"]

#: rows up to which the kernel is the faster of the two, by (operation, device)
CROSSOVER = {
    ("low_rank", "cpu"): 16,
    ("sparse_dictionary", "cpu"): 16,
    ("low_rank", "cuda"): 1,
    ("sparse_dictionary", "cuda"): 1,
    ("block", "cuda"): 16,
}
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}

_forced: ContextVar[Path | None] = ContextVar("llmcompress_path", default=None)


@contextmanager
def use(path: Path) -> Iterator[None]:
    """Overrides the choice meanwhile, in this thread: "kernel" wherever there is one, or "library"."""
    if path not in ("kernel", "library"):
        raise ValueError(f"path must be 'kernel' or 'library'; got {path!r}")
    token = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(token)


def plan(operation: str, rows: int, device: str, dtype: torch.dtype) -> Path:
    """The implementation for that many rows. An operation, device or dtype without a kernel goes to the library.

    A compiled graph takes the measured choice, whatever `use` says around it.
    """
    limit = CROSSOVER.get((operation, device))
    if limit is None or dtype not in DTYPES[device]:
        return "library"
    forced = None if torch.compiler.is_compiling() else _forced.get()
    if forced is not None:
        return forced
    return "kernel" if rows <= limit else "library"


def eager(x: Tensor) -> bool:
    """Whether an implementation may be called as it is: plain tensors, and neither gradients nor a tracer to serve.

    Calling it through torch's dispatcher costs 30 microseconds, as much as the work of a small layer.
    """
    return not torch.is_grad_enabled() and plain(x)


def plain(x: Tensor) -> bool:
    """Whether no tracer or transform looks on: x is a tensor in memory."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
    )
