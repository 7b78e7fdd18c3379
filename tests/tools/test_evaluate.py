"""`llmkit eval`: all benchmarks in one command, what it writes, and mistakes in one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import SPLITS, rows_of, write_benchmarks, write_rows
from browser import opened

from llmkit.cli import main
from llmkit.config import UserError
from llmkit.evaluation.page import page, table
from llmkit.model.weights import load_model
from llmkit.sandbox.cage import Sandbox
from llmkit.tokenizer import Tokenizer
from llmkit.tools.measures import likelihood, text_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"), 6)


def caged() -> bool:
    try:
        Sandbox().start()
    except UserError:
        return False
    return True


def report_in(out: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((out / "eval.json").read_text("utf-8"))
    return told


def test_all_benchmarks_in_one_command(
    answering: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [name for name in SPLITS if name != "humaneval" or caged()]
    out = tmp_path / "out"
    argv = ["eval", str(answering), "--tasks", ",".join(names), "--data", str(data), "--out", str(out)]
    assert main([*argv, "--run-code", "--max-new-tokens", "8"]) == 0
    printed, report = capsys.readouterr().out, report_in(out)
    assert printed == (out / "eval.md").read_text("utf-8") == table(report)
    assert [task["name"] for task in report["tasks"]] == names and report["chat"]
    for task in report["tasks"]:
        lines = (out / "items" / f"{task['name']}.jsonl").read_text("utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        assert task["n"] == len(records) == 6
        for name, mean in task["metrics"].items():
            assert mean["mean"] == pytest.approx(sum(r[name] for r in records) / 6)
            assert 0 <= mean["low"] <= mean["mean"] <= mean["high"] <= 1
    html = (out / "eval.html").read_text("utf-8")
    assert not re.search(r"(src|href)\s*=|https?:", html) and html.count("<section>") == len(names)


def test_a_model_that_answers_rightly_scores_one(
    answering: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trained model, through its chat template: what it says is right, and of two options it finds that the likelier."""
    rows = [{"question": f"q{i}", "choices": ["yes", "zebra"], "answer": 0} for i in range(8)]
    write_rows(tmp_path / "likelier.jsonl", rows)
    answers = ["yes", "no", "ok", "好", "fine", "well"]
    write_rows(tmp_path / "says.jsonl", [{"question": f"q{i}", "answer": answers} for i in range(8)])
    argv = ["eval", str(answering), "--tasks", "likelier,says", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    likelier, says = report_in(tmp_path / "out")["tasks"]
    assert likelier["metrics"]["acc"]["mean"] == likelier["metrics"]["acc_norm"]["mean"] == 1.0
    assert says["metrics"]["acc"]["mean"] == 1.0 and likelier["chance"] == 0.5


def test_perplexity_is_measured_as_everywhere_else(answering: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "t.jsonl", [{"story": "The mill 磨坊. " * 12}, {"story": "Mira"}, {"story": " "}])
    argv = [
        "eval",
        str(answering),
        "--text",
        str(file),
        "--field",
        "story",
        "--context",
        "32",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(argv) == 0
    tokenizer, model = Tokenizer.load(answering), load_model(answering)
    texts = ["The mill 磨坊. " * 12, "Mira"]
    rows = [row for text in texts for row in text_rows(tokenizer, text, 32)]
    n_bytes = sum(len(text.encode()) for text in texts)
    expected = likelihood(model, rows, tokenizer.vocab_size, n_bytes)
    told = report_in(tmp_path / "out")["text"]
    assert told["perplexity"] == pytest.approx(expected.perplexity) and told["n_bytes"] == n_bytes
    assert told["bits_per_byte"] == pytest.approx(expected.bits_per_byte) and told["context"] == 32


def test_questions_that_were_learnt_from_are_told_apart(answering: Path, tmp_path: Path) -> None:
    rows = rows_of("mmlu", 6)
    write_rows(tmp_path / "mmlu.jsonl", rows)
    learnt = write_rows(tmp_path / "learnt.jsonl", [{"text": f"And: {rows[i]['question']}"} for i in (0, 3)])
    argv = ["eval", str(answering), "--tasks", "mmlu", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*argv, "--against", str(learnt)]) == 0
    (task,) = report_in(tmp_path / "out")["tasks"]
    assert task["overlap"]["n_dirty"] == task["overlap"]["dirty"]["n"] == 2 and task["overlap"]["clean"]["n"] == 4
    records = [json.loads(line) for line in (tmp_path / "out/items/mmlu.jsonl").read_text("utf-8").splitlines()]
    assert next(r["overlap"] for r in records) == 1.0 and [r["overlap"] for r in records].count(0.0) == 4


def test_the_page_holds_whatever_a_model_says(answering: Path, data: Path, tmp_path: Path) -> None:
    argv = ["eval", str(answering), "--tasks", "gsm8k", "--data", str(data), "--out", str(tmp_path)]
    assert main([*argv, "--max-new-tokens", "4", "--raw"]) == 0
    report = report_in(tmp_path)
    record = json.loads((tmp_path / "items/gsm8k.jsonl").read_text("utf-8").splitlines()[0])
    evil = "</pre><script>alert(1)</script>\x00 \ud7ff"
    html = page(
        report, {"gsm8k": [{**record, "given": evil, "prompt": evil, "right": [evil]}, {**record, "acc": None}]}
    )
    assert "<script>alert" not in html and html.count("<script>") == 1 and "class=none" in html
    assert not report["chat"] and "plain text" in table(report)


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_in_a_browser(answering: Path, data: Path, tmp_path: Path, width: int) -> None:
    """Nothing is fetched, nothing sticks out, and the keyboard chooses which answers are shown."""
    argv = ["eval", str(answering), "--tasks", "gsm8k,mmlu", "--data", str(data), "--out", str(tmp_path)]
    assert main([*argv, "--max-new-tokens", "4", "--raw"]) == 0
    with opened((tmp_path / "eval.html").as_uri(), width) as tab:
        assert len(tab.requests) == 1 and not tab.errors and not tab.too_wide()
        wrong = tab.page.locator("section").first.get_by_role("button", name="wrong")
        before = tab.page.locator("details.right:visible, details.wrong:visible").count()
        wrong.focus()
        tab.page.keyboard.press("Enter")
        assert wrong.get_attribute("aria-pressed") == "true"
        section = tab.page.locator("section").first
        assert section.locator("details.right:visible").count() == 0 < section.locator("details.wrong:visible").count()
        section.locator("details.wrong > summary").first.press("Enter")
        assert section.locator("pre:visible").count() > 1 and not tab.too_wide()
        assert before >= section.locator("details.wrong:visible").count()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say what is asked"),
        (["--tasks", "mmlu,mmlu"], "stands twice"),
        (["--tasks", "mmlu", "--data", "nowhere"], "no such folder"),
        (["--tasks", "humaneval"], "--run-code"),
        (["--tasks", "gpqa", "--shots", "2"], "has no examples"),
        (["--tasks", "mmlu", "--limit", "0"], "at least 1"),
        (["--tasks", "mmlu", "--context", "9"], "give --text"),
        (["--tasks", "mmlu", "--against", "nowhere.jsonl"], "no such file"),
        (["--tasks", "../mmlu"], "no name of a task"),
    ],
)
def test_mistakes(
    answering: Path, data: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    given = options if "--data" in options else [*options, "--data", str(data)]
    assert main(["eval", str(answering), *given]) == 2
    assert message in capsys.readouterr().err
