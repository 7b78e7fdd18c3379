"""Numbers in text, as people and models write them, as exact fractions.

Read are: 1,234.5, -3, −3, 1.5e3, $5, 3/4, 1 3/4, 50%, \\frac{3}{4}, full-width digits, Chinese numerals (三千零五, 一点五,
三分之二, 百分之二十, 3万, 1.5亿, 负五) and the financial ones (贰佰).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

_LONGEST = 20_000  # characters of an answer's end that are searched for numbers
_MAX_DIGITS = 400

_DIGITS = {c: i for i, c in enumerate("零一二三四五六七八九")} | {
    "〇": 0, "两": 2, "兩": 2, "壹": 1, "贰": 2, "貳": 2, "叁": 3, "參": 3, "肆": 4, "伍": 5, "陆": 6, "陸": 6, "柒": 7,
    "捌": 8, "玖": 9,
}  # fmt: skip
_UNITS = {"十": 10, "拾": 10, "百": 100, "佰": 100, "千": 1000, "仟": 1000}
_MYRIADS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_HAN = "".join([*_DIGITS, *_UNITS, *_MYRIADS])

_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_HAN_NUMBER = rf"[{_HAN}]+(?:点[{''.join(_DIGITS)}]+)?"
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-−–]|负|負)?\s?[$€£¥]?\s?(?:"
    rf"\\[dt]?frac\{{\s*(?P<top>-?\d+)\s*\}}\s*\{{\s*(?P<bottom>\d+)\s*\}}"
    r"|(?P<whole>\d+)\s+(?P<n>\d+)/(?P<d>\d+)(?![\d/])"
    r"|(?P<n2>\d+)\s*/\s*(?P<d2>\d+)(?![\d/])"
    rf"|(?P<plain>{_PLAIN})(?:[eE](?P<exp>[-+]?\d{{1,3}})(?!\d))?(?P<myriad>\s?[万萬亿億]+)?"
    rf"|百分之(?P<per_cent>{_HAN_NUMBER}|{_PLAIN})"
    rf"|(?P<han_d>{_HAN_NUMBER})分之(?P<han_n>{_HAN_NUMBER})"
    rf"|(?P<han>{_HAN_NUMBER})"
    r")(?P<percent>\s?\\?%)?"
)


@dataclass(frozen=True)
class Number:
    """A number that was found."""

    value: Fraction
    """As written, 50 for 50 %."""
    percent: bool
    """A percent sign followed."""
    start: int
    """Where it begins in the text."""
    han: bool
    """It was written in Chinese numerals alone."""

    def equals(self, other: Number, tolerance: float = 0.0, relative: float = 0.0) -> bool:
        """Whether both are the same number, `other` being the right one; 50 % is 50 and 0.5 to one without a sign."""
        own = {self.value}
        if self.percent != other.percent:
            own |= {self.value / 100 if self.percent else self.value * 100}
        allowed = max(Fraction(str(tolerance)), Fraction(str(relative)) * abs(other.value))
        return any(abs(value - other.value) <= allowed for value in own)


def _han(text: str) -> Fraction | None:
    """The value of Chinese numerals; None for what is none, such as 十十."""
    if len(text) > 60:
        return None
    whole, _, decimals = text.partition("点")
    if not any(c in _UNITS or c in _MYRIADS for c in whole):
        digits = "".join(str(_DIGITS[c]) for c in whole)  # 二〇二四
        value = Fraction(int(digits)) if digits else None
    else:
        value = _sum_of_units(whole)
    if value is None or not decimals:
        return value
    return value + Fraction(int("".join(str(_DIGITS[c]) for c in decimals)), 10 ** len(decimals))


def _sum_of_units(text: str, unit_before: int = 1) -> Fraction | None:
    """The value of numerals with units; `unit_before` is the unit that they follow, which 三百五 leaves out."""
    for unit in (10**8, 10**4):
        cut = max(text.rfind(c) for c, value in _MYRIADS.items() if value == unit)
        if cut >= 0:
            left = _sum_of_units(text[:cut]) if cut else Fraction(1)
            right = _sum_of_units(text[cut + 1 :], unit) if text[cut + 1 :] else Fraction(0)
            return None if left is None or right is None else left * unit + right
    total, digit, zero = 0, None, False
    for c in text:
        if c in _UNITS:
            unit_before = _UNITS[c]
            total += (1 if digit is None else digit) * unit_before
            digit, zero = None, False
        elif digit is not None:
            return None
        elif _DIGITS[c]:
            digit = _DIGITS[c]
        else:
            zero = True
    if digit is None:
        return Fraction(total)
    return Fraction(total + digit * (1 if zero or unit_before < 10 else unit_before // 10))


def _plain(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _value(match: re.Match[str]) -> Fraction | None:
    g = match.groupdict()
    if max(map(len, filter(None, g.values())), default=0) > _MAX_DIGITS:
        return None
    if g["top"]:
        return Fraction(int(g["top"]), int(g["bottom"])) if int(g["bottom"]) else None
    if g["whole"]:
        return int(g["whole"]) + Fraction(int(g["n"]), int(g["d"])) if int(g["d"]) else None
    if g["n2"]:
        return Fraction(int(g["n2"]), int(g["d2"])) if int(g["d2"]) else None
    if g["plain"]:
        value = _plain(g["plain"]) * Fraction(10) ** int(g["exp"] or 0)
        for c in (g["myriad"] or "").strip():
            value *= _MYRIADS[c]
        return value
    if g["per_cent"]:
        return _any(g["per_cent"])
    if g["han_d"]:
        below, above = _han(g["han_d"]), _han(g["han_n"])
        return above / below if below and above is not None else None
    return _han(g["han"])


def _any(text: str) -> Fraction | None:
    return _han(text) if text[0] in _HAN else _plain(text)


def _readable(text: str) -> str:
    """Full-width forms as plain ones; a full-width comma between clauses does not become one of thousands."""
    text = re.sub(r"(?<![０-９])，|，(?![０-９]{3})", "， ", text[-_LONGEST:])
    return unicodedata.normalize("NFKC", text)


def numbers_in(text: str) -> Iterator[Number]:
    """Every number of a text, in order."""
    text = _readable(text)
    for match in _NUMBER.finditer(text):
        value = _value(match)
        if value is not None:
            negative = match["sign"] is not None
            percent = match["percent"] is not None or match["per_cent"] is not None
            yield Number(-value if negative else value, percent, match.start(), match["han"] is not None)


_MARK = re.compile(
    r"####|\\boxed\s*\{|<answer>|\banswer\b[^\n\d.]{0,40}?(?:\bis\b|:|=)|答案(?:应该|应当|就)?(?:是|为|為|[:=])|答:",
    re.IGNORECASE,
)


def marked_number(text: str) -> Number | None:
    """The number after the last mark of an answer that has one: `####`, `\\boxed{}`, `<answer>`, "the answer is", 答案是."""
    text = _readable(text)
    found = None
    for mark in _MARK.finditer(text):
        rest = text[mark.end() : mark.end() + 200]
        if mark[0].startswith("\\boxed"):
            rest = _braced(rest)
            number = next(reversed(list(numbers_in(rest))), None)  # x = 5
        else:
            lines = rest.strip().split("\n", 1)[0].split("</answer>", 1)[0]
            number = next(numbers_in(lines), None)
        found = number or found
    return found


def _braced(text: str) -> str:
    """What stands before the brace that closes the one before the text."""
    depth = 1
    for i, c in enumerate(text):
        depth += (c == "{") - (c == "}")
        if not depth:
            return text[:i]
    return text


def last_number(text: str) -> Number | None:
    """The last number that has digits; where there is none, the last in Chinese numerals."""
    last = last_han = None
    for number in numbers_in(text):
        if number.han:
            last_han = number
        else:
            last = number
    return last or last_han
