"""Texts on a terminal: coloured by role, what is learnt underlined; or as a table, a token a line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence

from llmkit.tools.inspect.shown import Text, Token

_COLOURS = {
    "control": "35",
    "system": "33",
    "user": "36",
    "assistant": "32",
    "tool": "34",
    "text": "39",
    "hidden": "31",
    "padding": "90",
}
_LEARNT = "1;4;"  # bold and underlined
_BRACKETS = ("\u27e6", "\u27e7")  # around what is learnt, where there are no colours


def colours_wanted() -> bool:
    """Whether the output is a terminal that wasn't told to stay plain."""
    return sys.stdout is not None and sys.stdout.isatty() and "NO_COLOR" not in os.environ


def legend(coloured: bool) -> str:
    if not coloured:
        return f"{_BRACKETS[0]}learnt{_BRACKETS[1]}"
    roles = " ".join(f"\x1b[{code}m{role}\x1b[0m" for role, code in _COLOURS.items() if role != "padding")
    return f"{roles} \x1b[{_LEARNT}39mlearnt\x1b[0m"


def lines_of(text: Text, coloured: bool, table: bool) -> Iterator[str]:
    """A text with its title."""
    n_learnt = sum(token.learnt for token in text.tokens)
    padding = f", {text.n_padding} of padding behind it" if text.n_padding else ""
    yield f"--- {text.title}: {len(text.tokens)} tokens, {n_learnt} learnt{padding}"
    yield from _table(text.tokens) if table else [_running(text.tokens, coloured)]


def _running(tokens: Sequence[Token], coloured: bool) -> str:
    parts: list[str] = []
    if coloured:
        for token in tokens:
            style = (_LEARNT if token.learnt else "") + _COLOURS[token.role]
            parts.append(f"\x1b[{style}m{_printable(token.text)}\x1b[0m" if token.text else "")
        return "".join(parts)
    learning = False
    for token in tokens:
        if token.learnt != learning:
            parts.append(_BRACKETS[not token.learnt])
            learning = token.learnt
        parts.append(_printable(token.text))
    return "".join(parts) + (_BRACKETS[1] if learning else "")


def _printable(text: str) -> str:
    """The text itself, but for what would steer the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _table(tokens: Sequence[Token]) -> Iterator[str]:
    names: tuple[str, ...] = ("id", "role", "document", "position", "weight", "text")
    has_label, has_value = any(t.label is not None for t in tokens), any(t.value is not None for t in tokens)
    rows: list[tuple[str, ...]] = [names + (("label",) if has_label else ()) + (("value",) if has_value else ())]
    for t in tokens:
        weight, shown = f"{t.weight:.4g}" if t.learnt else "-", repr(t.text)[1:-1]
        row: tuple[str, ...] = (str(t.id), t.role, str(t.document), str(t.position), weight, shown)
        row += ((t.label or "",) if has_label else ()) + (
            (("" if t.value is None else f"{t.value:.4f}"),) if has_value else ()
        )
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
