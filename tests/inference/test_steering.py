"""Bias, penalties, least lengths and several samples of a prompt: against transformers, and rows apart."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError
from tiny import TOKENIZER, V, build, prompts_of, run

from llmkit.config import UserError
from llmkit.inference.config import SamplingConfig
from llmkit.inference.sampling import draw, filtered, log_probs, row_seeds, sample, sample_seeds
from llmkit.inference.steering import Steering, biases_of
from llmkit.model.gpt import GPT, KVCache

EVERYTHING = {
    "logit_bias": {"65": 2.5, "b": -3.0, " ": -100.0, "<|bos|>": 1.0},
    "repetition_penalty": 1.4,
    "presence_penalty": 0.6,
    "frequency_penalty": -0.3,
    "min_new_tokens": 4,
}
SPACE = TOKENIZER.encode(" ")[0]


@pytest.fixture(scope="module")
def model() -> GPT:
    return build()


def theirs(sampling: SamplingConfig, prompt: list[int], new: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Probabilities by transformers' processors in the order in which its `generate` puts them; OpenAI's by formula."""
    t = pytest.importorskip("transformers.generation.logits_process")

    class OpenAI(t.LogitsProcessor):
        def __call__(self, input_ids, scores):
            taken_off = torch.zeros_like(scores)
            for token, n in Counter(new).items():
                taken_off[:, token] = sampling.presence_penalty + sampling.frequency_penalty * n
            return scores - taken_off

    biases = biases_of(sampling.logit_bias, TOKENIZER)
    steps = t.LogitsProcessorList()
    if finite := {(i,): bias for i, bias in biases.items() if bias > -math.inf}:
        steps.append(t.SequenceBiasLogitsProcessor(finite))
    if banned := [i for i, bias in biases.items() if bias == -math.inf]:
        steps.append(t.SuppressTokensLogitsProcessor(banned))
    steps.append(t.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(OpenAI())
    steps.append(t.MinNewTokensLengthLogitsProcessor(len(prompt), sampling.min_new_tokens, sorted(TOKENIZER.stop_ids)))
    steps.append(t.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(t.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(t.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(t.MinPLogitsWarper(sampling.min_p))
    return steps(torch.tensor([prompt + new]), logits[:, :V].clone()).softmax(-1)


@pytest.mark.parametrize("seed", range(24))
def test_the_distribution_is_transformers(seed: int) -> None:
    """All of it in the stated order, on random logits, after random prompts and beginnings (1e-6)."""
    rng = random.Random(seed)
    options = {name: value for name, value in EVERYTHING.items() if rng.random() < 0.7}
    sampling = SamplingConfig(
        temperature=rng.choice([0.5, 1.0, 1.7]),
        top_k=rng.choice([0, 40]),
        top_p=rng.choice([1.0, 0.8]),
        min_p=rng.choice([0.0, 0.05]),
        **options,
    )
    prompt, new = (
        [rng.randrange(V) for _ in range(12)],
        [rng.choice([65, 66, rng.randrange(V)]) for _ in range(seed % 7)],
    )
    # In fp64, because a sum of 261 probabilities, which top_p looks at, is rounded in another order here than there.
    logits = torch.randn(1, V + 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    steering = Steering.of(sampling, TOKENIZER, [prompt])
    for token in new if steering is not None else []:
        steering.update(torch.tensor([token]))
    steered = logits if steering is None else steering(logits)
    ours = filtered(log_probs(steered, sampling.temperature, V), sampling)
    torch.testing.assert_close(ours / ours.sum(), theirs(sampling, prompt, new, logits), rtol=0, atol=1e-6)
    token = draw(ours, torch.tensor([0.7], dtype=torch.float64))
    ids, logprobs = sample(logits, torch.tensor([0.7], dtype=torch.float64), sampling, V, steered[:, :V])
    assert ids.item() == token.item()
    expected = (logits[:, :V] / sampling.temperature).log_softmax(-1)[0, token]
    assert logprobs.item() == pytest.approx(expected.item(), abs=1e-6), "the model's own, before any of it"


def test_temperature_0_is_greedy_on_the_penalised_logits(model: GPT) -> None:
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=16, **{**EVERYTHING, "frequency_penalty": 1.0})
    (prompt,) = prompts_of(9)
    (row,) = run(model, [prompt], sampling)
    steering = Steering(sampling, TOKENIZER, [prompt])
    for i, token in enumerate(row.ids):
        logits = model.logits(model(torch.tensor([prompt + row.ids[:i]])))[:, -1]
        assert steering(logits).argmax().item() == token
        assert row.logprobs[i] == pytest.approx(logits[0, :V].log_softmax(-1)[token].item(), abs=1e-4)
        steering.update(torch.tensor([token]))
    plain = run(model, [prompt], SamplingConfig(temperature=0.0, max_new_tokens=16))[0]
    assert row.ids != plain.ids and len(set(row.ids)) > len(set(plain.ids)) and SPACE not in row.ids


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    options=st.fixed_dictionaries(
        {},
        optional={
            "repetition_penalty": st.sampled_from([0.7, 1.5]),
            "presence_penalty": st.sampled_from([-1.0, 1.5]),
            "frequency_penalty": st.sampled_from([-0.5, 0.7]),
            "min_new_tokens": st.integers(1, 9),
            "logit_bias": st.sampled_from([{"65": -100.0, "<|eos|>": 4.0}, {"a": 3.0}]),
            "n": st.integers(2, 3),
            "top_k": st.just(30),
        },
    ),
)
def test_a_row_alone_equals_the_row_in_a_batch(lengths: list[int], options: dict) -> None:
    model = MODEL
    sampling = SamplingConfig(max_new_tokens=10, **options)
    prompts, seeds, n = prompts_of(*lengths), row_seeds(1, len(lengths)), sampling.n
    together = run(model, prompts, sampling, seeds=seeds)
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = run(model, [prompt], sampling, seeds=[seed])
        assert [g.ids for g in alone] == [g.ids for g in together[i * n : i * n + n]]


MODEL = build()


def test_it_costs_nothing_when_off(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    off = SamplingConfig(temperature=0.7, top_k=5, stop=("x",), max_new_tokens=3)
    assert Steering.of(off, TOKENIZER, [[5]]) is None
    monkeypatch.setattr(Steering, "__init__", lambda *_: pytest.fail("built without need"))
    run(model, prompts_of(4), off)


def test_stop_tokens_wait_for_min_new_tokens(model: GPT) -> None:
    eager = {str(i): 50.0 for i in TOKENIZER.stop_ids}
    prompts = prompts_of(3, 8)
    for least in (0, 1, 5):
        rows = run(model, prompts, SamplingConfig(logit_bias=eager, min_new_tokens=least, max_new_tokens=9))
        assert [len(g.ids) for g in rows] == [least + 1] * 2
        assert all(g.ids[-1] in TOKENIZER.stop_ids and not TOKENIZER.stop_ids & set(g.ids[:-1]) for g in rows)
    text = run(model, prompts[:1], SamplingConfig(temperature=0.0, max_new_tokens=9))[0].text
    stopped = run(
        model,
        prompts[:1],
        SamplingConfig(temperature=0.0, max_new_tokens=9, min_new_tokens=9, stop=(text[:2],)),
    )[0]
    assert stopped.text == "" and stopped.finish_reason == "stop", "a stop string ends a text anywhere"


def test_what_a_logit_bias_may_name() -> None:
    found = biases_of({"a": 1.0, "7": -2.0, '"7"': 3.0, "<|eos|>": -100.0, '"\\n"': 4.0}, TOKENIZER)
    a, seven, newline = (TOKENIZER.encode(x)[0] for x in ("a", "7", "\n"))
    assert found == {a: 1.0, 7: -2.0, seven: 3.0, TOKENIZER.eos_id: -math.inf, newline: 4.0}
    for name, message in {
        "ab": "'ab' is no single token but 'a' + 'b'",
        str(V): f"there is no token {V}: ids end at {V - 1}",
        '"a': "no single token",
        '"\\x"': "not a text in double quotes",
        "": "is no single token but nothing",
    }.items():
        with pytest.raises(UserError, match="logit_bias") as e:
            biases_of({name: 1.0}, TOKENIZER)
        assert message in str(e.value)
    with pytest.raises(UserError, match="which another entry names too"):
        biases_of({"a": 1.0, str(a): 2.0}, TOKENIZER)
    nothing = {str(i): -100.0 for i in range(V) if i not in TOKENIZER.stop_ids}
    with pytest.raises(UserError, match="bans every token"):
        Steering(SamplingConfig(logit_bias=nothing, min_new_tokens=1), TOKENIZER, [[5]])
    Steering(SamplingConfig(logit_bias=nothing), TOKENIZER, [[5]])  # it may only stop


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 0.0},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"logit_bias": {"a": 101.0}},
        {"logit_bias": {"a": float("nan")}},
        {"min_new_tokens": -1},
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"n": 0},
        {"n": 2, "temperature": 0.0},
    ],
)
def test_settings_that_are_refused(options: dict) -> None:
    with pytest.raises(ValidationError):
        SamplingConfig(**options)


# --- several samples of a prompt ------------------------------------------------------------------------------------


def test_samples_are_those_of_separate_prompts_and_differ(model: GPT) -> None:
    """B57: the prompt is read once; sample k is what the same prompt gives alone with the seed of (row, k)."""
    prompts, seeds = prompts_of(5, 30, 17), row_seeds(4, 3)
    sampling = SamplingConfig(max_new_tokens=8, n=6, repetition_penalty=1.1)
    rows = run(model, prompts, sampling, seeds=seeds)
    one = sampling.model_copy(update={"n": 1})
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        for k, own in enumerate(sample_seeds(seed, 6)):
            assert rows[6 * i + k].ids == run(model, [prompt], one, seeds=[own])[0].ids
        assert len({g.ids[0] for g in rows[6 * i : 6 * i + 6]}) > 2
        assert rows[6 * i].ids == run(model, [prompt], one, seeds=[seed])[0].ids, "the first is that of n = 1"
    many = [s for seed in row_seeds(0, 100) for s in sample_seeds(seed, 20)]
    assert len(set(many)) == 2000
    seen: dict[int, list[int]] = {}
    again = run(model, prompts, sampling, seeds=seeds, on_token=lambda i, token: seen.setdefault(i, []).append(token))
    assert [seen[i] for i in range(18)] == [g.ids for g in rows] and list(map(dataclasses.astuple, again)) == list(
        map(dataclasses.astuple, rows)
    )


def test_the_prompt_is_computed_once(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, *rest: (shapes.append(tuple(ids.shape)), forward(ids, *rest))[1])
    run(
        model,
        prompts_of(30, 20),
        SamplingConfig(max_new_tokens=3, n=4, logit_bias={"<|eos|>": -100.0, "<|im_end|>": -100.0}),
    )
    assert shapes == [(2, 30), (8, 1), (8, 1)]
    polls = iter([False, True])
    rows = run(model, prompts_of(5), SamplingConfig(n=3), should_stop=lambda: next(polls))
    assert [(len(g.ids), g.finish_reason) for g in rows] == [(1, "interrupted")] * 3


def test_a_cache_row_may_be_copied() -> None:
    """What `n` and beams rely on."""
    cache = KVCache(MODEL.config, 2, 4, torch.float32)
    cache.reserve(4)
    cache.k_LBKSE[:] = torch.arange(2).view(1, 2, 1, 1, 1)
    cache.length = 3
    cache.select(torch.tensor([1, 0, 1, 1]))
    assert cache.k_LBKSE[0, :, 0, 0, 0].tolist() == [1, 0, 1, 1] and cache.v_LBKSE.shape == cache.k_LBKSE.shape
