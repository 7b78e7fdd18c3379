"""DROP's two figures for a written answer: exact match and F1 over spans (Dua et al. 2019, arXiv 1903.00161, section 5).

Text is compared in small letters, without articles, punctuation and surplus blanks; numbers as numbers. Spans of both sides
are paired one to one so that the sum of their F1 is largest, and a pair whose right side has a number that the other lacks
counts nothing.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from functools import cache

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def drop_scores(answer: str, right: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Exact match and F1 of an answer: each the best over the right answers, each of which is one or several spans.

    The answer is one span; where a right answer has several, the answer is also read as a list with commas.
    """
    best = (0.0, 0.0)
    for spans in right:
        readings = [[answer]]
        if len(spans) > 1:
            readings.append([part for part in re.split(r",|;|\band\b", answer) if part.strip()] or [answer])
        for given in readings:
            exact, f1 = _compared(given, spans)
            best = (max(best[0], exact), max(best[1], f1))
    return best


def _compared(given: Sequence[str], right: Sequence[str]) -> tuple[float, float]:
    texts, right_texts = [normal(s) for s in given], [normal(s) for s in right]
    exact = float(sorted(texts) == sorted(right_texts))
    f1s = [[_f1(set(a.split()), set(b.split())) for b in right_texts] for a in texts]
    return exact, round(_best_pairs(f1s) / max(len(texts), len(right_texts)), 2)


def _best_pairs(values: Sequence[Sequence[float]]) -> float:
    """The largest sum of values of which no two share a row or a column."""
    rows = values if len(values) >= len(values[0]) else [list(column) for column in zip(*values, strict=True)]
    n = len(rows[0])
    if n > 12:  # nobody asks for so many spans: the best first is close enough
        order = sorted(((v, i, j) for i, row in enumerate(rows) for j, v in enumerate(row)), reverse=True)
        used_i, used_j, total = set(), set(), 0.0
        for v, i, j in order:
            if i not in used_i and j not in used_j:
                used_i.add(i)
                used_j.add(j)
                total += v
        return total

    @cache
    def best(i: int, taken: int) -> float:
        if i == len(rows):
            return 0.0
        found = best(i + 1, taken)
        for j in range(n):
            if not taken >> j & 1:
                found = max(found, rows[i][j] + best(i + 1, taken | 1 << j))
        return found

    return best(0, 0)


def _f1(given: set[str], right: set[str]) -> float:
    numbers = {word for word in right if _is_number(word)}
    if numbers and not numbers & given:
        return 0.0
    shared = len(given & right)
    if not shared:
        return float(not given and not right)
    return 2 * shared / (len(given) + len(right))


def normal(text: str) -> str:
    """The text as it is compared."""
    words = []
    for word in re.split(r"[ \-\n\t]", text.lower()):
        plain = word if _is_number(word) else word.translate(_PUNCTUATION)
        plain = str(float(plain)) if _is_number(plain) else _ARTICLES.sub(" ", plain)
        words += plain.split()
    return " ".join(words)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
