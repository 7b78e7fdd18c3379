"""Which questions of a benchmark stand in a text: they share so many units in a row with it.

A unit is a word, or one character of a script without spaces between words, so 13 of them are 13 words of English or 13
characters of Chinese (Brown et al. 2020, arXiv 2005.14165, appendix C, has 13 words). Spelling counts as it is, small and
capital letters do not; punctuation and spaces belong to no unit. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llmkit.data.grams import Hashes, grams_of, kinds_of, points_of, unit_starts

N = 13
LEAST = 8  # units: a question of fewer is found anywhere


@dataclass(frozen=True)
class Overlap:
    """How much of each question is known."""

    shares: list[float | None]
    """Of each question's runs of units, the share that stands in the texts; None: it has fewer than LEAST units."""

    @property
    def is_dirty(self) -> list[bool | None]:
        """Whether any of them does."""
        return [None if share is None else share > 0 for share in self.shares]


def overlap(questions: Sequence[str], texts: Iterable[str], on_text: Callable[[int], None] = lambda n: None) -> Overlap:
    """Looks for the runs of N units of every question in texts; one that is shorter, from LEAST on, is looked for whole.

    Takes one pass and, besides the questions' own, the memory of one text.

    Args:
        questions: with their answers, if these are to be looked for too.
        texts: what a model has learnt from.
        on_text: called with the number of texts read since the last call.
    """
    lengths = [min(N, _n_units(question)) for question in questions]
    grams = [
        grams_of(points_of(q.casefold()), n) if n >= LEAST else None for q, n in zip(questions, lengths, strict=True)
    ]
    wanted: dict[int, Hashes] = {}
    for n in set(lengths):
        of_length = [g for g, length in zip(grams, lengths, strict=True) if g is not None and length == n]
        if of_length:
            wanted[n] = np.unique(np.concatenate(of_length))
    seen = {n: np.zeros(len(hashes), bool) for n, hashes in wanted.items()}
    for text in texts:
        points = points_of(text.casefold())
        for n, hashes in wanted.items():
            there = grams_of(points, n)
            at = np.minimum(np.searchsorted(hashes, there), len(hashes) - 1)
            seen[n][at[hashes[at] == there]] = True
        on_text(1)
    shares: list[float | None] = []
    for n, own in zip(lengths, grams, strict=True):
        shares.append(None if own is None else float(seen[n][np.searchsorted(wanted[n], own)].mean()))
    return Overlap(shares)


def _n_units(text: str) -> int:
    return len(unit_starts(kinds_of(points_of(text.casefold()))))
