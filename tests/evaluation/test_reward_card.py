"""The report card: every figure against a loop, on scores whose faults are known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmkit.evaluation.reward_card import (
    Judged,
    card_lines,
    correlation,
    draw_card,
    reliability,
    report_card,
    share_right,
)


def judged(scores: list[float], lengths: list[int], pairs: list[tuple[int, int]], per_prompt: int = 2) -> Judged:
    better, worse = (np.array(side, np.int64) for side in zip(*pairs, strict=True))
    prompts = np.arange(len(scores)) // per_prompt
    return Judged(np.array(scores, np.float64), np.array(lengths, np.int64), prompts, better, worse)


def drawn(n: int, slope: float = 1.0, seed: int = 0) -> Judged:
    """n pairs whose order is drawn by Bradley and Terry's model with true scores; the model's are `slope` times those."""
    rng = np.random.default_rng(seed)
    true = rng.normal(0, 1.5, 2 * n)
    first_wins = rng.random(n) < 1 / (1 + np.exp(-(true[0::2] - true[1::2])))
    first, second = np.arange(0, 2 * n, 2), np.arange(1, 2 * n, 2)
    better, worse = np.where(first_wins, first, second), np.where(first_wins, second, first)
    return Judged(slope * true, rng.integers(1, 40, 2 * n), np.arange(2 * n) // 2, better, worse)


def test_every_figure_by_hand() -> None:
    """Six pairs that can be counted on fingers."""
    pairs = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)]
    scores = [2.0, 1.0, 0.5, 0.5, -1.0, 1.0, 3.0, 0.0, 0.2, 0.1, 1.0, 0.0]
    lengths = [9, 3, 3, 9, 5, 5, 7, 8, 8, 2, 1, 6]
    card = report_card(judged(scores, lengths, pairs))
    assert card["n_pairs"] == 6 and card["n_answers"] == 12
    assert card["accuracy"] == pytest.approx(4.5 / 6)
    assert card["accuracy_longer_better"] == 1.0
    assert card["accuracy_shorter_better"] == pytest.approx(2.5 / 3)
    assert card["longer_better_frac"] == pytest.approx(2 / 6)
    leads = [a - b for a, b in zip(scores[0::2], scores[1::2], strict=True)]
    assert card["log_loss"] == pytest.approx(sum(math.log(1 + math.exp(-x)) for x in leads) / 6)
    assert card["reward_mean"] == pytest.approx(sum(scores) / 12)
    gaps = [lengths[b] - lengths[w] for b, w in pairs]
    for group in card["accuracy_by_length_gap"]:
        here = [x for x, gap in zip(leads, gaps, strict=True) if group["from_tokens"] <= gap <= group["to_tokens"]]
        assert group["n"] == len(here) and group["accuracy"] == pytest.approx(share_right(np.array(here)))
    assert sum(g["n"] for g in card["accuracy_by_length_gap"]) == 6
    within = np.array([[a - (a + b) / 2, b - (a + b) / 2] for a, b in zip(scores[0::2], scores[1::2], strict=True)])
    spans = np.array([[a - (a + b) / 2, b - (a + b) / 2] for a, b in zip(lengths[0::2], lengths[1::2], strict=True)])
    expected = np.corrcoef(within.ravel(), spans.ravel())[0, 1]
    assert card["length_correlation_within_prompt"] == pytest.approx(expected)
    json.dumps(card, allow_nan=False)


def test_confidence_that_is_earned_and_confidence_that_is_not() -> None:
    """The true model of the order is calibrated; three times its scores is three times as sure, and no more right."""
    honest, boasting, shy = (report_card(drawn(20_000, slope)) for slope in (1.0, 3.0, 0.3))
    assert honest["calibration_error"] < 0.01
    assert boasting["calibration_error"] > 0.1 and shy["calibration_error"] > 0.1
    assert honest["accuracy"] == boasting["accuracy"] == shy["accuracy"]
    assert honest["log_loss"] < min(boasting["log_loss"], shy["log_loss"])


def test_the_calibration_error_against_a_loop() -> None:
    leads = drawn(500).leads_P
    bins, error = reliability(leads)
    total = 0.0
    for b in range(10):
        low, high = 0.5 + b / 20, 0.5 + (b + 1) / 20
        told = [1 / (1 + math.exp(-abs(x))) for x in leads]
        here = [i for i, p in enumerate(told) if low <= p < high or (b == 9 and p == 1)]
        if here:
            mean = sum(told[i] for i in here) / len(here)
            right = sum(leads[i] > 0 for i in here) / len(here)
            total += len(here) / len(leads) * abs(mean - right)
    assert error == pytest.approx(total) and sum(b["n"] for b in bins) == 500
    assert reliability(np.array([800.0, -800.0, 0.0]))[0][-1]["confidence"] == 1.0


def test_a_model_that_likes_length_is_found_out() -> None:
    """Scores that are lengths: the correlation is 1, and the accuracy depends on who is longer alone."""
    told = drawn(2000)
    card = report_card(replace(told, scores_N=told.lengths_N.astype(np.float64)))
    assert card["length_correlation"] == pytest.approx(1)
    assert card["length_correlation_within_prompt"] == pytest.approx(1)
    assert card["accuracy_longer_better"] == 1 and card["accuracy_shorter_better"] == 0
    assert abs(card["accuracy"] - 0.5) < 0.05
    fair = report_card(told)
    assert abs(fair["length_correlation"]) < 0.05


def test_nothing_to_say() -> None:
    """No pair, one pair, equal scores: null where there is no figure, never NaN."""
    empty = Judged(np.zeros(0), *(np.zeros(0, np.int64) for _ in range(4)))
    one = judged([1.0, 1.0], [3, 3], [(0, 1)])
    for given in (empty, one):
        card = report_card(given)
        json.dumps(card, allow_nan=False)
        assert list(card_lines(card))
    assert report_card(one)["accuracy"] == 0.5 and report_card(empty)["accuracy"] is None
    assert math.isnan(correlation(np.ones(3), np.arange(3)))


def test_the_picture(tmp_path: Path) -> None:
    for n, told in enumerate((drawn(300), judged([1.0, 0.0], [3, 3], [(0, 1)]))):
        path = draw_card(report_card(told), tmp_path / "plots" / f"{n}.png", "a run")
        assert path is not None and path.read_bytes()[:4] == b"\x89PNG"
