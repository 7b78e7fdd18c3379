"""Kills at random moments, in numbers: `pytest -m campaign tests/campaign/test_kills.py -s`. Goals R1 and R8.

Some minutes. The moments are drawn from a seed, but what the process does at a moment is up to the machine, so every run
of this file is another experiment; the table says what was hit. Several ranks: test_rank_deaths.py.
"""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from reliability import (
    Server,
    assert_same,
    good_steps,
    last_step,
    result_of,
    tiny_recipe,
    wait_for,
    write_text,
)

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(1500)]

# Saves of some 25 MB every 5 short steps: the writer is at work for a good part of the time.
HEAVY: dict[str, Any] = {
    "model": {"n_layers": 2, "n_heads": 4, "d_model": 256, "max_seq_len": 32, "dropout": 0.1},
    "batch": {"tokens_per_step": 64, "micro_tokens": 32},
    "eval": {"every": 50},
    "save": {"every": 5, "keep": 2},
    "steps": 900,
}
N_KILLS = 30


def saving(run: Path) -> bool:
    """Whether a save or a deletion was under way."""
    folder = run / "checkpoints"
    return folder.is_dir() and any(".tmp-" in p.name or p.name.startswith(".trash-") for p in folder.iterdir())


def epoch_of(run: Path, step: int) -> float:
    records = [r for r in read_jsonl_whole(run / "metrics.jsonl") if r["step"] == step and "train/epoch" in r]
    return float(records[-1]["train/epoch"]) if records else 0.0


def read_jsonl_whole(path: Path) -> list[dict[str, Any]]:
    """A killed writer may leave a last line without an end."""
    from llmkit.training.log import read_lines

    return read_lines(path)


def test_thirty_kills(tmp_path: Path) -> None:
    """R1, R8: weights, optimizer, average, state.json, metrics.jsonl and samples.jsonl are bitwise a quiet run's.

    Every third kill waits, from its random moment on, for a save to begin, so that enough of them fall into one.
    """
    write_text(tmp_path / "text.txt", 2000)
    quiet = tiny_recipe(tmp_path, out=str(tmp_path / "quiet"), **HEAVY)
    recipe = tiny_recipe(tmp_path, out=str(tmp_path / "killed"), **HEAVY)
    run, quiet_run, pick = tmp_path / "killed", tmp_path / "quiet", random.Random(20)
    rows = []
    with Server(tmp_path) as server:
        started = time.monotonic()
        child = server.start(quiet)
        assert child.wait() == 0, child.said
        quiet_s = time.monotonic() - started
        while len(rows) < N_KILLS:
            child = server.start(recipe)
            begun = time.monotonic()
            time.sleep(pick.uniform(0.1, 0.1 + quiet_s / 15))
            if len(rows) % 3 == 2:
                wait_for(lambda: any(".tmp-" in p.name for p in (run / "checkpoints").iterdir()))
                time.sleep(pick.uniform(0, 0.05))
            child.kill()
            delay = time.monotonic() - begun
            assert child.wait() == -signal.SIGKILL, f"the run ended before {N_KILLS} kills: {child.said}"
            step, found = last_step(run), re.search(r"resumed from .*step-0*(\d+)", child.said)
            rows.append((delay, step, epoch_of(run, step), saving(run), found and found[1], good_steps(run)))
            assert len(good_steps(run)) >= min(2, step // 10 - 1)  # C6: nothing that was committed is lost
        child = server.start(recipe)
        assert child.wait() == 0, child.said
    print(f"\nuninterrupted: {quiet_s:.1f} s, {epoch_of(quiet_run, 900):.1f} epochs")
    print("kill | after s | step | epoch | in a save | this life had resumed from | good afterwards")
    for n, (delay, step, epoch, in_save, resumed, good) in enumerate(rows, 1):
        inside = "yes" if in_save else ""
        print(f"{n:4d} | {delay:7.3f} | {step:4d} | {epoch:5.2f} | {inside:9s} | {resumed or 'nothing':>8} | {good}")
    in_saves, late = sum(r[3] for r in rows), sum(r[2] >= 2 for r in rows)
    print(f"{len(rows)} kills: {in_saves} inside a save, {late} in epoch 2 or later")
    assert_same(run, quiet_run)
    print(f"bitwise equal: {sorted(result_of(run))}")
    assert len(rows) >= 25 and in_saves >= 5 and late >= 5
