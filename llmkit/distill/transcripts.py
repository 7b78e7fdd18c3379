"""Tokens as bytes of text, and ids of a conversation read back into its messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmkit.config import UserError
from llmkit.data.row import Message
from llmkit.tokenizer import Tokenizer

_MARK = b"\xff"  # a byte that UTF-8 never has: stands around a control token's name among bytes of text
_LONGEST_CHARACTER = 4  # bytes


class Side:
    """A tokenizer, its tokens as bytes."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.control = tokenizer, tokenizer.special_ids
        self._rest = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self._first = [tokenizer.token_bytes(i, at_start=True) for i in range(tokenizer.vocab_size)]
        for i in self.control:
            self._rest[i] = _MARK + self._rest[i] + _MARK
        self._rest[tokenizer.end_of_turn_id] = _MARK * 2  # the same on both sides, whatever it is called
        within = tokenizer.encode_on("a", tokenizer.encode("a"))
        self._spaced = tokenizer.encode_on("a", [tokenizer.eos_id]) != within  # puts a space behind a control token

    def pieces(self, ids: Sequence[int], fresh: bool = True) -> list[bytes]:
        """What each id adds to the text, without the spaces that tokenizers put before it.

        Args:
            ids: of a text, or of what goes on after one.
            fresh: no text stands before them.
        """
        made, behind_control = [], fresh
        for i in ids:
            data = self._rest[i]
            if i in self.control:
                behind_control = True
                made.append(data)
                continue
            if fresh and self._first[i] != data:
                data = self._first[i]
            elif behind_control and self._spaced and data.startswith(b" "):
                data = data[1:]
            made.append(data)
            fresh = behind_control = False
        return made

    def encoded(self, text: str, before: Sequence[int], fresh: bool) -> list[int]:
        """The ids of a stretch of text.

        Args:
            before: all ids before it.
            fresh: no text is among them.
        """
        return self.tokenizer.encode(text) if fresh else self.tokenizer.encode_on(text, before)


def whole_characters(data: bytes) -> tuple[str, int, int]:
    """The text of bytes without the halves of characters at their ends, as rows that are cut have them.

    Returns:
        The text, how many bytes were skipped before it, and how many it is made of.
    """
    begins = (n for n, b in enumerate(data[:_LONGEST_CHARACTER]) if b & 0xC0 != 0x80)
    start = next(begins, len(data) if len(data) < _LONGEST_CHARACTER else 0)
    stop = len(data)
    for n in range(1, min(_LONGEST_CHARACTER, stop - start + 1)):
        first = data[stop - n]
        if first >= 0xC0:  # the character that begins here has 2, 3 or 4 bytes
            stop -= n if n < 2 + (first >= 0xE0) + (first >= 0xF0) else 0
            break
    return data[start:stop].decode("utf-8", "replace"), start, stop - start


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many items, or bytes, two begin with in common."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


# --- conversations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transcript:
    """A conversation that was read back."""

    messages: list[Message]
    turns: list[tuple[int, int]]
    """First and last + 1 token of the assistant's turns."""
    only_last: bool
    """`turns` holds only the last, since the template changes earlier ones."""


def told_in(
    tokenizer: Tokenizer, messages: list[Message], only_last: bool
) -> tuple[list[int], list[tuple[int, int]]] | None:
    """A conversation's ids and the assistant's turns in them; None if the template refuses it, or can't tell them."""
    try:
        made = tokenizer.encode_chat(messages, train_on="last" if only_last else "assistant")
    except UserError:
        return None
    return (made.ids, made.turns) if made.turns and made.turns[0][0] > 0 else None


@dataclass(frozen=True)
class _Frame:
    """What a template writes around the contents of messages, as bytes."""

    first: bytes
    """Before the first message."""
    behind_system: bytes | None
    """Between a system message and the first question; None: this is a conversation without one."""
    asked: bytes
    """Between a question and an answer, as far as it belongs to the prompt."""
    before_answers: tuple[bytes, bytes]
    """What an answer's turn begins with, and that of the last answer."""
    again: bytes
    """Between an answer and the next question."""
    end: bytes
    """Behind the last answer."""


class Transcripts:
    """Reads ids back into messages, by what a tokenizer's template writes around those of an example.

    It knows conversations of a system message, if there is one, and turns of user and assistant; it says of all others
    that it can't read them. What it reads gives the same ids when it is encoded again.
    """

    _PROBES = ("q1x7k", "q2x7k", "q3x7k", "q4x7k", "q5x7k")

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._side = tokenizer, Side(tokenizer)
        roles = ("system", "user", "assistant", "user", "assistant")
        told = [{"role": role, "content": text} for role, text in zip(roles, self._PROBES, strict=True)]
        frames = [frame for messages in (told, told[1:]) if (frame := self._learnt(messages)) is not None]
        # A template that writes a system message of its own begins like one with another's: the longer is looked for first.
        self._frames = sorted(frames, key=lambda frame: -len(frame.first))

    def _learnt(self, messages: list[Message]) -> _Frame | None:
        seams, prompt = self._seams(messages, False), self._seams(messages[:-1], True)
        if seams is None or prompt is None:
            return None
        first, *system, earlier, again, last, end = seams
        asked = prompt[-1]
        if not asked or not earlier.startswith(asked) or not last.startswith(asked):
            return None
        before = (earlier[len(asked) :], last[len(asked) :])
        return _Frame(first, system[0] if system else None, asked, before, again, end)

    def _seams(self, messages: list[Message], prompt: bool) -> list[bytes] | None:
        """What stands before, between and behind the contents of messages."""
        try:
            ids = self._tokenizer.encode_chat(messages, prompt, train_on="all").ids
        except UserError:
            return None
        rest, found = b"".join(self._side.pieces(ids)), []
        for message in messages:
            before, probe, rest = rest.partition(str(message["content"]).encode())
            if not probe:
                return None
            found.append(before)
        return [*found, rest]

    def read(self, ids: list[int]) -> Transcript | None:
        """The conversation, or None if its messages can't be told."""
        data = b"".join(self._side.pieces(ids))
        for frame in self._frames:
            parsed = _parsed(data, frame)
            found = None if parsed is None else self._checked(ids, *parsed)
            if found is not None:
                return found
        return None

    def _checked(self, ids: list[int], messages: list[Message], ended: bool) -> Transcript | None:
        """What was read, if it gives the same ids; where it was cut off, if those up to its last turn are the same."""
        for only_last in (False, True):
            told = told_in(self._tokenizer, messages, only_last)
            if told is None:
                continue
            made, turns = told
            start, stop = turns[-1]
            n = common_length(made, ids)
            if n == len(ids) or (not ended and n >= start):
                stop = stop if ended else len(ids)
                return Transcript(messages, [*turns[:-1], (start, stop)], only_last)
        return None


def _parsed(data: bytes, frame: _Frame) -> tuple[list[Message], bool] | None:
    """The messages, and whether the last of them came to its end."""
    if not data.startswith(frame.first):
        return None
    rest, parts = data[len(frame.first) :], []
    if frame.behind_system is not None:
        system, seam, rest = rest.partition(frame.behind_system)
        parts = [("system", system)]
        if not seam:
            return None
    while True:
        question, seam, rest = rest.partition(frame.asked)
        if not seam:
            return None
        parts.append(("user", question))
        answer, seam, after = rest.partition(frame.again)
        if not seam:
            break
        parts.append(("assistant", answer.removeprefix(frame.before_answers[0])))
        rest = after
    answer, ended = _last_answer(rest, frame)
    parts.append(("assistant", answer))
    try:
        return [{"role": role, "content": text.decode("utf-8")} for role, text in parts], ended
    except UnicodeDecodeError:
        return None


def _last_answer(turn: bytes, frame: _Frame) -> tuple[bytes, bool]:
    """Its content, and whether its end of turn is there; what follows that may be missing."""
    least = frame.end.find(_MARK * 2) + 2
    lengths = range(len(frame.end), least - 1, -1) if least > 1 else ()
    n = next((n for n in lengths if turn.endswith(frame.end[:n])), 0)
    before = frame.before_answers[1]
    if before.startswith(turn):  # it was cut off in what the template writes
        return b"", False
    content = turn[: len(turn) - n].removeprefix(before)
    if not n:
        _, skipped, n_bytes = whole_characters(content)
        content = content[skipped : skipped + n_bytes]
    return content, n > 0
