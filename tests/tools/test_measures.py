"""Held-out likelihoods against a loop over tokens, intervals against scipy, and speeds in turns."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from llmkit.config import MachineError
from llmkit.losses import IGNORE
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, init_weights
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.tools import measures
from llmkit.tools.measures import Scored, Timed, likelihood, mean_of, speeds, text_rows, time_of, wilson

BYTES = Tokenizer.train([], TokenizerConfig(kind="byte"))


def small(**shape: object) -> GPT:
    """A model in fp64 whose embedding has more rows than there are tokens, all of them likely."""
    config = GPTConfig(
        **{"n_layers": 2, "n_heads": 2, "d_model": 16, "d_ff": 24, "max_seq_len": 64, "vocab_size": 320, **shape}
    )
    model = GPT(config).double()
    init_weights(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model.eval()


def nats_one_by_one(model: GPT, rows: list[Scored], vocab_size: int) -> float:
    """Each label alone, of logits that are whole."""
    total = 0.0
    for row in rows:
        logits_TV: Tensor = model.logits(model(torch.tensor([row.ids])))[0, :, :vocab_size]
        for t, label in enumerate(row.labels):
            if label != IGNORE:
                total -= logits_TV[t].log_softmax(-1)[label].item()
    return total


# --- likelihood ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [1, 7, 8, 64])
def test_every_token_of_a_text_is_asked_for_once(context: int) -> None:
    text = "The mill, 磨坊!"
    rows = text_rows(BYTES, text, context)
    assert [t for row in rows for t in row.labels] == BYTES.encode(text)
    assert all(len(row.ids) == len(row.labels) <= context for row in rows)
    assert [t for row in rows for t in row.ids] == [BYTES.bos_id, *BYTES.encode(text)[:-1]]


def test_without_bos_a_text_follows_the_end_of_another(tmp_path: Path) -> None:
    BYTES.save(tmp_path)
    told = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**told, "bos_token": None}), "utf-8")
    plain = Tokenizer.load(tmp_path)
    (row,) = text_rows(plain, "ab", 64)
    assert plain.bos_id is None and row.ids[0] == plain.eos_id and row.labels == plain.encode("ab")


def test_likelihood_is_that_of_the_tokens_one_by_one() -> None:
    """Padding, batches and rows of the embedding that belong to no token (B91) change nothing."""
    model = small()
    texts = ["The mill stands by the river. " * 3, "磨坊", "a", "Mira lives in the valley, they say."]
    rows = [row for text in texts for row in text_rows(BYTES, text, 20)]
    rows.append(Scored([1, 2, 3, 4], [IGNORE, 5, IGNORE, 6]))
    seen: list[int] = []
    found = likelihood(model, rows, BYTES.vocab_size, 100, seen.append)
    expected = nats_one_by_one(model, rows, BYTES.vocab_size)
    assert found.nats == pytest.approx(expected, rel=1e-12)
    assert sum(seen) == len(rows) and found.n_tokens == sum(len(BYTES.encode(t)) for t in texts) + 2
    assert found.loss == found.nats / found.n_tokens and found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / 100)
    assert abs(nats_one_by_one(model, rows, 320) - expected) > 0.1, "the padding of the embedding would show"


def test_batches_are_cut_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    rows = [Scored([1 + i % 50] * n, [2 + i % 50] * n) for i, n in enumerate([3, 1, 9, 4, 4, 7])]
    whole = likelihood(model, rows, 300, 1)
    monkeypatch.setattr(measures, "batches_of", lambda texts: [[i] for i in range(len(texts))])
    alone = likelihood(model, rows, 300, 1)
    assert alone.nats == pytest.approx(whole.nats, rel=1e-13) and alone.n_tokens == whole.n_tokens == 28


def test_a_loss_that_is_not_finite_is_said() -> None:
    model = small()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.inf)
    with pytest.raises(MachineError, match="not finite"):
        likelihood(model, text_rows(BYTES, "ab", 8), BYTES.vocab_size, 2)


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    assert measures.Likelihood(1e6, 1, 1).perplexity == math.inf
    assert math.isnan(measures.Likelihood(1.0, 1, 0).bits_per_byte)


# --- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_right", "n"), [(0, 1), (1, 1), (0, 44), (44, 44), (3, 7), (380, 396), (1, 1000)])
def test_wilson_is_scipys(n_right: int, n: int) -> None:
    known = binomtest(n_right, n).proportion_ci(method="wilson")
    assert wilson(n_right, n) == pytest.approx((known.low, known.high), abs=1e-12)


def test_means() -> None:
    """Shares have Wilson's interval, other grades that of their standard error; what has no grade is left out."""
    share = mean_of([1.0, 0.0, math.nan, 1.0])
    assert share is not None and (share.n, share.mean) == (3, pytest.approx(2 / 3))
    assert (share.low, share.high) == wilson(2, 3)
    graded = mean_of([0.5, 1.5, 1.0, 2.0])
    assert graded is not None and graded.mean == 1.25
    error = torch.tensor([0.5, 1.5, 1.0, 2.0], dtype=torch.float64).std().item() / 2
    assert graded.high - graded.mean == pytest.approx(1.959964 * error, rel=1e-6)
    assert graded.mean - graded.low == pytest.approx(graded.high - graded.mean)
    one = mean_of([0.3])
    assert one is not None and one.mean == 0.3 and math.isnan(one.low)
    assert mean_of([math.nan]) is None and mean_of([]) is None


# --- speed -----------------------------------------------------------------------------------------------------------


def test_models_take_turns_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = Timed(small(), BYTES), Timed(small(), BYTES)
    asked: list[Timed] = []
    seconds = iter([(90.0, 90.0), (90.0, 90.0), (1.0, 2.0), (2.0, 4.0), (0.5, 1.0), (4.0, 8.0)])

    def time(timed: Timed, n_prompt: int, n_new: int) -> tuple[float, float]:
        assert (n_prompt, n_new) == (10, 5)
        asked.append(timed)
        return next(seconds)

    monkeypatch.setattr(measures, "time_of", time)
    runs: list[int] = []
    found = speeds([a, b], 10, 5, 2, lambda: runs.append(1))
    assert [x is a for x in asked] == [True, False] * 3 and len(runs) == 6
    assert (found[0].prompt, found[0].generation) == ([10.0, 20.0], [2.0, 4.0])
    assert (found[1].prompt, found[1].generation) == ([5.0, 2.5], [1.0, 0.5])


def test_a_run_writes_all_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a model that would end at once; the clock is read when a token is there."""
    model = small(tie_embeddings=False)
    with torch.no_grad():
        model.head_weight.zero_()
        model.head_weight[BYTES.eos_id] = 100 * model(torch.tensor([[1]]))[0, 0]
    ticks = iter(range(100))
    monkeypatch.setattr(measures.time, "perf_counter", lambda: float(next(ticks)))
    first_s, rest_s = time_of(Timed(model, BYTES), 6, 9)
    assert (first_s, rest_s) == (1.0, 8.0)
