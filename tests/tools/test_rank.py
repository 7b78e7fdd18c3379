"""`llmkit rank` as a user meets it: rows that the reward stage reads, written once whatever happens on the way."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmkit.cli import main
from llmkit.config import UserError
from llmkit.data.config import SourceConfig
from llmkit.data.layouts import Preference, read_source
from llmkit.tools.ledger import Ledger, read_rows

UTILITY = """
def by_length(prompts, completions, **columns):
    assert all(kind in "ab" for kind in columns["kind"])
    return [float(len(c if isinstance(c, str) else c[-1]["content"])) for c in completions]

def nothing(prompts, completions, **columns):
    return [1.0 for _ in completions]
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of utilities."""
    (tmp_path / "tastes.py").write_text(UTILITY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def rank(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["rank", *map(str, argv)])
    return code, *capsys.readouterr()


def simulated(answering: Path, questions: Path, out: str, *more: object) -> tuple[object, ...]:
    return (answering, "--prompts", questions, "--out", out, "-k", 3, "--max-new-tokens", 12, *more)


def preferences(file: Path) -> list[Preference]:
    return [row for *_, row in read_source(SourceConfig(path=str(file)), "preference")]


SIMULATED = ("--annotator", "simulated", "--utility", "tastes:by_length", "--noise", "1")


def test_a_simulated_annotator(
    answering: Path, questions: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = rank(capsys, *simulated(answering, questions, "pairs.jsonl", *SIMULATED))
    assert code == 0, err
    rows = read_rows(work / "pairs.jsonl")
    assert [r["prompt_row"] for r in rows] == list(range(1, 13))
    assert all(r["prompt"] == f"q{r['prompt_row'] - 1}" and r["answer"] == "yes" for r in rows)
    assert all(len(set(r["responses"])) == 3 and r["utility"] == [len(t) for t in r["responses"]] for r in rows)
    read = preferences(work / "pairs.jsonl")  # as `stage: reward` reads it
    assert [p.responses for p in read] == [r["responses"] for r in rows]
    summary = read_rows(work / "pairs.jsonl.notes")[-1]["summary"]
    assert summary["rows"] == 12 and summary["pairs"] == sum(len(p.pairs) for p in read) > 12
    assert 0.7 < summary["ceiling"] < 1 and 0 < summary["agreed"] <= 1
    assert f"agrees with {100 * summary['ceiling']:.1f} % of the" in err and "Bradley-Terry" in err
    before = (work / "pairs.jsonl").read_bytes()
    assert rank(capsys, *simulated(answering, questions, "pairs.jsonl", *SIMULATED))[0] == 0  # again is nothing
    assert (work / "pairs.jsonl").read_bytes() == before


def test_a_stop_anywhere_changes_nothing(
    answering: Path, questions: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut into pieces by --limit, with half a row and a row without a note at the end of one, and other batches."""
    rank(capsys, *simulated(answering, questions, "quiet.jsonl", *SIMULATED))
    for limit, batch in ((3, 1), (5, 4), (12, 5)):
        code, _, err = rank(
            capsys, *simulated(answering, questions, "cut.jsonl", *SIMULATED, "--limit", limit, "--batch", batch)
        )
        assert code == 0, err
        file = work / "cut.jsonl"
        if limit < 12:
            rows = read_rows(file)
            assert len(rows) == limit
            with file.open("a") as f:  # it died after the row of the next prompt, and within the one after
                f.write(json.dumps({**rows[-1], "prompt_row": limit + 1}) + '\n{"prompt": "q')
            with (work / "cut.jsonl.notes").open("a") as f:
                f.write('{"prompt_r')
    assert (work / "cut.jsonl").read_bytes() == (work / "quiet.jsonl").read_bytes()


def test_a_killed_process_loses_nothing_that_was_ranked(
    answering: Path, questions: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill -9 while a person is being asked: what was answered stays, and the next one is asked again."""
    command = [
        sys.executable,
        "-m",
        "llmkit.cli",
        "rank",
        str(answering),
        "--prompts",
        str(questions),
        "--out",
        "p.jsonl",
    ]
    command += ["-k", "2", "--max-new-tokens", "12"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=work, env={**os.environ})
    assert child.stdin and child.stdout
    child.stdin.write(b"1>2\nskip\n2\n")
    child.stdin.flush()
    notes, end = work / "p.jsonl.notes", time.monotonic() + 60
    while not (notes.exists() and len(read_rows(notes)) == 4):
        assert time.monotonic() < end and child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert [r["prompt_row"] for r in read_rows(work / "p.jsonl")] == [1, 3]
    monkeypatch.setattr("sys.stdin", io.StringIO("1\nquit\n"))
    code, out, err = rank(capsys, *command[4:])
    assert code == 0 and "prompt 4 of 12" in out, err
    assert [r["prompt_row"] for r in read_rows(work / "p.jsonl")] == [1, 3, 4]


def test_a_person(
    answering: Path, questions: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orders, ties, scores, a comment, skip, undo over a skip, quit; and on with the rest."""
    lines = ["2>1", "skip", "undo", "undo", "comment 好\n1=3", "scores 3 9 1", "quit"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    code, out, err = rank(capsys, *simulated(answering, questions, "p.jsonl"))
    assert code == 0, err
    first, second = read_rows(work / "p.jsonl")
    assert (first["prompt_row"], second["prompt_row"]) == (1, 2)
    assert first["comment"] == "好" and isinstance(first["ranking"][0], list) and "scores" not in first
    best = second["scores"].index(9)
    assert second["ranking"][0] == best and len(second["ranking"]) == 3
    assert "10 prompts are left: the same command goes on" in out and out.count("--- prompt 1 of 12") == 2
    assert [len(p.pairs) for p in preferences(work / "p.jsonl")] == [2, 3]
    monkeypatch.setattr("sys.stdin", io.StringIO("1>2>3\n" * 10))
    code, out, err = rank(capsys, *simulated(answering, questions, "p.jsonl"))
    assert code == 0 and "that was the last prompt" in out and "2 prompts are done, 10 are left" in err
    assert len(read_rows(work / "p.jsonl")) == 12
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert rank(capsys, *simulated(answering, questions, "p.jsonl"))[0] == 0


def test_answers_now_and_a_ranking_later(
    answering: Path, questions: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = rank(capsys, *simulated(answering, questions, "answers.jsonl", "--annotator", "none", "--shuffle"))
    assert code == 0, err
    rows = read_rows(work / "answers.jsonl")
    assert [r["prompt_row"] for r in rows] != sorted(r["prompt_row"] for r in rows) and "ranking" not in rows[0]
    argv = ("--answers", "answers.jsonl", "--out", "ranked.jsonl", "--annotator", "simulated")
    code, _, err = rank(capsys, *argv, "--utility", "tastes:by_length", "--flip", "0.1")
    assert code == 0, err
    assert "flipped with probability 0.1" in err
    ranked = read_rows(work / "ranked.jsonl")
    assert [(r["prompt_row"], r["responses"]) for r in ranked] == [(r["prompt_row"], r["responses"]) for r in rows]
    assert len(preferences(work / "ranked.jsonl")) == 12


def test_rows_that_teach_nothing_are_left_out(
    answering: Path, questions: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything tied; and answers that never end, of which no two can be compared."""
    argv = simulated(answering, questions, "tied.jsonl", "--annotator", "simulated", "--utility", "tastes:nothing")
    code, _, err = rank(capsys, *argv)
    assert code == 0 and "12 prompts left out, whose answers are all equally good" in err
    assert (work / "tied.jsonl").read_text() == ""
    argv = (answering, "--prompts", questions, "--out", "cut.jsonl", "--annotator", "none", "--max-new-tokens", 1)
    code, _, err = rank(capsys, *argv)
    assert code == 0 and "12 prompts left out, for which the model gave no two different finished answers" in err


def test_another_command_into_the_same_file(
    answering: Path, questions: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = simulated(answering, questions, "p.jsonl", "--annotator", "none", "--limit", 1)
    assert rank(capsys, *argv)[0] == 0
    code, _, err = rank(capsys, *argv, "--temperature", 0.7, "--seed", 3)
    assert code == 2 and "seed: 0 -> 3" in err and "sampling.temperature: 1.0 -> 0.7" in err
    (work / "other.jsonl").write_text("{}\n")
    code, _, err = rank(capsys, *simulated(answering, questions, "other.jsonl", "--annotator", "none"))
    assert code == 2 and "exists, and other.jsonl.notes does not" in err
    assert (work / "other.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("--prompts", "p.jsonl"), "name the MODEL"),
        (("m", "--answers", "a.jsonl"), "leave MODEL out"),
        (("m",), "give --prompts"),
        (("m", "--prompts", "p", "--noise", "1"), "for --annotator simulated"),
        (("m", "--prompts", "p", "--annotator", "simulated"), "belong together"),
        (("m", "--prompts", "p", "-k", "1"), "-k must be at least 2"),
        (("--answers", "a", "--annotator", "none"), "nothing to do"),
        (("m", "--prompts", "p", "--temperature", "0"), "the same answer every time"),
        (("m", "--prompts", "p", "--batch", "0"), "--batch must be at least 1"),
        (("m", "--prompts", "p", "--column", "question"), "expected ours=theirs"),
        (("m", "--prompts", "p", "--annotator", "simulated", "--utility", "exct"), "exct"),
    ],
)
def test_what_contradicts_itself(
    argv: tuple[str, ...], reason: str, answering: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [{"m": str(answering), "p": str(questions)}.get(a, a) for a in argv]
    code, _, err = rank(capsys, *given, "--out", "/nowhere/p.jsonl")
    assert code == 2 and reason in err and err.count("\n") <= 2


# --- the ledger ------------------------------------------------------------------------------------------------------


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    with Ledger(tmp_path / "a.jsonl", {"x": 1}), pytest.raises(UserError, match="another process is writing it"):
        Ledger(tmp_path / "a.jsonl", {"x": 1})
    Ledger(tmp_path / "a.jsonl", {"x": 1}).close()


def test_undo_survives_a_death_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is noted before the row is cut off, so a row that is left is cut at the next start."""
    out = tmp_path / "a.jsonl"
    with Ledger(out, {}) as ledger:
        ledger.add(7, [{"a": 1}])
        ledger.add(3, [{"a": 2}, {"a": 3}])
        monkeypatch.setattr(Ledger, "_cut_rows", lambda self: None)
        assert ledger.take_back() == (3, {"prompt_row": 3})
    assert len(read_rows(out)) == 3
    monkeypatch.undo()
    with Ledger(out, {}) as ledger:
        assert list(ledger.done) == [7] and ledger.rows() == [{"a": 1, "prompt_row": 7}]
        ledger.take_back()
        assert ledger.take_back() is None and ledger.rows() == []


def test_lines_of_others_are_left_alone(tmp_path: Path) -> None:
    """Rows that were added by hand have no prompt_row, and stay."""
    out = tmp_path / "a.jsonl"
    with Ledger(out, {}) as ledger:
        ledger.add(1, [{"a": 1}])
    mine: dict[str, Any] = {"prompt": "x", "responses": ["a", "b"], "ranking": [0, 1]}
    with out.open("a") as f:
        f.write(json.dumps(mine) + "\n")
    with Ledger(out, {}) as ledger:
        assert ledger.rows()[-1] == mine
