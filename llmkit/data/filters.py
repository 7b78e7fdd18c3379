"""What makes a document worth learning from, measured as pure functions of its text. Torch-free.

Every measure is a share between 0 and 1 or a count, taken in characters, lines or units (see `grams`), so that Chinese,
which has no spaces, is judged as English is. The rules and, where nothing else is said, their thresholds are those of
Gopher (Rae et al., arXiv 2112.11446, appendix A.1, table A1), whose words are our units.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llmkit.data import grams
from llmkit.data.config import CleanConfig

_URL_LINE = re.compile(r"\s*(?:https?://|www\.)\S+\s*", re.IGNORECASE)
_BULLETS = tuple("•‣⁃∙●○■□▪▫◆◇★☆►▶·※-*+–—")
_ELLIPSIS = re.compile(r"…+|\.{3,}|。{3,}")
_PARAGRAPH = re.compile(r"\n\s*\n")
# UTF-8 read as Latin-1 or Windows-1252: a leading byte, and as many following bytes as it announces.
_NEXT = (
    "[\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013\u2014\u2018-\u201e"
    "\u2020-\u2022\u2026\u2030\u2039\u203a\u20ac\u2122]"
)
# And UTF-8 read as GBK: what the first two bytes of Chinese punctuation and of 的 become, which no one writes; and what
# GBK makes of two replacement characters.
_MOJIBAKE = re.compile(
    f"[\u00c3-\u00df]{_NEXT}|[\u00e0-\u00ef]{_NEXT}{{2}}|[\u00f0-\u00f4]{_NEXT}{{3}}|[锛銆鐨鈥]|锟斤拷"
)


class View:
    """A document as the measures look at it; each way of looking is computed when it is first needed."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def lines(self) -> list[str]:
        """Lines with something on them, without the blanks around it."""
        return [s for line in self.text.split("\n") if (s := line.strip())]

    @cached_property
    def paragraphs(self) -> list[str]:
        """What blank lines divide."""
        return [s for part in _PARAGRAPH.split(self.text) if (s := part.strip())]

    @cached_property
    def points(self) -> NDArray[np.uint32]:
        return grams.points_of(self.text)

    @cached_property
    def kinds(self) -> NDArray[np.uint8]:
        return grams.kinds_of(self.points)

    @cached_property
    def counts(self) -> list[int]:
        """How many characters there are of each kind."""
        return np.bincount(self.kinds, minlength=grams.N_KINDS).tolist()

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where the units begin."""
        return grams.unit_starts(self.kinds)


# --- measures -------------------------------------------------------------------------------------------------------


def n_chars(view: View) -> float:
    return len(view.text)


def letters(view: View) -> float:
    """Share of the characters, blanks aside, that are letters or numerals of any script."""
    counts = view.counts
    words = counts[grams.LETTER] + counts[grams.SINGLE] + counts[grams.NUMBER]
    return words / max(1, len(view.text) - counts[grams.SPACE])


def symbols(view: View) -> float:
    """Hash signs and ellipses for each unit."""
    text = view.text
    n = text.count("#")
    if "…" in text or "..." in text or "。。。" in text:
        n += sum(1 for _ in _ELLIPSIS.finditer(text))
    return n / max(1, len(view.starts)) if n else 0.0


def bullet_lines(view: View) -> float:
    """Share of the lines that begin with a bullet."""
    return sum(line.startswith(_BULLETS) for line in view.lines) / max(1, len(view.lines))


def ellipsis_lines(view: View) -> float:
    """Share of the lines that end with an ellipsis."""
    return sum(line.endswith(("…", "...", "。。。")) for line in view.lines) / max(1, len(view.lines))


def repeated_lines(view: View) -> float:
    """Share of the lines that stood before; of three lines or fewer none counts as repeated."""
    n = len(view.lines)
    return 1 - len(set(view.lines)) / n if n > 3 else 0.0


def repeated_line_chars(view: View) -> float:
    """Share of the characters on lines that stood before."""
    total = sum(map(len, view.lines))
    return 1 - sum(map(len, set(view.lines))) / max(1, total)


def repeated_paragraphs(view: View) -> float:
    """Share of the paragraphs that stood before."""
    return 1 - len(set(view.paragraphs)) / max(1, len(view.paragraphs))


def repeated_grams(view: View) -> float:
    """Share of the units that lie in a run of ten words that stood before; of twenty units if most are characters."""
    n_units = len(view.starts)
    n = 20 if 2 * view.counts[grams.SINGLE] > n_units else 10
    if n_units <= n:
        return 0.0
    hashes = grams.gram_hashes(grams.unit_hashes(view.points, view.kinds, view.starts), n)
    ordered = np.sort(hashes)
    if not (ordered[1:] == ordered[:-1]).any():
        return 0.0
    again = np.ones(len(hashes), np.bool_)
    again[np.unique(hashes, return_index=True)[1]] = False
    first = np.flatnonzero(again)
    edges = np.zeros(n_units + 1, np.int32)
    edges[first] += 1
    edges[first + n] -= 1
    return float(np.count_nonzero(np.cumsum(edges))) / n_units


def replacement_chars(view: View) -> float:
    return view.counts[grams.REPLACEMENT] / max(1, len(view.text))


def control_chars(view: View) -> float:
    return view.counts[grams.CONTROL] / max(1, len(view.text))


def mojibake(view: View) -> float:
    """Share of the characters that are traces of UTF-8 read as Latin-1, Windows-1252 or GBK."""
    if view.text.isascii():
        return 0.0
    return sum(len(m[0]) for m in _MOJIBAKE.finditer(view.text)) / max(1, len(view.text))


# --- rules ----------------------------------------------------------------------------------------------------------

MEASURES: dict[str, Callable[[View], float]] = {  # from the cheapest to the dearest
    "chars": n_chars,
    "mojibake": mojibake,
    "control_chars": control_chars,
    "replacement_chars": replacement_chars,
    "letters": letters,
    "repeated_lines": repeated_lines,
    "repeated_line_chars": repeated_line_chars,
    "repeated_paragraphs": repeated_paragraphs,
    "bullet_lines": bullet_lines,
    "ellipsis_lines": ellipsis_lines,
    "symbols": symbols,
    "repeated_grams": repeated_grams,
}


class Cleaner:
    """The rules of a recipe, applied to one document after the other."""

    def __init__(self, cfg: CleanConfig):
        self._drops_url_lines = cfg.drop_url_lines
        bounds = cfg.rules
        self._rules = [
            (name, measure, bounds[name])
            for key, measure in MEASURES.items()
            for name in (f"min_{key}", f"max_{key}")
            if bounds.get(name) is not None
        ]

    def edit(self, text: str) -> str:
        """The document without the lines that are nothing but an address."""
        if not self._drops_url_lines or ("://" not in text and "www." not in text.lower()):
            return text
        return "\n".join(line for line in text.split("\n") if not _URL_LINE.fullmatch(line))

    def broken_rule(self, text: str) -> str | None:
        """The first rule that the document breaks, by its name in the recipe. An empty one breaks none."""
        view = View(text)
        for name, measure, bound in self._rules if text else ():
            value = measure(view)
            if value > bound if name.startswith("max_") else value < bound:
                return name
        return None
