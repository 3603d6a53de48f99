"""Text sources as windows of tokens, with the bytes that each token stands for."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmcompress.calibration.text import read_documents, tokenize
from llmcompress_eval.perplexity import Windows, windows


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    sources: list[str],
    length: int,
    count: int | None,
    field: str,
    stride: int | None = None,
) -> dict[str, Windows]:
    """The windows of each text source. InputError for a source that is missing, empty or too short."""
    found = {}
    for source in sources:
        documents = read_documents(source, "evaluation", field)
        tokens = windows(tokenize(tokenizer, documents), length, count, source, stride)
        sizes = token_bytes(tokenizer, documents)
        sized = None if sizes is None else windows(sizes, length, count, source, stride)
        found[source] = Windows(tokens, stride or length, sized)
    return found


def token_bytes(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> Tensor | None:
    """UTF-8 bytes of text that each token of `tokenize`'s stream stands for: (n,) int64.

    A token takes the text from the end of the one before it; of a character cut into several tokens, the first has
    its bytes. The token that joins documents has none. None if the tokenizer does not say where its tokens stand.
    """
    if not tokenizer.is_fast:
        return None
    spans = tokenizer(documents, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    joined = tokenizer.eos_token_id is not None or tokenizer.sep_token_id is not None
    sizes: list[int] = []
    for index, (document, offsets) in enumerate(zip(documents, spans["offset_mapping"], strict=True)):
        if index and joined:
            sizes.append(0)
        before = 0
        for _, end in offsets:
            sizes.append(len(document[before:end].encode()))
            before = max(before, end)
    return torch.tensor(sizes, dtype=torch.long)
