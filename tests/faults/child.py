"""What runs in the processes that the fault tests start."""

from __future__ import annotations

import os
import resource
import signal
from multiprocessing.queues import Queue
from typing import Any

import llmcompress
from llmcompress import Recipe
from llmcompress.progress import Silent
from llmcompress.sweep import sweep, sweep_recipes


def run(data: dict[str, Any]) -> None:
    os.makedirs(os.path.dirname(data["output"]), exist_ok=True)
    llmcompress.apply(Recipe.parse(data))


def run_sweep(data: dict[str, Any], ratios: list[float], methods: list[str]) -> None:
    sweep(sweep_recipes(Recipe.parse(data), ratios, methods), Silent())


def run_limited(data: dict[str, Any], limit: int, report: Queue[tuple[str, str]]) -> None:
    """With files limited to `limit` bytes; reports the error's type and message."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        llmcompress.apply(Recipe.parse(data))
    except Exception as error:
        report.put((type(error).__name__, str(error)))
    else:
        report.put(("none", "no error"))


def run_measured(data: dict[str, Any], report: Queue[int]) -> None:
    """Reports the peak resident memory in KiB."""
    llmcompress.apply(Recipe.parse(data))
    report.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
