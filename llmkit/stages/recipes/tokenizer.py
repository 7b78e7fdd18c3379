"""`stage: tokenizer`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llmkit.config import Config
from llmkit.data.config import DataConfig
from llmkit.tokenizer.config import Kind, TokenizerConfig


class TokenizerRecipe(Config):
    """Trains a tokenizer and reports on it, or trains several kinds and compares them."""

    stage: Literal["tokenizer"]
    out: str = Field(min_length=1)
    """The folder that tokenizer.json, tokenizer_config.json and report.json are written to."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    compare: tuple[Kind, ...] = ()
    """Kinds to train on the same text, each into a folder of its own in `out`, beside compare.md and compare.json. The
    other settings are those of `tokenizer`."""
    data: DataConfig
    """Trained on the training documents, reported on the validation documents."""

    @model_validator(mode="after")
    def _compares(self) -> TokenizerRecipe:
        if self.compare and self.tokenizer.path is not None:
            raise ValueError("compare trains tokenizers, so drop tokenizer.path (or drop compare)")
        if len(set(self.compare)) < len(self.compare):
            raise ValueError(f"compare names a kind twice ({', '.join(self.compare)}): name each once")
        for kind in self.compare:
            self.tokenizer.of_kind(kind)  # raises where the vocabulary is too small for a kind
        return self
