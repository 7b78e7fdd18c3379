"""Metrics outside their healthy range are told of once, and healthy ones never."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmkit.training.log import RunLog
from llmkit.training.watch import RULES, Rule, Watch, table

# Of each rule a course that it speaks of: values of its metric.
ILL: dict[str, list[float]] = {
    "loss-grows": [2.0] * 20 + [4.0] * 60,
    "loss-flat": [2.0] * 520,
    "gradient-large": [500.0] * 45,
    "gradient-none": [1e-9] * 25,
    "rate-none": [0.0] * 12,
    "experts-uneven": [6.0] * 110,
    "overfits": [2.0, 1.0, 1.2, 1.3, 1.4],
    "guesses": [0.5, 0.51, 0.49, 0.5],
    "answers-run-on": [0.1, 0.2, 0.1],
    "kl-negative": [-2.0] * 4,
    "kl-large": [300.0] * 4,
    "entropy-gone": [1.5] * 20 + [0.01] * 40,
    "clipped": [0.5] * 25,
    "sampler-differs": [0.2] * 12,
    "critic-blind": [-1.0] * 16,
    "groups-equal": [1.0] * 9,
    "reward-constant": [0.0] * 5,
    "answers-cut": [0.05] * 9,
    "correction-cut": [0.2] * 12,
    "answers-grow": [20.0] * 4 + [200.0] * 12,
}
WELL: dict[str, list[float]] = {
    "train/loss": [4.0 * 0.995**i + 1.0 for i in range(900)],
    "train/grad_norm": [1.0 + i % 3 for i in range(300)],
    "train/lr": [1e-3] * 300 + [0.0],
    "train/expert_load_max": [1.4] * 300,
    "valid/loss": [3.0, 2.0, 1.5, 1.52, 1.55],
    "valid/accuracy": [0.5, 0.6, 0.66, 0.7],
    "answers/ended": [0.0, 0.9, 1.0],
    "rollout/kl_sum": [0.0, 1e-6, 2.0, 8.0],
    "train/entropy": [1.5 - i * 0.005 for i in range(200)],
    "train/clipped_high": [0.05] * 60,
    "train/sampler_gap": [1e-6] * 60,
    "train/correction_cut": [0.0, 0.3] + [0.01] * 60,
    "rollout/explained_variance": [-1.0] * 9 + [0.3] * 30,
    "rollout/groups_equal": [0.4] * 30,
    "rollout/reward_std": [0.0, 0.5, 0.4, 0.4, 0.3],
    "rollout/ended": [0.2] * 3 + [0.9] * 20,
    "rollout/length": [20.0, 24.0, 30.0] * 10,
}


def said(metric: str, values: list[float], watch: Watch | None = None) -> list[str]:
    watch = watch or Watch()
    return [s for i, v in enumerate(values) for s in watch.see({"step": i, metric: v})]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_it_speaks_once(rule: Rule) -> None:
    found = said(rule.metric, ILL[rule.name])
    assert len(found) == 1 and found[0].endswith(f"({rule.name})")
    assert rule.cause in found[0] and rule.remedy in found[0]


@pytest.mark.parametrize("metric", WELL)
def test_it_is_silent_on_healthy_courses(metric: str) -> None:
    assert said(metric, WELL[metric]) == []


def test_every_watched_metric_has_a_healthy_course() -> None:
    assert {rule.metric for rule in RULES} == WELL.keys() and {rule.name for rule in RULES} == ILL.keys()


def lines_of(out: Path) -> Iterator[str]:
    return (line for line in (out / "train.log").read_text("utf-8").splitlines() if "warning: step" in line)


def test_a_run_that_goes_on_does_not_say_it_again(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in range(5):
        log.metrics({"step": step, "rollout/kl_sum": -3.0})
    kept = log.lengths()
    assert len(list(lines_of(tmp_path))) == 1
    log.close()
    again = RunLog(tmp_path)
    again.cut(kept)
    for step in range(5, 9):
        again.metrics({"step": step, "rollout/kl_sum": -3.0})
    assert len(list(lines_of(tmp_path))) == 1
    again.cut({})  # back to the beginning: the same may be said of the new course
    for step in range(4):
        again.metrics({"step": step, "rollout/kl_sum": -3.0})
    again.close()
    assert len(list(lines_of(tmp_path))) == 2


def test_docs_show_the_rules() -> None:
    assert table() in (Path(__file__).parents[2] / "docs" / "errors.md").read_text("utf-8")
