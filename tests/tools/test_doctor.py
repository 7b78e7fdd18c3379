"""`llmkit doctor`: what it prints, and how it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from posttraining import tiny_stage, tiny_world

from llmkit.cli import main
from llmkit.model import gpt
from llmkit.tools.doctor.command import CHECKS


@pytest.fixture(autouse=True)
def _threads_stay() -> object:
    """The command sets the number of threads of its process, which here is the tests'."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_machine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("packages", "threads", "memory", "disk", "torch "))


def test_a_check_with_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_stage(tiny_world(tmp_path), "sft", "asked")
    assert main(["doctor", str(recipe), "--only", "packing"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ok  ")]
    names = [line.split()[1] for line in lines]
    assert names[-1] == "packing" and {"labels", "positions", "causality", "accumulation"} < set(names)
    assert "resume" not in names and not (tmp_path / "asked").exists()


def test_a_failure_is_told_with_cause_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = gpt.attend
    monkeypatch.setattr(gpt, "attend", lambda q, k, v, mask, causal, dropout: real(q, k, v, mask, False, dropout))
    recipe = tiny_stage(tiny_world(tmp_path), "sft", "ill")
    assert main(["doctor", str(recipe), "--only", "cache"]) == 1
    out = capsys.readouterr().out
    causality = next(check for check in CHECKS if check.name == "causality")
    assert "FAIL  causality" in out and f"cause: {causality.cause}" in out and f"remedy: {causality.remedy}" in out
    assert "?     cache" in out and "(causality must hold first)" in out


def test_checks_stand_after_what_they_need() -> None:
    seen: set[str] = set()
    for check in CHECKS:
        assert seen >= set(check.needs) and check.name not in seen, check.name
        seen.add(check.name)


def test_docs_show_the_checks() -> None:
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text("utf-8")
    for check in CHECKS:
        assert f"| `{check.name}` | {check.holds} | {check.cause} | {check.remedy} |" in page


def test_wrong_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(tiny_stage(tiny_world(tmp_path), "sft", "asked"))
    assert main(["doctor", recipe, "--only", "everything"]) == 2
    assert "no such check" in capsys.readouterr().err
    assert main(["doctor", "--only", "cache"]) == 2
    assert "name one" in capsys.readouterr().err
    assert main(["doctor", "configs/tokenizer/demo.yaml"]) == 2
    assert "trains no network" in capsys.readouterr().err
    assert main(["doctor", "--list"]) == 0 and "causality" in capsys.readouterr().out
