"""Whatever is written into a recipe: it is valid, or it is refused with an InputError of one line."""

import string

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmcompress import catalog
from llmcompress.errors import InputError
from llmcompress.recipe import Calibration, Compress, Evaluation, Recipe

METHODS = catalog.names("compressor")
ALLOCATIONS = catalog.names("allocation")
OPTIONS = sorted(
    {option for kind in ("compressor", "allocation") for name in catalog.names(kind)
     for option in catalog.get(kind, name).load().Options.model_fields}
)  # fmt: skip

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.text("\n\r\x00\x85\u2028", max_size=3),
    st.sampled_from(["0.3", "1e-3", "input", "none", "attention", "q", "cpu", "float32", "5GB", "\ud800", 2**70]),
    st.floats(0, 1), st.integers(1, 99), st.dates(),
)  # fmt: skip
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3), max_leaves=6
)


def section(model, *more):
    """A mapping with keys of `model` and others, mostly with values that have nothing to do with them."""
    keys = st.one_of(
        st.sampled_from([*model.model_fields, *more]), st.text(string.ascii_lowercase, max_size=5), scalars
    )
    return st.dictionaries(keys, anything, max_size=4)


def often(likely, other):
    return st.one_of(likely, likely, likely, other)


names = often(st.sampled_from(METHODS), anything)
allocations = st.one_of(
    st.sampled_from(ALLOCATIONS),
    st.builds(lambda name, options: {**options, "name": name}, st.sampled_from(ALLOCATIONS),
              st.dictionaries(st.sampled_from(OPTIONS), scalars, max_size=2)),
    anything,
)  # fmt: skip
steps = st.builds(
    lambda method, allocation, more: {"method": method, **allocation, **more},
    names,
    st.fixed_dictionaries({}, optional={"allocation": allocations}),
    often(st.dictionaries(st.sampled_from(OPTIONS), scalars, max_size=2), section(Compress, *OPTIONS)),
)
recipes = st.fixed_dictionaries(
    {"model": often(st.text(max_size=5), anything), "output": often(st.text(min_size=1, max_size=5), anything),
     "compress": often(st.lists(often(steps, anything), max_size=3), anything)},
    optional={
        "calibration": often(section(Calibration), anything), "eval": often(section(Evaluation), anything),
        "dtype": often(st.just("auto"), anything), "seed": anything, "max_shard_size": often(st.just("1GB"), anything),
        "nonsense": anything,
    },
)  # fmt: skip
reasonable = st.fixed_dictionaries(
    {"model": st.text(max_size=5), "output": st.text(min_size=1, max_size=5),
     "compress": st.lists(st.fixed_dictionaries({"method": st.sampled_from(METHODS)}, optional={
         "ratio": st.floats(0, 1, exclude_min=True, exclude_max=True), "targets": st.lists(st.text(), min_size=1),
         "allocation": st.sampled_from(ALLOCATIONS), "propagate": st.booleans(),
     }), min_size=1, max_size=3)},
    optional={"seed": st.integers(0, 2**63 - 1), "max_shard_size": st.from_regex(r"[0-9]{1,4}[KMG]?B", fullmatch=True)},
)  # fmt: skip
thorough = settings(deadline=None, max_examples=200, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def refused_in_one_line(error):
    assert len(str(error).splitlines()) == 1, repr(str(error))
    assert str(error).strip()


def assert_survives_a_round_trip(recipe):
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    again = Recipe.parse(yaml.safe_load(text))
    assert again.model_dump(mode="json") == recipe.model_dump(mode="json")
    for step, twin in zip(recipe.compress, again.compress, strict=True):
        assert type(step.build()) is type(twin.build())
        assert step.build().options == twin.build().options
        assert step.build_allocation().options == twin.build_allocation().options


@thorough
@given(recipes | anything.filter(lambda data: isinstance(data, dict)))
def test_a_mapping_is_a_recipe_or_an_input_error(data):
    try:
        recipe = Recipe.parse(data)
    except InputError as error:
        refused_in_one_line(error)
    else:
        assert_survives_a_round_trip(recipe)


@thorough
@given(reasonable)
def test_a_reasonable_recipe_is_valid(data):
    assert_survives_a_round_trip(Recipe.parse(data))


@thorough
@given(st.one_of(st.text(), st.binary().map(lambda b: b.decode("latin-1")), recipes.map(str)))
def test_a_file_is_a_recipe_or_an_input_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(text, encoding="utf-8", errors="ignore")
    try:
        Recipe.load(path)
    except InputError as error:
        refused_in_one_line(error)


paths = st.one_of(
    st.sampled_from(["seed", "compress.0.ratio", "compress.0.method", "compress.0.allocation", "calibration.length",
                     "compress.0", "compress.-1.ratio", "compress.9.ratio", "model.x", "eval.perplexity.0"]),
    st.text(string.ascii_lowercase + "0.", max_size=12), st.text(max_size=8),
)  # fmt: skip
values = st.one_of(st.text(max_size=12), anything.map(str), st.text("[]{}:,&*!%@`\"'-? \n0", max_size=8))


@thorough
@given(st.lists(st.one_of(st.builds("{}={}".format, paths, values), st.text(max_size=10)), min_size=1, max_size=2))
def test_overrides_give_a_recipe_or_an_input_error(tmp_path_factory, overrides):
    path = tmp_path_factory.getbasetemp() / "base.yaml"
    path.write_text("model: m\noutput: o\ncompress: [{method: svd_llm}]\neval: {perplexity: [a]}\n", encoding="utf-8")
    try:
        recipe = Recipe.load(path, overrides)
    except InputError as error:
        refused_in_one_line(error)
    else:
        assert_survives_a_round_trip(recipe)
