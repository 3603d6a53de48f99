"""Writing a trained model as a checkpoint like any other."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from llmcompress.checkpoint.quantizer import attach, has_own_format
from llmcompress.checkpoint.verify import checksums
from llmcompress.models.load import Location, load_tokenizer, quiet_transformers
from llmcompress.workspace import disk_errors


def save_trained(
    model: PreTrainedModel, folder: Path, origin: Location, dtype: torch.dtype, max_shard_size: str = "5GB"
) -> None:
    """Weights in `dtype`, packed codes as they are, checksums in the config; the tokenizer from `origin`."""
    model.to(dtype)
    if has_own_format(model):
        attach(model)
    with disk_errors(folder), quiet_transformers():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if has_own_format(model):
            model.config.quantization_config.checksums = checksums(folder)
            model.config.save_pretrained(folder)
            model.config.quantization_config.checksums = {}
        load_tokenizer(origin).save_pretrained(folder)
