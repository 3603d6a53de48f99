"""The sequences that are trained on, and those held out."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from llmcompress.calibration import text
from llmcompress.errors import InputError, one_line
from llmcompress.models.load import Location
from llmcompress.recipe import Finetune


def read_tokens(section: Finetune, fallback: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Packed sequences (rows, length) int64 of the section's text source, or of `fallback` if it names none.

    InputError if the text is shorter than a sequence.
    """
    source = section.dataset or fallback
    if source == "self":
        raise InputError("finetune.dataset: fine-tuning needs a text; self serves for calibration")
    stream = text.tokenize(tokenizer, text.read_documents(source, "calibration", section.field))
    rows: Tensor = text.pack(stream, section.samples or stream.numel(), section.length, source)
    return rows


def split(tokens: Tensor, validation: int) -> tuple[Tensor, Tensor | None]:
    """Sequences to train on, and the last ones, `validation` of them or a tenth, that are held out; None for 0."""
    held_out = min(validation, max(1, len(tokens) // 10))
    if not held_out:
        return tokens, None
    if len(tokens) < 2:
        raise InputError("finetune: the text gives one sequence, which leaves none to hold out; set validation: 0")
    return tokens[:-held_out], tokens[-held_out:]


def check_tokens(model: nn.Module, tokens: Tensor) -> None:
    """InputError if the sequences exceed the model's context or vocabulary."""
    text.check_context(model, tokens.shape[1], "finetune.length: a sequence")
    text.check_vocabulary(model, tokens)


def check_teacher(own: PretrainedConfig, teacher: PretrainedConfig) -> None:
    """InputError unless both models give a logit to the same number of tokens."""
    if own.vocab_size != teacher.vocab_size:
        raise InputError(
            f"finetune.teacher: its vocabulary has {teacher.vocab_size} tokens, the model's {own.vocab_size}; "
            "distillation compares logits token by token: name a teacher of the same tokenizer, or use loss: ce"
        )


def teacher_config(location: Location) -> PretrainedConfig:
    """InputError if the config is not usable."""
    try:
        return AutoConfig.from_pretrained(location.folder, **({"gguf_file": location.gguf} if location.gguf else {}))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"finetune.teacher: its config is not usable: {one_line(str(error))}") from error
