"""The recipe's JSON schema, with every method's own options."""

from __future__ import annotations

from typing import Any

from llmcompress import catalog
from llmcompress.recipe import Recipe


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe: a compress step is one of the catalogue's methods with its options."""
    schema = Recipe.model_json_schema()
    step = schema["$defs"]["Compress"]
    step["additionalProperties"] = False
    step["properties"]["method"]["enum"] = catalog.names("compressor")
    for name in catalog.names("compressor"):
        options = catalog.get("compressor", name).load().Options.model_json_schema()
        schema["$defs"].update(options.pop("$defs", {}))
        for key, value in options.get("properties", {}).items():
            described = {**value, "description": f"{value.get('description', key)} (method {name})"}
            step["properties"].setdefault(key, described)
    return schema
