"""Fine-tuning end to end: what is saved reloads, what is interrupted goes on, what is wrong is said in one line."""

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcompress
from llmcompress import InputError, Recipe, RunError, catalog
from llmcompress.calibration.text import generate_text, tokenize
from llmcompress.checkpoint.install import structured_layers
from llmcompress.checkpoint.verify import verify
from llmcompress.finetune.command import FinetuneRecipe, finetune_checkpoint
from llmcompress.finetune.lora import add_adapters, fold_adapters
from llmcompress.finetune.train import train
from llmcompress.finetune.trainer import FinetuneTrainer
from llmcompress.recipe import Finetune
from tests import gloo
from tests.tiny import recipe, save_tiny, tiny_model, write_text

SECTION = {"steps": 6, "lr": 3e-3, "length": 16, "batch": 4, "validation": 8, "evaluate_every": 2}
TOKENS = generate_text(tiny_model, 1, 48, 16, seed=0)  # of the dense model's own distribution, which nothing beats
FORMS = {
    "pivot form": {"method": "svd_llm"},
    "one basis an input": {"method": "svd_llm", "share": "input"},
    "two plain factors": {"method": "svd_llm", "pivot": False},
    "dictionaries": {"method": "cospadi", "structure": "cospadi"},
    "low rank and sparse": {"method": "sparse_low_rank"},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return save_tiny(folder / "model"), write_text(folder / "letters.txt")


@pytest.fixture(scope="module")
def checkpoint(inputs, tmp_path_factory):
    """A compressed checkpoint without any training."""
    output = tmp_path_factory.mktemp("compressed") / "out"
    llmcompress.apply(Recipe.parse(recipe(*inputs, output, method="cospadi")))
    return output


def training_recipe(inputs, output, **section):
    data = recipe(*inputs, output)
    del data["compress"]
    data["eval"] = {"perplexity": [str(inputs[1])], "length": 16, "windows": 4}
    return {**data, "finetune": {**SECTION, **section}}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensor_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


# --- from recipe to checkpoint ---------------------------------------------------------------------------------------


def test_apply_trains_what_it_compressed(inputs, checkpoint, tmp_path):
    data = recipe(*inputs, tmp_path / "out", method="cospadi")
    data["finetune"] = {**SECTION, "loss": "ce"}
    outcome = llmcompress.apply(Recipe.parse(data))
    report = outcome.metrics["finetune"]
    assert report["steps"] == 6
    assert report["kept"] in (2, 4, 6)
    assert report["validation_after"] < report["validation_before"]
    assert report["validation_perplexity"]["after"] == pytest.approx(math.exp(report["validation_after"]))
    assert verify(tmp_path / "out") == 1
    trained, start = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", checkpoint))
    moved = {k for k, v in start.state_dict().items() if not torch.equal(v, trained.state_dict()[k])}
    assert moved, "the reloaded model is the trained one"
    assert all(name.rpartition(".")[0] in structured_layers(start) for name in moved)
    sizes = [
        {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
        for folder in (tmp_path / "out", checkpoint)
    ]
    assert sizes[0] == sizes[1], "training does not grow the files"
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["finetune"] == report


def test_the_command_trains_an_existing_checkpoint_and_leaves_it_alone(inputs, checkpoint, tmp_path):
    before = files(checkpoint)
    outcome = finetune_checkpoint(
        str(checkpoint), FinetuneRecipe.parse(training_recipe(inputs, tmp_path / "out", loss="kd"))
    )
    assert files(checkpoint) == before
    (figures,) = outcome.metrics["perplexity"].values()
    assert set(figures) == {"dense", "before", "compressed"}
    assert figures["compressed"] != figures["before"]
    assert not list(tmp_path.glob(".out.work-*"))
    again = finetune_checkpoint(
        str(checkpoint), FinetuneRecipe.parse(training_recipe(inputs, tmp_path / "out", loss="kd"))
    )
    assert again.seconds == {}, "finished already"
    saved = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert saved["finetune"]["steps"] == 6


def test_same_recipe_same_bytes(inputs, checkpoint, tmp_path):
    for name in ("a", "b"):
        finetune_checkpoint(str(checkpoint), FinetuneRecipe.parse(training_recipe(inputs, tmp_path / name)))
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_method_none_and_an_absent_section_are_the_same_model(inputs, checkpoint, tmp_path):
    data = recipe(*inputs, tmp_path / "out", method="cospadi")
    llmcompress.apply(Recipe.parse({**data, "finetune": {"method": "none"}}))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_a_trained_model_reloads_bit_for_bit(form, tmp_path):
    model = tiny_model()
    teacher = copy.deepcopy(model)
    llmcompress.compress(model, tokens=TOKENS, ratio=0.3, **FORMS[form])
    train(model, TOKENS, Finetune(**SECTION), tmp_path / "run", teacher=teacher)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS[:4]).logits, model(TOKENS[:4]).logits)


def test_full_fine_tuning_trains_a_dense_model_too(inputs, tmp_path):
    data = training_recipe(inputs, tmp_path / "out", method="full", loss="ce")
    report = finetune_checkpoint(str(inputs[0]), FinetuneRecipe.parse(data)).metrics["finetune"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert report["trained_values"] == sum(parameter.numel() for parameter in model.parameters())


def test_in_memory_training_keeps_the_dtype_and_says_what_is_wrong():
    model, teacher = compressed(torch.bfloat16)
    training = llmcompress.finetune_model(model, TOKENS, teacher=teacher, steps=4, batch=4, validation=4, lr=1e-3)
    assert model.dtype == torch.bfloat16
    assert training.steps == 4
    with pytest.raises(InputError, match=r"step: unknown key; did you mean 'steps'\?"):
        llmcompress.finetune_model(model, TOKENS, teacher=teacher, step=4)
    with pytest.raises(InputError, match="loss kd learns from a teacher; give one, or use loss: ce"):
        llmcompress.finetune_model(model, TOKENS, steps=4)


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_folded_adapters_are_the_same_function(form):
    model = tiny_model()
    llmcompress.compress(model, tokens=TOKENS, ratio=0.5, **FORMS[form])
    adapted = add_adapters(model, 2, seed=0)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    with torch.no_grad():
        expected = adapted(TOKENS[:4]).logits
        fold_adapters(adapted)
        found = model(TOKENS[:4]).logits
    rounding = 2e-2 if form == "dictionaries" else 1e-3  # added atoms are stored in bfloat16, their codes in 14 bits
    assert (found - expected).abs().max() <= rounding * expected.abs().max()
    assert all("lora" not in name for name in model.state_dict())
    torch.testing.assert_close(model(TOKENS[:4]).logits, found)  # with gradients, which takes other products


def test_lora_ends_in_a_plain_checkpoint_whose_size_counts_the_adapters(inputs, checkpoint, tmp_path):
    data = training_recipe(inputs, tmp_path / "out", method="lora", lora_rank=2)
    report = finetune_checkpoint(str(checkpoint), FinetuneRecipe.parse(data)).metrics["finetune"]
    sites = structured_layers(AutoModelForCausalLM.from_pretrained(checkpoint))
    assert report["trained_values"] == sum(2 * (layer.d_in + layer.d_out) for layer in sites.values())
    grown = [
        sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (tmp_path / "out", checkpoint)
    ]
    assert grown[0] > grown[1]


@pytest.mark.parametrize("form", FORMS)
def test_adapters_that_gain_nothing_leave_no_trace(form, tmp_path):
    model = tiny_model()
    teacher = copy.deepcopy(model)
    llmcompress.compress(model, tokens=TOKENS, ratio=0.5, **FORMS[form])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    section = Finetune(**{**SECTION, "steps": 2, "method": "lora", "lora_rank": 2, "lr": 100.0, "clip": 0, "warmup": 0})
    assert train(model, TOKENS, section, tmp_path / "run", teacher=teacher).kept == 0
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


# --- schedule, checkpoints, failures ---------------------------------------------------------------------------------


def compressed(dtype=torch.float32):
    model = tiny_model(dtype=dtype)
    llmcompress.compress(model, tokens=TOKENS, ratio=0.3)
    return model, tiny_model()


def test_accumulated_batches_are_one_step(tmp_path):
    losses, weights = [], []
    for batch, accumulation in ((8, 1), (2, 4)):
        model, teacher = compressed()
        section = Finetune(**{**SECTION, "validation": 0, "batch": batch, "accumulation": accumulation})
        losses.append(train(model, TOKENS, section, tmp_path / str(batch), teacher=teacher).losses)
        weights.append(model.model.layers[0].mlp.up_proj.A.detach())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    losses = []
    for on in (False, True):
        model, teacher = compressed()
        section = Finetune(**SECTION, gradient_checkpointing=on, block_loss=0.5)
        losses.append(train(model, TOKENS, section, tmp_path / str(on), teacher=teacher).losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_bfloat16_products_train_float32_weights(tmp_path):
    model, teacher = compressed()
    exact = train(copy.deepcopy(model), TOKENS, Finetune(**SECTION), tmp_path / "float32", teacher=teacher)
    rounded = train(model, TOKENS, Finetune(**SECTION, bf16=True), tmp_path / "bf16", teacher=teacher)
    assert model.model.layers[0].mlp.up_proj.A.dtype == torch.float32
    assert rounded.losses == pytest.approx(exact.losses, rel=0.1)
    assert rounded.losses != exact.losses


def test_training_that_does_harm_leaves_the_start(tmp_path):
    model, teacher = compressed()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    training = train(model, TOKENS, Finetune(**{**SECTION, "lr": 10.0, "clip": 0}), tmp_path / "run", teacher=teacher)
    assert training.kept == 0
    assert training.validation_after == training.validation_before
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_best_checkpoint_is_kept_and_training_stops_early(tmp_path):
    """A learning rate that grows far too high: an early validation stays the best."""
    model, teacher = compressed()
    section = Finetune(**{**SECTION, "steps": 40, "lr": 0.01, "warmup": 0.9, "patience": 2, "evaluate_every": 1})
    training = train(model, TOKENS, section, tmp_path / "run", teacher=teacher)
    validations = dict(training.validations)
    assert 0 < training.kept == min(validations, key=validations.get)
    assert training.steps == training.kept + 2 < 40
    with torch.no_grad():
        loss = model(TOKENS[-4:], labels=TOKENS[-4:]).loss.item()
    assert loss == pytest.approx(validations[training.kept], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_checkpoint(tmp_path):
    model, teacher = compressed()
    section = Finetune(**{**SECTION, "lr": 1e30, "warmup": 0.5, "clip": 0, "evaluate_every": 1, "loss": "ce"})
    with pytest.raises(
        RunError, match=r"step [2-6]: the (loss|gradient) is not finite; the checkpoint .*checkpoint-\d+ is kept"
    ):
        train(model, TOKENS, section, tmp_path / "run", teacher=teacher)
    assert list((tmp_path / "run").glob("checkpoint-*/complete"))


def test_the_schedule_is_warm_up_and_cosine(tmp_path, monkeypatch):
    """The learning rates that the optimiser saw, from a recorder that joins the catalogue as a plug-in would."""
    seen = []

    class Recorder:
        class Options(BaseModel, extra="forbid"):
            scale: float = 1.0

        def __init__(self, options):
            self.options = options

        def build(self, parameters, lr):
            optimizer = torch.optim.SGD([parameter for _, parameter in parameters], lr * self.options.scale)
            optimizer.register_step_pre_hook(lambda own, *_: seen.append(own.param_groups[0]["lr"]))
            return optimizer

    class Given(catalog.Entry):
        def load(self):
            return Recorder

    model, teacher = compressed()
    known = (*catalog.entries(), Given("recorder", "optimizer", "-"))
    monkeypatch.setattr(catalog, "entries", lambda: known)
    section = Finetune(**{**SECTION, "steps": 10, "warmup": 0.3, "optimizer": {"name": "recorder", "scale": 2.0}})
    train(model, TOKENS, section, tmp_path / "run", teacher=teacher)
    expected = [s / 3 for s in range(3)] + [0.5 * (1 + math.cos(math.pi * s / 7)) for s in range(7)]
    assert seen == pytest.approx([2 * section.lr * value for value in expected], rel=1e-6, abs=1e-12)


# --- several processes -----------------------------------------------------------------------------------------------


def test_two_processes_train_as_one_with_twice_the_batch(inputs, checkpoint, tmp_path):
    """Two processes over gloo: the mean of their gradients is that of one batch twice as large."""
    data = training_recipe(inputs, tmp_path / "two", batch=4, loss="kd")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        "-m", "llmcompress", "finetune", str(checkpoint), "--recipe", str(path), "--set", "device=cpu",
    ]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr[-2000:]
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())["finetune"]
    one_process = FinetuneRecipe.parse(training_recipe(inputs, tmp_path / "one", batch=8, loss="kd"))
    one = finetune_checkpoint(str(checkpoint), one_process).metrics["finetune"]
    assert two["tokens"] == one["tokens"] == 6 * 8 * 16
    assert two["validation_before"] == pytest.approx(one["validation_before"], rel=1e-5)
    assert two["first_loss"] == pytest.approx(one["first_loss"], rel=1e-4)
    assert two["last_loss"] == pytest.approx(one["last_loss"], rel=1e-4), "the gradients were averaged"
    assert two["validation_after"] == pytest.approx(one["validation_after"], rel=1e-4)


def test_processes_with_an_aggregator_outvote_a_bad_one(tmp_path):
    """Three processes of the Trainer over gloo; one's gradients are reversed and ten times as long, or not finite."""
    ranks = gloo.run(gloo.fine_tune, gloo.TRAINERS, tmp_path)
    gains = {}
    for run, (before, after, weights, standings) in ranks[0].items():
        gains[run] = before - after
        for other in ranks[1:]:
            assert torch.equal(other[run][2], weights), f"{run}: the processes drift apart"
            assert other[run][3] == standings
        assert torch.isfinite(weights).all()
    print(gains)
    assert gains["reversed", None] == 0, "the mean goes uphill, and is undone"
    assert min(gains["reversed", "flag"], gains["nan", "flag"]) > 0
    assert gains["none", "flag"] == pytest.approx(gains["none", None], rel=0.5)
    for values in ranks[0]["nan", "flag"][3]:
        assert [value > 0 for value in values] == [rank != gloo.BAD for rank in range(gloo.TRAINERS)], "it is named"


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "optimizer": ({"optimizer": "adamv"}, r"finetune.optimizer: unknown optimizer 'adamv'; did you mean 'adamw'\?"),
    "an option of it": (
        {"optimizer": {"name": "adamw", "beta": 0.9}},
        r"finetune.optimizer.*unknown key; did you mean",
    ),
    "loss": ({"loss": "kl"}, "finetune.loss: input should be 'ce' or 'kd'; got 'kl'"),
    "key": ({"step": 5}, r"finetune.step: unknown key; did you mean 'steps'\?"),
    "short text": ({"length": 9000}, "6000 tokens, fewer than one sequence of 9000"),
    "context": ({"length": 65}, "finetune.length: a sequence of 65 tokens exceeds the model's context of 64"),
    "teacher": ({"teacher": "OTHER"}, "finetune.teacher: its vocabulary has 90 tokens, the model's 120"),
    "one sequence": ({"samples": 2, "length": 16, "validation": 0, "method": "none"}, "none trains nothing"),
}


@pytest.fixture(scope="module")
def other_vocabulary(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("other") / "model", vocab_size=90)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, inputs, checkpoint, other_vocabulary, tmp_path):
    section, message = BAD[name]
    section = {k: str(other_vocabulary) if v == "OTHER" else v for k, v in section.items()}
    with pytest.raises(InputError, match=message) as caught:
        finetune_checkpoint(str(checkpoint), FinetuneRecipe.parse(training_recipe(inputs, tmp_path / "out", **section)))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_has_nothing_for_lrc(inputs, tmp_path):
    with pytest.raises(InputError, match=r"lrc trains compressed sites, and .* has none; use full"):
        finetune_checkpoint(str(inputs[0]), FinetuneRecipe.parse(training_recipe(inputs, tmp_path / "out")))
    assert list(tmp_path.iterdir()) == []


def test_adapters_wider_than_a_site_are_refused(inputs, checkpoint, tmp_path):
    data = training_recipe(inputs, tmp_path / "out", method="lora", lora_rank=40)
    with pytest.raises(InputError, match=r"finetune.lora_rank: .* has room for \d+; got 40"):
        finetune_checkpoint(str(checkpoint), FinetuneRecipe.parse(data))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_run_is_not_gone_on_with(tmp_path):
    model, teacher = compressed()
    train(model, TOKENS, Finetune(**SECTION), tmp_path / "run", teacher=teacher)
    with pytest.raises(InputError, match="holds the checkpoints of another run"):
        train(compressed()[0], TOKENS, Finetune(**{**SECTION, "lr": 1e-4}), tmp_path / "run", teacher=teacher)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").touch()
    with pytest.raises(InputError, match="holds something else already"):
        train(compressed()[0], TOKENS, Finetune(**SECTION), tmp_path / "else", teacher=teacher)


def test_the_command_line_exits_2(inputs, checkpoint, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(training_recipe(inputs, tmp_path / "out", optimizer="sgd2")))
    command = [sys.executable, "-m", "llmcompress", "finetune", str(checkpoint), "-r", str(path)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


# --- the fit of blocks -----------------------------------------------------------------------------------------------

FITS = {
    "one pass": {"method": "svd_llm"},
    "the compressed prefix": {"method": "cospadi", "propagate": True},
    "the compressed prefix, refitted": {"method": "svd_llm", "propagate": True, "refit": True},
    "two passes": {"method": "svd_llm", "allocation": "svd_llm_v2"},
    "gradients": {"method": "fwsvd"},
    "gradients, the compressed prefix": {"method": "fwsvd", "propagate": True, "weighting": "gram"},
}


@pytest.mark.parametrize("name", FITS)
def test_blocks_are_fitted_in_every_order_of_passes(name, inputs, tmp_path):
    """The last block's outputs come nearer to the dense model's, by its note and by the model that was saved."""
    section = {"steps": 30, "batch": 32, "lr": 1e-3}
    losses = {}
    dense = AutoModelForCausalLM.from_pretrained(inputs[0])
    text = tokenize(AutoTokenizer.from_pretrained(inputs[0]), [inputs[1].read_text()])
    tokens = text[: 48 * 16].view(48, 16)  # text like that of the calibration
    for fitted in (False, True):
        data = recipe(*inputs, tmp_path / str(fitted), **FITS[name])
        data["calibration"]["samples"] = 64
        llmcompress.apply(Recipe.parse({**data, "block_recovery": section if fitted else None}))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(fitted))
        with torch.no_grad():
            a, b = (m.model(tokens).last_hidden_state for m in (model, dense))
            losses[fitted] = float((a - b).square().sum() / b.square().sum())
    sites = json.loads((tmp_path / "True" / "metrics.json").read_text())["sites"]
    notes = [note for site in sites for note in site["notes"] if "block recovery" in note]
    assert len(notes) == 3, "one a block"
    assert any("not kept" not in note for note in notes)
    assert losses[True] < losses[False]


def test_factors_shared_between_blocks_cannot_be_fitted(inputs, tmp_path):
    data = recipe(*inputs, tmp_path / "out", method="basis_sharing")
    with pytest.raises(InputError, match="block_recovery: a method that shares factors between blocks"):
        llmcompress.apply(Recipe.parse({**data, "block_recovery": {}}))
    assert list(tmp_path.iterdir()) == []


# --- optimisers and aggregators --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "lr", "state"),
    [("muon", 1e-3, 1), ("auon", 3e-3, 1), ("hybrid_auon", 2e-3, 1), ({"name": "mfac", "window": 3}, 3e-3, 3)],
)
def test_every_optimiser_trains_and_goes_on(optimizer, lr, state, tmp_path):
    """The held-out loss falls; the state has the promised size; a training that is cut goes on to the same weights."""
    section = Finetune(**{**SECTION, "lr": lr, "optimizer": optimizer})
    model, teacher = compressed()
    training = train(model, TOKENS, section, tmp_path / "run", teacher=teacher)
    assert training.kept > 0
    assert training.validation_after < training.validation_before
    extra = 8 * 3 * 3 if state == 3 else 0
    assert training.optimizer_bytes == 4 * state * training.trained_values + extra
    again, _ = compressed()
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        if folder.name != "checkpoint-2" and folder.name != "checkpoint-4":
            shutil.rmtree(folder)
    train(again, TOKENS, section, tmp_path / "run", teacher=teacher)
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_matrices_and_the_rest_under_full_fine_tuning(tmp_path):
    model = tiny_model()
    section = Finetune(**{**SECTION, "method": "full", "loss": "ce", "lr": 3e-2, "optimizer": "auon"})
    training = train(model, TOKENS, section, tmp_path / "run")
    others = sum(p.numel() for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name or "head" in name)
    assert training.optimizer_bytes == 4 * (training.trained_values + others), "two moments for what is no matrix"


@pytest.mark.parametrize("bad", [False, True])
def test_an_aggregator_outvotes_a_bad_batch(bad, tmp_path, monkeypatch):
    """Five batches a step as five workers, one of them backwards and ten times as long, or none."""
    calls = []
    honest = FinetuneTrainer.compute_loss

    def corrupt(self, model, inputs, return_outputs=False, **rest):
        found = honest(self, model, inputs, return_outputs, **rest)
        if model.training and not return_outputs:
            calls.append(1)
            return -10 * found if bad and len(calls) % 5 == 2 else found
        return found

    monkeypatch.setattr(FinetuneTrainer, "compute_loss", corrupt)
    after = {}
    for name in ("flag", None):
        model, teacher = compressed()
        section = {**SECTION, "lr": 3e-4, "batch": 2, "accumulation": 5, "aggregator": name}
        training = train(model, TOKENS, Finetune(**section), tmp_path / str(name), teacher=teacher)
        after[name] = training.validation_after
        start = training.validation_before
    print(after, start)
    assert after["flag"] < start
    if bad:
        assert start - after["flag"] > 10 * (start - after[None]), "the mean gains next to nothing"
    else:
        assert after["flag"] == pytest.approx(after[None], abs=0.05 * start)


def test_bad_aggregators(inputs, checkpoint, tmp_path):
    for section, message in (
        ({"aggregator": "flg"}, r"finetune\.aggregator: unknown aggregator 'flg'; did you mean 'flag'\?"),
        (
            {"aggregator": {"name": "flag", "n_itr": 2}},
            r"finetune\.aggregator\.n_itr: unknown key; did you mean 'n_iter'",
        ),
        ({"aggregator": "flag"}, "finetune.aggregator: needs several processes, or accumulation of at least 2"),
        ({"optimizer": {"name": "auon", "variant": "papr"}}, r"finetune\.optimizer\.variant: input should be 'paper'"),
        ({"optimizer": {"name": "mfac", "window": 0}}, r"finetune\.optimizer\.window: input should be greater"),
        ({"optimizer": "mfac", "self_guided": {}}, "mfac keeps gradients of all that trains, and the guides go"),
    ):
        with pytest.raises(InputError, match=message):
            finetune_checkpoint(
                str(checkpoint), FinetuneRecipe.parse(training_recipe(inputs, tmp_path / "out", **section))
            )
    assert list(tmp_path.iterdir()) == []
