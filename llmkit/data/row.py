"""One row of a data set: its columns under our names, each checked as it is read. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.config import UserError

Message = dict[str, Any]

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "function_call": "assistant", "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool",
}  # fmt: skip


class UnusableRow(UserError):
    """A row as its layout has them, from which nothing can be learnt: the caller may leave it out and count it."""


@dataclass(frozen=True)
class Row:
    """The columns of a row under our names, and how they are to be read."""

    values: Mapping[str, Any]
    chat: bool = True
    system: str | None = None
    margin: bool = False

    def get(self, key: str) -> Any:
        if key not in self.values:
            raise UserError(f"no field '{key}', which the first row of the file has")
        return self.values[key]

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            raise UserError(f"{key}: text is expected (got {brief(value)})")
        return value

    def optional_text(self, key: str) -> str:
        return "" if self.values.get(key) is None else self.text(key)

    def items(self, key: str) -> list[Any]:
        """A list, also as JSON text, which is how csv files hold one."""
        value = self.get(key)
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = parsed(key, value)
        if not isinstance(value, list):
            raise UserError(f"{key}: a list is expected (got {brief(value)})")
        return value

    def texts(self, key: str) -> list[str]:
        found = self.items(key)
        for i, value in enumerate(found):
            if not isinstance(value, str):
                raise UserError(f"{key}: item {i}: text is expected (got {brief(value)})")
        return found

    def numbers(self, key: str) -> list[float]:
        found = self.items(key)
        for i, value in enumerate(found):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{key}: item {i}: a number is expected (got {brief(value)})")
        return [float(v) for v in found]

    def is_text(self, key: str) -> bool:
        return isinstance(self.get(key), str)

    def messages(self, key: str) -> list[Message]:
        found = self.items(key)
        if not found:
            raise UserError(f"{key}: a conversation without a message")
        return [_message(item, f"{key}: message {i}") for i, item in enumerate(found)]

    def turns(self, key: str, role: str) -> list[Message]:
        """Messages, or text as the one message of a role."""
        return [{"role": role, "content": self.text(key)}] if self.is_text(key) else self.messages(key)

    def prompt(self, key: str = "prompt") -> list[Message] | str:
        """What stands before the answer: text, or messages."""
        if self.is_text(key):
            return self.of_text(self.text(key))
        return self.asked(self.messages(key), key)

    def of_text(self, text: str) -> list[Message] | str:
        return self.started([{"role": "user", "content": text}]) if self.chat else text

    def asked(self, messages: list[Message], key: str) -> list[Message]:
        """Messages that an answer may follow."""
        if not self.chat:
            raise UserError(f"{key}: a conversation, but data.chat is false: prompts and answers would have to be text")
        if not messages or messages[-1]["role"] not in ("user", "tool"):
            raise UserError(f"{key}: the message before an answer must be the user's or a tool's")
        return self.started(messages)

    def started(self, messages: list[Message]) -> list[Message]:
        """With a system message: the row's own, else the recipe's, if there is one."""
        if messages[0]["role"] == "system":
            return messages
        system = self.optional_text("system") or self.system
        return [{"role": "system", "content": system}, *messages] if system else messages

    def answer(self, key: str, prompt: list[Message] | str) -> str:
        """An answer to a prompt: text, one message of the assistant, or the whole conversation that ends with it."""
        if self.is_text(key):
            return self.text(key)
        value = self.get(key)
        messages = [_message(value, key)] if isinstance(value, dict) else self.messages(key)
        if isinstance(prompt, list) and len(messages) > 1:
            bare = [m for m in prompt if m["role"] != "system"]
            begun = [m for m in messages if m["role"] != "system"]
            messages = begun[len(bare) :] if begun[: len(bare)] == bare else messages
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise UserError(f"{key}: one answer of the assistant to the prompt is expected (got {brief(value)})")
        return str(messages[0]["content"])

    def tools(self) -> list[Any] | None:
        value = self.values.get("tools")
        if isinstance(value, str):
            value = parsed("tools", value) if value.strip() else None
        if value in (None, []):
            return None
        if not isinstance(value, list):
            raise UserError(f"tools: a list of tools is expected (got {brief(value)})")
        return value

    def margin_of_pair(self) -> float:
        """By how much the better answer is to be ahead; 0 where the row doesn't say."""
        value = self.values.get("margin")
        if value is None:
            return 0.0
        try:
            found = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            found = math.nan
        if not math.isfinite(found):
            raise UserError(f"margin: a number is expected (got {brief(value)})")
        return found

    def others(self, *used: str) -> dict[str, Any]:
        return {k: v for k, v in self.values.items() if k not in (*used, "tools", "system")}


def brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:56]}..."


def parsed(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{key}: not JSON: {e}") from None


def _message(item: Any, name: str) -> Message:
    """One message in OpenAI's form, or as ShareGPT has it."""
    if not isinstance(item, dict):
        raise UserError(f"{name}: {{role, content}} or {{from, value}} is expected (got {brief(item)})")
    given = {k: v for k, v in item.items() if v is not None}  # parquet fills what a message lacks with nulls
    said = given.pop("from", None) if "role" not in given else given.pop("role")
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise UserError(f"{name}: role must be one of {', '.join(_ROLES)} (got {brief(said)})")
    content = given.pop("value", None) if "content" not in given else given.pop("content")
    if said == "function_call":
        return {"role": role, "content": "", "tool_calls": _tool_calls(content, name)}
    if isinstance(content, list):
        content = _joined(content, name)
    if content is None and role == "assistant" and given.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise UserError(f"{name} ({role}): content must be text (got {brief(content)})")
    if not given.get("tool_calls", True):
        del given["tool_calls"]
    return {"role": role, "content": content, **given}


def _joined(parts: list[Any], name: str) -> str:
    """The text of content that is a list of parts."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise UserError(f"{name}: only parts of text are read (got {brief(kind)})")
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(content: Any, name: str) -> list[Any]:
    """ShareGPT's function_call: JSON text of a call, or of a list of them."""
    calls = parsed(f"{name} (function_call)", content) if isinstance(content, str) else content
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise UserError(f"{name} (function_call): {{name, arguments}} is expected (got {brief(call)})")
    return [{"type": "function", "function": call} for call in calls]


def truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    said = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False, "-1": False}
    found = said.get(str(value).strip().lower())
    if found is None or not isinstance(value, int | float | str):
        raise UserError(f"label: true or false is expected (got {brief(value)})")
    return found
