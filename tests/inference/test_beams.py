"""Beam search: transformers' ids and scores, brute force on a toy, stop strings, refusals."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from pydantic import ValidationError
from tiny import ROWS, TOKENIZER, V, build, prompts_of, run

from llmkit.config import MachineError, UserError
from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import Generation, generate
from llmkit.inference.steering import biases_of
from llmkit.model.gpt import GPT
from llmkit.model.hf import config_to_hf


def beams(k: int, **options) -> SamplingConfig:
    return SamplingConfig(**{"temperature": 0.0, "max_new_tokens": 8, "beams": k, "n": k, **options})


def eager(seed: int) -> GPT:
    """A random model that often ends a text: the stop tokens' embeddings are drawn towards the others'."""
    model = build(std=0.3, seed=seed, vocab_size=ROWS)
    with torch.no_grad():
        stops = sorted(TOKENIZER.stop_ids)
        weight = model.model.embed_tokens.weight
        weight[stops] = 2.0 * weight[[70 + seed, 90 + seed][: len(stops)]]
        weight[V:] = 0.0
    return model


def theirs(model: GPT, prompts: list[list[int]], sampling: SamplingConfig) -> list[list[tuple[list[int], float]]]:
    """(new ids, score) of every beam, by transformers. Its logits get the vocabulary's padding banned."""
    transformers = pytest.importorskip("transformers")
    ids = {"bos_token_id": TOKENIZER.bos_id, "eos_token_id": TOKENIZER.eos_id, "pad_token_id": TOKENIZER.pad_id}
    config = config_to_hf(model.config, torch.float32, ids, {})
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    other.load_state_dict(model.state_dict(), strict=False)  # the tied head is no tensor of its own
    width = max(map(len, prompts))
    padded = torch.tensor([[TOKENIZER.pad_id] * (width - len(p)) + p for p in prompts])
    steps = transformers.LogitsProcessorList()
    if sampling.logit_bias:
        finite = {(i,): bias for i, bias in biases_of(sampling.logit_bias, TOKENIZER).items()}
        steps.append(transformers.SequenceBiasLogitsProcessor(finite))
    out = other.generate(
        padded,
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens,
        num_beams=sampling.beams,
        num_return_sequences=sampling.n,
        length_penalty=sampling.length_penalty,
        early_stopping=sampling.early_stopping,
        repetition_penalty=sampling.repetition_penalty,
        do_sample=False,
        logits_processor=steps,
        eos_token_id=sorted(TOKENIZER.stop_ids),
        pad_token_id=TOKENIZER.pad_id,
        return_dict_in_generate=True,
        output_scores=True,
        renormalize_logits=False,
    )
    found = []
    for row, score in zip(out.sequences[:, width:].tolist(), out.sequences_scores.tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in TOKENIZER.stop_ids), len(row))
        found.append((row[:end], score))
    return [found[i : i + sampling.n] for i in range(0, len(found), sampling.n)]


def full_vocabulary(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets our search see the padding too, since transformers' log-probabilities are normalised over it."""
    monkeypatch.setattr(type(TOKENIZER), "vocab_size", ROWS, raising=False)
    monkeypatch.setitem(TOKENIZER.__dict__, "vocab_size", ROWS)
    monkeypatch.setitem(TOKENIZER.__dict__, "_bytes", [*TOKENIZER._bytes[:V], *[b""] * (ROWS - V)])


@pytest.mark.parametrize("seed", range(12))
def test_beams_are_transformers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """B54, B56: ragged prompts, early ends, penalties; ids are equal, scores within 1e-5."""
    rng = random.Random(seed)
    model = eager(seed)
    full_vocabulary(model, monkeypatch)
    k = rng.choice([2, 3, 5])
    sampling = beams(
        k,
        n=rng.randint(1, k),
        max_new_tokens=rng.choice([1, 6, 14]) if seed else 14,
        length_penalty=rng.choice([1.0, 0.0, -0.8, 1.7]),
        early_stopping=rng.random() < 0.4,
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        min_new_tokens=rng.choice([0, 0, 1]),
        logit_bias=rng.choice([{}, {"a": 1.5, "<|eos|>": 2.0}]),
    )
    prompts = prompts_of(*(rng.randint(1, 30) for _ in range(3)), seed=seed)
    ours = run(model, prompts, sampling)
    for i, expected in enumerate(theirs(model, prompts, sampling)):
        rows = ours[i * sampling.n : (i + 1) * sampling.n]
        assert [g.ids for g in rows] == [ids for ids, _ in expected]
        assert [g.score for g in rows] == pytest.approx([score for _, score in expected], rel=1e-6, abs=1e-5)


def test_the_seeds_above_reach_what_they_are_for() -> None:
    """Some texts end early, some don't, and a beam differs from greedy decoding."""
    reasons, lengths, differs = set(), set(), False
    for seed in range(4):
        rows = run(eager(seed), prompts_of(5, 20), beams(3, max_new_tokens=14))
        reasons |= {g.finish_reason for g in rows}
        lengths |= {len(g.ids) for g in rows}
        greedy = run(eager(seed), prompts_of(5, 20), SamplingConfig(temperature=0.0, max_new_tokens=14))
        differs |= rows[0].ids != greedy[0].ids
    assert reasons == {"stop", "length"} and len(lengths) > 3 and differs


def brute_force(model: GPT, prompt: list[int], letters: list[int], length: int) -> list[tuple[float, tuple[int, ...]]]:
    """Every text of these letters up to a length, best first by its log-probability under the bias."""
    texts = []
    stops = TOKENIZER.stop_ids
    for n in range(1, length + 1):
        for ids in itertools.product(letters, repeat=n):
            ended = [i for i, token in enumerate(ids) if token in stops]
            if ended not in ([], [n - 1]) or (not ended and n < length):
                continue
            logits = model.logits(model(torch.tensor([prompt + list(ids)])))[0, len(prompt) - 1 : -1, :V].double()
            total = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item()
            texts.append((total, ids))
    return sorted(texts, reverse=True)


@pytest.mark.parametrize("seed", range(3))
def test_enough_beams_find_the_best_texts_of_all(seed: int) -> None:
    """With as many beams as there are beginnings the search is exhaustive: the enumeration of a toy says what is best."""
    model = eager(seed)
    letters = [TOKENIZER.eos_id, 70, 80, 90]
    others = {str(i): -100.0 for i in range(V) if i not in letters}
    (prompt,) = prompts_of(6, seed=seed)
    sampling = beams(27, n=6, max_new_tokens=3, length_penalty=0.0, logit_bias=others)
    rows = run(model, [prompt], sampling)
    expected = brute_force(model, prompt, letters, 3)[:6]
    assert [tuple(g.ids) for g in rows] == [ids for _, ids in expected]
    assert [g.score for g in rows] == pytest.approx([total for total, _ in expected], abs=1e-4)
    assert [sum(g.logprobs) for g in rows] == pytest.approx([total for total, _ in expected], abs=1e-4)
    few = beams(5, n=5, max_new_tokens=1, logit_bias=others)
    with pytest.raises(UserError, match=r"only 4 continuations to give: lower n \(5\)"):
        run(model, [prompt], few)


def test_a_row_alone_equals_the_row_in_a_batch() -> None:
    model = eager(1)
    prompts = prompts_of(1, 30, 12, 55)
    sampling = beams(4, max_new_tokens=12, presence_penalty=0.4, frequency_penalty=0.3, stop=("q",))
    together = run(model, prompts, sampling)
    for i, prompt in enumerate(prompts):
        alone = run(model, [prompt], sampling)
        rows = together[4 * i : 4 * i + 4]
        assert [g.ids for g in alone] == [g.ids for g in rows]
        assert [g.score for g in alone] == pytest.approx([g.score for g in rows], abs=1e-5)
        assert all(len(g.ids) <= 64 - len(prompt) for g in rows), "the context ends a beam"


def test_logprobs_and_scores_are_those_of_the_text() -> None:
    model = eager(2)
    (prompt,) = prompts_of(9)
    for length_penalty in (1.0, 0.5):
        for row in run(model, [prompt], beams(4, length_penalty=length_penalty)):
            logits = model.logits(model(torch.tensor([prompt + row.ids])))[0, len(prompt) - 1 : -1, :V]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(row.ids)[:, None])[:, 0]
            assert row.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
            assert row.score == pytest.approx(expected.sum().item() / len(row.ids) ** length_penalty, abs=1e-4)


def test_a_stop_string_ends_a_beam() -> None:
    """B69: over token boundaries, and cut from the text."""
    model = eager(0)
    (prompt,) = prompts_of(9)
    letters = TOKENIZER.encode("abcdefghijklmnopqrstuvwxyz")
    only = {str(i): -100.0 for i in range(V) if i not in letters}
    plain = run(model, [prompt], beams(3, max_new_tokens=10, logit_bias=only))
    stop = plain[0].text[3:5]
    rows = run(model, [prompt], beams(3, max_new_tokens=10, logit_bias=only, length_penalty=0.0, stop=(stop,)))
    assert all(stop not in g.text for g in rows)
    ended = [g for g in rows if g.finish_reason == "stop"]
    assert ended and all(TOKENIZER.decode(g.ids) == g.text + stop for g in ended)


def test_on_token_tells_whole_beams_and_stopping_gives_what_is_there() -> None:
    model, seen = eager(1), dict[int, list[int]]()
    prompts = prompts_of(4, 9)
    rows = run(model, prompts, beams(3, n=2), on_token=lambda i, token: seen.setdefault(i, []).append(token))
    assert [seen[i] for i in range(4)] == [g.ids for g in rows]
    polls = iter([False, False, True])
    rows = run(model, prompts, beams(3, n=2, min_new_tokens=5), should_stop=lambda: next(polls))
    assert [(len(g.ids), g.finish_reason) for g in rows] == [(2, "interrupted")] * 4
    scores = [g.score for g in rows if g.score is not None]
    assert len(scores) == 4 and scores[0] >= scores[1] and scores[2] >= scores[3]
    at_once = run(model, prompts, beams(2), should_stop=lambda: True)
    assert at_once == [Generation([], [], "", "interrupted")] * 4
    assert generate(model, [], beams(2), tokenizer=TOKENIZER) == []


def test_scores_that_are_not_finite_are_said_aloud() -> None:
    model = build()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(MachineError, match="not finite at new token 0 of prompt 0"):
        run(model, prompts_of(3), beams(2))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"beams": 2}, "temperature must be 0"),
        ({"beams": 2, "temperature": 0.0, "top_k": 5}, "drop top_k"),
        ({"beams": 2, "temperature": 0.0, "top_p": 0.5}, "drop top_k"),
        ({"beams": 2, "temperature": 0.0, "min_p": 0.5}, "drop top_k"),
        ({"beams": 2, "temperature": 0.0, "n": 3}, r"n \(3\) must be at most beams \(2\)"),
        ({"length_penalty": 0.5}, "belong to beam search"),
        ({"early_stopping": True}, "belong to beam search"),
        ({"beams": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SamplingConfig(**options)


def test_a_bidirectional_model_writes_no_text() -> None:
    model = build(causal=False, n_kv_heads=4, tie_embeddings=True)
    with pytest.raises(UserError, match="sees text from both sides"):
        run(model, prompts_of(3), SamplingConfig())
