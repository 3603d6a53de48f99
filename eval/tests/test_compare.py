"""Dense and compressed side by side: the same figures as each model alone, one model in memory at a time."""

import dataclasses
import gc
import io
import weakref

import pytest
import torch
from llmcompress_eval.command import evaluate_model, evaluation_table
from llmcompress_eval.compare import evaluate_pair, evaluation_windows
from llmcompress_eval.perplexity import perplexity
from rich.console import Console

import llmcompress
from llmcompress.calibration.text import python_docs, tokenize
from llmcompress.engine import Silent
from llmcompress.errors import InputError
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer, write_text


class Told(Silent):
    def __init__(self):
        self.stages = []

    def start(self, stage, total):
        self.stages.append([stage, total, 0])

    def advance(self, detail):
        self.stages[-1][2] += 1


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = write_text(tmp_path_factory.mktemp("text") / "letters.txt", 300)
    return evaluation_windows(tiny_tokenizer(), [str(path), "python-docs"], 32, 3, "text")


def dense():
    return tiny_model("llama")


def compressed():
    return llmcompress.compress(tiny_model("llama"), method="svd", ratio=0.4, tokens=torch.arange(3, 35)[None])


def test_windows_of_every_source_from_its_test_split(texts):
    letters, docs = texts.values()
    assert letters.shape == docs.shape == (3, 32)
    assert torch.equal(docs.flatten(), tokenize(tiny_tokenizer(), python_docs("test"))[:96])


def test_a_pair_is_what_each_model_is_alone(texts):
    told = Told()
    found, speed = evaluate_pair(dense, compressed, texts, False, told)
    assert speed is None
    assert list(found) == list(texts)
    for source, tokens in texts.items():
        for name, model in {"dense": dense(), "compressed": compressed()}.items():
            assert found[source][name] == dataclasses.asdict(perplexity(model, tokens)), (source, name)
        assert found[source]["dense"]["nll"] != found[source]["compressed"]["nll"]
    assert told.stages == [[f"perplexity, {name}", 3, 3] for name in ("dense", "compressed") for _ in texts]


def test_one_model_is_in_memory_at_a_time(texts):
    alive = []

    def load_dense():
        model = dense()
        alive.append(weakref.ref(model))
        return model

    def load_compressed():
        gc.collect()
        assert alive[0]() is None, "the dense model is gone before the compressed one is loaded"
        return compressed()

    evaluate_pair(load_dense, load_compressed, texts, False, Silent())


def test_speeds_of_both_where_they_are_asked_for(texts):
    found, speed = evaluate_pair(dense, compressed, texts, True, Silent())
    assert set(found) == set(texts)
    assert set(speed) == {"dense", "compressed"}
    assert all(value > 0 for figures in speed.values() for value in figures.values())


def test_an_encoder_gives_nothing(texts):
    assert evaluate_pair(lambda: tiny_model("bert"), lambda: tiny_model("bert"), texts, True, Silent()) == ({}, None)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "[bold]tiny")


def evaluate(model, sources, **changes):
    options = {"length": 32, "windows": 3, "batch": 2, "dtype": "auto", "device": "cpu", "field": "text"}
    options |= {"trust_remote_code": False, "progress": Silent(), **changes}
    return evaluate_model(str(model), sources, **options)


def test_the_command_measures_a_model_from_its_folder(folder, texts):
    found = evaluate(folder, ["python-docs"])
    expected = dataclasses.asdict(perplexity(dense(), texts["python-docs"], 2))
    assert found == {"model": str(folder), "length": 32, "perplexity": {"python-docs": expected}}


def test_the_whole_text_and_another_dtype(folder, tmp_path):
    path = write_text(tmp_path / "a.txt", 200)
    whole = evaluate(folder, [str(path)], windows=None)["perplexity"][str(path)]
    assert (whole["windows"], whole["tokens"]) == (6, 6 * 31)
    narrow = evaluate(folder, [str(path)], windows=None, dtype="bfloat16")["perplexity"][str(path)]
    assert narrow["nll"] != whole["nll"]
    assert narrow["nll"] == pytest.approx(whole["nll"], rel=0.01)


def test_the_table_shows_names_as_they_are(folder):
    """A folder or a file named like markup is no markup."""
    console = Console(width=200, file=io.StringIO())
    found = evaluate(folder, ["python-docs"])
    found["perplexity"]["[red]/a.txt"] = found["perplexity"]["python-docs"]
    console.print(evaluation_table(str(folder), found))
    shown = console.file.getvalue()
    assert "[bold]tiny" in shown
    assert "[red]/a.txt" in shown
    assert f"{found['perplexity']['python-docs']['perplexity']:.3f}" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float8"}, "--dtype float8: expected auto, float32, bfloat16, float16"),
        ({"device": "tpu"}, "device: 'tpu'; expected auto, cpu, cuda or cuda:N"),
        ({"length": 10**6}, "python-docs: .* tokens, fewer than one window of 1000000"),
        ({"length": 65}, "a window of 65 tokens exceeds the model's context of 64"),
    ],
)
def test_bad_options(folder, changes, message):
    with pytest.raises(InputError, match=message):
        evaluate(folder, ["python-docs"], **changes)


def test_bad_models(folder, tmp_path):
    with pytest.raises(InputError, match="has no config"):
        evaluate(tmp_path, ["python-docs"])
    encoder = save_tiny(tmp_path / "bert", "bert")
    with pytest.raises(InputError, match="BertForMaskedLM is no causal language model"):
        evaluate(encoder, ["python-docs"])
