"""GRPO and its family: a policy learns from its own answers, each compared with the others to its prompt; no critic.

An algorithm is a choice of advantage x aggregation x surrogate (`recipes.grpo.PRESETS`), not a copy of the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmkit.advantages import (
    group_relative,
    group_varies,
    leave_one_out,
    rewards_to_go,
    shaped_rewards,
    whiten,
)
from llmkit.losses import LossSum, cispo, gspo, ppo_clip, reinforce
from llmkit.losses.policy import Stats
from llmkit.model.files import model_files
from llmkit.plan.job import Job
from llmkit.rollout.batch import PolicyBatch, Rollouts
from llmkit.rollout.plan import plan_policy, policy_job
from llmkit.stages.recipes import GRPORecipe
from llmkit.training.engine import Engine, Metrics
from llmkit.training.loop import Context, Outcome
from llmkit.training.policy import PolicyTask, prepare_policy, run_policy


def credits(recipe: GRPORecipe, rollouts: Rollouts, kl_coef: float) -> Tensor:
    """The advantage of every action by the recipe's choice, [N, T]; 0 elsewhere and for answers without a grade.

    A KL in the reward is taken off token by token where tokens are credited, and from the whole reward where answers are.
    """
    actions_NT = rollouts.actions_NT
    graded_N = rollouts.scores_N.isfinite() & actions_NT.any(1)
    scores_K, group_K = rollouts.scores_N[graded_N], rollouts.group_N[graded_N]
    actions_KT = actions_NT[graded_N]
    kl_KT = None
    if recipe.kl.where == "reward":
        assert rollouts.ref_NT is not None
        own_NT = rollouts.sampler_NT if rollouts.old_NT is None else rollouts.old_NT
        kl_KT = (own_NT - rollouts.ref_NT).where(actions_NT, 0.0)[graded_N]
    advantages_NT = torch.zeros_like(rollouts.sampler_NT)
    if recipe.advantage in ("return", "baseline"):
        if recipe.advantage == "baseline":
            scores_K = group_relative(scores_K, group_K, "none")
        rewards_KT = shaped_rewards(scores_K, actions_KT, kl_KT, kl_coef)
        advantages_NT[graded_N] = rewards_to_go(rewards_KT, actions_KT).to(advantages_NT.dtype)
        return whiten(advantages_NT, actions_NT & graded_N[:, None])
    if kl_KT is not None:
        scores_K = scores_K - kl_coef * kl_KT.sum(1).to(scores_K.dtype)
    if recipe.advantage == "leave_one_out":
        advantages_K = leave_one_out(scores_K, group_K)
    elif recipe.advantage == "group_std":
        advantages_K = group_relative(scores_K, group_K, "std")
    else:
        advantages_K = group_relative(scores_K, group_K, "batch" if recipe.advantage == "group_batch" else "none")
    advantages_NT[graded_N] = advantages_K[:, None].to(advantages_NT.dtype)
    return advantages_NT.where(actions_NT, 0.0)


class GRPOTask(PolicyTask):
    """What the loop asks of GRPO and its family."""

    recipe: GRPORecipe

    def __init__(self, recipe: GRPORecipe):
        super().__init__(recipe)
        self.aggregation = recipe.aggregation
        self.needs_reference = recipe.kl.where != "none"
        self.needs_old = _asks_old(recipe)

    # --- credit ------------------------------------------------------------------------------------------------------

    def wanted(self, rollouts: Rollouts) -> Tensor | None:
        """Dynamic sampling: the answers of groups whose rewards differ."""
        if not self.recipe.dynamic_sampling:
            return None
        by = self.recipe.equal_by
        return _varies(rollouts.scores_N if by is None else rollouts.parts[by], rollouts.group_N)

    def credit(self, rollouts: Rollouts, engine: Engine, ctx: Context) -> tuple[Rollouts, Metrics]:
        """Advantages; and answers that were cut off are no longer learnt from, if the recipe says so."""
        advantages_NT = credits(self.recipe, rollouts, self.kl_coef)
        told = {"groups_equal": 1 - _varies(rollouts.scores_N, rollouts.group_N).double().mean().item()}
        rollouts = rollouts.knowing({"advantages_NT": advantages_NT})
        if self.recipe.drop_cut_off:
            rollouts = replace(rollouts, actions_NT=rollouts.actions_NT & rollouts.finished_N[:, None])
        return rollouts, told

    # --- the loss ----------------------------------------------------------------------------------------------------

    def loss(self, module: nn.Module, batch: PolicyBatch) -> LossSum:
        """The surrogate, and what the recipe adds to it."""
        out = self.policy_loss(
            self.actor_of(module),
            batch,
            lambda logprobs_BT, old_BT: self._surrogate(logprobs_BT, old_BT, batch),
            self.recipe.update.entropy,
        )
        return LossSum(out.total, {"loss": out.total.detach(), **out.parts}, out.stats)

    def _surrogate(self, logprobs_BT: Tensor, old_BT: Tensor, batch: PolicyBatch) -> tuple[Tensor, Stats]:
        given = (logprobs_BT, old_BT, batch.advantages_BT, batch.actions_BT)
        update = self.recipe.update
        if self.recipe.surrogate == "reinforce":
            return reinforce(*given)
        if self.recipe.surrogate == "cispo":
            return cispo(*given, ratio_max=update.ratio_max)
        if self.recipe.surrogate == "gspo":
            return gspo(*given, clip_low=update.clip_low, clip_high=update.clip_high)
        return ppo_clip(
            *given, clip_low=update.clip_low, clip_high=update.clip_high, dual_clip=update.dual_clip
        )  # fmt: skip

    def _accept(self, engine: Engine, ctx: Context) -> Callable[[Metrics], bool]:
        """An update whose answers teach nothing is not made: momentum and weight decay would move the policy (B81)."""
        shared = super()._accept(engine, ctx)

        def accept(metrics: Metrics) -> bool:
            # Not == 0: where a row is computed by several processes, what cancels out leaves its rounding.
            metrics["idle"] = float(metrics["grad_norm"] <= torch.finfo(engine.flat_grad.dtype).eps)
            return shared(metrics) and not metrics["idle"]

        return accept

    # --- the checkpoint ----------------------------------------------------------------------------------------------

    def files(self, engine: Engine) -> dict[str, bytes]:
        facts = {"stage": "grpo", "algorithm": self.recipe.algorithm, "step": engine.step, **self.facts()}
        return model_files(self.model_config, engine.dtype, self.tokenizer, facts)


def _asks_old(recipe: GRPORecipe) -> bool:
    """Whether the old log-probabilities take a pass of their own. With one update a rollout the policy in the update is
    the one that sampled, unless another distribution did and a KL is to be told before."""
    return recipe.update.steps > 1 or (recipe.rollout.correction != "none" and recipe.kl.where != "none")


def _varies(scores_N: Tensor, group_N: Tensor) -> Tensor:
    """Whether the graded answers of an answer's group differ in their score, bool [N]."""
    graded_N = scores_N.isfinite()
    varies_N = torch.zeros_like(graded_N)
    if graded_N.any():
        groups_K = group_N[graded_N][group_varies(scores_N[graded_N], group_N[graded_N])]
        varies_N = torch.isin(group_N, groups_K)
    return varies_N


# --- commands --------------------------------------------------------------------------------------------------------


open_task = GRPOTask  # `llmkit inspect`, `doctor` and `replay` open it


def run(recipe: GRPORecipe) -> Outcome:
    """`llmkit train`."""
    return run_policy(recipe, GRPOTask(recipe))


def prepare(recipe: GRPORecipe) -> bool | None:
    """`llmkit prepare`: reads the prompts as a run would; None if a signal stopped it."""
    return prepare_policy(recipe)


def plan(recipe: GRPORecipe) -> Iterator[str]:
    """`llmkit plan`: what a run would cost, line by line."""
    return plan_policy(recipe, critic=None)


def job(recipe: GRPORecipe) -> Job:
    """What `llmkit plan` reckons with."""
    return policy_job("grpo", recipe, critic=None, asks_old=_asks_old(recipe))
