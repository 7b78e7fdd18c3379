"""`llmkit sweep`: what is tried, what is ended early, what a stop leaves; by a trainer of its own, and once in earnest."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmkit.cli import main
from llmkit.config import UserError
from llmkit.tools import sweep
from llmkit.tools.sweep_values import parse_over

pytest.importorskip("optuna", reason="the extra sweep is not installed")

# Trains nothing: its loss falls to how far log10(lr) is from -2, and is told at five evaluations. `slow` waits at the last.
TRAINER = """
import json, math, os, pathlib, signal, sys, time
given = dict(text.split("=", 1) for text in sys.argv[2:])
out, lr, slow = pathlib.Path(given["out"]), float(given["optim.lr"]), float(given.get("seed", 0)) == 7
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if lr > 0.5:
    sys.exit("error: loss is not finite") if lr < 0.7 else None
    print("error: lr: too large", file=sys.stderr)
    sys.exit(2)
with open(out / "metrics.jsonl", "a") as f:
    for step in range(0, 60, 10):
        loss = abs(math.log10(lr) + 2) + (50 - step) / 100
        f.write(json.dumps({"step": step, "train/loss": 9.0}) + "\\n")
        f.write(json.dumps({"step": step, "valid/loss": loss}) + "\\n")
        f.flush()
        if step == 40 and (slow or loss > 1):
            time.sleep(20)
folder = out / "checkpoints" / "step-00000050"
folder.mkdir(parents=True)
(folder / "x").write_text("x")
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe, and a trainer that only seems to train."""
    (tmp_path / "train.py").write_text(TRAINER)
    monkeypatch.setattr(sweep, "TRAIN", (sys.executable, str(tmp_path / "train.py")))
    monkeypatch.setattr(sweep, "_POLL_S", 0.02)
    return write_recipe(tmp_path)


def write_recipe(folder: Path) -> Path:
    (folder / "t.txt").write_text("The mill stands by the river.\n" * 60)
    told = {
        "stage": "pretrain",
        "out": str(folder / "run"),
        "tokenizer": {"kind": "byte"},
        "data": {"path": str(folder / "t.txt"), "cache_dir": str(folder / "cache")},
        "model": {"n_layers": 1, "n_heads": 2, "d_model": 16, "max_seq_len": 64},
        "batch": {"tokens_per_step": 128},
        "steps": 4,
        "eval": {"every": 2},
        "log": {"tensorboard": False, "plot": False},
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(told))
    return folder / "r.yaml"


def kept(folder: Path) -> list[dict[str, Any]]:
    trials: list[dict[str, Any]] = json.loads((folder / "sweep.json").read_text())["trials"]
    return trials


def swept(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["sweep", *map(str, argv)])
    return code, *capsys.readouterr()


LR = ("--over", "optim.lr=log:1e-4:0.4")


def test_it_finds_the_best(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More trials later go on; what is hopeless is ended early; only the best keeps its checkpoints."""
    code, out, _ = swept(capsys, recipe, *LR, "--trials", 5, "--prune-after", 2)
    assert code == 0 and out.startswith(f"{tmp_path / 'run-sweep'}: 5 trials of optim.lr; 0 are done\n")
    first = kept(tmp_path / "run-sweep")
    code, out, err = swept(capsys, recipe, *LR, "--trials", 14, "--prune-after", 2)
    assert code == 0, err
    trials = kept(tmp_path / "run-sweep")
    assert "5 are done" in out and trials[:5] == first and len(trials) == 14
    assert len({trial["values"]["optim.lr"] for trial in trials}) == 14
    assert {trial["state"] for trial in trials} == {"complete", "pruned"}
    assert any(trial["curve"][-1][0] < 50 for trial in trials if trial["state"] == "pruned")
    for trial in trials:
        expected = abs(math.log10(trial["values"]["optim.lr"]) + 2)
        assert trial["state"] == "pruned" or trial["value"] == pytest.approx(expected)
        assert trial["curve"][0][0] == 10  # before the first step all are the same
    best = min((t for t in trials if t["state"] == "complete"), key=lambda t: t["value"])
    assert best["value"] < 0.5
    found = sorted((tmp_path / "run-sweep" / "trials").glob("*/checkpoints/step-*"))
    assert [p.parent.parent.name for p in found] == [f"{best['number']:04d}"]
    table = (tmp_path / "run-sweep" / "sweep.md").read_text()
    assert table.splitlines()[2].split("|")[1].strip() == str(best["number"]) and out.endswith(table)
    assert (tmp_path / "run-sweep" / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert swept(capsys, recipe, *LR, "--trials", 14, "--prune-after", 2)[0] == 0
    assert kept(tmp_path / "run-sweep") == trials


def test_a_stop_changes_nothing(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A signal goes to the trial, which saves; the same command ends it, and tries what would have been tried anyway."""
    options = (recipe, *LR, "--trials", 4, "--no-pruning")

    def stop() -> None:
        while not (tmp_path / "cut" / "trials" / "0001" / "metrics.jsonl").is_file():
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    code, out, _ = swept(capsys, *options, "--out", tmp_path / "cut", "seed=7")
    thread.join()
    (trial,) = kept(tmp_path / "cut")
    assert code == 75 and "stopped by SIGTERM: start again to go on" in out and trial["state"] == "running"
    file = tmp_path / "cut" / "sweep.json"
    file.write_text(file.read_text().replace('"seed": 7', '"seed": 0'))  # so that it doesn't wait again
    (tmp_path / "cut" / "trials" / "0001" / "metrics.jsonl").unlink()  # as a resumed run cuts it back
    for folder in ("cut", "whole"):
        assert swept(capsys, *options, "--out", tmp_path / folder)[0] == 0
    assert [t["values"] for t in kept(tmp_path / "cut")] == [t["values"] for t in kept(tmp_path / "whole")]


def test_trials_that_fail(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that diverges or that the recipe refuses is told and passed over, unless nothing has worked yet."""
    code, _, err = swept(capsys, recipe, "--over", "optim.lr=uniform:0.8:1.0", "--trials", 3)
    assert code == 2 and "error: lr: too large\ntrial 1 (optim.lr=0." in err
    out = tmp_path / "some"
    code, told, _ = swept(
        capsys, recipe, "--over", "optim.lr=choice:0.01,0.9", "--trials", 6, "--out", out, "--seed", 3
    )
    trials = kept(out) if (out / "sweep.json").exists() else []
    assert code == 0, trials
    assert {t["state"] for t in trials} == {"complete", "refused"} and "refused: lr: too large" in told


def test_what_is_refused(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is trained, but for a metric that nobody can know before."""
    for argv, what in (
        (("--over", "optim.lr=log:1e-4:x"), "expected two numbers"),
        (("--over", "optim.lr=log:0:1"), "begins above 0"),
        (("--over", "optim.lr=uniform:2:1"), "less than the second"),
        (("--over", "optim.lr=choice:1"), "two or more"),
        (("--over", "model.n_layers=int:1.5:2"), "whole numbers"),
        (("--over", "optim.lr"), "expected key=kind:values"),
        (("--over", "optim.rl=log:1e-4:1"), "optim.rl: unknown key"),
        ((*LR, *LR), "stands twice"),
        ((*LR, "--trials", "0"), "at least 1"),
        ((*LR, "--metric", "valid/bits"), "--better"),
    ):
        code, out, err = swept(capsys, recipe, *argv)
        assert code == 2 and out == "" and what in err, (argv, err)
    assert not (tmp_path / "run-sweep").exists()
    code, _, err = swept(capsys, recipe, *LR, "--metric", "valid/bits", "--better", "lower", "--no-pruning")
    assert code == 2 and "one of valid/loss" in err
    assert swept(capsys, recipe, *LR, "--out", tmp_path / "a", "--trials", 1)[0] == 0
    code, _, err = swept(capsys, recipe, *LR, "--out", tmp_path / "a", "--seed", 1, "steps=8")
    assert code == 2 and "recipe.steps: 4 -> 8" in err and "seed: 0 -> 1" in err


def test_values() -> None:
    key, values = parse_over("model.n_layers=logint:1:64")
    assert (key, values.ends()) == ("model.n_layers", (1, 64))
    assert values.is_at_an_end(1) and values.is_at_an_end(63) and not values.is_at_an_end(8)
    assert parse_over("a=log:1e-4:1e-2")[1].rounded(0.00123456789) == 0.00123457
    with pytest.raises(UserError, match="different values"):
        parse_over("a=choice:x,x")


def test_in_earnest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real training: its evaluations are found, and its model is there."""
    recipe = write_recipe(tmp_path)
    code, out, err = swept(capsys, recipe, "--over", "optim.lr=log:1e-3:1e-1", "--trials", 1, "steps=8")
    assert code == 0, err
    (trial,) = kept(tmp_path / "run-sweep")
    assert "best: trial 1" in out and [step for step, _ in trial["curve"]] == [2, 4, 6, 8]
    assert main(["verify", str(tmp_path / "run-sweep" / "trials" / "0001")]) == 0
