"""`stage: pretrain`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llmkit.config import Config
from llmkit.stages.recipes.base import ModelRecipe


class MaskingConfig(Config):
    """Which tokens `objective: masked` hides, and by what (BERT, arXiv 1810.04805, section 3.1)."""

    frac: float = Field(0.15, gt=0, le=1)
    """Share of the tokens, control tokens aside, that are predicted."""
    replace_frac: float = Field(0.8, ge=0, le=1)
    """Share of those that become the mask token."""
    random_frac: float = Field(0.1, ge=0, le=1)
    """Share of those that become a random token; the rest stays as it is."""

    @model_validator(mode="after")
    def _shares(self) -> MaskingConfig:
        if self.replace_frac + self.random_frac > 1:
            raise ValueError(f"replace_frac ({self.replace_frac}) + random_frac ({self.random_frac}) must be at most 1")
        return self


class PretrainRecipe(ModelRecipe):
    """Trains a network on text: to predict the next token, or tokens that were hidden."""

    stage: Literal["pretrain"]
    objective: Literal["next_token", "masked"] = "next_token"
    """masked: some tokens are hidden and predicted from both sides; asks for `model: {causal: false}` and a mask token."""
    masking: MaskingConfig = MaskingConfig()
    """With `objective: masked`: what is hidden."""

    @property
    def shares_positions(self) -> bool:
        return True

    @model_validator(mode="after")
    def _objective_fits(self) -> PretrainRecipe:
        masked = self.objective == "masked"
        if self.model is not None and self.model.causal == masked:
            raise ValueError(
                "objective masked sees both sides: set model.causal to false"
                if masked
                else "objective next_token would see the token it predicts: set model.causal to true, or objective: masked"
            )
        if not masked and self.masking != MaskingConfig():
            raise ValueError("masking means something with objective: masked only")
        if masked and self.data.cross_document_attention:
            raise ValueError("objective masked keeps documents apart: drop data.cross_document_attention")
        if masked and self.eval.samples.prompts:
            raise ValueError("eval.samples: a model trained on hidden tokens continues no text: drop the prompts")
        return self
