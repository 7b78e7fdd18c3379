"""Rows of public data sets -> conversations, preferences, feedback, prompts, judged steps. Torch-free.

Which layout a file has is read off the keys of its first row: the first entry of the kind's table whose columns are all
there. Whatever a row holds comes out in one form: messages are `{role, content}` with the roles that templates know,
prompts are messages too, unless `data.chat` is false, when they stay text.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llmkit.config import UserError
from llmkit.data.config import SourceConfig
from llmkit.data.row import Message as Message, Row, UnusableRow as UnusableRow, brief, truth
from llmkit.data.sources import File, Piece, files_of, units_of, where, whole_records

Kind = Literal["dialogue", "preference", "feedback", "prompt", "steps"]


# --- what rows become ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dialogue:
    """A conversation whose assistant turns are learnt. With `data.chat: false` a user's text and the answer to it."""

    messages: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Preference:
    """Answers to one prompt, some of them better than others."""

    prompt: list[Message] | str
    responses: list[str]
    pairs: list[tuple[int, int, float]]
    """(better, worse, margin): indices into responses; the margin is 0 where the data gives none."""
    scores: list[float] | None = None
    """One for each response, where the data gives them."""
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Feedback:
    """One answer to a prompt, and whether it is a good one."""

    prompt: list[Message] | str
    response: str
    label: bool
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt that the model is to answer, and what the row says beside it."""

    prompt: list[Message] | str
    fields: dict[str, Any]
    """All other columns of the row, for those who grade the answer."""
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Steps:
    """An answer cut into steps, each with a label of its own (process rewards)."""

    prompt: list[Message] | str
    steps: list[str]
    labels: list[float | None]
    """One a step; None: not judged."""
    tools: list[Any] | None = None


# --- dialogues -------------------------------------------------------------------------------------------------------


def _dialogue(row: Row, messages: list[Message]) -> Dialogue:
    if not row.chat and [m["role"] for m in messages] != ["user", "assistant"]:
        raise UserError("a conversation, but data.chat is false: only a prompt and the answer to it can be plain text")
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise UnusableRow("no turn of the assistant, so there is nothing to learn")
    if not any(m["content"].strip() or m.get("tool_calls") for m in answers):
        raise UnusableRow("every turn of the assistant is empty, so there is nothing to learn")
    return Dialogue(row.started(messages) if row.chat else messages, row.tools())


def _from_messages(key: str) -> Callable[[Row], Dialogue]:
    return lambda row: _dialogue(row, row.messages(key))


def _instruction(row: Row) -> str:
    """Alpaca's question: the instruction, and below it the input if there is one."""
    given = row.optional_text("input")
    return row.text("instruction") + (f"\n{given}" if given else "")


def _history(row: Row) -> list[Message]:
    """Alpaca's earlier turns: pairs of question and answer."""
    messages: list[Message] = []
    for i, turn in enumerate(row.items("history") if row.values.get("history") else []):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(t, str) for t in turn):
            raise UserError(f"history: item {i}: a pair of question and answer is expected (got {brief(turn)})")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages


def _alpaca(row: Row) -> Dialogue:
    turn = [{"role": "user", "content": _instruction(row)}, {"role": "assistant", "content": row.text("output")}]
    return _dialogue(row, [*_history(row), *turn])


def _pair(question: str, answer: str) -> Callable[[Row], Dialogue]:
    def read(row: Row) -> Dialogue:
        return _dialogue(row, row.turns(question, "user") + row.turns(answer, "assistant"))

    return read


# --- preferences -----------------------------------------------------------------------------------------------------


def _chosen(key: str) -> Callable[[Row], Preference]:
    """A prompt or the conversation so far, a better answer and a worse one."""

    def read(row: Row) -> Preference:
        prompt = row.prompt(key)
        answers = [row.answer(side, prompt) for side in ("chosen", "rejected")]
        return Preference(prompt, answers, [(0, 1, row.margin_of_pair())], None, row.tools())

    return read


def _hh(row: Row) -> Preference:
    """Two whole dialogues that differ in the last turn only, as text with `Human:` and `Assistant:`, or as messages."""
    prompts, answers = [], []
    for side in ("chosen", "rejected"):
        messages = _spoken(side, row.text(side)) if row.is_text(side) else row.messages(side)
        if messages[-1]["role"] != "assistant":
            raise UnusableRow(f"{side}: the dialogue doesn't end with a turn of the assistant")
        prompts.append(messages[:-1])
        answers.append(str(messages[-1]["content"]))
    if prompts[0] != prompts[1]:
        raise UnusableRow("chosen and rejected differ before their last turn, so they answer different prompts")
    prompt: list[Message] | str
    if row.chat:
        prompt = row.asked(prompts[0], "chosen")
    else:
        text = row.text("chosen")
        prompt = text[: text.rindex(_ASSISTANT) + len(_ASSISTANT)]
        answers = [row.text(side)[len(prompt) :] for side in ("chosen", "rejected")]
    return Preference(prompt, answers, [(0, 1, row.margin_of_pair())], None, row.tools())


_ASSISTANT = "\n\nAssistant:"
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")


def _spoken(key: str, text: str) -> list[Message]:
    parts = _SPEAKER.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise UserError(f"{key}: a dialogue of 'Human:' and 'Assistant:' turns is expected (got {brief(text)})")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": roles[who], "content": said.strip()} for who, said in turns]


def _ranked(row: Row) -> Preference:
    """`ranking` names the responses best first; those in a list within it are equally good."""
    prompt, responses = row.prompt(), row.texts("responses")
    groups = [g if isinstance(g, list) else [g] for g in row.items("ranking")]
    named = [i for group in groups for i in group]
    if any(type(i) is not int for i in named) or sorted(named) != list(range(len(responses))):
        raise UserError(
            f"ranking: every number from 0 to {len(responses) - 1} once is expected, best first, with lists for ties "
            f"(got {brief(row.get('ranking'))})"
        )
    pairs = [
        (better, worse, 0.0)
        for above, below in itertools.combinations(groups, 2)
        for better, worse in itertools.product(above, below)
    ]
    return _preference(prompt, responses, pairs, None, row)


def _scored(row: Row) -> Preference:
    """A number for each response, the higher the better; equal ones make no pair."""
    prompt, responses, scores = row.prompt(), row.texts("responses"), row.numbers("scores")
    if len(scores) != len(responses):
        raise UserError(f"scores: {len(scores)} numbers for {len(responses)} responses")
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    pairs = [
        (a, b, scores[a] - scores[b] if row.margin else 0.0)
        for a, b in itertools.combinations(order, 2)
        if scores[a] > scores[b]
    ]
    return _preference(prompt, responses, pairs, scores, row)


def _preference(
    prompt: list[Message] | str,
    responses: list[str],
    pairs: list[tuple[int, int, float]],
    scores: list[float] | None,
    row: Row,
) -> Preference:
    if not pairs:
        raise UnusableRow("no response is better than another, so there is nothing to learn")
    return Preference(prompt, responses, pairs, scores, row.tools())


# --- feedback, prompts, steps ----------------------------------------------------------------------------------------


def _completed(row: Row) -> Feedback:
    prompt = row.prompt()
    return Feedback(prompt, row.answer("completion", prompt), truth(row.get("label")), row.tools())


def _labelled(key: str, label: str) -> Callable[[Row], Feedback]:
    def read(row: Row) -> Feedback:
        messages = row.messages(key)
        if messages[-1]["role"] != "assistant":
            raise UserError(f"{key}: the last message must be the answer that the label judges")
        prompt = row.asked(messages[:-1], key)
        return Feedback(prompt, str(messages[-1]["content"]), truth(row.get(label)), row.tools())

    return read


def _asked(row: Row) -> Prompt:
    return Prompt(row.prompt(), row.others("prompt"), row.tools())


def _conversation(key: str) -> Callable[[Row], Prompt]:
    """A conversation up to the last answer, which is kept as the field `answer` unless the row has one of its own."""

    def read(row: Row) -> Prompt:
        messages, fields = row.messages(key), row.others(key)
        if messages[-1]["role"] == "assistant":
            fields = {"answer": messages[-1]["content"], **fields}
            messages = messages[:-1]
        return Prompt(row.asked(messages, key), fields, row.tools())

    return read


def _instructed(row: Row) -> Prompt:
    fields = row.others("instruction", "input", "history")
    prompt = row.of_text(_instruction(row))
    if isinstance(prompt, list) and (history := _history(row)):
        prompt = row.started([*history, prompt[-1]])
    return Prompt(prompt, fields, row.tools())


def _questioned(row: Row) -> Prompt:
    """GSM8K's answers end with `#### 42`: what stands there is the answer, the whole is the solution."""
    fields = row.others("question")
    answer = fields.get("answer")
    if isinstance(answer, str) and "####" in answer:
        fields = {"solution": answer, **fields, "answer": answer.rpartition("####")[2].strip()}
    return Prompt(row.prompt("question"), fields, row.tools())


def _stepped(key: str) -> Callable[[Row], Steps]:
    def read(row: Row) -> Steps:
        prompt, steps, labels = row.prompt(), row.texts(key), row.items("labels")
        if len(labels) != len(steps):
            raise UserError(f"labels: {len(labels)} of them for {len(steps)} {key}")
        numbers: list[float | None] = []
        for i, label in enumerate(labels):
            if label is not None and (not isinstance(label, bool | int | float) or not math.isfinite(label)):
                raise UserError(f"labels: item {i}: a number, true, false or null is expected (got {brief(label)})")
            numbers.append(None if label is None else float(label))
        if all(n is None for n in numbers):
            raise UnusableRow("no step is labelled, so there is nothing to learn")
        return Steps(prompt, steps, numbers, row.tools())

    return read


# --- finding the layout ----------------------------------------------------------------------------------------------

_Entry = tuple[str, tuple[str, ...], Callable[[Row], Any]]  # name, columns that it needs, how a row is read

_LAYOUTS: dict[Kind, tuple[_Entry, ...]] = {
    "dialogue": (
        ("messages", ("messages",), _from_messages("messages")),
        ("sharegpt", ("conversations",), _from_messages("conversations")),
        ("alpaca", ("instruction", "output"), _alpaca),
        ("prompt/completion", ("prompt", "completion"), _pair("prompt", "completion")),
        ("question/answer", ("question", "answer"), _pair("question", "answer")),
    ),
    "preference": (
        ("ranking", ("prompt", "responses", "ranking"), _ranked),
        ("scores", ("prompt", "responses", "scores"), _scored),
        ("sharegpt preference", ("conversations", "chosen", "rejected"), _chosen("conversations")),
        ("prompt/chosen/rejected", ("prompt", "chosen", "rejected"), _chosen("prompt")),
        ("hh", ("chosen", "rejected"), _hh),
    ),
    "feedback": (
        ("prompt/completion/label", ("prompt", "completion", "label"), _completed),
        ("messages/label", ("messages", "label"), _labelled("messages", "label")),
        ("sharegpt/label", ("conversations", "label"), _labelled("conversations", "label")),
        ("sharegpt/kto_tag", ("conversations", "kto_tag"), _labelled("conversations", "kto_tag")),
        ("messages/kto_tag", ("messages", "kto_tag"), _labelled("messages", "kto_tag")),
    ),
    "prompt": (
        ("prompt", ("prompt",), _asked),
        ("messages", ("messages",), _conversation("messages")),
        ("sharegpt", ("conversations",), _conversation("conversations")),
        ("alpaca", ("instruction",), _instructed),
        ("question/answer", ("question",), _questioned),
    ),
    "steps": (
        ("prompt/completions/labels", ("prompt", "completions", "labels"), _stepped("completions")),
        ("prompt/steps/labels", ("prompt", "steps", "labels"), _stepped("steps")),
    ),
}


@dataclass(frozen=True)
class Layout:
    """How the rows of a file are read."""

    name: str
    read_row: Callable[[Row], Any] = field(repr=False)
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our name -> the column's."""
    chat: bool = True
    system: str | None = None
    margin: bool = False

    def read(self, record: Mapping[str, Any]) -> Any:
        """What a row becomes: a Dialogue, Preference, Feedback, Prompt or Steps.

        Raises:
            UnusableRow: there is nothing in it that could be learnt.
            UserError: it isn't as its layout has it. Neither names file or row: the caller knows them.
        """
        for theirs in self.columns.values():
            if theirs not in record:
                raise UserError(f"no field '{theirs}', which `columns` names")
        values = {k: v for k, v in record.items() if k not in self.columns.values()}
        values |= {ours: record[theirs] for ours, theirs in self.columns.items()}
        return self.read_row(Row(values, self.chat, self.system, self.margin))


def reader(
    keys: Collection[str],
    kind: Kind,
    columns: Mapping[str, str] | None = None,
    chat: bool = True,
    *,
    system: str | None = None,
    margin: bool = False,
) -> Layout:
    """The layout of rows with these keys.

    Args:
        keys: the columns of the first row.
        kind: what the rows are to become.
        columns: our name -> theirs, where they differ.
        chat: prompts are messages; False: text.
        system: the system message of conversations that have none.
        margin: preferences by scores: their difference is the pair's margin.

    Raises:
        UserError: naming the layouts that are known, when the rows have none of them.
    """
    columns = columns or {}
    for theirs in columns.values():
        if theirs not in keys:
            near = difflib.get_close_matches(theirs, keys, 1)
            hint = f" - did you mean '{near[0]}'?" if near else f": there is {', '.join(map(str, keys)) or 'none'}"
            raise UserError(f"no field '{theirs}', which `columns` names{hint}")
    names = {k for k in keys if k not in columns.values()} | set(columns)
    for name, needs, read_row in _LAYOUTS[kind]:
        if names.issuperset(needs):
            return Layout(name, read_row, dict(columns), chat, system, margin)
    known = "; ".join(f"{', '.join(needs)} ({name})" for name, needs, _ in _LAYOUTS[kind])
    raise UserError(
        f"the row has the fields {', '.join(map(str, keys)) or 'none'}, and no layout of a {kind} has these: one of {known} "
        "is expected; name columns that are called otherwise: `columns: {our name: theirs}`"
    )


def read_pieces(
    pieces: Iterable[Piece],
    layout_of: Callable[[Piece, Mapping[str, Any]], Layout],
    on_unusable: Callable[[Piece, int, UnusableRow], None] | None = None,
) -> Iterator[tuple[Piece, int, Any]]:
    """What `read_source` yields, of some of its pieces; `layout_of` gives that of a piece's file, seeing a row of it."""
    for piece in pieces:
        for number, record in whole_records(piece):
            try:
                value = layout_of(piece, record).read(record)
            except UnusableRow as e:
                if on_unusable is None:
                    raise UserError(f"{where(piece, number)}: {e}") from None
                on_unusable(piece, number, e)
                continue
            except UserError as e:
                raise UserError(f"{where(piece, number)}: {e}") from None
            yield piece, number, value


def read_source(
    source: SourceConfig,
    kind: Kind,
    chat: bool = True,
    *,
    system: str | None = None,
    margin: bool = False,
    say: Callable[[str], None] = lambda text: None,
    on_unusable: Callable[[Piece, int, UnusableRow], None] | None = None,
) -> Iterator[tuple[Piece, int, Any]]:
    """All rows of a source: the piece and the number in it (see `sources.where`), and what the row became.

    Args:
        say: is told the layout of each file.
        on_unusable: is given the rows that are left out. Default: the first of them is an error.

    Raises:
        UserError: naming file and row, for a row that isn't as its layout has it.
    """
    layouts: dict[str, Layout] = {}

    def layout_of(piece: Piece, record: Mapping[str, Any]) -> Layout:
        if piece.path not in layouts:
            found = reader(record.keys(), kind, source.columns, chat, system=system, margin=margin)
            layouts[piece.path] = found
            say(f"{piece.path}: layout {found.name}")
        return layouts[piece.path]

    pieces = [piece for unit in units_of(files_of(source), source.limit) for piece in unit]
    yield from read_pieces(pieces, layout_of, on_unusable)


def keys_of(file: File) -> list[str]:
    """The columns of a file's first row; none if it has no row.

    Raises:
        UserError: the file is no table, or its first row can't be read.
    """
    units = units_of([file])
    first = next(whole_records(replace(units[0][0], limit=1)), None) if units else None
    return [] if first is None else list(first[1])
