"""Commands on a recipe: train, prepare, plan, schema."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, cast

PREEMPTED = 75


def _train(args: argparse.Namespace) -> int:
    from llmkit.stages import load_recipe, stage_module

    recipe = load_recipe(args.recipe, args.overrides)
    outcome = stage_module(recipe).run(recipe)
    return PREEMPTED if getattr(outcome, "value", None) == "preempted" else 0


def _prepare(args: argparse.Namespace) -> int:
    from llmkit.config import UserError
    from llmkit.stages import load_recipe, stage_module

    overrides, part = _take_part(args.overrides)
    recipe = load_recipe(args.recipe, overrides)
    module = stage_module(recipe)
    if part is None:
        return PREEMPTED if module.prepare(recipe) is None else 0
    if recipe.stage not in ("pretrain", "distill"):
        raise UserError(f"part: of stage {recipe.stage} there is nothing to prepare in parts: leave it out")
    return PREEMPTED if module.prepare(recipe, part) is None else 0


def _take_part(overrides: Sequence[str]) -> tuple[list[str], tuple[int, int] | None]:
    """Takes `part=I/N` out of the overrides: it says which job this is, not what is made."""
    from llmkit.config import UserError

    rest = [text for text in overrides if not text.startswith("part=")]
    parts = [text.removeprefix("part=") for text in overrides if text.startswith("part=")]
    if not parts:
        return rest, None
    number, slash, of = parts[-1].partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise UserError(f"part={parts[-1]}: expected part=I/N, job I of N, counted from 1: part=3/16")
    return rest, (int(number), int(of))


def _plan(args: argparse.Namespace) -> int:
    from llmkit.tools.plan import run

    return run(args)


def _schema(args: argparse.Namespace) -> int:
    import json

    from llmkit.stages.schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=1, ensure_ascii=False))
    return 0


def _recipe_command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("recipe", help="a YAML file; those under configs/ are found from any folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes values of the recipe: optim.lr=3e-4")
    parser.set_defaults(run=run)
    return cast(argparse.ArgumentParser, parser)


def add(commands: Any) -> None:
    """Adds the parsers."""
    _recipe_command(commands, "train", _train, "run the stage a recipe describes; run again to resume")
    _recipe_command(
        commands, "prepare", _prepare, "turn text into token shards (train does it when missing); part=I/N: job I of N"
    )
    plan = _recipe_command(
        commands,
        "plan",
        _plan,
        "parameters, memory, time and disk of a recipe, here or on a cluster, before anything runs",
    )
    plan.add_argument("--gpu", metavar="NAME", help="on GPUs of this kind: b200, h200, h100, a100, l40s, 4090")
    plan.add_argument("--nodes", type=int, help="so many nodes (default: 1)")
    plan.add_argument("--gpus", type=int, help="GPUs of a node (default: as its maker sells them)")
    plan.add_argument("--network", type=float, metavar="GB/S", help="between nodes, for each GPU, one way")
    plan.add_argument("--calibration", metavar="FILE", help="of this machine, made by scripts/bench/plan.py")
    schema = commands.add_parser("schema", help="JSON schema of all recipes, for completion in editors")
    schema.set_defaults(run=_schema)
