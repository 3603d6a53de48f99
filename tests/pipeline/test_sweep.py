"""A sweep: each run has the bytes that it would have alone, calibration is gathered once, a killed sweep goes on."""

import json

import pytest

import llmcompress
from llmcompress.compressors.svd import SVD
from llmcompress.errors import InputError, RunError
from llmcompress.measurement import Measurement
from llmcompress.progress import Silent
from llmcompress.recipe import Recipe
from llmcompress.sweep import parse_ratios, sweep, sweep_recipes
from tests.tiny import recipe, save_tiny, write_text


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "letters.txt", 1000)


@pytest.fixture
def base(model, text, tmp_path):
    data = recipe(model, text, tmp_path / "all")
    data["eval"] = {"perplexity": [str(text)], "length": 32, "windows": 2}
    return Recipe.parse(data)


@pytest.fixture
def passes(monkeypatch):
    """The blocks that were run forward and backward for statistics."""
    seen = []
    for name in ("forward", "_block_backward"):
        original = getattr(Measurement, name)

        def counted(self, index, *rest, name=name, original=original):
            seen.append((name, index))
            return original(self, index, *rest)

        monkeypatch.setattr(Measurement, name, counted)
    return seen


def tensors(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_runs_share_one_calibration_and_have_the_bytes_of_runs_of_their_own(base, tmp_path, passes):
    """Methods that read nothing, inputs, or inputs and gradients: one forward and one backward pass for all."""
    recipes = sweep_recipes(base, [0.3, 0.5], ["svd", "svd_llm", "kfac_svd"])
    assert list(recipes) == ["svd-0.3", "svd-0.5", "svd_llm-0.3", "svd_llm-0.5", "kfac_svd-0.3", "kfac_svd-0.5"]
    outcomes = sweep(recipes, Silent())
    assert sorted(passes) == sorted((name, index) for name in ("forward", "_block_backward") for index in range(3))
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(recipes), "nothing else is left"
    for name in ("svd-0.5", "svd_llm-0.3", "kfac_svd-0.5"):
        alone = llmcompress.apply(recipes[name].model_copy(update={"output": str(tmp_path / "alone" / name)}))
        assert tensors(alone.folder) == tensors(outcomes[name].folder), name
        assert (alone.folder / "metrics.json").read_bytes() == (outcomes[name].folder / "metrics.json").read_bytes()
        removed = outcomes[name].metrics["size"]["targeted"]["removed"]
        assert removed == pytest.approx(float(name.rpartition("-")[2]), abs=0.06)


def test_a_killed_sweep_goes_on(base, tmp_path, passes, monkeypatch):
    recipes = sweep_recipes(base, [0.3, 0.5], ["svd_llm", "svd"])
    space, calls = SVD.space, []

    def fails(self, *arguments):
        calls.append(1)
        if len(calls) == 5:
            raise RunError("the power went")
        return space(self, *arguments)

    monkeypatch.setattr(SVD, "space", fails)
    with pytest.raises(RunError, match="the power went"):
        sweep(recipes, Silent())
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "all").glob("svd_llm*/metrics.json")}
    passes.clear()
    sweep(recipes, Silent())
    assert passes == [], "nothing was gathered again"
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "all").glob("svd_llm*/metrics.json")} == done
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(recipes)
    sweep(recipes, Silent())
    assert passes == []


def test_runs_behind_the_compressed_prefix_calibrate_by_themselves(base, tmp_path):
    base.compress[0].propagate = True
    outcomes = sweep(sweep_recipes(base, [0.3, 0.5], []), Silent())
    alone = llmcompress.apply(
        Recipe.parse({**json.loads(base.model_dump_json()), "output": str(tmp_path / "alone"),
                      "compress": [{"method": "svd_llm", "ratio": 0.5, "propagate": True}]})
    )  # fmt: skip
    assert tensors(alone.folder) == tensors(outcomes["svd_llm-0.5"].folder)


def test_ratios():
    assert parse_ratios("0.1..0.6") == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert parse_ratios("0.2..0.3:0.05") == [0.2, 0.25, 0.3]
    assert parse_ratios("0.3,0.25") == [0.3, 0.25]
    assert parse_ratios(".4") == [0.4]


@pytest.mark.parametrize("text", ["", "a", "0.1..", "0.6..0.1", "0..0.5", "0.5,1", "0.1..0.5:0", "nan"])
def test_bad_ratios(text):
    with pytest.raises(InputError, match=f"^--ratio {text}: "):
        parse_ratios(text)


def test_options_go_to_the_methods_that_have_them(base):
    base = Recipe.parse({**json.loads(base.model_dump_json()), "compress": [
        {"method": "svd_llm", "targets": ["ffn"], "ratio": 0.3, "refit": True, "propagate": True, "share": "input"}
    ]})  # fmt: skip
    own, other = sweep_recipes(base, [0.4], ["svd_llm", "svd"]).values()
    assert own.compress[0].options == {"refit": True, "share": "input"}
    assert other.compress[0].options == {"share": "input"}
    assert other.compress[0].targets == ["ffn"]
    with pytest.raises(InputError, match=r"^--methods: unknown method 'svd_lm'; did you mean 'svd_llm'\?$"):
        sweep_recipes(base, [0.4], ["svd_lm"])


def test_nothing_is_written_if_one_run_cannot_be(base, tmp_path):
    """A ratio that leaves a matrix no rank is found before the first run starts."""
    with pytest.raises(InputError):
        sweep(sweep_recipes(base, [0.3, 0.999], []), Silent())
    assert not (tmp_path / "all").exists() or list((tmp_path / "all").iterdir()) == []
