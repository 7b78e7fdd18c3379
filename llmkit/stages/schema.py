"""JSON schema of all recipes, for completion and hints in editors."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from llmkit.config import Config
from llmkit.stages import STAGES


def recipe_schema() -> dict[str, Any]:
    """One schema for every stage's recipe.

    Looser than validation where a recipe may be: `base:` is allowed and may supply what is required, so nothing but
    `stage` is required here; numbers such as 1e-3 are numbers in every YAML dialect's reading of a schema.
    """
    recipes: list[type[Config]] = [recipe for recipe, _ in STAGES.values()]
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "llmkit recipe",
        "type": "object",
        "oneOf": [],
        "$defs": {},
    }
    for recipe in recipes:
        one = TypeAdapter(recipe).json_schema(ref_template="#/$defs/{model}")
        schema["$defs"].update(one.pop("$defs", {}))
        one["properties"]["base"] = {"type": "string", "description": "A recipe that this one inherits from."}
        if "tokenizer" in one["properties"]:
            folder = {"type": "string", "description": "A folder with a tokenizer."}
            one["properties"]["tokenizer"] = {"anyOf": [folder, {"$ref": "#/$defs/TokenizerConfig"}]}
        one["required"] = ["stage"]
        schema["oneOf"].append(one)
    return schema
