"""Kills at random moments, in numbers: `pytest -m campaign tests/campaign/test_kills.py -s`. Goals R1, R4, R5, R8.

Some minutes. The moments are drawn from a seed, but what the process does at a moment is up to the machine, so every
run of this file is another experiment; the table says what was hit.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
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


# --- two ranks -------------------------------------------------------------------------------------------------------


class Job:
    """`torchrun` with two ranks on this machine."""

    def __init__(self, recipe: Path, log: Path):
        script = Path(__file__).parents[2] / "scripts" / "train.py"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command, self._log = [*launcher, str(script), str(recipe)], log
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with log.open("wb") as f:
            self.process = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env={**os.environ, **threads})

    def ranks(self) -> dict[int, int]:
        """Rank -> process id, of the children of this torchrun only."""
        found = {}
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for pid in (task / "children").read_text().split():
                environ = Path(f"/proc/{pid}/environ").read_bytes()
                if match := re.search(rb"(?:^|\0)RANK=(\d+)\0", environ):
                    found[int(match[1])] = int(pid)
        return found

    @property
    def said(self) -> str:
        return self._log.read_text()


def two_ranks(folder: Path, name: str, steps: int) -> tuple[Path, Path]:
    write_text(folder / "text.txt", 3000)
    recipe = tiny_recipe(folder, out=str(folder / name), steps=steps, save={"every": 5, "keep": 2}, eval={"every": 25})
    return recipe, folder / name


def test_five_kills_of_one_of_two_ranks(tmp_path: Path) -> None:
    """R4, H1: the job goes down by itself soon, and the same command goes on."""
    quiet, quiet_run = two_ranks(tmp_path, "quiet", 300)
    job = Job(quiet, tmp_path / "quiet.log")
    assert job.process.wait() == 0, job.said
    recipe, run = two_ranks(tmp_path, "killed", 300)
    pick = random.Random(5)
    print("\nkill | rank | step | epoch | in a save | job down after s | code")
    for n in range(1, 6):
        job = Job(recipe, tmp_path / f"{n}.log")
        goal = last_step(run) + pick.randint(15, 45)
        wait_for(lambda job=job, goal=goal: last_step(run) >= goal or job.process.poll() is not None, 120)
        time.sleep(pick.uniform(0, 0.1))
        rank = pick.randrange(2)
        os.kill(job.ranks()[rank], signal.SIGKILL)
        killed = time.monotonic()
        code = job.process.wait(60)
        down = time.monotonic() - killed
        step = last_step(run)
        inside = "yes" if saving(run) else ""
        print(f"{n:4d} | {rank:4d} | {step:4d} | {epoch_of(run, step):5.2f} | {inside:9s} | {down:16.1f} | {code}")
        assert code != 0 and down <= 30
    job = Job(recipe, tmp_path / "last.log")
    assert job.process.wait() == 0, job.said
    assert_same(run, quiet_run)
    print("bitwise equal to two ranks that were left alone")


@pytest.mark.parametrize("target", ["rank 0", "rank 1", "torchrun"])
def test_a_signal_to_one_of_two_ranks(tmp_path: Path, target: str) -> None:
    """R5, B100, B103: all ranks agree to stop at the same step, save once, and go on later."""
    quiet, quiet_run = two_ranks(tmp_path, "quiet", 100)
    job = Job(quiet, tmp_path / "quiet.log")
    assert job.process.wait() == 0, job.said
    recipe, run = two_ranks(tmp_path, "stopped", 100)
    job = Job(recipe, tmp_path / "1.log")
    wait_for(lambda: last_step(run) >= 22 or job.process.poll() is not None, 120)
    os.kill(job.process.pid if target == "torchrun" else job.ranks()[int(target[-1])], signal.SIGTERM)
    told = time.monotonic()
    code = job.process.wait(60)
    after = time.monotonic() - told
    print(f"\nSIGTERM to {target}: down after {after:.1f} s, torchrun's code {code}, saved step {good_steps(run)[0]}")
    assert (run / "PREEMPTED").is_file(), job.said
    assert good_steps(run)[0] == last_step(run) < 100
    job = Job(recipe, tmp_path / "2.log")
    assert job.process.wait() == 0, job.said
    assert_same(run, quiet_run)
