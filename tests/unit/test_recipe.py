"""A recipe is what it says, or an error of one line with the file, the key's path and the nearest valid name."""

import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from llmcompress import catalog
from llmcompress.errors import InputError
from llmcompress.merge.recipe import MergeRecipe, load_recipe
from llmcompress.recipe import Compress, Recipe
from llmcompress.schema import recipe_schema

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
MINIMAL = {"model": "folder", "output": "out", "compress": [{"method": "svd_llm"}]}


def step(**keys):
    return {**MINIMAL, "compress": [{"method": "svd_llm", **keys}]}


def write(folder, data):
    path = folder / "r.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return path


def message(data, overrides=None, folder=None):
    """The one line with which a recipe is refused."""
    read = Recipe.parse if folder is None else lambda data: Recipe.load(write(folder, data), overrides)
    with pytest.raises(InputError) as caught:
        read(data)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


# --- what is read ----------------------------------------------------------------------------------------------------


def test_every_key_of_a_file_arrives(tmp_path):
    text = """
    model: folder
    dtype: bfloat16
    device: cpu
    seed: 7
    calibration: {dataset: a.jsonl, field: body, samples: 3, length: 5, batch_tokens: 11, backward_samples: 2,
                  targets: sampled}
    compress:
      - {method: fwsvd, targets: ffn, rank_fraction: 0.33, weighting: both}
      - {method: svd, targets: [q, k_proj$], ratio: 0.25, propagate: true, allocation: {name: d_rank, beta: 0.1}}
    eval: {perplexity: [b.txt], length: 9, windows: null, speed: true}
    max_shard_size: 200MB
    output: out
    """
    recipe = Recipe.load(write(tmp_path, text))
    assert (recipe.model, recipe.dtype, recipe.device, recipe.seed) == ("folder", "bfloat16", "cpu", 7)
    assert recipe.calibration.model_dump() == {
        "dataset": "a.jsonl", "field": "body", "samples": 3, "length": 5, "batch_tokens": 11, "backward_samples": 2,
        "mix": None, "sampler": None, "stream": None, "gram": None,
        "targets": "sampled",
    }  # fmt: skip
    first, second = recipe.compress
    assert (first.targets, first.options) == (["ffn"], {"rank_fraction": 0.33, "weighting": "both"})
    assert first.build().options.weighting == "both"
    assert (second.targets, second.ratio, second.propagate) == (["q", "k_proj$"], 0.25, True)
    assert (second.allocation.name, second.allocation.options) == ("d_rank", {"beta": 0.1})
    assert second.build_allocation().options.beta == 0.1
    assert (recipe.eval.perplexity, recipe.eval.windows, recipe.eval.speed) == (["b.txt"], None, True)
    assert (recipe.max_shard_size, recipe.output) == ("200MB", "out")


def test_an_allocation_is_named_with_or_without_options():
    for given in ("loss_aware", {"name": "loss_aware"}):
        assert Recipe.parse(step(allocation=given)).compress[0].allocation.name == "loss_aware"
    assert Recipe.parse(step()).compress[0].allocation.name == "uniform"


@pytest.mark.parametrize("method", catalog.names("compressor"))
def test_every_method_is_built_from_its_name_alone(method):
    built = Recipe.parse(step(method=method)).compress[0].build()
    assert type(built) is catalog.get("compressor", method).load()


@pytest.mark.parametrize("allocation", catalog.names("allocation"))
def test_every_allocation_is_built_from_its_name_alone(allocation):
    built = Recipe.parse(step(allocation=allocation)).compress[0].build_allocation()
    assert type(built) is catalog.get("allocation", allocation).load()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_come_along_are_valid(path):
    recipe = load_recipe(path)
    assert isinstance(recipe, MergeRecipe) or recipe.compress[0].build()


def test_a_recipe_comes_along_for_every_method():
    used = {step.method for path in RECIPES for step in load_recipe(path).compress}
    assert used == set(catalog.names("compressor"))


def test_a_dumped_recipe_is_the_same_recipe():
    data = {**step(allocation={"name": "d_rank", "beta": 0.2}, share="input"), "seed": 3}
    recipe = Recipe.parse(data)
    again = Recipe.parse(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json"))))
    assert again == recipe


def test_a_dump_leaves_out_a_ratio_that_does_not_count():
    """Otherwise the recipe as run, saved beside its result, would ask for both."""
    for given in (step(method="fwsvd", rank_fraction=0.3), step(allocation={"name": "welore", "err": 0.2})):
        dumped = Recipe.parse(given).model_dump(mode="json")
        assert "ratio" not in dumped["compress"][0]
        assert Recipe.parse(dumped).model_dump(mode="json") == dumped
    assert Recipe.parse(step(ratio=0.2)).model_dump()["compress"][0]["ratio"] == 0.2
    assert Recipe.parse(step(method="fwsvd", rank_fraction=None)).model_dump()["compress"][0]["ratio"] == 0.3


# --- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=5", ("seed",), 5),
        ("compress.0.ratio=0.4", ("compress", 0, "ratio"), 0.4),
        ("compress.0.ratio=4e-1", ("compress", 0, "ratio"), 0.4),
        ("compress.0.targets=[q, k]", ("compress", 0, "targets"), ["q", "k"]),
        ("compress.0.allocation={name: d_rank, beta: 0.5}", ("compress", 0, "allocation", "beta"), 0.5),
        ("calibration.samples=9", ("calibration", "samples"), 9),
        ("eval.windows=null", ("eval", "windows"), None),
        ("output=a=b", ("output",), "a=b"),
        ('output="zwei Wörter 🙂"', ("output",), "zwei Wörter 🙂"),
    ],
)
def test_an_override_sets_its_key_alone(tmp_path, override, path, value):
    found = Recipe.load(write(tmp_path, MINIMAL), [override]).model_dump()
    place = found
    for part in path[:-1]:
        place = place[part]
    assert place[path[-1]] == value
    plain = Recipe.load(write(tmp_path, MINIMAL)).model_dump()
    assert {k: v for k, v in found.items() if k != path[0]} == {k: v for k, v in plain.items() if k != path[0]}


def test_overrides_reach_into_a_section_that_the_file_leaves_empty(tmp_path):
    text = "model: m\noutput: o\ncompress: [{method: svd}]\ncalibration:\n"
    recipe = Recipe.load(write(tmp_path, text), ["calibration.length=8", "calibration.samples=2"])
    assert (recipe.calibration.length, recipe.calibration.samples) == (8, 2)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", r"--set seed: expected KEY\.PATH=VALUE"),
        ("=5", r"--set =5: expected KEY\.PATH=VALUE"),
        ("compress.1.ratio=0.4", r"the recipe has no place 'compress\.1\.ratio'"),
        ("compress.x.ratio=0.4", r"no place 'compress\.x\.ratio'"),
        ("model.a=1", r"no place 'model\.a'"),
        ("model.a.b.c=1", r"no place 'model\.a\.b\.c'"),
        ("seed=[", r"--set seed=\[: the value is not YAML"),
        ("seed=2024-13-01", r"--set seed=2024-13-01: the value is not YAML"),
        ("compress.0.ratio=1.5", r"r\.yaml: compress\.0\.ratio: input should be less than 1; got 1\.5"),
        ("compress.0.ratoi=0.5", r"r\.yaml: compress\.0\.ratoi: unknown key; did you mean 'ratio'\?"),
        ("calibration.sampels=5", r"r\.yaml: calibration\.sampels: unknown key; did you mean 'samples'\?"),
        ("seed=" + "9" * 5000, "the value is not YAML"),
        ("seed=" + "[" * 5000, "the value is not YAML"),
    ],
)
def test_bad_overrides(tmp_path, override, expected):
    assert re.search(expected, message(MINIMAL, [override], tmp_path))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({**MINIMAL, "calibraton": {}}, "recipe: calibraton: unknown key; did you mean 'calibration'?"),
        ({**MINIMAL, "calibration": {"lenght": 5}}, "recipe: calibration.lenght: unknown key; did you mean 'length'?"),
        ({**MINIMAL, "eval": {"zzz": 5}}, "recipe: eval.zzz: unknown key; known: perplexity, length, windows"),
        ({"modle": "m", "output": "o", "compress": [{"method": "svd"}]},
         "recipe: modle: unknown key; did you mean 'model'?"),
        ({**MINIMAL, "compress": [{"methd": "svd"}]}, "compress.0.methd: unknown key; did you mean 'method'?"),
        ({"model": "m", "output": "o"}, "recipe: compress: is required"),
        ({**MINIMAL, "compress": [{}]}, "recipe: compress.0.method: is required"),
        ({**MINIMAL, "compress": []}, "recipe: compress: list should have at least 1 item"),
        (step(method="svd_lm"), "recipe: compress.0.method: unknown method 'svd_lm'; did you mean 'svd_llm'?"),
        (step(method="zzz"), "recipe: compress.0.method: unknown method 'zzz'; known: svd, asvd, svd_llm"),
        (step(allocation="unifrom"), "recipe: compress.0.allocation: unknown allocation 'unifrom'; did you mean 'uni"),
        (step(allocation={"name": "d_rank", "bta": 1}), "compress.0.allocation.bta: unknown key; did you mean 'beta'?"),
        (step(allocation={"name": "d_rank", "beta": 1}), "compress.0.allocation.beta: input should be less than 1"),
        (step(allocation={"beta": 1}), "compress.0.allocation.name: is required"),
        (step(whitning="eigh"), "recipe: compress.0.whitning: unknown key; did you mean 'whitening'?"),
        (step(whitening="eig"), "recipe: compress.0.whitening: input should be 'cholesky' or 'eigh'; got 'eig'"),
        (step(method="svd", whitening="eigh"), "recipe: compress.0.whitening: unknown key; known: pivot, share"),
        (step(targets=[]), "recipe: compress.0.targets: list should have at least 1 item"),
        (step(ratio=0.2, method="fwsvd", rank_fraction=0.3), "compress.0: give ratio or rank_fraction, not both"),
        (step(ratio=0.2, allocation={"name": "welore", "err": 0.3}), "compress.0: give ratio or err, not both"),
        ({**MINIMAL, "dtype": "float33"}, "recipe: dtype: input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({**MINIMAL, "seed": -1}, "recipe: seed: input should be greater than or equal to 0; got -1"),
        ({**MINIMAL, "seed": 2**63}, "recipe: seed: input should be less than"),
        ({**MINIMAL, "output": ""}, "recipe: output: string should have at least 1 character"),
        ({**MINIMAL, "max_shard_size": "5 potatoes"}, "recipe: max_shard_size: string should match pattern"),
        ({**MINIMAL, "calibration": {"length": 1}}, "calibration.length: input should be greater than or equal to 2"),
        ({**MINIMAL, "calibration": 5}, "recipe: calibration: input should be a valid dictionary"),
        ({**MINIMAL, 5: 5}, "recipe: 5: keys should be strings"),
        ({**MINIMAL, "a\nb": 5}, "recipe: a b: unknown key"),
        ({**MINIMAL, "seed": "x" * 1000}, "xxx..."),
        ({**MINIMAL, "model": "\ud800"}, "recipe: holds what cannot be saved: Error serializing to JSON: Unicode"),
    ],
)  # fmt: skip
def test_the_line_names_the_key_and_what_would_be_right(data, expected):
    found = message(data)
    assert expected in found
    assert len(found) < 400


@pytest.mark.parametrize("ratio", [0, 1, -0.1, float("nan"), "much", None, True])
def test_a_ratio_outside_the_unit_interval(ratio):
    assert message(step(ratio=ratio)).startswith("recipe: compress.0.ratio: input should be ")


def test_bad_files(tmp_path):
    def refused(path):
        with pytest.raises(InputError) as caught:
            Recipe.load(path)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    assert refused(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such recipe"
    assert "cannot be read" in refused(tmp_path)
    assert "r.yaml: not YAML: while parsing" in refused(write(tmp_path, "model: [1, 2"))
    assert "r.yaml: not YAML" in refused(write(tmp_path, "seed: 2024-13-01"))
    for text in ("", "- model", "word"):
        assert "r.yaml: a recipe is a mapping of keys" in refused(write(tmp_path, text))
    path = tmp_path / "latin.yaml"
    path.write_bytes("model: \xe9".encode("latin-1"))
    assert "latin.yaml: cannot be read: 'utf-8' codec can't decode" in refused(path)


# --- the schema ------------------------------------------------------------------------------------------------------


def test_the_schema_has_each_method_with_its_own_options():
    steps = {found["properties"]["method"]["const"]: found for found in recipe_schema()["$defs"]["Compress"]["anyOf"]}
    assert list(steps) == catalog.names("compressor")
    for method, found in steps.items():
        options = catalog.get("compressor", method).load().Options.model_fields
        assert set(found["properties"]) == set(Compress.model_fields) | set(options)
        assert found["additionalProperties"] is False
        assert all(found["properties"][name].get("description") for name in options), "an option is described"
    assert steps["svd_llm"]["properties"]["whitening"]["enum"] == ["cholesky", "eigh"]


def test_the_schema_takes_short_forms():
    """`targets: ffn` and `allocation: uniform`, which the parser takes too."""
    found = recipe_schema()["$defs"]["Compress"]["anyOf"][0]["properties"]
    assert {"type": "string"} in found["targets"]["anyOf"]
    name, *forms = found["allocation"]["anyOf"]
    assert name["enum"] == catalog.names("allocation")
    assert [form["properties"]["name"]["const"] for form in forms] == catalog.names("allocation")
    assert "beta" in forms[name["enum"].index("d_rank")]["properties"]


@pytest.fixture(scope="module")
def validator():
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_house_fits_the_schema(path, validator):
    validator.validate(yaml.safe_load(path.read_text()))


MERGE = {"models": ["a", "b"]}


@pytest.mark.parametrize("match", ["auto", "signed", "orthogonal", "none", None, {"signed": True, "max_iter": 3}])
def test_the_schema_of_a_merge_takes_each_match(match, validator):
    validator.validate({"merge": {**MERGE, "match": match}, "output": "o"})


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"merge": {**MERGE, "match": "sined"}, "output": "o"}, "merge/match"),
        ({"merge": {**MERGE, "lmbda": 1}, "output": "o"}, "merge"),
        ({"merge": {**MERGE, "lam": 1.5}, "output": "o"}, "merge/lam"),
        ({"merge": MERGE, "compress": [], "output": "o"}, ""),
        ({"merge": MERGE}, ""),
        ({"model": "m", "output": "o"}, ""),
    ],
)
def test_the_schema_refuses_what_the_parser_refuses(data, key, validator):
    assert ["/".join(error.path) for error in validator.iter_errors(data)] == [key]
    with pytest.raises(InputError):
        (MergeRecipe if "merge" in data else Recipe).parse(data)


def test_the_schema_refers_only_to_what_it_defines():
    schema = recipe_schema()
    references = re.findall(r"'\$ref': '#/\$defs/(\w+)'", str(schema))
    sections = {"Analysis", "Calibration", "Compress", "Evaluation", "Finetune", "SelfGuided", "BlockRecovery",
                "FactorStorage", "Mix", "Match", "Merge", "MergeRecipe", "Recipe"}  # fmt: skip
    assert set(references) == sections | {"Backend", "Optimizer"} <= set(schema["$defs"])
