"""Permutations are bijections that look random; mixtures keep their shares at every moment."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from llmkit.data.order import Mixture, Permutation, epoch_key

SIZES = sorted({*range(1, 40), 97, 1009, *(2**k + d for k in (6, 8, 9, 10, 12, 13) for d in (-1, 0, 1))})


@pytest.mark.parametrize("n", SIZES)
def test_permutation_is_a_bijection(n: int) -> None:
    """B39, B42: every row exactly once."""
    moved = Permutation(n, epoch_key(7, 0, n)).many(np.arange(n))
    assert np.array_equal(np.sort(moved), np.arange(n))


@given(st.integers(1, 2**62), st.integers(0, 2**128 - 1), st.data())
@settings(max_examples=50, deadline=None)
def test_permutation_of_one_index_and_of_many_agree(n: int, key: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, n - 1), max_size=5))
    permutation = Permutation(n, key)
    moved = [permutation(i) for i in indices]
    assert permutation.many(np.array(indices, np.int64)).tolist() == moved
    assert all(0 <= m < n for m in moved) and len(set(moved)) == len(set(indices))


def test_permutation_never_changes() -> None:
    """The order of old runs depends on these numbers."""
    assert Permutation(10, epoch_key(0, 0, 0)).many(np.arange(10)).tolist() == [9, 5, 7, 6, 8, 3, 4, 0, 1, 2]
    assert Permutation(2**40, epoch_key(1, 2, 3))(12345) == 301731581570


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_permutations_are_equally_likely(n: int) -> None:
    index = {p: i for i, p in enumerate(permutations(range(n)))}
    trials = 40 * len(index)
    seen = np.zeros(len(index))
    for seed in range(trials):
        seen[index[tuple(Permutation(n, epoch_key(seed, 0, 0)).many(np.arange(n)).tolist())]] += 1
    assert stats.chisquare(seen).pvalue > 1e-4


@pytest.mark.parametrize("n", [16, 300])
def test_places_are_equally_likely_over_epochs(n: int) -> None:
    """B42: where an index lands is uniform, and independent of where its neighbour lands."""
    indices = np.array([0, 1, 7, n - 1])
    moved = np.array([Permutation(n, epoch_key(0, 0, e)).many(indices) for e in range(4000)])
    for column in moved.T:
        assert stats.chisquare(np.bincount(column, minlength=n)).pvalue > 1e-4
    gaps = (moved[:, 1] - moved[:, 0]) % n
    assert stats.chisquare(np.bincount(gaps, minlength=n)[1:]).pvalue > 1e-4


def test_epochs_seeds_and_sources_differ() -> None:
    """B40: no epoch repeats another's order."""
    keys = [epoch_key(s, source, e) for s in range(4) for source in range(4) for e in range(16)]
    orders = {tuple(Permutation(1000, k).many(np.arange(1000)).tolist()) for k in keys}
    assert len(orders) == len(keys)


def test_permutation_refuses_what_it_cannot_order() -> None:
    with pytest.raises(ValueError, match="1 to"):
        Permutation(0, 1)
    with pytest.raises(IndexError):
        Permutation(5, 1)(5)
    with pytest.raises(IndexError):
        Permutation(5, 1)(-1)
    with pytest.raises(IndexError):
        Permutation(5, 1).many(np.array([0, 5]))
    with pytest.raises(IndexError):
        Permutation(5, 1).many(np.array([-1]))


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9), st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_mixture_keeps_its_shares_at_every_moment(weights: list[float], start: int) -> None:
    """B42, D2: after any number of samples the counts are right, and indices count up without a gap."""
    mixture = Mixture(weights)
    source, index = mixture.many(np.arange(start, start + 300))
    counts = mixture.counts(start)
    total = sum(weights)
    slack = math.ceil(math.log2(len(weights))) + 1e-9 + start * len(weights) / 2**32
    for n, (s, i) in enumerate(zip(source.tolist(), index.tolist(), strict=True), start):
        assert i == counts[s]
        counts[s] += 1
        assert sum(counts) == n + 1
        assert abs(counts[s] - (n + 1) * weights[s] / total) <= max(slack, 1e-9)
    assert counts == mixture.counts(start + 300)


def test_mixture_of_two_is_off_by_less_than_one() -> None:
    mixture = Mixture([0.7, 0.3])
    source, _ = mixture.many(np.arange(10_000))
    n = np.arange(1, 10_001)
    assert np.abs(np.cumsum(source == 0) - 0.7 * n).max() < 1 + 1e-5


def test_mixture_spreads_each_source_evenly() -> None:
    """No bursts: the gaps between samples of a source are about equal."""
    source, _ = Mixture([8, 1, 1]).many(np.arange(10_000))
    gaps = np.diff(np.flatnonzero(source == 2))
    assert gaps.max() <= 20


def test_mixture_of_one_is_the_identity() -> None:
    assert Mixture([3.0])(123456789) == (0, 123456789)


def test_mixture_has_no_overflow() -> None:
    mixture = Mixture([1.0, 2.0])
    g = 2**61 + 12345
    source, index = mixture(g)
    assert index == mixture.counts(g)[source]


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, -1.0], [float("nan")], [float("inf")]])
def test_mixture_refuses_impossible_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        Mixture(weights)
