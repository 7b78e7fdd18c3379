"""The stages, by the name a recipe gives them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from llmkit.config import Config, Data, UserError, Where, load
from llmkit.stages.recipes import (
    DistillRecipe,
    DPORecipe,
    GRPORecipe,
    PPORecipe,
    PretrainRecipe,
    RewardRecipe,
    SftRecipe,
    TokenizerRecipe,
)

# stage -> (its recipe, the module whose `run(recipe)` runs it: imported when it is, since most import torch)
STAGES: dict[str, tuple[type[Config], str]] = {
    "tokenizer": (TokenizerRecipe, "llmkit.stages.tokenizer"),
    "pretrain": (PretrainRecipe, "llmkit.stages.pretrain"),
    "sft": (SftRecipe, "llmkit.stages.sft"),
    "reward": (RewardRecipe, "llmkit.stages.reward"),
    "dpo": (DPORecipe, "llmkit.stages.dpo"),
    "ppo": (PPORecipe, "llmkit.stages.ppo"),
    "grpo": (GRPORecipe, "llmkit.stages.grpo"),
    "distill": (DistillRecipe, "llmkit.stages.distill"),
}


def pick_recipe(data: Data, where: Where) -> type[Config]:
    """The recipe class that `stage:` names."""
    stage = data.get("stage")
    if not isinstance(stage, str) or stage not in STAGES:
        got = f"(got {stage!r})" if "stage" in data else "(missing)"
        raise UserError(f"{where.get(('stage',), where[()])}: stage: one of {', '.join(STAGES)} {got}")
    return STAGES[stage][0]


def load_recipe(file: str | Path, overrides: Sequence[str] = ()) -> Any:
    """The recipe in a YAML file, validated. Raises UserError with one line per mistake."""
    return load(pick_recipe, file, overrides)


def stage_module(recipe: Any) -> Any:
    """The module that runs a recipe: `run(recipe)`, and `prepare(recipe)` where the stage has data to prepare."""
    return import_module(STAGES[recipe.stage][1])
