"""Text as arrays: kinds of characters, units, and hashes of units in a row. Torch-free.

A unit is a word, or a single character of a script that writes no spaces between words (Chinese, Japanese, Thai, Lao,
Khmer, Burmese). So one rule counts, compares and cuts text of any language, and of several mixed; no language has to be
detected. Punctuation, spaces and symbols belong to no unit.
"""

from __future__ import annotations

import sys
import unicodedata
from functools import cache

import numpy as np
from numpy.typing import NDArray

OTHER, LETTER, SINGLE, NUMBER, SPACE, MARK, CONTROL, REPLACEMENT, N_KINDS = range(9)
# Han and its extensions, kana; Thai and Lao; Burmese; Khmer.
_SINGLE = (
    (0x3005, 0x3007),
    (0x3041, 0x30FF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
    (0x0E01, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
)
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64

Hashes = NDArray[np.uint64]


@cache
def _kinds() -> NDArray[np.uint8]:
    """The kind of every code point, from the Unicode database."""
    of_category = {"L": LETTER, "M": LETTER, "N": NUMBER, "Z": SPACE, "P": MARK, "S": MARK, "C": OTHER}
    names = map(unicodedata.category, map(chr, range(sys.maxunicode + 1)))
    kinds = np.fromiter((CONTROL if n == "Cc" else of_category[n[0]] for n in names), np.uint8, sys.maxunicode + 1)
    kinds[[9, 10, 11, 12, 13, 0x85]] = SPACE
    kinds[0xFFFD] = REPLACEMENT
    for first, last in _SINGLE:
        letters = kinds[first : last + 1]
        letters[letters == LETTER] = SINGLE
    kinds[0x3007] = SINGLE  # 〇, which Unicode calls a number
    return kinds


def points_of(text: str) -> NDArray[np.uint32]:
    """The code points of a text."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def kinds_of(points: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """The kind of each character: one of the constants above."""
    return _kinds()[points]


def unit_starts(kinds: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Where each unit begins."""
    in_word = (kinds == LETTER) | (kinds == NUMBER)
    begins = in_word.copy()
    begins[1:] &= ~in_word[:-1]
    return np.flatnonzero(begins | (kinds == SINGLE))


@cache
def _powers(base: int, n: int) -> Hashes:
    """base**0 ... base**(n - 1) modulo 2**64."""
    powers = np.full(n, base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


def _mixed(hashes: Hashes) -> Hashes:
    """Spreads every bit over all (the finaliser of MurmurHash3)."""
    for shift, factor in ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53)):
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
    return hashes ^ (hashes >> np.uint64(33))


def unit_hashes(points: NDArray[np.uint32], kinds: NDArray[np.uint8], starts: NDArray[np.int64]) -> Hashes:
    """A hash of each unit's characters, equal wherever it stands: a polynomial in its code points."""
    if not len(starts):
        return np.empty(0, np.uint64)
    room = 1 << max(len(points) - 1, 1 << 12).bit_length()  # few lengths, so that the powers are made once
    values = points.astype(np.uint64)
    values *= (kinds == LETTER) | (kinds == NUMBER) | (kinds == SINGLE)
    values *= _powers(_BASE, room)[: len(points)]
    sums: Hashes = np.add.reduceat(values, starts)
    return _mixed(sums * _powers(pow(_BASE, -1, 1 << 64), room)[starts])


def gram_hashes(units: Hashes, n: int) -> Hashes:
    """A hash of every n units in a row; of fewer units than n one hash of all, of none none."""
    n = min(n, len(units))
    if not n:
        return units
    # The hash of a + b units is that of a and, times a power, that of the b behind them: so runs are put together from
    # runs of 1, 2, 4, 8 ... units.
    result, done = np.zeros(len(units) + 1, np.uint64), 0
    runs, length = units, 1
    while True:
        if n & length:
            result = result[: len(units) - done - length + 1]
            result = result + runs[done:][: len(result)] * _power(done)
            done += length
        if done == n:
            return _mixed(result)
        runs = runs[:-length] + runs[length:] * _power(length)
        length *= 2


@cache
def _power(n: int) -> np.uint64:
    return np.uint64(pow(_BASE, n, 1 << 64))


def grams_of(points: NDArray[np.uint32], n: int) -> Hashes:
    """The hashes of every n units in a row of a text."""
    kinds = kinds_of(points)
    return gram_hashes(unit_hashes(points, kinds, unit_starts(kinds)), n)
