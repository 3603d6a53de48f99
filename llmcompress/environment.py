"""Where a run takes place: its device, and the versions that its results depend on."""

from __future__ import annotations

import platform

import safetensors
import torch
import transformers

import llmcompress
from llmcompress.errors import InputError


def versions() -> dict[str, str]:
    """Versions that results depend on."""
    return {
        "llmcompress": llmcompress.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }


def choose_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not (name == "cpu" or name.startswith("cuda")):
        raise InputError(f"device: '{name}'; expected auto, cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device: '{name}', but torch finds no GPU; use cpu or auto")
    return name
