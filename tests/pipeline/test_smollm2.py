"""The main job on a real model: SmolLM2-135M-Instruct from its GGUF file, on text that every CPython carries."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcompress
from llmcompress import Recipe
from llmcompress.checkpoint.verify import verify
from llmcompress.layers.low_rank import LowRankLinear
from llmcompress.progress import Silent
from llmcompress.sweep import sweep, sweep_recipes


@pytest.fixture(scope="module")
def run(smollm2_name, tmp_path_factory):
    """Keys and values of all blocks at half their size, and what the run reported."""
    output = tmp_path_factory.mktemp("smollm2") / "out"
    recipe = {
        "model": smollm2_name,
        "calibration": {"dataset": "python-docs", "samples": 16, "length": 256},
        "compress": [{"method": "svd_llm", "ratio": 0.5, "targets": ["k", "v"], "share": "input"}],
        "eval": {"perplexity": ["python-docs"], "length": 256, "windows": 2},
        "output": str(output),
    }
    return llmcompress.apply(Recipe.parse(recipe))


def test_metrics_are_those_of_the_model(run):
    size = run.metrics["size"]
    assert size["model"]["dense"] == 134_515_008
    assert size["targeted"]["dense"] == 2 * 30 * 576 * 192
    assert 0.5 <= size["targeted"]["removed"] < 0.51
    found = run.metrics["perplexity"]["python-docs"]
    assert found["dense"]["perplexity"] < found["compressed"]["perplexity"] < 2 * found["dense"]["perplexity"]
    assert json.loads((run.folder / "metrics.json").read_text())["perplexity"] == run.metrics["perplexity"]
    assert verify(run.folder) == 1


def test_the_reloaded_model_still_knows_its_capitals(run):
    model = AutoModelForCausalLM.from_pretrained(run.folder)
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    assert isinstance(model.model.layers[7].self_attn.v_proj, LowRankLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "gguf" not in (run.folder / "config.json").read_text().lower()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


@pytest.mark.slow
def test_the_best_recipe_at_three_sizes(smollm2_name, wikitext_files, tmp_path):
    """Reloaded, no training: at most the figures promised, on the calibration's domain and on another."""
    test = str(wikitext_files["test"])
    overrides = [
        f"model={smollm2_name}", f"calibration.dataset={wikitext_files['valid']}", f"output={tmp_path / 'runs'}",
        f"eval.perplexity=[{test}, python-docs:all]", "eval.speed=false",
    ]  # fmt: skip
    base = Recipe.load(Path(__file__).parents[2] / "recipes" / "best.yaml", overrides)
    outcomes = sweep(sweep_recipes(base, [0.2, 0.3, 0.4], []), Silent())
    metrics = {name: outcome.metrics for name, outcome in outcomes.items()}
    found = {
        name: [pair["compressed"]["perplexity"] for pair in m["perplexity"].values()] for name, m in metrics.items()
    }
    print(found)
    for (name, own), limit in zip(metrics.items(), (22.8, 25.5, 31.3), strict=True):
        assert own["perplexity"][test]["dense"]["perplexity"] == pytest.approx(19.89, abs=0.02)
        assert found[name][0] <= limit
        ratio = float(name.rpartition("-")[2])
        assert ratio <= own["size"]["targeted"]["removed"] < 1 - 0.995 * (1 - ratio)
    assert found["cospadi-0.3"][1] <= 25
