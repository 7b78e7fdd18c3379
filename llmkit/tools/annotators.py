"""Who says which of several answers is better: a person at the terminal, or a simulated one with a stated noise."""

from __future__ import annotations

import itertools
import math
import random
import re
import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from llmkit.config import UserError

Ranking = list[int | list[int]]
"""Numbers of the answers, best first; a list within it holds answers that are equally good."""


@dataclass(frozen=True)
class Judgement:
    """What an annotator says of one prompt's answers."""

    ranking: Ranking
    scores: list[float] | None = None
    comment: str | None = None


def from_scores(scores: Sequence[float]) -> Ranking:
    """The ranking that scores mean: the highest first, equal ones tied."""
    return flat([[i for i, s in enumerate(scores) if s == value] for value in sorted(set(scores), reverse=True)])


def flat(groups: Sequence[Sequence[int]]) -> Ranking:
    """Groups of equally good answers, best first, as they are written: an answer that stands alone without its list."""
    return [group[0] if len(group) == 1 else sorted(group) for group in groups]


def pairs_of(ranking: Ranking) -> list[tuple[int, int]]:
    """(better, worse) of all answers that a ranking tells apart."""
    groups = [[place] if isinstance(place, int) else place for place in ranking]
    return [(a, b) for high, low in itertools.combinations(groups, 2) for a in high for b in low]


# --- a simulated annotator -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """How a simulated annotator errs.

    bradley_terry: answer a is put above b with probability sigmoid((u_a - u_b) / amount), u their utilities (Bradley and
    Terry 1952). Whole rankings are drawn from Plackett and Luce's model, which has exactly these pairs.

    flip: a pair of answers is put the wrong way round with probability `amount`, whatever their utilities. Rankings of
    more than two are drawn from Mallows' model (Biometrika 44, 1957), in which neighbours are confused more often than
    the best and the worst; over all pairs of the ranking it is `amount` on average.

    Answers of equal utility are always tied.
    """

    kind: Literal["none", "bradley_terry", "flip"] = "none"
    amount: float = 0.0

    def __post_init__(self) -> None:
        if self.kind == "bradley_terry" and not (0 < self.amount < math.inf):
            raise UserError(f"rank: --noise {self.amount}: the temperature of Bradley-Terry must be above 0")
        if self.kind == "flip" and not 0 <= self.amount < 0.5:
            raise UserError(
                f"rank: --flip {self.amount}: a probability from 0 to below 0.5, where preferences mean nothing"
            )

    def draw(self, utilities: Sequence[float], pick: random.Random) -> Ranking:
        """A ranking, best first."""
        groups = [[place] if isinstance(place, int) else place for place in from_scores(utilities)]
        if self.kind == "bradley_terry":
            gumbel = [-math.log(-math.log(pick.random() or 0.5)) for _ in groups]
            noisy = [utilities[g[0]] / self.amount + x for g, x in zip(groups, gumbel, strict=True)]
            groups = [groups[i] for i in sorted(range(len(groups)), key=lambda i: -noisy[i])]
        elif self.kind == "flip" and len(groups) > 1:
            groups = _insert(groups, _dispersion(len(groups), self.amount), pick)
        return flat(groups)

    def ceiling(self, utilities: Sequence[float]) -> list[float]:
        """For each pair of unequal utilities, how probable it is that the ranking has it the right way round.

        Whoever knows the utilities agrees with so many pairs and no more: the accuracy that a reward model can reach.
        """
        places = {u: place for place, u in enumerate(sorted(set(utilities), reverse=True))}
        found = []
        for a, b in itertools.combinations(utilities, 2):
            if a == b:
                continue
            if self.kind == "bradley_terry":
                found.append(_sigmoid(abs(a - b) / self.amount))
            elif self.kind == "flip":
                found.append(_right(abs(places[a] - places[b]), _dispersion(len(places), self.amount)))
            else:
                found.append(1.0)
        return found

    def __str__(self) -> str:
        if self.kind == "bradley_terry":
            return f"Bradley-Terry, P(a over b) = sigmoid((u_a - u_b) / {self.amount:g})"
        return f"a pair is flipped with probability {self.amount:g}" if self.kind == "flip" else "none"


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _right(distance: int, q: float) -> float:
    """Mallows' model: the probability that two items, so many places apart in the true order, are drawn in it."""

    def h(k: int) -> float:
        return k / (1 - q**k)

    return h(distance + 1) - h(distance)


@cache
def _dispersion(n: int, flip: float) -> float:
    """The q of Mallows' model of n items in which an average pair is flipped with probability `flip`."""
    if n < 2 or flip == 0:
        return 0.0

    def flipped(q: float) -> float:
        return 1 - sum((n - d) * _right(d, q) for d in range(1, n)) / math.comb(n, 2)

    low, high = 0.0, 1 - 1e-6
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if flipped(middle) < flip else (low, middle)
    return (low + high) / 2


def _insert(groups: list[list[int]], q: float, pick: random.Random) -> list[list[int]]:
    """A draw from Mallows' model: each item, best first, is inserted d places above the end with probability ~ q^d."""
    drawn: list[list[int]] = []
    for n, group in enumerate(groups):
        (above,) = pick.choices(range(n + 1), [q**d for d in range(n + 1)])
        drawn.insert(n - above, group)
    return drawn


@dataclass(frozen=True)
class Agreement:
    """How good the labels of a simulated annotator are."""

    n_pairs: int
    agreed: float
    """Share of the pairs that are the way round that the utilities say."""
    ceiling: float
    """The share to expect: what a judge who knows the utilities reaches on these labels."""


def agreement(noise: Noise, judged: Sequence[tuple[Sequence[float], Ranking]]) -> Agreement:
    """Over (utilities, ranking) of all prompts, each pair of answers counting alike."""
    right = [utilities[a] > utilities[b] for utilities, ranking in judged for a, b in pairs_of(ranking)]
    expected = [p for utilities, _ in judged for p in noise.ceiling(utilities)]
    n = len(right)
    return Agreement(n, sum(right) / n if n else math.nan, sum(expected) / len(expected) if expected else math.nan)


# --- a person at the terminal ----------------------------------------------------------------------------------------

HELP = """\
  2>1=3>4         2 is best, then 1 and 3, which are equally good, then 4; who isn't named is worst
  2               2 is better than the others
  scores 7 9 2 2  a number for each answer, the higher the better
  comment TEXT    kept with the ranking that follows
  skip            no ranking for this prompt
  undo            back to the prompt before
  quit            stop; the same command goes on from here"""
_COMMANDS = {"skip": "skip", "s": "skip", "undo": "undo", "u": "undo", "quit": "quit", "q": "quit", "exit": "quit"}
_ORDER = re.compile(r"\d+([>=]\d+)*")
Command = Literal["skip", "undo", "quit"]


def parse_order(text: str, n: int) -> Ranking:
    """`2>1=3` as a ranking of n answers, counted from 0; ValueError says what is wrong with it."""
    text = re.sub(r"\s", "", text)
    if not _ORDER.fullmatch(text):
        raise ValueError(f"{text!r} is no order: write one like 2>1=3, or ? for help")
    groups = [[int(number) for number in part.split("=")] for part in text.split(">")]
    named = [number for group in groups for number in group]
    for number in named:
        if not 1 <= number <= n:
            raise ValueError(f"there is no answer {number}: they are 1 to {n}")
        if named.count(number) > 1:
            raise ValueError(f"{number} stands there twice")
    rest = [number for number in range(1, n + 1) if number not in named]
    groups += [rest] if rest else []
    if len(groups) == 1:
        raise ValueError("all equally good: nothing can be learnt from that; `skip` leaves the prompt out")
    return flat([[number - 1 for number in group] for group in groups])


def parse_scores(text: str, n: int) -> list[float]:
    """`7 9 2 2` as n numbers; ValueError says what is wrong with them."""
    parts = text.replace(",", " ").split()
    if len(parts) != n:
        raise ValueError(f"{len(parts)} scores for {n} answers: give one each")
    try:
        scores = [float(part) for part in parts]
    except ValueError:
        raise ValueError(f"{text!r}: scores are numbers") from None
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"{text!r}: scores are finite numbers")
    if len(set(scores)) == 1:
        raise ValueError("all equally good: nothing can be learnt from that; `skip` leaves the prompt out")
    return scores


def readable(text: str, indent: str = "") -> str:
    """Text as it may be shown on a terminal: what would move its cursor or turn its lines around is spelt out."""
    shown = "".join(
        f"\\u{ord(c):04x}" if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t\u200c\u200d" else c
        for c in text
    )
    return textwrap.indent(shown, indent, lambda _: True).removeprefix(indent)


def _conversation(prompt: list[dict[str, Any]] | str) -> str:
    if isinstance(prompt, str):
        return readable(prompt)
    return "\n".join(f"{m['role']}: {readable(str(m.get('content') or ''), '  ')}" for m in prompt)


class Person:
    """Shows answers and reads what is thought of them, line by line.

    Args:
        read: gives the next line, "" at the end of the input.
        show: prints text.
        seed: of the order in which answers are shown, so that a file that has the best ones first doesn't tell.
    """

    def __init__(self, read: Callable[[], str], show: Callable[[str], None], seed: int = 0):
        self._read, self._show, self._seed = read, show, seed

    def judge(
        self, title: str, number: int, prompt: list[dict[str, Any]] | str, responses: Sequence[str]
    ) -> Judgement | Command:
        """Asks until there is an answer; the end of the input is `quit`."""
        places = list(range(len(responses)))
        random.Random(f"{self._seed}/{number}").shuffle(places)
        shown = "\n".join(f"  [{k}] {readable(responses[i], '      ')}" for k, i in enumerate(places, 1))
        self._show(f"\n--- {title}\n{_conversation(prompt)}\n\n{shown}\n")
        comment = None
        while True:
            self._show("best first, as in 2>1=3 (? for help): ")
            line = self._read()
            if not line:
                return "quit"
            said, _, rest = line.strip().partition(" ")
            word = unicodedata.normalize("NFKC", said).lower()
            if word in _COMMANDS and not rest:
                return _COMMANDS[word]  # type: ignore[return-value]
            if word == "comment":
                comment = rest.strip() or None
            elif word in ("?", "help"):
                self._show(HELP + "\n")
            elif word:
                try:
                    return self._judgement(word, unicodedata.normalize("NFKC", f"{said} {rest}"), places, comment)
                except ValueError as e:
                    self._show(f"{e}\n")

    def _judgement(self, word: str, line: str, places: list[int], comment: str | None) -> Judgement:
        """A ranking of the answers as they are numbered on the screen, told by their own numbers."""
        if word not in ("scores", "score"):
            order = parse_order(line, len(places))
            groups = [[places[k] for k in ([place] if isinstance(place, int) else place)] for place in order]
            return Judgement(flat(groups), None, comment)
        given = parse_scores(line.strip().partition(" ")[2], len(places))
        scores = [given[places.index(i)] for i in range(len(places))]
        return Judgement(from_scores(scores), scores, comment)
