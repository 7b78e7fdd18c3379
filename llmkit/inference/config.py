"""How the next token is chosen. Torch-free."""

from __future__ import annotations

from pydantic import Field, model_validator

from llmkit.config import Config

MIN_TEMPERATURE = 1e-4  # below it only the most probable token is left, and logits / temperature may overflow


class SamplingConfig(Config):
    """How the next token is chosen: temperature, top_k, top_p, min_p, each acting on what the one before left over."""

    max_new_tokens: int = Field(128, ge=1)
    """Most tokens that are added to a prompt; fewer where the model's max_seq_len ends first."""
    temperature: float = Field(1.0, ge=0.0)
    """Divides the logits. 0 takes the most probable token (the lowest id of a tie), whatever the filters say."""
    top_k: int = Field(0, ge=0)
    """Only the k most probable tokens may be drawn, and those tied with the k-th. 0: all."""
    top_p: float = Field(1.0, ge=0.0, le=1.0)
    """A token may be drawn if all better ones together hold less than this (arXiv 1904.09751). 1: all; 0: the best."""
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    """A token may be drawn if it is at least this many times as probable as the best one (arXiv 2407.01082). 0: all."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings, as it does at the tokenizer's own stop tokens."""
    seed: int = Field(0, ge=0)
    """Seed of the draws; each row of a batch derives its own from it."""

    @model_validator(mode="after")
    def _meaningful(self) -> SamplingConfig:
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(f"temperature ({self.temperature}) must be 0 (greedy) or at least {MIN_TEMPERATURE}")
        if "" in self.stop:
            raise ValueError("stop: an empty string would end every text at once: leave it out")
        return self
