"""Prompts whose answers are being ranked by people: what is asked next, what was said, and how far they agree.

Everything that is said is on disk before a method returns.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any

from llmkit.config import UserError
from llmkit.tools.agreement import agreement_of
from llmkit.tools.annotators import Judgement, Ranking, flat, from_scores, pairs_of
from llmkit.tools.candidates import Asked
from llmkit.tools.ledger import BY, ROW, Ledger, Record

Source = Callable[[Sequence[Asked]], list[list[str]]]
"""Answers to some prompts."""


def keep(
    ledger: Ledger,
    row: Asked,
    responses: list[str],
    judgement: Judgement | None,
    utilities: list[float] | None = None,
    by: str | None = None,
) -> None:
    """Writes a row, or notes why there is none."""
    if len(responses) < 2:
        ledger.add(row.number, [], {"left_out": "alike"})
    elif judgement is None and utilities is not None:
        ledger.add(row.number, [], {"left_out": "unjudged"})
    elif judgement is not None and not pairs_of(judgement.ranking):
        ledger.add(row.number, [], {"left_out": "tied"}, by)
    else:
        made: Record = {"prompt": row.written, "responses": responses}
        if judgement is not None:
            made["ranking"] = judgement.ranking
            made |= {k: v for k in ("scores", "comment") if (v := getattr(judgement, k)) is not None}
        if utilities is not None:
            made["utility"] = utilities
        ledger.add(row.number, [{**made, **row.others}], None, by)


class Ahead:
    """Answers in the background: those of the next prompt, while a person reads this one's."""

    def __init__(self, source: Source):
        self._source = source
        self._pool = ThreadPoolExecutor(1)
        self._lock = Lock()
        self._made: dict[int, Future[list[list[str]]]] = {}

    def __call__(self, row: Asked, following: Asked | None) -> list[list[str]]:
        with self._lock:
            for one in (row, following):
                if one is not None and one.number not in self._made:
                    self._made[one.number] = self._pool.submit(self._source, [one])
        return self._made[row.number].result()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


# --- several people --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What a person is asked."""

    row: Asked
    responses: list[str]
    places: list[int]
    """The responses' numbers in the order in which this person is shown them."""


class Sitting:
    """Several people who rank the same answers, each in an order drawn for them; safe to be called from several threads.

    Args:
        ledger: where the rows are kept.
        rows: the prompts, in the order in which they are asked.
        source: gives a prompt's answers.
        seed: of the order in which answers are shown.
    """

    def __init__(self, ledger: Ledger, rows: Sequence[Asked], source: Source, seed: int = 0):
        self.rows = list(rows)
        self._ledger, self._seed = ledger, seed
        self._by_number = {row.number: row for row in rows}
        # Whoever comes after a restart ranks the very answers that the others have ranked.
        self._known = {row[ROW]: row["responses"] for row in ledger.rows()}
        self._lock = Lock()
        self._ahead = Ahead(source)

    def close(self) -> None:
        """Ends the thread that answers."""
        self._ahead.__exit__()

    def left(self, annotator: str) -> list[Asked]:
        """What this person has neither ranked nor skipped, without what nobody can rank."""
        done = self._ledger.done
        return [row for row in self.rows if row.number not in done and (row.number, annotator) not in done]

    def next(self, annotator: str) -> Question | None:
        """The next prompt and its answers, as soon as there are any; None when all are done."""
        while left := self.left(annotator):
            row, following = left[0], left[1] if len(left) > 1 else None
            responses = self._responses(row, following)
            if len(responses) >= 2:
                places = list(range(len(responses)))
                random.Random(f"{self._seed}/{row.number}/{annotator}").shuffle(places)
                return Question(row, responses, places)
            with self._lock:
                if row.number not in self._ledger.done:
                    keep(self._ledger, row, responses, None)
        return None

    def _responses(self, row: Asked, following: Asked | None) -> list[str]:
        if (known := self._known.get(row.number)) is not None:
            return list(known)
        (responses,) = self._ahead(row, following)
        return responses

    def judge(
        self,
        annotator: str,
        number: int,
        ranking: list[list[int]] | None,
        scores: list[float] | None = None,
        comment: str | None = None,
    ) -> None:
        """Keeps what a person says of a prompt's answers.

        Args:
            ranking: groups of the responses' numbers, best first, equally good ones in one; None: the prompt is skipped.
            scores: of each response; they must say the same as the ranking.

        Raises:
            UserError: for a prompt that isn't asked or was judged by this person already, or a ranking that is none.
        """
        row = self._by_number.get(number)
        if row is None:
            raise UserError(f"number: there is no prompt {number} here")
        responses = self._responses(row, None)
        judgement = None if ranking is None else _checked(ranking, scores, comment, len(responses))
        with self._lock:
            if (number, annotator) in self._ledger.done:
                raise UserError(f"number: {annotator} has judged prompt {number} already: undo that first")
            if judgement is None:
                self._ledger.add(number, [], {"left_out": "skipped"}, annotator)
            else:
                keep(self._ledger, row, responses, judgement, by=annotator)
                self._known[number] = responses

    def undo(self, annotator: str) -> Record | None:
        """Takes back what this person said last: `number` and, if it was a ranking, that; None if there is nothing."""
        with self._lock:
            row = self._last_row(annotator)
            last = self._ledger.take_back(annotator)
        if last is None:
            return None
        number = last[0]
        if row is None or row[ROW] != number:
            return {"number": number}
        return {"number": number, **{k: row.get(k) for k in ("ranking", "scores", "comment")}}

    def _last_row(self, annotator: str) -> Record | None:
        return next((row for row in reversed(self._ledger.rows()) if row.get(BY) == annotator), None)

    def progress(self, annotator: str) -> dict[str, int]:
        """How many prompts there are, and how many are left for this person."""
        return {"total": len(self.rows), "left": len(self.left(annotator))}

    def agreement(self) -> dict[str, Any]:
        """See `agreement_of`; skipped prompts and those whose answers are all equally good count nowhere."""
        judged: dict[str, dict[int, Ranking]] = {}
        with self._lock:
            rows = self._ledger.rows()
        for row in rows:
            if BY in row:
                judged.setdefault(row[BY], {})[row[ROW]] = row["ranking"]
        return agreement_of(judged)


def _checked(ranking: list[list[int]], scores: list[float] | None, comment: str | None, n: int) -> Judgement:
    named = [number for group in ranking for number in group]
    if sorted(named) != list(range(n)) or not all(ranking):
        raise UserError(f"ranking: every answer from 0 to {n - 1} once is expected, best first (got {ranking})")
    told = flat(ranking)
    if scores is not None and len(scores) != n:
        raise UserError(f"scores: {len(scores)} for {n} answers: give one each")
    if scores is not None and from_scores(scores) != told:
        raise UserError("scores: they say another order than the ranking: the highest is the best")
    return Judgement(told, scores, (comment or "").strip() or None)
