"""`llmcompress merge`: checkpoints to a plain one, by command, recipe and call; refusals; memory; interruption."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcompress
from llmcompress import InputError, RunError, cli
from llmcompress.backends.merging import decoder_matching
from llmcompress.backends.merging.alignment import Alignment
from llmcompress.merge import align
from llmcompress.merge import run as merge_run
from llmcompress.merge.recipe import MergeRecipe, load_recipe
from llmcompress.models.load import Location, load_model
from llmcompress.models.symmetry import find_groups
from llmcompress.progress import Silent
from tests.scramble import save_pair, save_scrambled
from tests.tiny import recipe, save_tiny, tiny_model, tiny_tokenizer, write_text

TOKENS = torch.arange(20, 52).reshape(2, 16)


def outputs(folder):
    with torch.no_grad():
        return load_model(Location(folder))(input_ids=TOKENS).logits


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "letters.txt", 1000)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def unrelated(tmp_path_factory):
    """Of the pair's shape, with weights of its own."""
    folder = tmp_path_factory.mktemp("models") / "other"
    model = tiny_model()
    torch.manual_seed(9)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# --- what is merged --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama-tied", "qwen3", "gpt2", "gpt_neox", "bert"])
def test_a_scrambled_copy_merges_to_the_model_itself(architecture, tmp_path):
    a, b = save_pair(tmp_path, architecture)
    outcome = llmcompress.merge_models([a, b], tmp_path / "out")
    merged, model = load_model(Location(tmp_path / "out")), load_model(Location(a))
    assert all(torch.equal(tensor, merged.get_parameter(name)) for name, tensor in model.named_parameters())
    first, second = outcome.metrics["models"]
    assert (first["identity"], second["identity"]) == (True, False)
    assert second["distance"] > 1
    assert second["distance_matched"] == 0
    assert 0 < second["logits_difference"] < 1e-5
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"], "no work is left"


def test_the_result_is_a_plain_checkpoint(pair, tmp_path):
    llmcompress.merge_models(pair, tmp_path / "out", dtype="bfloat16", max_shard_size="20KB")
    code = """if True:
        import sys
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        prompt = AutoTokenizer.from_pretrained(sys.argv[1])("ab", return_tensors="pt").input_ids
        made = model.generate(prompt, max_new_tokens=2, min_new_tokens=2)
        print(model.dtype, made.shape, "llmcompress" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["torch.bfloat16", "torch.Size([1,", "4])", "False"], done.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


def test_shares_are_those_of_a_mean(pair, unrelated, tmp_path):
    models = [pair[0], unrelated]
    for keys, shares in (({"lam": 0.25}, (0.75, 0.25)), ({"weights": [0.9, 0.1]}, (0.9, 0.1)), ({}, (0.5, 0.5))):
        out = tmp_path / str(shares)
        llmcompress.merge_models(models, out, match="none", **keys)
        a, b = (tensors(folder) for folder in models)
        for name, tensor in tensors(out).items():
            torch.testing.assert_close(tensor, (shares[0] * a[name].double() + shares[1] * b[name].double()).float())
    assert llmcompress.merge_models([pair[0], pair[0]], tmp_path / "same").metrics["models"][1]["identity"]


def test_three_models_are_matched_to_one_another(pair, unrelated, tmp_path):
    third = save_scrambled(tmp_path / "c", seed=5)
    outcome = llmcompress.merge_models([*pair, third], tmp_path / "out")
    torch.testing.assert_close(outputs(tmp_path / "out"), outputs(pair[0]), rtol=0, atol=1e-4)
    assert [item["share"] for item in outcome.metrics["models"]] == [pytest.approx(1 / 3)] * 3
    found = llmcompress.merge_models([*pair, unrelated], tmp_path / "unrelated").metrics["models"]
    assert found[1]["distance_matched"] < 1e-3 * found[1]["distance"]
    assert found[2]["distance_matched"] < found[2]["distance"]


def test_a_rotated_stream_is_matched_where_it_can_be(pair, unrelated, tmp_path):
    ratio = {}
    for match in ("signed", "orthogonal"):
        found = llmcompress.merge_models([pair[0], unrelated], tmp_path / match, match=match).metrics["models"]
        assert all(item["logits_difference"] < 1e-4 for item in found)
        ratio[match] = found[1]["distance_matched"] / found[1]["distance"]
        assert torch.isfinite(outputs(tmp_path / match)).all()
    assert ratio["orthogonal"] < ratio["signed"] < 1


def test_figures_along_the_path(pair, text, tmp_path):
    evaluation = {"perplexity": [str(text)], "length": 32, "windows": 3}
    found = llmcompress.merge_models(pair, tmp_path / "out", barrier=str(text), r_metric=True, eval=evaluation).metrics
    assert found["barrier"]["matched"]["barrier"] == pytest.approx(0, abs=1e-5)
    assert found["barrier"]["as_given"]["loss"][5] != pytest.approx(found["barrier"]["as_given"]["loss"][0], abs=1e-3)
    assert len(found["barrier"]["matched"]["loss"]) == 11
    assert [row["site"] for row in found["r_metric"]][-1] == "all"
    assert found["r_metric"][-1]["after"] == [pytest.approx(1)] * 3
    assert max(map(abs, found["r_metric"][-1]["before"])) < 0.2
    values = list(found["perplexity"][str(text)].values())
    assert values[2] == pytest.approx(values[0], rel=1e-6)

    from llmcompress_eval.command import Request, evaluate_model

    request = Request(str(pair[0]), perplexity=[str(text)], length=32, windows=3, device="cpu")
    again = evaluate_model(request, Silent())
    assert values[0] == pytest.approx(again["perplexity"][str(text)]["perplexity"], rel=1e-5)


# --- command and recipe ----------------------------------------------------------------------------------------------


def command(monkeypatch, capfd, *arguments):
    monkeypatch.setattr(cli.out, "width", 250)
    monkeypatch.setattr(sys, "argv", ["llmcompress", *map(str, arguments)])
    log = cli.logging.getLogger("llmcompress")
    before = log.level, log.handlers, log.propagate
    capfd.readouterr()
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code
    log.level, log.handlers, log.propagate = before
    return code, *capfd.readouterr()


def test_command_recipe_and_call_write_the_same(pair, text, tmp_path, monkeypatch, capfd):
    options = ["--perplexity", text, "--length", 32, "--windows", 2, "--lam", 0.3]
    code, printed, err = command(monkeypatch, capfd, "merge", *pair, "--out", tmp_path / "command", *options)
    assert code == 0, err
    assert "a permutation" in printed
    assert "distance to the first model x0.000 by matching" in printed
    data = {"merge": {"models": [str(p) for p in pair], "lam": 0.3}, "output": str(tmp_path / "recipe"),
            "eval": {"perplexity": [str(text)], "length": 32, "windows": 2}}  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data))
    code, printed, err = command(monkeypatch, capfd, "apply", "-r", tmp_path / "r.yaml")
    assert code == 0, err
    assert files(tmp_path / "command") == files(tmp_path / "recipe")
    again = load_recipe(tmp_path / "recipe" / "recipe.yaml", [f"output={tmp_path / 'again'}"])
    merge_run.run_merge(again)
    assert files(tmp_path / "again") == files(tmp_path / "recipe"), "the recipe as run says all"
    assert command(monkeypatch, capfd, "merge", *pair, "--out", tmp_path / "command", *options)[0] == 0, "finished"


def test_the_command_rotates_measures_the_path_and_draws_it(pair, unrelated, text, tmp_path, monkeypatch, capfd):
    arguments = ["merge", pair[0], unrelated, "--out", tmp_path / "out", "--match", "orthogonal", "--barrier", text]
    arguments += ["--length", 32, "--windows", 2]
    plots = [tmp_path / name for name in ("one.png", "two.svg")]
    code, printed, err = command(monkeypatch, capfd, *arguments, "--plot", plots[0])
    assert code == 0, err
    assert "a rotation" in printed
    measured = json.loads((tmp_path / "out" / "metrics.json").read_text())["barrier"]
    barriers = [measured[kind]["barrier"] for kind in ("as_given", "matched")]
    assert f"barrier: {barriers[0]:.3f} nats as given, {barriers[1]:.3f} matched" in printed
    assert plots[0].read_bytes().startswith(b"\x89PNG")
    code, printed, err = command(monkeypatch, capfd, *arguments, "--plot", plots[1])
    assert code == 0, err
    drawn = plots[1].read_text()
    assert "<svg" in drawn, "drawn from the finished merge's figures"
    assert drawn.count("<!-- as given -->") == drawn.count("<!-- matched -->") == 1, "both paths, in the legend"


def test_three_models_by_command(pair, tmp_path, monkeypatch, capfd):
    third = save_scrambled(tmp_path / "c", seed=5)
    shares = ["--weight", 0.5, "--weight", 0.25, "--weight", 0.25]
    code, printed, err = command(monkeypatch, capfd, "merge", *pair, third, "--out", tmp_path / "out", *shares)
    assert code == 0, err
    assert printed.count("a permutation") == 2
    torch.testing.assert_close(outputs(tmp_path / "out"), outputs(pair[0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("plot", "message"), [("p.gif", "is no .png, .svg, .pdf file"), ("no/p.png", "existing folder")]
)
def test_a_plot_that_cannot_be_drawn_is_refused_first(plot, message, pair, text, tmp_path):
    with pytest.raises(InputError, match=message):
        llmcompress.merge_models(pair, tmp_path / "out", barrier=str(text), plot=str(tmp_path / plot))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ("auto", {"signed": None, "orthogonal": False}), ("signed", {"signed": True, "orthogonal": False}),
        ("orthogonal", {"signed": None, "orthogonal": True}), ("none", None), (None, None),
        ({"name": "weight_matching", "signed": False}, {"signed": False, "orthogonal": False}),
    ],
)  # fmt: skip
def test_a_match_is_one_word_or_its_keys(match, expected):
    found = MergeRecipe.parse({"merge": {"models": ["a", "b"], "match": match}, "output": "o"}).merge.match
    assert (found and found.model_dump(include={"signed", "orthogonal"})) == expected


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"models": ["a"]}, "merge.models: list should have at least 2 items"),
        ({"lam": 1.5}, r"merge.lam: input should be less than or equal to 1; got 1\.5"),
        (
            {"weights": [0.5, 0.6]},
            r"merge.weights: shares in \[0, 1\] that are 1 in sum are needed; got \[0\.5, 0\.6\]",
        ),
        ({"weights": [1.5, -0.5]}, r"merge.weights: shares in \[0, 1\]"),
        ({"weights": [0.2, 0.3, 0.5]}, "merge.weights: 3 shares for 2 models"),
        ({"weights": [0.5, 0.5], "lam": 0.5}, "merge: give lam or weights, not both"),
        ({"models": ["a", "b", "c"], "lam": 0.5}, "merge.lam: is the share of the second of two models"),
        ({"models": ["a", "b", "c"], "barrier": "t"}, "merge.barrier: lies between two models; got 3"),
        ({"plot": "p.png"}, "merge.plot: draws the barrier"),
        ({"match": "sined"}, "merge.match: input should be a valid dictionary or instance of Match; got 'sined'"),
        ({"match": {"signd": True}}, "merge.match.signd: unknown key; did you mean 'signed'"),
        ({"match": {"signed": True, "orthogonal": True}}, "merge.match: give signed or orthogonal, not both"),
        ({"lmbda": 1}, "merge.lmbda: unknown key"),
    ],
)
def test_a_bad_section_is_named(section, message):
    with pytest.raises(InputError, match=message) as caught:
        MergeRecipe.parse({"merge": {"models": ["a", "b"], **section}, "output": "o"})
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "key", ["model", "calibration", "compress", "convert", "finetune", "block_recovery", "analysis"]
)
def test_what_is_no_part_of_a_merge_is_refused(key):
    with pytest.raises(
        InputError, match=f"r: {key}: no part of a merge; give the merged folder to a recipe of its own"
    ):
        MergeRecipe.parse({"merge": {"models": ["a", "b"]}, "output": "o", key: {}}, "r")


def test_models_that_differ_are_refused_and_nothing_is_written(pair, tmp_path, text):
    def refused(*models, **keys):
        with pytest.raises(InputError) as caught:
            llmcompress.merge_models(models, tmp_path / "out", **keys)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*")), "no work is left"
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    small = save_tiny(tmp_path / "small", vocab_size=60)
    assert f"model.embed_tokens.weight: shape (120, 32) in {pair[0]}, (60, 32) in {small}" in refused(pair[0], small)
    wide = save_tiny(tmp_path / "wide", intermediate_size=64)
    assert "model.layers.0.mlp.gate_proj.weight: shape (48, 32)" in refused(pair[0], wide)
    deep = save_tiny(tmp_path / "deep", num_hidden_layers=4)
    assert f"model.layers.3.self_attn.q_proj.weight: only in {deep}" in refused(pair[0], deep)
    tied = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    assert f"lm_head.weight: tied in {tied} alone" in refused(pair[0], tied)
    broken = shutil.copytree(pair[1], tmp_path / "broken")
    values = load_file(broken / "model.safetensors")
    values["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(values, broken / "model.safetensors", {"format": "pt"})
    assert f"model.layers.1.mlp.up_proj.weight: not finite in {broken}" in refused(pair[0], broken)
    compressed = tmp_path / "compressed"
    llmcompress.apply(llmcompress.Recipe.parse(recipe(pair[0], text, compressed)))
    assert f"{compressed}: is compressed or quantized" in refused(pair[0], compressed)
    gpt2 = save_tiny(tmp_path / "gpt2", "gpt2")
    assert "signs cannot flip in this model" in refused(gpt2, gpt2, match="signed")
    assert "cannot be rotated: lm_head is tied" in refused(tied, tied, match="orthogonal")
    assert "is not a model folder" in refused(pair[0], tmp_path)
    assert "exceeds the model's context of 64" in refused(*pair, barrier=str(text), eval={"length": 65})


def test_a_folder_that_holds_something_else_is_left_alone(pair, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="holds something else already"):
        llmcompress.merge_models(pair, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    before = files(pair[1])
    with pytest.raises(InputError, match="holds something else already"):
        llmcompress.merge_models(pair, pair[1])
    assert files(pair[1]) == before, "an input is never overwritten"


def test_an_alignment_that_changes_the_function_is_never_written(pair, tmp_path, monkeypatch):
    """A wrong element: the FFN's neurons in one map only."""

    def wrong(groups, *_, **__):
        found = Alignment.identity(groups)
        found.index["0.q"] = found.index["0.q"].flip(0)
        return decoder_matching.Matched(found, 1, [1.0])

    monkeypatch.setattr(align, "match_decoder", wrong)
    with pytest.raises(RunError, match=r"its aligned copy computes something else .* use match: none"):
        llmcompress.merge_models(pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_configs_that_differ_are_said(pair, tmp_path, caplog):
    other = shutil.copytree(pair[1], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    llmcompress.merge_models([pair[0], other], tmp_path / "out")
    assert f"{other}: its config differs from that of {pair[0]} in rms_norm_eps, whose is kept" in caplog.text


# --- interruption and memory -----------------------------------------------------------------------------------------


def test_an_interrupted_match_goes_on_and_ends_in_the_same_bytes(pair, unrelated, tmp_path, monkeypatch):
    models = [pair[0], unrelated]
    llmcompress.merge_models(models, tmp_path / "undisturbed")
    original, sweeps = merge_run.DiskStore.put, []

    def put(self, key, *rest):
        original(self, key, *rest)
        sweeps.append(key)
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_run.DiskStore, "put", put)
    for _ in range(20):
        with pytest.raises(KeyboardInterrupt):
            llmcompress.merge_models(models, tmp_path / "out")
        if merge_run.DiskStore(next(tmp_path.glob(".out.work-*")) / "store").get("match")[1][1]:
            break
    assert len(sweeps) >= 2, "after the first sweep, and after the last"
    monkeypatch.undo()
    llmcompress.merge_models(models, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


PEAK = """if True:
    import sys
    import llmcompress
    llmcompress.merge_models(sys.argv[1:3], sys.argv[3])
    # not getrusage: its peak counts what the parent held when it forked
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_depth(tmp_path):
    """Two models of 40 blocks are 280 MB, three quarters of it beyond those of 10 blocks."""
    peaks = {}
    for depth in (10, 40):
        size = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": depth}
        a = save_tiny(tmp_path / f"a{depth}", shard="20MB", **size)
        model = load_model(Location(a))
        assert len(find_groups(model).blocks) == depth
        for parameter in model.parameters():
            parameter.data.mul_(1.01)
        model.save_pretrained(tmp_path / f"b{depth}", max_shard_size="20MB")
        tiny_tokenizer().save_pretrained(tmp_path / f"b{depth}")
        arguments = [str(a), str(tmp_path / f"b{depth}"), str(tmp_path / f"out{depth}")]
        done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks[depth] = int(done.stdout)
        bytes_of_one = sum(file.stat().st_size for file in a.glob("*.safetensors")) / 1024
    assert peaks[40] <= 1.15 * peaks[10]
    assert bytes_of_one > 0.15 * peaks[40], "large enough for a model held in memory to be seen"
    AutoModelForCausalLM.from_pretrained(tmp_path / "out40")
    AutoTokenizer.from_pretrained(tmp_path / "out40")
