"""`llmkit eval --harness lm-eval`: its tasks on local files, in one command and without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_rows import SPLITS, rows_of, write_benchmarks, write_rows

from llmkit.cli import main
from llmkit.tools.lm_harness import belongs

pytest.importorskip("lm_eval", reason="lm-eval is not installed (llmkit[eval])")


def test_tasks_with_local_files(answering: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names, out = [name for name in SPLITS if name != "humaneval"], tmp_path / "out"
    data = write_benchmarks(tmp_path / "data", 4)
    argv = ["eval", str(answering), "--harness", "lm-eval", "--tasks", ",".join(names), "--data", str(data)]
    assert main([*argv, "--out", str(out), "--limit", "3"]) == 0
    report = json.loads((out / "eval.json").read_text("utf-8"))
    assert [task["name"] for task in report["tasks"]] == names and "lm-eval's" in capsys.readouterr().out
    for task in report["tasks"]:
        assert task["n"] == 3 and task["metrics"], task["name"]
        records = [json.loads(s) for s in (out / "items" / f"{task['name']}.jsonl").read_text("utf-8").splitlines()]
        for name, mean in task["metrics"].items():
            values = [r[name] for r in records if name in r]
            assert mean["n"] == 3 and mean["mean"] == pytest.approx(sum(values) / 3)
    assert "algebra" in json.loads((out / "items/mmlu.jsonl").read_text("utf-8").splitlines()[0])["prompt"]


def test_a_group_of_tasks_is_told_as_one() -> None:
    """On the hub a benchmark is a group of groups of subjects."""
    found = {
        "group_subtasks": {
            "mmlu": ["mmlu_stem", "mmlu_other"],
            "mmlu_stem": ["mmlu_anatomy"],
            "ceval-valid": ["ceval_law"],
        }
    }
    assert belongs("mmlu_anatomy", ["mmlu"], found) and belongs("gsm8k", ["gsm8k"], found)
    assert not belongs("ceval_law", ["mmlu"], found) and not belongs("mmlu_anatomy", ["gsm8k"], found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "humaneval"], "outside of a sandbox"),
        (["--tasks", "mmlu", "--against", "x.jsonl"], "--against is not for"),
        (["--tasks", "hellaswag"], "has files for mmlu"),
        (["--tasks", "mmlu", "--shots", "1"], "has no examples"),
    ],
)
def test_mistakes(
    answering: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    write_rows(tmp_path / "mmlu.jsonl", rows_of("mmlu", 1))
    assert main(["eval", str(answering), "--harness", "lm-eval", "--data", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err
