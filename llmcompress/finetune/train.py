"""Fine-tuning a model that is in memory, resumable from the checkpoints of its working folder."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from llmcompress.errors import InputError, RunError
from llmcompress.finetune.data import check_teacher, check_tokens, split
from llmcompress.finetune.lora import add_adapters, drop_adapters, fold_adapters
from llmcompress.finetune.lrc import freeze_to_lrc, optimizer_bytes, pack_layers, trainable, unpack_layers
from llmcompress.finetune.self_guided import GUIDE, GuideSchedule, SelfGuidedCallback
from llmcompress.finetune.trainer import FinetuneTrainer, last_checkpoint, perplexity, training_arguments
from llmcompress.models.load import quiet_transformers
from llmcompress.progress import Progress, Silent
from llmcompress.recipe import Finetune
from llmcompress.workspace import digest, disk_errors, replace_durably, write_text

RUN, START = "run", "start.safetensors"


@dataclass
class Training:
    """What a training did. Losses are in nats; those of the validation None where nothing was held out.

    kept: the step whose weights the model has; 0 if none was better than the start. losses: of every step;
    validations: (step, loss).
    seconds: of this call, its validations included; tokens_per_second likewise.
    """

    method: str
    steps: int
    kept: int
    tokens: int
    trained_values: int
    optimizer_bytes: int
    validation_before: float | None
    validation_after: float | None
    losses: list[float] = field(repr=False)
    validations: list[tuple[int, float]] = field(repr=False)
    seconds: float
    tokens_per_second: float

    def metrics(self) -> dict[str, Any]:
        """What a checkpoint records: all but the times."""
        figures = {k: v for k, v in asdict(self).items() if k not in ("seconds", "tokens_per_second", "losses")}
        pairs = {"before": self.validation_before, "after": self.validation_after}
        if self.validation_before is not None:
            figures["validation_perplexity"] = {k: perplexity(v) for k, v in pairs.items() if v is not None}
        return figures | {"first_loss": self.losses[0], "last_loss": self.losses[-1]}


def train(
    model: PreTrainedModel,
    tokens: Tensor,
    section: Finetune,
    folder: Path,
    *,
    teacher: PreTrainedModel | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Training:
    """Trains `model` in place on tokens (rows, length) int64; checkpoints in `folder`, from which it goes on.

    callbacks: of transformers' Trainer, beside its own. The model's weights are float32; sparse dictionaries are
    rounded to their stored form at the end. All processes of a distributed run call this.
    InputError: nothing to train, sequences too long, tokens unknown, a teacher of another vocabulary, or the folder
    is another run's. RunError: a loss or gradient that is not finite, naming the step.
    """
    check_tokens(model, tokens)
    if section.loss == "kd":
        if teacher is None:
            raise InputError("finetune.teacher: loss kd learns from a teacher; give one, or use loss: ce")
        check_teacher(model.config, teacher.config)
    rows, held_out = split(tokens, section.validation)
    prepared = prepare(model, section, seed)
    args = training_arguments(section, folder, device, seed, held_out is not None)
    if args.process_index == 0:
        claim(folder, section, tokens, seed)
    PartialState().wait_for_everyone()
    learns_from = teacher if section.loss == "kd" else None
    with quiet_transformers():
        with _trainable(model):
            trainer = FinetuneTrainer(
                prepared,
                args,
                section,
                rows,
                held_out,
                learns_from,
                progress or Silent(),
                _guidance(section, seed),
                callbacks,
            )
        result = _run(trainer, folder)
    finish(prepared, section, result.kept > 0)
    return result


def prepare(model: PreTrainedModel, section: Finetune, seed: int) -> nn.Module:
    """Chooses what trains, in trainable form; returns the model to train, with adapters around it for `lora`."""
    if section.method == "lora":
        return add_adapters(model, section.lora_rank, seed)
    if section.method == "lrc":
        freeze_to_lrc(model)
        unpack_layers(model)
        return model
    model.requires_grad_(True)
    unpack_layers(model)
    return model


def _guidance(section: Finetune, seed: int) -> SelfGuidedCallback | None:
    if (guided := section.self_guided) is None:
        return None
    schedule = GuideSchedule(section.steps, guided.fraction, guided.shape)
    return SelfGuidedCallback(schedule, stochastic=guided.stochastic, seed=seed)


def finish(model: nn.Module, section: Finetune, gained: bool) -> None:
    """Back to the form that a checkpoint holds; adapters become part of the layers, or go if they gained nothing."""
    if section.method == "lora" and gained:
        fold_adapters(model)
    elif section.method == "lora":
        drop_adapters(model)
    else:
        pack_layers(model)
        model.requires_grad_(True)
    model.eval()


@contextmanager
def _trainable(model: PreTrainedModel) -> Iterator[None]:
    """transformers refuses to train a model that a quantizer has loaded; the factors of this one can be trained."""
    quantized = getattr(model, "is_quantized", False)
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = quantized


def claim(folder: Path, section: Finetune, tokens: Tensor, seed: int) -> None:
    """Marks a working folder as this run's. InputError if it is another's: its checkpoints would be gone on with."""
    own = digest([section.model_dump(mode="json"), seed, hashlib.sha256(tokens.numpy().tobytes()).hexdigest()])
    marker = folder / RUN
    if marker.is_file():
        if marker.read_text(encoding="utf-8") != own:
            raise InputError(f"{folder}: holds the checkpoints of another run; name another folder or remove it")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: holds something else already; name another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(marker, own)


def _run(trainer: FinetuneTrainer, folder: Path) -> Training:
    before = _before(trainer, folder)
    resume = last_checkpoint(folder)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    seconds = time.perf_counter() - start
    state, section = trainer.state, trainer.section
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    validations = [(entry["step"], entry["eval_loss"]) for entry in state.log_history if "eval_loss" in entry]
    after, kept = state.best_metric, state.best_global_step or state.global_step
    if before is not None and not (after is not None and after < before):
        restore(trainer.model, folder)
        after, kept = before, 0
    per_step = trainer.args.world_size * section.batch * section.accumulation * section.length
    done = state.global_step - (int(resume.name.rpartition("-")[2]) if resume else 0)
    return Training(
        section.method, state.global_step, kept, state.global_step * per_step,
        sum(parameter.numel() for _, parameter in trainable(trainer.model)), optimizer_bytes(trainer.optimizer),
        before, after, losses, validations, seconds, done * per_step / seconds,
    )  # fmt: skip


def _before(trainer: FinetuneTrainer, folder: Path) -> float | None:
    """The validation loss of the weights that training starts from, measured once; they are put by."""
    if trainer.eval_dataset is None:
        return None
    path = folder / START
    if path.is_file():
        with safe_open(path, "pt") as file:
            return float(file.metadata()["validation"])
    loss: float = trainer.evaluate()["eval_loss"]
    trainer.forget_evaluation()
    if not math.isfinite(loss):
        raise RunError("the validation loss is not finite before any training: check the model")
    if trainer.is_world_process_zero():
        part = path.with_suffix(".part")
        own = [item for item in trainable(trainer.model) if not item[0].endswith(f".{GUIDE}")]
        values = {name: parameter.detach().cpu().contiguous() for name, parameter in own}
        with disk_errors(path):
            save_file(values, part, {"validation": repr(loss)})
            replace_durably(part, path)
    return loss


def restore(model: nn.Module, folder: Path) -> None:
    """Gives what trains the values from before training: a training that only did harm leaves no trace."""
    with safe_open(folder / START, "pt") as file, torch.no_grad():
        for name, parameter in trainable(model):
            parameter.copy_(file.get_tensor(name))
