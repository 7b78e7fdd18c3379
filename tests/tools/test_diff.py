"""`llmkit diff`: every kind of difference is found, and two equal runs have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from llmkit.cli import main
from llmkit.storage import resolve_model
from llmkit.tools.diff import distances

TEXT = "The mill stands by the river. 从前山谷里有一座磨坊。 Mira lives in the valley.\n" * 40


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a, b as a, and c with another learning rate."""
    folder = tmp_path_factory.mktemp("diff")
    (folder / "t.txt").write_text(TEXT, "utf-8")
    for name, lr in {"a": 1e-3, "b": 1e-3, "c": 1e-2}.items():
        data: dict[str, Any] = {
            "stage": "pretrain",
            "out": str(folder / name),
            "tokenizer": {"kind": "byte"},
            "model": {"n_layers": 2, "n_heads": 2, "d_model": 16, "max_seq_len": 64},
            "data": {"path": str(folder / "t.txt"), "cache_dir": str(folder / "cache")},
            "batch": {"tokens_per_step": 128},
            "optim": {"lr": lr},
            "steps": 3,
            "eval": {"every": 3},
            "log": {"tensorboard": False, "plot": False},
        }
        (folder / "r.yaml").write_text(yaml.safe_dump(data), "utf-8")
        assert main(["train", str(folder / "r.yaml")]) == 0
    return folder


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["diff", *argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_equal_runs_differ_in_their_folder_alone(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, str(runs / "a"), str(runs / "b"))
    assert (
        list(found["recipe"]) == ["out"] and not found["origin"] and not found["environment"] and not found["metrics"]
    )
    assert all(one["largest"] == 0 for one in found["weights"]["layers"].values())
    assert main(["diff", str(runs / "a"), str(runs / "b")]) == 0
    said = capsys.readouterr().out
    assert "weights: bitwise the same" in said and "last metrics: the same" in said


def test_what_differs_is_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, str(runs / "a"), str(runs / "c"))
    assert found["recipe"]["optim.lr"] == [1e-3, 1e-2] and "valid/loss" in found["metrics"]
    assert {"layer 0 mlp", "layer 1 attention", "model.embed_tokens.weight"} <= found["weights"]["layers"].keys()
    assert "weights" not in told(capsys, str(runs / "a"), str(runs / "c"), "--no-weights")
    assert main(["diff", str(runs / "a"), str(runs / "c")]) == 0
    said = capsys.readouterr().out
    assert "| optim.lr" in said and "| layer 0 mlp" in said


def test_distances_are_relative_and_count_every_number(tmp_path: Path) -> None:
    """By hand: one matrix moved by a known share of its norm, one not, one of another shape, one on one side only."""
    for name, scale, rows in (("a", 1.0, 2), ("b", 1.25, 3)):
        (tmp_path / name).mkdir()
        tensors = {
            "model.layers.0.mlp.up_proj.weight": scale * torch.ones(4, 4),
            "model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4),
            "odd.weight": torch.ones(rows, 2),
            f"only_{name}.weight": torch.ones(1),
        }
        save_file(tensors, tmp_path / name / "model.safetensors")
    found = distances(tmp_path / "a", tmp_path / "b")
    assert found["layers"]["layer 0 mlp"] == {"relative": pytest.approx(0.25), "largest": pytest.approx(0.25)}
    assert found["layers"]["layer 0 attention"]["largest"] == 0
    assert found["other_shapes"] == {
        "odd.weight": ([2, 2], [3, 2]),
        "only_a.weight": ([1], None),
        "only_b.weight": (None, [1]),
    }


def test_another_package_or_data_shows_as_origin(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of another program has no manifest: all that is told of the first one differs, and the weights do not."""
    source = resolve_model(runs / "a")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(load_file(source / "model.safetensors"), plain / "model.safetensors")
    found = told(capsys, str(runs / "a"), str(plain))
    assert found["origin"]["code"][1] is None and found["origin"]["data"][0]
    assert all(one["largest"] == 0 for one in found["weights"]["layers"].values())


def test_one_folder_twice_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(runs / "a"), str(resolve_model(runs / "a"))]) == 2
    assert "the same folder" in capsys.readouterr().err
