"""One rank of two is killed, stopped or told to stop: `pytest -m campaign tests/campaign/test_rank_deaths.py -s`.

Goals R4, R5, H1. Some twenty minutes. The moments are drawn from a seed, but what the ranks do at a moment is up to the
machine, so every run of this file is another experiment; the tables say what was hit.
"""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killers import COLLECTING, GRADING, SAMPLING, phase_of
from posttraining import records_of, tiny_stage, tiny_world
from reliability import assert_same, good_steps, last_step, read_jsonl, tiny_recipe, wait_for, write_text
from torchrun import Job

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(3000)]

DOWN_S = 30.0  # in which a job has ended or saved, whatever happened
HEAVY: dict[str, Any] = {  # saves of some 25 MB every 5 short steps
    "model": {"n_layers": 2, "n_heads": 4, "d_model": 256, "max_seq_len": 32, "dropout": 0.1},
    "batch": {"tokens_per_step": 128, "micro_tokens": 32},
    "eval": {"every": 50},
    "save": {"every": 5, "keep": 2},
}
STOPPED = re.compile(r"stopped by (SIG\w+|a signal to another rank)")


def saving(run: Path) -> bool:
    folder = run / "checkpoints"
    return folder.is_dir() and any(".tmp-" in p.name for p in folder.iterdir())


def until(job: Job, condition: Callable[[], bool]) -> None:
    """Waits for a moment of a running job."""
    wait_for(lambda: condition() or job.process.poll() is not None, 180)
    assert job.process.poll() is None, job.said


def finish(recipe: Path, log: Path, world: int = 2, **environment: str) -> float:
    """Runs a recipe to its end; the seconds it took."""
    job = Job(recipe, log, world, **environment)
    seconds, code = job.down(time.monotonic(), 900)
    assert code == 0, job.said
    return seconds


def named(job: Job, rank: int, what: str) -> bool:
    """Whether the sentence tells of the rank, what became of it, and where the other one waits."""
    sentence = rf"error: rank {rank} on \S+ \(process \d+\) {what}: last heard of \d+ s ago, .*; rank {1 - rank} is "
    return re.search(sentence + r"(before the first step|at step \d+), (in|after|before) ", job.said) is not None


def kill_one(job: Job, rank: int, n: int) -> float:
    seconds, code = job.down(job.strike(signal.SIGKILL, rank), DOWN_S)
    assert code != 0 and named(job, rank, "has died"), f"kill {n}: {job.said}"
    return seconds


def test_thirty_kills_of_pretraining(tmp_path: Path) -> None:
    """R4: every third kill waits for a save to begin."""
    steps, pick, rows = 1500, random.Random(30), []
    write_text(tmp_path / "text.txt", 3000)
    quiet = tiny_recipe(tmp_path, out=str(tmp_path / "quiet"), steps=steps, **HEAVY)
    recipe = tiny_recipe(tmp_path, out=str(tmp_path / "killed"), steps=steps, **HEAVY)
    run = tmp_path / "killed"
    finish(quiet, tmp_path / "quiet.log")
    print("\nkill | rank | step | in a save | job down after s")
    for n in range(1, 31):
        job, goal = Job(recipe, tmp_path / f"{n}.log"), last_step(run) + pick.randint(1, 60)
        until(job, lambda goal=goal: last_step(run) >= goal)
        if n % 3 == 0:
            until(job, lambda: saving(run))
        time.sleep(pick.uniform(0, 0.05))
        rank, inside = pick.randrange(2), saving(run)
        rows.append((inside, kill_one(job, rank, n)))
        print(
            f"{n:4d} | {rank:4d} | {last_step(run):4d} | {'yes' if inside else '':9s} | {rows[-1][1]:.1f}", flush=True
        )
        assert len(good_steps(run)) >= min(2, last_step(run) // 10 - 1)  # C6
    finish(recipe, tmp_path / "last.log")
    assert_same(run, tmp_path / "quiet")
    inside = sum(r[0] for r in rows)
    print(
        f"{len(rows)} kills, {inside} inside a save: bitwise equal; down after at most {max(r[1] for r in rows):.1f} s"
    )
    assert inside >= 5


def test_twenty_kills_of_ppo(tmp_path: Path) -> None:
    """R4: every second kill waits for a rollout."""
    world, pick, rows = tiny_world(tmp_path / "world"), random.Random(20), []
    plan, inside = world / "kill", (SAMPLING, GRADING, COLLECTING)
    changes: dict[str, Any] = {"steps": 400, "eval": {"every": 100}}
    quiet, recipe = (tiny_stage(world, "ppo", name, **changes) for name in ("quiet", "killed"))
    run, told = world / "killed", {"KILL_PLAN": str(plan)}
    finish(quiet, tmp_path / "quiet.log", **told)
    print("\nkill | rank | step | at | job down after s")
    for n in range(1, 21):
        job, goal = Job(recipe, tmp_path / f"{n}.log", **told), last_step(run) + pick.randint(1, 12)
        until(job, lambda goal=goal: last_step(run) >= goal)
        time.sleep(pick.uniform(0, 0.05))
        if n % 2 == 0:
            until(job, lambda: phase_of(plan)[0] in inside)
        rank, phase = pick.randrange(2), phase_of(plan)[0]
        rows.append((phase in inside, kill_one(job, rank, n)))
        print(f"{n:4d} | {rank:4d} | {last_step(run):4d} | {phase} | {rows[-1][1]:.1f}", flush=True)
    finish(recipe, tmp_path / "last.log", **told)
    assert_same(run, world / "quiet")
    assert records_of(run) == records_of(world / "quiet")
    hit = sum(r[0] for r in rows)
    print(
        f"{len(rows)} kills, {hit} inside a rollout: bitwise equal; down after at most {max(r[1] for r in rows):.1f} s"
    )
    assert hit >= 5


def test_five_stops(tmp_path: Path) -> None:
    """H1: a frozen rank is named after `liveness.stopped_s`, 20 s; one that goes on in time is waited for."""
    steps, pick = 1200, random.Random(5)
    write_text(tmp_path / "text.txt", 3000)
    quiet = tiny_recipe(tmp_path, out=str(tmp_path / "quiet"), steps=steps, **HEAVY)
    recipe = tiny_recipe(tmp_path, out=str(tmp_path / "stopped"), steps=steps, **HEAVY)
    run = tmp_path / "stopped"
    finish(quiet, tmp_path / "quiet.log")
    print("\nstop | rank | step | job down after s")
    for n in range(1, 6):
        job, goal = Job(recipe, tmp_path / f"{n}.log"), last_step(run) + pick.randint(1, 60)
        until(job, lambda goal=goal: last_step(run) >= goal)
        for both in ((0,), (1,), (0, 1)) if n == 1 else ():  # short stops, of both together too, change nothing
            job.strike(signal.SIGSTOP, *both)
            time.sleep(7)
            job.strike(signal.SIGCONT, *both)
            goal = last_step(run) + 5
            until(job, lambda goal=goal: last_step(run) >= goal)
        rank = pick.randrange(2)
        seconds, code = job.down(job.strike(signal.SIGSTOP, rank), DOWN_S)
        print(f"{n:4d} | {rank:4d} | {last_step(run):4d} | {seconds:.1f}", flush=True)
        assert code != 0 and named(job, rank, "is stopped"), job.said
    finish(recipe, tmp_path / "last.log")
    assert_same(run, tmp_path / "quiet")
    print("bitwise equal")


def test_torchrun_starts_the_ranks_again(tmp_path: Path) -> None:
    """R4: with --max-restarts the same job goes on; what the dead ranks left in the store misleads nobody."""
    save = {"every": 20, "keep": 2}
    write_text(tmp_path / "text.txt", 3000)
    quiet = tiny_recipe(tmp_path, out=str(tmp_path / "quiet"), steps=600, save=save)
    recipe = tiny_recipe(tmp_path, out=str(tmp_path / "killed"), steps=600, save=save)
    run = tmp_path / "killed"
    finish(quiet, tmp_path / "quiet.log")
    job = Job(recipe, tmp_path / "job.log", restarts=2)
    for rank in (1, 0):
        goal = last_step(run) + 60
        until(job, lambda goal=goal: last_step(run) >= goal)
        struck, step = job.strike(signal.SIGKILL, rank), last_step(run)
        time.sleep(2)  # the last steps of the others
        until(job, lambda step=step: last_step(run) > step + 5)
        print(f"\nrank {rank} killed at step {step}: beyond it again after {time.monotonic() - struck:.1f} s")
        assert named(job, rank, "has died"), job.said
    assert job.down(time.monotonic(), 300)[1] == 0, job.said
    assert_same(run, tmp_path / "quiet")


@pytest.mark.parametrize("worlds", [(2,), (1, 2, 3)], ids=["same world", "another world each time"])
def test_signals(worlds: tuple[int, ...], tmp_path: Path) -> None:
    """R5: SIGTERM, SIGUSR1 and SIGINT to one rank, all ranks or torchrun, at any time from the start of Python on."""
    same, pick = len(worlds) == 1, random.Random(50)
    n_signals, steps = (50, 2400) if same else (10, 300)
    write_text(tmp_path / "text.txt", 3000)
    changes: dict[str, Any] = {
        **HEAVY,
        "save": {"every": 40, "keep": 2},
        "batch": {"tokens_per_step": 192, "micro_tokens": 32},
    }
    changes["model"] = {**HEAVY["model"], "dropout": 0.1 if same else 0.0}  # each rank draws its own
    quiet = tiny_recipe(tmp_path, out=str(tmp_path / "quiet"), steps=steps, **changes)
    recipe = tiny_recipe(tmp_path, out=str(tmp_path / "told"), steps=steps, **changes)
    run, slowest, early = tmp_path / "told", 0.0, 0
    finish(quiet, tmp_path / "quiet.log", worlds[0])
    print("\nsignal | to | ranks | step | down after s | torchrun's code")
    for n in range(n_signals):
        world, before = worlds[n % len(worlds)], last_step(run)
        job = Job(recipe, tmp_path / f"{n}.log", world)
        number = pick.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
        if n % 5 == 4:  # while PyTorch is imported, or the group is formed
            wait_for(lambda job=job, world=world: len(job.ranks()) == world)
            time.sleep(pick.uniform(0.1, 3))
            early += 1
        else:
            until(job, lambda before=before: last_step(run) > before)
            time.sleep(pick.uniform(0, 1.5))
        ranks = pick.choice([tuple(range(world)), (pick.randrange(world),), ()])
        seconds, code = job.down(job.strike(number, *ranks), DOWN_S)
        slowest, to = (
            max(slowest, seconds),
            "all" if len(ranks) == world else f"rank {ranks[0]}" if ranks else "torchrun",
        )
        print(f"{number.name} | {to} | {world} | {last_step(run)} | {seconds:.1f} | {code}", flush=True)
        assert (run / "PREEMPTED").is_file() and STOPPED.search(job.said), f"signal {n}: {job.said}"
        assert last_step(run) == 0 or good_steps(run)[0] == last_step(run) < steps  # the step it was at is saved
        assert not ranks or len(ranks) > 1 or world == 1 or f"stopped by {number.name}" in job.said or ranks[0] > 0
    finish(recipe, tmp_path / "last.log", worlds[0])
    if same:
        assert_same(run, tmp_path / "quiet")
    else:
        mine, theirs = (read_jsonl(folder / "metrics.jsonl") for folder in (run, tmp_path / "quiet"))
        assert [r.get("train/data_hash") for r in mine] == [r.get("train/data_hash") for r in theirs]
        pairs = [(a["train/loss"], b["train/loss"]) for a, b in zip(mine, theirs, strict=True) if "train/loss" in a]
        worst = max(abs(a - b) / b for a, b in pairs[:50]), max(abs(a - b) / b for a, b in pairs)
        print(f"loss beside an uninterrupted run: {worst[0]:.1e} in 50 steps, {worst[1]:.1e} in {steps} (relative)")
        assert worst[0] < 2e-3
    print(f"{n_signals} signals, {early} before the first step; down after at most {slowest:.1f} s")
