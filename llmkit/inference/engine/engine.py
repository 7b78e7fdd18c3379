"""Requests that come and go, written side by side (continuous batching: Yu et al. 2022, Orca, OSDI '22; keys and
values in blocks: Kwon et al. 2023, arXiv 2309.06180; drafts: Leviathan et al. 2023, arXiv 2211.17192).

Shapes: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmkit.config import UserError
from llmkit.inference.batch import cache_dtype, check_model, check_prompt, evaluating, not_finite
from llmkit.inference.engine.blocks import Blocks
from llmkit.inference.engine.choosing import Choice, Proposal, choose
from llmkit.inference.engine.config import EngineConfig
from llmkit.inference.engine.drafting import Draft
from llmkit.inference.engine.paged import BlockTable, Chunks, PagedStore
from llmkit.inference.engine.request import Counters, Event, Reason, Request
from llmkit.inference.engine.scheduler import Row, Scheduler
from llmkit.inference.engine.standing import Standing
from llmkit.inference.packed import WORTH_TOKENS, network_of
from llmkit.inference.steering import Steering
from llmkit.inference.stream import TextStream
from llmkit.model.gpt import GPT

if TYPE_CHECKING:
    from llmkit.tokenizer import Tokenizer


class Engine:
    """Writes many requests at once, which may join and leave between any two steps. All calls from one thread.

    A request's tokens depend on itself alone: they are those of `generate` for the same prompt, settings and seed,
    whatever its neighbours are, up to rounding in the logits. With a draft model this holds for greedy requests;
    drawn texts follow the same distribution, by other draws.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, config: EngineConfig | None = None, *, draft: GPT | None = None
    ):
        """Takes the memory of the cache. Dropout is off in here, whatever mode the models are in.

        Args:
            model: causal, of any precision and device.
            tokenizer: its own.
            config: limits.
            draft: a smaller model of the same tokenizer, which proposes tokens that the model checks several at a time.

        Raises:
            UserError: for a bidirectional model, a tokenizer larger than its embedding, or a draft that doesn't fit.
        """
        check_model(model, tokenizer.vocab_size)
        self.model, self.tokenizer = model, tokenizer
        self.config = config = EngineConfig() if config is None else config
        self._n_rows = config.max_rows * (1 if draft is None else 1 + config.draft_tokens)
        self._network = network_of(model, WORTH_TOKENS, self._n_rows)
        self.device = model.head_weight.device
        self._vocab_size = tokenizer.vocab_size
        size, longest = config.block_tokens, -(-model.config.max_seq_len // config.block_tokens)
        n_blocks = min(config.cache_tokens // size, config.max_rows * longest)
        if not n_blocks:
            raise UserError(f"cache_tokens ({config.cache_tokens}) is less than a block ({size}): raise it")
        self._table = BlockTable(config.max_rows, longest, size, self.device)
        self._store = PagedStore(model.config, n_blocks, size, cache_dtype(model), self.device)
        self._scheduler = Scheduler(config.max_rows, Blocks(n_blocks), size, config.reuse_prefixes)
        self._draft = None if draft is None else Draft(draft, model, self._table, n_blocks, tokenizer.vocab_size)
        self._standing: Standing | None = None
        self._rows: dict[int, Row] = {}
        self._next_id = 0
        self._done = Counters(n_blocks=n_blocks)

    # --- from outside -------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Takes a request and returns its id, under which events come. It begins in the next step with room for it.

        Raises:
            UserError: for a prompt that is empty, too long, out of the vocabulary or larger than the cache, for n or
                beams above 1, or a logit_bias that names no token. The engine goes on as if it had not been asked.
        """
        sampling, request_id = request.sampling, self._next_id
        if sampling.n > 1 or sampling.beams > 1:
            raise UserError(
                f"a request writes one text: n ({sampling.n}) needs `requests_of`, beams ({sampling.beams}) `generate`"
            )
        if request.top_logprobs < 0:
            raise UserError(f"top_logprobs must be 0 or more (got {request.top_logprobs})")
        ids = list(request.ids)
        check_prompt(ids, request_id, self.model, self._vocab_size)
        row = Row(
            id=request_id,
            request=request,
            limit=min(sampling.max_new_tokens, self.model.config.max_seq_len - len(ids)),
            random=random.Random(request.seed),
            stream=TextStream(self.tokenizer, sampling.stop),
            steering=Steering.of(sampling, self.tokenizer, [ids], self.device),
            tokens=ids,
            n_prompt=len(ids),
        )
        needed, there = self._scheduler.n_blocks_for(row), self._scheduler.blocks.n_blocks
        if needed > there:
            size = self.config.block_tokens
            raise UserError(
                f"prompt {request_id} and its {row.limit} new tokens need {needed * size} tokens of cache, there are "
                f"{there * size}: lower max_new_tokens, or raise cache_tokens"
            )
        self._next_id += 1
        self._rows[request_id] = row
        self._scheduler.waiting.append(row)
        return request_id

    def cancel(self, request_id: int) -> bool:
        """Ends a request at once, waiting or running: no event of it comes any more. False if there is none such."""
        row = self._rows.pop(request_id, None)
        if row is None:
            return False
        self._scheduler.end(row)
        return True

    def step(self) -> list[Event]:
        """Writes one token, with a draft some more, of every request whose prompt is read; then reads prompts.

        A prompt that is read to its end gives its first token at once. The list is empty if nothing is to be done, or if
        prompts are still being read.
        """
        if not self.busy:
            return []
        models = [self.model] if self._draft is None else [self.model, self._draft.model]
        with ExitStack() as modes, torch.inference_mode():
            for model in models:
                if model.training:  # to look at every submodule takes time at every token
                    modes.enter_context(evaluating(model))
            writing = [row for row in self._scheduler.running if not row.is_reading]
            events: list[Event] = []
            if writing:
                events = self._write(writing) if self._draft is None else self._speculate(self._draft, writing)
            events += self._read()
        if not self._rows:
            self._standing = None
        self._done = replace(
            self._done,
            steps=self._done.steps + 1,
            new_tokens=self._done.new_tokens + sum(event.token is not None for event in events),
        )
        return events

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._rows)

    @property
    def counters(self) -> Counters:
        """Blocks in use, prefix hits, acceptance, tokens."""
        scheduler = self._scheduler
        return replace(
            self._done,
            n_running=len(scheduler.running),
            n_waiting=len(scheduler.waiting),
            blocks_in_use=scheduler.blocks.n_held,
            blocks_kept=scheduler.blocks.n_kept,
        )

    def forget_prefixes(self) -> None:
        """Drops what was made of the weights: past prompts' keys and values, packed matrices. Needed when weights were
        changed, with no request running.

        Raises ValueError while one runs: its keys and values come from the weights of before.
        """
        if self._scheduler.running:
            raise ValueError(f"{len(self._scheduler.running)} requests run: let them end, or cancel them")
        self._scheduler.blocks.forget()
        self._network = network_of(self.model, WORTH_TOKENS, self._n_rows)
        if self._draft is not None:
            self._draft.repack()

    # --- one step -----------------------------------------------------------------------------------------------------

    def _read(self) -> list[Event]:
        """Reads as much of the prompts as a step may; the first tokens of those that are read."""
        events: list[Event] = []
        budget = self.config.prefill_tokens
        while True:
            self._admit()
            chosen = self._scheduler.to_read(budget, budget == self.config.prefill_tokens)
            if not chosen:
                return events
            budget -= sum(n for _, n in chosen)
            tokens = [row.tokens[row.n_computed : row.n_computed + n] for row, n in chosen]
            chunks = self._chunks([row for row, _ in chosen], tokens)
            hidden_BTD = chunks.forward(self._network, self._store)
            if self._draft is not None:
                self._draft.read(chunks)
            for row, n in chosen:
                row.n_computed += n
                row.n_draft_computed = row.n_computed
                self._scheduler.publish(row, row.n_computed)
            ready = [b for b, (row, _) in enumerate(chosen) if not row.is_reading]
            if ready:
                rows = [chosen[b][0] for b in ready]
                choices = choose(rows, self._last_logits(hidden_BTD[ready]), self._vocab_size)
                events += [self._push(row, choice) for row, choice in zip(rows, choices, strict=True)]

    def _admit(self) -> None:
        for row in self._scheduler.admit():
            self._table.set(row.line, row.blocks)
            self._done = replace(
                self._done,
                prompt_tokens=self._done.prompt_tokens + row.n_prompt,
                prefix_tokens=self._done.prefix_tokens + row.n_computed,
            )

    def _write(self, rows: list[Row]) -> list[Event]:
        """The next token of every row."""
        if self._standing is None or not self._standing.follow(rows):
            self._standing = None  # its memory is needed for the next
            n_columns = Standing.n_columns_for(rows, self.model.config.max_seq_len)
            if len(rows) * n_columns <= self._scheduler.blocks.n_blocks * self.config.block_tokens:
                self._standing = Standing(self._store, self._table, rows, n_columns)
        if self._standing is None:
            hidden_BTD = self._chunks(rows, [row.tokens[-1:] for row in rows]).forward(self._network, self._store)
        else:
            rows, hidden_BTD = self._standing.rows, self._standing.forward(self._network)
        choices = choose(rows, self._last_logits(hidden_BTD), self._vocab_size)
        return [self._push(row, choice) for row, choice in zip(rows, choices, strict=True)]

    def _speculate(self, draft: Draft, rows: list[Row]) -> list[Event]:
        """The next tokens of every row: the draft's, as far as the model agrees, and one of the model's own."""
        counts = [min(self.config.draft_tokens, row.limit - row.n_new - 1) for row in rows]
        proposals = draft.propose(rows, counts)
        n_before = [len(row.tokens) for row in rows]
        tokens = [[row.tokens[-1], *(p.token for p in found)] for row, found in zip(rows, proposals, strict=True)]
        chunks = self._chunks(rows, tokens)
        hidden_BTD = chunks.forward(self._network, self._store)
        events: list[Event] = []
        n_accepted, going = 0, list(range(len(rows)))
        for j in range(max(counts) + 1):
            if not going:
                break
            columns = [chunks.T - len(tokens[b]) + j for b in going]
            among = [rows[b] for b in going]
            offered: list[Proposal | None] = [proposals[b][j] if j < counts[b] else None for b in going]
            choices = choose(among, self._network.logits(hidden_BTD[going, columns]), self._vocab_size, offered)
            still: list[int] = []
            for b, choice, proposal in zip(going, choices, offered, strict=True):
                agreed = proposal is not None and proposal.token == choice.token
                event = self._push(rows[b], choice, publish=False)
                events.append(event)
                n_accepted += agreed
                if agreed and event.finish_reason is None:
                    still.append(b)
            going = still
        for row, n, count in zip(rows, n_before, counts, strict=True):
            row.n_draft_computed = min(len(row.tokens) - 1, n + count - 1)
            if row.line >= 0:
                self._scheduler.publish(row, min(row.n_computed, row.n_draft_computed))
        self._done = replace(
            self._done,
            drafted_tokens=self._done.drafted_tokens + sum(counts),
            accepted_tokens=self._done.accepted_tokens + n_accepted,
        )
        return events

    # --- pieces of a step ---------------------------------------------------------------------------------------------

    def _chunks(self, rows: Sequence[Row], tokens: Sequence[Sequence[int]]) -> Chunks:
        return Chunks(self._table, [r.line for r in rows], tokens, [r.n_computed for r in rows], self.device)

    def _last_logits(self, hidden_BTD: Tensor) -> Tensor:
        """[B, V or more]: all texts of a pass end in its last column."""
        return self._network.logits(hidden_BTD[:, -1])

    def _push(self, row: Row, choice: Choice, publish: bool = True) -> Event:
        """Adds a token to a row, which leaves if that ends it."""
        if not math.isfinite(choice.logprob):
            return self._fail(row)
        row.tokens.append(choice.token)
        row.n_computed = len(row.tokens) - 1
        text = row.stream.push(choice.token)
        finished: Reason | None = None
        if not row.stream.stopped and row.n_new == row.limit:
            text, finished = text + row.stream.finish(), "length"
        if row.stream.stopped:  # by now: a stop string may end in the replacement character of one that was cut off
            finished = "stop"
        if publish:
            self._scheduler.publish(row, row.n_computed)
        if finished is not None:
            self._leave(row)
        return Event(
            request_id=row.id,
            token=choice.token,
            text=text,
            logprob=choice.logprob,
            drawn_logprob=choice.drawn_logprob,
            top_logprobs=choice.top_logprobs,
            finish_reason=finished,
        )

    def _fail(self, row: Row) -> Event:
        """Ends one row whose scores are not finite; its neighbours have their own."""
        self._leave(row, withdraw=True)
        error = str(not_finite(row.n_new, row.id))
        return Event(row.id, text=row.stream.finish(), finish_reason="error", error=error)

    def _leave(self, row: Row, withdraw: bool = False) -> None:
        del self._rows[row.id]
        self._scheduler.end(row, withdraw)
