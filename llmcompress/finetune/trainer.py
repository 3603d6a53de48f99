"""transformers' Trainer with this tool's losses and optimisers, whole checkpoints, and an eye on what is not finite."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback

from llmcompress.backends.optim.allreduce import flat_gradient, put_gradient, robust_allreduce_
from llmcompress.errors import InputError, RunError
from llmcompress.finetune.losses import block_output_loss, distillation_loss, next_token_loss
from llmcompress.finetune.lrc import trainable
from llmcompress.finetune.optimizers import build_optimizer
from llmcompress.finetune.self_guided import SelfGuidedCallback
from llmcompress.progress import Progress
from llmcompress.recipe import Finetune
from llmcompress.workspace import disk_errors, sync

COMPLETE = "complete"  # a checkpoint folder without this file was cut short


class Rows(Dataset[dict[str, Tensor]]):
    """Sequences (rows, length) int64, one by one."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class FinetuneTrainer(Trainer):
    """Trains what requires gradients. `teacher` gives the logits for `loss: kd`; validation is cross entropy always."""

    optimizer: Any  # transformers has no types

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        section: Finetune,
        train: Tensor,
        validation: Tensor | None,
        teacher: PreTrainedModel | None,
        progress: Progress,
        guidance: SelfGuidedCallback | None = None,
        also: Sequence[TrainerCallback] = (),
    ) -> None:
        self.section, self.teacher, self.guidance = section, teacher, guidance
        self.rule: Any = section.aggregator.build("aggregator") if section.aggregator else None
        if self.rule is not None and max(args.world_size, section.accumulation) < 2:
            raise InputError("finetune.aggregator: needs several processes, or accumulation of at least 2")
        self._rows: list[Tensor] = []
        tokens = args.world_size * section.batch * section.accumulation * section.length
        callbacks: list[TrainerCallback] = [ProgressCallback(progress, tokens), *also]
        if section.patience is not None and validation is not None:
            callbacks.append(EarlyStoppingCallback(section.patience))
        if guidance is not None:
            callbacks.append(guidance)
        held_out = Rows(validation) if validation is not None else None
        super().__init__(model, args, train_dataset=Rows(train), eval_dataset=held_out, callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the losses are means: batches of a step are averaged
        if teacher is not None:
            teacher.to(args.device).requires_grad_(False)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            named = trainable(self.model if model is None else model)
            self.optimizer = build_optimizer(self.section.optimizer, named, self.section.lr)
        built: torch.optim.Optimizer = self.optimizer
        return built

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        tokens, section = inputs["input_ids"], self.section
        teacher = self.teacher if model.training else None
        states = teacher is not None and section.block_loss > 0
        outputs = model(input_ids=tokens, use_cache=False, output_hidden_states=states)
        if teacher is None:
            loss = next_token_loss(outputs.logits, tokens)
        else:
            with torch.no_grad():
                target = teacher(input_ids=tokens, use_cache=False, output_hidden_states=states)
            loss = distillation_loss(outputs.logits, target.logits, section.temperature)
            if states:
                distance = block_output_loss(outputs.hidden_states, target.hidden_states)
                loss = loss + section.block_loss * distance
        return (loss, outputs) if return_outputs else loss

    def forget_evaluation(self) -> None:
        """To be called between an evaluation and the training after it.

        accelerate marks a model that it has prepared for evaluation, and would then not wrap it for training: each of
        several processes would train alone, their gradients never averaged.
        """
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # those prepare it for training at once
            self.accelerator.free_memory()
            self.model._is_accelerate_prepared = False

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if self.rule is not None:
            with self.accelerator.no_sync(model):
                robust: Tensor = super().training_step(model, *args, **kwargs)
            self._aggregate()
            return robust
        loss: Tensor = super().training_step(model, *args, **kwargs)
        self._check_finite(loss, "loss")
        return loss

    def _aggregate(self) -> None:
        """One gradient of all processes', each the sum of its batches'; of a single process's batches."""
        last = self.accelerator.sync_gradients
        if self.args.world_size > 1:
            if last:
                robust_allreduce_(self.model, self.rule)
            return
        parameters = [parameter for _, parameter in trainable(self.model)]
        self._rows.append(flat_gradient(parameters))
        for parameter in parameters:
            parameter.grad = None
        if last:  # each is the gradient of its share of the step's mean
            put_gradient(len(self._rows) * self.rule.aggregate(torch.stack(self._rows)), parameters)
            self._rows = []

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        self._check_finite(torch.as_tensor(norm), "gradient")
        return norm

    def _check_finite(self, value: Tensor, what: str) -> None:
        if not torch.isfinite(value).all():
            kept = last_checkpoint(Path(self.args.output_dir))
            rest = f"the checkpoint {kept} is kept" if kept else "no checkpoint was due yet"
            raise RunError(f"step {self.state.global_step + 1}: the {what} is not finite; {rest}; lower finetune.lr")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Marked as complete once all of it is on the disk; only then are older ones deleted, their marks first.

        The one in which the training ends is not marked: gone on with, transformers would make one step more.
        """
        ended = self.control.should_training_stop or self.state.global_step >= self.state.max_steps
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with disk_errors(folder):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save and not ended:
                if self.guidance is not None:
                    self.guidance.save(self.model, folder)
                for path in folder.rglob("*"):
                    sync(path)
                (folder / COMPLETE).touch()
                sync(folder)
                best = self.state.best_model_checkpoint
                delete_checkpoints(folder.parent, {folder.name, Path(best).name if best else folder.name})
        self.accelerator.wait_for_everyone()


def last_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the most steps."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def delete_checkpoints(folder: Path, kept: set[str]) -> None:
    """Deletes all checkpoints in `folder` but those named; one that is deleted in part is never gone on with."""
    for path in folder.glob("checkpoint-*"):
        if path.name not in kept:
            (path / COMPLETE).unlink(missing_ok=True)
            sync(path)
            shutil.rmtree(path)


class ProgressCallback(TrainerCallback):
    """Shows every step's loss, its perplexity and the rate; and the last validation's perplexity."""

    def __init__(self, progress: Progress, tokens: int) -> None:
        self.progress, self.tokens = progress, tokens
        self.validation = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first, self.start = state.global_step, time.perf_counter()
        if state.is_world_process_zero:
            self.progress.start("fine-tune", state.max_steps - state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        rate = self.tokens * (state.global_step - self.first) / (time.perf_counter() - self.start)
        self.progress.advance(f"loss {logs['loss']:.3f}{self.validation}, {rate:,.0f} tokens/s")

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        if metrics and "eval_loss" in metrics:
            self.validation = f", perplexity {perplexity(metrics['eval_loss']):.2f}"


def perplexity(loss: float) -> float:
    """exp(loss), loss in nats; infinite where that overflows."""
    return float(torch.tensor(loss, dtype=torch.float64).exp())


def training_arguments(section: Finetune, folder: Path, device: str, seed: int, validated: bool) -> TrainingArguments:
    """The recipe's section in the words of transformers; nothing is reported anywhere."""
    every = section.evaluate_every or max(1, section.steps // 4)
    args = TrainingArguments(
        output_dir=os.fspath(folder),
        max_steps=section.steps,
        per_device_train_batch_size=section.batch,
        per_device_eval_batch_size=section.batch,
        gradient_accumulation_steps=section.accumulation,
        learning_rate=section.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(section.warmup * section.steps),
        max_grad_norm=section.clip,
        bf16=section.bf16,
        gradient_checkpointing=section.gradient_checkpointing or None,
        ddp_find_unused_parameters=section.self_guided is not None or None,
        seed=seed % 2**32,
        data_seed=seed % 2**32,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        eval_strategy="steps" if validated else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        restore_callback_states_from_checkpoint=True,
        load_best_model_at_end=validated,
        metric_for_best_model="eval_loss" if validated else None,
        greater_is_better=False if validated else None,
        prediction_loss_only=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        log_level="error",
    )
    if args.n_gpu > 1:  # one process, one GPU: the Trainer would copy the model to all of them
        args._n_gpu = 1
    return args
