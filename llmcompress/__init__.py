"""Smaller, faster language models by factorising their weights.

`import llmcompress` lets transformers' `from_pretrained` load compressed checkpoints. `apply` runs a recipe,
`compress` and `finetune_model` work on a model in memory, `finetune_checkpoint` trains a compressed checkpoint,
`merge_models` averages checkpoints whose symmetries are aligned first. `structured_ffn` makes a model to train
from scratch, `premerge` chooses how a loaded one multiplies few rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmcompress import _register
from llmcompress.errors import InputError, RunError

if TYPE_CHECKING:
    from llmcompress.api import compress, finetune_model
    from llmcompress.finetune.command import finetune_checkpoint
    from llmcompress.from_scratch import structured_ffn
    from llmcompress.layers.premerge import premerge
    from llmcompress.merge.run import merge_models
    from llmcompress.pipeline import Outcome, apply
    from llmcompress.recipe import Recipe

__version__ = "0.1.0"
__all__ = [
    "InputError", "Outcome", "Recipe", "RunError", "apply", "compress", "finetune_checkpoint", "finetune_model",
    "merge_models", "premerge", "structured_ffn",
]  # fmt: skip

_LAZY = {
    "apply": "llmcompress.pipeline",
    "Outcome": "llmcompress.pipeline",
    "compress": "llmcompress.api",
    "finetune_model": "llmcompress.api",
    "finetune_checkpoint": "llmcompress.finetune.command",
    "merge_models": "llmcompress.merge.run",
    "structured_ffn": "llmcompress.from_scratch",
    "premerge": "llmcompress.layers.premerge",
    "Recipe": "llmcompress.recipe",
}

_register.register()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'llmcompress' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
