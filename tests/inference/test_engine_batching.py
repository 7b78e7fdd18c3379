"""The engine: what each request gets is what `generate` writes for it alone, whoever comes and goes beside it."""

from __future__ import annotations

import random

import pytest
import torch
from playing import check_empty, check_equal, drain, ids_of, text_of
from tiny import TOKENIZER, V, build, prompts_of, run

from llmkit.config import UserError
from llmkit.inference.config import SamplingConfig
from llmkit.inference.engine.config import EngineConfig
from llmkit.inference.engine.engine import Engine
from llmkit.inference.engine.request import Request, requests_of
from llmkit.inference.sampling import log_probs

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=12)
SMALL = EngineConfig(max_rows=4, cache_tokens=256, block_tokens=4, prefill_tokens=24)
KINDS = [
    GREEDY,
    SamplingConfig(temperature=0.9, max_new_tokens=20),
    SamplingConfig(temperature=0.7, top_k=30, top_p=0.9, max_new_tokens=9),
    SamplingConfig(temperature=1.1, min_p=0.05, repetition_penalty=1.3, frequency_penalty=0.5, max_new_tokens=15),
    SamplingConfig(temperature=0.0, presence_penalty=1.0, min_new_tokens=3, logit_bias={"40": 2.0}, max_new_tokens=7),
]


@pytest.fixture(scope="module")
def model():
    return build()


def alone(model, request):
    return run(model, [list(request.ids)], request.sampling, seeds=[request.seed])[0]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"sliding_window": 7},
        {"sliding_window": 9, "n_full_layers": 1, "qkv_bias": True},
        {
            "positions": "learned",
            "norm": "layernorm",
            "mlp": "gelu_tanh",
            "n_kv_heads": 4,
            "qkv_bias": True,
            "o_bias": True,
            "mlp_bias": True,
        },
        {"qk_norm": True, "tie_embeddings": False, "experts": {"n": 4, "n_active": 2, "d_ff": 24}},
    ],
)
@pytest.mark.parametrize("cache_tokens", [112, 1024])  # too little and enough to hold rows in one piece as well
def test_requests_of_all_kinds_equal_themselves_alone(shape, cache_tokens):
    """B54, B56: ragged, joining at any step, read in pieces, waiting for rows and blocks."""
    model = build(**shape)
    rng = random.Random(3)
    lengths = [1, 30, 7, 44, 60, 5, 62, 25, 16, 17, 2, 40]
    requests = [Request(p, KINDS[i % len(KINDS)], 100 + i) for i, p in enumerate(prompts_of(*lengths))]
    arrivals: dict[int, list[Request]] = {}
    for request in requests:
        arrivals.setdefault(rng.randrange(12), []).append(request)
    engine = Engine(model, TOKENIZER, SMALL.model_copy(update={"cache_tokens": cache_tokens}))
    found = drain(engine, arrivals)
    order = [request for step in sorted(arrivals) for request in arrivals[step]]
    assert len(found) == len(order)
    for i, request in enumerate(order):
        check_equal(found[i], alone(model, request))
    check_empty(engine)
    assert engine.counters.new_tokens == sum(len(ids_of(events)) for events in found.values())


def test_every_running_request_gets_one_token_a_step_and_a_new_one_its_first_at_once(model):
    engine = Engine(model, TOKENIZER, EngineConfig(max_rows=8, prefill_tokens=64))
    long = SamplingConfig(temperature=0.0, max_new_tokens=40, logit_bias={str(TOKENIZER.eos_id): -100})
    first = [engine.submit(Request(p, long, 0)) for p in prompts_of(4, 9, 20)]
    for step in range(6):
        events = engine.step()
        assert sorted(e.request_id for e in events) == first, step
    late = engine.submit(Request(prompts_of(23, seed=5)[0], long, 0))
    assert sorted(e.request_id for e in engine.step()) == [*first, late]


def test_a_long_prompt_is_read_in_pieces_while_others_write(model):
    engine = Engine(model, TOKENIZER, EngineConfig(max_rows=4, block_tokens=4, prefill_tokens=10))
    writer = engine.submit(Request([65, 66], SamplingConfig(max_new_tokens=50, min_new_tokens=50), 1))
    engine.step()
    prompt = prompts_of(45)[0]
    reader = engine.submit(Request(prompt, GREEDY, 0))
    steps = []
    while reader not in steps[-1:]:
        steps += [e.request_id for e in engine.step()]
    assert steps == [writer] * 5 + [reader]  # 45 tokens by tens
    engine.cancel(writer)
    rest = drain(engine)[reader]
    assert ids_of(rest) == run(model, [prompt], GREEDY)[0].ids[1:]


def test_a_late_short_prompt_is_not_held_up_by_long_ones(model):
    engine = Engine(model, TOKENIZER, EngineConfig(max_rows=8, block_tokens=4, prefill_tokens=8))
    for i, prompt in enumerate(prompts_of(60, 61, 62)):
        engine.submit(Request(prompt, GREEDY, i))
    engine.step()
    late = engine.submit(Request(prompts_of(4, seed=7)[0], GREEDY, 0))
    assert [e.request_id for e in engine.step()] == [late]
    found = drain(engine)
    assert all(i in found for i in range(3))


def test_prompts_that_begin_alike_share_blocks_and_change_nothing(model):
    rng = random.Random(0)
    system = [rng.randrange(5, V) for _ in range(33)]
    requests = [Request([*system, *p], KINDS[i % 4], i) for i, p in enumerate(prompts_of(5, 9, 3, 12, 1, 20))]
    engine = Engine(model, TOKENIZER, EngineConfig(max_rows=8, block_tokens=4))
    found = drain(engine, {0: requests})
    for i, request in enumerate(requests):
        check_equal(found[i], alone(model, request))
    counters = engine.counters
    assert counters.prefix_tokens == 5 * 32  # all but the first, which computed it for them
    assert counters.prompt_tokens == sum(len(r.ids) for r in requests) and 0.5 < counters.prefix_hit_frac < 0.9
    # The next turn of a talk finds the answer of the last one, too.
    turn = Request([*requests[0].ids, *ids_of(found[0])], GREEDY, 0)
    check_equal(drain(engine, {0: [turn]})[6], alone(model, turn))
    assert engine.counters.prefix_tokens - counters.prefix_tokens == (len(turn.ids) - 1) // 4 * 4
    check_empty(engine)
    engine.forget_prefixes()
    assert engine.counters.blocks_kept == 0
    off = Engine(model, TOKENIZER, EngineConfig(block_tokens=4, reuse_prefixes=False))
    drain(off, {0: requests})
    assert off.counters.prefix_tokens == 0 and off.counters.blocks_kept == 0


def test_the_same_prompt_again_computes_its_last_token_only(model):
    engine = Engine(model, TOKENIZER, EngineConfig(block_tokens=4))
    prompt = prompts_of(17)[0]
    once, again = (drain(engine, {0: [Request(prompt, GREEDY, 0)]}) for _ in range(2))
    assert ids_of(once[0]) == ids_of(again[1]) and engine.counters.prefix_tokens == 16


def test_n_samples_are_those_of_generate(model):
    """B57: they differ from their first token on."""
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=8, n=6)
    prompt = prompts_of(21)[0]
    engine = Engine(model, TOKENIZER, EngineConfig(block_tokens=4))
    found = drain(engine, {0: requests_of(prompt, sampling, 11)})
    for events, expected in zip(found.values(), run(model, [prompt], sampling, seeds=[11]), strict=True):
        check_equal(events, expected)
    assert len({ids_of(e)[0] for e in found.values()}) > 2
    assert engine.counters.prefix_tokens == 5 * 20  # the prompt is read once


def test_stop_strings_end_over_token_boundaries_and_never_leak(model):
    """B68, B69."""
    free = SamplingConfig(temperature=1.0, max_new_tokens=40)
    for seed in range(12):
        request = Request([70, 71, 72], free, seed)
        text = alone(model, request).text
        if len(text) < 8:
            continue
        stop = (text[3:6], text[5:7])
        stopped = Request([70, 71, 72], free.model_copy(update={"stop": stop}), seed)
        events = drain(Engine(model, TOKENIZER, SMALL), {0: [stopped]})[0]
        check_equal(events, alone(model, stopped))
        assert not any(s in text_of(events) for s in stop) and events[-1].finish_reason == "stop"


def test_cancelled_requests_leave_nothing_and_the_others_do_not_notice(model):
    """B118: a client that goes away frees its blocks at once, waiting, reading or writing."""
    rng = random.Random(1)
    engine = Engine(model, TOKENIZER, SMALL)
    requests = [Request(p, KINDS[i % 5], i) for i, p in enumerate(prompts_of(*[rng.randint(1, 60) for _ in range(40)]))]
    ids = [engine.submit(r) for r in requests]
    gone: set[int] = set()
    found: dict[int, list] = {}
    while engine.busy:
        for event in engine.step():
            assert event.request_id not in gone
            found.setdefault(event.request_id, []).append(event)
        victim = rng.choice(ids)
        if len(gone) < 15:
            running = not found.get(victim) or found[victim][-1].finish_reason is None
            assert engine.cancel(victim) == (running and victim not in gone)
            gone |= {victim} if running else set()
    assert len(gone) == 15
    for i in set(ids) - gone:
        check_equal(found[i], alone(model, requests[i]))
    check_empty(engine)
    assert not engine.cancel(10**6)


@pytest.mark.parametrize("trial", range(6))
def test_random_lives_of_engines(model, trial):
    """Any limits, any arrivals, beginnings that are shared or not, cancels in between: nothing shows in the texts."""
    rng = random.Random(trial)
    config = EngineConfig(
        max_rows=rng.randint(1, 9),
        cache_tokens=rng.choice([80, 300, 2000]),
        block_tokens=rng.choice([1, 3, 16]),
        prefill_tokens=rng.choice([1, 7, 500]),
    )
    engine = Engine(model, TOKENIZER, config)
    begin = prompts_of(40)[0]
    requests: dict[int, Request] = {}
    found: dict[int, list] = {}
    gone: set[int] = set()
    while len(requests) < 16 or engine.busy:
        while len(requests) < 16 and rng.random() < 0.5:
            prompt = [*begin[: rng.randrange(40)], *prompts_of(rng.randint(1, 20), seed=rng.random())[0]]
            sampling = SamplingConfig(
                temperature=rng.choice([0.0, 0.8, 1.3]),
                top_k=rng.choice([0, 20]),
                frequency_penalty=rng.choice([0.0, 0.4]),
                stop=rng.choice([(), ("a",), ("e", "qu")]),
                max_new_tokens=rng.randint(1, 30),
            )
            request = Request(prompt, sampling, rng.getrandbits(40))
            requests[engine.submit(request)] = request
        for event in engine.step():
            assert event.request_id not in gone
            found.setdefault(event.request_id, []).append(event)
        if requests and rng.random() < 0.1 and engine.cancel(victim := rng.choice(list(requests))):
            gone.add(victim)
    for i in requests.keys() - gone:
        check_equal(found[i], alone(model, requests[i]))
    check_empty(engine)


def test_top_logprobs_are_the_distribution_best_first(model):
    request = Request(prompts_of(9)[0], SamplingConfig(temperature=0.5, max_new_tokens=4), 3, top_logprobs=5)
    events = drain(Engine(model, TOKENIZER), {0: [request, Request([65], GREEDY, 0)]})
    ids = list(request.ids)
    for event in events[0]:
        logits = model.logits(model(torch.tensor([ids]))[:, -1])
        best = log_probs(logits, 0.5, V)[0].topk(5)
        assert [i for i, _ in event.top_logprobs] == best.indices.tolist()
        assert [x for _, x in event.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
        ids.append(event.token)
    assert all(event.top_logprobs == () for event in events[1])


def test_scores_that_are_not_finite_end_their_own_request_alone():
    model = build(tie_embeddings=False)
    banned = SamplingConfig(temperature=0.0, max_new_tokens=12, logit_bias={"200": -100})
    clean = [Request(p, banned, 0) for p in ([65, 66, 67], [70] * 9)]
    expected = [alone(model, request) for request in clean]
    with torch.no_grad():
        model.model.embed_tokens.weight[200] = float("nan")
    engine = Engine(model, TOKENIZER, SMALL)
    found = drain(engine, {0: [clean[0], Request([65, 66, 67, 68, 200, 69], banned, 0), clean[1]]})
    assert found[1][-1].finish_reason == "error" and "not finite at new token 0 of prompt 1" in found[1][-1].error
    for i, generation in zip((0, 2), expected, strict=True):
        check_equal(found[i], generation)
    check_empty(engine)


def test_what_cannot_be_served_is_refused_and_the_engine_goes_on(model):
    engine = Engine(model, TOKENIZER, EngineConfig(max_rows=2, cache_tokens=32, block_tokens=8))
    wrong = {
        "has no tokens": Request([], GREEDY, 0),
        "max_seq_len 64": Request([65] * 64, GREEDY, 0),
        "the vocabulary": Request([V], GREEDY, 0),
        "raise cache_tokens": Request([65] * 30, GREEDY, 0),
        "requests_of": Request([65], SamplingConfig(n=2), 0),
        "`generate`": Request([65], SamplingConfig(temperature=0.0, beams=2), 0),
        "no single token": Request([65], SamplingConfig(logit_bias={"ab": 1.0}), 0),
        "top_logprobs": Request([65], GREEDY, 0, top_logprobs=-1),
    }
    good = engine.submit(Request([65], GREEDY, 0))
    for words, request in wrong.items():
        with pytest.raises(UserError, match=words):
            engine.submit(request)
    with pytest.raises(UserError, match="causal: false"):
        Engine(build(causal=False), TOKENIZER)
    engine.step()
    with pytest.raises(ValueError, match="let them end"):
        engine.forget_prefixes()
    assert ids_of(drain(engine)[good]) == run(model, [[65]], GREEDY)[0].ids[1:]
    check_empty(engine)


def test_the_models_mode_and_the_global_random_state_are_left_alone(model):
    training = build(dropout=0.5).train()
    state = torch.random.get_rng_state(), random.getstate()
    request = Request(prompts_of(9)[0], GREEDY, 0)
    found = drain(Engine(training, TOKENIZER), {0: [request]})[0]
    assert ids_of(found) == run(model, [list(request.ids)], GREEDY)[0].ids
    assert training.training and training.model.layers[0].training
    assert torch.equal(state[0], torch.random.get_rng_state()) and state[1] == random.getstate()
