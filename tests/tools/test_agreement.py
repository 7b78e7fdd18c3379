"""Agreement of annotators: published figures, SciPy's, and what full agreement and none must give."""

from __future__ import annotations

import math
import random

import pytest
from scipy.stats import kendalltau

from llmkit.tools.agreement import agreement_of, kendall_tau, krippendorff_alpha, ranks_of

# Krippendorff 2011, part C: four observers, twelve units, a dot where one said nothing. Ordinal alpha: 0.815.
OBSERVERS = ("1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 .")


def test_krippendorffs_own_example() -> None:
    columns = zip(*(line.split() for line in OBSERVERS), strict=True)
    units = [[float(value) for value in column if value != "."] for column in columns]
    assert krippendorff_alpha(units) == pytest.approx(0.815, abs=5e-4)


def test_alpha_at_its_ends() -> None:
    assert krippendorff_alpha([[1, 1], [2, 2], [3, 3, 3]]) == pytest.approx(1)
    pick = random.Random(0)
    noise = [[pick.randint(1, 4) for _ in range(3)] for _ in range(4000)]
    assert abs(krippendorff_alpha(noise)) < 0.03
    assert krippendorff_alpha([[1, 3], [3, 1]]) < 0
    assert math.isnan(krippendorff_alpha([[1], [2]])) and math.isnan(krippendorff_alpha([[2, 2]]))


def test_tau_is_scipys() -> None:
    pick = random.Random(1)
    for _ in range(300):
        n = pick.randint(2, 6)
        rankings = []
        for _ in range(2):
            order = pick.sample(range(n), n)
            cuts = sorted(pick.sample(range(1, n), pick.randint(0, n - 1)))
            rankings.append([order[a:b] for a, b in zip([0, *cuts], [*cuts, n], strict=True)])
        places = [[ranks_of(ranking)[i] for i in range(n)] for ranking in rankings]
        mine, theirs = kendall_tau(*rankings), kendalltau(*places).statistic
        assert mine == pytest.approx(theirs) or (math.isnan(mine) and math.isnan(theirs))
    assert ranks_of([2, [0, 3], 1]) == {2: 1, 0: 2.5, 3: 2.5, 1: 4}


def test_of_several_people() -> None:
    judged = {"a": {1: [0, 1, 2], 2: [1, 0]}, "b": {1: [0, [1, 2]], 3: [0, 1]}, "c": {3: [1, 0]}}
    told = agreement_of(judged)
    assert told["judged"] == {"a": 2, "b": 2, "c": 1}
    (ab, bc) = told["pairs"]
    assert (ab["a"], ab["b"], ab["n_prompts"], ab["same"]) == ("a", "b", 1, 1.0) and 0.8 < ab["tau"] < 0.82
    assert (bc["tau"], bc["same"]) == (-1.0, 0.0) and 0 < told["alpha"] < 0.9
    assert agreement_of({"a": {1: [0, 1]}}) == {"judged": {"a": 1}, "pairs": [], "alpha": None}
