"""Rows of every benchmark with the hub's columns, made up; and somebody who knows all answers, none, or guesses."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmkit.evaluation.asking import OnRows, Prompt, Weighed, Written

LETTERS = "ABCDEFGHIJ"
Rows = list[dict[str, Any]]


def sums(n: int, n_options: int, seed: int) -> Iterator[tuple[int, int, list[str], int]]:
    """Two numbers, options of which one is their sum, and which one that is."""
    rng = random.Random(seed)
    for _ in range(n):
        a, b = rng.randrange(50), rng.randrange(50)
        options = [a + b, *(a + b + k for k in rng.sample(range(1, 30), n_options - 1))]
        rng.shuffle(options)
        yield a, b, [str(o) for o in options], options.index(a + b)


def rows_of(task: str, n: int, seed: int = 0) -> Rows:
    """n rows as the hub has them."""
    found: Rows = []
    for i, (a, b, options, right) in enumerate(sums(n, 10 if task == "mmlu_pro" else 4, seed)):
        asked, letter = f"Mira has {a} apples and buys {b} more; how many has she then?", LETTERS[right]
        row: dict[str, Any]
        if task == "mmlu":
            row = {"question": asked, "subject": ["algebra", "logic"][i % 2], "choices": options, "answer": right}
        elif task == "mmlu_pro":
            thought = f"A: Let's think step by step. It is {a + b}. The answer is ({letter})."
            row = {"question_id": i, "question": asked, "options": options, "answer": letter, "answer_index": right}
            row |= {"cot_content": thought, "category": "math"}
        elif task == "gpqa":
            wrong = {f"Incorrect Answer {k}": str(a + b + k) for k in (1, 2, 3)}
            row = {"Question": f"{asked} ({i})", "Correct Answer": str(a + b), **wrong, "High-level domain": "Physics"}
        elif task == "drop":
            date, spans = {"day": "", "month": "", "year": ""}, [] if i % 2 else ["Tom", "Mira"]
            told = {"number": str(a) if i % 2 else "", "date": date, "spans": spans}
            row = {
                "passage": f"Mira has {a} apples, Tom {b} pears.",
                "question": f"Who or how many? {i}",
                "query_id": f"q{i}",
            }
            row |= {"answer": told, "validated_answers": {k: [v] for k, v in told.items()}}
        elif task == "humaneval":
            row = {
                "task_id": f"HumanEval/{i}",
                "prompt": f'def add{i}(x):\n    """Adds {a}."""\n',
                "entry_point": f"add{i}",
            }
            row |= {"canonical_solution": f"    return x + {a}\n"}
            row |= {"test": f"def check(candidate):\n    assert candidate({b}) == {a + b}\n"}
        elif task == "gsm8k":
            row = {"question": asked, "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"}
        else:
            keys = ("question", "answer") if task == "ceval" else ("Question", "Answer")
            row = {keys[0]: f"{a}加{b}等于多少？", **dict(zip("ABCD", options, strict=True)), keys[1]: letter}
        found.append(row)
    return found


SPLITS = {
    "mmlu": ("test", "dev"),
    "mmlu_pro": ("test", "validation"),
    "gpqa": ("train", None),
    "drop": ("validation", None),
    "humaneval": ("test", None),
    "gsm8k": ("test", "train"),
    "ceval": ("val", "dev"),
    "cmmlu": ("test", "dev"),
}


def write_rows(file: Path, rows: Rows) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return file


def write_benchmarks(folder: Path, n: int = 8) -> Path:
    """Every benchmark in files as the hub's splits are called."""
    for task, (split, shots) in SPLITS.items():
        write_rows(folder / task / f"{split}.jsonl", rows_of(task, n))
        if shots is not None:
            write_rows(folder / task / f"{shots}-00000-of-00001.jsonl", rows_of(task, 3, seed=1))
    return folder


class Knower:
    """Answers every question rightly, as far as it has been told the answers."""

    chat = False

    def __init__(self, answers: dict[str, str]):
        self.answers = answers

    def weigh(self, asked: Sequence[tuple[Prompt, tuple[str, ...]]], on_rows: OnRows) -> list[Weighed]:
        return [
            Weighed([-1.0 if text == self.answers[p.question] else -2.0 for text in texts], len(p.examples), False)
            for p, texts in asked
        ]

    def write(
        self, prompts: Sequence[Prompt], max_new_tokens: int, stop: Sequence[str], on_rows: OnRows
    ) -> list[Written]:
        return [Written(" " + self.answers[p.question], True, len(p.examples), False) for p in prompts]


class Guesser(Knower):
    """Draws its answers."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def weigh(self, asked: Sequence[tuple[Prompt, tuple[str, ...]]], on_rows: OnRows) -> list[Weighed]:
        return [Weighed([self.random.random() for _ in texts], len(p.examples), False) for p, texts in asked]

    def write(
        self, prompts: Sequence[Prompt], max_new_tokens: int, stop: Sequence[str], on_rows: OnRows
    ) -> list[Written]:
        return [Written(f"The answer is ({self.random.choice(LETTERS)}).", True, 0, False) for _ in prompts]
