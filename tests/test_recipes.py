"""Every recipe under configs/ loads, fits the published schema, and builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit.config import UserError, parse_yaml
from llmkit.model.config import GPTConfig, count_params
from llmkit.model.gpt import GPT
from llmkit.stages import load_recipe, stage_module
from llmkit.stages.schema import recipe_schema
from llmkit.tokenizer import TokenizerConfig

CONFIGS = Path(__file__).parent.parent / "configs"
SCHEMA = CONFIGS / "recipe.schema.json"
RECIPES = [f for f in sorted(CONFIGS.rglob("*.yaml")) if "pipeline" not in (f.stem, f.parent.name)]
every_recipe = pytest.mark.parametrize("file", RECIPES, ids=lambda f: f"{f.parent.name}/{f.stem}")


def test_there_are_recipes() -> None:
    """The names that other tools rely on."""
    assert {"pretrain/demo.yaml", "pretrain/shakespeare_char_cpu.yaml"} <= {"/".join(f.parts[-2:]) for f in RECIPES}


@every_recipe
def test_it_is_a_good_example(file: Path) -> None:
    """It names the schema for editors, says what it is, lies in its stage's folder and is short."""
    lines = file.read_text("utf-8").splitlines()
    assert lines[0] == "# yaml-language-server: $schema=../recipe.schema.json" and lines[1].startswith("# ")
    assert (file.parent / "../recipe.schema.json").resolve() == SCHEMA.resolve()
    recipe = load_recipe(file)
    assert recipe.stage == file.parent.name and recipe.out.startswith("runs/")
    assert len(lines) <= 45 and max(map(len, lines)) <= 150


@every_recipe
def test_it_plans_and_builds(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost model's count of parameters is that of the network itself, built without memory."""
    recipe = load_recipe(file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmkit.plan.machine.free_memory", lambda device: None)  # some are for larger machines
    old = getattr(recipe, "teacher", None) or getattr(recipe, "init_from", None)
    if old is not None:  # made by another recipe, which need not have run here
        with pytest.raises(UserError, match=f"^{old}: no such folder"):
            list(stage_module(recipe).plan(recipe))
        return
    if recipe.tokenizer is not None and recipe.tokenizer.path is not None:  # the same
        recipe = recipe.model_copy(update={"tokenizer": TokenizerConfig(vocab_size=4096)})
    text = "\n".join(stage_module(recipe).plan(recipe))
    assert text.strip() and "\t" not in text
    shape: GPTConfig | None = getattr(recipe, "model", None)
    if shape is None:
        return
    shape = shape.model_copy(update={"vocab_size": 4096})
    with torch.device("meta"):
        model = GPT(shape)
    assert sum(p.numel() for p in model.parameters()) == count_params(shape).total


def test_the_schema_is_up_to_date() -> None:
    """Made by `llmkit schema > configs/recipe.schema.json`."""
    text = json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"
    assert SCHEMA.is_file() and SCHEMA.read_text("utf-8") == text, "run: llmkit schema > configs/recipe.schema.json"


def checker() -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: the schema is not checked")
    schema = json.loads(SCHEMA.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@every_recipe
def test_it_fits_the_schema(file: Path) -> None:
    errors = [e.message for e in checker().iter_errors(parse_yaml(file.read_text("utf-8"))[0])]
    assert not errors


def test_the_schema_refuses_what_an_editor_should_underline() -> None:
    """Unknown keys, wrong types, unknown stages; `base:` and a recipe that leaves everything to its base are fine."""
    valid = checker().is_valid
    assert valid({"stage": "pretrain", "base": "x.yaml"}) and valid({"stage": "tokenizer", "tokenizer": "folder"})
    assert valid({"stage": "pretrain", "tokenizer": {"kind": "byte"}, "model": None, "steps": 3})
    for bad in (
        {"stage": "pretrain", "optim": {"lrr": 1}}, {"stage": "pretrain", "steps": "3"}, {"stage": "nope"}, {},
        {"stage": "pretrain", "tokenizer": 3}, {"stage": "pretrain", "optim": {"name": "adam"}}, [], {"steps": 3},
        {"stage": "pretrain", "data": {"valid_frac": 2}}, {"stage": "tokenizer", "optim": {}},
    ):  # fmt: skip
        assert not valid(bad), bad


def test_every_field_has_a_hint_in_the_schema() -> None:
    schema = recipe_schema()
    for name, cls in schema["$defs"].items():
        for key, field in cls.get("properties", {}).items():
            assert "description" in field or "$ref" in json.dumps(field), f"{name}.{key}"
