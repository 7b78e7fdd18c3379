"""What a generation is, and its text as it grows: never half a character, never a piece of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from llmkit.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Generation:
    """What was added to one prompt."""

    ids: list[int]
    """The new tokens, with the one that ended them: a stop token, or the token that completed a stop string."""
    logprobs: list[float]
    """Of each new token under softmax(logits / temperature), before bias, penalties, top_k, top_p and min_p; temperature
    0 counts as 1. So they equal the trainer's, if it divides its logits by the same temperature (`sampling.log_probs`)."""
    text: str
    """The new tokens as text, without stop token and stop string."""
    finish_reason: FinishReason
    """A "stop" token or string, "length" (max_new_tokens or the context's end), or "interrupted" by `should_stop`."""
    score: float | None = None
    """Of a beam: the sum of its tokens' log-probabilities (after bias and penalties) / their number ** length_penalty."""
    drawn_logprobs: list[float] | None = None
    """With top_k, top_p or min_p: of each new token under what these leave of the distribution, from which it was drawn."""


class TextStream:
    """Tokens in, text out, as soon as it is certain: never half a character, never a piece of a stop string.

    The texts given out add up to what comes before the first stop: the stop string that is completed first, and of
    those completed by the same character the longest. This depends on the text alone, not on how tokens cut it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.stopped = False
        self._decoder = tokenizer.stream()
        self._stop_ids = frozenset(tokenizer.stop_ids)
        self._stop = tuple(stop)
        self._held = ""  # decoded, but maybe the beginning of a stop string

    def push(self, token: int) -> str:
        """Takes the next token and returns the text that became certain; `stopped` says that no more will come."""
        if self.stopped:
            return ""
        if token in self._stop_ids:
            text = self.finish()
            self.stopped = True
            return text
        return self._release(self._decoder.push(token))

    def finish(self) -> str:
        """The rest of the text, when no token follows."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.finish())
        text, self._held = text + self._held, ""
        return text

    def _release(self, piece: str) -> str:
        text = self._held + piece
        found = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
