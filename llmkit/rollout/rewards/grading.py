"""What a grader is: answers in, grades out.

Three things are kept apart (B71): a wrong answer is a number, mostly 0; `None` says that a part has nothing to say of
an answer; `Failed` says that the grader broke: its program timed out in the machine's fault, its function raised. A
grader's failure is no wrong answer, so it must not teach the model anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llmkit.config import UserError

Message = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """One answer, as a grader sees it."""

    prompt: list[Message] | str
    """What was asked: a conversation, or plain text."""
    text: str
    """What the model wrote, without stop token; of several turns, the last."""
    ids: list[int]
    """Prompt and response as they were sampled: never decoded and encoded again."""
    n_prompt: int
    """How many of them are the prompt's."""
    finished: bool
    """It ended by itself, at a stop token; else it was cut off."""
    fields: dict[str, Any]
    """The row's other columns: the right answer, tests, whatever a grader wants."""
    messages: list[Message]
    """The whole conversation, the answer and turns of tools included."""
    n_written: int | None = None
    """Tokens that the model itself wrote; None: all after the prompt."""

    @property
    def length(self) -> int:
        """Tokens that the model wrote."""
        return len(self.ids) - self.n_prompt if self.n_written is None else self.n_written


@dataclass(frozen=True)
class Failed:
    """The grader broke on an answer."""

    reason: str


Grade = float | None | Failed


class Grader(Protocol):
    """One part of the reward."""

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        """A grade for each answer. Raises UserError for a row that it cannot grade; other exceptions are its failure."""

    def check(self, fields: Mapping[str, Any]) -> None:
        """Raises UserError if a row with these columns cannot be graded, so that a run is refused before it begins."""

    def describe(self) -> str:
        """What a person should know of it at the start of a run; "" for nothing."""

    def close(self) -> None:
        """Ends what it has begun."""


class EachAnswer:
    """Base of graders that look at one answer at a time: a failure on one is none on the others."""

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        grades: list[Grade] = []
        for answer in answers:
            try:
                grades.append(self.one(answer))
            except UserError:
                raise
            except Exception as e:
                grades.append(Failed(f"{type(e).__name__}: {e}"))
        return grades

    def one(self, answer: Answer) -> Grade:
        raise NotImplementedError

    def check(self, fields: Mapping[str, Any]) -> None:
        """Any row will do."""

    def describe(self) -> str:
        return ""

    def close(self) -> None:
        """There is nothing to end."""


def column(fields: Mapping[str, Any], name: str) -> Any:
    """A column of a row. Raises UserError where there is none; null is a value."""
    if name not in fields:
        raise UserError(
            f"the row has no '{name}', it has {', '.join(sorted(fields)) or 'no other columns'}: set `field`"
        )
    return fields[name]
