"""`stage: sft`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llmkit.stages.recipes.base import ModelRecipe, check_conversations


class SftRecipe(ModelRecipe):
    """Supervised fine-tuning: a network learns to answer as the assistant of given conversations does."""

    stage: Literal["sft"]
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """What is learnt: every turn of the assistant with its end of turn, the last one only, or every token."""
    neftune_alpha: float | None = Field(None, gt=0)
    """Uniform noise on the embeddings in training, of size alpha / sqrt(tokens * width) (arXiv 2310.05914: 5 to 15)."""

    @property
    def shares_positions(self) -> bool:
        return True

    @model_validator(mode="after")
    def _data_fits(self) -> SftRecipe:
        check_conversations(self.data, self.train_on)
        if self.model is not None and not self.model.causal:
            raise ValueError("sft: answers are written from left to right: set model.causal to true")
        return self
