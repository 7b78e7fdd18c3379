"""How a model is asked: the same log-probabilities as one row at a time, at the boundaries that B70 is about."""

from __future__ import annotations

import random

import pytest
import torch

from llmkit.config import MachineError
from llmkit.evaluation.asking import ModelRespondent, Prompt, continuation_logprobs, encode_pair
from llmkit.inference.sampling import log_probs
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT
from llmkit.tokenizer import Tokenizer, TokenizerConfig

BYTES = Tokenizer.train([], TokenizerConfig(kind="byte"))
MERGED = Tokenizer.train(["Answer: A Answer: B the mill 磨坊 " * 40], TokenizerConfig(vocab_size=320))


def build(tokenizer: Tokenizer = BYTES, max_seq_len: int = 64) -> GPT:
    rows = -(-tokenizer.vocab_size // 64) * 64
    model = GPT(GPTConfig(n_layers=2, n_heads=2, d_model=32, d_ff=48, max_seq_len=max_seq_len, vocab_size=rows))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.3, generator=generator)
    return model


def quiet(n: int) -> None:
    pass


@pytest.mark.parametrize("vocab_size", [BYTES.vocab_size, None])
def test_batches_equal_one_row_at_a_time(vocab_size: int | None) -> None:
    """Shared rows, padding and chunks change nothing; the softmax is over the ids asked for (B91)."""
    model, rng = build(), random.Random(0)
    ids = [[rng.randrange(5, BYTES.vocab_size) for _ in range(n)] for n in (1, 3, 9, 30, 63)]
    pairs = [(context, [rng.randrange(5, 200) for _ in range(k)]) for context in ids for k in (0, 1, 1, 2)]
    pairs = [(c, rest) for c, rest in pairs if len(c) + len(rest) <= 65]
    with torch.no_grad():
        best = int(model.logits(model(torch.tensor([ids[1]])))[0, -1, :vocab_size].argmax())
    pairs.append((ids[1], [best]))
    seen: list[int] = []
    found = continuation_logprobs(model, pairs, vocab_size, batch_tokens=100, on_rows=seen.append)
    assert sum(seen) == len(pairs) and found[-1][1] and not all(greedy for _, greedy in found)
    model.eval()
    for (context, rest), (logprob, greedy) in zip(pairs, found, strict=True):
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([context + rest])[:, :64]))[0].double()
        table = log_probs(logits, 1.0, vocab_size or logits.shape[-1])[len(context) - 1 :][: len(rest)]
        expected = sum(table[i, token].item() for i, token in enumerate(rest))
        assert logprob == pytest.approx(expected, abs=1e-4)
        assert greedy == all(table[i].argmax() == token for i, token in enumerate(rest))


def test_a_model_that_overflows_is_told() -> None:
    model = build()
    with torch.no_grad():
        model.head_weight.fill_(float("nan"))
    with pytest.raises(MachineError, match="not finite"):
        continuation_logprobs(model, [([5], [6])], None)


@pytest.mark.parametrize("tokenizer", [BYTES, MERGED], ids=["bytes", "merged"])
def test_the_boundary_is_lm_evals(tokenizer: Tokenizer) -> None:
    """B70: blanks go to what follows, and the two together are the ids of the whole text."""
    lm_eval = pytest.importorskip("lm_eval.api.model")

    class Boundary(lm_eval.TemplateLM):  # type: ignore[name-defined,misc]
        eot_token_id = 0
        loglikelihood_rolling = generate_until = _loglikelihood_tokens = None

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tokenizer.encode(string)

    for context, rest in [
        ("Answer:", " A"),
        ("Answer: ", "A"),
        ("Answer:\n\n", "B"),
        ("磨坊", " 磨坊"),
        ("答案：", " A"),
    ]:
        head, tail = encode_pair(tokenizer, context, rest)
        assert (head, tail) == Boundary()._encode_pair(context, rest)
        assert tokenizer.decode([*head, *tail]) == context + rest


def test_a_token_over_the_boundary_loses_nothing() -> None:
    """The word is one token, so the ids of the whole begin with no ids of its first half."""
    assert len(MERGED.encode("the mill")) <= len(MERGED.encode("the m"))
    head, tail = encode_pair(MERGED, "the m", "ill")
    assert head == MERGED.encode("the m") and MERGED.decode(tail) == "ill"


@pytest.mark.parametrize("chat", [False, True])
def test_examples_are_left_out_until_the_prompt_fits(chat: bool) -> None:
    examples = tuple((f"q{i}", f"a{i}") for i in range(9))
    room = 240 if chat else 64
    who = ModelRespondent(build(max_seq_len=room), BYTES, chat)
    short, long = Prompt("q?", examples), Prompt("q" * 300, examples)
    weighed = who.weigh([(short, ("a", "b" * 20)), (long, ("a", "b"))], quiet)
    assert 0 < weighed[0].n_shown < 9 and not weighed[0].cut and weighed[1].n_shown == 0 and weighed[1].cut
    alone = who.weigh([(Prompt("q?", examples[-weighed[0].n_shown :]), ("a", "b" * 20))], quiet)[0]
    assert weighed[0].logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    written = who.write([short, long, Prompt("q?")], 5, (), quiet)
    assert 0 < written[0].n_shown < 9 and written[1].cut and not written[2].cut


def test_a_prompt_is_asked_as_generate_asks_it() -> None:
    """One bos before plain text; a conversation through the template, whose answer begins without a blank."""
    model = build()
    plain, chat = ModelRespondent(model, BYTES, False), ModelRespondent(model, BYTES, True)
    (found,) = plain.weigh([(Prompt("Q:"), ("A",))], quiet)
    ids = [BYTES.bos_id, *BYTES.encode("Q:")]
    assert found.logprobs == [continuation_logprobs(model, [(ids, BYTES.encode(" A"))], BYTES.vocab_size)[0][0]]
    (found,) = chat.weigh([(Prompt("Q:"), ("A",))], quiet)
    ids = BYTES.encode_chat([{"role": "user", "content": "Q:"}], add_generation_prompt=True).ids
    assert found.logprobs == [continuation_logprobs(model, [(ids, BYTES.encode("A"))], BYTES.vocab_size)[0][0]]


def test_answers_come_in_the_order_of_the_prompts_and_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.evaluation.asking._BLOCK", 3)
    who = ModelRespondent(build(), BYTES, False, batch_tokens=60)
    prompts = [Prompt("x" * n) for n in (9, 2, 30, 4)]
    together = who.write(prompts, 6, (), quiet)
    assert [w.text for w in together] == [who.write([p], 6, (), quiet)[0].text for p in prompts]
    weighed = who.weigh([(p, ("a", "b")) for p in prompts], quiet)
    for prompt, told in zip(prompts, weighed, strict=True):
        assert told.logprobs == pytest.approx(who.weigh([(prompt, ("a", "b"))], quiet)[0].logprobs, abs=1e-5)
    letter = next(w.text[1] for w in together if len(w.text) > 1)
    cut = who.write(prompts, 6, (letter,), quiet)
    assert all(letter not in w.text for w in cut) and any(w.finished for w in cut)
