"""`llmkit generate --prompts`: a file in, a file out, gone on with where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmkit.cli import main
from llmkit.data.config import SourceConfig
from llmkit.data.layouts import read_source
from llmkit.tools.ledger import read_rows

ANSWERS = ("yes", "no", "ok", "好", "fine", "well")  # what the model of conftest has learnt


def write(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["generate", *map(str, argv)])
    out, err = capsys.readouterr()
    assert out == ""
    return code, err


def test_a_file_of_prompts(
    answering: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row a prompt, in their order, with the prompts' other columns; a layout that `stage: sft` reads."""
    out = tmp_path / "out.jsonl"
    options = ("--max-new-tokens", 12, "--batch", 5, "--temperature", 0)
    code, err = write(capsys, answering, "--prompts", questions, "--out", out, *options)
    assert code == 0 and "12 texts to 12 prompts" in err
    rows = read_rows(out)
    assert [r["messages"][0] for r in rows] == [{"role": "user", "content": f"q{i}"} for i in range(12)]
    assert all(r["messages"][1]["content"] in ANSWERS and r["finished"] and r["answer"] == "yes" for r in rows)
    assert [r["prompt_row"] for r in rows] == list(range(1, 13)) and "sample" not in rows[0]
    read = [row for *_, row in read_source(SourceConfig(path=str(out)), "dialogue")]
    assert [d.messages for d in read] == [r["messages"] for r in rows]


def test_a_stop_anywhere_changes_nothing(
    answering: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there is kept, a torn line is made again, and the file is that of one start, in blocks of any size."""
    argv = (answering, "--prompts", questions, "--max-new-tokens", 12, "--n", 2, "--seed", 4)
    assert write(capsys, *argv, "--out", tmp_path / "quiet.jsonl")[0] == 0
    cut = tmp_path / "cut.jsonl"
    assert write(capsys, *argv, "--out", cut, "--limit", 5, "--batch", 2)[0] == 0
    kept = cut.read_bytes()
    with cut.open("a") as f:
        f.write('{"messages": [')
    code, err = write(capsys, *argv, "--out", cut, "--batch", 3)
    assert code == 0 and "5 prompts are done, 7 are left" in err
    assert cut.read_bytes() == (tmp_path / "quiet.jsonl").read_bytes() and cut.read_bytes().startswith(kept)
    assert [r["sample"] for r in read_rows(cut)[:4]] == [0, 1, 0, 1]
    code, err = write(capsys, *argv, "--out", cut, "--temperature", 0.1)
    assert code == 2 and "begun with other settings" in err and "temperature" in err


def test_greedy_and_the_system_message(answering: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same text as `--prompt` gives; a prompt's own system message stays."""
    file, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "q2"}]
    file.write_text(json.dumps({"prompt": [{"role": "user", "content": "q1"}]}) + "\n" + json.dumps({"prompt": own}))
    options = ("--system", "Be brief.", "--temperature", 0, "--max-new-tokens", 12)
    assert write(capsys, answering, "--prompts", file, "--out", out, *options)[0] == 0
    first, second = read_rows(out)
    assert [m["content"] for m in first["messages"][:2]] == ["Be brief.", "q1"] and second["messages"][:2] == own
    assert main(["generate", str(answering), "--prompt", "q1", *map(str, options)]) == 0
    assert capsys.readouterr().out == first["messages"][-1]["content"] + "\n"


def test_plain_text(answering: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    code, err = write(
        capsys, answering, "--prompts", questions, "--out", out, "--raw", "--limit", 2, "--max-new-tokens", 1,
        "--min-new-tokens", 1, "--precision", "bf16",
    )  # fmt: skip
    assert code == 0 and "2 of them cut off" in err
    assert [(r["prompt"], r["finished"]) for r in read_rows(out)] == [("q0", False), ("q1", False)]


def test_prompts_that_fill_the_context(answering: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "q1"}\n' + json.dumps({"prompt": "q" * 200}) + "\n")
    code, err = write(capsys, answering, "--prompts", file, "--out", tmp_path / "out.jsonl", "--max-new-tokens", 4)
    assert code == 0 and "1 of 2 prompts fill the model's context" in err and "1 texts to 1 prompts" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompts", "p.jsonl"], "--prompts needs --out"),
        (["--prompts", "p.jsonl", "--out", "x.txt"], "must end in .jsonl"),
        (["--prompts", "p.jsonl", "--out", "x.jsonl", "--candidates", "3"], "--candidates shows"),
        (["--prompts", "p.jsonl", "--out", "x.jsonl", "--draft", "m"], "--draft is about one prompt"),
        (["--prompts", "p.jsonl", "--out", "x.jsonl", "--batch", "0"], "--batch must be at least 1"),
        (["--prompts", "p.jsonl", "--out", "x.jsonl", "--limit", "0"], "--limit must be at least 1"),
        (["--prompts", "p.jsonl", "--out", "x.jsonl", "--raw", "--system", "s"], "--system is for chat models"),
        (["--prompts", "no.jsonl", "--out", "x.jsonl"], "no.jsonl"),
        (["--prompts", "p.jsonl", "--out", "x.jsonl", "--column", "x"], "expected ours=theirs"),
        (["--prompt", "q", "--out", "x.jsonl"], "--out is about many prompts"),
        (["--prompt", "q", "--limit", "3"], "--limit is about many prompts"),
    ],
)
def test_mistakes(
    answering: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "q1"}\n')
    code, err = write(capsys, answering, *options)
    assert code == 2 and said in err and not (tmp_path / "x.jsonl").exists()
