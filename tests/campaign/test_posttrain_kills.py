"""Kills at random moments of every stage after pretraining: `pytest -m campaign tests/campaign/test_posttrain_kills.py -s`.

Goals R1, R8. Some minutes. The moments are drawn from a seed, but what the process does at a moment is up to the machine,
so every run of this file is another experiment; the table says what was hit. Of PPO and GRPO at least five kills fall
inside a rollout and five between the updates of one: every other kill waits, from its random moment on, for such a place.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from killers import COLLECTING, GRADING, SAMPLING, phase_of
from posttraining import ONLINE, STAGES, records_of, tiny_stage, tiny_world
from reliability import Child, Server, assert_same, good_steps, last_step, wait_for

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(1500)]

N_KILLS = 20
INSIDE = (SAMPLING, GRADING, COLLECTING)
CHANGES: dict[str, dict[str, Any]] = {
    **{stage: {"steps": 1200, "save": {"every": 5}, "eval": {"every": 200}} for stage in ("sft", "reward", "dpo")},
    "distill": {"steps": 600, "save": {"every": 5}, "eval": {"every": 150}},
    **{stage: {"steps": 240, "eval": {"every": 60}} for stage in ONLINE},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world(tmp_path_factory.mktemp("campaign"))


@pytest.fixture(scope="module")
def server(world: Path) -> Iterator[Server]:
    (world / "logs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILL_PLAN", str(world / "kill"))
        with Server(world / "logs", *STAGES) as it:
            yield it


def moments(stage: str, plan: Path) -> list[tuple[str, Callable[[], bool]]]:
    """What the kills of a stage wait for, in turn, after their random moment."""
    anything: tuple[str, Callable[[], bool]] = ("", lambda: True)
    if stage not in ONLINE:
        return [anything]
    rollout = ("rollout", lambda: phase_of(plan)[0] in INSIDE)
    between = ("updates", lambda: phase_of(plan)[0] not in INSIDE and phase_of(plan)[1] > 0)
    return [anything, rollout, anything, between]


def killed(child: Child, run: Path, delay_s: float, wanted: Callable[[], bool], before: int) -> tuple[float, int]:
    """Kills a process some time after it made a step; when that was, and the last step that was logged."""
    begun = time.monotonic()
    wait_for(lambda: last_step(run) > before)
    time.sleep(delay_s)
    wait_for(wanted)
    child.kill()
    delay = time.monotonic() - begun
    assert child.wait() == -signal.SIGKILL, f"the run ended before {N_KILLS} kills: {child.said}"
    return delay, last_step(run)


@pytest.mark.parametrize("stage", STAGES)
def test_twenty_kills(stage: str, world: Path, server: Server) -> None:
    """Weights of policy and critic, optimizer, task, logs and the rollouts' records are bitwise a quiet run's."""
    plan, pick = world / "kill", random.Random(f"{stage}/20")
    quiet = tiny_stage(world, stage, f"{stage}-quiet", **CHANGES[stage])
    recipe = tiny_stage(world, stage, f"{stage}-killed", **CHANGES[stage])
    run, steps = world / f"{stage}-killed", CHANGES[stage]["steps"]
    started = time.monotonic()
    child = server.start(quiet)
    assert child.wait() == 0, child.said
    quiet_s = time.monotonic() - started
    kinds, rows = moments(stage, plan), []
    while len(rows) < N_KILLS:
        name, wanted = kinds[len(rows) % len(kinds)]
        before = last_step(run)
        child = server.start(recipe)
        delay, step = killed(child, run, pick.uniform(0, quiet_s / 60), wanted, before)
        phase, cursor = phase_of(plan) if stage in ONLINE else ("", 0)
        rows.append((delay, step, phase, cursor, name, good_steps(run)))
    child = server.start(recipe)
    assert child.wait() == 0, child.said
    print(f"\n{stage}: {quiet_s:.1f} s and {steps} steps uninterrupted")
    print("kill | after s | step | at | updates of the rollout | waited for | good afterwards")
    for n, (delay, step, phase, cursor, name, good) in enumerate(rows, 1):
        print(f"{n:4d} | {delay:7.3f} | {step:4d} | {phase:2s} | {cursor:22d} | {name:10s} | {good}")
    assert_same(run, world / f"{stage}-quiet")
    assert records_of(run) == records_of(world / f"{stage}-quiet")
    if stage in ONLINE:
        inside = sum(phase in INSIDE for _, _, phase, *_ in rows)
        between = sum(phase not in INSIDE and cursor > 0 for _, _, phase, cursor, *_ in rows)
        print(f"{len(rows)} kills: {inside} inside a rollout, {between} between the updates of one")
        assert inside >= 5 and between >= 5
    print(f"{stage}: bitwise equal after {len(rows)} kills")
