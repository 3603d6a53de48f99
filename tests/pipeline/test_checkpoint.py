"""A compressed checkpoint is a plain Hugging Face folder: every way of loading, casting and saving it."""

import json
import shutil

import pytest
import torch
from llmcompress_kernels import layout
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import llmcompress
from llmcompress import InputError, RunError
from llmcompress.checkpoint.verify import verify
from llmcompress.layers.low_rank import LowRankLinear
from tests.tiny import recipe, save_tiny, write_text

TOKENS = torch.arange(20, 52).reshape(2, 16)
SHARED = {"method": "basis_sharing", "layers": 3, "targets": ["attention", "ffn"]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tied model whose sites also share bases between blocks, in shards of a few kilobytes."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = save_tiny(folder / "model", "llama-tied")
    made = recipe(model, write_text(folder / "letters.txt"), folder / "out", **SHARED)
    llmcompress.apply(llmcompress.Recipe.parse({**made, "max_shard_size": "20KB"}))
    return folder / "out"


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(input_ids=tokens.to(model.device)).logits.cpu()


def test_folder_holds_what_users_expect(checkpoint):
    names = {path.name for path in checkpoint.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "recipe.yaml",
            "metrics.json", "README.md", "model.safetensors.index.json"} <= names  # fmt: skip
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert (
        llmcompress.Recipe.load(checkpoint / "recipe.yaml", ["output=elsewhere"]).compress[0].method == "basis_sharing"
    )


def test_files_hold_each_shared_tensor_once_and_what_the_report_counts(checkpoint):
    stored, total = {}, 0
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert name not in stored
                stored[name] = file.get_tensor(name)
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    sites = {site["name"]: site for site in metrics["sites"]}
    own = {name: t for name, t in stored.items() if name.rpartition(".")[0] in sites and not name.endswith(".bias")}
    bits = sum(8 * t.numel() * t.element_size() for t in own.values())
    assert bits == sum(site["stored_bits"] for site in sites.values())
    values = sum(t.numel() if t.is_floating_point() else t.numel() / 2 for t in own.values())
    assert values == metrics["size"]["targeted"]["compressed"] == sum(site["stored_values"] for site in sites.values())
    assert values <= 0.7 * metrics["size"]["targeted"]["dense"]
    total = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert total == metrics["size"]["bytes"]["compressed"]


def test_sites_share_one_parameter_after_loading_and_saving(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    for _ in range(2):
        layers = [block.mlp.gate_proj for block in model.model.layers]
        assert len({id(layer.A) for layer in layers}) == 1
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model.save_pretrained(tmp_path / "again")
        with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
            names = set(file.keys())
        assert "model.layers.0.mlp.gate_proj.A" in names
        assert "model.layers.1.mlp.gate_proj.A" not in names
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert torch.equal(logits(reloaded), logits(model))
        model = reloaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype_saves_and_reloads_bit_for_bit(checkpoint, tmp_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.model.layers[0].mlp.gate_proj.pivots.dtype == torch.uint8
    wanted = logits(model)
    reference = logits(AutoModelForCausalLM.from_pretrained(checkpoint)).float()
    assert float((wanted.float() - reference).norm() / reference.norm()) < 0.05
    model.save_pretrained(tmp_path / "cast")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cast", dtype="auto")
    assert again.dtype == dtype
    assert torch.equal(logits(again), wanted)


def test_factors_lie_by_columns_and_save_as_files_have_them(checkpoint, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    monkeypatch.setattr(layout, "arranged", lambda weight: weight)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    monkeypatch.undo()
    factors = [p for name, p in model.named_parameters() if name.endswith((".A", ".B", ".dictionary"))]
    assert factors
    assert all(p.stride(0) == 1 for p in factors)
    torch.testing.assert_close(logits(model), logits(plain))
    for name, either in (("arranged", model), ("plain", plain)):
        either.save_pretrained(tmp_path / name)
    arranged, rows = (tmp_path / name / "model.safetensors" for name in ("arranged", "plain"))
    assert arranged.read_bytes() == rows.read_bytes()


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_map(checkpoint, device_map):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=device_map)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(checkpoint)))


def test_compiled_model_agrees(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model))


def test_layers_compile_without_graph_breaks(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    layer = model.model.layers[1].mlp.up_proj
    assert isinstance(layer, LowRankLinear)
    x = torch.randn(3, 32)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_text_generation_pipeline(checkpoint):
    generate = pipeline("text-generation", model=str(checkpoint), device="cpu")
    assert isinstance(generate.model.model.layers[0].mlp.up_proj, LowRankLinear)
    text = generate("abcdef", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("abcdef")


def test_tokenizer_is_the_models(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer("az", add_special_tokens=False).input_ids == [4 + ord("a") - 32, 4 + ord("z") - 32]


def test_gradients_reach_factors_and_training_survives_a_save(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model(input_ids=TOKENS, labels=TOKENS).loss
    before.backward()
    shared = model.model.layers[0].mlp.gate_proj
    assert shared.A.grad.abs().sum() > 0
    assert shared.B.grad.abs().sum() > 0
    optimizer.step()
    after = model(input_ids=TOKENS, labels=TOKENS).loss
    assert after < before
    model.eval().save_pretrained(tmp_path / "trained")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "trained")), logits(model))


# --- corruption ------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def flip_byte(path, position=-3):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_verify_counts_the_files(checkpoint):
    assert verify(checkpoint) == len(list(checkpoint.glob("*.safetensors")))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_named_by_verify_and_by_loading(copy, damage):
    victim = sorted(copy.glob("*.safetensors"))[1]
    if damage == "flip":
        flip_byte(victim)
    elif damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-10])
    else:
        victim.unlink()
    with pytest.raises(RunError, match=victim.name):
        verify(copy)
    with pytest.raises((RunError, OSError), match=victim.name):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_foreign_tensor_file_is_named(copy):
    shutil.copy(sorted(copy.glob("*.safetensors"))[0], copy / "extra.safetensors")
    with pytest.raises(RunError, match=r"extra\.safetensors: not recorded in config\.json"):
        verify(copy)


def test_folders_that_are_no_checkpoint_are_refused(tmp_path, copy):
    with pytest.raises(InputError, match=r"not a checkpoint: it has no config\.json"):
        verify(tmp_path)
    (copy / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json: corrupt"):
        verify(copy)


def test_a_model_saved_over_its_own_checkpoint_loads(copy):
    model = AutoModelForCausalLM.from_pretrained(copy)
    model.model.embed_tokens.weight.data.mul_(1.5)
    for old in copy.glob("*.safetensors*"):
        old.unlink()
    model.save_pretrained(copy, max_shard_size="20KB")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(copy)), logits(model))
    with pytest.raises(InputError, match=r"config\.json: records no checksums"):
        verify(copy)


def test_bad_configs_are_refused_with_the_site(copy):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    name = "model.layers.0.mlp.gate_proj"
    good = dict(config["quantization_config"]["sites"][name])
    for change, message in [
        ({"rank": None}, rf"sites\.{name}: malformed"),
        ({"type": "low_rnk"}, "unknown layer 'low_rnk'; did you mean 'low_rank'"),
        ({"rank": 1000}, "rank must be between 1 and d_in = 32; got 1000"),
    ]:
        config["quantization_config"]["sites"][name] = {**good, **change}
        path.write_text(json.dumps(config))
        with pytest.raises(InputError, match=message):
            AutoModelForCausalLM.from_pretrained(copy)
    config["quantization_config"]["sites"][name] = good
    config["quantization_config"]["sites"]["model.layers.9.mlp"] = good
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"the model has no module model\.layers\.9\.mlp"):
        AutoModelForCausalLM.from_pretrained(copy)
    config["quantization_config"]["version"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="checkpoint format 2 is newer"):
        AutoModelForCausalLM.from_pretrained(copy)
