"""The benchmarks: whoever knows all answers has 1.0 everywhere, whoever guesses has chance; and each way to be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_rows import SPLITS, Guesser, Knower, rows_of, write_benchmarks, write_rows

from llmkit.config import UserError
from llmkit.evaluation.asking import Prompt
from llmkit.evaluation.harness import METRICS, chance, examine, program
from llmkit.evaluation.rows import Questions, read_task
from llmkit.evaluation.tasks import TASKS, Item
from llmkit.sandbox.cage import Sandbox
from llmkit.sandbox.config import SandboxConfig
from llmkit.sandbox.verdict import Result
from llmkit.tools.evaluate import summary


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    box = Sandbox(SandboxConfig(workers=1))
    try:
        box.start()
    except UserError as e:
        pytest.skip(f"no cage here: {e}")
    return box


def knower_of(questions: Questions) -> Knower:
    return Knower({item.question: item.answer for item in questions.items})


@pytest.mark.parametrize("name", [name for name in TASKS if name != "humaneval"])
def test_knowing_all_answers_is_one(data: Path, name: str) -> None:
    questions = read_task(name, data)
    found = examine(knower_of(questions), questions)
    assert len(found) == 8 and all(grade == 1.0 for one in found for grade in one.grades.values())
    assert all(json.dumps(one.record) and one.record["right"] for one in found)
    expected = 3 if SPLITS[name][1] is not None and name != "mmlu" else 1.5 if name == "mmlu" else 0
    assert sum(one.record["examples"] for one in found) / 8 == expected


@pytest.mark.parametrize("fenced", [False, True])
def test_programs_that_are_right_pass(data: Path, sandbox: Sandbox, fenced: bool) -> None:
    questions = read_task("humaneval", data)
    answers = {i.question: f"```python\n{i.question}{i.answer}```" if fenced else i.answer for i in questions.items}
    answers[questions.items[0].question] = "    return x - 1000\n"
    knower = Knower(answers)
    knower.write = (
        lambda prompts, *_: [  # type: ignore[method-assign]  # a space before a body would be another indent
            type(w)(w.text[1:], *list(vars(w).values())[1:]) for w in Knower.write(knower, prompts, 1, (), print)
        ]
    )
    found = examine(knower, questions, sandbox=sandbox)
    assert [one.grades["pass@1"] for one in found] == [0.0] + [1.0] * 7
    assert found[0].record["note"].startswith("wrong")


def test_a_broken_sandbox_says_nothing_of_the_program(data: Path) -> None:
    """B71: no grade is no wrong answer."""

    class Broken(Sandbox):
        def run(self, programs):
            return [Result("failure", "lost"), *[Result("passed", "")] * (len(programs) - 1)]

    questions = read_task("humaneval", data)
    found = examine(knower_of(questions), questions, sandbox=Broken())
    assert [one.grades["pass@1"] for one in found] == [None] + [1.0] * 7 and "lost" in found[0].record["note"]
    told = summary(questions, found)
    assert told["errors"] == 1 and told["metrics"]["pass@1"]["n"] == 7 and told["metrics"]["pass@1"]["mean"] == 1.0


def test_a_program_may_use_the_prompts_helpers() -> None:
    fields = {"prompt": "import math\ndef area(r):\n    '''Of a circle.'''\n", "test": "t", "entry_point": "area"}
    made = program(
        Item(fields["prompt"], "", fields=fields), "So:\n```python\ndef area(r):\n    return math.pi * r\n```\nDone."
    )
    space: dict = {}
    exec(made.code, space)
    assert space["area"](2) == pytest.approx(6.283, abs=1e-3) and made.tests == ("t\ncheck(area)\n",)


@pytest.mark.parametrize(("name", "expected"), [("mmlu", 0.25), ("ceval", 0.25), ("mmlu_pro", 0.1), ("gpqa", 0.25)])
def test_guessing_is_chance(tmp_path: Path, name: str, expected: float) -> None:
    write_rows(tmp_path / f"{name}.jsonl", rows_of(name, 2000))
    questions = read_task(name, tmp_path)
    assert chance(questions) == pytest.approx(expected)
    main = METRICS[questions.task.kind][0]
    found = [one.grades[main] for one in examine(Guesser(0), questions)]
    assert sum(found) / 2000 == pytest.approx(expected, abs=0.03)


def test_the_right_option_of_gpqa_moves_but_stays_with_its_question(tmp_path: Path) -> None:
    write_rows(tmp_path / "gpqa.jsonl", rows_of("gpqa", 200))
    first, again = (read_task("gpqa", tmp_path).items for _ in range(2))
    places = [item.right for item in first]
    assert places == [item.right for item in again] and all(30 < places.count(k) < 70 for k in range(4))
    asked = json.loads((tmp_path / "gpqa.jsonl").read_text().split("\n")[0])
    assert f"({'ABCD'[places[0] or 0]}) {asked['Correct Answer']}" in first[0].question


def test_an_option_by_its_text_is_also_weighed_per_byte(tmp_path: Path) -> None:
    rows = [{"question": "q", "choices": ["a long answer", "no"], "answer": 0}]
    write_rows(tmp_path / "mine.jsonl", rows)
    questions = read_task("mine", tmp_path)

    class Says(Knower):
        def weigh(self, asked, on_rows):
            return [type(w)([-5.0, -2.0], 0, False) for w in Knower({"q": ""}).weigh(asked, on_rows)]

    (told,) = examine(Says({}), questions)
    assert told.grades == {"acc": 0.0, "acc_norm": 1.0}  # -5 / 13 > -2 / 2
    assert told.record["logprobs"] == {"a long answer": -5.0, "no": -2.0}


def test_tasks_of_ones_own(tmp_path: Path) -> None:
    write_rows(tmp_path / "capitals.jsonl", [{"question": "France?", "answer": ["Paris", "paree"]}] * 2)
    questions = read_task("capitals", tmp_path)
    assert [t.grades["acc"] for t in examine(Knower({"France?": "paris."}), questions)] == [1.0, 1.0]
    assert [t.grades["acc"] for t in examine(Knower({"France?": "Rome"}), questions)] == [0.0, 0.0]


def test_limit_spreads_over_all_and_files_tell_their_groups(tmp_path: Path) -> None:
    for subject in ("anatomy", "law"):
        write_rows(tmp_path / "cmmlu" / subject / "test-00000-of-00001.jsonl", rows_of("cmmlu", 6))
        write_rows(tmp_path / "cmmlu" / subject / "dev-00000-of-00001.jsonl", rows_of("cmmlu", 1, seed=len(subject)))
    write_rows(tmp_path / "ceval" / "logic_val.jsonl", rows_of("ceval", 2))
    questions = read_task("cmmlu", tmp_path, limit=4)
    assert [item.group for item in questions.items] == ["anatomy", "anatomy", "law", "law"]
    assert questions.examples_for(questions.items[0]) != questions.examples_for(questions.items[3])
    assert [item.group for item in read_task("ceval", tmp_path).items] == ["logic", "logic"]
    assert read_task("cmmlu", tmp_path, n_shots=0).examples == []


def test_prompts_as_text_and_as_conversation() -> None:
    prompt = Prompt("2?\nAnswer:", (("1?\nAnswer:", "A"),), "About numbers.\n\n")
    assert prompt.text == "About numbers.\n\n1?\nAnswer: A\n\n2?\nAnswer:"
    assert [m["role"] for m in prompt.messages] == ["user", "assistant", "user"]
    assert prompt.messages[0]["content"] == "About numbers.\n\n1?\nAnswer:" and prompt.messages[1]["content"] == "A"
    assert prompt.without_first().messages == [{"role": "user", "content": "About numbers.\n\n2?\nAnswer:"}]


MISTAKES = {
    "no such task": ("mmlv", [{"x": 1}], {}, "is none of mmlu"),
    "no column": (
        "mmlu",
        [{"question": "q", "choices": ["a", "b"]}],
        {},
        "mmlu.jsonl:1: task mmlu: the row has no 'answer'",
    ),
    "an answer out of range": ("mmlu", [{"question": "q", "choices": ["a", "b"], "answer": 2}], {}, "index below 2"),
    "no number": ("gsm8k", [{"question": "q", "answer": "4"}], {}, "#### "),
    "no spans": ("drop", [{"passage": "p", "question": "q", "answer": {}}], {}, "no answer"),
    "no examples": ("gpqa", rows_of("gpqa", 1), {"n_shots": 2}, "has no examples"),
    "nothing": ("gsm8k", [], {}, "there are no questions"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_with_file_and_row(tmp_path: Path, case: str) -> None:
    name, rows, options, message = MISTAKES[case]
    write_rows(tmp_path / f"{name}.jsonl", rows)
    with pytest.raises(UserError, match=message):
        read_task(name, tmp_path, **options)


def test_a_missing_file_names_those_that_are_there(data: Path) -> None:
    with pytest.raises(UserError, match=r"there is no arc\.jsonl.*ceval, cmmlu"):
        read_task("arc", data)
    with pytest.raises(UserError, match="no such task: mmlu"):
        read_task("arc", None)
