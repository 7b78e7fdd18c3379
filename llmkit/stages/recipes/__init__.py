"""The recipe of every stage, one module a stage. Torch-free, so that a mistake in a recipe is reported at once."""

from llmkit.stages.recipes.base import ModelRecipe
from llmkit.stages.recipes.distill import DistillRecipe
from llmkit.stages.recipes.dpo import DPORecipe
from llmkit.stages.recipes.grpo import GRPORecipe
from llmkit.stages.recipes.policy import PolicyRecipe
from llmkit.stages.recipes.ppo import PPORecipe
from llmkit.stages.recipes.pretrain import MaskingConfig, PretrainRecipe
from llmkit.stages.recipes.reward import RewardRecipe
from llmkit.stages.recipes.sft import SftRecipe
from llmkit.stages.recipes.tokenizer import TokenizerRecipe

__all__ = [
    "DPORecipe",
    "DistillRecipe",
    "GRPORecipe",
    "MaskingConfig",
    "ModelRecipe",
    "PPORecipe",
    "PolicyRecipe",
    "PretrainRecipe",
    "RewardRecipe",
    "SftRecipe",
    "TokenizerRecipe",
]
