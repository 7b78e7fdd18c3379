"""A reward that tells where its process is, and may end it there: `killers:reward` in a recipe of ppo or grpo.

The environment's KILL_PLAN names a file. It may hold one line, `sample N T` (in the N-th rollout of this process, before
its T-th token), `grade N` (when the N-th rollout is graded) or `update STEP` (before this optimizer step); the process
then removes the file and kills itself with -9, as a power cut would. FILE.phase always tells, in two characters, what the
process is at and how many updates of the present rollout are behind it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

SAMPLING, GRADING, COLLECTING, UPDATING, ELSEWHERE = "S", "G", "C", "U", "-"


class _Watch:
    """What is known of the running process."""

    def __init__(self, plan: Path):
        self.file = plan
        self.plan = plan.read_text().split() if plan.exists() else []
        self.fd = os.open(f"{plan}.phase", os.O_RDWR | os.O_CREAT, 0o666)
        self.rollouts, self.tokens = 0, 0

    def at(self, phase: str) -> None:
        os.pwrite(self.fd, phase.encode(), 0)

    def reached(self, *place: object) -> None:
        if self.plan == [str(part) for part in place]:
            self.file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)


def _install(watch: _Watch) -> None:
    """Puts the watch around sampling, collecting and updating."""
    from llmkit.rollout import collect
    from llmkit.rollout.collector import Collector
    from llmkit.training.engine import Engine
    from llmkit.training.policy import PolicyTask

    generate, sample, collected, step, update = (
        collect.generate, Collector._sample, PolicyTask._collect, PolicyTask.step, Engine.update,
    )  # fmt: skip

    def watched_generate(*args: Any, should_stop: Callable[[], bool], **options: Any) -> Any:
        def ticking() -> bool:
            watch.tokens += 1
            watch.reached("sample", watch.rollouts, watch.tokens)
            return should_stop()

        return generate(*args, should_stop=ticking, **options)

    def watched_sample(self: Any, model: Any, rows: Any, groups: Any, purpose: str, should_stop: Any) -> Any:
        if purpose != "rollout":
            return sample(self, model, rows, groups, purpose, should_stop)
        watch.rollouts, watch.tokens = watch.rollouts + 1, 0
        watch.at(SAMPLING)
        made = sample(self, model, rows, groups, purpose, should_stop)
        watch.at(GRADING)
        watch.reached("grade", watch.rollouts)
        return made

    def watched_collect(self: Any, *args: Any) -> Any:
        watch.at(COLLECTING)
        told = collected(self, *args)
        watch.at(ELSEWHERE)
        return told

    def watched_step(self: Any, *args: Any) -> Any:
        os.pwrite(watch.fd, str(min(self.cursor, 9)).encode(), 1)
        return step(self, *args)

    def watched_update(self: Any, *args: Any, **options: Any) -> Any:
        watch.at(UPDATING)
        watch.reached("update", self.step + 1)
        told = update(self, *args, **options)
        watch.at(ELSEWHERE)
        return told

    collect.generate = watched_generate
    Collector._sample = watched_sample  # type: ignore[method-assign]
    PolicyTask._collect = watched_collect  # type: ignore[method-assign]
    PolicyTask.step = watched_step  # type: ignore[method-assign]
    Engine.update = watched_update  # type: ignore[method-assign]


def phase_of(plan: Path) -> tuple[str, int]:
    """What a process is or was at, and how many updates of its rollout were behind it."""
    told = Path(f"{plan}.phase").read_bytes().decode()
    return (told[0], int(told[1])) if len(told) == 2 and told[1].isdecimal() else (ELSEWHERE, 0)


def reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
    """The share of vowels in an answer."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(ch in "aeiou" for ch in text) / (1 + len(text)) for text in texts]


if "KILL_PLAN" in os.environ:
    _install(_Watch(Path(os.environ["KILL_PLAN"])))
