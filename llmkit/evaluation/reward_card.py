"""The report card of a reward model: how often it is right, what it leans on, and whether its confidence is earned.

Shapes: N answers, P pairs of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GAPS = 5  # groups of pairs by how much longer the better answer is
_BINS = 10  # of confidence, from one half to certainty


@dataclass(frozen=True)
class Judged:
    """Answers with their scores, and the pairs of them whose order is known."""

    scores_N: NDArray[np.float64]
    lengths_N: NDArray[np.int64]
    """Tokens of each answer, without its prompt."""
    prompts_N: NDArray[np.int64]
    """Which prompt each answers, as a number."""
    better_P: NDArray[np.int64]
    """Of each pair, the number of the better answer."""
    worse_P: NDArray[np.int64]

    @property
    def leads_P(self) -> NDArray[np.float64]:
        """By how much the better answer is ahead."""
        return self.scores_N[self.better_P] - self.scores_N[self.worse_P]


def share_right(leads_P: NDArray[np.float64]) -> float:
    """Share of pairs in the right order, ties half; NaN of none."""
    return float(np.mean((leads_P > 0) + 0.5 * (leads_P == 0))) if len(leads_P) else math.nan


def report_card(judged: Judged) -> dict[str, Any]:
    """What can be said of scores against known orders, as JSON; a figure that there is no data for is null."""
    leads_P, scores_N = judged.leads_P, judged.scores_N
    gaps_P = judged.lengths_N[judged.better_P] - judged.lengths_N[judged.worse_P]
    bins, error = reliability(leads_P)
    return {
        "n_pairs": len(leads_P),
        "n_answers": len(scores_N),
        "accuracy": _number(share_right(leads_P)),
        "accuracy_standard_error": _number(_standard_error(share_right(leads_P), len(leads_P))),
        "accuracy_longer_better": _number(share_right(leads_P[gaps_P > 0])),
        "accuracy_shorter_better": _number(share_right(leads_P[gaps_P < 0])),
        "accuracy_by_length_gap": list(_by_gap(leads_P, gaps_P)),
        "longer_preferred_frac": _number(float(np.mean((leads_P > 0) == (gaps_P > 0))) if len(leads_P) else math.nan),
        "longer_better_frac": _number(float(np.mean(gaps_P > 0)) if len(leads_P) else math.nan),
        "length_correlation": _number(correlation(scores_N, judged.lengths_N)),
        "length_correlation_within_prompt": _number(
            correlation(_centred(scores_N, judged.prompts_N), _centred(judged.lengths_N, judged.prompts_N))
        ),
        "log_loss": _number(float(np.mean(np.logaddexp(0, -leads_P))) if len(leads_P) else math.nan),
        "calibration_error": _number(error),
        "calibration_bins": bins,
        "margins": _histogram(leads_P),
        "reward_mean": _number(float(scores_N.mean()) if len(scores_N) else math.nan),
        "reward_std": _number(float(scores_N.std()) if len(scores_N) else math.nan),
    }


def reliability(leads_P: NDArray[np.float64]) -> tuple[list[dict[str, float | int]], float]:
    """Bins of confidence, and the expected calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    The probability that the first of two answers is the better one is sigmoid(first - second), so the model's confidence
    in its own order is sigmoid(|lead|), which should be the share of pairs it has right. A tie is half right.
    """
    confidence_P = 1 / (1 + np.exp(-np.abs(leads_P)))
    right_P = (leads_P > 0) + 0.5 * (leads_P == 0)
    bin_P = np.minimum(((confidence_P - 0.5) * 2 * _BINS).astype(np.int64), _BINS - 1)
    bins: list[dict[str, float | int]] = []
    error = 0.0
    for b in range(_BINS):
        here = bin_P == b
        if not here.any():
            continue
        told, found = float(confidence_P[here].mean()), float(right_P[here].mean())
        bins.append({"from": 0.5 + 0.5 * b / _BINS, "n": int(here.sum()), "confidence": told, "accuracy": found})
        error += here.sum() / len(leads_P) * abs(told - found)
    return bins, float(error) if len(leads_P) else math.nan


def correlation(a_N: NDArray[Any], b_N: NDArray[Any]) -> float:
    """Pearson's; NaN where one of the two does not vary."""
    if len(a_N) < 2 or not np.ptp(a_N) or not np.ptp(b_N):
        return math.nan
    return float(np.corrcoef(a_N, b_N)[0, 1])


def _centred(values_N: NDArray[Any], groups_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each value less the mean of its group."""
    _, at = np.unique(groups_N, return_inverse=True)
    n = np.bincount(at)
    centred: NDArray[np.float64] = values_N - (np.bincount(at, weights=values_N) / np.maximum(n, 1))[at]
    return centred


def _by_gap(leads_P: NDArray[np.float64], gaps_P: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    """Accuracy from the pairs whose better answer is the shortest beside the other to those where it is the longest.

    Pairs of one gap stay together, so groups may be fewer and of unequal size.
    """
    edges = np.unique(np.quantile(gaps_P, np.linspace(0, 1, _GAPS + 1))) if len(gaps_P) else np.zeros(0)
    group_P = np.searchsorted(edges[1:-1], gaps_P, "left") if len(edges) > 2 else np.zeros(len(gaps_P), np.int64)
    for g in range(_GAPS):
        here = group_P == g
        if here.any():
            low, high = int(gaps_P[here].min()), int(gaps_P[here].max())
            n, share = int(here.sum()), share_right(leads_P[here])
            yield {"from_tokens": low, "to_tokens": high, "n": n, "accuracy": share}


def _histogram(leads_P: NDArray[np.float64]) -> dict[str, Any]:
    counts, edges = np.histogram(leads_P, bins=20) if len(leads_P) else (np.zeros(0), np.zeros(0))
    quantiles = {f"p{q}": float(np.percentile(leads_P, q)) for q in (5, 25, 50, 75, 95)} if len(leads_P) else {}
    return {"counts": counts.astype(int).tolist(), "edges": edges.tolist(), **quantiles}


def _standard_error(share: float, n: int) -> float:
    return math.sqrt(share * (1 - share) / n) if n else math.nan


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


# --- shown -----------------------------------------------------------------------------------------------------------


def card_lines(card: dict[str, Any]) -> Iterator[str]:
    """The card as a few lines of text, with what to think of it."""

    def told(name: str, form: str = ".3f") -> str:
        return "-" if card[name] is None else format(card[name], form)

    yield (
        f"accuracy   {told('accuracy')} +- {told('accuracy_standard_error')} on {card['n_pairs']:,} held-out pairs; "
        f"{told('accuracy_longer_better')} where the better answer is the longer, {told('accuracy_shorter_better')} "
        "where it is the shorter"
    )
    for group in card["accuracy_by_length_gap"]:
        span = f"{group['from_tokens']:+d} to {group['to_tokens']:+d}"
        yield f"           {group['accuracy']:.3f} of {group['n']:,} pairs whose better answer has {span} tokens"
    yield (
        f"length     correlation with the reward {told('length_correlation', '+.2f')}, within a prompt "
        f"{told('length_correlation_within_prompt', '+.2f')}; prefers the longer in "
        f"{told('longer_preferred_frac')} of the pairs, the data in {told('longer_better_frac')}"
    )
    yield f"certainty  calibration error {told('calibration_error')}, log loss {told('log_loss')} (0.693: knows nothing)"
    yield f"rewards    mean {told('reward_mean', '+.3f')}, standard deviation {told('reward_std')}"


def draw_card(card: dict[str, Any], path: Path, title: str) -> Path | None:
    """Draws margins, calibration and accuracy by length gap; None where Matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), dpi=110)
    edges, counts = np.array(card["margins"]["edges"]), card["margins"]["counts"]
    if counts:
        left.bar(
            edges[:-1], counts, np.diff(edges), align="edge", color=["#c44" if e < 0 else "#47a" for e in edges[:-1]]
        )
    left.axvline(0, color="black", lw=1)
    left.set(xlabel="score of the better answer - of the worse", ylabel="pairs", title="margins")
    bins = card["calibration_bins"]
    middle.plot([0.5, 1], [0.5, 1], color="gray", ls="--", lw=1, label="earned")
    middle.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], marker="o", label="measured")
    middle.set(xlabel="confidence, sigmoid(|margin|)", ylabel="share right", title="calibration", xlim=(0.5, 1.02))
    middle.set_ylim(0, 1.05)
    middle.legend(loc="lower right")
    groups = card["accuracy_by_length_gap"]
    names = [f"{g['from_tokens']:+d}..{g['to_tokens']:+d}" for g in groups]
    right.bar(range(len(groups)), [g["accuracy"] for g in groups], color="#47a")
    right.axhline(0.5, color="gray", ls="--", lw=1)
    right.set_xticks(range(len(groups)), names, rotation=20)
    right.set(xlabel="tokens the better answer is longer", title="accuracy by length gap", ylim=(0, 1.05))
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path
