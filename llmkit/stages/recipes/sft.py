"""`stage: sft`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llmkit.stages.recipes.base import ModelRecipe


class SftRecipe(ModelRecipe):
    """Supervised fine-tuning: a network learns to answer as the assistant of given conversations does."""

    stage: Literal["sft"]
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """What is learnt: every turn of the assistant with its end of turn, the last one only, or every token."""
    neftune_alpha: float | None = Field(None, gt=0)
    """Uniform noise on the embeddings in training, of size alpha / sqrt(tokens * width) (arXiv 2310.05914: 5 to 15)."""

    @model_validator(mode="after")
    def _data_fits(self) -> SftRecipe:
        for source in (*self.data.sources, *self.data.valid, *self.data.test):
            if source.field != "text" or source.template is not None:
                raise ValueError("field and template are for plain text: say `columns: {our name: theirs}`")
        if self.data.clean.is_on or self.data.dedup.kind is not None:
            raise ValueError("data.clean and data.dedup are for plain text: conversations are read as they are")
        if self.data.cross_document_attention:
            raise ValueError("data.cross_document_attention: one conversation would answer another's question: drop it")
        if not self.data.add_bos or not self.data.add_eos:
            raise ValueError(
                "data.add_bos and data.add_eos are for plain documents: the chat template says what is added"
            )
        if self.model is not None and not self.model.causal:
            raise ValueError("sft: answers are written from left to right: set model.causal to true")
        if self.train_on == "last" and not self.data.chat:
            raise ValueError("train_on: last means a turn of a conversation, and data.chat is false: use assistant")
        return self
