"""What the engine is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llmkit.inference.config import SamplingConfig
from llmkit.inference.sampling import sample_seeds

Reason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Request:
    """One text to be continued, once."""

    ids: Sequence[int]
    """The prompt, 1 to max_seq_len - 1 tokens."""
    sampling: SamplingConfig
    """Settings of this request alone, stop strings included; n and beams must be 1 (see `requests_of`)."""
    seed: int
    """Of the draws: the same tokens as `generate` writes for this prompt with this seed."""
    top_logprobs: int = 0
    """How many of the most probable tokens each event names, beside the one that was chosen."""


@dataclass(frozen=True)
class Event:
    """A token of a request, or its end without one."""

    request_id: int
    token: int | None = None
    """None only with an error."""
    text: str = ""
    """What became certain of the text: never half a character, never a piece of a stop string. The pieces of a request
    add up to `Generation.text`."""
    logprob: float | None = None
    """Of the token, as in `Generation.logprobs`."""
    drawn_logprob: float | None = None
    """With top_k, top_p or min_p, as in `Generation.drawn_logprobs`."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The most probable tokens with their log-probabilities, best first, of the same distribution as `logprob`."""
    finish_reason: Reason | None = None
    """Not None in a request's last event: a "stop" token or string, "length" (max_new_tokens or the context's end), or
    "error", which `error` explains."""
    error: str | None = None


@dataclass(frozen=True)
class Counters:
    """How the engine stands (first part) and what it did since it was made."""

    n_running: int = 0
    """Requests whose prompt is being read or that are being written."""
    n_waiting: int = 0
    n_blocks: int = 0
    """Blocks in all."""
    blocks_in_use: int = 0
    """Blocks that running requests hold or have reserved, each counted once however many share it."""
    blocks_kept: int = 0
    """Blocks that nobody holds, kept for prompts that begin the same; they give way when blocks are needed."""

    steps: int = 0
    prompt_tokens: int = 0
    """Tokens of the prompts of all requests that were begun."""
    prefix_tokens: int = 0
    """Those of them that did not have to be computed, because a prompt before had the same beginning."""
    new_tokens: int = 0
    drafted_tokens: int = 0
    """Tokens that the draft model proposed."""
    accepted_tokens: int = 0
    """Those of them that the model took."""

    @property
    def prefix_hit_frac(self) -> float:
        """Part of all prompt tokens that did not have to be computed."""
        return self.prefix_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def acceptance_frac(self) -> float:
        """Part of the draft's tokens that the model took."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0


def requests_of(ids: Sequence[int], sampling: SamplingConfig, seed: int, top_logprobs: int = 0) -> list[Request]:
    """The `sampling.n` requests that write what `generate` writes for one prompt with this seed."""
    one = sampling.model_copy(update={"n": 1})
    return [Request(ids, one, s, top_logprobs) for s in sample_seeds(seed, sampling.n)]
