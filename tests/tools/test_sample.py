"""`llmkit sample` as a user meets it: the best of n answers, as rows that the sft stage reads."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from llmkit.cli import main
from llmkit.config import UserError
from llmkit.data.config import SourceConfig
from llmkit.data.layouts import read_source
from llmkit.tools.candidates import Asked, Drawn
from llmkit.tools.grading import read_rewards
from llmkit.tools.ledger import read_rows
from llmkit.tools.sample import Keep, judged


def sample(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["sample", *map(str, argv)])
    return code, capsys.readouterr().err


def test_the_best_of_eight(
    answering: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One answer in six is right; of eight, three in four prompts have one."""
    out = tmp_path / "best.jsonl"
    argv = (answering, "--prompts", questions, "--out", out, "--rewards", "exact", "--threshold", 1)
    code, err = sample(capsys, *argv, "--n", 8, "--max-new-tokens", 12)
    assert code == 0, err
    rows = read_rows(out)
    assert all(r["messages"][-1] == {"role": "assistant", "content": "yes"} and r["score"] == 1.0 for r in rows)
    assert all(r["scores"] == {"exact": 1.0} and r["kind"] in "ab" for r in rows)
    assert len({r["prompt_row"] for r in rows}) == len(rows)
    dialogues = [row for *_, row in read_source(SourceConfig(path=str(out)), "dialogue")]  # as `stage: sft` reads it
    assert [d.messages for d in dialogues] == [r["messages"] for r in rows]
    summary = read_rows(tmp_path / "best.jsonl.notes")[-1]["summary"]
    assert summary["prompts"] == 12 and summary["rows"] == len(rows) == 12 - summary["prompts_without_a_row"]
    assert summary["best"] == pytest.approx(len(rows) / 12, abs=1e-6) == summary["prompts_passed"]
    assert 0 < summary["mean"] == summary["pass_rate"] < summary["best"]
    assert summary["finished"] == 8 and 2 < summary["differing"] <= 6
    assert "best of 8" in err and "of the answers, at least one to" in err


def test_a_stop_anywhere_changes_nothing(
    answering: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two rows a prompt: one of them is on disk when it dies. Statistics are those of the whole file."""
    more = ("--rewards", "{kind: length, target: 3, unit: characters}", "--n", 6, "--keep", "top_k", "--keep-n", 2)
    argv = (answering, "--prompts", questions, "--max-new-tokens", 12, *more)
    assert sample(capsys, *argv, "--out", tmp_path / "quiet.jsonl")[0] == 0
    cut = tmp_path / "cut.jsonl"
    assert sample(capsys, *argv, "--out", cut, "--limit", 5, "--batch", 2)[0] == 0
    rows = read_rows(cut)
    assert [r["prompt_row"] for r in rows[:4]] == [1, 1, 2, 2] and rows[0]["score"] >= rows[1]["score"]
    with cut.open("a") as f:
        f.write(json.dumps({**rows[-1], "prompt_row": 6}) + "\n")
    code, err = sample(capsys, *argv, "--out", cut)
    assert code == 0 and "5 prompts are done, 7 are left" in err
    assert cut.read_bytes() == (tmp_path / "quiet.jsonl").read_bytes()
    summaries = [read_rows(tmp_path / f"{n}.jsonl.notes")[-1]["summary"] for n in ("quiet", "cut")]
    assert summaries[0] == summaries[1] and summaries[0]["prompts"] == 12


def test_plain_text_becomes_prompt_and_completion(
    answering: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "raw.jsonl"
    more = ("--rewards", "{kind: length, target: 3, unit: characters}", "--n", 4, "--raw", "--limit", 4)
    code, err = sample(capsys, answering, "--prompts", questions, "--out", out, *more, "--max-new-tokens", 24)
    assert code == 0, err
    assert all(r.keys() >= {"prompt", "completion", "score"} and isinstance(r["prompt"], str) for r in read_rows(out))


ROW = Asked(3, [{"role": "user", "content": "q"}], {"kind": "a"}, None, "p.jsonl:3")


def drawn(*texts: str, cut: tuple[int, ...] = ()) -> list[Drawn]:
    return [Drawn(text, [1], i not in cut) for i, text in enumerate(texts)]


def test_which_answers_are_kept() -> None:
    """No copies, nothing that was cut off or is blank, nothing that could not be graded, nothing below the threshold."""
    answers, scores = drawn("a", "b", "a ", " ", "c", "d", cut=(1,)), [0.5, 9.0, 0.5, 8.0, math.nan, 0.7]
    parts = {"x": scores}
    rows, note = judged(ROW, answers, scores, parts, Keep(None, None), set())
    assert [r["messages"][-1]["content"] for r in rows] == ["d", "a"]
    assert note["kept"] == 2 and note["scored"] == 5 and note["best"] == 9.0 and note["first"] == 0.5
    assert note["finished"] == 5 and note["differing"] == 5 and note["passed"] is None
    rows, note = judged(ROW, answers, scores, parts, Keep(1, 0.6), set())
    assert [r["score"] for r in rows] == [0.7] and note["passed"] == 3
    assert judged(ROW, answers, scores, parts, Keep(1, 0.8), set())[0] == []
    seen: set[str] = set()
    assert len(judged(ROW, answers, scores, parts, Keep(1, None), seen)[0]) == 1
    assert judged(ROW, drawn("d"), [1.0], {}, Keep(1, None), seen)[0] == []  # the same question stood there before
    assert Keep(3, None).choose([1.0, 2.0, 2.0, 0.0]) == [1, 2, 0]


def test_rewards_as_the_command_line_names_them(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("rewards: [{kind: exact, weight: 2}, {kind: length, max: 9}]\n")
    (tmp_path / "list.yaml").write_text("- {kind: regex, pattern: a}\n")
    texts = ["exact", "{kind: numeric, tolerance: 0.1}", "my.module:score", str(tmp_path / "list.yaml")]
    assert [r.kind for r in read_rewards(texts, "--rewards")] == ["exact", "numeric", "python", "regex"]
    assert [r.weight for r in read_rewards([str(tmp_path / "r.yaml")], "--rewards")] == [2, 1]
    assert read_rewards(["configs/ppo/demo.yaml"], "--rewards")[0].kind == "model"
    for text, reason in {
        "exakt": "exakt",
        "{kind: length}": "target",
        "configs/sft/demo.yaml": "stage sft has no rewards",
        "nowhere.yaml": "No such file",
    }.items():
        with pytest.raises(UserError, match=reason):
            read_rewards([text], "--rewards")
    with pytest.raises(UserError, match="two parts are called 'exact'"):
        read_rewards(["exact", "exact"], "--rewards")


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("--n", "0"), "--n must be at least 1"),
        (("--keep", "top_k"), "belong together"),
        (("--keep-n", "2"), "belong together"),
        (("--keep", "top_k", "--keep-n", "9"), "from 1 to the 8 answers"),
        (("--keep", "threshold"), "needs --threshold"),
        (("--rewards", "numeric"), "prompts.jsonl:1: rewards: numeric"),
        (("--limit", "0"), "--limit must be at least 1"),
    ],
)
def test_what_contradicts_itself(
    argv: tuple[str, ...],
    reason: str,
    answering: Path,
    questions: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, err = sample(
        capsys, answering, "--prompts", questions, "--out", tmp_path / "x.jsonl", "--rewards", "exact", *argv
    )
    assert code == 2 and reason in err and not (tmp_path / "x.jsonl").exists()
