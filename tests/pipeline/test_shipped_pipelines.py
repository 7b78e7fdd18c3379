"""The pipelines that ship hold: every recipe, every option, every reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.cli import build_parser, main
from llmkit.pipeline.graph import COMMANDS, read_pipeline

ROOT = Path(__file__).parent.parent.parent
PIPELINES = [f for f in sorted((ROOT / "configs").rglob("*.yaml")) if "pipeline" in (f.stem, f.parent.name)]


def parsers() -> Any:
    return build_parser().parse_args(["run", "x"]).parsers


def test_there_are_pipelines() -> None:
    assert {"demo/pipeline.yaml", "pipeline/560m.yaml"} <= {"/".join(f.parts[-2:]) for f in PIPELINES}


@pytest.mark.parametrize("file", PIPELINES, ids=lambda f: "/".join(f.parts[-2:]))
def test_it_holds_and_plans(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = read_pipeline(str(file), [], parsers())
    lines = file.read_text("utf-8").splitlines()
    assert lines[0].startswith("# ") and len(lines) <= 75 and max(map(len, lines)) <= 150
    assert pipeline.nodes["sft"].parents == ("pretrain",) and "distill" in pipeline.behind("ppo")
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(file), "--dry-run", "--gpu", "H100"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{said}" for name in pipeline.nodes) and "in all" in said
    assert not list(tmp_path.iterdir())


def test_every_command_that_a_node_may_run_is_one_and_says_where_it_writes() -> None:
    for name in COMMANDS:
        assert any(action.dest == "out" for action in parsers()[name]._actions) or name == "report", name


def test_the_demo_ends_with_what_its_table_needs() -> None:
    nodes = read_pipeline(str(ROOT / "configs/demo/pipeline.yaml"), [], parsers()).nodes
    asked = json.dumps(nodes["compare"].argv)
    for name in ("pretrain", "sft", "ppo", "distill", "int8", "int4"):
        assert str(nodes[name].folder) in asked
    assert {"compare", "bench"} <= set(nodes["report"].parents)
    assert str(nodes["pretrain"].folder) == "runs/demo/pretrain", "the name that other tools rely on"
