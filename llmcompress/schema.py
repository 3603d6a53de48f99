"""The JSON schema of recipes, with every method's and every allocation's own options, and that of a merge."""

from __future__ import annotations

import copy
from typing import Any

from llmcompress import catalog
from llmcompress.merge.recipe import ABSENT, WORDS, MergeRecipe
from llmcompress.recipe import Recipe

REFERENCE = "#/$defs/{model}"


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe: of a MergeRecipe where it has a `merge` section, otherwise of a Recipe.

    A compress step is one of the catalogue's methods with its own options.
    """
    recipe, merge = (model.model_json_schema(ref_template=REFERENCE) for model in (Recipe, MergeRecipe))
    definitions = merge.pop("$defs") | recipe.pop("$defs")
    _with_methods(definitions)
    _with_words(definitions)
    for key in ABSENT:
        del merge["properties"][key]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "llmcompress recipe",
        "if": {"type": "object", "required": ["merge"]},
        "then": {"$ref": REFERENCE.format(model="MergeRecipe")},
        "else": {"$ref": REFERENCE.format(model="Recipe")},
        "$defs": definitions | {"Recipe": recipe, "MergeRecipe": merge},
    }


def _with_words(definitions: dict[str, Any]) -> None:
    """`match: signed` and `optimizer: adamw`, which the parser takes too."""
    definitions["Merge"]["properties"]["match"]["anyOf"].insert(0, {"enum": list(WORDS)})
    for name in ("Backend", "Optimizer"):
        definitions[name] = {"anyOf": [{"type": "string"}, definitions[name]]}


def _with_methods(definitions: dict[str, Any]) -> None:
    """Methods and allocations, and their short forms."""
    step = definitions["Compress"]
    targets = step["properties"]["targets"]
    step["properties"]["targets"] = {
        "anyOf": [{"type": "string"}, {key: targets.pop(key) for key in ("type", "items", "minItems")}], **targets
    }  # fmt: skip
    step["properties"]["allocation"] = {
        "anyOf": [
            {"enum": catalog.names("allocation")},
            *_alternatives(definitions, definitions.pop("Choice"), "allocation", "name"),
        ],
        "description": step["properties"]["allocation"]["description"],
    }
    definitions["Compress"] = {"anyOf": _alternatives(definitions, step, "compressor", "method")}


def _alternatives(definitions: dict[str, Any], base: dict[str, Any], kind: str, key: str) -> list[dict[str, Any]]:
    """`base` once an entry of the catalogue, with that entry's options; `key` holds its name."""
    found = []
    for entry in (entry for entry in catalog.entries() if entry.kind == kind):
        options = entry.load().Options.model_json_schema()
        definitions.update(options.get("$defs", {}))
        alternative = copy.deepcopy(base) | {"title": f"{key} {entry.name}", "additionalProperties": False}
        alternative["properties"] |= options.get("properties", {})
        name = {"const": entry.name, "description": entry.summary}
        alternative["properties"][key] = {**base["properties"][key], **name}
        if kind == "compressor":
            alternative["properties"]["targets"]["default"] = list(entry.targets)
        found.append(alternative)
    return found
