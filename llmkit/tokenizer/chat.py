"""Chat templates: a conversation -> text, with the spans that the assistant wrote.

A template is Jinja, the language that model folders ship theirs in, rendered in a sandbox: no attribute that starts with
an underscore, nothing mutable, and bounds on output, loops and the sizes of strings, as a model folder is not ours.
(Not bounded: what one filter or string method allocates. Read templates only from folders you chose.)

Text of users must never become a control token, yet the template must see it as it is. So a conversation that holds the
text of a control token, or a part of one where a template could complete it, is rendered twice: as it is, and with
those characters replaced one for one by private-use characters. If the two differ after the characters are put back,
the template treats such text in a way of its own, and the conversation is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from llmkit.config import UserError

ROLES = ("system", "user", "assistant", "tool")

# `trim_blocks` eats a newline after a block tag, so newlines are written as expressions.
CHATML = r"""{{- bos_token -}}
{%- if tools -%}
{{- '<|im_start|>system\n' -}}
{%- if messages[0]['role'] == 'system' -%}{{- messages[0]['content'] + '\n\n' -}}{%- endif -%}
{{- 'Tools, called by <tool_call>{"name": ..., "arguments": {...}}</tool_call>:' -}}
{%- for t in tools -%}{{- '\n' + (t['function'] if 'function' in t else t) | tojson -}}{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for m in messages -%}
{%- if not (tools and loop.first and m['role'] == 'system') -%}
{{- '<|im_start|>' + m['role'] + '\n' -}}
{%- if m['role'] == 'assistant' -%}
{%- generation -%}{{- m['content'] -}}
{%- for c in m['tool_calls'] or [] -%}
{{- '<tool_call>' + (c['function'] if 'function' in c else c) | tojson + '</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- m['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

MAX_STEPS = 1_000_000  # loop bodies, macro calls and numbers of range() in one rendering: about a second of work
FREE_OUTPUT = 65_536  # characters that a template may write on top of four times its input
_PRIVATE = range(0xF0000, 0x10FFFE)  # planes 15 and 16 have no meaning of their own
_PRIVATE_USED = re.compile("[\U000f0000-\U0010fffd]")


class TurnsUnclear(UserError):
    """The template doesn't tell what the assistant wrote: a longer conversation changes the text of an earlier turn."""


# --- the sandbox -----------------------------------------------------------------------------------------------------


class _Refused(jinja2.TemplateError):
    """The template went over a bound, or called raise_exception()."""


class _Budget:
    """What one rendering may spend."""

    def __init__(self, max_chars: int) -> None:
        self.max_chars = max_chars
        self.steps = MAX_STEPS

    def tick(self, n: int = 1) -> str:
        self.steps -= n
        if self.steps < 0:
            raise _Refused(f"it loops more than {MAX_STEPS} times")
        return ""

    def range(self, *args: int) -> range:
        numbers = range(*args)
        self.tick(len(numbers))
        return numbers

    def check(self, n_chars: int) -> None:
        if n_chars > self.max_chars:
            raise _Refused(f"it writes more than {self.max_chars} characters (4x its input + {FREE_OUTPUT})")

    def concat(self, *parts: Any) -> str:
        texts = [str(p) for p in parts]
        self.check(sum(map(len, texts)))
        return "".join(texts)


class _Metering(NodeTransformer):
    """Puts a tick into every loop and macro, and a bound on `~`, which Jinja doesn't let a sandbox intercept."""

    @staticmethod
    def _tick() -> nodes.ExprStmt:
        return nodes.ExprStmt(nodes.Call(nodes.Name("__tick", "load"), [], [], None, None))

    def _body(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, self._tick())
        return cast(nodes.Node, node)

    visit_For = visit_Macro = visit_CallBlock = _body

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.Name("__concat", "load"), list(node.nodes), [], None, None)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant wrote, put between two marks that `render` takes out."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, context: Any, caller: Callable[[], str]) -> str:
        start, end = context["__marks"]
        return f"{start}{caller()}{end}"


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        tree = _Metering().visit(tree)
        for node in tree.find_all(nodes.Node):
            node.set_environment(self)
        for node in tree.iter_child_nodes():
            node.set_lineno(1)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget: _Budget = context["__budget"]
        sized = [x for x in (left, right) if isinstance(x, (str, list, tuple))]
        if operator == "+" and len(sized) == 2:
            budget.check(len(left) + len(right))
        elif operator == "*" and len(sized) == 1:
            count = right if sized[0] is left else left
            budget.check(len(sized[0]) * max(0, int(count)))
        elif operator == "**" and (abs(left) > 1_000_000 or abs(right) > 64):
            raise _Refused("it computes a power that is too large")
        elif operator == "%" and isinstance(left, str) and re.search(r"\d{5}|\*", left):
            raise _Refused("it formats to a width that is too large")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes HTML characters: chat templates count on plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> _Environment:
    env = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    del env.globals["lipsum"]
    return env


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    """What transformers' apply_chat_template writes too."""
    shielded: str
    """As long as `text`; characters of messages that could be taken for a part of a control token are private ones."""
    restore: dict[int, str]
    """Private character -> the one that it stands for, for str.translate."""
    spans: list[tuple[int, int]] | None
    """Start and end character of what the assistant wrote, end of turn included; None: the template doesn't tell."""


class ChatTemplate:
    """One compiled template. Rendering keeps no state, so threads may share it.

    Raises:
        UserError: when the template isn't valid, with its line.
    """

    def __init__(self, source: str, name: str = "chat template") -> None:
        self.source = source
        self.name = name
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as e:
            raise UserError(f"{name}:{e.lineno}: not a valid template: {e.message}") from None
        except RecursionError:
            raise UserError(f"{name}: not a valid template: nested too deep") from None
        self.marks_assistant = re.search(r"\{%[-+]?\s*generation\b", source) is not None

    def _write(self, messages: Any, marks: str, variables: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """One rendering, its marks taken out: the text, and the spans between the marks."""
        budget = _Budget(4 * sum(map(len, _strings([messages, variables]))) + 64 * len(messages) + FREE_OUTPUT)
        hidden = {
            "__marks": marks, "__budget": budget, "__tick": budget.tick, "__concat": budget.concat, "range": budget.range
        }  # fmt: skip
        pieces, n_chars = [], 0
        try:
            for piece in self._template.generate(messages=messages, **variables, **hidden):
                n_chars += len(piece)
                budget.check(n_chars)
                pieces.append(piece)
        except _Refused as e:
            raise UserError(f"{self.name}: the template refuses this conversation: {e.message}") from None
        except Exception as e:
            raise UserError(f"{self.name}: the template fails: {type(e).__name__}: {e}") from None
        parts = re.split(f"([{marks}])", "".join(pieces))
        spans, at, start = [], 0, -1
        for part in parts:
            if part == marks[0] and start < 0:
                start = at
            elif part == marks[1] and start >= 0:
                spans.append((start, at))
                start = -1
            elif part in (marks[0], marks[1]) and part:
                raise UserError(f"{self.name}: generation blocks are nested, so what the assistant wrote is unclear")
            else:
                at += len(part)
        return "".join(p for p in parts if p not in (marks[0], marks[1])), spans

    def render(self, messages: list[dict[str, Any]], shield: Shield, variables: dict[str, Any]) -> Rendered:
        """Renders a checked conversation.

        Args:
            messages: as `check_messages` returns them.
            shield: knows the texts of the control tokens.
            variables: what else the template may use: bos_token, add_generation_prompt, tools, ...

        Raises:
            UserError: when the template fails, goes over a bound, or treats the text of control tokens specially.
        """
        tools = variables.get("tools")
        private = _unused(_strings([messages, tools, self.source]), 2 + len(shield.alphabet))
        marks, table = private[:2], dict(zip(map(ord, shield.alphabet), private[2:], strict=True))
        text, spans = self._write(messages, marks, variables)
        safe = [{k: v if k == "role" else shield.cover(v, table) for k, v in m.items()} for m in messages]
        safe_tools = shield.cover(tools, table)
        found = spans if self.marks_assistant else None
        if safe == messages and safe_tools == tools:
            return Rendered(text, text, {}, found)
        restore = {ord(to): chr(char) for char, to in table.items()}
        shielded, safe_spans = self._write(safe, marks, {**variables, "tools": safe_tools})
        if shielded.translate(restore) != text or safe_spans != spans:
            raise UserError(
                f"{self.name}: this conversation holds the text of a control token (or a part of one), which the "
                "template reads or changes, so it cannot be kept apart from the template's own: change the text"
            )
        return Rendered(text, shielded, restore, found)

    def derive_spans(
        self,
        messages: list[dict[str, Any]],
        shield: Shield,
        variables: dict[str, Any],
        whole: str,
        last_only: bool = False,
    ) -> list[tuple[int, int]] | None:
        """The assistant's spans of a template without generation tags: what each turn adds to the prompt before it.

        `last_only`: that of its last turn alone, however the template treats those before.

        Returns None when the text of a shorter conversation isn't the beginning of the longer one's (some templates drop
        the thinking of earlier turns): then no span can be trusted.
        """
        spans = []
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i in turns[-1:] if last_only else turns:
            if i == 0:  # nothing was asked yet, and many templates refuse an empty conversation
                return None
            before = self.render(messages[:i], shield, {**variables, "add_generation_prompt": True})
            turn = self.render(messages[: i + 1], shield, {**variables, "add_generation_prompt": False})
            if not turn.text.startswith(before.text) or not whole.startswith(turn.text):
                return None
            # What follows the end of turn, a newline mostly, belongs to the template and is never sampled.
            start, ends = len(before.text), [m.end() for m in shield.pattern.finditer(turn.shielded, len(before.text))]
            blank_after = ends and not turn.text[ends[-1] :].strip()
            spans.append((start, ends[-1] if blank_after else max(start, len(turn.text.rstrip()))))
        return spans


# --- messages --------------------------------------------------------------------------------------------------------


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A conversation as plain dicts. Raises UserError that names the message."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise UserError(f"messages: a list of at least one message is expected (got {type(messages).__name__})")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UserError(f"message {i}: expected {{role, content}} (got {type(message).__name__})")
        if message.get("role") not in ROLES:
            raise UserError(f"message {i}: role must be one of {', '.join(ROLES)} (got {message.get('role')!r})")
        calls = message["role"] == "assistant" and message.get("tool_calls")
        if not isinstance(message.get("content"), str) and not (calls and message.get("content") is None):
            got = type(message["content"]).__name__ if "content" in message else "nothing"
            raise UserError(f"message {i} ({message['role']}): content must be text (got {got})")
        _check_json(message, f"message {i}")
    return [{**m, "content": m.get("content") or ""} for m in messages]  # a call of a tool may come without words


def _check_json(value: Any, name: str, depth: int = 0) -> None:
    """Templates see only what JSON can hold: an object's methods could do anything."""
    if depth > 32:
        raise UserError(f"{name}: nested more than 32 levels deep")
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise UserError(f"{name}: a key must be text (got {key!r})")
            _check_json(item, f"{name}.{key}", depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_json(item, name, depth + 1)
    elif type(value) is str:
        check_text(value, name)
    elif value is not None and type(value) not in (bool, int, float):
        raise UserError(f"{name}: only text, numbers, lists and mappings are known (got {type(value).__name__})")


def check_text(text: Any, name: str = "text") -> None:
    """Raises UserError unless this is text that UTF-8 can hold."""
    if not isinstance(text, str):
        raise UserError(f"{name}: text is expected (got {type(text).__name__})")
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise UserError(f"{name}: half a surrogate pair at character {e.start} (got {text[e.start]!r})") from None


def check_tools(tools: Any) -> list[Any] | None:
    """The tools a template may list: JSON schemas."""
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"tools: a list is expected (got {type(tools).__name__})")
    _check_json(tools, "tools")
    return tools


def check_written(name: str, text: str, messages: list[dict[str, Any]], tools: list[Any] | None) -> None:
    """Raises UserError if a template left out a tool, or a call of one, as those that know none do without a word."""
    calls = [call for m in messages for call in m.get("tool_calls") or ()]
    for what, given in (("tools", tools or ()), ("tool_calls", calls)):
        for tool in given:
            function = tool.get("function", tool) if isinstance(tool, dict) else None
            called = function.get("name") if isinstance(function, dict) else None
            if isinstance(called, str) and called not in text:
                raise UserError(f"{name}: it doesn't write the {what} of this conversation ({called}): choose another")


def _strings(value: Any) -> Iterator[str]:
    """Every text within plain data, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _unused(texts: Iterator[str], count: int) -> str:
    """Private-use characters that none of the texts holds."""
    used = {c for text in texts if not text.isascii() for c in _PRIVATE_USED.findall(text)}
    free = [chr(c) for c in range(_PRIVATE.start, _PRIVATE.start + min(len(used) + count, len(_PRIVATE)))]
    free = [c for c in free if c not in used][:count]
    if len(free) < count:
        raise UserError("messages: they use nearly every private-use character of Unicode, so none is left for marks")
    return "".join(free)


class Shield:
    """Finds what in a user's text could be taken for a control token, or become one together with a template's text."""

    def __init__(self, literals: Sequence[str]) -> None:
        self.literals = sorted(literals, key=lambda t: (-len(t), t))
        # Without literals, a pattern that never matches.
        self.pattern = re.compile("|".join(map(re.escape, self.literals)) or r"(?!)")
        self.alphabet = "".join(sorted({c for t in self.literals for c in t if not c.isspace()}))
        self._starts = {t[:n] for t in self.literals for n in range(1, len(t))}
        self._ends = {t[n:] for t in self.literals for n in range(1, len(t))}
        self._longest = max(map(len, self.literals), default=0)

    def _risky(self, text: str) -> list[tuple[int, int]]:
        """Character ranges: whole control tokens anywhere; parts of them at either end, where a template goes on."""
        ranges = [m.span() for m in self.pattern.finditer(text)]
        inner = text.strip()  # templates often trim
        if not inner:
            return ranges
        first = text.index(inner[0])
        last = first + len(inner)
        if len(inner) < self._longest and any(inner in t for t in self.literals):
            return [(first, last)]
        for n in range(min(self._longest - 1, len(inner)), 0, -1):
            if inner[:n] in self._ends:
                ranges.append((first, first + n))
                break
        for n in range(min(self._longest - 1, len(inner)), 0, -1):
            if inner[-n:] in self._starts:
                ranges.append((last - n, last))
                break
        return ranges

    def cover(self, value: Any, table: dict[int, str]) -> Any:
        """Plain data with risky characters of its texts replaced, one for one."""
        if isinstance(value, str):
            chars: list[str] | None = None
            for start, end in self._risky(value):
                chars = list(value) if chars is None else chars
                chars[start:end] = value[start:end].translate(table)
            return value if chars is None else "".join(chars)
        if isinstance(value, dict):  # a key is looked up by the template, so only whole control tokens are covered
            return {
                self.pattern.sub(lambda m: m[0].translate(table), k): self.cover(v, table) for k, v in value.items()
            }
        if isinstance(value, list):
            return [self.cover(v, table) for v in value]
        return value
