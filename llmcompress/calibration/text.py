"""Text sources and their packing into sequences.

A source is written `NAME` or `NAME:SPLIT`: `wikitext2` (or another hub data set), a local .txt, .jsonl or .parquet
file, `python-docs` (the help texts that every CPython carries) or `self` (text that the model generates).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.errors import InputError

FILE_TYPES = (".txt", ".jsonl", ".parquet")
#: short names of hub data sets: path, configuration
HUB = {"wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"), "c4": ("allenai/c4", "en")}


def read_documents(source: str, use: str, field: str = "text") -> list[str]:
    """The documents of a source; `use` ("calibration" or "evaluation") chooses the split where none is named.

    `field` is the column of a .jsonl, .parquet or hub data set that holds the text.
    InputError if the source is missing, empty, or has no such field or split.
    """
    documents = _read(source, use, field)
    if not any(document.strip() for document in documents):
        raise InputError(f"{source}: holds no text")
    return documents


def _read(source: str, use: str, field: str) -> list[str]:
    path = Path(source).expanduser()
    if path.suffix in FILE_TYPES:
        if not path.is_file():
            raise InputError(f"{source}: no such file")
        return _read_file(path, field)
    name, _, split = source.partition(":")
    if name == "python-docs":
        return python_docs(split or {"calibration": "train", "evaluation": "test"}[use])
    if path.exists():
        raise InputError(f"{source}: not a text source; expected a {', '.join(FILE_TYPES)} file")
    return _read_hub(name, split or {"calibration": "train", "evaluation": "test"}[use], field)


def _read_file(path: Path, field: str) -> list[str]:
    try:
        if path.suffix == ".txt":
            return [path.read_text(encoding="utf-8")]
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            return [json.loads(line)[field] for line in lines if line.strip()]
        import pyarrow.parquet

        return list(pyarrow.parquet.read_table(path, columns=[field])[field].to_pylist())
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON lines: {error.msg}") from None
    except (KeyError, TypeError):
        raise InputError(f"{path}: a record has no field '{field}'") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


def python_docs(split: str) -> list[str]:
    """CPython's help topics, sorted by name: `all`, or every second one (`train`, the others `test`)."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    parts = {"all": texts, "train": texts[::2], "test": texts[1::2]}
    if split not in parts:
        raise InputError(f"python-docs:{split}: no such split; there are {', '.join(parts)}")
    return ["\n\n".join(parts[split])]


def _read_hub(name: str, split: str, field: str) -> list[str]:
    from datasets import load_dataset

    path, config = HUB.get(name, (name, None))
    try:
        rows = load_dataset(path, config, split=split)
    except Exception as error:  # the library raises a wide family, down to plain ValueErrors of its back ends
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{name}: no local file of that name, and the hub did not give it: {reason}") from error
    if field not in rows.column_names:
        raise InputError(f"{name}: has no column '{field}'; it has {', '.join(rows.column_names)}")
    # WikiText comes in lines; joined, they are the running text that published perplexities use
    return ["\n\n".join(rows[field])] if name == "wikitext2" else list(rows[field])


def tokenize(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> Tensor:
    """One stream of token ids (n,) int64: no special tokens are added; documents are joined by the end token."""
    tokenizer.model_max_length = int(1e30)  # packing cuts sequences itself: no warning about long texts
    encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
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


def generate_text(
    load: Callable[[], PreTrainedModel], start: int, samples: int, length: int, seed: int, batch: int = 16
) -> Tensor:
    """Sequences drawn from the model's own distribution at temperature 1: (samples, length), seeded."""
    model = load()
    generator = torch.Generator(device=model.device).manual_seed(seed)
    drawn = []
    with torch.no_grad():
        for first in range(0, samples, batch):
            tokens = torch.full((min(batch, samples - first), 1), start, device=model.device)
            sequence, cache = [tokens], None
            for _ in range(length - 1):
                output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                probabilities = output.logits[:, -1].float().softmax(-1)
                tokens = torch.multinomial(probabilities, 1, generator=generator)
                sequence.append(tokens)
            drawn.append(torch.cat(sequence, 1).cpu())
    return torch.cat(drawn)
