"""`llmkit replay`: a step made again is the step that was made, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from posttraining import tiny_stage, tiny_world

from llmkit.cli import main


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_world(tmp_path_factory.mktemp("replay"))
    for stage in ("sft", "ppo"):
        assert main(["train", str(tiny_stage(folder, stage, stage, steps=8, save={"every": 3, "keep": 3}))]) == 0
    return folder


@pytest.mark.parametrize(("stage", "step", "start"), [("sft", 8, "step-00000006"), ("sft", 2, "the first weights"),
                                                       ("ppo", 8, "step-00000006")])  # fmt: skip
def test_the_same_bits(stage: str, step: int, start: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in (world / stage).rglob("*") if p.is_file()}
    assert main(["replay", str(world / stage), "--step", str(step)]) == 0
    out = capsys.readouterr().out
    assert f"from {start}, " in out and "every number is the same to the last bit" in out
    assert {p: p.stat().st_mtime_ns for p in (world / stage).rglob("*") if p.is_file()} == before


def test_in_fp64_and_as_a_page(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "step.html"
    assert main(["replay", str(world / "sft"), "--step", "7", "--precision", "fp64", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    loss, wide = (float(line.split()[-1 if "logged" not in line else 1]) for line in out.splitlines()
                  if line.startswith(("loss", "fp64: loss")))  # fmt: skip
    assert loss != wide and abs(loss - wide) < 1e-4
    assert "data-way=value" in page.read_text("utf-8")


def test_changed_data_are_noticed(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (world / "sft" / "metrics.jsonl").read_text("utf-8").splitlines()
    changed = []
    for line in lines:
        record = json.loads(line)
        if record["step"] == 4 and "train/data_hash" in record:
            record["train/data_hash"] += 1
        changed.append(json.dumps(record))
    (world / "sft" / "metrics.jsonl").write_text("\n".join(changed) + "\n", "utf-8")
    assert main(["replay", str(world / "sft"), "--step", "4"]) == 1
    assert "NOT those of the log" in capsys.readouterr().out


def test_no_such_step(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(world / "sft"), "--step", "99"]) == 2
    assert "made the steps 1 to 8" in capsys.readouterr().err
    assert main(["replay", str(world), "--step", "1"]) == 2
    assert "no run" in capsys.readouterr().err
