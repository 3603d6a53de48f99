"""The pipeline's ways through a model: methods, allocations, propagation, refusals, and what is left behind."""

import json
import re

import pytest
import torch

import llmcompress
from llmcompress import InputError, Recipe, RunError, catalog
from llmcompress.calibration.fisher import FisherAccumulator
from llmcompress.compressors.svd_llm import svd_llm_factorize
from llmcompress.dry_run import plan_tables
from llmcompress.engine import Engine
from llmcompress.measurement import Settings
from llmcompress.models.load import Location, load_model
from llmcompress.models.runner import Runner
from llmcompress.models.structure import analyse
from llmcompress.pipeline import Pipeline
from llmcompress.plan import make_plan
from llmcompress.progress import Silent
from llmcompress.workspace import MemoryStore
from tests.tiny import recipe, save_tiny, tiny_model, tiny_tokenizer, write_text

TOKENS = torch.arange(20, 52).reshape(2, 16)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "letters.txt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "llama", "llama")


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def files(path):
    """Contents of all files of a folder, by relative name."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


# --- every method ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", catalog.names("compressor"))
@pytest.mark.parametrize("allocation", ["uniform", "svd_llm_v2"])
def test_every_method_keeps_the_budget_and_reloads_bit_for_bit(method, allocation, folder, text, tmp_path):
    data = recipe(folder, text, tmp_path / "out", method=method, ratio=0.4, allocation=allocation)
    outcome = llmcompress.apply(Recipe.parse(data))
    size = outcome.metrics["size"]["targeted"]
    assert size["compressed"] <= 0.6 * size["dense"]
    saved = load_model(Location(tmp_path / "out"))
    step = {key: value for key, value in data["compress"][0].items() if key not in ("method", "ratio")}
    in_memory = llmcompress.compress(
        tiny_model(), tiny_tokenizer(), method=method, ratio=0.4, calibration=data["calibration"], **step
    )
    assert torch.equal(logits(saved), logits(in_memory))


def test_two_steps_compress_their_own_sites(folder, text, tmp_path):
    data = recipe(folder, text, tmp_path / "out")
    data["compress"] = [
        {"method": "svd", "ratio": 0.2, "targets": "attention"},
        {"method": "svd_llm", "ratio": 0.5, "targets": ["gate", r"layers\.1\.mlp\.up"]},
    ]
    sites = llmcompress.apply(Recipe.parse(data)).metrics["sites"]
    assert {(s["method"], s["role"]) for s in sites} == {
        ("svd", "q"), ("svd", "k"), ("svd", "v"), ("svd", "o"), ("svd_llm", "gate"), ("svd_llm", "up"),
    }  # fmt: skip
    assert [s["name"] for s in sites if s["role"] == "up"] == ["model.layers.1.mlp.up_proj"]


# --- propagation, against doing it by hand ---------------------------------------------------------------------------


def run_engine(model, tokens, **step):
    plan = make_plan(analyse(model), Recipe.parse(recipe("m", "t", "o", **step)).compress)
    store = MemoryStore()
    results = Engine(Runner(model, plan.structure), plan, tokens, store, Settings(batch_tokens=32)).run()
    return results, store


def input_gram(model, tokens, module):
    """Gram of the inputs of one linear map, float64."""
    found = []
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0].detach().flatten(0, 1).double()))
    with torch.no_grad():
        model(input_ids=tokens)
    handle.remove()
    return found[0].T @ found[0]


def test_propagation_calibrates_each_block_on_the_compressed_prefix():
    """A block's first sites read what the compressed blocks before it made, which the finished model still makes."""
    tokens = torch.randint(4, 120, (10, 16), generator=torch.Generator().manual_seed(3))
    weights = [layer.self_attn.q_proj.weight.detach() for layer in tiny_model().model.layers]
    followed = llmcompress.compress(tiny_model(), tokens=tokens, ratio=0.5, propagate=True)
    unfollowed = llmcompress.compress(tiny_model(), tokens=tokens, ratio=0.5)
    for block, weight in enumerate(weights):
        found, other = (model.model.layers[block].self_attn.q_proj for model in (followed, unfollowed))
        gram = input_gram(followed, tokens, found)
        expected = svd_llm_factorize(weight, gram, found.rank).to_dense()
        torch.testing.assert_close(found.to_dense().detach().double(), expected, rtol=0, atol=1e-4)
        assert float((other.to_dense().detach() - expected).norm()) > 0.1 or block == 0


def test_refit_needs_the_compressed_prefix(folder, text, tmp_path):
    with pytest.raises(InputError, match="refit: needs propagate: true"):
        llmcompress.apply(Recipe.parse(recipe(folder, text, tmp_path / "out", refit=True)))


def test_refit_lowers_the_error_of_the_last_hidden_state():
    tokens = torch.randint(4, 120, (24, 16), generator=torch.Generator().manual_seed(3))

    def hidden(model):
        with torch.no_grad():
            return model.model(input_ids=tokens).last_hidden_state

    wanted = hidden(tiny_model())
    error = {}
    for refit in (False, True):
        model = llmcompress.compress(tiny_model(), tokens=tokens, ratio=0.4, propagate=True, refit=refit)
        error[refit] = float((hidden(model) - wanted).norm())
    assert error[True] < error[False]


def test_sharing_between_blocks_cannot_propagate(folder, text, tmp_path):
    data = recipe(folder, text, tmp_path / "out", method="basis_sharing", propagate=True)
    with pytest.raises(InputError, match="propagate: a method that shares factors between blocks"):
        llmcompress.apply(Recipe.parse(data))


# --- statistics by block-wise backward -------------------------------------------------------------------------------


def test_blockwise_fisher_is_that_of_the_whole_model():
    model = tiny_model()
    tokens = torch.randint(4, 120, (6, 16), generator=torch.Generator().manual_seed(3))
    plan = make_plan(analyse(model), Recipe.parse(recipe("m", "t", "o", method="fwsvd", weighting="both")).compress)
    engine = Engine(Runner(model, plan.structure), plan, tokens, MemoryStore(), Settings(batch_tokens=32))
    engine.dense.embed()
    engine.dense.measure()
    with FisherAccumulator(model, plan.sites) as whole:
        whole.update({"input_ids": tokens})
    for site in plan.sites:
        found = engine.dense.stored("gradients", site.block)[site.name]
        torch.testing.assert_close(found.row_fisher / found.sequences, whole.row_weights[site.name], rtol=1e-4, atol=0)
        torch.testing.assert_close(
            found.column_fisher / found.sequences, whole.column_weights[site.name], rtol=1e-4, atol=0
        )


def test_sampled_targets_are_seeded_and_differ_from_the_labels(folder, text, tmp_path):
    def run(name, **calibration):
        data = recipe(folder, text, tmp_path / name, method="fwsvd")
        data["calibration"] |= calibration
        llmcompress.apply(Recipe.parse(data))
        return (tmp_path / name / "model.safetensors").read_bytes()

    assert run("a", targets="sampled") == run("b", targets="sampled")
    assert run("c", targets="labels") != run("a", targets="sampled")
    assert run("d", backward_samples=2) != run("c", backward_samples=None)


# --- the same again --------------------------------------------------------------------------------------------------


def test_same_recipe_same_bytes_whatever_the_batch_and_the_place(folder, text, tmp_path):
    for name in ("a", "b"):
        data = recipe(folder, text, tmp_path / name)
        data["eval"] = {"perplexity": [str(text)], "length": 16, "windows": 4}
        llmcompress.apply(Recipe.parse(data))
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_finished_run_is_not_run_again(folder, text, tmp_path, monkeypatch):
    made = Recipe.parse(recipe(folder, text, tmp_path / "out"))
    first = llmcompress.apply(made)
    before = files(tmp_path / "out")
    monkeypatch.setattr(Engine, "run", lambda self: pytest.fail("compressed again"))
    second = llmcompress.apply(made)
    assert second.metrics == json.loads(json.dumps(first.metrics))
    assert files(tmp_path / "out") == before


def test_another_evaluation_measures_without_compressing_again(folder, text, tmp_path, monkeypatch):
    data = recipe(folder, text, tmp_path / "out")
    llmcompress.apply(Recipe.parse(data))
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr(Engine, "run", lambda self: pytest.fail("compressed again"))
    data["eval"] = {"perplexity": [str(text)], "length": 16, "windows": 4}
    outcome = llmcompress.apply(Recipe.parse(data))
    found = outcome.metrics["perplexity"][str(text)]
    assert found["compressed"]["perplexity"] != found["dense"]["perplexity"]
    assert found["dense"]["windows"] == 4
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == json.loads(json.dumps(outcome.metrics))
    assert "perplexity" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "no work folder is left"


def test_a_finished_folder_is_not_overwritten_by_another_recipe(folder, text, tmp_path):
    data = recipe(folder, text, tmp_path / "out")
    llmcompress.apply(Recipe.parse(data))
    before = files(tmp_path / "out")
    data["compress"][0]["ratio"] = 0.5
    with pytest.raises(InputError, match=r"output: .*out holds something else already"):
        llmcompress.apply(Recipe.parse(data))
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("change", ["ratio", "text", "model"])
def test_changed_input_is_noticed(change, text, tmp_path):
    """Unfinished work of a run is not used for another one, and goes when that one is done."""
    model, letters = save_tiny(tmp_path / "model"), write_text(tmp_path / "letters.txt")
    data = recipe(model, letters, tmp_path / "out")
    runs = [Pipeline(Recipe.parse(data), Silent())]
    runs[0].work.mkdir()
    (runs[0].work / "leftover").touch()
    if change == "ratio":
        data["compress"][0]["ratio"] = 0.31
    elif change == "text":
        write_text(letters, 5000)
    else:
        save_tiny(tmp_path / "model", rms_norm_eps=1e-3)
    assert Pipeline(Recipe.parse(data), Silent()).work != runs[0].work
    llmcompress.apply(Recipe.parse(data))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["letters.txt", "model", "out"]


# --- bad input: one line, nothing written ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compress": [{"method": "svd", "targets": ["gaet"]}]}, "compress.0.targets: 'gaet' matches no linear map of "
         "the blocks; did you mean 'gate'?"),
        ({"compress": [{"method": "svd", "targets": ["("]}]}, "compress.0.targets: '(' is neither a role nor a"),
        ({"compress": [{"method": "svd"}, {"method": "svd_llm", "targets": "q"}]},
         "compress.1.targets: model.layers.0.self_attn.q_proj belongs to compress.0 already"),
        ({"compress": [{"method": "svd", "ratio": 0.99}]}, "is below rank 1"),
        ({"calibration": {"dataset": "nowhere.txt"}}, "nowhere.txt: no such file"),
        ({"calibration": {"dataset": "TEXT", "length": 9000}},
         "calibration.length: a sequence of 9000 tokens exceeds the model's context of 64"),
        ({"eval": {"perplexity": ["nowhere.txt"], "length": 16}}, "nowhere.txt: no such file"),
        ({"eval": {"perplexity": ["TEXT"], "length": 65}}, "a window of 65 tokens exceeds the model's context of 64"),
        ({"model": "no/such/model"}, "model: no folder, no .gguf file and no hub id: no/such/model"),
        ({"model": "no/model"}, "model: no/model is no local folder, and the hub did not give it"),
        ({"model": "x.gguf"}, "model: no file x.gguf"),
        ({"model": "builtin:gpt5"}, "model: unknown 'builtin:gpt5'"),
        ({"device": "cuda:7"}, "device: 'cuda:7', but torch finds no GPU"),
        ({"device": "tpu"}, "device: 'tpu'; expected auto, cpu, cuda"),
    ],
)  # fmt: skip
def test_bad_input_leaves_nothing_behind(change, message, folder, text, tmp_path):
    data = recipe(folder, text, tmp_path / "out")
    for key, value in change.items():
        text_in = json.loads(json.dumps(value).replace("TEXT", str(text)))
        data[key] = {**data[key], **text_in} if isinstance(value, dict) and key in data else text_in
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        llmcompress.apply(Recipe.parse(data))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_model_folders_that_are_none(tmp_path, text):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=r"empty is not a model folder: it has no config\.json"):
        llmcompress.apply(Recipe.parse(recipe(empty, text, tmp_path / "out")))
    (empty / "config.json").write_text("{}")
    with pytest.raises(InputError, match="only safetensors weights are loaded"):
        llmcompress.apply(Recipe.parse(recipe(empty, text, tmp_path / "out")))


def test_output_that_is_taken(folder, text, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file; name a folder"):
        llmcompress.apply(Recipe.parse(recipe(folder, text, tmp_path / "file")))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="full holds something else already"):
        llmcompress.apply(Recipe.parse(recipe(folder, text, tmp_path / "full")))
    assert (tmp_path / "full" / "thesis.tex").read_text() == "years of work"


def test_weights_that_are_not_finite_are_named(text, tmp_path):
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 2] = torch.nan
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    data = recipe(tmp_path / "model", text, tmp_path / "out", method="svd")
    with pytest.raises((InputError, RunError), match=r"model\.layers\.1"):
        llmcompress.apply(Recipe.parse(data))


def test_activations_that_are_not_finite_are_named(text, tmp_path):
    model = tiny_model()
    model.model.layers[1].mlp.gate_proj.weight.data[:] = 3e38
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(RunError, match=r"model\.layers\.1\.mlp\.down_proj: its input is not finite"):
        llmcompress.apply(Recipe.parse(recipe(tmp_path / "model", text, tmp_path / "out")))


# --- dry run, in memory ----------------------------------------------------------------------------------------------


def test_dry_run_prints_the_plan_and_writes_nothing(folder, text, tmp_path):
    tables = plan_tables(Recipe.parse(recipe(folder, text, tmp_path / "out")))
    lines = [line for line in tables if isinstance(line, str)]
    assert any("removed" in line for line in lines)
    assert any("min here" in line for line in lines)
    assert tables[0].row_count == 21
    planned = float(re.search(r"([\d,]+) stored \(", "\n".join(lines))[1].replace(",", ""))
    outcome = llmcompress.apply(Recipe.parse(recipe(folder, text, tmp_path / "out")))
    assert planned == pytest.approx(outcome.metrics["size"]["targeted"]["compressed"], abs=1)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_compress_in_memory_changes_nothing_when_it_refuses():
    model = tiny_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    tokens = torch.randint(4, 120, (4, 16))
    for options, message in [
        ({"method": "cospady"}, "unknown method 'cospady'"),
        ({"ratio": 1.5}, "compress.0.ratio: input should be less than 1; got 1.5"),
        ({"rato": 0.3}, "compress.0.rato: unknown key; did you mean 'ratio'?"),
        ({"targets": ["mlp.nothing"]}, "matches no linear map"),
    ]:
        with pytest.raises(InputError, match=re.escape(message)):
            llmcompress.compress(model, tokens=tokens, **options)
    with pytest.raises(InputError, match="give a tokenizer"):
        llmcompress.compress(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_compress_in_memory_keeps_the_training_mode_and_counts_its_rows():
    model = tiny_model().train()
    model.requires_grad_(True)
    assert llmcompress.compress(model, tokens=torch.randint(4, 120, (4, 16)), ratio=0.3) is model
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("options", [{"method": "kfac_svd"}, {"method": "svd_llm", "block_recovery": {"steps": 2}}])
def test_compress_in_memory_leaves_no_gradient(options):
    model = tiny_model()
    model.model.norm.requires_grad_(False)
    llmcompress.compress(model, tokens=torch.randint(4, 120, (8, 16)), ratio=0.3, **options)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert not any(module.training for module in model.modules())
