"""From recipe to a reloaded checkpoint on a tiny model of every architecture."""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcompress
from llmcompress.calibration.collect import InputStatistics, capture_inputs
from llmcompress.calibration.text import pack, tokenize
from llmcompress.layers.base import StructuredLinear
from llmcompress.models.load import Location, StreamedModel, load_model
from llmcompress.models.runner import Runner
from llmcompress.models.structure import analyse
from tests.tiny import ARCHITECTURES, recipe, save_tiny, tiny_model, tiny_tokenizer, write_text

ROLES = {
    "llama": "q k v o gate up down", "llama-tied": "q k v o gate up down", "qwen2": "q k v o gate up down",
    "qwen3": "q k v o gate up down", "mistral": "q k v o gate up down", "gemma3": "q k v o gate up down",
    "phi3": "qkv o gate_up down", "gpt2": "qkv o up down", "opt": "q k v o up down", "gpt_neox": "qkv o up down",
    "bert": "q k v o up down",
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "letters.txt")


def outputs(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


TOKENS = torch.arange(20, 52).reshape(2, 16)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_block_has_every_role(architecture):
    structure = analyse(tiny_model(architecture))
    assert len(structure.blocks) == 3
    for index in range(3):
        sites = structure.in_block(index)
        assert [site.role for site in sites] == ROLES[architecture].split()
        inputs = {site.role: site.input for site in sites}
        for group in (("q", "k", "v"), ("gate", "up")):
            assert len({inputs[role] for role in group if role in inputs}) <= 1, "these read one tensor"
        assert len(set(inputs.values())) == 4, "attention and FFN have two inputs each"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_blocks_compute_what_the_model_computes(architecture, tmp_path, text):
    """Hidden states passed from block to block end in the model's own logits, and its inputs give the same Grams."""
    folder = save_tiny(tmp_path / "model", architecture)
    tokens = pack(tokenize(tiny_tokenizer(), [text.read_text()]), 6, 16, "text")
    model = load_model(Location(folder))
    structure = analyse(model)
    whole = InputStatistics(structure.sites, frozenset({"gram"}), torch.device("cpu"))
    with capture_inputs(model, structure.sites, whole.receive):
        logits = outputs(model, tokens)

    runner = Runner(StreamedModel(Location(folder), tmp_path / "scratch"), structure)
    parts = InputStatistics(structure.sites, frozenset({"gram"}), torch.device("cpu"))
    with runner.ends_loaded():
        runner.record_arguments(tokens)
        hidden = runner.embed(tokens)
    for index in range(3):
        sites = structure.in_block(index)
        with torch.no_grad(), runner.block_loaded(index), capture_inputs(runner.model, sites, parts.receive):
            hidden = runner.run_block(index, hidden)
    with torch.no_grad(), runner.ends_loaded():
        torch.testing.assert_close(runner.logits(tokens, hidden), logits)
    assert all(parameter.is_meta for parameter in runner.model.parameters()), "all is released"
    for name, found in whole.sums.items():
        torch.testing.assert_close(parts.sums[name].gram, found.gram)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compress_save_reload(architecture, tmp_path, text):
    folder = save_tiny(tmp_path / "model", architecture)
    outcome = llmcompress.apply(llmcompress.Recipe.parse(recipe(folder, text, tmp_path / "out")))
    assert 0.3 <= outcome.metrics["size"]["targeted"]["removed"] < 0.45  # ranks of tiny matrices are coarse
    assert all(site["spec"] for site in outcome.metrics["sites"])

    loaded = load_model(Location(tmp_path / "out"))
    assert isinstance(loaded, type(tiny_model(architecture)))
    dense = outputs(load_model(Location(folder)), TOKENS)
    logits = outputs(loaded, TOKENS)
    assert torch.isfinite(logits).all()
    relative = float((logits - dense).norm() / dense.norm())
    assert 1e-3 < relative < 1, "something was removed, and not everything"

    in_memory = llmcompress.compress(
        tiny_model(architecture), tiny_tokenizer(), ratio=0.3,
        calibration={"dataset": str(text), "samples": 12, "length": 16, "batch_tokens": 64},
    )  # fmt: skip
    assert torch.equal(outputs(in_memory, TOKENS), logits), "the same bits before saving"

    loaded.save_pretrained(tmp_path / "again")
    again = load_model(Location(tmp_path / "again"))
    assert torch.equal(outputs(again, TOKENS), logits)
    assert sum(isinstance(m, StructuredLinear) for m in again.modules()) == len(outcome.metrics["sites"])


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "bert"])
def test_generates_the_same_with_and_without_a_cache(architecture, tmp_path, text):
    folder = save_tiny(tmp_path / "model", architecture)
    llmcompress.apply(llmcompress.Recipe.parse(recipe(folder, text, tmp_path / "out")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = AutoTokenizer.from_pretrained(tmp_path / "out")("abc", return_tensors="pt").input_ids
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(prompt, use_cache=True, **options)
    assert cached.shape == (1, prompt.shape[1] + 8)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))


def test_mixture_of_experts_stays_dense_and_is_listed(tmp_path, text):
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=120, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    outcome = llmcompress.apply(
        llmcompress.Recipe.parse(recipe(tmp_path / "model", text, tmp_path / "out", targets="attention"))
    )
    assert {site["role"] for site in outcome.metrics["sites"]} == {"q", "k", "v", "o"}
    experts = [name for name, reason in outcome.metrics["dense_sites"].items() if "experts" in reason]
    assert any("layers.0" in name for name in experts)
    assert any("layers.1" in name for name in experts)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(outputs(model, TOKENS)).all()


def test_compressed_config_lists_each_structured_site(tmp_path, text):
    folder = save_tiny(tmp_path / "model")
    llmcompress.apply(llmcompress.Recipe.parse(recipe(folder, text, tmp_path / "out", targets="ffn")))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "llmcompress"
    assert config["version"] == 1
    assert len(config["sites"]) == 9
    assert {spec["type"] for spec in config["sites"].values()} == {"low_rank"}
