"""A run of any stage after pretraining that is killed ends bitwise as one that never was: R1, R8, B93, B107, B109, B117.

For PPO and GRPO also where others can't go on at all: inside a rollout, and between the updates of one.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from killers import phase_of
from posttraining import ONLINE, STAGES, STEPS, UPDATES, records_of, tiny_stage, tiny_world
from reliability import Server, assert_same, good_steps, last_step, leftovers, read_jsonl, wait_for

from llmkit.storage import step_name

KILL_PLAN = "kill"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world(tmp_path_factory.mktemp("posttrain"))


@pytest.fixture(scope="module")
def server(world: Path) -> Iterator[Server]:
    """Its processes obey the plan in the file `kill` (see killers.py)."""
    (world / "logs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILL_PLAN", str(world / KILL_PLAN))
        with Server(world / "logs", *STAGES) as it:
            yield it


@pytest.fixture(scope="module")
def references(world: Path, server: Server) -> dict[str, Path]:
    """An uninterrupted run of each stage."""
    for stage in STAGES:
        child = server.start(tiny_stage(world, stage, f"{stage}-quiet"))
        assert child.wait() == 0, child.said
    return {stage: world / f"{stage}-quiet" for stage in STAGES}


def finished_alike(run: Path, reference: Path) -> None:
    """All that is promised to be equal; the rollouts' own records too."""
    assert_same(run, reference)
    assert records_of(run) == records_of(reference)


@pytest.mark.parametrize("stage", STAGES)
def test_the_references_are_what_they_should_be(stage: str, references: dict[str, Path]) -> None:
    """More than one epoch, or several rollouts; and the critic lies beside its policy."""
    run = references[stage]
    metrics = read_jsonl(run / "metrics.jsonl")
    assert [m["step"] for m in metrics if "train/loss" in m] == list(range(1, STEPS + 1))
    assert good_steps(run)[0] == STEPS and leftovers(run) == []
    final = run / "checkpoints" / step_name(STEPS)
    assert (final / "critic" / "model.safetensors").is_file() == (stage == "ppo")
    if stage in ONLINE:
        assert len(records_of(run)) == STEPS // UPDATES


@pytest.mark.parametrize("stage", STAGES)
def test_two_kills_at_any_moment(stage: str, world: Path, server: Server, references: dict[str, Path]) -> None:
    recipe, run, pick = tiny_stage(world, stage, f"{stage}-killed"), world / f"{stage}-killed", random.Random(stage)
    for goal in (pick.randint(4, 7), pick.randint(9, 13)):
        child = server.start(recipe)
        wait_for(lambda goal=goal: last_step(run) >= goal)
        child.kill()
        assert child.wait() == -signal.SIGKILL, child.said
    child = server.start(recipe)
    assert child.wait() == 0, child.said
    assert "resumed from" in child.said
    finished_alike(run, references[stage])


PLANS = [
    *(("ppo", plan) for plan in ("sample 1 1", "sample 2 5", "grade 3", "update 4", "update 10")),
    *(("grpo", plan) for plan in ("sample 2 5", "update 7")),
]


@pytest.mark.parametrize(("stage", "plan"), PLANS, ids=[f"{s}-{p.replace(' ', '-')}" for s, p in PLANS])
def test_kills_inside_a_rollout_and_between_its_updates(
    stage: str, plan: str, world: Path, server: Server, references: dict[str, Path]
) -> None:
    """Before a token, before the grades, before the last update of a rollout and the second of the next."""
    name = f"{stage}-{plan.replace(' ', '-')}"
    recipe, run = tiny_stage(world, stage, name), world / name
    (world / KILL_PLAN).write_text(plan)
    child = server.start(recipe)
    assert child.wait() == -signal.SIGKILL and not (world / KILL_PLAN).exists(), child.said
    phase, cursor = phase_of(world / KILL_PLAN)
    if plan.startswith("update"):
        step = int(plan.split()[1])
        assert phase == "U" and cursor == (step - 1) % UPDATES and last_step(run) == step - 1
    else:
        assert phase == {"s": "S", "g": "G"}[plan[0]] and last_step(run) == UPDATES * (int(plan.split()[1]) - 1)
    child = server.start(recipe)
    assert child.wait() == 0, child.said
    finished_alike(run, references[stage])


@pytest.mark.parametrize("stage", ONLINE)
def test_a_signal_inside_a_rollout(stage: str, world: Path, server: Server, references: dict[str, Path]) -> None:
    """R5, B101: it is not waited for; the rollout begins anew, with nothing counted twice."""
    recipe, run = tiny_stage(world, stage, f"{stage}-stopped"), world / f"{stage}-stopped"
    for number in (signal.SIGTERM, signal.SIGINT):
        before = last_step(run)
        child = server.start(recipe)
        wait_for(lambda before=before: last_step(run) >= before + 3 and phase_of(world / KILL_PLAN)[0] == "S")
        child.kill(number)
        assert child.wait() == 75, child.said
        assert good_steps(run)[0] == last_step(run)
    child = server.start(recipe)
    assert child.wait() == 0, child.said
    finished_alike(run, references[stage])
