"""Prompts in, continuations out: KV cache, ragged batches, stop strings, one random stream per row.

Shapes: B rows still being written, T tokens of this step, S columns of the cache, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from llmkit.config import MachineError, UserError
from llmkit.inference.config import SamplingConfig
from llmkit.inference.sampling import log_probs, row_seeds, sample
from llmkit.model.gpt import GPT, KVCache

if TYPE_CHECKING:
    from llmkit.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Generation:
    """What was added to one prompt."""

    ids: list[int]
    """The new tokens, with the one that ended them: a stop token, or the token that completed a stop string."""
    logprobs: list[float]
    """Of each new token under softmax(logits / temperature), before top_k, top_p and min_p; temperature 0 counts as 1.
    So they equal the trainer's as long as it divides its logits by the same temperature (`sampling.log_probs`)."""
    text: str
    """The new tokens as text, without stop token and stop string."""
    finish_reason: FinishReason
    """A "stop" token or string, "length" (max_new_tokens or the context's end), or "interrupted" by `should_stop`."""


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


@dataclass
class _Row:
    """One prompt and what has been added to it so far."""

    index: int
    prompt: list[int]
    limit: int
    random: random.Random
    stream: TextStream
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def push(self, token: int, logprob: float) -> None:
        if not math.isfinite(logprob):
            raise MachineError(
                f"the model's scores are not finite at new token {len(self.ids)} of prompt {self.index}: its weights "
                "or activations overflow; `llmkit verify` checks a checkpoint's weights"
            )
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.pieces.append(self.stream.push(token))
        if self.stream.stopped:
            self.finish_reason = "stop"
        elif len(self.ids) == self.limit:
            self.finish_reason = "length"

    def result(self) -> Generation:
        assert self.finish_reason is not None
        text = "".join((*self.pieces, self.stream.finish()))
        # A stop string may end in the replacement character of a character that was cut off.
        return Generation(self.ids, self.logprobs, text, "stop" if self.stream.stopped else self.finish_reason)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off; afterwards every submodule is in the mode in which it was found, also after an exception."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def _check_prompt(prompt: Sequence[int], index: int, model: GPT, vocab_size: int) -> None:
    n, longest = len(prompt), model.config.max_seq_len
    if n == 0:
        raise UserError(f"prompt {index} has no tokens: begin it with the tokenizer's bos token")
    if n >= longest:
        raise UserError(
            f"prompt {index} has {n} tokens, the model's context max_seq_len {longest}: shorten it to at most "
            f"{longest - 1}"
        )
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise UserError(
            f"prompt {index} holds ids from {min(prompt)} to {max(prompt)}, the vocabulary 0 to {vocab_size - 1}"
        )


def _check_vocabulary(model: GPT, vocab_size: int) -> None:
    n_rows = model.head_weight.shape[0]
    if vocab_size > n_rows:
        raise UserError(
            f"the tokenizer has {vocab_size} tokens, the model's embedding {n_rows}: they do not belong together"
        )


def _cache_dtype(model: GPT) -> torch.dtype:
    """Of the keys and values that the model will compute here."""
    weight = model.head_weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    return torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype


class _LeftPadded:
    """The token grid of a ragged batch: prompts end in the same column, so that all rows go on in step.

    Every token keeps the position it has when alone, and sees only columns from its row's start on, so a row's logits
    are those of a batch of one.
    """

    def __init__(self, prompts: list[list[int]], n_columns: int, device: torch.device):
        self.width = max(map(len, prompts))
        self.starts_B = torch.tensor([self.width - len(p) for p in prompts], device=device)
        self.columns_S = torch.arange(n_columns, device=device)
        self.ids_BT = torch.tensor([[0] * (self.width - len(p)) + p for p in prompts], device=device)
        self.positions_BT = (self.columns_S[: self.width] - self.starts_B[:, None]).clamp(min=0)
        self._see()

    def _see(self) -> None:
        """Which columns each row may see [B, 1, 1, S]; None if it is all of them, which attention computes faster."""
        ragged = bool(self.starts_B.any())
        self.seen_B11S = (self.columns_S >= self.starts_B[:, None])[:, None, None] if ragged else None

    def prompt_mask(self) -> Tensor | None:
        """[B, 1, T, T]. Padding sees itself: a softmax over nothing would be NaN and spread through the cache."""
        if self.seen_B11S is None:
            return None
        columns_T = self.columns_S[: self.width]
        causal_TT = columns_T <= columns_T[:, None]
        return (self.seen_B11S[..., : self.width] & causal_TT) | (columns_T == columns_T[:, None])

    def step_mask(self, n_columns: int) -> Tensor | None:
        """[B, 1, 1, S] for one token per row, which becomes the last of `n_columns`."""
        return None if self.seen_B11S is None else self.seen_B11S[..., :n_columns]

    def select(self, rows: Tensor) -> None:
        """Keeps only the given rows."""
        self.starts_B, self.positions_BT = self.starts_B[rows], self.positions_BT[rows]
        self._see()


def _close_ranks(going: list[bool]) -> list[int]:
    """The rows that go on, in the order that copies least of the cache: gaps are filled from the end."""
    n = sum(going)
    spare = [i for i in range(n, len(going)) if going[i]]
    return [i if going[i] else spare.pop() for i in range(n)]


def _decode(
    model: GPT,
    live: list[_Row],
    sampling: SamplingConfig,
    vocab_size: int,
    should_stop: Callable[[], bool],
    on_token: Callable[[int, int], None] | None,
) -> None:
    """Writes all rows to their end. The first forward pass takes whole prompts, every other one token per row."""
    device = model.head_weight.device
    width = max(len(row.prompt) for row in live)
    # The last new token is not fed back, so it needs no column.
    n_columns = width + max(row.limit for row in live) - 1
    grid = _LeftPadded([row.prompt for row in live], n_columns, device)
    cache = KVCache(model.config, len(live), n_columns, _cache_dtype(model), device)
    ids_BT, mask = grid.ids_BT, grid.prompt_mask()
    while live:
        if should_stop():
            for row in live:
                row.finish_reason = "interrupted"
            return
        # Not model(...): a trainer may have compiled the module in place, and these shapes would recompile it.
        hidden_BTD = model.forward(ids_BT, grid.positions_BT, mask, cache)
        uniforms_B = torch.tensor([row.random.random() for row in live], dtype=torch.float64).to(device)
        ids_B, logprobs_B = sample(model.logits(hidden_BTD[:, -1]), uniforms_B, sampling, vocab_size)
        for row, token, logprob in zip(live, ids_B.tolist(), logprobs_B.tolist(), strict=True):
            row.push(token, logprob)
            if on_token is not None:
                on_token(row.index, token)
        grid.positions_BT = grid.positions_BT[:, -1:] + 1
        going = _close_ranks([row.finish_reason is None for row in live])
        if len(going) < len(live):
            live = [live[i] for i in going]
            rows = torch.tensor(going, dtype=torch.long, device=device)
            ids_B = ids_B[rows]
            grid.select(rows)
            cache.select(rows)
        ids_BT, mask = ids_B[:, None], grid.step_mask(cache.length + 1)


def _never() -> bool:
    return False


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    tokenizer: Tokenizer,
    seeds: Sequence[int] | None = None,
    should_stop: Callable[[], bool] = _never,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Continues every prompt, all of them as one batch; rows that end leave it.

    A row's result does not depend on the others: the same prompt and seed give the same tokens in any batch, up to
    rounding in the logits. No global random state is read or changed.

    Args:
        model: in any mode and precision; dropout is off in here.
        prompts: token ids, each 1 to max_seq_len - 1 of them. A row that reaches max_seq_len before max_new_tokens
            ends there, with finish_reason "length".
        sampling: temperature, filters, stop strings, lengths.
        tokenizer: gives the text, the stop tokens, and the vocabulary's true size: ids beyond it are never drawn.
        seeds: one per prompt. Default: `row_seeds(sampling.seed, len(prompts))`.
        should_stop: polled before each step; True ends the rows that are not done as "interrupted".
        on_token: called with (index of the prompt, new id) as tokens come, stop tokens too; `TextStream` makes text of
            them.

    Returns:
        One Generation per prompt, in order.

    Raises:
        UserError: for a prompt that is empty, too long or out of the vocabulary, a tokenizer larger than the model's
            embedding, or another number of seeds than prompts.
        MachineError: if the model's scores are not finite.
    """
    _check_vocabulary(model, tokenizer.vocab_size)
    for i, prompt in enumerate(prompts):
        _check_prompt(prompt, i, model, tokenizer.vocab_size)
    seeds = row_seeds(sampling.seed, len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one each, or none")
    rows = [
        _Row(
            index=i,
            prompt=list(prompt),
            limit=min(sampling.max_new_tokens, model.config.max_seq_len - len(prompt)),
            random=random.Random(seed),
            stream=TextStream(tokenizer, sampling.stop),
        )
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    if rows:
        with evaluating(model), torch.inference_mode():
            _decode(model, rows, sampling, tokenizer.vocab_size, should_stop, on_token)
    return [row.result() for row in rows]


def candidates(model: GPT, ids: Sequence[int], k: int, vocab_size: int) -> list[tuple[int, float]]:
    """The k most probable next tokens at temperature 1 with their probabilities, best first.

    Raises UserError for a prompt or vocabulary that does not fit, as `generate` does.
    """
    _check_vocabulary(model, vocab_size)
    _check_prompt(ids, 0, model, vocab_size)
    with evaluating(model), torch.inference_mode():
        hidden_BTD = model.forward(torch.tensor([list(ids)], device=model.head_weight.device))
        logprobs_V = log_probs(model.logits(hidden_BTD[0, -1]), 1.0, vocab_size)
        best = logprobs_V.exp().topk(min(k, vocab_size))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
