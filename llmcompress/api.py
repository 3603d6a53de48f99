"""Compressing a model that is in memory."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.calibration import text
from llmcompress.calibration.modes import frozen
from llmcompress.checkpoint.install import install
from llmcompress.checkpoint.quantizer import attach, has_own_format
from llmcompress.engine import Engine
from llmcompress.errors import InputError
from llmcompress.finetune.block_recovery import check_plan
from llmcompress.finetune.train import Training, train
from llmcompress.measurement import Settings
from llmcompress.mixture import calibration_tokens
from llmcompress.models.runner import Runner
from llmcompress.models.structure import analyse
from llmcompress.plan import make_plan
from llmcompress.progress import Progress
from llmcompress.recipe import Finetune, Recipe
from llmcompress.results import load_layers
from llmcompress.validation import parse_section
from llmcompress.workspace import MemoryStore

log = logging.getLogger("llmcompress")


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    method: str = "svd_llm",
    ratio: float = 0.3,
    targets: Sequence[str] | None = None,
    calibration: dict[str, Any] | None = None,
    tokens: Tensor | None = None,
    block_recovery: dict[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Compresses a transformers model in place and returns it; `save_pretrained` then writes a compressed checkpoint.

    ratio: fraction of the targeted parameters removed. targets: as in a recipe; the method's own if absent.
    calibration: keys of a recipe's `calibration` section, read with `tokenizer`; or `tokens` (sequences, length) int64
    directly. block_recovery: keys of that section. options: `allocation`, `propagate` and the method's own.
    InputError for anything that a recipe with the same values would be refused for; the model is then unchanged.
    """
    step = {"method": method, "ratio": ratio, **options}
    if targets is not None:
        step["targets"] = list(targets)
    recipe = Recipe.parse(
        {
            "model": "in memory",
            "output": "in memory",
            "seed": seed,
            "calibration": calibration or {},
            "compress": [step],
            "block_recovery": block_recovery,
        },
        "compress()",
    )
    structure = analyse(model)
    plan = make_plan(structure, recipe.compress, Runner(model, structure).weight, seed)
    if recipe.block_recovery is not None:
        check_plan(plan)
    tokens = _tokens(model, tokenizer, recipe) if tokens is None else tokens
    section = recipe.calibration
    settings = Settings(
        section.batch_tokens, section.backward_samples, section.targets, seed,
        recipe.block_recovery, section.build_sampler(), section.stream_factory(), section.gram_factory(),
    )  # fmt: skip
    store = MemoryStore()
    with frozen(model):
        results = Engine(Runner(model, plan.structure), plan, tokens, store, settings, progress).run()
    layers = load_layers(results, store, model.dtype)
    for name, layer in layers.items():
        layer.to(model.get_submodule(name).weight.device)
    install(model, layers)
    attach(model)
    return model


def finetune_model(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    teacher: PreTrainedModel | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Training:
    """Trains a transformers model in place, by default its compressed factors alone; returns what the training did.

    tokens (sequences, length) int64; teacher: the dense model, for `loss: kd`, the default; options: keys of a
    recipe's `finetune` section. Checkpoints lie in `folder`, from which an interrupted call goes on, or in a temporary
    one. Training is float32; the weights return to their dtype.
    InputError for options that a recipe would be refused for; RunError for a loss that is not finite.
    """
    section = parse_section(Finetune, {"length": tokens.shape[1], **options}, "finetune_model()")
    device, dtype = model.device, model.dtype
    nn.Module.float(model)  # transformers' own refuses models of any quantizer, as a compressed one is
    with contextlib.nullcontext(folder) if folder else tempfile.TemporaryDirectory() as place:
        training = train(
            model, tokens, section, Path(place) / "training",
            teacher=teacher, seed=seed, device=device.type, progress=progress,
        )  # fmt: skip
    nn.Module.to(model, device=device, dtype=dtype)
    if has_own_format(model):
        attach(model)
    return training


def _tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, recipe: Recipe) -> Tensor:
    section = recipe.calibration
    if tokenizer is None:
        raise InputError("compress(): give a tokenizer that reads the calibration text, or `tokens`")
    if section.dataset == "self":
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return text.generate_text(lambda: model, start, section.samples, section.length, recipe.seed)
    tokens, note = calibration_tokens(section, model, tokenizer, recipe.seed)
    if note:
        log.info("%s", note)
    return tokens
