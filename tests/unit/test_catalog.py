"""Every entry of the catalogue loads; plug-ins join it; listing it imports nothing heavy."""

import subprocess
import sys

import pytest
from pydantic import BaseModel

from llmcompress import catalog
from llmcompress.errors import InputError
from llmcompress.layers.base import StructuredLinear
from llmcompress.types import Compressor, Statistics

ENTRIES = catalog.entries()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.kind}-{entry.name}")
def test_every_entry_loads_to_what_its_kind_promises(entry):
    loaded = entry.load()
    if entry.kind == "layer":
        assert issubclass(loaded, StructuredLinear)
        assert loaded.kind == entry.name
        return
    assert issubclass(loaded.Options, BaseModel)
    assert loaded.Options.model_config["extra"] == "forbid", "a misspelt option must be refused"
    assert entry.summary, "what `llmcompress backends` prints"
    built = loaded(loaded.Options())
    if entry.kind == "compressor":
        assert all(callable(getattr(built, name)) for name in vars(Compressor) if not name.startswith("_"))
        assert built.needs <= set(Statistics.SUMS)
    if entry.kind == "allocation":
        assert callable(built.allocate)
        assert isinstance(built.needs_profiles, bool)


def test_names_are_unique_and_of_known_kinds():
    keys = [(entry.kind, entry.port, entry.name) for entry in ENTRIES]
    assert len(set(keys)) == len(keys)
    assert {entry.kind for entry in ENTRIES} <= {"compressor", "allocation", "optimizer", "layer", "backend"}
    assert catalog.names("compressor") == [entry.name for entry in ENTRIES if entry.kind == "compressor"]


def test_an_unknown_name_is_answered_by_the_nearest_or_by_all():
    with pytest.raises(InputError, match=r"^unknown method 'svdllm'; did you mean 'svd_llm'\?$"):
        catalog.get("compressor", "svdllm")
    with pytest.raises(InputError, match=r"^unknown allocation 'zzz'; known: uniform, svd_llm_v2, d_rank"):
        catalog.get("allocation", "zzz")
    with pytest.raises(InputError, match="unknown sampler 'svd'"):
        catalog.get("backend", "svd", "sampler")


def test_a_target_that_is_not_there_is_named():
    with pytest.raises(InputError, match="compressor 'x' needs the module 'no_such_module': install it"):
        catalog.Entry("x", "compressor", "no_such_module:X").load()
    with pytest.raises(InputError, match=r"compressor 'x': llmcompress\.errors:X does not load: .*no attribute 'X'"):
        catalog.Entry("x", "compressor", "llmcompress.errors:X").load()


# --- plug-ins --------------------------------------------------------------------------------------------------------


PLUGIN = """
from llmcompress.catalog import Entry
from llmcompress.compressors.svd import SVD

class Mine(SVD):
    pass

ENTRY = Entry("mine", "compressor", __name__ + ":Mine")
ENTRIES = [ENTRY, Entry("round_robin", "backend", "x:Y", port="sampler")]
"""


@pytest.mark.parametrize(("attribute", "number"), [("ENTRIES", 2), ("ENTRY", 1)])
def test_a_plugin_joins_the_catalogue(install_plugin, attribute, number):
    from llmcompress.recipe import Recipe

    install_plugin(PLUGIN, attribute)
    assert len(catalog.entries()) == len(ENTRIES) + number
    assert catalog.names("compressor")[-1] == "mine"
    recipe = Recipe.parse({"model": "m", "output": "o", "compress": [{"method": "mine", "share": "input"}]})
    assert type(recipe.compress[0].build()).__name__ == "Mine"
    assert ("round_robin" in catalog.names("backend", "sampler")) == (number == 2)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise OSError('no\\nluck')", r"plug-in 'mine' \(llmcompress_plugin_.*\) does not load: OSError: no luck$"),
        ("", r"plug-in 'mine' .* does not load: AttributeError"),
        ("ENTRIES = ['svd']", r"plug-in 'mine' .* must be an Entry or a list of them$"),
        ("from llmcompress.catalog import Entry\nENTRIES = Entry('svd', 'compressor', 'x:Y', group='low_rank')",
         "plug-in 'mine': the compressor 'svd' is in the catalogue already"),
    ],
)  # fmt: skip
def test_a_bad_plugin_is_named(install_plugin, source, message):
    install_plugin(source)
    with pytest.raises(InputError, match=message):
        catalog.entries()


# --- imports ---------------------------------------------------------------------------------------------------------


def test_help_and_the_catalogue_import_nothing_heavy():
    """In a process of its own: in this one torch is there already."""
    code = """if True:
        import sys
        from llmcompress import catalog, cli
        sys.argv = ["llmcompress", "--help"]
        cli.main()
        sys.argv = ["llmcompress", "backends"]
        cli.main()
        heavy = {"torch", "transformers", "numpy", "scipy", "datasets", "triton"} & set(sys.modules)
        assert not heavy, heavy
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert "svd_llm" in done.stdout
