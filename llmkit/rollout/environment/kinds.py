"""Environments: tools that a model calls, and functions of the user's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.config import UserError
from llmkit.rollout.environment.calculator import calculate
from llmkit.rollout.environment.config import TOOLS, FunctionConfig, ToolsConfig
from llmkit.rollout.rewards.functions import find_function
from llmkit.sandbox.cage import Sandbox
from llmkit.sandbox.verdict import Program

Message = dict[str, Any]

_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_TAG = re.compile(rf"<({'|'.join(TOOLS)})>(.*?)(?:</\1>|\Z)", re.DOTALL)
_ARGUMENT = {"calculator": "expression", "python": "code"}


class ToolEnvironment:
    """Answers every call in a turn with a message of the role `tool`; a turn without a call is the last."""

    def __init__(self, config: ToolsConfig):
        self.config = config
        self.max_turns = config.max_turns
        self.sandbox = Sandbox(config.sandbox)

    def describe(self) -> str:
        caged = f"; {self.sandbox.describe()}" if "python" in self.config.tools else ""
        return f"{', '.join(self.config.tools)}, at most {self.max_turns} turns{caged}"

    def close(self) -> None:
        self.sandbox.close()

    def reply(self, messages: Sequence[Message], text: str, fields: Mapping[str, Any]) -> list[Message] | None:
        """What the tools say to a turn: a message for each call. A call that is none gets an error to learn from."""
        calls = self._calls(text)
        if not calls or _turns_so_far(messages) + 1 >= self.max_turns:
            return None
        return [{"role": "tool", "content": self._cut(self._result(name, argument))} for name, argument in calls]

    def _calls(self, text: str) -> list[tuple[str, Any]]:
        """Name and argument of each call; without a name, the argument says what is wrong."""
        if self.config.format == "tags":
            return [(m[1], m[2]) for m in _TAG.finditer(text)]
        found: list[tuple[str, Any]] = []
        for match in _CALL.finditer(text):
            try:
                call = json.loads(match[1])
                name, arguments = call["name"], call["arguments"]
                arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
                found.append((str(name), arguments.get(_ARGUMENT.get(name, ""))))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                found.append(("", 'a call is JSON: {"name": ..., "arguments": {...}}'))
        return found

    def _result(self, name: str, argument: Any) -> str:
        if not name:
            return f"error: {argument}"
        if name not in self.config.tools:
            return f"error: there is no tool {name[:40]}; there is {', '.join(self.config.tools)}"
        if not isinstance(argument, str):
            return f"error: {name} takes the text '{_ARGUMENT[name]}'"
        if name == "calculator":
            try:
                return calculate(argument)
            except ValueError as e:
                return f"error: {e}"
        (result,) = self.sandbox.run([Program(argument)])
        error = "" if result.status == "passed" else f"error: {result.message or result.status}"
        return "\n".join(part for part in (result.stdout.rstrip("\n"), error) if part) or "(it printed nothing)"

    def _cut(self, text: str) -> str:
        most = self.config.max_chars
        return text if len(text) <= most else f"{text[:most]}... ({len(text) - most} more characters)"


def _turns_so_far(messages: Sequence[Message]) -> int:
    """Turns of the assistant since the user last spoke."""
    n = 0
    for message in reversed(messages):
        if message["role"] == "user":
            break
        n += message["role"] == "assistant"
    return n


class FunctionEnvironment:
    """Asks a function of the user's what comes next."""

    def __init__(self, config: FunctionConfig):
        self.config = config
        self.max_turns = config.max_turns
        self.function = find_function(config.function)

    def describe(self) -> str:
        return f"{self.config.function}, at most {self.max_turns} turns"

    def close(self) -> None:
        """There is nothing to end."""

    def reply(self, messages: Sequence[Message], text: str, fields: Mapping[str, Any]) -> list[Message] | None:
        """What the function says; None: the answer is complete.

        Raises:
            UserError: if it raises, or returns something else than messages, text or None.
        """
        name = self.config.function
        try:
            said = self.function(list(messages), text, dict(fields))
        except Exception as e:
            raise UserError(f"environment: {name} raised {type(e).__name__}: {e}") from e
        if said is None:
            return None
        said = [{"role": "user", "content": said}] if isinstance(said, str) else said
        if not isinstance(said, list) or not said or not all(map(_is_message, said)):
            raise UserError(
                f"environment: {name} must return None, text, or messages of the roles user and tool (got {said!r:.80})"
            )
        return said


def _is_message(message: Any) -> bool:
    told = message if isinstance(message, dict) else {}
    return told.get("role") in ("user", "tool") and isinstance(told.get("content"), str)
