"""Prompts in, continuations out: KV cache, ragged batches, stop strings, one random stream per row.

Shapes: B rows still being written, T tokens of this step, S columns of the cache, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from llmkit.config import UserError
from llmkit.inference.batch import (
    LeftPadded,
    cache_dtype,
    check_model,
    check_prompt,
    evaluating,
    not_finite,
)
from llmkit.inference.beams import search
from llmkit.inference.config import SamplingConfig
from llmkit.inference.packed import Network, network_of
from llmkit.inference.sampling import drawn_log_probs, log_probs, row_seeds, sample, sample_seeds
from llmkit.inference.steering import Steering
from llmkit.inference.stream import FinishReason, Generation, TextStream
from llmkit.model.gpt import GPT, KVCache

if TYPE_CHECKING:
    from llmkit.tokenizer import Tokenizer


@dataclass
class _Row:
    """One text being written: its prompt and what has been added so far."""

    index: int
    prompt: list[int]
    limit: int
    random: random.Random
    stream: TextStream
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    drawn_logprobs: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def push(self, token: int, logprob: float) -> None:
        if not math.isfinite(logprob):
            raise not_finite(len(self.ids), self.index)
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
        reason = "stop" if self.stream.stopped else self.finish_reason
        return Generation(self.ids, self.logprobs, text, reason, drawn_logprobs=self.drawn_logprobs or None)


def _close_ranks(going: list[bool]) -> list[int]:
    """The rows that go on, in the order that copies least of the cache: gaps are filled from the end."""
    n = sum(going)
    spare = [i for i in range(n, len(going)) if going[i]]
    return [i if going[i] else spare.pop() for i in range(n)]


def _decode(
    model: GPT,
    network: Network,
    prompts: list[list[int]],
    live: list[_Row],
    sampling: SamplingConfig,
    tokenizer: Tokenizer,
    should_stop: Callable[[], bool],
    on_token: Callable[[int, int], None] | None,
) -> None:
    """Writes all rows to their end: `sampling.n` of each prompt, side by side.

    The first forward pass takes the whole prompts, each once; every other one takes one token per row.
    """
    device = model.head_weight.device
    # The last new token is not fed back, so it needs no column.
    n_columns = max(map(len, prompts)) + max(row.limit for row in live) - 1
    grid = LeftPadded(prompts, n_columns, device)
    cache = KVCache(model.config, len(prompts), n_columns, cache_dtype(model), device)
    steering = Steering.of(sampling, tokenizer, [row.prompt for row in live], device)
    ids_BT, mask = grid.ids_BT, grid.prompt_mask()
    while live:
        if should_stop():
            for row in live:
                row.finish_reason = "interrupted"
            return
        hidden_BTD = network.forward(ids_BT, grid.positions_BT, mask, cache)
        logits_BV = network.logits(hidden_BTD[:, -1])
        grid.positions_BT = grid.positions_BT[:, -1:] + 1
        if len(logits_BV) < len(live):  # the prompts are read: their samples part here
            samples = torch.arange(len(prompts), device=device).repeat_interleave(sampling.n)
            logits_BV = logits_BV[samples]
            grid.select(samples)
            cache.select(samples)
        uniforms_B = torch.tensor([row.random.random() for row in live], dtype=torch.float64).to(device)
        steered_BV = None if steering is None else steering(logits_BV)
        ids_B, logprobs_B = sample(logits_BV, uniforms_B, sampling, tokenizer.vocab_size, steered_BV)
        if sampling.has_filters:
            chosen_from_BV = logits_BV if steered_BV is None else steered_BV
            drawn_B = drawn_log_probs(chosen_from_BV, ids_B, sampling, tokenizer.vocab_size)
            for row, logprob in zip(live, drawn_B.tolist(), strict=True):
                row.drawn_logprobs.append(logprob)
        if steering is not None:
            steering.update(ids_B)
        for row, token, logprob in zip(live, ids_B.tolist(), logprobs_B.tolist(), strict=True):
            row.push(token, logprob)
            if on_token is not None:
                on_token(row.index, token)
        going = _close_ranks([row.finish_reason is None for row in live])
        if len(going) < len(live):
            live = [live[i] for i in going]
            rows = torch.tensor(going, dtype=torch.long, device=device)
            ids_B = ids_B[rows]
            grid.select(rows)
            cache.select(rows)
            if steering is not None:
                steering.select(rows)
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
    network: Network | None = None,
) -> list[Generation]:
    """Continues every prompt `sampling.n` times, all of them as one batch; rows that end leave it.

    A row's result does not depend on the others: the same prompt and seed give the same tokens in any batch, up to
    rounding in the logits. No global random state is read or changed.

    Args:
        model: in any mode and precision; dropout is off in here.
        prompts: token ids, each 1 to max_seq_len - 1 of them. A row that reaches max_seq_len before max_new_tokens
            ends there, with finish_reason "length".
        sampling: temperature, filters, penalties, beams, stop strings, lengths.
        tokenizer: gives the text, the stop tokens, and the vocabulary's true size: ids beyond it are never drawn.
        seeds: one per prompt, from which each of its samples derives its own (`sample_seeds`). Default:
            `row_seeds(sampling.seed, len(prompts))`.
        should_stop: polled before each step; True ends the rows that are not done as "interrupted".
        on_token: called with (index of the result, new id) as tokens come, stop tokens too; `TextStream` makes text of
            them. Beams are certain at the end only, so theirs come all at once then.
        network: of the same model, where several calls share what `network_of` makes of its weights.

    Returns:
        n Generations per prompt, in the order of the prompts: those of prompt i are i * n to i * n + n - 1. Beams come
        best first.

    Raises:
        UserError: for a prompt that is empty, too long or out of the vocabulary, a tokenizer larger than the model's
            embedding, a bidirectional model, a logit_bias that names no token, or another number of seeds than prompts.
        MachineError: if the model's scores are not finite.
    """
    check_model(model, tokenizer.vocab_size)
    for i, prompt in enumerate(prompts):
        check_prompt(prompt, i, model, tokenizer.vocab_size)
    seeds = row_seeds(sampling.seed, len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one each, or none")
    if not prompts:
        return []
    texts = [list(prompt) for prompt in prompts]
    limits = [min(sampling.max_new_tokens, model.config.max_seq_len - len(prompt)) for prompt in texts]
    if network is None:
        per_prompt = max(sampling.n, sampling.beams)
        network = network_of(model, sum(limits) * per_prompt, len(texts) * per_prompt)
    if sampling.beams > 1:
        with evaluating(model), torch.inference_mode():
            results = search(model, network, texts, limits, sampling, tokenizer, should_stop)
        for i, result in enumerate(results if on_token is not None else ()):
            assert on_token is not None
            for token in result.ids:
                on_token(i, token)
        return results
    rows = [
        _Row(
            index=i * sampling.n + k,
            prompt=prompt,
            limit=limit,
            random=random.Random(seed),
            stream=TextStream(tokenizer, sampling.stop),
        )
        for i, (prompt, limit) in enumerate(zip(texts, limits, strict=True))
        for k, seed in enumerate(sample_seeds(seeds[i], sampling.n))
    ]
    with evaluating(model), torch.inference_mode():
        _decode(model, network, texts, rows, sampling, tokenizer, should_stop, on_token)
    return [row.result() for row in rows]


def candidates(model: GPT, ids: Sequence[int], k: int, vocab_size: int) -> list[tuple[int, float]]:
    """The k most probable next tokens at temperature 1 with their probabilities, best first.

    Raises UserError for a prompt or vocabulary that does not fit, as `generate` does.
    """
    check_model(model, vocab_size)
    check_prompt(ids, 0, model, vocab_size)
    with evaluating(model), torch.inference_mode():
        hidden_BTD = model.forward(torch.tensor([list(ids)], device=model.head_weight.device))
        logprobs_V = log_probs(model.logits(hidden_BTD[0, -1]), 1.0, vocab_size)
        best = logprobs_V.exp().topk(min(k, vocab_size))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
