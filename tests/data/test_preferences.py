"""Compared and judged answers become groups of rows: one prompt, whole answers, micro-batches with little padding."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmkit.config import Interrupted, UserError
from llmkit.data.config import DataConfig
from llmkit.data.feedback import FeedbackData, FeedbackRows, partners, prepare_feedback
from llmkit.data.loader import RowLoader
from llmkit.data.preferences import PreferenceData, PreferenceRows, prepare_preferences
from llmkit.data.sequences import cut_by_length
from llmkit.data.turns import encode_turn
from llmkit.tokenizer import Tokenizer, TokenizerConfig

BYTES = Tokenizer.train((), TokenizerConfig(kind="byte"))
PAIRS = [{"prompt": f"question {i}?", "chosen": "yes " * (i % 4 + 1), "rejected": "no"} for i in range(24)]
RANKED = [
    {"prompt": f"q{i}", "responses": ["best", "good", "fair", "bad"], "ranking": [0, [1, 2], 3]} for i in range(3)
]


def config(tmp_path: Path, rows: Sequence[dict[str, Any]], name: str = "t", **options: Any) -> DataConfig:
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    data = {"path": str(file), "valid_frac": 0.0, "cache_dir": str(tmp_path / "cache"), **options}
    return DataConfig.model_validate_json(json.dumps(data))


def preferences(tmp_path: Path, rows: Sequence[dict[str, Any]], **options: Any) -> PreferenceData:
    given = {k: options.pop(k) for k in ("row_len", "margin", "should_stop", "say") if k in options}
    return prepare_preferences(config(tmp_path, rows, **options), BYTES, **{"row_len": 128, **given})


def feedback(tmp_path: Path, rows: Sequence[dict[str, Any]], **options: Any) -> FeedbackData:
    return prepare_feedback(config(tmp_path, rows, **options), BYTES, row_len=128)


def test_sequences_are_prompt_and_turn(tmp_path: Path) -> None:
    """B85: both answers follow the same ids; each ends with the token that ends the turn, and nothing after it."""
    (train,) = preferences(tmp_path, PAIRS).train
    assert len(train) == 24 and train.n_sequences == 48 and len(train.pairs) == 24 and not train.n_dropped
    for i, row in enumerate(PAIRS):
        first = train.group_starts[i]
        for at, side in enumerate(("chosen", "rejected")):
            prompt, answer = encode_turn(BYTES, row["prompt"], row[side])
            assert train.ids(first + at).tolist() == prompt + answer and answer[-1] == BYTES.end_of_turn_id
            assert train.prompt_lengths[first + at] == len(prompt)
        assert train.pairs[i].tolist() == [i, first, first + 1]


def test_rankings_and_scores(tmp_path: Path) -> None:
    """Equally good answers make no pair; every prompt weighs the same; the margin is asked for."""
    (train,) = preferences(tmp_path, RANKED).train
    assert train.pairs[:5, 1:].tolist() == [[0, 1], [0, 2], [0, 3], [1, 3], [2, 3]] and len(train.pairs) == 15
    batch, _ = PreferenceRows([train], row_len=128, pad_id=0).batch(*(np.array(a) for a in ([0, 1], [0, 0], [2, 0])))
    assert batch.weights_P.tolist() == [0.2] * 10 and batch.weights_P.dtype == torch.float64
    assert batch.better_P.tolist() == [0, 0, 0, 1, 2, 4, 4, 4, 5, 6] and batch.denominator == 2
    scored = [{"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 3, 1]}]
    for margin, wanted in ((False, [0.0, 0.0]), (True, [2.0, 2.0])):
        (train,) = preferences(tmp_path, scored, name="s", margin=margin).train
        assert train.margins.tolist() == wanted


def test_a_long_prompt_loses_its_beginning_on_both_sides(tmp_path: Path) -> None:
    """B85, B78: by as much for both answers; the answers stay whole."""
    row = {"prompt": "x" * 100, "chosen": "y" * 20, "rejected": "z"}
    (train,) = preferences(tmp_path, [row], row_len=40).train
    a, b = train.ids(0).tolist(), train.ids(1).tolist()
    n = int(train.prompt_lengths[0])
    assert train.n_cut == 1 and len(a) == 40 and train.prompt_lengths.tolist() == [n, n] and a[:n] == b[:n]
    prompt, chosen = encode_turn(BYTES, row["prompt"], row["chosen"])
    assert a == (prompt + chosen)[-40:] and b[n:] == encode_turn(BYTES, row["prompt"], row["rejected"])[1]


def test_answers_that_do_not_fit(tmp_path: Path) -> None:
    """B79: they are left out with their pairs and counted; too many end the run, with the first one's place."""
    rows = [*PAIRS, {"prompt": "q", "chosen": "w" * 90, "rejected": "no"}]
    with pytest.raises(
        UserError, match=r"1 of 25 pairs \(4.0 %\) can't be learnt from.*t\.jsonl:25: an answer of 90 char"
    ):
        preferences(tmp_path, rows, row_len=64)
    (train,) = preferences(tmp_path, rows, row_len=64, max_dropped_frac=0.1).train
    assert len(train) == 24 and train.n_dropped == 1
    three = [{"prompt": "q", "responses": ["a", "b", "w" * 90], "ranking": [2, 0, 1]}]
    (train,) = preferences(tmp_path, three, row_len=64, max_dropped_frac=0.7, name="three").train
    assert train.pairs.tolist() == [[0, 0, 1]] and train.n_dropped == 2 and train.n_sequences == 2


def test_held_out_by_prompt(tmp_path: Path) -> None:
    """B44: all pairs of a prompt lie on one side; both sides together are everything, renumbered."""
    rows = [{**row, "chosen": f"{row['chosen']}{i}"} for i in range(2) for row in PAIRS]
    data = preferences(tmp_path, rows, valid_frac=0.3)
    train, valid = data.train[0], data.valid[0]

    def prompts(side: Any) -> set[bytes]:
        return {side.ids(i)[: side.prompt_lengths[i]].tobytes() for i in range(side.n_sequences)}

    assert not prompts(train) & prompts(valid) and len(prompts(train) | prompts(valid)) == 24
    assert len(train) + len(valid) == 48 and len(valid) > 4
    for side in (train, valid):
        for group, better, worse in side.pairs.tolist():
            texts = [BYTES.decode(side.ids(i)[side.prompt_lengths[i] :]) for i in (better, worse)]
            assert texts[0].startswith("yes") and texts[1] == "no"
            assert side.group_starts[group] <= better < worse < side.group_starts[group + 1]
    with pytest.raises(UserError, match="valid_frac holds out all"):
        preferences(tmp_path, PAIRS[:1], valid_frac=0.99999)


def test_the_cache(tmp_path: Path) -> None:
    """B43: found again, and made anew for whatever it depends on; a signal leaves nothing behind."""
    said: list[str] = []
    with pytest.raises(Interrupted):
        preferences(tmp_path, PAIRS, should_stop=lambda: True)
    assert not list((tmp_path / "cache").glob("*.preferences.*"))
    first = preferences(tmp_path, PAIRS, say=said.append)
    assert len(said) == 1 and "layout prompt/chosen/rejected" in said[0]
    assert preferences(tmp_path, PAIRS, say=said.append).fingerprint == first.fingerprint and len(said) == 1
    for n, options in enumerate(({"row_len": 100}, {"system": "Be kind."}, {"chat": False}, {"margin": True}), 2):
        preferences(tmp_path, PAIRS, **options)
        assert len(list((tmp_path / "cache").glob("*.preferences.*"))) == n
    assert preferences(tmp_path, PAIRS[1:]).fingerprint != first.fingerprint


def test_plain_text(tmp_path: Path) -> None:
    (train,) = preferences(tmp_path, PAIRS[:1], chat=False).train
    assert train.ids(1).tolist() == [BYTES.bos_id, *BYTES.encode("question 0?no"), BYTES.eos_id]


def test_micro_batches_by_length(tmp_path: Path) -> None:
    """The cut is a partition, a function of the rows alone, within the limit, and sorted; a step holds the same rows."""
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randrange(1, 30)
        longest, counts = (np.array([rng.randrange(1, most) for _ in range(n)]) for most in (50, 5))
        limit = rng.randrange(10, 200)
        parts = cut_by_length(longest, counts, limit)
        assert sorted(np.concatenate(parts).tolist()) == list(range(n))
        widths = [longest[p].max() for p in parts]
        assert widths == sorted(widths, reverse=True)
        assert all(w * counts[p].sum() <= limit or len(p) == 1 for w, p in zip(widths, parts, strict=True))
    data = preferences(tmp_path, PAIRS).train
    rows = PreferenceRows(data, row_len=128, pad_id=0, micro_tokens=300)
    cut, whole = (RowLoader(rows, rows_per_step=12, micro_rows=1, cut=c, prefetch=0) for c in (rows.cut, None))
    assert cut.tokens_hash(3) == whole.tokens_hash(3)
    assert sum(b.denominator for b in cut.step(3)) == 12 and 1 < len(cut.step(3)) < 12
    for batch in cut.step(3):
        assert batch.ids_BT.numel() <= 300 + 8 * len(batch.ids_BT)  # columns are rounded up to a multiple of 8


def test_every_group_is_evaluated_once(tmp_path: Path) -> None:
    """B46: on any number of ranks; batches of padding alone are batches, without pairs."""
    data = preferences(tmp_path, PAIRS[:7])
    extra = [np.arange(data.train[0].n_sequences, dtype=np.float32)]
    rows = PreferenceRows(data.train, row_len=128, pad_id=0, extra=extra)
    seen: list[float] = []
    for rank in range(3):
        for batch in RowLoader(rows, rows_per_step=6, rank=rank, world=3, micro_rows=2, prefetch=0).eval_batches():
            assert batch.extra_B is not None and len(batch.extra_B) == len(batch.ids_BT) == len(batch.lengths_B)
            assert batch.weights_P.sum() == batch.denominator == len(batch.better_P)
            assert (batch.prompt_lengths_B >= 1).all() and (batch.lengths_B <= batch.ids_BT.shape[1]).all()
            seen += batch.extra_B[batch.better_P].tolist()
    assert sorted(seen) == [0, 2, 4, 6, 8, 10, 12]


def test_prompts_that_are_there_once(tmp_path: Path) -> None:
    """The rows hold every sequence: its labels are its answer, its positions go on from the prompt's; no id is lost."""
    data = preferences(tmp_path, RANKED * 2).train
    rows = PreferenceRows(data, row_len=128, pad_id=0, share_prompts=True, micro_tokens=200)
    source = data[0]
    parts = rows.cut(np.zeros(6, np.int64), np.arange(6))
    assert sorted(np.concatenate(parts).tolist()) == list(range(6)) and len(parts) > 1
    for part in parts:
        batch, _ = rows.batch(part, np.zeros(len(part), np.int64), part)
        shared = batch.shared
        assert shared is not None
        n_prompts = sum(int(source.prompt_lengths[source.group_starts[g]]) for g in part)
        n_answers = int((batch.lengths_B - batch.prompt_lengths_B).sum())
        assert (
            (shared.groups_RT >= 0).sum() == n_prompts + n_answers == sum(rows._shared_size(0, g) for g in part) <= 200
        )
        for i in range(len(batch.ids_BT)):
            ids, n_prompt = batch.ids_BT[i, : batch.lengths_B[i]], batch.prompt_lengths_B[i]
            mine = shared.sequence_N == i
            assert torch.equal(shared.labels_N[mine], ids[n_prompt:])
            assert torch.equal(shared.ids_RT.flatten()[shared.from_N[mine]], ids[n_prompt - 1 : -1])
            assert torch.equal(
                shared.positions_RT.flatten()[shared.from_N[mine]], torch.arange(n_prompt - 1, len(ids) - 1)
            )
            assert shared.offset_N[mine].tolist() == list(range(len(ids) - n_prompt))


# --- judged one by one -----------------------------------------------------------------------------------------------

JUDGED = [{"prompt": f"q{i // 2}", "completion": f"a{i}", "label": i % 3 == 0} for i in range(9)]


def test_judged_answers(tmp_path: Path) -> None:
    (train,) = feedback(tmp_path, JUDGED).train
    assert train.is_good.tolist() == [row["label"] for row in JUDGED]
    for i, row in enumerate(JUDGED):
        prompt, answer = encode_turn(BYTES, row["prompt"], row["completion"])
        assert train.ids(i).tolist() == prompt + answer
        partner = JUDGED[train.partner[i]]
        assert partner["prompt"] != row["prompt"]
        ids, n_prompt = train.mismatched(i, 128)
        assert ids.tolist() == prompt + encode_turn(BYTES, partner["prompt"], partner["completion"])[1]
        assert n_prompt == len(prompt)
    assert len(train.mismatched(0, 12)[0]) == 12  # the prompt is cut
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": "a"}] for q in "qr"]
    messages = [{"messages": turn, "label": n} for n, turn in enumerate(turns)]
    assert feedback(tmp_path, messages, name="m").train[0].is_good.tolist() == [False, True]


def test_preferences_are_taken_apart(tmp_path: Path) -> None:
    """An answer that is better than one and worse than another is neither good nor bad."""
    assert feedback(tmp_path, PAIRS).train[0].is_good.tolist() == [True, False] * 24
    (train,) = feedback(tmp_path, RANKED, name="r").train
    assert [BYTES.decode(train.ids(i)[train.prompt_lengths[i] :]) for i in range(2)] == ["best", "bad"]
    assert train.is_good.tolist() == [True, False] * 3


def test_partners() -> None:
    """The next row with another prompt, around the end; none where all are the same."""
    rng = random.Random(1)
    for _ in range(100):
        keys = [rng.randrange(3) for _ in range(rng.randrange(1, 12))]
        found = partners(np.array([[k] * 32 for k in keys], np.uint8)).tolist()
        for i, key in enumerate(keys):
            others = [j % len(keys) for j in range(i + 1, i + len(keys)) if keys[j % len(keys)] != key]
            assert found[i] == (others[0] if others else -1)


def test_batches_of_judged_answers(tmp_path: Path) -> None:
    """Both kinds of sequences have their own number; padding has weight 0; fixed rows, whatever the micro-batch."""
    (train,) = feedback(tmp_path, JUDGED).train
    extra = [np.stack([np.arange(9.0), -np.arange(9.0)], 1)]
    rows = FeedbackRows([train], row_len=128, pad_id=0, extra=extra, micro_tokens=64)
    loader = RowLoader(rows, rows_per_step=6, micro_rows=1, cut=rows.cut, prefetch=0)
    for batch in loader.step(1):
        assert torch.equal(batch.matched.extra_B, -batch.mismatched.extra_B) and batch.weights_B.all()
        for row, number in enumerate(batch.matched.extra_B.long().tolist()):
            assert batch.is_good_B[row] == train.is_good[number]
            n = batch.mismatched.lengths_B[row]
            assert batch.mismatched.ids_BT[row, :n].tolist() == train.mismatched(number, 128)[0].tolist()
    last = list(RowLoader(rows, rows_per_step=8, micro_rows=4, rank=1, world=2, prefetch=0).eval_batches())[-1]
    padding, _ = rows.batch(np.array([0]), np.array([-1]), np.array([0]))
    assert last.denominator == last.weights_B.sum() and padding.denominator == 0 == padding.weights_B.sum()
    assert padding.to("cpu").matched.ids_BT.shape[0] == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "chosen": "b"}], r"t\.jsonl:1: the row has the fields prompt, chosen"),
        ([*PAIRS[:2], {"prompt": 3, "chosen": "b", "rejected": "c"}], r"t\.jsonl:3: prompt"),
        (
            [{"prompt": "a", "responses": ["b", "c"], "ranking": [0, 0]}],
            r"t\.jsonl:1: ranking: every number from 0 to 1",
        ),
        ([{"prompt": "a", "responses": ["b", "c"], "scores": [1]}], r"t\.jsonl:1: scores: 1 numbers for 2 responses"),
        ([], r"t\.jsonl: no pair of answers in it"),
    ],
)
def test_mistakes(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message) as e:
        preferences(tmp_path, rows)
    assert "\n" not in str(e.value)


def test_mistakes_in_judgements(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"t\.jsonl:1: .*no layout of a feedback"):
        feedback(tmp_path, [{"text": "a"}])
    with pytest.raises(UserError, match="all 2 rows have the same prompt"):
        feedback(tmp_path, [{**row, "prompt": "q"} for row in JUDGED[:2]], name="same")
