"""Answers in, rewards out: graders and their weights, what each said, and what they themselves failed on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from llmkit.config import MachineError, UserError
from llmkit.rollout.rewards.code import CodeGrader
from llmkit.rollout.rewards.config import (
    ChoiceReward,
    CodeReward,
    ExactReward,
    FormatReward,
    LengthReward,
    ModelReward,
    NumericReward,
    PythonReward,
    RegexReward,
    RewardConfig,
)
from llmkit.rollout.rewards.functions import FunctionGrader
from llmkit.rollout.rewards.graders import (
    ChoiceGrader,
    ExactGrader,
    FormatGrader,
    LengthGrader,
    NumericGrader,
    RegexGrader,
)
from llmkit.rollout.rewards.grading import Answer, Failed, Grade, Grader, Message
from llmkit.rollout.rewards.models import ModelGrader

if TYPE_CHECKING:
    from llmkit.tokenizer import Tokenizer

__all__ = ["Answer", "Message", "Part", "Rewards", "Scores"]


@dataclass(frozen=True)
class Part:
    """A grader with its place in the sum."""

    name: str
    weight: float
    grader: Grader
    on_error: float | None = None
    """What a failure counts as; None: the answer has no reward."""


@dataclass(frozen=True)
class Scores:
    """What the answers of one call got, in their order."""

    total: list[float]
    """The weighted sum of the parts that have something to say. NaN: there is no reward, because a grader failed or no
    part had anything to say; such an answer must be left out of the update and of its group's mean."""
    parts: dict[str, list[float]]
    """Unweighted, by name, as the graders gave them (B92); NaN where a part said nothing or failed."""
    errors: dict[str, int]
    """How often each grader failed."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Of each grader that failed, why it did first."""


_BARREN = 3  # calls in a row in which a grader failed on everything


class Rewards:
    """Graders and their weights. `score` may be called from any thread, by one at a time."""

    def __init__(
        self, configs: Sequence[RewardConfig | Part], tokenizer: Tokenizer, device: torch.device | str = "cpu"
    ):
        """Builds the graders: loads reward models, imports functions; the sandbox starts with the first program.

        Raises:
            UserError: for a reward model that is none or has another tokenizer, or a function that isn't there.
        """
        self.parts = tuple(c if isinstance(c, Part) else _part(c, tokenizer, torch.device(device)) for c in configs)
        self._barren = {part.name: _BARREN - 1 for part in self.parts}  # at the very first call, it is a mistake

    def describe(self) -> list[str]:
        """A line for each part, for the start of a run."""
        notes = [(part, part.grader.describe()) for part in self.parts]
        return [f"{p.weight:g} x {p.name}" + (f": {note}" if note else "") for p, note in notes]

    def check(self, fields: Mapping[str, Any]) -> None:
        """Raises UserError, naming the part, if a row with these columns cannot be graded."""
        for part in self.parts:
            try:
                part.grader.check(fields)
            except UserError as e:
                raise UserError(f"rewards: {part.name}: {e}") from None

    def score(self, answers: Sequence[Answer]) -> Scores:
        """Grades answers; the same answers get the same scores, whatever else is in the call.

        Raises:
            UserError: for a row that a part cannot grade.
            MachineError: if a grader failed on all answers, in the first call or in three calls in a row.
        """
        total = [0.0] * len(answers)
        known = [not any(part.weight for part in self.parts)] * len(answers)
        parts: dict[str, list[float]] = {}
        errors: dict[str, int] = {}
        reasons: dict[str, str] = {}
        for part in self.parts:
            grades = self._grades(part, answers)
            failures = [g for g in grades if isinstance(g, Failed)]
            errors[part.name] = len(failures)
            if failures:
                reasons[part.name] = failures[0].reason
            self._watch(part, len(answers), failures)
            parts[part.name] = [math.nan if g is None or isinstance(g, Failed) else g for g in grades]
            for i, grade in enumerate(grades):
                if grade is None:
                    continue
                value = part.on_error if isinstance(grade, Failed) else grade
                if part.weight:  # of a part that is only logged, nothing is missing in the sum
                    total[i] += math.nan if value is None else part.weight * value
                    known[i] = True
        return Scores([t if k else math.nan for t, k in zip(total, known, strict=True)], parts, errors, reasons)

    def _grades(self, part: Part, answers: Sequence[Answer]) -> list[Grade]:
        if not answers:
            return []
        try:
            grades = part.grader.grade(answers)
        except UserError as e:
            raise UserError(f"rewards: {part.name}: {e}") from None
        except MachineError:
            raise
        except Exception as e:
            return [Failed(f"{type(e).__name__}: {e}")] * len(answers)
        assert len(grades) == len(answers), f"{part.name} gave {len(grades)} grades for {len(answers)} answers"
        return [_checked(grade) for grade in grades]

    def _watch(self, part: Part, n: int, failures: Sequence[Failed]) -> None:
        """Ends a run whose grader gives nothing to learn from any more."""
        if len(failures) < n or not n:
            self._barren[part.name] = 0 if n else self._barren[part.name]
            return
        self._barren[part.name] += 1
        if self._barren[part.name] >= _BARREN:
            raise MachineError(f"rewards: {part.name}: the grader failed on all {n} answers: {failures[0].reason}")

    def close(self) -> None:
        """Ends the sandbox's processes and the like."""
        for part in self.parts:
            part.grader.close()


def _part(config: RewardConfig, tokenizer: Tokenizer, device: torch.device) -> Part:
    try:
        return Part(config.label, config.weight, make_grader(config, tokenizer, device), config.on_error)
    except UserError as e:
        raise UserError(f"rewards: {config.label}: {e}") from None


def make_grader(config: RewardConfig, tokenizer: Tokenizer, device: torch.device) -> Grader:
    """The grader of a kind."""
    match config:
        case ExactReward():
            return ExactGrader(config)
        case NumericReward():
            return NumericGrader(config)
        case ChoiceReward():
            return ChoiceGrader(config)
        case RegexReward():
            return RegexGrader(config)
        case LengthReward():
            return LengthGrader(config)
        case FormatReward():
            return FormatGrader(config)
        case CodeReward():
            return CodeGrader(config)
        case PythonReward():
            return FunctionGrader(config)
        case ModelReward():
            return ModelGrader(config, tokenizer, device)


def _checked(grade: Any) -> Grade:
    """A grade as a plain number. A value that is none is the grader's failure; 0 and False are numbers."""
    if grade is None or isinstance(grade, Failed):
        return grade
    if callable(getattr(grade, "item", None)) and getattr(grade, "ndim", 0) == 0:  # of numpy or torch
        grade = grade.item()
    if not isinstance(grade, Real):
        return Failed(f"a number is expected (got {type(grade).__name__})")
    value = float(grade)
    return value if math.isfinite(value) else Failed(f"{value} is no score")
