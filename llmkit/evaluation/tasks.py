"""The benchmarks: how a row of each data set becomes a question, and what is asked of its answer. Torch-free.

Column names are those of the data sets on the hub; local files hold the same.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmkit.config import UserError

Record = dict[str, Any]
Kind = Literal["choice", "letter", "number", "spans", "code", "text"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Item:
    """One question."""

    question: str
    answer: str
    """What follows the question where it stands as an example."""
    group: str = ""
    """Its subject, or whatever its data set is divided by."""
    choices: tuple[str, ...] = ()
    """Kind choice: the continuations that are weighed. Kind letter: the options' letters."""
    right: int | None = None
    """The number of the right choice."""
    fields: Record = field(default_factory=dict)
    """What graders of written answers need."""
    bare: str = ""
    """The question without options and frame, by which it is found in other texts; "": as it is asked."""


@dataclass(frozen=True)
class Task:
    """A benchmark."""

    name: str
    kind: Kind
    """choice: the likeliest continuation; letter, number, spans, text: of a written answer, the option, the number, DROP's
    spans or the whole text; code: a program against its tests."""
    read: Callable[[Record], Item]
    """Raises UserError for a row that does not hold what it should."""
    path: str = ""
    """On the hub."""
    subset: str | None = None
    """Its configuration there; "*": all of them."""
    split: str = "test"
    shots_split: str | None = None
    """Where examples come from."""
    n_shots: int = 0
    """Examples that are shown where there are any."""
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    """Plain text: what ends a written answer. A chat model ends its turn instead."""
    intro: str = ""
    """What a plain prompt begins with; {group} is the subject."""
    joint: str = " "
    """What stands between question and answer in plain text."""


# --- columns ---------------------------------------------------------------------------------------------------------


def _text(row: Mapping[str, Any], name: str) -> str:
    value = _any(row, name)
    if not isinstance(value, str):
        raise UserError(f"'{name}' must be text (got {str(value)[:60]!r})")
    return value


def _any(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise UserError(f"the row has no '{name}', it has {', '.join(sorted(row)) or 'nothing'}")
    return row[name]


def _texts(row: Mapping[str, Any], name: str, least: int = 2) -> list[str]:
    value = _any(row, name)
    if (
        not isinstance(value, list)
        or not least <= len(value) <= len(LETTERS)
        or not all(isinstance(v, str) for v in value)
    ):
        raise UserError(f"'{name}' must be a list of {least} to {len(LETTERS)} texts (got {str(value)[:60]!r})")
    return value


def _number_of(value: Any, n: int, name: str) -> int:
    """The number of an option that is told by its index from 0 or by its letter."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < n:
        return value
    if isinstance(value, str):
        letter = value.strip().strip("().").upper()
        if letter.isdecimal() and len(letter) < 3 and int(letter) < n:
            return int(letter)
        if len(letter) == 1 and letter in LETTERS[:n]:
            return LETTERS.index(letter)
    raise UserError(f"'{name}' must be an index below {n} or one of {', '.join(LETTERS[:n])} (got {value!r})")


def _lettered(options: list[str], form: str = "{}. {}") -> str:
    return "\n".join(form.format(letter, option.strip()) for letter, option in zip(LETTERS, options, strict=False))


# --- rows of each data set -------------------------------------------------------------------------------------------


def _mmlu(row: Record) -> Item:
    options = _texts(row, "choices")
    right = _number_of(_any(row, "answer"), len(options), "answer")
    question = f"{_text(row, 'question').strip()}\n{_lettered(options)}\nAnswer:"
    letters = tuple(LETTERS[: len(options)])
    return Item(question, letters[right], str(row.get("subject") or ""), letters, right, bare=_text(row, "question"))


def _mmlu_pro(row: Record) -> Item:
    options = _texts(row, "options")
    told = row.get("answer") if row.get("answer") is not None else _any(row, "answer_index")
    right = _number_of(told, len(options), "answer")
    asked = f"Question:\n{_text(row, 'question').strip()}\nOptions:\n{_lettered(options)}"
    question = f"{asked}\nAnswer: Let's think step by step."
    thought = str(row.get("cot_content") or "").removeprefix("A: Let's think step by step.").strip()
    answer = thought or f"The answer is ({LETTERS[right]})."
    letters = tuple(LETTERS[: len(options)])
    return Item(question, answer, str(row.get("category") or ""), letters, right, bare=_text(row, "question"))


def _gpqa(row: Record) -> Item:
    """The right option comes first in the data set, so the options are put in an order drawn from the question."""
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    options = [_text(row, name).strip() for name in names]
    asked = _text(row, "Question").strip()
    order = list(range(4))
    random.Random(hashlib.sha256(asked.encode()).digest()).shuffle(order)
    shown, right = [options[k] for k in order], order.index(0)
    question = f"What is the correct answer to this question: {asked}\nChoices:\n{_lettered(shown, '({}) {}')}\nAnswer:"
    group = row.get("High-level domain") or row.get("Subdomain") or ""
    letters = tuple(f"({letter})" for letter in LETTERS[:4])
    return Item(question, letters[right], str(group), letters, right, bare=asked)


def _chinese(asked: str, answer: str) -> Callable[[Record], Item]:
    """C-Eval and CMMLU, which differ in the names of two columns."""

    def read(row: Record) -> Item:
        options = [str(_any(row, letter)) for letter in LETTERS[:4]]
        right = _number_of(_any(row, answer), 4, answer)
        question = f"{_text(row, asked).strip()}\n{_lettered(options)}\n答案："
        letters = tuple(LETTERS[:4])
        return Item(question, letters[right], str(row.get("subject") or ""), letters, right, bare=_text(row, asked))

    return read


def _gsm8k(row: Record) -> Item:
    answer = _text(row, "answer")
    if "####" not in answer:
        raise UserError(f"'answer' must end in '#### ' and the number (got {answer[-60:]!r})")
    right = answer.rpartition("####")[2].strip()
    asked = _text(row, "question").strip()
    return Item(f"Question: {asked}\nAnswer:", answer.strip(), fields={"answer": right}, bare=asked)


def _drop(row: Record) -> Item:
    answers = _drop_answers(row)
    question = f"{_text(row, 'passage').strip()} {_text(row, 'question').strip()}"
    return Item(question, ", ".join(answers[0]), fields={"answers": answers})


def _drop_answers(row: Record) -> list[list[str]]:
    """Every right answer, each one or several spans; in either of the hub's layouts."""
    found: list[list[str]] = []
    if "answers_spans" in row:
        spans = row["answers_spans"].get("spans") if isinstance(row["answers_spans"], dict) else None
        found += [[span] for span in spans or [] if isinstance(span, str)]
    else:
        told = _any(row, "answer")
        more = row.get("validated_answers") or {}
        candidates = [told] if isinstance(told, dict) else []
        if isinstance(more, dict) and isinstance(more.get("number"), list):
            keys = [key for key in ("number", "date", "spans") if key in more]
            candidates += [
                dict(zip(keys, values, strict=True)) for values in zip(*(more[k] for k in keys), strict=True)
            ]
        found += [_drop_answer(candidate) for candidate in candidates]
    found = [spans for spans in found if any(span.strip() for span in spans)]
    if not found:
        raise UserError("no answer: 'answer' must hold a number, a date or spans, or 'answers_spans' spans")
    return list({tuple(spans): spans for spans in found}.values())


def _drop_answer(told: Mapping[str, Any]) -> list[str]:
    if str(told.get("number") or "").strip():
        return [str(told["number"]).strip()]
    if told.get("spans"):
        return [str(span) for span in told["spans"]]
    date = told.get("date") or {}
    return [" ".join(str(date[k]) for k in ("day", "month", "year") if date.get(k))]


def _humaneval(row: Record) -> Item:
    fields = {name: _text(row, name) for name in ("prompt", "test", "entry_point")}
    solution = str(row.get("canonical_solution") or "")
    return Item(fields["prompt"], solution, fields=fields)


_FUNCTION_ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_SUBJECT = "The following are multiple choice questions (with answers) about {group}.\n\n"
_ALL = (
    Task("mmlu", "choice", _mmlu, "cais/mmlu", "all", "test", "dev", 5, intro=_SUBJECT),
    Task(
        "mmlu_pro", "letter", _mmlu_pro, "TIGER-Lab/MMLU-Pro", None, "test", "validation", 5, 2048, ("Question:",),
        intro=_SUBJECT,
    ),
    Task("gpqa", "choice", _gpqa, "Idavidrein/gpqa", "gpqa_main", "train"),
    Task("drop", "spans", _drop, "EleutherAI/drop", None, "validation", "train", 0, 256, (".", "\n")),
    Task("humaneval", "code", _humaneval, "openai/openai_humaneval", None, "test", None, 0, 1024, _FUNCTION_ENDS, joint=""),
    Task("gsm8k", "number", _gsm8k, "openai/gsm8k", "main", "test", "train", 5, 512, ("Question:",)),
    Task("ceval", "choice", _chinese("question", "answer"), "ceval/ceval-exam", "*", "val", "dev", 5),
    Task("cmmlu", "choice", _chinese("Question", "Answer"), "haonan-li/cmmlu", "*", "test", "dev", 5),
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


# --- files of one's own ----------------------------------------------------------------------------------------------


def own_task(name: str, row: Record) -> Task:
    """A task whose rows are in one's own file, by the columns of its first row.

    `question, choices, answer`: the options' texts are weighed, the answer is an index or a letter. `prompt, test,
    entry_point`: programs, as in HumanEval. `question, answer`: written, right if it is the same text.

    Raises:
        UserError: other columns.
    """
    if {"question", "choices", "answer"} <= row.keys():
        return Task(name, "choice", _own_choice)
    if {"prompt", "test", "entry_point"} <= row.keys():
        return Task(name, "code", _humaneval, max_new_tokens=1024, stop=_FUNCTION_ENDS, joint="")
    if {"question", "answer"} <= row.keys():
        return Task(name, "text", _own_text, max_new_tokens=64, stop=("\n",))
    raise UserError(
        f"{name}: is none of {', '.join(TASKS)}, and its rows ({', '.join(sorted(row))}) are none of a task of yours: "
        "question, choices, answer; question, answer; or prompt, test, entry_point"
    )


def _own_choice(row: Record) -> Item:
    options = _texts(row, "choices")
    right = _number_of(_any(row, "answer"), len(options), "answer")
    return Item(_text(row, "question"), options[right], str(row.get("subject") or ""), tuple(options), right)


def _own_text(row: Record) -> Item:
    answer = _any(row, "answer")
    shown = answer[0] if isinstance(answer, list) and answer else answer
    return Item(_text(row, "question"), str(shown), str(row.get("subject") or ""), fields={"answer": answer})
