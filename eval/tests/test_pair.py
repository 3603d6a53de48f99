"""Dense and compressed side by side: the same figures as each model alone, one model in memory at a time."""

import dataclasses
import gc
import weakref

import pytest
import torch
from llmcompress_eval.pair import evaluate_pair
from llmcompress_eval.perplexity import perplexity
from llmcompress_eval.text import evaluation_windows

import llmcompress
from llmcompress.calibration.text import python_docs, tokenize
from llmcompress.progress import Silent
from tests.tiny import tiny_model, tiny_tokenizer, write_text


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
    assert letters.tokens.shape == docs.tokens.shape == (3, 32)
    assert torch.equal(docs.tokens.flatten(), tokenize(tiny_tokenizer(), python_docs("test"))[:96])


def test_a_pair_is_what_each_model_is_alone(texts):
    told = Told()
    found, speed = evaluate_pair(dense, compressed, texts, False, told, {})
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

    evaluate_pair(load_dense, load_compressed, texts, False, Silent(), {})


def test_speeds_of_both_where_they_are_asked_for(texts):
    found, speed = evaluate_pair(dense, compressed, texts, True, Silent(), {})
    assert set(found) == set(texts)
    assert set(speed) == {"dense", "compressed"}
    assert all(value > 0 for figures in speed.values() for value in figures.values())


def test_an_encoder_gives_nothing(texts):
    assert evaluate_pair(lambda: tiny_model("bert"), lambda: tiny_model("bert"), texts, True, Silent(), {}) == (
        {},
        None,
    )


def test_a_dense_model_known_already_is_not_measured_again(texts):
    known, told = {source: {"nll": 1.0} for source in texts}, Told()
    found, _ = evaluate_pair(dense, compressed, texts, False, told, known)
    assert all(found[source]["dense"] == {"nll": 1.0} for source in texts)
    assert {stage for stage, *_ in told.stages} == {"perplexity, compressed"}
