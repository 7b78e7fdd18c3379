"""How far several people agree who ranked the same answers."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Ranking = Sequence[int | Sequence[int]]
Judged = Mapping[str, Mapping[int, Ranking]]
"""Of each person, the rankings by prompt."""


def ranks_of(ranking: Ranking) -> dict[int, float]:
    """The place of each answer, 1 for the best; answers that are equally good share the mean of theirs."""
    ranks: dict[int, float] = {}
    for group in ranking:
        members = [group] if isinstance(group, int) else list(group)
        place = len(ranks) + (len(members) + 1) / 2
        ranks.update(dict.fromkeys(members, place))
    return ranks


def kendall_tau(a: Ranking, b: Ranking) -> float:
    """Kendall's tau-b of two rankings of the same answers (Kendall 1945, "The treatment of ties in ranking problems").

    (concordant - discordant) / sqrt(pairs that a tells apart x pairs that b tells apart); NaN where one tells none apart.
    """
    x, y = ranks_of(a), ranks_of(b)
    agreed, told_a, told_b = 0, 0, 0
    for i, j in itertools.combinations(sorted(x), 2):
        one, other = _sign(x[i] - x[j]), _sign(y[i] - y[j])
        agreed += one * other
        told_a += one * one
        told_b += other * other
    return agreed / math.sqrt(told_a * told_b) if told_a and told_b else math.nan


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def krippendorff_alpha(units: Sequence[Sequence[float]]) -> float:
    """Krippendorff's alpha with the ordinal metric (Krippendorff 2011, "Computing Krippendorff's alpha-reliability").

    1 - observed / expected disagreement: 1 is full agreement, 0 what chance gives. Missing values are simply not there.

    Args:
        units: of each unit the values that it was given; one that was given fewer than two says nothing.

    Returns:
        NaN where no unit has two values, or all values are the same.
    """
    pairable = [values for values in units if len(values) > 1]
    totals = Counter(value for values in pairable for value in values)
    n, order = sum(totals.values()), sorted(totals)
    below, so_far = {}, 0.0
    for value in order:
        below[value] = so_far + totals[value] / 2
        so_far += totals[value]

    def distance(a: float, b: float) -> float:
        # The values between the two, and half of those that are one of them.
        return (below[a] - below[b]) ** 2

    observed = sum(
        sum(distance(a, b) for a, b in itertools.combinations(values, 2)) * 2 / (len(values) - 1) for values in pairable
    )
    expected = sum(totals[a] * totals[b] * distance(a, b) for a, b in itertools.combinations(order, 2)) * 2
    return 1 - (n - 1) * observed / expected if expected else math.nan


@dataclass(frozen=True)
class Agreed:
    """Two people, on the prompts that both have ranked."""

    a: str
    b: str
    n_prompts: int
    tau: float
    """The mean of Kendall's tau-b over these prompts."""
    same: float
    """Share of the pairs of answers, told apart by both, that they put the same way round."""


def agreement_of(judged: Judged) -> dict[str, Any]:
    """What `llmkit rank --serve` tells of its annotators, as JSON; a figure that there is no data for is null.

    `alpha` is over the places of all answers: each is a unit, and what each person gave it a value.
    """
    pairs = [_agreed(a, b, judged) for a, b in itertools.combinations(sorted(judged), 2)]
    places: dict[tuple[int, int], list[float]] = {}
    for rankings in judged.values():
        for prompt, ranking in rankings.items():
            for answer, place in ranks_of(ranking).items():
                places.setdefault((prompt, answer), []).append(place)
    return {
        "judged": {name: len(rankings) for name, rankings in sorted(judged.items())},
        "pairs": [{k: _number(v) for k, v in vars(pair).items()} for pair in pairs if pair.n_prompts],
        "alpha": _number(krippendorff_alpha(list(places.values()))),
    }


def _agreed(a: str, b: str, judged: Judged) -> Agreed:
    both = sorted(judged[a].keys() & judged[b].keys())
    taus = [t for n in both if not math.isnan(t := kendall_tau(judged[a][n], judged[b][n]))]
    same = [
        _sign(x[i] - x[j]) == _sign(y[i] - y[j])
        for n in both
        for x, y in [(ranks_of(judged[a][n]), ranks_of(judged[b][n]))]
        for i, j in itertools.combinations(sorted(x), 2)
        if x[i] != x[j] and y[i] != y[j]
    ]
    tau = sum(taus) / len(taus) if taus else math.nan
    return Agreed(a, b, len(both), tau, sum(same) / len(same) if same else math.nan)


def _number(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value
