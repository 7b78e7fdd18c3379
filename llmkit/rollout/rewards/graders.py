"""Graders of an answer's text by rules: exact, numeric, choice, regex, length, format."""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from llmkit.config import UserError
from llmkit.rollout.rewards.config import (
    ChoiceReward,
    ExactReward,
    FormatReward,
    LengthReward,
    NumericReward,
    RegexReward,
)
from llmkit.rollout.rewards.grading import Answer, EachAnswer, Grade, column
from llmkit.rollout.rewards.quantities import Number, last_number, marked_number

_FINAL = " \t\r\n\v\f\u3000.!?。！？…．｡"


def extracted(pattern: str | None, text: str) -> str | None:
    """What of an answer is graded: the last match's first group, or all of it; None if the pattern isn't found."""
    if pattern is None:
        return text
    matches = deque(re.finditer(pattern, text, re.DOTALL), maxlen=1)
    if not matches:
        return None
    return matches[0][1] if matches[0].re.groups else matches[0][0]


def _texts(value: Any, name: str) -> list[str]:
    """Right answers as texts: one or a list, numbers too. Raises UserError for anything else."""
    values = value if isinstance(value, list) else [value]
    for one in values:
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            raise UserError(f"'{name}' must be text, a number or a list of them (got {one!r})")
    return [str(one) for one in values]


class ExactGrader(EachAnswer):
    """1 if the answer equals a right one, after the same normalisation of both."""

    def __init__(self, config: ExactReward):
        self.config = config

    def normalise(self, text: str) -> str:
        """The text without what doesn't count."""
        config = self.config
        text = unicodedata.normalize("NFKC", text) if config.nfkc else text
        text = " ".join(text.split()) if config.ignore_whitespace else text
        text = text.rstrip(_FINAL) if config.ignore_final_punctuation else text
        return text.casefold() if config.ignore_case else text

    def right(self, fields: Mapping[str, Any]) -> list[str] | None:
        value = column(fields, self.config.field)
        if value is None:
            return None
        accept = fields.get(self.config.accept) if self.config.accept is not None else None
        more = [] if accept is None else _texts(accept, str(self.config.accept))
        return [self.normalise(text) for text in (*_texts(value, self.config.field), *more)]

    def check(self, fields: Mapping[str, Any]) -> None:
        self.right(fields)

    def one(self, answer: Answer) -> Grade:
        right = self.right(answer.fields)
        if right is None:
            return None
        given = extracted(self.config.extract, answer.text)
        return float(given is not None and self.normalise(given) in right)


class NumericGrader(EachAnswer):
    """1 if the number that the answer ends in is the right one."""

    def __init__(self, config: NumericReward):
        self.config = config

    def right(self, fields: Mapping[str, Any]) -> list[Number] | None:
        name = self.config.field
        value = column(fields, name)
        if value is None:
            return None
        found = []
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int | float) and not isinstance(one, bool):
                found.append(Number(Fraction(str(one)), False, 0, False))
                continue
            number = marked_number(one) or last_number(one) if isinstance(one, str) else None
            if number is None:
                raise UserError(f"'{name}' holds no number (got {one!r})")
            found.append(number)
        return found

    def check(self, fields: Mapping[str, Any]) -> None:
        self.right(fields)

    def one(self, answer: Answer) -> Grade:
        config, right = self.config, self.right(answer.fields)
        if right is None:
            return None
        text = extracted(config.extract, answer.text)
        given = None if text is None else marked_number(text)
        if given is None and text is not None and not config.marked:
            given = last_number(text)
        if given is None:
            return 0.0
        return float(any(given.equals(r, config.tolerance, config.relative_tolerance) for r in right))


# What stands before a letter that is the answer, and what may surround the letter.
_BEFORE = (
    r"(?:\banswer\b[^\n.]{0,40}?(?:\bis\b|:|=)|\b(?:choose|pick|select|option|choice)\b|答案(?:应该|应当|就)?(?:是|为|為|:)?"
    r"|应?选择?(?:项|是|为|:)?|故选|而是|####|<answer>|\\boxed\s*\{)"
)
_MARKED = re.compile(
    rf"{_BEFORE}\s*:?\s*(?:(?:the|option|choice|letter|选项)\s*)?(?:\\text\s*\{{)?[\s*_(\[\"'`“「【]*([A-Za-z])(?![A-Za-z'’])",
    re.IGNORECASE,
)
_LEADING = re.compile(r"^[\s*_(\[\"'`“「【]*([A-Za-z])(?:[\s*_\])\"'`”」】]*$|[*_\])】」]*[.:)、,])")
_ALONE = re.compile(r"(?<![A-Za-z'’])([A-Z])(?![A-Za-z'’])")


def chosen_letter(text: str, letters: str) -> str | None:
    """The letter that a text chooses, in capitals; None if it chooses none, or several with nothing to tell which.

    In this order: the last one that is marked ("the answer is (C)", 选 C, `\\boxed{C}`); the one that the text begins
    with ("C. Because"); the only capital that stands alone.
    """
    text = unicodedata.normalize("NFKC", text)
    marked = [m[1].upper() for m in _MARKED.finditer(text) if not _is_article(text, m)]
    marked = [letter for letter in marked if letter in letters]
    if marked:
        return marked[-1]
    leading = _LEADING.match(text)
    if leading and leading[1].upper() in letters:
        return leading[1].upper()
    alone = {m[1] for m in _ALONE.finditer(text) if not _is_article(text, m)} & set(letters)
    return alone.pop() if len(alone) == 1 else None


def _is_article(text: str, match: re.Match[str]) -> bool:
    """ "The answer is a house", "A house", "I think": a word follows; "the answer is A because" is taken for a letter."""
    rest = text[match.end(1) :]
    word = re.match(r"\s+([A-Za-z]+)", rest)
    if word is None or match[1] not in ("a", "A", "I"):
        return False
    return word[1].lower() not in ("because", "since", "as", "and", "is", "but", "with", "for")


class ChoiceGrader(EachAnswer):
    """1 if the answer chooses the right option, by its letter or its text."""

    def __init__(self, config: ChoiceReward):
        self.config = config
        self._plain = ExactGrader(ExactReward(kind="exact"))

    def options(self, fields: Mapping[str, Any]) -> list[str]:
        """The texts of the options; none where the row has none."""
        value = fields.get(self.config.choices) if self.config.choices is not None else None
        if value is None:
            return []
        if not isinstance(value, list) or not 2 <= len(value) <= 26:
            raise UserError(f"'{self.config.choices}' must be a list of 2 to 26 options (got {value!r})")
        return _texts(value, str(self.config.choices))

    def right(self, fields: Mapping[str, Any]) -> tuple[str, str] | None:
        """The right letter, and all letters."""
        value, options = column(fields, self.config.field), self.options(fields)
        if value is None:
            return None
        n = len(options) or self.config.n_choices
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:n]
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < n:
            return letters[value], letters
        if isinstance(value, str):
            given = value.strip().strip("().").upper()
            if len(given) == 1 and given in letters:
                return given, letters
            plain = [self._plain.normalise(option) for option in options]
            if plain.count(self._plain.normalise(value)) == 1:
                return letters[plain.index(self._plain.normalise(value))], letters
        what = f"one of {', '.join(letters)}, an index below {n}" + (", or an option's text" if options else "")
        raise UserError(f"'{self.config.field}' must be {what} (got {value!r})")

    def check(self, fields: Mapping[str, Any]) -> None:
        self.right(fields)

    def one(self, answer: Answer) -> Grade:
        found = self.right(answer.fields)
        if found is None:
            return None
        right, letters = found
        text = extracted(self.config.extract, answer.text)
        if text is None:
            return 0.0
        given = self._plain.normalise(text)
        plain = [self._plain.normalise(option) for option in self.options(answer.fields)]
        if plain.count(given) == 1:
            return float(letters[plain.index(given)] == right)
        return float(chosen_letter(text, letters) == right)


class RegexGrader(EachAnswer):
    """1 if the pattern is found."""

    def __init__(self, config: RegexReward):
        self.config = config
        self.pattern = re.compile(config.pattern, re.DOTALL | (re.IGNORECASE if config.ignore_case else 0))

    def one(self, answer: Answer) -> Grade:
        text = extracted(self.config.extract, answer.text)
        if text is None:
            return 0.0
        found = self.pattern.fullmatch(text) if self.config.whole else self.pattern.search(text)
        return float(found is not None)


class LengthGrader(EachAnswer):
    """A penalty above a maximum, or closeness to a target."""

    def __init__(self, config: LengthReward):
        self.config = config

    def one(self, answer: Answer) -> Grade:
        config = self.config
        n = answer.length if config.unit == "tokens" else len(answer.text)
        if config.target is not None:
            return max(0.0, 1 - abs(n - config.target) / (config.spread or config.target))
        assert config.max is not None
        if not config.buffer:
            return -float(n > config.max)
        return max(-1.0, min(0.0, (config.max - config.buffer - n) / config.buffer))


class FormatGrader(EachAnswer):
    """Whether the tags stand in their order, each once and not empty."""

    def __init__(self, config: FormatReward):
        self.config = config

    def one(self, answer: Answer) -> Grade:
        text, at, good, outside = answer.text, 0, 0, ""
        for tag in self.config.tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            start = text.find(opening, at)
            end = text.find(closing, start)
            if start < 0 or end < 0 or text.count(opening) > 1 or text.count(closing) > 1:
                continue
            if not text[start + len(opening) : end].strip():
                continue
            good += 1
            outside += text[at:start]
            at = end + len(closing)
        n = len(self.config.tags)
        if good == n and self.config.strict and (outside + text[at:]).strip():
            good -= 1
        return good / n if self.config.partial else float(good == n)
