"""What a client gets: the objects of OpenAI's API, whole or in pieces."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmkit.inference.engine.request import Event
from llmkit.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON knows no -Infinity


@dataclass
class Choice:
    """One text of an answer, as it grows."""

    text: str = ""
    finish_reason: str | None = None
    told: list[dict[str, Any]] = field(default_factory=list)
    """Of each token, as `Answer.told_of` says; only where log-probabilities are asked for."""
    n_chars: int = 0
    """Of all tokens before the next one."""


class Answer:
    """Collects a request's events, and says them in OpenAI's way."""

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        chat: bool,
        n_choices: int,
        prompt_tokens: int,
        n_logprobs: int | None,
        openings: Sequence[str] = (),
    ):
        """Sets up an answer.

        Args:
            name: the model's.
            tokenizer: which its tokens are of.
            chat: whether it is a chat completion, or a text completion.
            n_choices: how many texts there will be.
            prompt_tokens: of all prompts together, for the bill.
            n_logprobs: candidates told beside each token; None: no log-probabilities.
            openings: what each text begins with, without being written (`echo`).
        """
        self.chat, self.tokenizer, self.n_logprobs = chat, tokenizer, n_logprobs
        self.prompt_tokens, self.new_tokens = prompt_tokens, 0
        self.choices = [Choice(text=text, n_chars=len(text)) for text in openings or [""] * n_choices]
        kind = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}
        self.chunk_head = {**self.head, "object": "chat.completion.chunk"} if chat else self.head

    def usage(self) -> dict[str, int]:
        """Tokens read and written."""
        both = self.prompt_tokens + self.new_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": both,
        }

    def take(self, index: int, event: Event) -> list[dict[str, Any]]:
        """Adds an event to its text; returns what log-probabilities it tells."""
        choice = self.choices[index]
        choice.text += event.text
        choice.finish_reason = event.finish_reason
        if event.token is None:
            return []
        self.new_tokens += 1
        if self.n_logprobs is None or event.token in self.tokenizer.stop_ids:
            return []
        told = {**self.told_of(event.token, event.logprob or 0.0), "offset": choice.n_chars}
        told["top_logprobs"] = [self.told_of(*other) for other in event.top_logprobs]
        choice.n_chars += len(told["token"])
        choice.told.append(told)
        return [told]

    def told_of(self, token: int, logprob: float) -> dict[str, Any]:
        """A token as text and bytes, with its log-probability."""
        data = self.tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}

    # - whole -

    def whole(self) -> dict[str, Any]:
        """The object that answers a request that isn't streamed."""
        found = []
        for i, choice in enumerate(self.choices):
            said = {"message": {"role": "assistant", "content": choice.text, "refusal": None}} if self.chat else {}
            text = {} if self.chat else {"text": choice.text}
            end = {"logprobs": self._logprobs(choice.told), "finish_reason": choice.finish_reason}
            found.append({"index": i, **said, **text, **end})
        return {**self.head, "choices": found, "usage": self.usage()}

    def _logprobs(self, told: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        if self.n_logprobs is None:
            return None
        if self.chat:
            return {"content": [{k: v for k, v in one.items() if k != "offset"} for one in told], "refusal": None}
        tops = [{other["token"]: other["logprob"] for other in one["top_logprobs"]} for one in told]
        return {
            "tokens": [one["token"] for one in told],
            "token_logprobs": [one["logprob"] for one in told],
            "top_logprobs": tops if self.n_logprobs else None,
            "text_offset": [one["offset"] for one in told],
        }

    # - in pieces -

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        """What comes before any token: whose turn it is, or the echo."""
        for i, choice in enumerate(self.choices):
            if self.chat:
                yield self._chunk(i, {"role": "assistant", "content": ""}, [], None)
            elif choice.text:
                yield self._chunk(i, choice.text, [], None)

    def chunks(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        """What an event adds; nothing while its text isn't certain."""
        told = self.take(index, event)
        if not self.chat:
            if event.text or told or event.finish_reason:
                yield self._chunk(index, event.text, told, event.finish_reason)
            return
        if event.text or told:
            yield self._chunk(index, {"content": event.text}, told, None)
        if event.finish_reason:
            yield self._chunk(index, {}, [], event.finish_reason)

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, where the client asked for it."""
        return {**self.chunk_head, "choices": [], "usage": self.usage()}

    def _chunk(
        self, index: int, said: str | dict[str, str], told: Sequence[dict[str, Any]], end: str | None
    ) -> dict[str, Any]:
        name = "delta" if self.chat else "text"
        logprobs = self._logprobs(told) if told else None
        return {
            **self.chunk_head,
            "choices": [{"index": index, name: said, "logprobs": logprobs, "finish_reason": end}],
        }


def sse(value: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n\n"
