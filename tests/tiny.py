"""Tiny random models of every architecture that the tool knows, with a tokenizer, as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 120
COMMON: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}

#: name -> (model class, config class, changes to COMMON)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "attention_bias": True}),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 16}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 16}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "head_dim": 8, "sliding_window": 16}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {}),
    "opt": ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}),
    "bert": ("BertForMaskedLM", "BertConfig", {}),
}


def tiny_model(architecture: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model whose weights are large enough for its outputs to depend on its inputs."""
    model_name, config_name, own = ARCHITECTURES[architecture]
    config = getattr(transformers, config_name)(**{**COMMON, **own, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = getattr(transformers, model_name)(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            elif not parameter.any():  # biases: zeros would hide a lost one
                torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    letters = [chr(code) for code in range(32, 32 + VOCABULARY - len(special))]
    vocabulary = {token: index for index, token in enumerate([*special, *letters])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def save_tiny(folder: Path, architecture: str = "llama", shard: str = "5GB", **changes: Any) -> Path:
    """Writes `tiny_model(architecture, **changes)` and the tokenizer."""
    tiny_model(architecture, **changes).save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_text(path: Path, characters: int = 6000) -> Path:
    """Random letters, seeded."""
    codes = torch.randint(33, 120, (characters,), generator=torch.Generator().manual_seed(5))
    path.write_text("".join(chr(int(code)) for code in codes), encoding="utf-8")
    return path


def recipe(model: Path, text: Path, output: Path, **step: Any) -> dict[str, Any]:
    """A recipe of one step on a tiny model."""
    return {
        "model": str(model),
        "calibration": {"dataset": str(text), "samples": 12, "length": 16, "batch_tokens": 64},
        "compress": [{"method": "svd_llm", "ratio": 0.3, **step}],
        "output": str(output),
    }
