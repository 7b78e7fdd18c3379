"""The recipe of every stage. Torch-free, so that a mistake in a recipe is reported at once."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llmkit.config import Config
from llmkit.data.config import DataConfig
from llmkit.model.config import GPTConfig
from llmkit.tokenizer import TokenizerConfig
from llmkit.training.config import RunConfig


class TokenizerRecipe(Config):
    """Trains a tokenizer and reports on it."""

    stage: Literal["tokenizer"]
    out: str = Field(min_length=1)
    """The folder that tokenizer.json, tokenizer_config.json and report.json are written to."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    """Trained on the training documents, reported on the validation documents."""


class PretrainRecipe(RunConfig):
    """Trains a GPT to predict the next token of text."""

    stage: Literal["pretrain"]
    tokenizer: TokenizerConfig = TokenizerConfig()
    """A folder to load it from, or how to train one on the same data; it is kept in `out/tokenizer`."""
    data: DataConfig
    model: GPTConfig | None = None
    """The network. Left out with `init_from`: the old model's."""

    @model_validator(mode="after")
    def _fits(self) -> PretrainRecipe:
        if self.model is None and self.init_from is None:
            raise ValueError("give `model`, or `init_from` to go on from old weights")
        if self.model is not None and self.batch.max_len is not None and self.batch.max_len > self.model.max_seq_len:
            raise ValueError(
                f"batch.max_len ({self.batch.max_len}) is above model.max_seq_len ({self.model.max_seq_len}): lower it"
            )
        return self
