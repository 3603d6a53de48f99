"""glibc's heap under large tensors that come and go: kept while a block runs, given back after it."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 << 20  # bytes: glibc takes no more


def _glibc(name: str) -> Any:
    """The C library's function of that name; None where there is none, as in musl, which keeps no holes either."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def keep_freed_memory() -> None:
    """Freed tensors stay with the process, to be used again; `trim` gives them back.

    Otherwise each activation's pages are returned, faulted in and zeroed again: a tenth of a block's time.
    """
    set_option = _glibc("mallopt")
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        set_option(M_TRIM_THRESHOLD, 2**31 - 1)


def trim() -> None:
    """Gives freed memory back to the system: glibc keeps the holes between tensors, and the process would grow."""
    give_back = _glibc("malloc_trim")
    if give_back is not None:
        give_back(0)
