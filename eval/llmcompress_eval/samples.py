"""What models write: greedy continuations of the same text, side by side."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.models.load import quiet_transformers
from llmcompress_eval.perplexity import Windows


def continuations(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    windows: Windows,
    count: int,
    prompt: int = 32,
    new_tokens: int = 48,
) -> list[dict[str, str]]:
    """For `count` windows, spread over the text: {"prompt": its first tokens, model name: what the model adds}."""
    chosen = [len(windows) * index // count for index in range(min(count, len(windows)))]
    prompt = min(prompt, windows.length // 2)
    found = []
    for index in chosen:
        start = windows.tokens[index : index + 1, :prompt]
        entry = {"prompt": str(tokenizer.decode(start[0], skip_special_tokens=True))}
        for name, model in models.items():
            tokens = start.to(model.device)
            room = getattr(model.config, "max_position_embeddings", prompt + new_tokens) - prompt
            with torch.no_grad(), quiet_transformers():
                output = model.generate(
                    tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
                    max_new_tokens=min(new_tokens, room), pad_token_id=tokenizer.pad_token_id or 0,
                )  # fmt: skip
            entry[name] = str(tokenizer.decode(output[0, prompt:], skip_special_tokens=True))
        found.append(entry)
    return found
