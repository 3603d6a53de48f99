"""Fine-tuning a checkpoint: from one folder to another, resumable, in one process or several."""

from __future__ import annotations

import gc
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from llmcompress.backends.choice import Backend
from llmcompress.backends.ports import Layer
from llmcompress.checkpoint.install import build_layer
from llmcompress.errors import InputError
from llmcompress.finetune.save import save_trained
from llmcompress.models.load import Location, load_model, read_config
from llmcompress.progress import Progress
from llmcompress.recipe import Finetune
from llmcompress.results import SiteResult
from llmcompress.workspace import replace_durably, sync, write_text

log = logging.getLogger("llmcompress")
REPORT = "training.json"


def train_checkpoint(
    student: Location,
    teacher: Location,
    tokens: Tensor,
    section: Finetune,
    work: Path,
    *,
    dtype: torch.dtype,
    device: str,
    seed: int,
    max_shard_size: str,
    progress: Progress,
    trust_remote_code: bool = False,
    convert: Sequence[Backend] = (),
) -> Path:
    """Trains the model at `student` on tokens (rows, length) and returns the folder of the result, in `work`.

    In `work` lie the checkpoints from which an interrupted run goes on, `tuned`, the finished model, and
    training.json, what `train` reports. Weights are trained in float32 and written in `dtype`. convert: backends that
    change the model beforehand. Errors: see `train`, and the backends' own.
    """
    # what a run without training need not wait for: Trainer, peft and datasets
    from llmcompress.finetune.train import train

    tuned = work / "tuned"
    if tuned.is_dir():
        return tuned
    options = {"trust_remote_code": trust_remote_code}
    model = load_model(student, torch.float32, **options)
    changes = convert_layers(model, convert, seed)
    distils = section.loss == "kd"
    teaching = load_model(teacher, torch.bfloat16 if section.bf16 else torch.float32, **options) if distils else None
    training = train(
        model, tokens, section, work / "training", teacher=teaching, seed=seed, device=device, progress=progress,
        callbacks=[callback for change in changes for callback in change.callbacks()],
    )  # fmt: skip
    del teaching
    gc.collect()
    if training.kept == 0:
        for change in changes:
            change.undo(model)
        log.warning("fine-tuning lowered no validation loss: the model is kept as it was; try another finetune.lr")
    if is_main_process():
        part = work / "tuned.part"
        shutil.rmtree(part, ignore_errors=True)
        save_trained(model, part, student, dtype, max_shard_size)
        for path in part.iterdir():
            sync(path)
        write_text(work / REPORT, json.dumps(training.metrics(), sort_keys=True))
        replace_durably(part, tuned)
        shutil.rmtree(work / "training", ignore_errors=True)
    return tuned


def convert_layers(model: PreTrainedModel, convert: Sequence[Backend], seed: int) -> list[Layer]:
    """Lets each backend change the model in place. InputError naming the recipe's key if one cannot."""
    changes: list[Layer] = []
    for index, chosen in enumerate(convert):
        change = chosen.build("layer")
        try:
            names = change.convert(model, torch.Generator().manual_seed(seed + index))
        except InputError as error:
            raise InputError(f"convert.{index}: {error}") from None
        log.info("%s: %s", chosen.name, ", ".join(names))
        changes.append(change)
    return changes


def read_report(work: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((work / REPORT).read_text(encoding="utf-8"))
    return found


def is_main_process() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def leave_group() -> None:
    """Ends this process's part of a distributed run: it would otherwise wait for the others when it exits."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def stored_dtype(location: Location) -> torch.dtype:
    """The dtype of a checkpoint's floating-point tensors; a GGUF file is de-quantised to float32."""
    if location.gguf:
        return torch.float32
    dtype = AutoConfig.from_pretrained(location.folder).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def current_results(results: Sequence[SiteResult], folder: Path, dtype: torch.dtype) -> list[SiteResult]:
    """The results with the sizes of the checkpoint in `folder`: adapters make layers larger."""
    specs = read_config(folder)["quantization_config"]["sites"]
    found = []
    for result in results:
        if (spec := specs.get(result.name)) is not None:
            layer = build_layer(result.name, spec, dtype, "meta")
            bits, values = layer.storage_bits, layer.storage_values
            result = replace(result, stored_bits=bits, stored_values=values, spec=spec)
        found.append(result)
    return found
