"""How the next token is chosen. Torch-free."""

from __future__ import annotations

from pydantic import Field, model_validator

from llmkit.config import Config

MIN_TEMPERATURE = 1e-4  # below it only the most probable token is left, and logits / temperature may overflow


BAN = -100.0  # a logit_bias as low as this excludes the token, as in OpenAI's API


class SamplingConfig(Config):
    """How the next token is chosen, in this order: logit_bias, repetition_penalty, presence and frequency penalty,
    min_new_tokens, temperature, top_k, top_p, min_p, each acting on what the one before left over."""

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
    min_new_tokens: int = Field(0, ge=0)
    """The tokenizer's stop tokens are banned until there are so many; stop strings are not: they end a text anywhere."""
    repetition_penalty: float = Field(1.0, gt=0.0)
    """Divides the positive and multiplies the negative logits of every token that the prompt or the new text holds (CTRL,
    arXiv 1909.05858). 1: off; 1.1 to 1.3 is usual."""
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    """Taken off the logits of every token that the new text holds (OpenAI's definition: the prompt doesn't count)."""
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    """Taken off as many times as the new text holds the token."""
    logit_bias: dict[str, float] = Field(default_factory=dict)
    """Added to the logits of a token, which is named by its id or its text (" king"; a text of digits in double quotes
    inside the text). -100 excludes it."""
    n: int = Field(1, ge=1)
    """Samples of each prompt, which is computed once; with beams, the n best."""
    beams: int = Field(1, ge=1)
    """Above 1: beam search, the most probable texts of this many kept at every step; needs temperature 0."""
    length_penalty: float = Field(1.0, ge=-10.0, le=10.0)
    """Beams are ranked by log-probability / tokens ** this: above 0 favours long texts, below 0 short ones."""
    early_stopping: bool = False
    """Beams: end as soon as `beams` texts have ended, instead of when no other seems able to beat them."""
    seed: int = Field(0, ge=0)
    """Seed of the draws; each row of a batch, and each of its n samples, derives its own from it."""

    @model_validator(mode="after")
    def _meaningful(self) -> SamplingConfig:
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(f"temperature ({self.temperature}) must be 0 (greedy) or at least {MIN_TEMPERATURE}")
        if "" in self.stop:
            raise ValueError("stop: an empty string would end every text at once: leave it out")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens ({self.min_new_tokens}) is above max_new_tokens ({self.max_new_tokens})")
        for name, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise ValueError(f"logit_bias: {name!r}: {bias} is outside -100 (never) to 100 (nothing else)")
        self._check_beams()
        return self

    def _check_beams(self) -> None:
        if self.beams == 1:
            if self.n > 1 and self.temperature == 0:
                raise ValueError(f"n ({self.n}) greedy samples would all be the same: set temperature, or beams")
            if self.length_penalty != 1.0 or self.early_stopping:
                raise ValueError("length_penalty and early_stopping belong to beam search: set beams")
            return
        if self.temperature != 0:
            raise ValueError(f"beams draw nothing, so temperature must be 0 (got {self.temperature})")
        if self.top_k or self.top_p < 1 or self.min_p:
            raise ValueError("beams draw nothing: drop top_k, top_p and min_p")
        if self.n > self.beams:
            raise ValueError(f"n ({self.n}) must be at most beams ({self.beams})")

    @property
    def has_filters(self) -> bool:
        """Whether some tokens may be out of the draw: it is then of another distribution than the model's."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)
