"""Metrics outside their healthy range: what it usually is, and what to do. Plain rules on plain numbers, no tensors.

Each rule speaks once in a run. What it says is a function of metrics.jsonl alone, so a run that goes on after an
interruption knows what was said before.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_FIRST = 20  # values at the beginning of a run that later ones are compared with
_LAST = 60


@dataclass
class Series:
    """What is remembered of a metric."""

    first: list[float] = field(default_factory=list)
    last: deque[float] = field(default_factory=lambda: deque(maxlen=_LAST))
    n: int = 0
    best: float = float("inf")

    def add(self, value: float) -> None:
        if len(self.first) < _FIRST:
            self.first.append(value)
        self.last.append(value)
        self.n += 1
        self.best = min(self.best, value)

    def mean(self, n: int) -> float:
        """Of the last n values."""
        return statistics.fmean(list(self.last)[-n:])

    @property
    def start(self) -> float:
        """The mean of the first values."""
        return statistics.fmean(self.first)


@dataclass(frozen=True)
class Rule:
    """When a metric is not well."""

    name: str
    metric: str
    """As it is called in metrics.jsonl."""
    healthy: str
    least: int
    """Values before the rule is asked."""
    ill: Callable[[Series], bool]
    cause: str
    remedy: str


RULES = (
    Rule("loss-grows", "train/loss", "falls", 60, lambda s: s.start > 0.5 and s.mean(30) > 1.5 * s.start,
         "the rate is too high, or the weights of `init_from` were lost",
         "lower optim.lr, raise optim.warmup_frac, or set guard.action: rollback"),
    Rule("loss-flat", "train/loss", "falls by more than 0.1 % in its first steps", 500,
         lambda s: s.n < 600 and s.start > 0.3 and abs(s.mean(60) - s.start) < 1e-3 * s.start,
         "nothing is learnt: the rate is far too low, or what should be trained is frozen",
         "raise optim.lr tenfold; see `llmkit doctor RECIPE --only learns` and `--only gradients`"),
    Rule("gradient-large", "train/grad_norm", "below 100 before the clip", 40,
         lambda s: min(list(s.last)[-20:]) > 100,
         "every step is clipped to a small part of itself: its direction is all that is left",
         "lower optim.lr, set precision: fp32 for a while, or look at the data with `llmkit inspect`"),
    Rule("gradient-none", "train/grad_norm", "above 0", 20, lambda s: 0 < max(list(s.last)[-20:]) < 1e-7,
         "the loss no longer depends on the weights",
         "see `llmkit doctor RECIPE --only gradients`; of grpo: the rewards of a group are all equal"),
    Rule("rate-none", "train/lr", "above 0", 10, lambda s: max(list(s.last)[-10:]) == 0,
         "the schedule has come to 0 while steps are left", "check optim.lr, optim.min_lr_frac and steps"),
    Rule("experts-uneven", "train/expert_load_max", "below 4 times the even load", 100, lambda s: s.mean(20) > 4,
         "the router sends most tokens to a few experts", "raise model.experts.balance, or lower optim.lr"),
    Rule("overfits", "valid/loss", "within 10 % of its best", 4,
         lambda s: s.best > 0 and min(list(s.last)[-3:]) > 1.1 * s.best,
         "the training data are learnt by heart", "fewer steps, more data, or set eval.patience"),
    Rule("guesses", "valid/accuracy", "above 0.52 where better and worse are told apart", 4,
         lambda s: max(s.last) < 0.52 and min(s.last) > 0.4,
         "preferences are not learnt: labels that contradict each other, or a rate that is far too low",
         "look at the pairs with `llmkit inspect`; raise optim.lr"),
    Rule("answers-run-on", "answers/ended", "above 0.5 from the third evaluation on", 3, lambda s: s.mean(2) < 0.5,
         "the model does not learn to stop: its answers are learnt without their end",
         "see `llmkit doctor RECIPE --only end-of-turn`, or raise eval.answers.max_new_tokens"),
    Rule("kl-negative", "rollout/kl_sum", "0 or above", 3, lambda s: s.mean(3) < -0.5,
         "what is sampled is not what is trained: a sampler that leaves tokens out shows as a negative KL",
         "drop rollout.top_k, top_p and min_p, or set rollout.correction: token"),
    Rule("kl-large", "rollout/kl_sum", "below 100 nats an answer", 3, lambda s: s.mean(3) > 100,
         "the policy has left the reference behind; a reward that can be gamed is gamed by now",
         "raise kl.coef or set kl.target, lower optim.lr, take an earlier checkpoint"),
    Rule("entropy-gone", "train/entropy", "above a tenth of what it was, or 0.05 nats", 40,
         lambda s: s.mean(20) < 0.05 and s.mean(20) < 0.1 * s.start,
         "the policy answers every prompt in one way: there is nothing left to compare",
         "raise update.clip_high, set update.entropy: 0.01, or lower optim.lr"),
    Rule("clipped", "train/clipped_high", "below 0.3 of the actions", 20, lambda s: s.mean(10) > 0.3,
         "updates on one rollout move the policy too far, and most of their gradient is cut off",
         "lower optim.lr, or update.epochs, or set update.target_kl"),
    Rule("sampler-differs", "train/sampler_gap", "below 0.05 nats a token", 10, lambda s: s.mean(10) > 0.05,
         "sampler and trainer compute with different numbers",
         "set precision: fp32, or rollout.correction: token; see `llmkit doctor RECIPE --only sampler`; with engine: vllm "
         "see docs/rl.md"),
    Rule("correction-cut", "train/correction_cut", "below 0.1 of the actions", 10, lambda s: s.mean(10) > 0.1,
         "the sampler is so far from the policy that its answers are hardly corrected any more",
         "sample with less of top_k, top_p and min_p, or in the trainer's precision; raise rollout.correction_cap"),
    Rule("critic-blind", "rollout/explained_variance", "above 0 from the tenth rollout on", 15,
         lambda s: s.mean(5) < -0.2,
         "the critic foretells returns worse than their mean would",
         "raise critic.warmup_updates or critic.lr, or begin with the reward model (critic.init_from)"),
    Rule("groups-equal", "rollout/groups_equal", "below 0.95 of the answers", 8, lambda s: s.mean(5) > 0.95,
         "the answers to a prompt all get one reward: prompts are too easy, too hard, or cut off",
         "choose prompts of middling difficulty, raise rollout.samples_per_prompt, set dynamic_sampling"),
    Rule("reward-constant", "rollout/reward_std", "above 0", 4, lambda s: max(list(s.last)[-4:]) == 0,
         "every answer gets the same reward", "try the grader with `llmkit sample`; see its error in the log"),
    Rule("answers-cut", "rollout/ended", "above 0.3", 8, lambda s: s.mean(5) < 0.3,
         "most answers reach the longest length and are judged unfinished",
         "raise rollout.max_new_tokens, set missing_eos (ppo), or begin with a model that was fine-tuned to stop"),
    Rule("answers-grow", "rollout/length", "below 3 times what it was", 12,
         lambda s: s.mean(3) > 3 * statistics.fmean(s.first[:3]) and s.mean(3) > 64,
         "the reward likes long answers", "add a reward of kind length, or train the reward model on pairs of one length"),
)  # fmt: skip


class Watch:
    """Looks at every record of metrics.jsonl."""

    def __init__(self) -> None:
        self._series: dict[str, Series] = {rule.metric: Series() for rule in RULES}
        self.said: set[str] = set()

    def see(self, record: Mapping[str, Any]) -> Iterator[str]:
        """What is to be said of a record, a sentence for each rule that speaks for the first time."""
        for name, series in self._series.items():
            if isinstance(value := record.get(name), int | float):
                series.add(float(value))
        for rule in RULES:
            series = self._series[rule.metric]
            if rule.name in self.said or rule.metric not in record or series.n < rule.least or not rule.ill(series):
                continue
            self.said.add(rule.name)
            step, value = record.get("step"), record[rule.metric]
            yield (
                f"warning: step {step}: {rule.metric} is {value:.4g}, healthy is: {rule.healthy}. Cause: {rule.cause}. "
                f"Remedy: {rule.remedy} ({rule.name})"
            )


def table() -> str:
    """The rules as a Markdown table, as docs/errors.md shows them."""
    lines = ["| rule | metric | healthy | else | remedy |", "|---|---|---|---|---|"]
    lines += [f"| {r.name} | `{r.metric}` | {r.healthy} | {r.cause} | {r.remedy} |" for r in RULES]
    return "\n".join(lines) + "\n"
