"""What a reward model's folder tells of its scores, in config.json under "llmkit": their scale, and how good they are.

Scores of pairs fix only differences, so mean and std of the scores of reference answers are what makes them comparable:
a policy is trained on (score - mean) / std.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from llmkit.config import UserError
from llmkit.model.hf import read_json


@dataclass(frozen=True)
class RewardFacts:
    """Of the weights that lie beside it."""

    reward_mean: float
    """Of the scores of the reference answers."""
    reward_std: float
    """Their standard deviation (of n, not n - 1)."""
    reward_n: int
    """How many reference answers there were."""
    reward_accuracy: float | None = None
    """Share of held-out pairs that are ranked right, ties half; None: none were held out."""
    reward_n_pairs: int = 0
    """How many pairs that is a share of."""

    def normalised(self, score: float) -> float:
        """The score in standard deviations from the mean."""
        return (score - self.reward_mean) / self.reward_std

    def to_json(self) -> dict[str, float | int | None]:
        return asdict(self)


def read_reward_facts(folder: Path) -> RewardFacts | None:
    """The facts of a reward model's folder; None if it tells none, as a foreign one.

    Raises:
        UserError: if they are no usable numbers.
    """
    told = read_json(folder).get("llmkit")
    names = RewardFacts.__dataclass_fields__
    if not isinstance(told, dict) or not {"reward_mean", "reward_std"} <= told.keys():
        return None
    given = {"reward_n": 0, **{name: told[name] for name in names if name in told}}
    numbers = [value for value in given.values() if value is not None]
    right = all(isinstance(v, int | float) and math.isfinite(v) for v in numbers)
    if not right or given["reward_mean"] is None or not (given["reward_std"] or 0) > 0:
        raise UserError(
            f"{folder / 'config.json'}: llmkit: reward_mean and reward_std must be numbers, the std above 0"
        )
    return RewardFacts(**given)
