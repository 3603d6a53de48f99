"""Backends at their ports: samplers and streams in calibration, solvers and coders in methods, analyses of a model."""

import importlib.util
import json
import logging
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from llmcompress import InputError, Recipe, catalog
from llmcompress.analyze import analyze_model, build_analysis, gather, parse_options
from llmcompress.backends.choice import Backend
from llmcompress.backends.ports import PORTS, Analysis, Subject
from llmcompress.backends.recovery.outliers import largest_entries
from llmcompress.backends.report import Curve, Report
from llmcompress.calibration.collect import InputStatistics
from llmcompress.calibration.text import pack, tokenize
from llmcompress.compressors.svd_llm import refit_by, refit_output_factor
from llmcompress.models.load import Location, load_model
from llmcompress.pipeline import Pipeline
from llmcompress.types import Site
from tests.tiny import recipe, save_tiny, tiny_model, tiny_tokenizer, write_text

SAMPLERS = catalog.names("backend", "sampler")
SOLVERS = catalog.names("backend", "solver")
CODERS = catalog.names("backend", "sparse coder")
RECOVERIES = catalog.names("backend", "recovery")
SITE = Site("x", "q", 0, 12, 5, "x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "letters.txt")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the catalogue ---------------------------------------------------------------------------------------------------


def test_every_backend_has_a_port_a_group_and_is_found_by_its_module():
    for entry in catalog.entries():
        if entry.kind == "backend":
            assert entry.port in PORTS
            assert entry.group
            assert catalog.get("backend", entry.module, entry.port) == entry


# --- samplers --------------------------------------------------------------------------------------------------------


def rows(n=3000, seed=0):
    scale = torch.rand(n, 1, generator=generator(seed)) ** -0.2
    return torch.randn(n, 12, generator=generator(seed + 1)) * scale


def collected(x, sampler, needs=frozenset({"gram", "abs_sum"}), seed=0):
    statistics = InputStatistics([SITE], needs, torch.device("cpu"), sampler, rows=len(x), seed=seed)
    for part in x.split(700):
        if "cross" in needs:
            statistics.receive_dense(SITE, 2 * part)
        statistics.receive(SITE, part)
    return statistics.sums["x"], statistics.finish()


@pytest.mark.parametrize("name", SAMPLERS)
def test_weighted_rows_enter_every_statistic(name):
    x = rows()
    sampler = Backend(name=name, n_samples=600).build("sampler")
    sums, _ = collected(x, sampler, frozenset({"gram", "abs_sum", "cross"}))
    exact, _ = collected(x, None, frozenset({"gram", "abs_sum", "cross"}))
    assert sums.tokens == pytest.approx(3000, rel=0.25)
    for field in ("gram", "abs_sum", "cross"):
        found, whole = getattr(sums, field), getattr(exact, field)
        assert float((found - whole).norm() / whole.norm()) <= 0.35
    torch.testing.assert_close(sums.cross, 2 * sums.gram, rtol=1e-5, atol=1e-3)  # the same rows, equally weighted
    again, _ = collected(x, sampler, frozenset({"gram"}))
    assert torch.equal(sums.gram, again.gram)
    other, _ = collected(x, sampler, frozenset({"gram"}), seed=1)
    assert not torch.equal(sums.gram, other.gram)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_gram_is_unbiased(name):
    x = rows(400)
    sampler = Backend(name=name, n_samples=60).build("sampler")
    total = sum(collected(x, sampler, frozenset({"gram"}), seed)[0].gram for seed in range(200)) / 200
    exact = collected(x, None, frozenset({"gram"}))[0].gram
    assert float((total - exact).norm() / exact.norm()) <= 0.06


def test_as_many_samples_as_rows_keep_them_all():
    x = rows(300)
    exact = collected(x, None)[0].gram
    for name in ("uniform", "sensitivity"):
        found = collected(x, Backend(name=name, n_samples=300).build("sampler"))[0].gram
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


def test_a_sampler_that_cannot_names_the_site():
    with pytest.raises(InputError, match=r"^x: n_samples 5 is below the rank 12"):
        collected(rows(100), Backend(name="sensitivity", n_samples=5).build("sampler"))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_recipe_calibrates_on_sampled_rows(name, folder, text, tmp_path):
    """One run with a sampler and a stream: other weights than without, the same ones again."""
    base = recipe(folder, text, tmp_path / "out")
    base["calibration"] |= {"sampler": {"name": name, "n_samples": 96}, "stream": "top_eigenvector"}
    metrics = Pipeline(Recipe.parse(base), _Quiet()).run().metrics
    again = Pipeline(Recipe.parse(base | {"output": str(tmp_path / "again")}), _Quiet()).run().metrics
    plain = Pipeline(Recipe.parse(recipe(folder, text, tmp_path / "plain")), _Quiet()).run().metrics
    errors = [[site["error"] for site in found["sites"]] for found in (metrics, again, plain)]
    assert errors[0] == errors[1]
    assert errors[0] != errors[2]
    assert metrics["size"] | {"bytes": None} == plain["size"] | {"bytes": None}


class _Quiet:
    def start(self, stage, total):
        pass

    def advance(self, detail):
        pass


def test_a_stream_logs_what_it_finds(folder, text, tmp_path, caplog):
    base = recipe(folder, text, tmp_path / "out")
    base["calibration"]["stream"] = {"name": "top_eigenvector", "max_heavy": 4}
    with caplog.at_level(logging.INFO, "llmcompress"):
        Pipeline(Recipe.parse(base), _Quiet()).run()
    told = [record.getMessage() for record in caplog.records if "top direction holds" in record.getMessage()]
    assert len(told) == 12  # four distinct inputs in each of three blocks
    assert told[0].startswith("model.layers.0.self_attn.q_proj: ")


# --- solvers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_solves_least_squares(name):
    design = torch.randn(300, 20, dtype=torch.float64, generator=generator())
    target = torch.randn(300, 6, dtype=torch.float64, generator=generator(1))
    exact = torch.linalg.lstsq(design, target).solution
    options = {"linf_sketch": {"oversampling": 40}, "conjugate_direction": {"tol": 1e-9}}.get(name, {})
    found = Backend(name=name, **options).build("solver").solve(design, target, generator())
    assert float((found.x - exact).abs().max()) <= 1e-6
    assert found.notes


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_can_do_the_refit_of_svd_llm(name):
    X = torch.randn(200, 16, dtype=torch.float64, generator=generator())
    gram, A = X.T @ X, torch.randn(16, 4, dtype=torch.float64, generator=generator(2))
    right = X.T @ torch.randn(200, 9, dtype=torch.float64, generator=generator(3))
    options = {"conjugate_direction": {"tol": 1e-10, "rank": 4}, "block_coordinate": {"tol": 1e-12}}.get(name, {})
    found = refit_by(Backend(name=name, **options).build("solver"), A, gram, right, generator())
    torch.testing.assert_close(found.x, refit_output_factor(A, gram, right), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_in_recipes(name, folder, text, tmp_path):
    step = {"targets": ["q", "down"], "refit": True, "propagate": True}
    outcome = Pipeline(Recipe.parse(recipe(folder, text, tmp_path / "svd", **step, solver=name)), _Quiet()).run()
    exact = Pipeline(Recipe.parse(recipe(folder, text, tmp_path / "exact", **step)), _Quiet()).run()
    assert outcome.metrics["size"]["targeted"] == exact.metrics["size"]["targeted"]
    step = {"method": "cospadi", "targets": ["up"], "structure": "cospadi", "ratio": 0.2, "refit": name}
    notes = _notes(Pipeline(Recipe.parse(recipe(folder, text, tmp_path / "cospadi", **step)), _Quiet()).run())
    told = [note.rsplit("relative error ", 1)[1] for note in notes if "dictionary refit" in note]
    assert told
    for line in told:
        after, before = (float(word) for word in line.removesuffix(" before it").split(", "))
        assert after <= before * 1.05 + 1e-4


def _notes(outcome):
    return [note for site in outcome.metrics["sites"] for note in site["notes"]]


# --- coders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODERS)
def test_coders_in_recipes(name, folder, text, tmp_path):
    step = {"method": "cospadi", "structure": "cospadi", "ratio": 0.2, "coder": {"name": name}}
    outcome = Pipeline(Recipe.parse(recipe(folder, text, tmp_path / "out", **step)), _Quiet()).run()
    told = [note for note in _notes(outcome) if "coder: relative error" in note]
    assert len(told) >= 12
    plain = Pipeline(Recipe.parse(recipe(folder, text, tmp_path / "plain", **step | {"coder": None})), _Quiet()).run()
    assert outcome.metrics["size"]["targeted"]["compressed"] <= plain.metrics["size"]["targeted"]["compressed"]


# --- groupings -------------------------------------------------------------------------------------------------------

GROUPINGS = catalog.names("backend", "grouping")
BASELINES = {"uniform", "random", "k_means"}  # they have no analysis


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Nine blocks, of which every third reads the same directions."""
    model = tiny_model("llama", num_hidden_layers=9)
    with torch.no_grad():
        planes = [torch.linalg.qr(torch.randn(32, 6, generator=generator(i)))[0] for i in range(3)]
        for index, layer in enumerate(model.model.layers):
            for part in (layer.self_attn, layer.mlp):
                for module in (m for m in part.children() if isinstance(m, torch.nn.Linear) and m.in_features == 32):
                    module.weight.copy_(2 * module.weight @ planes[index % 3] @ planes[index % 3].T)
    folder = tmp_path_factory.mktemp("deep") / "model"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def groups_told(caplog):
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("compress.0.grouping: ")]
    return {m.split()[1]: m.partition("blocks ")[2].split("; ") for m in told}


PLANTED = {"bootstrap_amg": {"neighbors": 2, "attributes": []}}  # depth says nothing in this model


@pytest.mark.parametrize(
    ("method", "name"), [*(("basis_sharing", name) for name in GROUPINGS), ("cospadi", "bootstrap_amg")]
)
def test_groupings_choose_the_blocks_that_share(method, name, deep, text, tmp_path, caplog):
    """Every grouping in both methods: as many groups as without, a checkpoint that loads, the same groups again."""
    step = {"method": method, "layers": 3, "targets": ["q", "up"], "ratio": 0.3}
    step["grouping"] = {"name": name, **PLANTED.get(name, {})}
    step |= {"share": "layers", "structure": "low_rank"} if method == "cospadi" else {}
    with caplog.at_level(logging.INFO, "llmcompress"):
        outcome = Pipeline(Recipe.parse(recipe(deep, text, tmp_path / "out", **step)), _Quiet()).run()
    found = groups_told(caplog)
    assert set(found) == {"q", "up"}
    for groups in found.values():
        assert len(groups) == 3
        assert sorted(int(block) for group in groups for block in group.split()) == list(range(9))
    if name in ("k_means", "bootstrap_amg"):  # those that see subspaces
        assert sorted(found["q"]) == ["0 3 6", "1 4 7", "2 5 8"]
    model = load_model(Location(tmp_path / "out"))
    layers = model.model.layers
    for group in found["q"]:
        first, *others = [layers[int(block)].self_attn.q_proj for block in group.split()]
        assert all(other.A is first.A for other in others)
    assert outcome.metrics["size"]["targeted"]["removed"] >= 0.3
    caplog.clear()
    with caplog.at_level(logging.INFO, "llmcompress"):
        Pipeline(Recipe.parse(recipe(deep, text, tmp_path / "again", **step)), _Quiet()).run()
    assert groups_told(caplog) == found


def test_groups_that_read_alike_lose_less(deep, text, tmp_path):
    """Where every third block reads the same directions, neighbours are the wrong ones to share with."""
    loss = {}
    for name in (None, "random", "k_means", "bootstrap_amg"):
        step = {"method": "basis_sharing", "layers": 3, "targets": ["q"], "ratio": 0.5}
        step["grouping"] = name and {"name": name, **PLANTED.get(name, {})}
        given = Recipe.parse(recipe(deep, text, tmp_path / str(name), **step))
        Pipeline(given, _Quiet()).run()
        dense, made = load_model(Location(deep)), load_model(Location(tmp_path / str(name)))
        loss[name] = sum(
            float((a.self_attn.q_proj.weight - b.self_attn.q_proj.to_dense()).detach().square().sum())
            for a, b in zip(dense.model.layers, made.model.layers, strict=True)
        )
    print(loss)
    assert loss["bootstrap_amg"] <= 1e-6 * loss[None]
    assert loss["k_means"] <= 1e-6 * loss[None]
    assert loss["random"] > 1e3 * loss["k_means"]


def test_a_grouping_that_cannot_names_its_key(folder, text, tmp_path):
    step = {"method": "basis_sharing", "layers": 1, "targets": ["q"], "grouping": "ila_sdp"}
    with pytest.raises(InputError, match=r"compress\.0\.grouping: q of 3 blocks in 3 groups: X must have at least 4"):
        Pipeline(Recipe.parse(recipe(folder, text, tmp_path / "out", **step)), _Quiet()).run()
    assert not (tmp_path / "out").exists()


def test_groups_of_the_real_models_heads(smollm2):
    """One basis a group of query heads: the graph's groups against depth order, k-means and random ones."""
    whole = Subject([], {}, {}, {}, model=smollm2, tokens=torch.zeros(1, 1, dtype=torch.long))
    found = report("bootstrap_amg", whole)
    error = {row["groups"]: row["error"] for row in cells(found)}
    print(error)
    assert error["bootstrap AMG, graph alone"] <= 0.985 * error["k-means"]
    assert error["bootstrap AMG"] <= 0.97 * error["random"]
    assert abs(error["bootstrap AMG"] / error["contiguous"] - 1) <= 0.03  # a tie with depth order
    found = report("ila_sdp", whole)
    objective = {row["groups"]: row["profile objective"] for row in cells(found)}
    starts = [value for name, value in objective.items() if name.startswith("EM")]
    print(objective)
    assert objective["iLA-SDP"] >= objective["k-means"] - 1e-6
    assert objective["iLA-SDP"] >= max(starts) - 1e-6
    assert objective["iLA-SDP"] - min(starts) >= 10


# --- recipes are checked ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibration": {"sampler": "sensitivty"}},
         r"recipe: calibration\.sampler: unknown sampler 'sensitivty'; did you mean 'sensitivity'\?"),
        ({"calibration": {"sampler": "linf_sketch"}}, r"calibration\.sampler: unknown sampler 'linf_sketch'"),
        ({"calibration": {"sampler": {"name": "volume", "rnk": 3}}},
         r"calibration\.sampler\.rnk: unknown key; did you mean 'rank'\?"),
        ({"calibration": {"sampler": {"name": "sensitivity", "p": 0.5}}}, r"calibration\.sampler\.p: input should be"),
        ({"compress": [{"method": "svd_llm", "refit": True, "propagate": True, "solver": "volume"}]},
         r"compress\.0\.solver: unknown solver 'volume'"),
        ({"compress": [{"method": "svd_llm", "solver": "linf_sketch"}]}, "it needs refit: true"),
        ({"compress": [{"method": "cospadi", "coder": {"name": "kronecker_sbl", "step": 1}}]},
         r"compress\.0\.coder\.step: unknown key"),
        ({"compress": [{"method": "basis_sharing", "grouping": "bootstrap_agm"}]},
         r"compress\.0\.grouping: unknown grouping 'bootstrap_agm'; did you mean 'bootstrap_amg'\?"),
        ({"compress": [{"method": "basis_sharing", "grouping": {"name": "k_means", "rnk": 3}}]},
         r"compress\.0\.grouping\.rnk: unknown key; did you mean 'rank'\?"),
        ({"compress": [{"method": "cospadi", "grouping": "k_means"}]}, "it needs share: layers"),
    ],
)  # fmt: skip
def test_bad_choices_are_named(change, message):
    base = {"model": "m", "output": "o", "compress": [{"method": "svd_llm"}]}
    with pytest.raises(InputError, match=message):
        Recipe.parse(base | change)


# --- analyses --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject(smollm2, smollm2_tokenizer, wikitext):
    """Three inputs of SmolLM2 and the residual stream behind their blocks, on 2,048 tokens."""
    tokens = pack(tokenize(smollm2_tokenizer, [wikitext["valid"][:20000]]), 4, 512, "wikitext")
    targets = [r"layers\.1\.self_attn\.q_proj", r"layers\.12\.mlp\.gate_proj", r"layers\.25\.mlp\.down_proj"]
    return gather(smollm2, tokens, targets)


Q, GATE, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.12.mlp.gate_proj", "model.layers.25.mlp.down_proj"


def test_gather_sees_what_the_model_sees(smollm2, smollm2_tokenizer, wikitext, subject):
    tokens = pack(tokenize(smollm2_tokenizer, [wikitext["valid"][:20000]]), 4, 512, "wikitext")
    caught = {}
    handle = smollm2.get_submodule(GATE).register_forward_pre_hook(lambda module, args: caught.update(x=args[0]))
    with torch.no_grad():
        hidden = smollm2(input_ids=tokens[:1], output_hidden_states=True).hidden_states
    handle.remove()
    torch.testing.assert_close(subject.inputs[GATE][:512], caught["x"][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(subject.residual[12][:512], hidden[13][0], rtol=1e-4, atol=1e-2)
    assert subject.weights[DOWN].shape == (576, 1536)


def report(name, subject, **options):
    found = build_analysis(name, options).analyze(subject)
    Console(file=None, quiet=True).print(found.table())
    json.dumps(found.as_json(), allow_nan=False)
    return found


def cells(found, **where):
    return [
        dict(zip(found.columns, row, strict=True))
        for row in found.rows
        if all(row[found.columns.index(key)] == value for key, value in where.items())
    ]


def test_lewis_rows_keep_the_down_projections_inputs(subject):
    found = report("sensitivity_sampling", subject, n_samples=320)
    for p in (2.0, 4.0):
        row = cells(found, input=DOWN, p=p)[0]
        assert row["lewis"] < 1
        assert row["uniform"] >= 1.5 * row["lewis"]
    gate = cells(found, input=GATE, p=2.0)[0]
    assert gate["uniform"] / gate["lewis"] < 2  # behind an RMS norm: little to gain, and the report says so


def test_repeated_dpps_carry_the_fit(subject):
    few = type(subject)(subject.sites, {DOWN: subject.inputs[DOWN]}, {}, {i: subject.residual[i] for i in (12, 25)})
    found = report("volume", few)
    for name, gain in (("output of block 12", 20), (DOWN, 1.1)):
        n = min(row["kept"] for row in cells(found, features=name))
        excess = {row["method"]: row["excess"] for row in cells(found, features=name, kept=n)}
        assert excess["repeated_dpp"] <= 2.6
        assert excess["uniform"] >= gain * excess["repeated_dpp"]


def test_the_heavy_store_finds_the_residual_streams_direction(subject):
    found = report("top_eigenvector", subject)
    row = cells(found, **{"rows of": "output of block 12"})[0]
    assert row["with store"] >= 0.99
    assert row["without"] <= 0.8 * row["with store"]
    assert row["heavy"] >= 1


def test_sketched_rows_beat_uniform_ones(subject):
    found = report("linf_sketch", subject)
    loss = {row["sketch"]: row["loss / exact"] for row in cells(found, features="output of block 1")}
    assert loss["srht"] < loss["uniform"]
    assert loss["srht"] <= 1.9  # 1 / (1 - d/m) = 1.6


def test_learned_directions_need_fewer_iterations(subject):
    small = type(subject)(subject.sites[:1], {Q: subject.inputs[Q]}, subject.weights, subject.residual)
    row = cells(report("conjugate_direction", small), input=Q)[0]
    assert row["learned"] <= 0.6 * row["CG"]
    assert row["learned "] <= 0.8 * row["other tokens: CG"]


def test_greedy_blocks_refit_pruned_weights(subject):
    found = report("block_coordinate", subject)
    for row in found.rows:
        cell = dict(zip(found.columns, row, strict=True))
        assert cell["exact"] * (1 - 1e-6) <= cell["greedy"] < cell["pruned"]
    assert cells(found, site=Q)[0]["greedy"] <= 1.02 * cells(found, site=Q)[0]["random"]
    assert found.curves


def test_random_supports_of_activations_are_nearly_orthogonal(subject):
    small = type(subject)(subject.sites[:2], subject.inputs, subject.weights, subject.residual)
    found = report("sparse_regression", small)
    for row in found.rows:
        cell = dict(zip(found.columns, row, strict=True))
        assert cell["random support"] <= 1.1 * cell["OMP"]
        assert cell["random support"] < cell["largest |w|·norm"]
        assert cell["support ratio, free"] <= 4.0001


def test_weight_tiles_are_not_kronecker_sparse(subject):
    small = type(subject)(subject.sites[:1], subject.inputs, subject.weights, subject.residual)
    found = report("kronecker_sbl", small)
    row = cells(found, site=Q)[0]
    assert row["tiles: OMP"] < row["tiles: Kronecker SBL"]
    assert any("warning" in finding for finding in found.findings)
    assert row["am"] <= 1.2 * row["|w|·norm"]
    assert row["|w|·norm"] <= row["am"]  # it does not win, and the report says so


def test_every_backend_but_the_baselines_has_an_analysis():
    for entry in catalog.entries():
        if entry.kind == "backend" and entry.name not in BASELINES:
            loaded = entry.load()
            assert isinstance(loaded(loaded.Options()), Analysis), entry.name


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_and_writes(folder, text, tmp_path):
    target = tmp_path / "report.json"
    command = [
        sys.executable, "-m", "llmcompress", "analyze", str(folder), "--backend", "sensitivity_sampling",
        "--data", str(text), "--samples", "20", "--length", "16", "--set", "rank=4",
        "--set", "n_samples=60", "--json", str(target),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Lewis rows are" in done.stdout.replace("\n", " ")
    found = json.loads(target.read_text())
    assert found["columns"][0] == "input"
    assert len(found["rows"]) == 24


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("sensitivty", {}, "unknown backend 'sensitivty'; did you mean 'sensitivity'"),
        ("uniform", {}, "backend 'uniform' plugs in at 'sampler' alone: it has no analysis"),
        ("volume", {"rnk": 3}, "--set rnk: unknown key; did you mean 'rank'?"),
        ("volume", {"rank": 0}, "--set rank: Input should be greater"),
    ],
)
def test_a_bad_analysis_is_named(folder, text, backend, options, message):
    with pytest.raises(InputError) as caught:
        analyze_model(str(folder), backend, options, str(text))
    assert message in str(caught.value)


def test_options_are_yaml():
    assert parse_options(["rank=32", "p=1.5", "factors=[4x6, 6x8]"]) == {
        "rank": 32,
        "p": 1.5,
        "factors": ["4x6", "6x8"],
    }
    with pytest.raises(InputError, match="expected KEY=VALUE"):
        parse_options(["rank"])


def test_curves_are_drawn_where_matplotlib_is_installed(tmp_path):
    found = Report("title", ["a"], [[1]], curves=[Curve("one", [0, 1], [1.0, 0.1])], x_label="x", y_label="y")
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(InputError, match=r"needs matplotlib: pip install 'llmcompress\[report\]'"):
            found.save_plot(tmp_path / "plot.svg")
    else:
        found.save_plot(tmp_path / "plot.svg")
        assert "one" in (tmp_path / "plot.svg").read_text()


def test_a_report_without_curves_has_no_plot(tmp_path, folder, text):
    found = analyze_model(str(folder), "volume", {"rank": 3}, str(text), samples=20, length=16)
    with pytest.raises(InputError, match="no curves"):
        found.save_plot(tmp_path / "plot.png")


# --- analyses in a recipe --------------------------------------------------------------------------------------------


def test_a_recipe_runs_analyses_and_keeps_their_reports(folder, text, tmp_path):
    """Another list of them on the same run measures again and compresses nothing again."""
    given = recipe(folder, text, tmp_path / "out")
    section = {"name": "top_eigenvector", "dataset": str(text), "samples": 2, "length": 32}
    first = Pipeline(Recipe.parse(given | {"analysis": [section]}), _Quiet()).run()
    (report,) = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert report["title"] == first.reports[0].title
    assert report["rows"] == first.reports[0].as_json()["rows"]
    weights = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    two = [section, section | {"sites": ["down"]}]
    again = Pipeline(Recipe.parse(given | {"analysis": two}), _Quiet()).run()
    assert len(again.reports) == 2
    assert "compress" not in again.seconds
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == weights
    done = Pipeline(Recipe.parse(given | {"analysis": two}), _Quiet()).run()
    assert done.reports == []


def test_bad_analyses_in_a_recipe(folder, text, tmp_path):
    given = recipe(folder, text, tmp_path / "out")
    for section, message in (
        ({"name": "top_eigenvectr"}, r"analysis\.0: unknown backend 'top_eigenvectr'; did you mean 'top_eigenvector'"),
        ({"name": "top_eigenvector", "rnk": 3}, r"analysis\.0.*rnk"),
        ({"name": "uniform"}, r"analysis\.0: the backend 'uniform' has no analysis"),
        ({"name": "volume", "samples": 0}, r"analysis\.0\.samples"),
    ):
        with pytest.raises(InputError, match=message):
            Recipe.parse(given | {"analysis": [section]})


# --- recoveries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECOVERIES)
def test_recoveries_in_recipes(name, folder, text, tmp_path):
    """The kept entries are exact in the checkpoint as it loads; the notes have the errors beside the SVD's."""
    step = {
        "method": "sparse_low_rank",
        "ratio": 0.2,
        "keep_outliers": 0.02,
        "targets": ["q", "down"],
        "recovery": name,
    }
    outcome = Pipeline(Recipe.parse(recipe(folder, text, tmp_path / "out", **step)), _Quiet()).run()
    told = [note for note in _notes(outcome) if f"{name}, rank" in note]
    assert len(told) == 6
    assert all("relative error" in note and "; SVD " in note for note in told)
    dense, loaded = (load_model(Location(path)) for path in (folder, tmp_path / "out"))
    site = "model.layers.1.mlp.down_proj"
    weight, layer = dense.get_submodule(site).weight, loaded.get_submodule(site)
    mask = largest_entries(weight, 0.02)
    torch.testing.assert_close(layer.to_dense()[mask], weight[mask], rtol=1e-5, atol=1e-6)
    assert layer.entries == round(0.02 * weight.numel())
    x = torch.randn(2, 5, layer.d_in, generator=generator())
    torch.testing.assert_close(layer(x), x @ layer.to_dense().T)


def test_a_gram_is_recovered_from_readings(folder, text, tmp_path, caplog):
    base = recipe(folder, text, tmp_path / "out", targets=["q"])
    base["calibration"]["gram"] = {"name": "subgradient", "rank": 16, "probes": 100, "max_iter": 700}
    with caplog.at_level(logging.INFO, "llmcompress"):
        metrics = Pipeline(Recipe.parse(base), _Quiet()).run().metrics
    told = [record.getMessage() for record in caplog.records if "Gram recovered from" in record.getMessage()]
    assert len(told) == 3
    plain = Pipeline(Recipe.parse(recipe(folder, text, tmp_path / "plain", targets=["q"])), _Quiet()).run().metrics
    assert [site["error"] for site in metrics["sites"]] != [site["error"] for site in plain["sites"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibration": {"gram": "matrix_sensing"}}, "the backend 'matrix_sensing' recovers no gram"),
        ({"calibration": {"gram": {"name": "subgradient", "rh": 0.9}}}, r"gram\.rh: unknown key; did you mean 'rho'"),
        ({"calibration": {"gram": {"name": "subgradient", "step": "loss"}}}, r"gram\.step: input should be"),
        ({"calibration": {"gram": "subgradient", "sampler": "uniform"}}, "is recovered from all rows"),
        ({"compress": [{"method": "sparse_low_rank", "recovery": "volume"}]},
         r"compress\.0\.recovery: unknown recovery 'volume'"),
        ({"compress": [{"method": "sparse_low_rank", "keep_outliers": 1}]}, r"0\.keep_outliers: input should"),
    ],
)  # fmt: skip
def test_bad_recoveries_are_named(change, message):
    with pytest.raises(InputError, match=message):
        Recipe.parse({"model": "m", "output": "o", "compress": [{"method": "svd_llm"}]} | change)


def test_recoveries_of_weights_and_grams(subject):
    small = type(subject)(subject.sites[:1], {Q: subject.inputs[Q]}, subject.weights, subject.residual)
    completion = report("matrix_completion", small)
    row = cells(completion, site=Q)[0]
    assert row["matrix_completion"] < min(row["SVD"], row["SVD, zeros for outliers"])
    sensing = report("matrix_sensing", small, max_iter=150)
    for row in sensing.rows:
        cell = dict(zip(sensing.columns, row, strict=True))
        assert cell["best factors"] <= cell["with it"] * (1 + 1e-6)
    assert "only approaches" in sensing.findings[0]
    gram = cells(report("subgradient", small, max_iter=700), site=Q)[0]
    assert gram["sub-gradient"] <= 0.05 * gram["mean"]
