"""Generation: batches equal singles, seeds, filters against a slow reference, stop strings, log-probabilities."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError
from tiny import ROWS, TOKENIZER, V, build, prompts_of, run

from llmkit.config import MachineError, UserError
from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import TextStream, candidates, evaluating
from llmkit.inference.packed import Packed
from llmkit.inference.sampling import draw, filtered, log_probs, row_seeds, sample
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def model() -> GPT:
    return build()


class Scripted(torch.nn.Module):
    """Stands in for a GPT: writes fixed texts, one per row, whatever it reads; batches of one only."""

    def __init__(self, ids: list[int]):
        super().__init__()
        self.config = GPTConfig(n_layers=1, n_heads=1, d_model=2, max_seq_len=4096, vocab_size=ROWS)
        self.head_weight = torch.nn.Parameter(torch.zeros(ROWS, 2))
        self.ids, self.at = ids, 0

    def forward(self, ids_BT, positions_BT, mask, cache):
        cache.length += ids_BT.shape[1]
        self.at += 1
        return torch.zeros(*ids_BT.shape, 2)

    def logits(self, hidden):
        return torch.nn.functional.one_hot(torch.tensor([self.ids[self.at - 1]]), ROWS) * 50.0


# --- ragged batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(temperature=0.8, top_k=40, top_p=0.9, max_new_tokens=20)])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "tie_embeddings": False}])
@pytest.mark.parametrize("packed", [False, True])
def test_a_ragged_batch_equals_its_rows_alone(sampling, options, packed):
    model = build(**options)
    network = Packed(model) if packed else model
    prompts = prompts_of(1, 30, 7, 44, 60)
    seeds = row_seeds(3, len(prompts))
    together = run(model, prompts, sampling, seeds=seeds, network=network)
    assert len({len(g.ids) for g in together}) > 1  # some left early: 60 + 4 fill the context
    for prompt, seed, row in zip(prompts, seeds, together, strict=True):
        alone = run(model, [prompt], sampling, seeds=[seed], network=network)[0]
        assert row.ids == alone.ids and row.text == alone.text and row.finish_reason == alone.finish_reason
        assert row.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    backwards = run(model, prompts[::-1], sampling, seeds=seeds[::-1], network=network)
    assert [g.ids for g in backwards[::-1]] == [g.ids for g in together]


def test_rows_leave_the_batch_as_they_end(model, monkeypatch):
    widths = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, *rest: (widths.append(ids.shape[0]), forward(ids, *rest))[1])
    run(model, prompts_of(60, 62, 5), SamplingConfig(temperature=0.0, max_new_tokens=8))
    assert widths == [3, 3, 2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.7])
def test_logprobs_are_the_trainers_at_the_same_temperature(model, temperature):
    sampling = SamplingConfig(temperature=temperature, top_p=0.8, top_k=30, max_new_tokens=16)
    prompts = prompts_of(3, 17, 9)
    for prompt, row in zip(prompts, run(model, prompts, sampling), strict=True):
        ids = torch.tensor([prompt + row.ids])
        logits = model.logits(model(ids))[0, len(prompt) - 1 : -1, :V]  # the training forward: no cache, no padding
        expected = torch.log_softmax(logits / (temperature or 1.0), -1).gather(1, torch.tensor(row.ids)[:, None])[:, 0]
        assert row.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_bf16_and_autocast_generate(model):
    prompts = prompts_of(4, 9)
    half = build().to(torch.bfloat16)
    assert all(len(g.ids) == 12 or g.finish_reason == "stop" for g in run(half, prompts, GREEDY))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(len(g.ids) == 12 or g.finish_reason == "stop" for g in run(model, prompts, GREEDY))


# --- seeds ----------------------------------------------------------------------------------------------------------


def test_seeds_decide_and_rows_differ_in_their_first_token(model):
    sampling, prompt = SamplingConfig(max_new_tokens=6, seed=7), prompts_of(5)[0]
    a, b = (run(model, [prompt] * 32, sampling) for _ in range(2))
    assert [g.ids for g in a] == [g.ids for g in b]
    assert len({g.ids[0] for g in a}) > 8
    c = run(model, [prompt] * 32, sampling.model_copy(update={"seed": 8}))
    assert [g.ids for g in a] != [g.ids for g in c]
    halves = [
        g for s in (slice(0, 16), slice(16, 32)) for g in run(model, [prompt] * 16, sampling, seeds=row_seeds(7, 32)[s])
    ]
    assert [g.ids for g in halves] == [g.ids for g in a]
    longer = run(model, [prompt] * 32, sampling.model_copy(update={"max_new_tokens": 9}))
    assert all(y.ids[: len(x.ids)] == x.ids for x, y in zip(a, longer, strict=True))
    assert len(set(row_seeds(0, 1000) + row_seeds(1, 1000))) == 2000


def test_no_global_random_state_is_touched(model):
    states = random.getstate(), torch.random.get_rng_state(), np.random.get_state()[1].copy()
    run(model, prompts_of(5, 6), SamplingConfig(max_new_tokens=4))
    assert random.getstate() == states[0]
    assert torch.equal(torch.random.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == states[2]).all()


def test_padding_of_the_vocabulary_is_never_drawn():
    logits = torch.zeros(1, ROWS)
    logits[:, V:] = 50.0
    uniforms = torch.linspace(0, 1 - 1e-9, 100_000, dtype=torch.float64)
    ids, logprobs = sample(logits.expand(len(uniforms), -1)[:, : V + 8], uniforms, SamplingConfig(), V)
    assert ids.min() == 0 and ids.max() == V - 1
    assert logprobs.tolist() == pytest.approx([-math.log(V)] * len(uniforms), abs=1e-5)
    assert sample(logits, uniforms[:1], SamplingConfig(temperature=0.0), V)[0].item() == 0


# --- filters against a slow reference -------------------------------------------------------------------------------


def reference(logits: np.ndarray, u: float, cfg: SamplingConfig) -> tuple[np.ndarray, int | None, bool]:
    """Kept tokens by their definitions; the token drawn; whether a threshold is too near to tell."""
    scaled = (logits.astype(np.float64) - logits.max()) / cfg.temperature
    p = np.exp(scaled) / np.exp(scaled).sum()
    kept = np.ones(len(p), dtype=bool)
    near = False
    if cfg.top_k:
        kept = np.array([(p > x).sum() < cfg.top_k for x in p])
    if cfg.top_p < 1:
        total = p[kept].sum()
        better = np.array([p[kept & (p > x)].sum() / total for x in p])
        near |= bool((np.abs(better - cfg.top_p)[kept] < 1e-6).any()) and cfg.top_p > 0
        kept &= (better < cfg.top_p) | (p == p.max())
    if cfg.min_p > 0:
        near |= bool((np.abs(p - cfg.min_p * p.max()) < 1e-6 * p.max())[p < p.max()].any())
        kept &= p >= cfg.min_p * p.max()
    edges = np.cumsum(np.where(kept, p, 0)) / p[kept].sum()
    near |= bool((np.abs(edges - u) < 1e-6)[:-1].any())
    drawn = next(i for i, edge in enumerate(edges) if edge > u and kept[i]) if not near else None
    return kept, drawn, near


@settings(max_examples=400, deadline=None)
@given(
    logits=st.lists(st.sampled_from([-30.0, -2.0, -1.0, 0.0, 0.5, 1.0, 1.5, 4.0]), min_size=1, max_size=12),
    u=st.floats(0, 1, exclude_max=True),
    temperature=st.sampled_from([0.05, 0.6, 1.0, 3.0]),
    top_k=st.integers(0, 15),
    top_p=st.sampled_from([0.0, 1e-6, 0.3, 0.5, 0.9, 0.999999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-6, 0.1, 0.7, 1.0]),
)
def test_filters_against_the_reference(logits, u, temperature, top_k, top_p, min_p):
    cfg = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    x = torch.tensor([logits])
    kept, drawn, near = reference(x[0].numpy(), u, cfg)
    if near:
        return
    probs = filtered(log_probs(x, temperature, len(logits)), cfg)
    possible = torch.exp(torch.log_softmax(x / temperature, -1)) > 0  # what underflows in fp32 is never drawn anyway
    assert ((probs > 0) == (torch.tensor(kept)[None] & possible)).all()
    ids, logprobs = sample(x, torch.tensor([u], dtype=torch.float64), cfg, len(logits))
    assert ids.item() == drawn
    expected = (x.double() / temperature).log_softmax(-1)[0, drawn].item()
    assert logprobs.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("u", [0.0, 0.3, 1 - 2**-53])
def test_ties_and_edges(u):
    def kept(logits: list[float], **options) -> list[int]:
        return (
            filtered(log_probs(torch.tensor([logits]), 1.0, len(logits)), SamplingConfig(**options))[0]
            .nonzero()[:, 0]
            .tolist()
        )

    assert kept([1.0, 2.0, 2.0, 0.0], top_k=1) == [1, 2]  # tied with the k-th
    assert kept([1.0, 2.0, 2.0, 0.0], top_k=3) == [0, 1, 2]
    assert kept([1.0, 2.0, 2.0, 0.0], top_k=0) == kept([1.0, 2.0, 2.0, 0.0], top_k=99) == [0, 1, 2, 3]
    assert kept([1.0, 2.0, 2.0, 0.0], top_p=0.0) == kept([1.0, 2.0, 2.0, 0.0], min_p=1.0) == [1, 2]
    assert kept([5.0, 5.0, 5.0, 5.0], top_p=0.1) == [0, 1, 2, 3]
    uniforms = torch.tensor([u], dtype=torch.float64)
    greedy = SamplingConfig(temperature=0.0, top_k=3, top_p=0.5, min_p=0.5)
    assert sample(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), uniforms, greedy, 4)[0].item() == 1  # the lowest id of a tie
    assert sample(torch.tensor([[1e4, -1e4, 0.0]]), uniforms, SamplingConfig(temperature=1e-4), 3)[0].item() == 0
    for probs, possible in (([0.0, 0.1, 0.0, 0.2, 0.0], {1, 3}), ([3.0, 0.0], {0}), ([0.0, 1e-30], {1})):
        assert draw(torch.tensor([probs]), uniforms).item() in possible


@pytest.mark.parametrize("width", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
def test_top_p_of_a_large_vocabulary_is_a_full_sorts(width, top_p):
    """Flat rows need more than the tokens that are sorted first, peaked ones far fewer; a batch may hold both."""
    logits = torch.randn(4, 2000, generator=torch.Generator().manual_seed(1)) * width
    logits[1] *= 5
    logprobs = logits.log_softmax(-1)
    kept = filtered(logprobs, SamplingConfig(top_p=top_p)) > 0
    ranked, order = logprobs.double().exp().sort(descending=True)
    wanted = torch.zeros_like(kept).scatter(1, order, ranked.cumsum(-1) - ranked < top_p * ranked.sum(-1, keepdim=True))
    assert (kept != wanted).sum(-1).max() <= 1  # the token on the edge: sums are rounded in another order


def test_a_draw_inverts_the_cumulative_distribution_across_its_pieces():
    probs = torch.rand(1, 1000, generator=torch.Generator().manual_seed(0))
    probs[:, 100:400] = 0.0  # a piece and more that nothing may be drawn from
    uniforms = torch.linspace(0, 1, 5001, dtype=torch.float64)[:-1]
    drawn = draw(probs.expand(len(uniforms), -1), uniforms)
    cumulated = probs[0].cumsum(0, dtype=torch.float64)
    assert torch.equal(drawn, torch.searchsorted(cumulated, uniforms * cumulated[-1], right=True))
    assert probs[0, drawn].min() > 0 and drawn[0] == 0 and drawn[-1] > 990


def test_draws_follow_the_probabilities():
    probs = torch.tensor([[0.5, 0.2, 0.0, 0.3]])
    rng = random.Random(0)
    uniforms = torch.tensor([rng.random() for _ in range(40_000)], dtype=torch.float64)
    counts = torch.bincount(draw(probs.expand(len(uniforms), -1), uniforms), minlength=4) / len(uniforms)
    assert counts.tolist() == pytest.approx([0.5, 0.2, 0.0, 0.3], abs=0.01)


def test_candidates_are_the_distribution_best_first(model):
    prompt = prompts_of(9)[0]
    best = candidates(model, prompt, 5, V)
    probs = torch.softmax(model.logits(model(torch.tensor([prompt])))[0, -1, :V], -1)
    assert [p for _, p in best] == sorted((p for _, p in best), reverse=True)
    assert all(p == pytest.approx(probs[i].item(), rel=1e-4) for i, p in best)
    assert best[0][0] == run(model, [prompt], GREEDY)[0].ids[0]
    everything = candidates(model, prompt, 10**6, V)
    assert len(everything) == V and sum(p for _, p in everything) == pytest.approx(1.0, abs=1e-5)


# --- stop tokens, stop strings, streaming ---------------------------------------------------------------------------


def cut(text: str, stop: tuple[str, ...]) -> str:
    """The definition: before the stop string completed first, of those completed together before the longest."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return text[: min(ends)[1]] if ends else text


letters = st.text("abé€😀", max_size=4)


@settings(max_examples=300, deadline=None)
@given(text=st.text("abé€😀", max_size=30), stop=st.lists(letters.filter(bool), max_size=4), end=st.booleans())
def test_streamed_text_is_the_final_text_and_never_leaks(text, stop, end):
    # Bytes as tokens: every stop string and every character beyond ASCII is split over several.
    ids = TOKENIZER.encode(text) + [TOKENIZER.eos_id] * end
    stream, shown = TextStream(TOKENIZER, stop), ""
    expected = cut(text, tuple(stop))
    for token in ids:
        shown += stream.push(token)
        assert expected.startswith(shown)
    shown += stream.finish()
    assert shown == expected and stream.finish() == ""
    assert stream.stopped == (end or expected != text)
    if ids:
        sampling = SamplingConfig(temperature=0.0, max_new_tokens=len(ids), stop=tuple(stop))
        result = run(Scripted(ids), [[5]], sampling)[0]
        assert result.text == expected
        assert result.ids == ids[: len(result.ids)] and len(result.logprobs) == len(result.ids)
        assert result.finish_reason == ("stop" if stream.stopped else "length")


class Pieces:
    """A tokenizer and its decoder in one, whose tokens are whole pieces of text."""

    stop_ids = frozenset[int]()

    def __init__(self, pieces: list[str]):
        self.pieces = pieces

    def stream(self):
        return self

    def push(self, token: int) -> str:
        return self.pieces[token]

    def finish(self) -> str:
        return ""


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.text("ab", max_size=6), max_size=8), stop=st.lists(st.text("ab", min_size=1, max_size=4)))
def test_the_cut_does_not_depend_on_the_tokens(pieces, stop):
    stream = TextStream(Pieces(pieces), stop)
    shown = "".join([*(stream.push(i) for i in range(len(pieces))), stream.finish()])
    assert shown == cut("".join(pieces), tuple(stop))


def test_text_is_given_out_as_soon_as_it_is_certain():
    stream = TextStream(TOKENIZER, ["END"])
    assert [stream.push(i) for i in TOKENIZER.encode("xEéEN.END!")] == [
        "x",
        "",
        "",
        "Eé",
        "",
        "",
        "EN.",
        "",
        "",
        "",
        "",
    ]
    assert stream.stopped and stream.finish() == ""
    stream = TextStream(TOKENIZER, ["END"])
    assert [stream.push(i) for i in TOKENIZER.encode("aEN")] == ["a", "", ""]
    assert stream.finish() == "EN"


def test_half_a_character_at_the_end_is_replaced_not_lost():
    ids = TOKENIZER.encode("a€")[:-1]
    result = run(Scripted(ids), [[5]], SamplingConfig(temperature=0.0, max_new_tokens=len(ids)))[0]
    assert result.text == TOKENIZER.decode(ids) and result.text.startswith("a") and result.finish_reason == "length"


@pytest.mark.parametrize("stop_id", sorted(TOKENIZER.stop_ids))
def test_stop_tokens_end_a_row_and_stay_in_its_ids(stop_id):
    ids = [*TOKENIZER.encode("hi"), stop_id, *TOKENIZER.encode("more")]
    seen: list[tuple[int, int]] = []
    result = run(Scripted(ids), [[5]], GREEDY, on_token=lambda row, token: seen.append((row, token)))[0]
    assert (result.ids, result.text, result.finish_reason) == (ids[:3], "hi", "stop")
    assert seen == [(0, i) for i in ids[:3]]


def test_on_token_reports_every_row_by_its_own_number(model):
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    rows = run(model, prompts_of(60, 5, 61), GREEDY, on_token=lambda row, token: seen[row].append(token))
    assert [g.ids for g in rows] == list(seen.values())


# --- lengths, interruption, mistakes --------------------------------------------------------------------------------


def test_context_ends_a_row(model):
    assert [len(g.ids) for g in run(model, prompts_of(63, 60), GREEDY)] == [1, 4]
    assert run(model, prompts_of(63), GREEDY)[0].finish_reason == "length"
    assert run(model, [], GREEDY) == []


def test_should_stop_interrupts(model):
    polls = iter([False, False, True])
    rows = run(model, prompts_of(62, 5), GREEDY, should_stop=lambda: next(polls))
    assert [(len(g.ids), g.finish_reason) for g in rows] == [(2, "length"), (2, "interrupted")]
    (row,) = run(model, prompts_of(5), GREEDY, should_stop=lambda: True)
    assert (row.ids, row.text, row.finish_reason) == ([], "", "interrupted")


@pytest.mark.parametrize(
    "prompts,match",
    [
        ([[5], []], "prompt 1 has no tokens"),
        ([[5] * 64], "prompt 0 has 64 tokens, the model's context max_seq_len 64: shorten it to at most 63"),
        ([[5], [V]], f"prompt 1 holds ids from {V} to {V}"),
        ([[-1]], "prompt 0 holds ids from -1"),
    ],
)
def test_prompts_that_are_refused(model, prompts, match):
    with pytest.raises(UserError, match=match):
        run(model, prompts, GREEDY)


def test_other_mistakes_are_refused(model):
    with pytest.raises(UserError, match="1 seeds for 2 prompts"):
        run(model, prompts_of(3, 4), GREEDY, seeds=[1])
    with pytest.raises(UserError, match=f"tokenizer has {V} tokens, the model's embedding 64"):
        run(build(vocab_size=64), prompts_of(3), GREEDY)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": 1e-9},
        {"temperature": float("nan")},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"top_k": -1},
        {"stop": ("a", "")},
        {"max_new_tokens": 0},
        {"seed": -1},
    ],
)
def test_settings_that_are_refused(options):
    with pytest.raises(ValidationError):
        SamplingConfig(**options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_not_finite_are_said_aloud(temperature):
    model = build()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(MachineError, match="not finite at new token 0 of prompt 0"):
        run(model, prompts_of(3), SamplingConfig(temperature=temperature, top_p=0.9))


# --- modes ----------------------------------------------------------------------------------------------------------


def test_dropout_is_off_and_every_mode_comes_back(model):
    dropped = build(dropout=0.5).train()
    dropped.model.layers[0].eval()  # a frozen part stays as it was
    modes = [m.training for m in dropped.modules()]
    assert [g.ids for g in run(dropped, prompts_of(5), GREEDY)] == [g.ids for g in run(model, prompts_of(5), GREEDY)]
    assert [m.training for m in dropped.modules()] == modes

    def fail(row: int, token: int) -> None:
        assert not dropped.training
        raise RuntimeError("from the callback")

    with pytest.raises(RuntimeError, match="from the callback"):
        run(dropped, prompts_of(5), GREEDY, on_token=fail)
    candidates(dropped, prompts_of(5)[0], 3, V)
    assert [m.training for m in dropped.modules()] == modes
    with evaluating(dropped):
        assert not any(m.training for m in dropped.modules())


def test_training_goes_on_after_generation():
    model = build().train()
    run(model, prompts_of(5, 6), GREEDY)
    model.logits(model(torch.tensor(prompts_of(8)))).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_compiled_model_is_not_called(model):
    compiled = build()
    compiled.compile(backend=lambda graph, inputs: pytest.fail("generation ran through torch.compile"))
    assert [g.ids for g in run(compiled, prompts_of(5), GREEDY)] == [g.ids for g in run(model, prompts_of(5), GREEDY)]
