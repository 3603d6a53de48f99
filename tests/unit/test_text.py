"""Text sources, and their packing into sequences."""

import json
import re
from pydoc_data.topics import topics

import pyarrow
import pyarrow.parquet
import pytest
import torch

from llmcompress.calibration.text import generate_text, pack, python_docs, read_documents, tokenize
from llmcompress.errors import InputError, RunError
from tests.tiny import tiny_model, tiny_tokenizer

TEXTS = ["Grüße\n\nzwei Absätze \u2028 ein Satz", "second\x0bdocument", "  ", "fourth"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def message(source, use="calibration", **options):
    with pytest.raises(InputError) as caught:
        read_documents(str(source), use, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXTS[0], encoding="utf-8")
    assert read_documents(str(path), "calibration") == [TEXTS[0]]


@pytest.mark.parametrize("escaped", [True, False])
def test_json_lines_are_a_document_each(tmp_path, escaped):
    """Unescaped, a string may hold U+2028, at which Python's splitlines would cut it."""
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=escaped) for text in TEXTS]
    path.write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\r\n", encoding="utf-8", newline="")
    assert read_documents(str(path), "evaluation") == TEXTS


def test_parquet_rows_are_a_document_each(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": range(4), "body": TEXTS}), path, row_group_size=2)
    assert read_documents(str(path), "calibration", "body") == TEXTS


def test_a_relative_home_is_expanded(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("words")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_documents("~/a.txt", "calibration") == ["words"]


def test_missing_empty_and_strange_files(tmp_path):
    assert message(tmp_path / "none.txt") == f"{tmp_path / 'none.txt'}: no such file"
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\t\n")
    assert message(empty) == f"{empty}: holds no text"
    (tmp_path / "none.jsonl").write_text("\n")
    assert "holds no text" in message(tmp_path / "none.jsonl")
    (tmp_path / "a.csv").write_text("a,b")
    assert "a.csv: not a text source; expected a .txt, .jsonl, .parquet file" in message(tmp_path / "a.csv")
    assert "not a text source" in message(tmp_path)
    (tmp_path / "folder.txt").mkdir()
    assert "folder.txt: no such file" in message(tmp_path / "folder.txt")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Grüße".encode("latin-1"))
    assert re.search(r"latin\.txt: not UTF-8 text \(.* at byte 2\)$", message(latin))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['{"text": "a"}', '{"text": "b"'], "line 2 is not JSON"),
        (['{"text": "a"}', "", '{"txt": "b"}'], "line 3 has no field 'text'"),
        (['["a"]'], "line 1 has no field 'text'"),
        (["5"], "line 1 has no field 'text'"),
        (['{"text": "a"}', '{"text": null}'], "field 'text' of a record holds NoneType, not text"),
        (['{"text": ["a"]}'], "field 'text' of a record holds list, not text"),
    ],
)
def test_bad_json_lines(tmp_path, lines, expected):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    assert message(path).startswith(f"{path}: ")
    assert expected in message(path)


def test_bad_parquet_files(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "some": ["a", None]}), path)
    assert message(path) == f"{path}: has no column 'text'; it has n, some"
    assert "field 'n' of a record holds int, not text" in message(path, field="n")
    assert "field 'some' of a record holds NoneType, not text" in message(path, field="some")
    path.write_bytes(path.read_bytes()[:-8])
    assert f"{path}: cannot be read: " in message(path)
    path.write_bytes(b"")
    assert f"{path}: cannot be read: " in message(path)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-that-name/a.txt"])
def test_names_that_are_no_paths(name):
    assert ": cannot be a text source: " in message(name)


def test_what_is_neither_a_file_nor_on_the_hub():
    """The hub is out of reach in tests, which gives the same line as a data set that is not there."""
    assert "no local file of that name, and the hub did not give it: " in message("no-such/data-set-at-all")


# --- python-docs -----------------------------------------------------------------------------------------------------


def test_the_splits_of_the_python_docs_are_disjoint_and_complete():
    """Many topics quote others; nothing that is calibrated on may be evaluated on."""

    def paragraphs(text):
        return [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip()]

    train, test, both = (paragraphs(python_docs(split)[0]) for split in ("train", "test", "all"))
    assert not set(train) & set(test)
    assert set(train) | set(test) == set(both) == {p for text in topics.values() for p in paragraphs(text)}
    assert len(set(both)) == len(both), "once each"
    lines = {line for line in python_docs("train")[0].splitlines() if len(line) > 60}
    shared = [line for line in python_docs("test")[0].splitlines() if line in lines]
    assert len(shared) <= 10, "not by parts of paragraphs either"
    assert min(len(python_docs(split)[0]) for split in ("train", "test")) > 100_000


def test_the_use_chooses_the_split_where_none_is_named():
    assert read_documents("python-docs", "calibration") == python_docs("train")
    assert read_documents("python-docs", "evaluation") == python_docs("test")
    assert read_documents("python-docs:all", "evaluation") == python_docs("all")
    assert "python-docs:dev: no such split; there are all, train, test" in message("python-docs:dev")


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_documents_are_joined_by_the_end_token(tokenizer):
    stream = tokenize(tokenizer, ["ab", "", "c"])
    letters = {letter: tokenizer.convert_tokens_to_ids(letter) for letter in "abc"}
    end = tokenizer.eos_token_id
    assert stream.tolist() == [letters["a"], letters["b"], end, end, letters["c"]]
    assert stream.dtype == torch.long


def test_tokenising_adds_no_special_token_and_leaves_the_tokenizer_alone():
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 4
    assert len(tokenize(tokenizer, ["a" * 50])) == 50
    assert tokenizer.model_max_length == 4


def test_packing_takes_the_first_sequences_in_order():
    stream = torch.arange(23)
    assert pack(stream, 3, 5, "x").tolist() == [[5 * row + column for column in range(5)] for row in range(3)]
    assert pack(stream, 99, 5, "x").shape == (4, 5), "what is left of the text is no sequence"
    assert pack(stream, 1, 23, "x").shape == (1, 23)
    with pytest.raises(InputError, match=r"^x: 23 tokens, fewer than one sequence of 24$"):
        pack(stream, 1, 24, "x")


# --- self ------------------------------------------------------------------------------------------------------------


def test_self_draws_what_the_model_predicts(model):
    """The same draws without a key-value cache, from the whole prefix each time."""
    found = generate_text(lambda: model, 1, 5, 12, seed=3, batch=5)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.full((5, 1), 1)
    for _ in range(11):
        with torch.no_grad():
            probabilities = model(input_ids=tokens).logits[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], 1)
    assert torch.equal(found, tokens)


def test_self_is_seeded_and_follows_the_models_distribution(model):
    many = generate_text(lambda: model, 1, 4000, 2, seed=0, batch=1000)
    assert many.shape == (4000, 2)
    assert torch.equal(many, generate_text(lambda: model, 1, 4000, 2, seed=0, batch=1000))
    assert not torch.equal(many, generate_text(lambda: model, 1, 4000, 2, seed=1, batch=1000))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[1]])).logits[0, -1].softmax(-1).double()
    share = torch.bincount(many[:, 1], minlength=len(expected)) / 4000
    deviation = (share - expected) / (expected * (1 - expected) / 4000).sqrt()
    assert deviation.abs().max() < 5


def test_self_leaves_the_models_modes_alone():
    model = tiny_model("llama", attention_dropout=0.5).train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    first = generate_text(lambda: model, 1, 2, 8, seed=0)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(first, generate_text(lambda: model.eval(), 1, 2, 8, seed=0)), "no dropout while generating"


def test_self_refuses_what_cannot_generate(model):
    with pytest.raises(InputError, match="self: the tokenizer has neither a first nor an end token"):
        generate_text(lambda: model, None, 1, 4, seed=0)
    with pytest.raises(InputError, match="self: a sequence of 65 tokens exceeds the model's context of 64"):
        generate_text(lambda: model, 1, 1, 65, seed=0)
    with pytest.raises(InputError, match="self: BertForMaskedLM generates no text"):
        generate_text(lambda: tiny_model("bert"), 1, 1, 4, seed=0)
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.nan
    with pytest.raises(RunError, match="self: the model's logits are not finite"):
        generate_text(lambda: broken, 1, 1, 4, seed=0)
    assert message("self", "evaluation").startswith("self: text that the model generates serves for calibration")
