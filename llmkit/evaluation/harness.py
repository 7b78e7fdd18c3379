"""Asks a respondent the questions of a task and grades what it says, one record a question.

Three things are kept apart (B71): a wrong answer is 0, a grader that broke gives None and is counted, and a broken sandbox
is the latter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.evaluation.asking import OnRows, Prompt, Respondent, Weighed, Written
from llmkit.evaluation.rows import Questions
from llmkit.evaluation.spans import drop_scores
from llmkit.evaluation.tasks import Item, Task
from llmkit.rollout.rewards.code import program_of
from llmkit.rollout.rewards.config import ExactReward, NumericReward
from llmkit.rollout.rewards.graders import ExactGrader, NumericGrader, chosen_letter
from llmkit.rollout.rewards.grading import Answer
from llmkit.sandbox.cage import Sandbox
from llmkit.sandbox.verdict import Program

Record = dict[str, Any]
METRICS: dict[str, tuple[str, ...]] = {
    "choice": ("acc", "acc_norm"),
    "letter": ("acc",),
    "number": ("acc",),
    "spans": ("f1", "em"),
    "text": ("acc",),
    "code": ("pass@1",),
}
"""Of each kind, the figure that counts first."""


@dataclass(frozen=True)
class Told:
    """What came of a question."""

    item: Item
    grades: dict[str, float | None]
    """By METRICS; None: the grader broke."""
    record: Record
    """For people: prompt, answer, right answer, log-probabilities, grades."""


def examine(
    who: Respondent,
    questions: Questions,
    *,
    sandbox: Sandbox | None = None,
    max_new_tokens: int | None = None,
    on_rows: OnRows = lambda n: None,
) -> list[Told]:
    """Asks all questions of a task.

    Args:
        who: a model, or whatever else answers.
        questions: the task with its items and examples.
        sandbox: runs programs; needed by tasks of kind code alone.
        max_new_tokens: of a written answer; None: as many as the task allows.
        on_rows: called with the number of questions done since the last call; of kind choice, of options.
    """
    task = questions.task
    prompts = [_prompt(questions, item) for item in questions.items]
    if task.kind == "choice":
        weighed = who.weigh([(p, i.choices) for p, i in zip(prompts, questions.items, strict=True)], on_rows)
        return [_weighed(task, i, p, w, who.chat) for i, p, w in zip(questions.items, prompts, weighed, strict=True)]
    stop = () if who.chat else task.stop
    written = who.write(prompts, max_new_tokens or task.max_new_tokens, stop, on_rows)
    graded = _GRADERS[task.kind](questions.items, [w.text for w in written], sandbox)
    return [
        _written(task, item, prompt, answer, grade, who.chat)
        for item, prompt, answer, grade in zip(questions.items, prompts, written, graded, strict=True)
    ]


def n_steps(questions: Questions) -> int:
    """How far `on_rows` counts."""
    if questions.task.kind == "choice":
        return sum(len(item.choices) for item in questions.items)
    return len(questions.items)


def _prompt(questions: Questions, item: Item) -> Prompt:
    task = questions.task
    intro = task.intro.format(group=item.group.replace("_", " ")) if item.group else ""
    return Prompt(item.question, questions.examples_for(item), intro, task.joint)


# --- grades ----------------------------------------------------------------------------------------------------------


def _weighed(task: Task, item: Item, prompt: Prompt, said: Weighed, chat: bool) -> Told:
    """The likeliest option, by its log-probability and by that per byte; of equals the first."""
    per_byte = [v / max(1, len(text.encode())) for v, text in zip(said.logprobs, item.choices, strict=True)]
    chosen = [_best(said.logprobs), _best(per_byte)]
    grades: dict[str, float | None] = {
        name: float(k == item.right) for name, k in zip(METRICS["choice"], chosen, strict=True)
    }
    more = {
        "given": item.choices[chosen[0]],
        "logprobs": dict(zip(item.choices, said.logprobs, strict=False))
        if len(set(item.choices)) == len(item.choices)
        else said.logprobs,
    }
    return Told(item, grades, _record(task, item, prompt, grades, more, said.n_shown, said.cut, chat))


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _written(
    task: Task, item: Item, prompt: Prompt, said: Written, grade: tuple[dict[str, float | None], str], chat: bool
) -> Told:
    grades, note = grade
    more: Record = {"given": said.text, "finished": said.finished}
    if note:
        more["note"] = note
    return Told(item, grades, _record(task, item, prompt, grades, more, said.n_shown, said.cut, chat))


def _record(
    task: Task,
    item: Item,
    prompt: Prompt,
    grades: dict[str, float | None],
    more: Record,
    n_shown: int,
    cut: bool,
    chat: bool,
) -> Record:
    shown = Prompt(prompt.question, prompt.examples[len(prompt.examples) - n_shown :], prompt.before, prompt.joint)
    right: Any = item.fields.get("answers") or item.fields.get("answer") or item.answer
    if item.right is not None and item.choices:
        right = item.choices[item.right]
    told: Record = {
        "task": task.name,
        "group": item.group,
        "prompt": shown.messages if chat else shown.text,
        "right": right,
    }
    return told | more | {"examples": n_shown, "cut": cut} | grades


Graded = list[tuple[dict[str, float | None], str]]
"""Of each answer its grades, and a note for people."""


def _answer(text: str, item: Item) -> Answer:
    return Answer(prompt="", text=text, ids=[], n_prompt=0, finished=True, fields=item.fields, messages=[])


def _one(name: str, grade: float | None, note: str = "") -> tuple[dict[str, float | None], str]:
    return {name: grade}, note


def _letters(items: Sequence[Item], texts: Sequence[str], _: Sandbox | None) -> Graded:
    found = [chosen_letter(text, "".join(item.choices)) for item, text in zip(items, texts, strict=True)]
    return [
        _one(
            "acc", float(letter is not None and letter == item.choices[item.right or 0]), f"chose {letter or 'nothing'}"
        )
        for item, letter in zip(items, found, strict=True)
    ]


def _by(grader: ExactGrader | NumericGrader) -> Callable[[Sequence[Item], Sequence[str], Sandbox | None], Graded]:
    def grade(items: Sequence[Item], texts: Sequence[str], _: Sandbox | None) -> Graded:
        grades = grader.grade([_answer(text, item) for item, text in zip(items, texts, strict=True)])
        return [_one("acc", g) if isinstance(g, float) else _one("acc", None, str(g)) for g in grades]

    return grade


def _spans(items: Sequence[Item], texts: Sequence[str], _: Sandbox | None) -> Graded:
    found = [drop_scores(text.strip(), item.fields["answers"]) for item, text in zip(items, texts, strict=True)]
    return [({"f1": f1, "em": exact}, "") for exact, f1 in found]


def _programs(items: Sequence[Item], texts: Sequence[str], sandbox: Sandbox | None) -> Graded:
    assert sandbox is not None, "programs are run in a sandbox only"
    programs = [program(item, text) for item, text in zip(items, texts, strict=True)]
    return [
        _one("pass@1", None, f"the sandbox broke: {r.message}")
        if r.status == "failure"
        else _one("pass@1", float(r.status == "passed"), f"{r.status}: {r.message}".rstrip(": "))
        for r in sandbox.run(programs)
    ]


def program(item: Item, text: str) -> Program:
    """What is run for an answer: the prompt, the answer after it, and the tests.

    An answer that goes on from the prompt is taken as it is. One in a fenced block, or that defines the function itself, is
    put below the prompt, whose imports and helpers it may use: a prompt that ends in a docstring is a whole function.
    """
    fields = item.fields
    code = program_of(text)
    whole = "```" in text or any(line.startswith(f"def {fields['entry_point']}(") for line in code.splitlines())
    joined = fields["prompt"] + ("\n" + code if whole else text)
    return Program(joined, (f"{fields['test']}\ncheck({fields['entry_point']})\n",))


_GRADERS: dict[str, Callable[[Sequence[Item], Sequence[str], Sandbox | None], Graded]] = {
    "letter": _letters,
    "number": _by(NumericGrader(NumericReward(kind="numeric", field="answer"))),
    "text": _by(ExactGrader(ExactReward(kind="exact", field="answer"))),
    "spans": _spans,
    "code": _programs,
}


def chance(questions: Questions) -> float:
    """What guessing gives; 0 where an answer is written freely."""
    items = questions.items
    if questions.task.kind not in ("choice", "letter"):
        return 0.0
    return math.fsum(1 / len(item.choices) for item in items) / len(items)
