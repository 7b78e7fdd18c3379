"""Questions that stand in texts: found by words and by Chinese characters, and nothing else is."""

from __future__ import annotations

import random

from llmkit.evaluation.contamination import overlap

ENGLISH = "Which of the twelve villages by the river has the oldest mill that still grinds flour today"
CHINESE = "在这条河边的十二个村子里，哪一个村子有至今还在磨面的最古老的磨坊？"


def test_a_question_is_found_in_the_middle_of_a_text() -> None:
    texts = ["nothing here", f"As one asks: {ENGLISH.upper()}! And so on. 有人问：{CHINESE.replace('，', ' ')}"]
    assert overlap([ENGLISH, CHINESE], texts).shares == [1.0, 1.0]
    assert overlap([ENGLISH, CHINESE], texts[:1]).shares == [0.0, 0.0]


def test_the_share_is_that_of_runs_of_thirteen() -> None:
    words = ENGLISH.split()
    assert len(words) == 17
    found = overlap([ENGLISH], [" ".join(words[:14])])
    assert found.shares == [2 / 5] and found.is_dirty == [True]
    assert overlap([ENGLISH], [" ".join(words[:12])]).shares == [0.0]


def test_short_questions_are_looked_for_whole_and_the_shortest_not() -> None:
    words = ["how", "many", "legs", "has", "a", "goose", "in", "winter", "or", "spring"]
    asked = [" ".join(words), " ".join(words[:8]), " ".join(words[:7])]
    assert overlap(asked, [" ".join(["so", *words, "then"])]).shares == [1.0, 1.0, None]
    found = overlap(asked, [" ".join(words[:8])])
    assert found.shares == [0.0, 1.0, None] and found.is_dirty == [False, True, None]


def test_equals_a_plain_search() -> None:
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(4)]
    texts = [" ".join(rng.choices(vocabulary, k=4000)) for _ in range(3)]
    asked = [" ".join(rng.choices(vocabulary, k=rng.randint(8, 30))) for _ in range(20)]
    asked += [" ".join(texts[0].split()[k : k + 20]) for k in (0, 50, 3980)]
    known = {
        n: {tuple(w[i : i + n]) for t in texts for w in [t.split()] for i in range(len(w) - n + 1)}
        for n in range(8, 14)
    }
    for question, share in zip(asked, overlap(asked, texts).shares, strict=True):
        words = question.split()
        n = min(13, len(words))
        runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        assert share == sum(run in known[n] for run in runs) / len(runs)
    assert overlap(asked, texts).shares[-3:] == [1.0] * 3
