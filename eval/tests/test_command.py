"""`llmcompress eval`: its figures are those of the functions behind it, and bad requests are refused in one line."""

import dataclasses
import functools
import io
import json

import pytest
import torch
from llmcompress_eval import speed_command
from llmcompress_eval.agreement import agreement
from llmcompress_eval.command import Request, evaluate_model, evaluation_tables
from llmcompress_eval.memory import resident_bytes
from llmcompress_eval.perplexity import perplexity
from llmcompress_eval.runs import EVALUATION
from llmcompress_eval.speed_modules import copy_bandwidth
from llmcompress_eval.text import evaluation_windows
from rich.console import Console

import llmcompress
from llmcompress.errors import InputError
from llmcompress.models.load import load_model, locate
from llmcompress.progress import Silent
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer, write_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "[bold]tiny")


@pytest.fixture(scope="module")
def compressed(folder, tmp_path_factory):
    """A compressed checkpoint whose recipe names the dense model."""
    path = tmp_path_factory.mktemp("run") / "small"
    model = llmcompress.compress(tiny_model("llama"), method="svd", ratio=0.4, tokens=torch.arange(3, 35)[None])
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    (path / "recipe.yaml").write_text(json.dumps({"model": str(folder)}))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(write_text(tmp_path_factory.mktemp("text") / "a.txt", 200))


@pytest.fixture(autouse=True)
def _quick_copy(monkeypatch):
    monkeypatch.setattr(speed_command, "copy_bandwidth", functools.partial(copy_bandwidth, size=1 << 20))


def evaluate(model, sources=(), **changes):
    options = {"length": 32, "windows": 3, "batch": 2, "device": "cpu", **changes}
    return evaluate_model(Request(str(model), perplexity=list(sources), **options), Silent())


def shown(found):
    console = Console(width=300, file=io.StringIO())
    for table in evaluation_tables(found):
        console.print(table)
    return console.file.getvalue()


def test_a_model_from_its_folder(folder):
    found = evaluate(folder, ["python-docs"])
    texts = evaluation_windows(tiny_tokenizer(), ["python-docs"], 32, 3, "text")
    assert found["model"] == str(folder)
    expected = dataclasses.asdict(perplexity(tiny_model("llama"), texts["python-docs"], 2))
    assert found["perplexity"] == {"python-docs": expected}
    rotary = 2 * 4 * 4  # its frequencies, a buffer of four values, twice
    assert found["memory"]["weights"] == 4 * tiny_model("llama").num_parameters() + rotary


def test_the_whole_text_another_dtype_and_a_stride(folder, text):
    whole = evaluate(folder, [text], windows=None)["perplexity"][text]
    assert (whole["windows"], whole["tokens"]) == (6, 6 * 31)
    narrow = evaluate(folder, [text], windows=None, dtype="bfloat16")["perplexity"][text]
    assert narrow["nll"] != whole["nll"]
    assert narrow["nll"] == pytest.approx(whole["nll"], rel=0.01)
    strided = evaluate(folder, [text], windows=None, stride=8)["perplexity"][text]
    assert (strided["windows"], strided["tokens"]) == (22, 31 + 21 * 8)


def test_against_the_dense_model(folder, compressed, text):
    found = evaluate(compressed, [text], against=str(folder))
    windows = evaluation_windows(tiny_tokenizer(), [text], 32, 3, "text")[text]
    dense, small = (load_model(locate(str(path))) for path in (folder, compressed))
    expected = [dataclasses.asdict(part) for part in agreement(dense, small, windows, 2)]
    assert [found["against"]["perplexity"][text], found["perplexity"][text], found["agreement"][text]] == expected
    assert found["memory"]["weights"] == resident_bytes(small) < found["against"]["memory"]["weights"]
    printed = shown(found)
    assert f"{found['agreement'][text]['kl']:.4f}" in printed
    assert f"{found['against']['perplexity'][text]['perplexity']:.3f}" in printed


def test_speed_finds_the_dense_model_in_the_recipe(compressed):
    """Dense and compressed side by side in one run, end to end and by module, with the byte limit."""
    found = evaluate(compressed, speed=True)
    speed = found["speed"]
    assert list(speed["end_to_end"]) == ["prefill", "decode", "generate", "generate, static cache"]
    assert all(set(rates) == {"dense", "compressed"} for rates in speed["end_to_end"].values())
    assert all(rate > 0 for rates in speed["end_to_end"].values() for rate in rates.values())
    assert {module["rows"] for module in speed["modules"]} == {1, 32}
    weights = tiny_model("llama").num_parameters() - tiny_model("llama").model.embed_tokens.weight.numel()
    assert speed["limit"]["dense"] == pytest.approx(speed["bandwidth"] / (4 * weights))
    assert speed["limit"]["compressed"] > speed["limit"]["dense"]
    printed = shown(found)
    for label in ("prefill, 32 tokens", "decode, byte limit", "q_proj", "down_proj", f"{speed['limit']['dense']:,.1f}"):
        assert label in printed


def test_speed_of_a_dense_model_alone(folder):
    found = evaluate(folder, speed=True)["speed"]
    assert found["modules"] == []
    assert all(set(rates) == {"model"} for rates in found["end_to_end"].values())


def test_samples_and_spectra(folder, compressed, text):
    found = evaluate(compressed, [text], against=str(folder), samples=2, spectra=True)
    dense = load_model(locate(str(folder)))
    windows = evaluation_windows(tiny_tokenizer(), [text], 32, 3, "text")[text]
    assert len(found["samples"]) == 2
    prompt = windows.tokens[:1, :16]
    expected = dense.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=48)
    assert found["samples"][0]["prompt"] == tiny_tokenizer().decode(prompt[0], skip_special_tokens=True)
    assert found["samples"][0]["dense"] == tiny_tokenizer().decode(expected[0, 16:], skip_special_tokens=True)
    name = "model.layers.1.mlp.up_proj"
    values = torch.linalg.svdvals(dense.get_parameter(f"{name}.weight"))
    assert found["spectra"][name]["dense"] == pytest.approx(values.tolist(), rel=1e-3)
    kept = sum(value > 1e-3 for value in found["spectra"][name]["compressed"])
    assert kept == load_model(locate(str(compressed))).get_submodule(name).spec()["rank"]


def test_saved_figures_add_up(folder, compressed, text):
    evaluate(compressed, [text], save=True)
    evaluate(compressed, ["python-docs"], against=str(folder), save=True)
    kept = json.loads((compressed / EVALUATION).read_text())
    assert set(kept["perplexity"]) == {text, "python-docs"}
    assert set(kept["agreement"]) == {"python-docs"}
    evaluate(compressed, [text], against=str(compressed), save=True)
    kept = json.loads((compressed / EVALUATION).read_text())
    assert set(kept["agreement"]) == {text}, "another dense model's figures are not mixed in"
    assert kept["agreement"][text]["kl"] == pytest.approx(0, abs=1e-9)
    (compressed / EVALUATION).unlink()


def test_the_table_shows_names_as_they_are(folder):
    """A folder or a file named like markup is no markup."""
    found = evaluate(folder, ["python-docs"])
    found["perplexity"]["[red]/a.txt"] = found["perplexity"]["python-docs"]
    printed = shown(found)
    assert "[bold]tiny" in printed
    assert "[red]/a.txt" in printed
    assert f"{found['perplexity']['python-docs']['perplexity']:.3f}" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float8"}, "--dtype float8: expected auto, float32, bfloat16, float16"),
        ({"device": "tpu"}, "device: 'tpu'; expected auto, cpu, cuda or cuda:N"),
        ({"length": 10**6}, "python-docs: .* tokens, fewer than one window of 1000000"),
        ({"length": 65}, "a window of 65 tokens exceeds the model's context of 64"),
        ({"stride": 33}, "stride: 33; expected 1 to 32, the window's length"),
        ({"against": "builtin:nothing"}, "model: unknown 'builtin:nothing'"),
    ],
)
def test_bad_options(folder, changes, message):
    with pytest.raises(InputError, match=message):
        evaluate(folder, ["python-docs"], **changes)


def test_bad_requests(folder, compressed, tmp_path):
    with pytest.raises(InputError, match="nothing to measure: give --perplexity, --tasks, --speed or --spectra"):
        evaluate(folder)
    with pytest.raises(InputError, match="--samples: continues the text of --perplexity"):
        evaluate(folder, speed=True, samples=1)
    with pytest.raises(InputError, match=r"--save: builtin:smollm2-135m-instruct is no folder"):
        evaluate("builtin:smollm2-135m-instruct", ["python-docs"], save=True)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match=r"empty\.txt: holds no text"):
        evaluate(folder, [str(tmp_path / "empty.txt")])
    recipe = (compressed / "recipe.yaml").read_text()
    (compressed / "recipe.yaml").write_text("{}")
    with pytest.raises(InputError, match=r"--speed: .*small names no dense model; name it with --against"):
        evaluate(compressed, speed=True)
    (compressed / "recipe.yaml").write_text(recipe)


def test_bad_models(folder, tmp_path):
    with pytest.raises(InputError, match="has no config"):
        evaluate(tmp_path, ["python-docs"])
    encoder = save_tiny(tmp_path / "bert", "bert")
    with pytest.raises(InputError, match="BertForMaskedLM is no causal language model"):
        evaluate(encoder, ["python-docs"])
    other = save_tiny(tmp_path / "other", vocab_size=130)
    with pytest.raises(InputError, match="--against: a vocabulary of 130 tokens, and the model's has 120"):
        evaluate(folder, ["python-docs"], against=str(other))
