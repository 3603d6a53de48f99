"""Text sources and their packing into sequences.

A source is written `NAME` or `NAME:SPLIT`: `wikitext2` (or another hub data set), a local .txt, .jsonl or .parquet
file, `python-docs` (the help texts that every CPython carries) or `self` (text that the model generates).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.calibration.modes import evaluation_mode
from llmcompress.errors import InputError, RunError, one_line

FILE_TYPES = (".txt", ".jsonl", ".parquet")
#: short names of hub data sets: path, configuration
HUB = {"wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"), "c4": ("allenai/c4", "en")}


def read_documents(source: str, use: str, field: str = "text") -> list[str]:
    """The documents of a source; `use` ("calibration" or "evaluation") chooses the split where none is named.

    `field` is the column of a .jsonl, .parquet or hub data set that holds the text.
    InputError if the source is missing, empty, or has no such field or split.
    """
    documents = _read(source, use, field)
    wrong = next((document for document in documents if not isinstance(document, str)), "")
    if not isinstance(wrong, str):
        raise InputError(f"{source}: field '{field}' of a record holds {type(wrong).__name__}, not text")
    if not any(document.strip() for document in documents):
        raise InputError(f"{source}: holds no text")
    return documents


def _read(source: str, use: str, field: str) -> list[str]:
    try:
        path = Path(source).expanduser()
        is_file, exists = path.is_file(), path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, an unknown ~user
        raise InputError(f"{source}: cannot be a text source: {error}") from None
    if path.suffix in FILE_TYPES:
        if not is_file:
            raise InputError(f"{source}: no such file")
        return _read_file(path, field)
    name, _, split = source.partition(":")
    if name == "self":
        raise InputError("self: text that the model generates serves for calibration, not for evaluation")
    if name == "python-docs":
        return python_docs(split or {"calibration": "train", "evaluation": "test"}[use])
    if exists:
        raise InputError(f"{source}: not a text source; expected a {', '.join(FILE_TYPES)} file")
    return _read_hub(name, split or {"calibration": "train", "evaluation": "test"}[use], field)


def _read_file(path: Path, field: str) -> list[str]:
    try:
        if path.suffix == ".txt":
            return [path.read_text(encoding="utf-8")]
        if path.suffix == ".jsonl":
            return _read_lines(path, field)
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise InputError(f"{path}: has no column '{field}'; it has {', '.join(file.schema_arrow.names)}")
            return list(file.read(columns=[field])[field].to_pylist())
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {_first_line(error)}") from None


def _read_lines(path: Path, field: str) -> list[str]:
    documents = []
    # not splitlines(), which also splits at U+2028 and the like: JSON allows those within a string
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            documents.append(json.loads(line)[field])
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: line {number} is not JSON: {error.msg}") from None
        except (KeyError, TypeError, IndexError):
            raise InputError(f"{path}: line {number} has no field '{field}'") from None
    return documents


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def python_docs(split: str) -> list[str]:
    """CPython's help topics, sorted by name: `all`, or every second one (`train`, the others `test`).

    Topics quote one another: a paragraph stands in the first of them alone, so that the splits share no text.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    texts = [text for name in sorted(topics) if (text := _unseen_paragraphs(topics[name], seen))]
    parts = {"all": texts, "train": texts[::2], "test": texts[1::2]}
    if split not in parts:
        raise InputError(f"python-docs:{split}: no such split; there are {', '.join(parts)}")
    return ["\n\n".join(parts[split])]


def _unseen_paragraphs(text: str, seen: set[str]) -> str:
    fresh = []
    for paragraph in text.split("\n\n"):
        words = one_line(paragraph)
        if words not in seen:
            fresh.append(paragraph)
            seen.add(words)
    return "\n\n".join(fresh).strip("\n")


def _read_hub(name: str, split: str, field: str) -> list[str]:
    from datasets import load_dataset

    path, config = HUB.get(name, (name, None))
    try:
        rows = load_dataset(path, config, split=split)
    except Exception as error:  # the library raises a wide family, down to plain ValueErrors of its back ends
        raise InputError(
            f"{name}: no local file of that name, and the hub did not give it: {_first_line(error)}"
        ) from error
    if field not in rows.column_names:
        raise InputError(f"{name}: has no column '{field}'; it has {', '.join(rows.column_names)}")
    # WikiText comes in lines; joined, they are the running text that published perplexities use
    return ["\n\n".join(rows[field])] if name == "wikitext2" else list(rows[field])


def tokenize(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> Tensor:
    """One stream of token ids (n,) int64: no special tokens are added; documents are joined by the end token."""
    # packing cuts sequences itself: no warning about long texts
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    stream: list[int] = []
    for index, ids in enumerate(encoded):
        if index and end is not None:
            stream.append(end)
        stream.extend(ids)
    return torch.tensor(stream, dtype=torch.long)


def pack(stream: Tensor, samples: int, length: int, source: str) -> Tensor:
    """The first `samples` sequences of `length` tokens, fewer if the text ends: (sequences, length).

    InputError if there is not even one.
    """
    available = stream.numel() // length
    if available < 1:
        raise InputError(f"{source}: {stream.numel()} tokens, fewer than one sequence of {length}")
    count = min(samples, available)
    return stream[: count * length].reshape(count, length)


def check_context(model: nn.Module, length: int, what: str) -> None:
    """InputError, beginning with `what`, if `length` tokens are more than the model's context."""
    context = getattr(model.config, "max_position_embeddings", None)
    if isinstance(context, int) and length > context:
        raise InputError(f"{what} of {length} tokens exceeds the model's context of {context}")


def check_vocabulary(model: nn.Module, tokens: Tensor) -> None:
    """InputError if a token id is not in the model's vocabulary."""
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    if tokens.max() >= vocabulary:
        raise InputError(f"the tokenizer gives token {int(tokens.max())}, the model knows {vocabulary}: not its own")


def generate_text(
    load: Callable[[], PreTrainedModel], start: int | None, samples: int, length: int, seed: int, batch: int = 16
) -> Tensor:
    """Sequences drawn from the model's own distribution at temperature 1: (samples, length) int64, seeded.

    start: the first token of each. InputError if there is none, if the model is no causal one, or if its context is
    shorter than `length`; RunError if its logits are not finite.
    """
    model = load()
    if not model.can_generate():
        raise InputError(f"self: {type(model).__name__} generates no text; name another text source")
    if start is None:
        raise InputError("self: the tokenizer has neither a first nor an end token to start from; name another source")
    check_context(model, length, "self: a sequence")
    generator = torch.Generator(device=model.device).manual_seed(seed)
    counts = [min(batch, samples - first) for first in range(0, samples, batch)]
    with evaluation_mode(model):
        return torch.cat([_generate(model, start, count, length, generator) for count in counts])


@torch.no_grad()
def _generate(model: PreTrainedModel, start: int, count: int, length: int, generator: torch.Generator) -> Tensor:
    tokens = torch.full((count, 1), start, device=model.device)
    sequence, cache = [tokens], None
    for _ in range(length - 1):
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float()
        if not torch.isfinite(logits).all():
            raise RunError("self: the model's logits are not finite")
        tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        sequence.append(tokens)
    return torch.cat(sequence, 1).cpu()
