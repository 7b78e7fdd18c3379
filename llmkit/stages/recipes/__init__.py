"""The recipe of every stage, one module a stage. Torch-free, so that a mistake in a recipe is reported at once."""

from llmkit.stages.recipes.base import ModelRecipe
from llmkit.stages.recipes.pretrain import MaskingConfig, PretrainRecipe
from llmkit.stages.recipes.reward import RewardRecipe
from llmkit.stages.recipes.tokenizer import TokenizerRecipe

__all__ = ["MaskingConfig", "ModelRecipe", "PretrainRecipe", "RewardRecipe", "TokenizerRecipe"]
