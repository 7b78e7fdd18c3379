"""Draws prompts, lets the policy answer them on all ranks, and has the answers graded."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from llmkit.config import Interrupted
from llmkit.model.gpt import GPT
from llmkit.rollout.batch import Rollouts
from llmkit.rollout.collect import Generate, Sampled, flat, gathered, sample_answers
from llmkit.rollout.config import RolloutConfig
from llmkit.rollout.environment import Environment
from llmkit.rollout.prompts import PromptOrder, PromptRow
from llmkit.rollout.rewards.base import Rewards
from llmkit.rollout.vllm import Vllm
from llmkit.tokenizer import Tokenizer
from llmkit.training.dist import Ranks
from llmkit.training.engine import seed_of

Metrics = dict[str, float]


class Collector:
    """Rollouts of a run. An answer is a function of the weights, the run's seed and its place among all answers drawn,
    so it depends neither on ranks nor on when the run was stopped.

    Each rank writes its share by itself, and waits for the others only when all its answers are done.
    """

    def __init__(
        self,
        config: RolloutConfig,
        tokenizer: Tokenizer,
        rewards: Rewards,
        ranks: Ranks,
        seed: int,
        environment: Environment | None = None,
        vllm: Vllm | None = None,
    ):
        self.config, self.tokenizer, self.rewards, self.ranks, self.seed = config, tokenizer, rewards, ranks, seed
        self.environment, self.vllm = environment, vllm
        self._engine: Generate | None = None
        self.seconds = {"rollout_s": 0.0, "score_s": 0.0} | ({} if vllm is None else {"hand_over_s": 0.0})
        """Of this rank, since they were last set to 0."""
        self.errors: dict[str, float] = {}
        """Answers that each part of the rewards failed on, over all ranks, in the last rollout."""

    @contextlib.contextmanager
    def writing(self, model: GPT) -> Iterator[None]:
        """Around all calls of `draw` and `answers` that ask these weights: vLLM is given them. A collective."""
        if self.vllm is None:
            yield
            return
        started = time.perf_counter()
        with self.vllm.awake(model) as self._engine:
            self.seconds["hand_over_s"] += time.perf_counter() - started
            try:
                yield
            finally:
                self._engine = None

    def draw(
        self, model: GPT, order: PromptOrder, first: int, n: int, should_stop: Callable[[], bool], dtype: torch.dtype
    ) -> Rollouts:
        """Answers to prompts number first to first + n - 1 of the run."""
        return self.answers(model, order.draw(first, n), range(first, first + n), "rollout", should_stop, dtype)

    def answers(
        self,
        model: GPT,
        rows: Sequence[PromptRow],
        groups: Sequence[int],
        purpose: str,
        should_stop: Callable[[], bool],
        dtype: torch.dtype,
    ) -> Rollouts:
        """Answers to these prompts, each rank writing and grading its share.

        Args:
            groups: a number for each prompt; with `purpose` it seeds its answers.
            dtype: of log-probabilities and scores.

        Raises:
            Interrupted: on all ranks, if should_stop() said so on one.
        """
        share = slice(*(len(rows) * r // self.ranks.world for r in (self.ranks.rank, self.ranks.rank + 1)))
        started = time.perf_counter()
        made = self.ranks.together(lambda: self._sample(model, rows[share], groups[share], purpose, should_stop))
        if self.ranks.any(made is None):
            raise Interrupted("stopped inside a rollout, which begins anew")
        sampled = time.perf_counter()
        scores = self.ranks.together(lambda: self.rewards.score([a.answer() for a in made]))
        graded = time.perf_counter()
        self.seconds["rollout_s"] += sampled - started
        self.seconds["score_s"] += graded - sampled
        numbers = {"": scores.total, **scores.parts}
        floats = {name: self.ranks.concat(torch.tensor(v, dtype=torch.float64)) for name, v in numbers.items()}
        errors = self.ranks.sum_numbers(*(float(n) for n in scores.errors.values()))
        self.errors = dict(zip(scores.errors, errors, strict=True))
        whole = {name: self.ranks.concat(t) for name, t in flat(made).items()}
        group_N = torch.tensor(list(groups)).repeat_interleave(self.config.samples_per_prompt)
        return gathered(whole, group_N, floats.pop(""), floats, dtype)

    def _sample(
        self,
        model: GPT,
        rows: Sequence[PromptRow],
        groups: Sequence[int],
        purpose: str,
        should_stop: Callable[[], bool],
    ) -> list[Sampled] | None:
        """This rank's answers; None if it was asked to stop, which the other ranks must hear of before any gives up."""
        assert self.vllm is None or self._engine is not None, "vLLM has weights only within `writing`"
        seeds = [seed_of(self.seed, purpose, g) for g in groups]
        try:
            return sample_answers(
                model,
                rows,
                seeds,
                self.config,
                self.tokenizer,
                environment=self.environment,
                should_stop=should_stop,
                engine=self._engine,
            )
        except Interrupted:
            return None


def described(rollouts: Rollouts) -> Metrics:
    """Means over the answers of a rollout."""
    scores_K = rollouts.scores_N[rollouts.scores_N.isfinite()]
    actions_N = rollouts.actions_NT.sum(1)
    metrics: Metrics = {"length": actions_N.double().mean().item(), "ended": rollouts.finished_N.double().mean().item()}
    if len(scores_K):
        metrics["reward"] = scores_K.double().mean().item()
        metrics["reward_std"] = scores_K.double().std(correction=0).item()
    for name, values_N in rollouts.parts.items():
        known_K: Tensor = values_N[values_N.isfinite()]
        if len(known_K):
            metrics[f"reward/{name}"] = known_K.double().mean().item()
    return metrics
