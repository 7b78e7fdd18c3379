"""Requests in, answers out: what the paths of the API do."""

from __future__ import annotations

import asyncio
import base64
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from llmkit.config import UserError
from llmkit.inference.command import encode_prompt
from llmkit.inference.embed import batches_of, text_vectors
from llmkit.inference.engine.request import Event, Request, requests_of
from llmkit.serving.answers import Answer, sse
from llmkit.serving.config import Limits, ServingConfig
from llmkit.serving.metrics import Metrics
from llmkit.serving.schema import (
    MAX_SEED,
    ApiError,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Prompt,
    from_user_error,
)
from llmkit.serving.worker import Job, Stopped, Worker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from llmkit.inference.engine.engine import Engine
    from llmkit.model.gpt import GPT
    from llmkit.tokenizer import Tokenizer

T = TypeVar("T")
COMPLETION_TOKENS = 16  # most new tokens of a completion that doesn't say; OpenAI's default
EMBEDDING_TOKENS = 2048  # of one forward pass, after which those who write go on


@dataclass
class Writing:
    """A request that is being answered."""

    job: Job
    answer: Answer
    pending: int
    """Texts that it was let in for."""
    began: float


class Service:
    """A model behind the API. All methods belong to the event loop in which `start` was called."""

    def __init__(self, config: ServingConfig, model: GPT, tokenizer: Tokenizer, engine: Engine, chat: bool):
        """Sets up a service.

        Args:
            config: the server's.
            model: what embeds; the engine's too.
            tokenizer: the model's.
            engine: what writes.
            chat: whether the model answers conversations, by its tokenizer's template.
        """
        self.config, self.model, self.tokenizer, self.chat = config, model, tokenizer, chat
        self.context = model.config.max_seq_len
        self._cache_tokens = engine.counters.n_blocks * engine.config.block_tokens
        self.metrics, self.worker = Metrics(), Worker(engine)
        self.pending = 0
        """Texts that are written or wait."""
        self._created = int(time.time())
        # Tokenizing takes a moment, which the event loop doesn't have; one thread, as caches may not like two.
        self._encoder = ThreadPoolExecutor(1, "llmkit-tokenizer")
        longest = max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))
        self._most_bytes = self.context * longest if tokenizer.lossless else None

    @property
    def limits(self) -> Limits:
        return self.config.limits

    async def start(self) -> None:
        """Begins to work."""
        self.worker.start()

    async def stop(self) -> None:
        """Ends the threads; what is unfinished is told so."""
        await self.worker.stop()
        self._encoder.shutdown(wait=False, cancel_futures=True)

    # - what there is -

    def model_card(self) -> dict[str, Any]:
        """The one model; `max_model_len` is vLLM's word for its context, `chat` ours."""
        card = {"id": self.config.name, "object": "model", "created": self._created, "owned_by": "llmkit"}
        return {**card, "max_model_len": self.context, "chat": self.chat}

    def check_model(self, name: str) -> None:
        """Raises ApiError (404) unless this is the model's name: it is compared, and never used as a path."""
        if name != self.config.name:
            shown = name[:100]
            raise ApiError(
                404, f"the model {shown!r} does not exist: here is {self.config.name!r}", "model", "model_not_found"
            )

    def metrics_text(self) -> str:
        """For Prometheus."""
        c = self.worker.counters
        gauges: dict[str, tuple[str, float]] = {
            "pending": ("Texts that are written or wait, as the limit counts them.", self.pending),
            "running": ("Requests that the engine reads or writes.", c.n_running),
            "waiting": ("Requests that wait for room in the engine.", c.n_waiting),
            "kv_blocks": ("Blocks of keys and values in all.", c.n_blocks),
            "kv_blocks_in_use": ("Blocks that running requests hold.", c.blocks_in_use),
            "kv_blocks_kept": ("Blocks kept for prompts that begin the same.", c.blocks_kept),
            "engine_steps": ("Steps of the engine so far.", c.steps),
            "prefix_hit_fraction": ("Part of all prompt tokens that needn't be computed.", c.prefix_hit_frac),
            "draft_acceptance_fraction": ("Part of the draft's tokens that the model took.", c.acceptance_frac),
        }
        return self.metrics.text(gauges)

    # - text -

    async def begin(self, body: CompletionRequest | ChatRequest) -> Writing:
        """Hands a request to the engine; who calls must `close` what it returns. Raises ApiError."""
        began = time.monotonic()
        self.check_model(body.model)
        n_texts = body.n_texts
        with self._let_in(n_texts):
            ids = await self._ids(body)
            requests = self._requests(body, ids)
            answer = Answer(
                self.config.name,
                self.tokenizer,
                chat=isinstance(body, ChatRequest),
                n_choices=n_texts,
                prompt_tokens=sum(map(len, ids)),
                n_logprobs=body.n_logprobs,
                openings=self._openings(body),
            )
            job = await self._ask(self.worker.submit(requests))
            self.pending += n_texts  # from here on until `close`
        self.metrics.prompt_tokens += answer.prompt_tokens
        return Writing(job, answer, n_texts, began)

    def close(self, writing: Writing) -> None:
        """Ends a request, however it ended."""
        self.worker.cancel(writing.job)
        self.pending -= writing.pending
        self.metrics.new_tokens += writing.answer.new_tokens
        self.metrics.duration.observe(time.monotonic() - writing.began)

    async def whole(self, writing: Writing) -> dict[str, Any]:
        """Waits for all texts of a request. Raises ApiError."""
        async for index, event in self._events(writing):
            writing.answer.take(index, event)
        return writing.answer.whole()

    async def pieces(self, writing: Writing, with_usage: bool) -> AsyncGenerator[bytes, None]:
        """The events of a streamed answer; what goes wrong on the way is the last one."""
        answer = writing.answer
        for chunk in answer.first_chunks():
            yield sse(chunk)
        try:
            async for index, event in self._events(writing):
                for chunk in answer.chunks(index, event):
                    yield sse(chunk)
        except ApiError as e:
            yield sse(e.body())
            return
        if with_usage:
            yield sse(answer.usage_chunk())
        yield b"data: [DONE]\n\n"

    async def _events(self, writing: Writing) -> AsyncGenerator[tuple[int, Event], None]:
        deadline = writing.began + self.limits.request_timeout_s
        first = True
        while True:
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    found = await self._ask(writing.job.next())
            except TimeoutError:
                self.metrics.timeouts += 1
                what = f"the request took longer than {self.limits.request_timeout_s:g} s and was cancelled"
                raise ApiError(504, what, code="timeout") from None
            if found is None:
                return
            if first:
                self.metrics.first_token.observe(time.monotonic() - writing.began)
                first = False
            if found[1].finish_reason == "error":
                raise ApiError(500, f"the model failed: {found[1].error}", code="model_error")
            yield found

    @contextmanager
    def _let_in(self, n_texts: int) -> Iterator[None]:
        """Counts texts while their prompt is tokenized. Raises ApiError (429) where there are too many."""
        if self.pending + n_texts > self.limits.max_pending:
            what = f"{self.pending} texts are being written or wait already, of at most {self.limits.max_pending}"
            raise ApiError(429, f"{what}: come back later", code="queue_full", headers={"Retry-After": "1"})
        self.pending += n_texts
        try:
            yield
        finally:
            self.pending -= n_texts

    async def _ask(self, answer: Awaitable[T]) -> T:
        """What the engine says, and what keeps it from answering as an ApiError."""
        try:
            return await answer
        except UserError as e:
            raise from_user_error(e) from None
        except Stopped as e:
            raise ApiError(503, f"no answer: {e}", code="stopped", headers={"Retry-After": "5"}) from None

    def _requests(self, body: CompletionRequest | ChatRequest, prompts: Sequence[list[int]]) -> list[Request]:
        asked = body.limit()
        if asked is not None and asked > self.context:
            raise ApiError(
                400,
                f"max_tokens: {asked} is beyond the context of {self.context} tokens",
                "max_tokens",
                "limit_exceeded",
            )
        for prompt in prompts:
            self._check_length(len(prompt), self.context - 1)
        # A chat goes on to the end of the context, or of the cache where that is smaller.
        room = min(self.context, self._cache_tokens) - max(map(len, prompts))
        default = max(1, room) if isinstance(body, ChatRequest) else max(COMPLETION_TOKENS, body.min_tokens)
        sampling = body.sampling(asked or default).model_copy(update={"n": body.n})
        seed = secrets.randbits(63) if body.seed is None else body.seed & MAX_SEED
        seeds = [seed, *(random.Random(f"{seed}/{i}").getrandbits(63) for i in range(1, len(prompts)))]
        return [
            one
            for ids, s in zip(prompts, seeds, strict=True)
            for one in requests_of(ids, sampling, s, body.n_logprobs or 0)
        ]

    def _openings(self, body: CompletionRequest | ChatRequest) -> list[str]:
        if not isinstance(body, CompletionRequest) or not body.echo:
            return []
        texts = [prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt) for prompt in body.prompt]
        return [text for text in texts for _ in range(body.n)]

    # - prompts -

    async def _ids(self, body: CompletionRequest | ChatRequest) -> list[list[int]]:
        if isinstance(body, CompletionRequest):
            if body.echo and body.logprobs is not None:
                raise ApiError(400, "logprobs: not together with echo: the prompt's are not computed", "logprobs")
            return [await self._encoded(prompt, "prompt") for prompt in body.prompt]
        if not self.chat:
            what = "this model has no chat template, or is a base model: use /v1/completions"
            raise ApiError(400, what, "messages", "no_chat_template")
        messages = [message.plain() for message in body.messages]
        self._check_bytes(sum(len(message["content"].encode()) for message in messages), "messages")

        def encode() -> list[int]:
            return self.tokenizer.encode_chat(messages, add_generation_prompt=True).ids

        return [await self._in_encoder(encode, "messages")]

    async def _encoded(self, prompt: Prompt, param: str) -> list[int]:
        """A text's ids after the tokenizer's bos; ids as they are, if there are such."""
        if isinstance(prompt, str):
            text = prompt
            self._check_bytes(len(text.encode()), param)
            return await self._in_encoder(lambda: encode_prompt(self.tokenizer, text, None, chat=False), param)
        if max(prompt) >= self.tokenizer.vocab_size:
            most = self.tokenizer.vocab_size - 1
            raise ApiError(400, f"{param}: there is no token {max(prompt)}: ids end at {most}", param)
        return prompt

    async def _in_encoder(self, encode: Callable[[], list[int]], param: str) -> list[int]:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoder, encode)
        except UserError as e:
            raise from_user_error(e, param) from None

    def _check_bytes(self, n_bytes: int, param: str) -> None:
        """Refuses what can't fit before time is spent on cutting it into tokens."""
        if self._most_bytes is not None and n_bytes > self._most_bytes:
            what = f"{param}: {n_bytes} bytes can't fit into the context of {self.context} tokens"
            raise ApiError(400, what, param, "context_length_exceeded")

    def _check_length(self, n_tokens: int, most: int) -> None:
        if n_tokens > most:
            what = f"the prompt has {n_tokens} tokens; the model's context of {self.context} has room for {most}"
            raise ApiError(400, what, None, "context_length_exceeded")

    # - vectors -

    async def embed(self, body: EmbeddingRequest) -> dict[str, Any]:
        """Unit vectors of texts, by the mean of their tokens' last states, as `llmkit embed` makes them."""
        self.check_model(body.model)
        width = self.model.config.d_model
        if body.dimensions not in (None, width):
            raise ApiError(400, f"dimensions: this model's vectors have {width}, no other number", "dimensions")
        with self._let_in(len(body.input)):
            rows = [await self._encoded(text, "input") for text in body.input]
            bos = self.tokenizer.bos_id
            for row in rows:
                self._check_length(len(row), self.context)
                if not row or row == [bos]:
                    raise ApiError(400, "input: an empty text has no vector", "input")
            n_skips = [int(row[0] == bos and len(row) > 1) for row in rows]
            found: dict[int, list[float]] = {}
            for skip in sorted(set(n_skips)):
                own = [i for i, n in enumerate(n_skips) if n == skip]
                for batch in batches_of([rows[i] for i in own], EMBEDDING_TOKENS):
                    numbers = [own[i] for i in batch]
                    found.update(zip(numbers, await self._vectors([rows[i] for i in numbers], skip), strict=True))
        n_tokens = sum(map(len, rows))
        self.metrics.prompt_tokens += n_tokens
        data = [{"object": "embedding", "index": i, "embedding": _vector(found[i], body)} for i in range(len(rows))]
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return {"object": "list", "data": data, "model": self.config.name, "usage": usage}

    async def _vectors(self, rows: list[list[int]], n_skip: int) -> list[list[float]]:
        def compute() -> list[list[float]]:
            return text_vectors(self.model, rows, n_skip=n_skip, batch_tokens=EMBEDDING_TOKENS).tolist()

        return await self._ask(self.worker.call(compute))


def _vector(values: list[float], body: EmbeddingRequest) -> list[float] | str:
    """As the client wants it: numbers, or the bytes of little-endian fp32 in base64, as OpenAI's own client asks."""
    if body.encoding_format == "float":
        return values
    return base64.b64encode(np.array(values, dtype="<f4").tobytes()).decode("ascii")
