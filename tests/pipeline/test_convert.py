"""Layers that a recipe's `convert` changes or adds: trained, saved, reloaded, and refused in one line."""

import json

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from llmcompress import InputError, Recipe, apply
from llmcompress.finetune.command import FinetuneRecipe, finetune_checkpoint
from llmcompress.layers.converted import converted_modules
from llmcompress.models.load import Location, load_model
from tests.tiny import VOCABULARY, recipe, save_tiny, tiny_tokenizer, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "letters.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama") / "model", "llama")


@pytest.fixture(scope="module")
def mamba(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mamba") / "model"
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, bos_token_id=1)
    MambaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def training(**changes):
    return {"steps": 6, "length": 16, "batch": 4, "lr": 1e-2, "validation": 4, "loss": "ce", **changes}


def test_adapters_are_trained_beside_compressed_layers(llama, text, tmp_path):
    given = recipe(llama, text, tmp_path / "out") | {
        "convert": [{"name": "ptd", "layers": [1], "d_state": 4}],
        "finetune": training(method="lrc"),
    }
    outcome = apply(Recipe.parse(given))
    assert outcome.metrics["finetune"]["kept"] > 0
    model = load_model(Location(tmp_path / "out"))
    assert list(converted_modules(model)) == ["model.layers.1"]
    assert model.model.layers[1].ssm_adapter.out.weight.any()
    noted = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert noted["converted"]["model.layers.1"]["init"] == "s5-ptd"
    assert noted["sites"]
    trained = outcome.metrics["finetune"]["trained_values"]
    adapters = sum(p.numel() for p in model.model.layers[1].ssm_adapter.parameters())
    plain = apply(Recipe.parse({**given, "convert": [], "output": str(tmp_path / "plain")}))
    assert trained - plain.metrics["finetune"]["trained_values"] == adapters
    tokens = torch.randint(3, 100, (1, 8))
    for loaded in (model, load_model(Location(tmp_path / "plain"))):
        loaded.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None)


def finetune(model, text, output, **changes):
    return {"model": str(model), "output": str(output), "calibration": {"dataset": str(text)},
            "finetune": training(method="full"), **changes}  # fmt: skip


def test_adapters_alone_are_trained_on_a_dense_model(llama, text, tmp_path):
    """Method lrc has nothing else to train there; all other weights stay."""
    given = finetune(llama, text, tmp_path / "out", convert=[{"name": "ptd", "init": "s4-ptd", "d_state": 4}])
    given["finetune"]["method"] = "lrc"
    finetune_checkpoint(str(llama), FinetuneRecipe.parse(given))
    before, after = load_model(Location(llama)).state_dict(), load_model(Location(tmp_path / "out")).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert {name.split(".")[3] for name in set(after) - set(before)} == {"ssm_adapter"}


def test_the_range_rises_while_a_recurrent_model_trains(mamba, text, tmp_path):
    convert = [{"name": "negative_eigenvalues", "scale": 2.0, "anneal": 0.5}]
    given = finetune(mamba, text, tmp_path / "out", convert=convert)
    outcome = finetune_checkpoint(str(mamba), FinetuneRecipe.parse(given))
    assert outcome.metrics["finetune"]["kept"] > 0
    model = load_model(Location(tmp_path / "out"))
    scales = {spec["scale"] for spec in converted_modules(model).values()}
    assert scales == {2.0}


def test_training_that_gains_nothing_leaves_the_range_as_it_was(mamba, text, tmp_path):
    convert = [{"name": "negative_eigenvalues", "anneal": 0.5}]
    given = finetune(mamba, text, tmp_path / "out", convert=convert)
    given["finetune"] |= {"lr": 3.0, "clip": 0.0, "warmup": 0.0, "evaluate_every": 6}
    outcome = finetune_checkpoint(str(mamba), FinetuneRecipe.parse(given))
    assert outcome.metrics["finetune"]["kept"] == 0
    model = load_model(Location(tmp_path / "out"))
    assert {spec["scale"] for spec in converted_modules(model).values()} == {1.0}
    tokens = torch.randint(3, 100, (2, 9))
    with torch.no_grad():
        expected = load_model(Location(mamba))(input_ids=tokens).logits
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"convert": ["ptd"]}, "recipe: convert: what it changes has to be trained"),
        ({"convert": ["ptd"], "finetune": {"method": "lora"}}, "finetune by method full or lrc"),
        ({"convert": ["pdt"], "finetune": {}}, r"recipe: convert\.0: unknown layer 'pdt'; did you mean 'ptd'\?"),
        ({"convert": [{"name": "ptd", "dstate": 3}], "finetune": {}}, r"convert\.0\.dstate: unknown key; .* 'd_state'"),
        (
            {"convert": [{"name": "negative_eigenvalues", "scale": 3}], "finetune": {}},
            r"convert\.0\.scale: input",
        ),
        ({"convert": ["volume"], "finetune": {}}, r"convert\.0: unknown layer 'volume'"),
    ],
)
def test_bad_choices_are_named(change, message):
    base = {"model": "m", "output": "o", "compress": [{"method": "svd_llm"}]}
    with pytest.raises(InputError, match=message):
        Recipe.parse(base | change)


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        ({"name": "negative_eigenvalues"}, r"^convert\.0: no layer whose range can be extended; .*LlamaAttention"),
        ({"name": "ptd", "layers": [7]}, r"^convert\.0: layers: 7 is no block of this model; it has 0\.\.2"),
        ({"name": "ptd", "dt_min": 1.0}, r"^convert\.0: dt_min must be positive and at most dt_max"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_compressed(convert, message, llama, text, tmp_path):
    given = recipe(llama, text, tmp_path / "out") | {"convert": [convert], "finetune": training(method="lrc")}
    with pytest.raises(InputError, match=message):
        apply(Recipe.parse(given))
    assert not any(tmp_path.iterdir())
