"""The command line: one line and the right exit code for bad input, and nothing written."""

import json
import os
import signal
import sys

import pytest
import torch
import yaml

from llmcompress import __version__, catalog, cli
from llmcompress.calibration.text import python_docs
from llmcompress.recipe import Recipe
from tests.tiny import recipe as tiny_recipe
from tests.tiny import save_tiny, write_text


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs a command in this process: exit code, standard output, standard error."""
    for console in (cli.out, cli.err):
        monkeypatch.setattr(console, "width", 200)
    log = cli.logging.getLogger("llmcompress")
    before = log.level, log.handlers, log.propagate

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["llmcompress", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    yield call
    log.level, log.handlers, log.propagate = before


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "letters.txt", 1000)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder, so that all that is written is seen."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def recipe(tmp_path, model, text, folder):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(model, text, folder / "out")))
    return path


@pytest.fixture
def refused(run, folder):
    """The single line on standard error of a command that fails with this code and writes nothing."""

    def call(code, *arguments):
        found, out, err = run(*arguments)
        assert (found, out) == (code, ""), err
        assert len(err.splitlines()) == 1, err
        assert list(folder.iterdir()) == [], "nothing is written"
        return err

    return call


# --- commands --------------------------------------------------------------------------------------------------------


def test_version_help_and_no_arguments(run):
    assert run("--version") == (0, f"{__version__}\n", "")
    for arguments in (["--help"], []):
        code, out, err = run(*arguments)
        assert (code, err) == (0, "")
        for command in ("apply", "eval", "inspect", "verify", "schema", "backends"):
            assert command in out


def test_backends_lists_the_catalogue(run):
    code, out, _ = run("backends")
    assert code == 0
    for entry in catalog.entries():
        if entry.kind != "layer":
            assert any(entry.name in line and entry.kind in line for line in out.splitlines()), entry.name


def test_schema_is_json(run):
    code, out, _ = run("schema")
    assert code == 0
    assert set(json.loads(out)["$defs"]["Recipe"]["properties"]) == set(Recipe.model_fields)


def test_apply_then_verify_then_eval(run, recipe, folder, text):
    """One life of a checkpoint, in a folder whose name looks like markup."""
    out = folder / "[bold]Größe 🙂"
    code, printed, err = run("apply", "-r", recipe, "-o", out, "--set", "compress.0.ratio=0.4",
                             "--set", f"eval={{perplexity: [{text}], length: 32, windows: 3}}")  # fmt: skip
    assert code == 0, err
    assert "[bold]Größe 🙂" in printed.replace("\n", "")
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["size"]["targeted"]["removed"] == pytest.approx(0.4, abs=0.05)
    shown = f"{metrics['perplexity'][str(text)]['compressed']['perplexity']:.2f}"
    assert shown in printed
    assert list(folder.iterdir()) == [out]

    assert run("verify", out)[:2] == (0, f"{out}: 1 tensor files as written\n")

    code, printed, err = run("eval", out, "--perplexity", text, "--length", 32, "--windows", 3, "--json", "found.json")
    assert code == 0, err
    figures = json.loads((folder / "found.json").read_text())["perplexity"][str(text)]
    assert figures == metrics["perplexity"][str(text)]["compressed"]
    assert f"{figures['perplexity']:.3f}" in printed

    code, printed, err = run(
        "compare", out, folder / "none", "--csv", "t.csv", "--markdown", "t.md", "--json", "t.json"
    )
    assert code == 0, err
    assert err == f"left out: {folder / 'none'}: incomplete: it holds neither metrics.json nor evaluation.json\n"
    for name in ("t.csv", "t.md", "t.json"):
        assert str(metrics["size"]["bytes"]["compressed"]) in (folder / name).read_text().replace(",", "")
    code, printed, err = run("report", out, "-o", "page.html")
    assert (code, printed) == (0, "page.html: 1 runs\n"), err
    assert shown in (folder / "page.html").read_text()

    weights = next(out.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    code, printed, err = run("verify", out)
    assert (code, printed) == (1, "")
    assert "corrupt" in err
    assert len(err.splitlines()) == 1


def test_dry_run_prints_the_plan_and_writes_nothing(run, recipe, folder):
    code, out, err = run("apply", "-r", recipe, "--dry-run")
    assert code == 0, err
    assert "self_attn.q_proj" in out
    assert "svd_llm, 30% removed" in out
    assert list(folder.iterdir()) == []


def test_inspect_prints_and_writes_the_structure(run, model, folder):
    code, out, err = run("inspect", model, "--json", "found.json")
    assert code == 0, err
    assert "gate_proj" in out
    found = json.loads((folder / "found.json").read_text())
    assert len(found["sites"]) == 3 * 7


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["aply"], "No such command 'aply'"),
        (["--nonsense"], "No such option: --nonsense"),
        (["apply"], "Missing option '--recipe' / '-r'"),
        (["apply", "-r"], "requires an argument"),
        (["eval", "model"], "nothing to measure: give --perplexity, --tasks, --speed or --spectra"),
        (["eval", "model", "--speed", "--stride", "0"], "Invalid value for '--stride'"),
        (["compare"], "Missing argument"),
        (["compare", "none"], "none: incomplete: it holds neither metrics.json nor evaluation.json"),
        (["compare", "none", "--csv", "no/x.csv"], "--csv no/x.csv: not a file in an existing folder"),
        (["report", "none"], "none: incomplete: it holds neither metrics.json nor evaluation.json"),
        (["report", "none", "-o", "no/x.html"], "--output no/x.html: not a file in an existing folder"),
        (["sweep", "-r", "none.yaml", "--ratio", "0.3"], "none.yaml: no such recipe"),
        (["eval", "model", "--perplexity", "a.txt", "--length", "1"], "Invalid value for '--length'"),
        (["eval", "model", "--perplexity", "a.txt", "--windows", "many"], "Invalid value for '--windows'"),
        (["inspect"], "Missing argument"),
        (["verify", "a", "b"], "unexpected extra argument"),
    ],
)
def test_wrong_usage(refused, arguments, expected):
    assert expected in refused(2, *arguments)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("compress.0.method=svd_lm", "r.yaml: compress.0.method: unknown method 'svd_lm'; did you mean 'svd_llm'?"),
        ("compress.0.ratio=1", "r.yaml: compress.0.ratio: input should be less than 1; got 1"),
        ("calibration.sample=3", "r.yaml: calibration.sample: unknown key; did you mean 'samples'?"),
        ("compress.0.targets=[q_projj]", "compress.0.targets: 'q_projj' matches no linear map of the blocks"),
        ("compress.0.targets=['(']", "compress.0.targets: '(' is neither a role nor a regular expression"),
        ("calibration.dataset=none.txt", "none.txt: no such file"),
        ("calibration.length=65", "calibration.length: a sequence of 65 tokens exceeds the model's context of 64"),
        ("model=no/such/model/at/all", "model: no folder, no .gguf file and no hub id: no/such/model/at/all"),
        ("model=none.gguf", "model: no file none.gguf"),
        (f"model={'x' * 5000}", "cannot be a path: "),
        (f"output={'x' * 300}", "output: "),
        (f"output={__file__}/out", "output: "),
        ("model=.", "is not a model folder: it has no config.json"),
        ("device=gpu", "device: 'gpu'; expected auto, cpu, cuda or cuda:N"),
        ("eval={perplexity: [none.jsonl], length: 16}", "none.jsonl: no such file"),
        ("eval={perplexity: [python-docs], length: 65}", "a window of 65 tokens exceeds the model's context of 64"),
        ("nonsense", "--set nonsense: expected KEY.PATH=VALUE"),
    ],
)
def test_apply_refuses_bad_recipes(refused, recipe, override, expected):
    assert expected in refused(2, "apply", "-r", recipe, "--set", override)
    assert expected in refused(2, "apply", "--dry-run", "-r", recipe, "--set", override)


def test_apply_refuses_what_is_no_recipe(refused, tmp_path):
    assert "none.yaml: no such recipe" in refused(2, "apply", "-r", tmp_path / "none.yaml")
    assert "output: string should have at least 1 character" in refused(2, "apply", "-r", _minimal(tmp_path), "-o", "")


def test_apply_refuses_text_that_does_not_fit(refused, recipe, tmp_path, text):
    short = write_text(tmp_path / "short.txt", 15)
    found = refused(2, "apply", "-r", recipe, "--set", f"calibration.dataset={short}")
    assert "short.txt: 15 tokens, fewer than one sequence of 16" in found
    small = save_tiny(tmp_path / "small", vocab_size=60)
    found = refused(2, "apply", "-r", recipe, "--set", f"model={small}")
    assert "the model knows 60: not its own" in found


def _minimal(folder):
    path = folder / "m.yaml"
    path.write_text("model: m\noutput: o\ncompress: [{method: svd}]\n")
    return path


def test_apply_leaves_a_folder_that_holds_something_else(run, recipe, folder):
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("precious")
    code, printed, err = run("apply", "-r", recipe)
    assert (code, printed) == (2, "")
    assert len(err.splitlines()) == 1
    assert "holds something else already; name another folder or remove this one" in err
    assert sorted(path.name for path in folder.rglob("*")) == ["out", "thesis.txt"]
    (folder / "file").write_text("precious")
    code, printed, err = run("apply", "-r", recipe, "-o", "file")
    assert (code, printed) == (2, "")
    assert "file is a file; name a folder" in err
    assert (folder / "file").read_text() == "precious"


def test_eval_refuses_before_it_computes(refused, model, text, tmp_path):
    def says(code, *options, at=model, source=text):
        return refused(code, "eval", at, "--perplexity", source, "--length", 16, *options)

    assert "none.txt: no such file" in says(2, source="none.txt")
    assert "is not a model folder" in says(2, at=tmp_path)
    assert "--dtype float8: expected auto, float32" in says(2, "--dtype", "float8")
    assert "--json no/where.json: not a file in an existing folder" in says(2, "--json", "no/where.json")
    assert "not a file in an existing folder" in says(2, "--json", tmp_path)
    assert "exceeds the model's context of 64" in refused(2, "eval", model, "--perplexity", text, "--length", 65)


def test_sweep_refuses_before_it_computes(refused, recipe):
    assert "--ratio 2: every ratio lies between 0 and 1" in refused(2, "sweep", "-r", recipe, "--ratio", "2")
    unknown = refused(2, "sweep", "-r", recipe, "--ratio", "0.3", "--methods", "svd,cospady")
    assert "--methods: unknown method 'cospady'; did you mean 'cospadi'?" in unknown


def test_sweep_prints_the_frontier(run, recipe, folder, text):
    measured = f"eval={{perplexity: [{text}], length: 32, windows: 3}}"
    code, printed, err = run(
        "sweep", "-r", recipe, "--ratio", "0.3,0.5", "--methods", "svd,svd_llm", "--json", "t.json", "--set", measured
    )
    assert code == 0, err
    rows = json.loads((folder / "t.json").read_text())["rows"]
    assert [row["run"] for row in rows] == ["tiny", "svd-0.3", "svd-0.5", "svd_llm-0.3", "svd_llm-0.5"]
    assert "frontier" in printed
    assert f"llmcompress report {folder / 'out'}/*" in printed


def test_inspect_and_verify_refuse_what_is_no_model(refused, model, tmp_path):
    assert "it has no config.json" in refused(2, "inspect", tmp_path)
    (tmp_path / "config.json").write_text("[]")
    (tmp_path / "x.safetensors").write_bytes(b"")
    assert "its config is not usable: " in refused(2, "inspect", tmp_path)
    assert "--json" in refused(2, "inspect", model, "--json", tmp_path / "no" / "x.json")
    assert "not a checkpoint: it has no config.json" in refused(2, "verify", tmp_path / "none")
    assert "records no checksums" in refused(2, "verify", model)


def test_weights_that_are_not_finite_are_named(run, tmp_path, text, folder):
    from safetensors.torch import load_file, save_file

    broken = save_tiny(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(broken, text, folder / "out", method="svd")))
    code, out, err = run("apply", "-r", path)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "model.layers.1.mlp.up_proj: its weight is not finite"
    assert not (folder / "out").exists()


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def blocked(tmp_path):
    """A recipe that is never read to its end: the command waits in it."""
    path = tmp_path / "pipe.yaml"
    os.mkfifo(path)
    return path


@pytest.fixture
def interrupt():
    """Sends an interrupt, as Ctrl-C does, after 0.3 s; also where the tests run in a shell's background."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    signal.signal(signal.SIGINT, handler)


def test_an_interrupt_says_how_to_go_on(refused, blocked, interrupt):
    line = refused(1, "apply", "-r", blocked)
    assert line == "interrupted; finished parts are kept: run the same command again to go on\n"


PLUGIN = """
from llmcompress.catalog import Entry
from llmcompress.compressors.svd import SVD

class Broken(SVD):
    def units(self, sites):
        return 1 // 0

ENTRIES = [Entry("broken", "compressor", __name__ + ":Broken")]
"""


def test_an_unforeseen_failure_is_one_line_too(refused, run, recipe, install_plugin):
    install_plugin(PLUGIN)
    arguments = ("apply", "-r", recipe, "--dry-run", "--set", "compress.0.method=broken")
    line = refused(1, *arguments)
    assert line == "failed: ZeroDivisionError: integer division or modulo by zero; --debug shows where\n"
    with pytest.raises(ZeroDivisionError):
        run("--debug", *arguments)


def test_debug_shows_the_traceback(run, tmp_path):
    with pytest.raises(cli.InputError, match="it has no config"):
        run("--debug", "inspect", tmp_path)


def test_a_reader_that_goes_away_is_no_error(run, monkeypatch, tmp_path):
    """As in `llmcompress schema | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        code, _, err = run("schema")
    assert (code, err) == (1, "")


def test_the_python_docs_need_no_file(run, model):
    code, out, err = run("eval", model, "--perplexity", "python-docs", "--length", 64, "--windows", 2)
    assert code == 0, err
    assert "python-docs" in out
    assert len(python_docs("test")[0]) > 64 * 2
