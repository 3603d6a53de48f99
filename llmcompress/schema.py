"""The recipe's JSON schema, with every method's and every allocation's own options."""

from __future__ import annotations

import copy
from typing import Any

from llmcompress import catalog
from llmcompress.recipe import Recipe


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe: a compress step is one of the catalogue's methods with its own options."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
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
    return schema


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
