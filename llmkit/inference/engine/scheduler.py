"""Who is written now, who waits, and whose prompt is read next: decided here, without a tensor."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from llmkit.inference.engine.blocks import Blocks, beginnings
from llmkit.inference.engine.request import Request
from llmkit.inference.steering import Steering
from llmkit.inference.stream import TextStream


@dataclass(eq=False)
class Row:
    """One request, with all that is known of it."""

    id: int
    request: Request
    limit: int
    """Most new tokens."""
    random: random.Random
    stream: TextStream
    steering: Steering | None
    tokens: list[int]
    """Prompt and new tokens."""
    n_prompt: int
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    """Of the full blocks of `tokens`, as far as they were needed."""
    n_published: int = 0
    """Blocks that others may find."""
    line: int = -1
    """Of the block table, while it runs."""
    n_computed: int = 0
    """Tokens whose keys and values are in the cache; the last new token's are not."""
    n_draft_computed: int = 0
    """The same in the draft's cache."""

    @property
    def n_new(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def n_unread(self) -> int:
        """Tokens of the prompt that are still to be read."""
        return max(0, self.n_prompt - self.n_computed)

    @property
    def is_reading(self) -> bool:
        return self.n_computed < self.n_prompt


class Scheduler:
    """First come, first served, with two rules.

    A request begins only when blocks for its longest possible text are there, so none has to be thrown out for want of
    them later. One whose beginning is just being computed for another waits until it can share it.
    """

    def __init__(self, max_rows: int, blocks: Blocks, block_tokens: int, reuse: bool):
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self.blocks, self.block_tokens, self.reuse = blocks, block_tokens, reuse
        self._lines = list(range(max_rows - 1, -1, -1))

    def n_blocks_for(self, row: Row) -> int:
        """Blocks of its longest possible text; the last token is not fed back, so it needs no place."""
        return -(-(row.n_prompt + row.limit - 1) // self.block_tokens)

    def admit(self) -> list[Row]:
        """The rows that begin now, oldest first, with their blocks and lines."""
        admitted: list[Row] = []
        promised = {d for row in self.running if row.is_reading for d in row.digests[row.n_published :]}
        for row in list(self.waiting):
            if not self._lines:
                break
            shared = self._shared(row)
            if len(shared) < len(row.digests) and row.digests[len(shared)] in promised:
                continue
            n_more = self.n_blocks_for(row) - len(shared)
            if n_more > self.blocks.n_available_beside(shared):
                break
            self.blocks.hold(shared)
            row.blocks = shared + self.blocks.take(n_more)
            row.n_computed = row.n_draft_computed = len(shared) * self.block_tokens
            row.n_published = len(shared)
            row.line = self._lines.pop()
            promised.update(row.digests[row.n_published :])
            self.waiting.remove(row)
            self.running.append(row)
            admitted.append(row)
        return admitted

    def _shared(self, row: Row) -> list[int]:
        """The blocks of its prompt's beginning that are there; the last token is always computed, for its logits."""
        if not self.reuse:
            return []
        if not row.digests:
            row.digests = beginnings(row.tokens[:-1], self.block_tokens)
        return self.blocks.find(row.digests)

    def to_read(self, budget: int, is_first: bool) -> list[tuple[Row, int]]:
        """The rows whose prompts are read in the next pass, with how many tokens of each: at most `budget` in all.

        Those that have least to read come first, so that a short prompt never waits for a long one; but the oldest, where
        it takes more than a step, gets half of every step and so comes to its end however many short ones arrive.
        Rows that have more than twice as much to read as the first wait for another pass: the first would be padded.

        Args:
            budget: tokens that are left of this step's.
            is_first: whether this is the step's first pass.
        """
        reading = [row for row in self.running if row.is_reading]
        if is_first and len(reading) > 1 and reading[0].n_unread > budget > 1:
            return [(reading[0], budget // 2)]
        chosen: list[tuple[Row, int]] = []
        for row in sorted(reading, key=lambda row: row.n_unread):
            n = min(row.n_unread, budget)
            least = chosen[0][1] if chosen else n
            if n and least <= 2 * n and n <= 2 * least:
                chosen.append((row, n))
                budget -= n
        return chosen

    def publish(self, row: Row, n_tokens: int) -> None:
        """Lets others find the row's blocks that are full, now that so many of its tokens are computed."""
        n_full = n_tokens // self.block_tokens
        if not self.reuse or n_full <= row.n_published:
            return
        if n_full > len(row.digests):
            row.digests = beginnings(row.tokens[: n_full * self.block_tokens], self.block_tokens, row.digests)
        for i in range(row.n_published, n_full):
            self.blocks.publish(row.blocks[i], row.digests[i])
        row.n_published = n_full

    def end(self, row: Row, withdraw: bool = False) -> None:
        """Takes a row out, running or waiting. `withdraw`: what it computed must serve no other."""
        if row.line < 0:
            self.waiting.remove(row)
            return
        self.running.remove(row)
        if withdraw:
            self.blocks.withdraw(row.blocks)
        self.blocks.release(row.blocks)
        self._lines.append(row.line)
        row.line = -1
