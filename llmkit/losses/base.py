"""What every loss hands the engine: sums over a micro-batch. The engine divides once, by the count of the whole step."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

IGNORE = -100  # label of a position that is not trained on


@dataclass(frozen=True)
class LossSum:
    """What a loss function hands the engine: sums over its micro-batch, not means.

    `total` is differentiated; `parts` are detached sums that are shown, divided by the same denominator; `stats` are
    detached sums that are divided by nothing, such as how many tokens each expert got: the engine adds them up over the
    whole step, micro-batches and ranks, and keeps them as `engine.stats`, for the task to use as constants of the next.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
