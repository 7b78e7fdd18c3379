"""What is run in the sandbox, and what became of it."""

from __future__ import annotations

import contextlib
import json
import signal
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["passed", "wrong", "timeout", "crash", "memory", "output", "failure"]


@dataclass(frozen=True)
class Program:
    """What is to be run."""

    code: str
    """Python."""
    tests: tuple[str, ...] = ()
    """Statements that are run after it, in its namespace; a test passes if it raises nothing."""
    stdin: str = ""
    """What it can read."""
    expected: str | None = None
    """What it is to print, but for blanks at the ends of lines and of the whole. None: nothing in particular."""


@dataclass(frozen=True)
class Result:
    """What became of a program."""

    status: Status
    """passed: it ran to its end and all tests passed. wrong: a test failed, or it printed something else. timeout,
    memory, output: it went over that limit. crash: it raised, exited or died before its tests were through. failure: the
    sandbox broke, which says nothing of the program."""
    message: str
    """Why it did not pass: an exception, a signal."""
    passed: tuple[bool, ...] = ()
    """Of each test, as far as it got."""
    stdout: str = ""
    """What it printed."""
    stderr: str = ""
    """The end of what it wrote there."""


def judge(program: Program, token: str, found: dict[str, Any]) -> Result:
    """What a worker's report means. Only lines with the token count: a program cannot guess it."""
    told: list[tuple[str, str]] = []
    for line in found["told"].split("\n"):
        with contextlib.suppress(ValueError, TypeError):
            given, kind, text = json.loads(line)
            if given == token:
                told.append((str(kind), str(text)))
    kinds = [kind for kind, _ in told]
    tests = [kind == "pass" for kind in kinds if kind in ("pass", "fail", "memory")][: len(program.tests)]
    passed = tuple(tests + [False] * (len(program.tests) - len(tests)))
    last = told[-1][1] if told else ""

    def result(status: Status, message: str = "") -> Result:
        return Result(status, message, passed, found["stdout"], found["stderr"])

    if "failure" in kinds:
        return result("failure", last)
    if found["reason"] == "timeout":
        return result("timeout", "it did not end in time")
    if found["reason"] == "output":
        return result("output", "it wrote too much")
    if found["exit"] is None:
        return result("failure", "its process was lost")
    if "memory" in kinds:
        return result("memory", "MemoryError")
    if found["exit"] == -signal.SIGXCPU:
        return result("timeout", "it used up its processor time")
    if found["exit"] < 0:
        return result("crash", f"killed by {_signal_name(-found['exit'])}")
    if "done" not in kinds:
        return result("crash", last or "it ended before its tests were through")
    if not all(passed):
        return result("wrong", next((text for kind, text in told if kind == "fail"), ""))
    if program.expected is not None and _lines(found["stdout"]) != _lines(program.expected):
        return result("wrong", "it printed something else")
    return result("passed")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().split("\n")]
