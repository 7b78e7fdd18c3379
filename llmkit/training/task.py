"""What a stage and the loop are to each other: the task that is run, and the surroundings it is given."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from llmkit.data.loader import RowLoader
from llmkit.training.config import RunConfig
from llmkit.training.dist import Ranks
from llmkit.training.engine import Engine, Metrics
from llmkit.training.log import RunLog
from llmkit.training.optim import Part


class Outcome(Enum):
    """How `train` ended."""

    FINISHED = "finished"
    PAUSED = "paused"  # stop_at was reached
    PREEMPTED = "preempted"  # a signal; the state is saved


class Stop:
    """Set by SIGTERM, SIGINT and SIGUSR1. Signals only set it: whoever works looks at it where it is safe to stop."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        def note(number: int, _: Any) -> None:
            self.signal = signal.Signals(number).name

        old = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, old)  # scripts/train.py holds them back until here
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)


@dataclass(frozen=True)
class Context:
    """What a task may use of its surroundings."""

    config: RunConfig
    out: Path
    ranks: Ranks
    log: RunLog
    stop: Stop

    def should_stop(self) -> bool:
        """Whether this process was asked to stop. Cheap; poll it in long work that is done by one rank."""
        return bool(self.stop)

    def all_should_stop(self) -> bool:
        """Whether any rank was asked to stop. A collective: all ranks call it at the same point."""
        return self.ranks.any(bool(self.stop))


class Task(Protocol):
    """What a stage is to the loop. Stages derive from it, for what few of them need has an answer here."""

    flops_per_token: float

    @property
    def parts(self) -> Sequence[Part] | None:
        """Groups of parameters with rates and clips of their own; None: there is one group."""
        return None

    def prepare(self, ctx: Context) -> None:
        """Long work before step 1: idempotent, resumable; raises Interrupted if asked to stop."""

    def read(self, ctx: Context) -> None:
        """As much of `prepare` as tells what is learnt from, without asking a model."""
        self.prepare(ctx)

    def open_rows(self, ctx: Context) -> RowLoader | None:
        """The rows of training in their order, after `read`; None for a stage that learns from what it samples."""
        return None

    def build(self, ctx: Context) -> nn.Module:
        """The module with its initial weights."""

    def step(self, engine: Engine, ctx: Context) -> Metrics:
        """One update, and what it needs before it: what `Engine.update` told of it, and `tokens`, by which speed is
        measured. Raises Interrupted on all ranks if asked to stop before the update, with nothing changed."""

    def evaluate(self, engine: Engine, ctx: Context, split: str) -> Metrics | None:
        """Metrics of a split ("valid" or "test"); empty if there is none; None if it was asked to stop."""

    def files(self, engine: Engine) -> dict[str, bytes]:
        """The small files that make a checkpoint a model: config.json, tokenizer and model card."""

    def facts(self) -> dict[str, Any]:
        """What the manifest should tell of the data: fingerprints and hashes."""

    def state_dict(self) -> dict[str, Any]:
        """The task's own state, JSON."""

    def tensors(self) -> dict[str, Tensor]:
        """The task's own tensors, the same on every rank: they are kept in trainer_state/task.safetensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None: ...
