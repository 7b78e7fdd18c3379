"""What the recipes of the stages that train on a policy's own answers share: `ppo` and `grpo`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llmkit.rollout.config import KLConfig, RolloutConfig, UpdateConfig
from llmkit.rollout.environment.config import EnvironmentConfig
from llmkit.rollout.rewards.config import RewardConfig, check_rewards
from llmkit.stages.recipes.base import ModelRecipe
from llmkit.training.config import EvalConfig


class PolicyEvalConfig(EvalConfig):
    """Evaluation in the loop: answers to held-out prompts, sampled and judged as in training."""

    metric: str = Field("valid/reward", min_length=1)
    """The number that early stopping and keep_best look at, as it is called in metrics.jsonl."""
    better: Literal["lower", "higher"] = "higher"
    """Which way that number improves."""
    max_prompts: int | None = Field(None, ge=1)
    """Evaluates on the first prompts only. Default: all of them."""


class PolicyRecipe(ModelRecipe):
    """A policy samples answers to prompts, rewards judge them, and it is updated towards the better ones.

    `steps` counts optimizer steps; one rollout serves update.minibatches x update.epochs of them. `batch.micro_tokens`
    bounds a forward pass, `batch.max_len` prompt and answer together; the other sizes follow from `rollout`.
    """

    rollout: RolloutConfig = RolloutConfig()
    update: UpdateConfig = UpdateConfig()
    kl: KLConfig = KLConfig()
    rewards: tuple[RewardConfig, ...] = Field(min_length=1)
    """What judges an answer: their weighted sum."""
    environment: EnvironmentConfig | None = None
    """What replies to an answer, so that the policy has another turn: tools, or a function of yours. Default: nothing."""
    reference: str | None = None
    """The model that the KL is measured against. Default: init_from, that is, the policy as it starts."""
    eval: PolicyEvalConfig = PolicyEvalConfig()

    @model_validator(mode="after")
    def _policy_fits(self) -> Self:
        check_rewards(self.rewards)
        n_answers = self.rollout.prompts_per_step * self.rollout.samples_per_prompt
        if n_answers % self.update.minibatches:
            raise ValueError(
                f"update.minibatches ({self.update.minibatches}) does not divide the {n_answers} answers of a rollout "
                "(rollout.prompts_per_step x samples_per_prompt)"
            )
        if self.guard.action == "rollback":
            raise ValueError("guard.action rollback leaves out data, and a policy makes its own: use skip or stop")
        if self.data.clean.is_on or self.data.dedup.kind is not None:
            raise ValueError("data.clean and data.dedup are for plain text: prompts are read as they are")
        if self.eval.samples.prompts:
            raise ValueError("eval.samples: the rollouts are written down (rollout.record_every): drop the prompts")
        if self.environment is not None and not self.data.chat:
            raise ValueError("environment: only a conversation can go on, and data.chat is false: drop one of them")
        if self.rollout.engine == "vllm":
            if self.precision == "fp64":
                raise ValueError(
                    "precision fp64 with rollout.engine vllm, which has no fp64: take fp32, or engine: own"
                )
            if self.parallel.tensor > 1:
                raise ValueError(
                    f"parallel.tensor ({self.parallel.tensor}) with rollout.engine vllm: processes that share a row would "
                    "each sample another answer: take parallel.shard: full, or engine: own"
                )
        if self.z_loss:
            raise ValueError("z_loss is a term of pretraining: drop it")
        return self
