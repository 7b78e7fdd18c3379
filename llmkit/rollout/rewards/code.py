"""Programs in answers, run against the row's tests in the sandbox."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.config import UserError
from llmkit.rollout.rewards.config import CodeReward
from llmkit.rollout.rewards.graders import extracted
from llmkit.rollout.rewards.grading import Answer, Failed, Grade, column
from llmkit.sandbox.cage import Sandbox
from llmkit.sandbox.verdict import Program, Result

_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def program_of(text: str) -> str:
    """The last fenced block that is Python or unnamed, else the whole text; a fence that was cut off ends with it."""
    blocks = [m[2] for m in _FENCE.finditer(text) if m[1].lower() in ("", "python", "py", "python3")]
    return blocks[-1] if blocks else text


class CodeGrader:
    """1 if the answer's program passes the row's tests, or the share that it passes."""

    def __init__(self, config: CodeReward):
        self.config = config
        self.sandbox = Sandbox(config.sandbox)

    def describe(self) -> str:
        return self.sandbox.describe()

    def close(self) -> None:
        self.sandbox.close()

    def check(self, fields: Mapping[str, Any]) -> None:
        self.programs("", fields)

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        """Runs the programs of all answers side by side."""
        programs: list[Program] = []
        spans: list[tuple[int, int] | None] = []
        for answer in answers:
            text = extracted(self.config.extract, answer.text)
            own = self.programs("" if text is None else program_of(text), answer.fields)
            spans.append(None if own is None else (len(programs), len(programs) + len(own)))
            programs += own or []
        results = self.sandbox.run(programs)
        return [None if span is None else self._grade(results[span[0] : span[1]]) for span in spans]

    def programs(self, code: str, fields: Mapping[str, Any]) -> list[Program] | None:
        """What is to be run for an answer; None if the row has no tests."""
        name = self.config.field
        tests = column(fields, name)
        if tests is None:
            return None
        setup = self._text(fields, self.config.setup)
        code = setup + ("\n" if setup and not setup.endswith("\n") else "") + code
        tests = [tests] if isinstance(tests, str) else tests
        if isinstance(tests, list) and tests and all(isinstance(t, str) for t in tests):
            entry_point = self._text(fields, self.config.entry_point)
            call = f"\ncheck({entry_point})\n" if entry_point else ""
            return [Program(code, tuple(test + call for test in tests))]
        if isinstance(tests, list) and tests and all(_is_pair(t) for t in tests):
            return [Program(code, stdin=t["input"], expected=t["output"]) for t in tests]
        raise UserError(
            f"'{name}' must be Python statements, a list of them, or a list of {{input, output}} texts "
            f"(got {str(tests)[:80]!r})"
        )

    def _text(self, fields: Mapping[str, Any], name: str | None) -> str:
        value = None if name is None else column(fields, name)
        if value is not None and not isinstance(value, str):
            raise UserError(f"'{name}' must be text (got {value!r})")
        return value or ""

    def _grade(self, results: Sequence[Result]) -> Grade:
        failed = next((r for r in results if r.status == "failure"), None)
        if failed is not None:
            return Failed(failed.message)
        passed = [p for r in results for p in (r.passed or (r.status == "passed",))]
        if not self.config.partial:
            return float(all(r.status == "passed" for r in results))
        return sum(passed) / len(passed)


def _is_pair(test: Any) -> bool:
    return isinstance(test, dict) and all(isinstance(test.get(key), str) for key in ("input", "output"))
