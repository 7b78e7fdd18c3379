"""What annotators say: orders that people type, and a noise that is what it is said to be."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from typing import Any

import pytest

from llmkit.config import UserError
from llmkit.tools.annotators import (
    Judgement,
    Noise,
    Person,
    agreement,
    from_scores,
    pairs_of,
    parse_order,
    parse_scores,
    readable,
)


@pytest.mark.parametrize(
    ("text", "ranking"),
    [
        ("2>1=3>4", [1, [0, 2], 3]),
        (" 4 > 3 > 2 > 1 ", [3, 2, 1, 0]),
        ("2", [1, [0, 2, 3]]),
        ("3>1", [2, 0, [1, 3]]),
        ("1=2=3", [[0, 1, 2], 3]),
    ],
)
def test_orders(text: str, ranking: list[Any]) -> None:
    """Who isn't named is worst."""
    assert parse_order(text, 4) == ranking


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("2>5", "there is no answer 5: they are 1 to 4"),
        ("0", "there is no answer 0"),
        ("2>1>2", "2 stands there twice"),
        ("1=2=3=4", "nothing can be learnt"),
        ("2<1", "is no order"),
        ("2>", "is no order"),
        ("best is 2", "is no order"),
    ],
)
def test_orders_that_are_none(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_order(text, 4)


def test_scores() -> None:
    assert parse_scores("7, 9 2.5 -1", 4) == [7, 9, 2.5, -1]
    assert from_scores([7, 9, 2, 2]) == [1, 0, [2, 3]]
    for text, reason in {"1 2": "2 scores for 3", "1 2 x": "numbers", "1 2 nan": "finite", "3 3 3": "learnt"}.items():
        with pytest.raises(ValueError, match=reason):
            parse_scores(text, 3)


def test_pairs() -> None:
    assert pairs_of([1, [0, 2], 3]) == [(1, 0), (1, 2), (1, 3), (0, 3), (2, 3)]
    assert pairs_of([[0, 1]]) == []


def judge(lines: list[str], responses: tuple[str, ...] = ("one", "two", "three"), **options: Any) -> tuple[Any, str]:
    said: list[str] = []
    person = Person(iter([*(line + "\n" for line in lines), ""]).__next__, said.append, **options)
    return person.judge("prompt 1 of 9", 4, [{"role": "user", "content": "米拉住在哪里？"}], responses), "".join(said)


def test_a_person_sees_answers_in_another_order_and_means_what_was_shown() -> None:
    for seed in range(6):
        judgement, said = judge(["2>3=1"], seed=seed)
        shown = [said.split(f"[{k}] ")[1].split("\n")[0] for k in (1, 2, 3)]
        best, tied = judgement.ranking
        assert ("one", "two", "three")[best] == shown[1] and sorted([*tied, best]) == [0, 1, 2]
        assert "米拉住在哪里？" in said
    orders = {judge(["2>3=1"], seed=seed)[0].ranking[0] for seed in range(12)}
    assert orders == {0, 1, 2}  # a file that has the best ones first doesn't tell


def test_a_person_types_in_chinese_width_and_makes_mistakes() -> None:
    """Full-width signs as an input method writes them; a mistake is explained and asked again."""
    judgement, said = judge(["", "5>1", "?", "comment 都不错 both fine", "２＞１＝３"])
    assert isinstance(judgement, Judgement) and judgement.comment == "都不错 both fine"
    assert "there is no answer 5: they are 1 to 3" in said and "skip" in said
    scored, _ = judge(["scores 1 5 5"])
    assert scored.scores is not None and sorted(scored.scores) == [1, 5, 5]
    assert scored.ranking == from_scores(scored.scores)
    for word in ("skip", "undo", "quit"):
        assert judge([word])[0] == word
    assert judge([])[0] == "quit"  # the input's end


def test_answers_cannot_play_with_the_terminal() -> None:
    """Escape sequences and marks that turn the direction of writing are spelt out; Chinese blanks and emoji stay."""
    assert readable("a\x1b[2Jb\u202ec\u3000d\n👩‍🌾") == "a\\u001b[2Jb\\u202ec\u3000d\n👩‍🌾"
    assert readable("a\nb", "  ") == "a\n  b"


# --- noise -----------------------------------------------------------------------------------------------------------

UTILITIES = [0.2, 1.0, 0.4, 1.0]


def shares(noise: Noise, utilities: list[float], n: int = 20_000) -> Counter[tuple[int, int]]:
    pick = random.Random(1)
    counts: Counter[tuple[int, int]] = Counter()
    for _ in range(n):
        counts.update(pairs_of(noise.draw(utilities, pick)))
    return Counter({pair: count / n for pair, count in counts.items()})


def test_bradley_terry_is_exactly_that_for_every_pair() -> None:
    found = shares(Noise("bradley_terry", 0.5), UTILITIES)
    for a, b in itertools.permutations(range(4), 2):
        if UTILITIES[a] == UTILITIES[b]:
            assert found[a, b] == 0  # equal ones are tied
        else:
            expected = 1 / (1 + math.exp(-(UTILITIES[a] - UTILITIES[b]) / 0.5))
            assert found[a, b] == pytest.approx(expected, abs=0.015)  # 4 standard errors


@pytest.mark.parametrize("flip", [0.0, 0.1, 0.3])
def test_a_pair_is_flipped_as_often_as_is_said(flip: float) -> None:
    assert shares(Noise("flip", flip), [0.0, 1.0])[0, 1] == pytest.approx(flip, abs=0.015)
    found = shares(Noise("flip", flip), [3.0, 2.0, 1.0, 0.0])
    wrong = {pair: share for pair, share in found.items() if pair[0] > pair[1]}
    assert sum(wrong.values()) / 6 == pytest.approx(flip, abs=0.01)
    right = iter(Noise("flip", flip).ceiling([3.0, 2.0, 1.0, 0.0]))
    for pair in itertools.combinations(range(4), 2):
        assert found[pair] == pytest.approx(next(right), abs=0.015)  # Mallows' closed form is what is drawn


@pytest.mark.parametrize("noise", [Noise(), Noise("bradley_terry", 0.3), Noise("flip", 0.2)], ids=str)
def test_the_ceiling_is_what_a_perfect_judge_reaches(noise: Noise) -> None:
    pick = random.Random(2)
    judged = []
    for _ in range(4000):
        utilities = [round(pick.random(), 1) for _ in range(4)]
        judged.append((utilities, noise.draw(utilities, pick)))
    found = agreement(noise, judged)
    assert found.agreed == pytest.approx(found.ceiling, abs=0.012)
    assert (found.agreed == 1.0) == (noise.kind == "none")


def test_noise_that_means_nothing() -> None:
    for kind, amount, reason in (("bradley_terry", 0.0, "above 0"), ("flip", 0.5, "below 0.5"), ("flip", -0.1, "0.5")):
        with pytest.raises(UserError, match=reason):
            Noise(kind, amount)  # type: ignore[arg-type]
    assert math.isnan(agreement(Noise(), []).agreed)
