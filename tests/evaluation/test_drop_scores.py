"""DROP's exact match and F1: by hand, and against lm-eval's on random answers."""

from __future__ import annotations

import random

import pytest

from llmkit.evaluation.spans import drop_scores, normal


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("The Broncos.", [["broncos"]], (1.0, 1.0)),
        ("5", [["5.0"]], (1.0, 1.0)),
        ("6 yards", [["5 yards"]], (0.0, 0.0)),  # the numbers differ, so the shared word counts nothing
        ("two red apples", [["red apples"]], (0.0, 0.8)),
        ("Mira and Tom", [["Tom", "Mira"]], (1.0, 1.0)),
        ("Tom", [["Tom", "Mira"]], (0.0, 0.5)),
        ("wrong", [["no"], ["wrong"]], (1.0, 1.0)),
        ("", [["x"]], (0.0, 0.0)),
    ],
)
def test_by_hand(answer: str, right: list[list[str]], expected: tuple[float, float]) -> None:
    assert drop_scores(answer, right) == pytest.approx(expected)


def test_equals_lm_evals_where_a_right_answer_is_one_span() -> None:
    pytest.importorskip("scipy")
    theirs = pytest.importorskip("lm_eval.tasks.drop.utils")
    rng = random.Random(0)
    words = ["the", "a", "Broncos", "10", "10.0", "3-yard", "field", "goal,", "goal", "Mira's", "17%", "--", "U.S."]
    for _ in range(2000):
        answer, right = (" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(2))
        assert normal(answer) == theirs._normalize(answer)
        assert drop_scores(answer, [[right]]) == pytest.approx(theirs.get_metrics(answer, (right,)))


def test_many_spans_are_paired_at_best() -> None:
    names = [f"name{i}" for i in range(15)]
    assert drop_scores(", ".join(reversed(names)), [names]) == (1.0, 1.0)
    assert drop_scores(", ".join(names[:5]), [names])[1] == pytest.approx(5 / 15, abs=0.01)
