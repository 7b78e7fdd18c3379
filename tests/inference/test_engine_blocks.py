"""Blocks and scheduling without a model: nothing is lost or handed out twice, whatever happens."""

from __future__ import annotations

import random

from hypothesis import given, settings, strategies as st
from tiny import TOKENIZER

from llmkit.inference.config import SamplingConfig
from llmkit.inference.engine.blocks import Blocks, beginnings
from llmkit.inference.engine.request import Request
from llmkit.inference.engine.scheduler import Row, Scheduler
from llmkit.inference.stream import TextStream


def row_of(number: int, prompt: list[int], limit: int) -> Row:
    request = Request(prompt, SamplingConfig(max_new_tokens=limit), number)
    stream = TextStream(TOKENIZER)
    return Row(number, request, limit, random.Random(number), stream, None, list(prompt), len(prompt))


def test_digests_name_whole_beginnings():
    a, b = beginnings([1, 2, 3, 4, 5], 2), beginnings([9, 2, 3, 4, 5], 2)
    assert len(a) == 2 and not set(a) & set(b)  # the second blocks are alike, what stands before them is not
    assert beginnings([1, 2, 3, 4, 5, 6, 7], 2)[:2] == a
    assert beginnings([1, 2, 3, 4, 5, 6, 7], 2, a) == beginnings([1, 2, 3, 4, 5, 6, 7], 2)
    assert beginnings([1], 2) == [] and beginnings([258, 1], 1) != beginnings([2, 1], 1)


def test_the_least_recently_used_end_gives_way_first():
    blocks = Blocks(4)
    first, second = blocks.take(2), blocks.take(1)
    for block, digest in zip(first + second, (b"a", b"ab", b"x"), strict=True):
        blocks.publish(block, digest)
    blocks.release(first)
    blocks.release(second)
    assert blocks.n_kept == 3 and blocks.n_held == 0 and blocks.n_available == 4
    blocks.take(2)  # the free one and the end of the text that ended first
    assert blocks.find([b"a", b"ab"]) == first[:1] and blocks.find([b"x"]) == second
    blocks.hold(first[:1])
    assert blocks.n_available_beside(second) == 0 and blocks.n_available == 1
    blocks.withdraw(first[:1])
    blocks.release(first[:1])
    assert blocks.find([b"a"]) == [] and blocks.n_kept == 1


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), block_tokens=st.integers(1, 5), n_blocks=st.integers(6, 20), reuse=st.booleans())
def test_random_lives_of_requests_lose_no_block(seed, block_tokens, n_blocks, reuse):
    """B118: rows come, read, write, end and are cancelled in any order."""
    rng = random.Random(seed)
    blocks = Blocks(n_blocks)
    scheduler = Scheduler(3, blocks, block_tokens, reuse)
    content: dict[int, tuple[int, ...]] = {}  # what would be in each block: all tokens up to its end
    for number in range(60):
        if rng.random() < 0.6:
            row = row_of(number, [rng.randrange(2) for _ in range(rng.randint(1, 12))], rng.randint(1, 8))
            if scheduler.n_blocks_for(row) <= n_blocks:
                scheduler.waiting.append(row)
        for row in scheduler.admit():
            assert row.n_computed < row.n_prompt
            for i in range(row.n_computed // block_tokens):
                assert content[row.blocks[i]] == tuple(row.tokens[: (i + 1) * block_tokens])
        for row, n in scheduler.to_read(rng.randint(1, 9), rng.random() < 0.5):
            row.n_computed += n
        for row in scheduler.running:
            if not row.is_reading and row.n_new < row.limit and rng.random() < 0.8:
                row.tokens.append(rng.randrange(2))
                row.n_computed = len(row.tokens) - 1
            for i in range(row.n_computed // block_tokens):
                content[row.blocks[i]] = tuple(row.tokens[: (i + 1) * block_tokens])
            scheduler.publish(row, row.n_computed)
        for row in [*scheduler.running, *scheduler.waiting]:
            if row.n_new == row.limit or rng.random() < 0.1:
                scheduler.end(row, withdraw=rng.random() < 0.2)
        held = {block for row in scheduler.running for block in row.blocks}
        assert blocks.n_held == len(held) and blocks.n_held + blocks.n_available == n_blocks and 0 not in held
        assert len({row.line for row in scheduler.running}) == len(scheduler.running) <= 3
    for row in [*scheduler.running, *scheduler.waiting]:
        scheduler.end(row)
    assert blocks.n_available == n_blocks and sorted(blocks.take(n_blocks)) == list(range(1, n_blocks + 1))


def test_reading_is_cut_to_the_budget_and_pairs_like_lengths():
    scheduler = Scheduler(8, Blocks(100), 4, reuse=False)
    rows = [row_of(i, [7 + i] * n, 1) for i, n in enumerate((20, 3, 12, 30))]
    scheduler.waiting.extend(rows)
    assert scheduler.admit() == rows
    assert scheduler.to_read(36, True) == [(rows[1], 3)]
    rows[1].n_computed = 3
    assert scheduler.to_read(33, False) == [(rows[2], 12), (rows[0], 20)]
    rows[0].n_computed, rows[2].n_computed = 20, 12
    assert scheduler.to_read(16, False) == [(rows[3], 16)] and scheduler.to_read(0, False) == []


def test_short_prompts_pass_a_long_one_which_still_gets_half():
    scheduler = Scheduler(8, Blocks(200), 4, reuse=False)
    long, short, other = row_of(0, [1] * 300, 1), row_of(1, [2] * 5, 1), row_of(2, [3] * 400, 1)
    scheduler.waiting.append(long)
    scheduler.admit()
    assert scheduler.to_read(20, True) == [(long, 20)]
    scheduler.waiting.extend([other, short])
    scheduler.admit()
    assert scheduler.to_read(20, True) == [(long, 10)]
    assert scheduler.to_read(10, False) == [(short, 5), (long, 5)]


def test_a_large_request_is_not_overtaken_and_a_shared_beginning_is_waited_for():
    scheduler = Scheduler(8, Blocks(10), 2, reuse=True)
    prompt = [1, 2, 3, 4, 5, 6]
    first, same, large, small = (
        row_of(0, prompt, 1),
        row_of(1, [*prompt, 7], 1),
        row_of(2, [9] * 14, 3),
        row_of(3, [8, 8], 1),
    )
    scheduler.waiting.extend([first, same, large, small])
    assert scheduler.admit() == [first]  # the second waits for what the first computes, the third for blocks
    first.n_computed = 6
    scheduler.publish(first, 6)
    assert scheduler.admit() == [same] and same.n_computed == 6 and same.blocks[:3] == first.blocks[:3]
    scheduler.end(first)
    scheduler.end(same)
    assert scheduler.admit() == [large, small]
