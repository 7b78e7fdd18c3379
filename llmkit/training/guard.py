"""When a loss or a gradient is not to be believed, and how often that may happen. Plain numbers, no tensors."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from typing import Any

from llmkit.training.config import GuardConfig

_MAD_TO_STD = 1.4826  # of a normal distribution
# Least spreads, so that a very quiet stretch doesn't make a spike of the next ripple: of a loss, as a share of the
# median, and of the logarithm of a norm.
_LEAST_LOSS_SPREAD, _LEAST_NORM_SPREAD = 0.01, 0.2


class Window:
    """The last values of a series, and how far a new one lies above them in robust standard deviations.

    Median and median absolute deviation instead of mean and standard deviation: half of the window may be outliers
    before they move, while a single spike that got in would widen a standard deviation so that the next one passes.
    """

    def __init__(self, size: int, least_spread: float, relative: bool):
        self.values: deque[float] = deque(maxlen=size)
        self._least, self._relative = least_spread, relative
        self._sorted: list[float] = []

    def add(self, value: float) -> None:
        if len(self.values) == self.values.maxlen:
            del self._sorted[bisect_left(self._sorted, self.values[0])]
        self.values.append(value)
        insort(self._sorted, value)

    def fill(self, values: list[float]) -> None:
        """Takes a saved window, or the newest part of a longer one."""
        self.values.clear()
        self.values.extend(values)
        self._sorted = sorted(self.values)

    @property
    def median(self) -> float:
        return _middle(self._sorted) if self._sorted else 0.0

    def score(self, value: float) -> float:
        """(value - median) / (1.4826 MAD)."""
        median = self.median
        mad = _middle(sorted(abs(v - median) for v in self._sorted))
        least = self._least * (abs(median) if self._relative else 1.0)
        return (value - median) / max(_MAD_TO_STD * mad, least, 1e-12)


def _middle(ordered: list[float]) -> float:
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


class Guard:
    """Looks at loss and gradient norm of every step before it is applied, and keeps what was refused.

    Everything here is a function of the numbers it was shown, and all of it is saved: a resumed run decides alike.
    """

    def __init__(self, config: GuardConfig, save_every: int | None):
        self.config, self._save_every = config, save_every
        self.losses = Window(config.window, _LEAST_LOSS_SPREAD, relative=True)
        self.log_norms = Window(config.window, _LEAST_NORM_SPREAD, relative=False)
        self.events: list[dict[str, Any]] = []
        """What was refused and why, oldest first: part of a checkpoint's lineage."""
        self.in_a_row = 0
        """Refused since a step beyond the last refused one was accepted."""
        self.last_refused = 0
        self.floor = 0
        """No rollback goes further back than this step: older checkpoints may be gone."""

    def scores(self, loss: float, grad_norm: float) -> dict[str, float]:
        """`loss_z` and `grad_norm_z`; empty until `warmup` steps were accepted."""
        if len(self.losses.values) < self.config.warmup:
            return {}
        return {"loss_z": self.losses.score(loss), "grad_norm_z": self.log_norms.score(_log(grad_norm))}

    def objection(self, metrics: dict[str, float]) -> str | None:
        """Why a step with these finite numbers (the scores among them) is to be refused, or None."""
        config = self.config
        limits = {"loss": config.max_loss, "grad_norm": config.max_grad_norm}
        for name, limit in limits.items():
            if limit is not None and metrics[name] > limit:
                return f"{name} {metrics[name]:.4g} is above guard.max_{name} {limit:g}"
        usual = {"loss": self.losses.median, "grad_norm": math.exp(self.log_norms.median)}
        for name, limit in (("loss", config.loss_z), ("grad_norm", config.grad_norm_z)):
            z = metrics.get(f"{name}_z", -math.inf)
            if limit is not None and z > limit:
                return (
                    f"{name} {metrics[name]:.4g} is {z:.1f} deviations above {usual[name]:.4g}, the median of "
                    f"{len(self.losses.values)} steps (guard.{name}_z {limit:g})"
                )
        return None

    def accept(self, step: int, loss: float, grad_norm: float) -> None:
        """Notes that update number `step` was made."""
        self.losses.add(loss)
        self.log_norms.add(_log(grad_norm))
        if step > self.last_refused:
            self.in_a_row = 0

    def refuse(self, event: dict[str, Any]) -> None:
        """Notes that the update number `event["step"]` was not made."""
        self.events.append(dict(sorted(event.items())))  # as they come back from state.json: the log has their bytes
        self.in_a_row += 1
        self.last_refused = max(self.last_refused, event["step"])

    def check_budget(self, failure: Exception) -> None:
        """Raises the failure, with the limit added to its text, if no more may be refused."""
        row, total = self.in_a_row, len(self.events)
        if row >= self.config.max_in_a_row:
            failure.args = (f"{failure}; {row} in a row were left out before it (guard.max_in_a_row)",)
            raise failure
        if total >= self.config.max_total:
            failure.args = (f"{failure}; {total} were left out before it (guard.max_total)",)
            raise failure

    def target(self, step: int) -> int:
        """The step of the checkpoint that a rollback from `step` goes to; 0: none is old enough.

        A function of the recipe and of the run's own course alone: not of which checkpoints a signal or a restart
        happened to leave.
        """
        every = self._save_every
        return 0 if every is None else max((step - self.config.back) // every * every, self.floor)

    def note_save(self, step: int) -> None:
        """Before a checkpoint that the recipe asks for: from now on those older than its target may be deleted."""
        self.floor = self.target(step)

    def state(self) -> dict[str, Any]:
        return {
            "losses": list(self.losses.values),
            "log_norms": list(self.log_norms.values),
            "events": list(self.events),
            "in_a_row": self.in_a_row,
            "last_refused": self.last_refused,
            "floor": self.floor,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.losses.fill(state["losses"])
        self.log_norms.fill(state["log_norms"])
        self.remember(state)

    def remember(self, state: dict[str, Any]) -> None:
        """After a rollback: the windows are those of the checkpoint, what was refused stays as it was before."""
        self.events = list(state["events"])
        self.in_a_row, self.last_refused, self.floor = state["in_a_row"], state["last_refused"], state["floor"]


def learnt_windows(stop: int, events: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """The windows of data before `stop`, [first, end) each, that were learnt from: all but what events left out."""
    windows, at = [], 0
    for first, end in sorted(tuple(event["data"]) for event in events):
        if first > at:
            windows.append((at, min(first, stop)))
        at = max(at, end)  # a rollback may leave out what was left out before
        if at >= stop:
            break
    return [(a, b) for a, b in [*windows, (at, stop)] if a < b]


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-300))
