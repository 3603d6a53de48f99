"""Smaller, faster language models by factorising their weights.

`import llmcompress` lets transformers' `from_pretrained` load compressed checkpoints. `apply` runs a recipe, `compress`
works on a model in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmcompress import _register
from llmcompress.errors import InputError, RunError

if TYPE_CHECKING:
    from llmcompress.api import compress
    from llmcompress.pipeline import Outcome, apply
    from llmcompress.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["InputError", "Outcome", "Recipe", "RunError", "apply", "compress"]

_LAZY = {
    "apply": "llmcompress.pipeline",
    "Outcome": "llmcompress.pipeline",
    "compress": "llmcompress.api",
    "Recipe": "llmcompress.recipe",
}

_register.register()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'llmcompress' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
