"""What a sweep tries of one key of a recipe: `log:1e-4:1e-2`, `uniform:0:0.2`, `int:1:8`, `choice:adamw,muon`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llmkit.config import UserError

_HOW = "such as optim.lr=log:1e-4:1e-2, model.n_layers=int:2:8, uniform:0:0.2 or optim.name=choice:adamw,muon"


@dataclass(frozen=True)
class Values:
    """A range of numbers, or some texts."""

    kind: str
    """log and uniform: real numbers; int and logint: whole ones; choice."""
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()

    def distribution(self, optuna: Any) -> Any:
        """The same for Optuna."""
        if self.kind == "choice":
            return optuna.distributions.CategoricalDistribution(self.choices)
        if self.kind in ("int", "logint"):
            return optuna.distributions.IntDistribution(int(self.low), int(self.high), log=self.kind == "logint")
        return optuna.distributions.FloatDistribution(self.low, self.high, log=self.kind == "log")

    def ends(self) -> tuple[Any, Any]:
        """The least and the largest value, or the first and the last."""
        if self.kind == "choice":
            return self.choices[0], self.choices[-1]
        return (self.low, self.high) if self.kind in ("log", "uniform") else (int(self.low), int(self.high))

    def rounded(self, value: Any) -> Any:
        """A value with six digits, as it is written into a command."""
        return min(max(float(f"{value:.6g}"), self.low), self.high) if isinstance(value, float) else value

    def is_at_an_end(self, value: Any) -> bool:
        """Whether it is within a twentieth of the range of one of its ends."""
        if self.kind == "choice" or self.low == self.high:
            return False
        scale = math.log if self.kind in ("log", "logint") else float
        place = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return not 0.05 < place < 0.95

    def place(self, value: Any) -> float:
        """Where it stands on an axis."""
        return self.choices.index(value) if self.kind == "choice" else float(value)

    def label(self, ax: Any) -> None:
        """Makes a picture's axis fit."""
        if self.kind == "choice":
            ax.set_xticks(range(len(self.choices)), self.choices)
            return
        if self.kind in ("log", "logint"):
            ax.set_xscale("log")
        margin = 1.1 if self.kind in ("log", "logint") else None
        span = 0.03 * (self.high - self.low)
        ax.set_xlim(
            self.low / margin if margin else self.low - span, self.high * margin if margin else self.high + span
        )


def parse_over(text: str) -> tuple[str, Values]:
    """`key=kind:...`. Raises UserError that says what is wrong with it."""
    key, _, rest = text.partition("=")
    kind, _, told = rest.partition(":")
    if not key or kind not in ("log", "uniform", "int", "logint", "choice") or not told:
        raise UserError(f"sweep: --over {text}: expected key=kind:values, {_HOW}")
    if kind == "choice":
        choices = tuple(choice.strip() for choice in told.split(","))
        if len(choices) < 2 or not all(choices) or len(set(choices)) < len(choices):
            raise UserError(f"sweep: --over {text}: expected two or more different values, separated by commas")
        return key, Values(kind, choices=choices)
    try:
        low, high = (float(number) for number in told.split(":"))
    except ValueError:
        raise UserError(f"sweep: --over {text}: expected two numbers, the least and the largest: {_HOW}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"sweep: --over {text}: the first number must be less than the second")
    if kind in ("log", "logint") and low <= 0:
        raise UserError(f"sweep: --over {text}: a logarithmic range begins above 0")
    if kind in ("int", "logint") and not (low.is_integer() and high.is_integer()):
        raise UserError(f"sweep: --over {text}: {kind} is between whole numbers")
    return key, Values(kind, low, high)
