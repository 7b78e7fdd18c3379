"""Drafts: greedy texts stay what they are, drawn ones follow the same distribution, and good drafts are taken."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings, strategies as st
from playing import check_empty, check_equal, drain, ids_of
from tiny import TOKENIZER, build, prompts_of, run

from llmkit.config import UserError
from llmkit.inference.config import SamplingConfig
from llmkit.inference.engine.choosing import accepted
from llmkit.inference.engine.config import EngineConfig
from llmkit.inference.engine.engine import Engine
from llmkit.inference.engine.request import Request

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=20)


@pytest.fixture(scope="module")
def model():
    return build()


def near(model, noise: float, **shape):
    """The same model with some noise: a draft that is often right."""
    draft = build(**shape)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p, q in zip(draft.parameters(), model.parameters(), strict=True):
            p.copy_(q + noise * torch.empty_like(q).normal_(generator=generator))
    return draft


@pytest.mark.parametrize("draft_tokens", [1, 3, 7])
@pytest.mark.parametrize("kind", ["same", "near", "other", "windowed"])
def test_greedy_with_a_draft_is_plain_greedy(model, kind, draft_tokens):
    drafts = {
        "same": lambda: model,
        "near": lambda: near(model, 0.02),
        "other": lambda: build(seed=5, n_layers=1, d_model=16, n_heads=2),
        "windowed": lambda: build(seed=0, sliding_window=8),
    }
    config = EngineConfig(max_rows=3, cache_tokens=256, block_tokens=4, prefill_tokens=20, draft_tokens=draft_tokens)
    engine = Engine(model, TOKENIZER, config, draft=drafts[kind]())
    steered = SamplingConfig(temperature=0.0, repetition_penalty=1.2, min_new_tokens=4, max_new_tokens=15)
    begin = prompts_of(13)[0]
    prompts = [*prompts_of(1, 30, 7, 60, 63), [*begin, 65], [*begin, 66, 67]]
    requests = [Request(p, steered if i % 3 == 1 else GREEDY, i) for i, p in enumerate(prompts)]
    found = drain(engine, {0: requests[:3], 2: requests[3:]})
    for i, request in enumerate(requests):
        check_equal(found[i], run(model, [list(request.ids)], request.sampling, seeds=[request.seed])[0])
    check_empty(engine)
    counters = engine.counters
    assert counters.drafted_tokens > 0 and counters.accepted_tokens <= counters.drafted_tokens
    if kind == "same":
        assert counters.acceptance_frac > 0.7  # short of 1: penalties, and what is drafted past a stop
    if kind == "near":
        assert counters.accepted_tokens > 20


def test_a_perfect_draft_saves_steps(model):
    request = Request(prompts_of(9)[0], SamplingConfig(temperature=0.0, max_new_tokens=41, min_new_tokens=41), 0)
    plain = Engine(model, TOKENIZER)
    drafted = Engine(model, TOKENIZER, draft=model)
    a, b = (drain(engine, {0: [request]})[0] for engine in (plain, drafted))
    assert ids_of(a) == ids_of(b) and len(a) == 41
    if drafted.counters.acceptance_frac == 1.0:
        assert drafted.counters.steps == 1 + 8  # the first token, then four of the draft's and one of the model's own
    assert drafted.counters.steps < plain.counters.steps == 41


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(2, 6), holes=st.booleans())
def test_what_is_accepted_follows_the_model_exactly(seed, n, holes):
    """Against the whole probability: the sum over what the draft may have drawn, on a fine grid of uniforms."""
    rng = random.Random(seed)
    p, q = ([rng.random() for _ in range(n)] for _ in range(2))
    if holes:
        p[rng.randrange(n)] = q[rng.randrange(n)] = 0.0
    p, q = ([x / sum(values) for x in values] for values in (p, q))
    points = (torch.arange(40, dtype=torch.float64) + 0.5) / 40
    grid = torch.cartesian_prod(points, points)
    result = [0.0] * n
    for token, weight in enumerate(q):
        if weight == 0.0:
            continue
        G = len(grid)
        ids = accepted(torch.tensor(p).expand(G, n), torch.tensor(q).expand(G, n), torch.full((G,), token), grid)
        for i, count in Counter(ids.tolist()).items():
            result[i] += weight * count / G
    assert result == pytest.approx(p, abs=0.04)
    assert all(got == 0.0 for got, wanted in zip(result, p, strict=True) if wanted == 0.0)


def test_drawn_texts_follow_the_models_distribution(model):
    """2,000 draws of two tokens with a draft that often differs, against the exact probabilities of the pairs."""
    sampling = SamplingConfig(temperature=0.7, top_k=6, max_new_tokens=3)
    prompt = prompts_of(6)[0]
    config = EngineConfig(max_rows=250, cache_tokens=8192, prefill_tokens=4096, draft_tokens=2)
    engine = Engine(model, TOKENIZER, config, draft=near(model, 0.05))
    found = drain(engine, {0: [Request(prompt, sampling, seed) for seed in range(2000)]})
    assert 0.1 < engine.counters.acceptance_frac < 0.95
    check_empty(engine)
    pairs = Counter(tuple(ids_of(events)[:3]) for events in found.values())
    plain = run(model, [prompt] * 2000, sampling, seeds=list(range(5000, 7000)))
    expected = Counter(tuple(g.ids[:3]) for g in plain)
    common = [t for t, c in (pairs + expected).most_common(30) if c > 20]
    assert len(common) > 5
    chi2 = sum((pairs[t] - expected[t]) ** 2 / (pairs[t] + expected[t]) for t in common)
    assert chi2 < len(common) + 4 * (2 * len(common)) ** 0.5
    for events in list(found.values())[:5]:  # what is said of a token is of the model, not of the draft
        ids = torch.tensor([[*prompt, *ids_of(events)]])
        logits = model.logits(model(ids))[0, len(prompt) - 1 : -1, : TOKENIZER.vocab_size] / 0.7
        wanted = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids_of(events))[:, None])[:, 0]
        assert [e.logprob for e in events] == pytest.approx(wanted.tolist(), abs=1e-4)
        assert all(e.drawn_logprob >= e.logprob - 1e-4 for e in events)


def test_a_broken_draft_only_costs_time(model):
    broken = build()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    requests = [Request(p, s, 3) for p in prompts_of(5, 20) for s in (GREEDY, SamplingConfig(max_new_tokens=9))]
    found = drain(Engine(model, TOKENIZER, draft=broken), {0: requests})
    assert all(events[-1].finish_reason in ("stop", "length") for events in found.values())
    check_equal(found[0], run(model, [list(requests[0].ids)], GREEDY)[0])


def test_a_drafts_dropout_is_off_and_its_mode_is_left_alone(model):
    requests = [Request(p, GREEDY, 0) for p in prompts_of(5, 20)]
    counters = []
    for draft in (near(model, 0.02), near(model, 0.02, dropout=0.5).train()):
        engine = Engine(model, TOKENIZER, draft=draft)
        drain(engine, {0: requests})
        counters.append(engine.counters)
        assert draft.training == draft.model.layers[0].training == (draft.config.dropout > 0)
    assert counters[0] == counters[1]


def test_a_draft_that_does_not_fit_is_refused(model):
    with pytest.raises(UserError, match="the draft's context max_seq_len is 32, the model's 64"):
        Engine(model, TOKENIZER, draft=build(max_seq_len=32))
    with pytest.raises(UserError, match="do not belong together"):
        Engine(model, TOKENIZER, draft=build(vocab_size=64))
