"""Runs a compiled kernel on torch's own pool of CPU threads.

A second pool would fight the first for the cores: idle OpenMP workers spin for a while. So kernels are plain C
functions `void kernel(int64 *arguments)` that take their share of the work from a counter, arguments[0], and every
worker of torch's GNU OpenMP pool runs the same function. Where torch brings another OpenMP (macOS, Windows), they run
on one thread.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch

#: below so many bytes a thread, waking another costs more than it saves; one whose core is taken is waited for besides
BYTES_A_THREAD = 1 << 20

_Signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Block = ctypes.c_int64 * 17


@functools.cache
def _parallel() -> Callable[[int, object, int, int], None] | None:
    """GOMP_parallel(function, data, threads, flags) of the library that torch loaded."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        entry = getattr(ctypes.CDLL(str(path)), "GOMP_parallel", None)
        if entry is not None:
            entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            entry.restype = None
            return entry
    return None


def threads_for(bytes_read: int) -> int:
    """Threads worth using for work that reads so many bytes, at most `torch.get_num_threads()`."""
    if bytes_read < 2 * BYTES_A_THREAD or _parallel() is None:
        return 1
    return min(torch.get_num_threads(), bytes_read // BYTES_A_THREAD)


class Kernel:
    """A compiled kernel at an address; called with the number of threads and its int64 arguments from index 1 on."""

    def __init__(self, address: int) -> None:
        self.address = address
        self.call = _Signature(address)

    def __call__(self, threads: int, *arguments: int) -> None:
        block = _Block(0, *arguments)
        if threads == 1:
            self.call(ctypes.addressof(block))
        else:
            parallel = _parallel()
            assert parallel is not None
            parallel(self.address, block, threads, 0)
