"""PPO: a policy that is rewarded for its own answers, and a critic that says what was to be expected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from llmkit.advantages import explained_variance, gae, shaped_rewards, whiten
from llmkit.config import UserError
from llmkit.losses import LossSum
from llmkit.losses.policy import ppo_clip, value_loss
from llmkit.model.config import GPTConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.heads import ActorCritic, SequenceClassifier, init_head
from llmkit.model.hf import read_config
from llmkit.model.weights import load_weights
from llmkit.plan.job import Job
from llmkit.rollout.batch import PolicyBatch, Rollouts
from llmkit.rollout.plan import plan_policy, policy_job
from llmkit.stages.recipes import PPORecipe
from llmkit.storage import resolve_model
from llmkit.training.engine import Engine, Metrics, seed_of
from llmkit.training.loop import Context, Outcome
from llmkit.training.optim import Part
from llmkit.training.policy import PolicyTask, prepare_policy, run_policy
from llmkit.training.setup import adapt, refuse_other_tokenizer, where_built

ACTOR, CRITIC = "actor.", "critic."


class PPOTask(PolicyTask):
    """What the loop asks of PPO."""

    recipe: PPORecipe

    def __init__(self, recipe: PPORecipe):
        super().__init__(recipe)
        self.aggregation = recipe.update.aggregation
        self.needs_reference = recipe.kl.where != "none"
        self.needs_old = True
        self.critic_config: GPTConfig

    # --- the network -----------------------------------------------------------------------------------------------

    @property
    def parts(self) -> Sequence[Part]:
        """Policy and critic are clipped apart: a shared norm would let one shrink the other's gradient."""
        optim, critic = self.recipe.optim, self.recipe.critic
        rate = 5 * optim.lr if critic.lr is None else critic.lr
        if optim.lr == 0 and rate:
            raise UserError("optim.lr is 0, so the critic's rate can't be a share of it: use critic.warmup_updates")
        return Part(ACTOR, 1.0, optim.clip), Part(CRITIC, rate / optim.lr if rate else 0.0, critic.clip)

    def network(self, actor: GPT, ctx: Context) -> ActorCritic:
        return ActorCritic(actor, self._critic(ctx))

    def actor_of(self, module: nn.Module) -> GPT:
        assert isinstance(module, ActorCritic)
        return module.actor

    def _critic(self, ctx: Context) -> SequenceClassifier:
        recipe, said = self.recipe, self.recipe.critic
        source = said.init_from or recipe.init_from
        self.critic_config = self.model_config
        if source is not None:
            folder = resolve_model(source)
            refuse_other_tokenizer(folder, self.tokenizer, f"critic.init_from ({source})")
            shape = read_config(folder)
            rows = max(shape.vocab_size or 0, self.model_config.vocab_size or 0)
            self.critic_config = shape.model_copy(update={"dropout": 0.0, "vocab_size": rows})
        with where_built(recipe, ctx.ranks):
            critic = SequenceClassifier(self.critic_config, 1, recipe.activation_checkpointing)
        if source is None:
            init_weights(critic, recipe.seed)
            init_head(critic, seed_of(recipe.seed, "critic"), zero=True)
            return critic
        may_lack = () if said.keep_head else critic.head_names
        may_hold = ("lm_head.weight",)
        report = load_weights(
            critic, resolve_model(source), n_tokens=self.tokenizer.vocab_size, may_lack=may_lack, may_hold=may_hold
        )
        if not said.keep_head:
            init_head(critic, seed_of(recipe.seed, "critic"), zero=True)
        ctx.log.say(f"critic     {report}")
        adapt(critic, recipe, source, report, ctx.log.say, "critic/")
        return critic

    def resting(self, engine: Engine) -> Sequence[str]:
        """While the critic warms up, the policy stays as it is, to the bit."""
        return (ACTOR,) if engine.step < self.recipe.critic.warmup_updates else ()

    # --- credit ------------------------------------------------------------------------------------------------------

    def credit(self, rollouts: Rollouts, engine: Engine, ctx: Context) -> tuple[Rollouts, Metrics]:
        """Values, rewards with the KL taken off, GAE."""
        recipe = self.recipe
        critic = engine.asked.critic
        assert isinstance(critic, SequenceClassifier)
        values = self.over_answers(
            rollouts, {"values_NT": lambda batch: critic.at_tokens(batch.ids_BT)[..., 0]}, engine, ctx
        )
        rollouts = rollouts.knowing(values)
        values_NT, actions_NT = values["values_NT"], rollouts.actions_NT
        graded_N = actions_NT.any(1)
        scores_N = rollouts.scores_N.nan_to_num(0.0)
        if recipe.reward_clip is not None:
            scores_N = scores_N.clamp(-recipe.reward_clip, recipe.reward_clip)
        if recipe.missing_eos is not None:
            scores_N = scores_N + recipe.missing_eos * (~rollouts.finished_N)
        kl_NT = None
        if recipe.kl.where == "reward":
            assert rollouts.old_NT is not None and rollouts.ref_NT is not None
            kl_NT = (rollouts.old_NT - rollouts.ref_NT).where(actions_NT, 0.0)
        rewards_NT = torch.zeros_like(values_NT)
        rewards_NT[graded_N] = shaped_rewards(
            scores_N[graded_N], actions_NT[graded_N], None if kl_NT is None else kl_NT[graded_N], self.kl_coef
        )
        if recipe.whiten_rewards:
            rewards_NT = whiten(rewards_NT, actions_NT, shift_mean=False)
        bootstrap_N = None
        if recipe.cut_off == "bootstrap":
            last_N1 = (rollouts.lengths_N - 1)[:, None]
            bootstrap_N = values_NT.gather(1, last_N1)[:, 0].where(~rollouts.finished_N, 0.0)
        advantages_NT, returns_NT = gae(
            rewards_NT, values_NT, actions_NT, gamma=recipe.gamma, lam=recipe.lam, bootstrap_B=bootstrap_N
        )
        told = {
            "explained_variance": explained_variance(values_NT, returns_NT, actions_NT),
            "value": values_NT[actions_NT].mean().item(),
            "return": returns_NT[actions_NT].mean().item(),
            "advantage_std": advantages_NT[actions_NT].std(correction=0).item(),
            "score": scores_N[graded_N].mean().item(),
        }
        if recipe.whiten_advantages:
            advantages_NT = whiten(advantages_NT, actions_NT)
        found = {"advantages_NT": advantages_NT, "returns_NT": returns_NT}
        return rollouts.knowing(found), {k: v for k, v in told.items() if v == v}

    # --- the loss ----------------------------------------------------------------------------------------------------

    def loss(self, module: nn.Module, batch: PolicyBatch) -> LossSum:
        """The clipped surrogate, and the critic's squared error."""
        assert isinstance(module, ActorCritic) and batch.values_BT is not None and batch.returns_BT is not None
        said, critic, actions_BT = self.recipe.update, self.recipe.critic, batch.actions_BT
        policy = self.policy_loss(
            module.actor,
            batch,
            lambda logprobs_BT, old_BT: ppo_clip(
                logprobs_BT,
                old_BT,
                batch.advantages_BT,
                actions_BT,
                clip_low=said.clip_low,
                clip_high=said.clip_high,
                dual_clip=said.dual_clip,
            ),
            said.entropy,
        )
        values_BT = module.critic.at_tokens(batch.ids_BT)[..., 0]
        errors_BT, stats = value_loss(
            values_BT, batch.values_BT, batch.returns_BT, actions_BT, clip=critic.value_clip
        )  # fmt: skip
        value = (batch.weights_BT * errors_BT).sum()
        total = policy.total + critic.coef * value
        parts = {"loss": total.detach(), **policy.parts, "value_loss": value.detach()}
        return LossSum(total, parts, {**policy.stats, **stats})

    # --- the checkpoint ----------------------------------------------------------------------------------------------

    def files(self, engine: Engine) -> dict[str, bytes]:
        facts: dict[str, Any] = {"stage": "ppo", "step": engine.step, **self.facts()}
        policy = model_files(self.model_config, engine.dtype, self.tokenizer, facts)
        critic = model_files(
            self.critic_config, engine.dtype, self.tokenizer, {**facts, "role": "critic"}, head="classify", n_labels=1
        )
        return policy | {f"critic/{name}": content for name, content in critic.items()}


# --- commands --------------------------------------------------------------------------------------------------------


open_task = PPOTask  # `llmkit inspect`, `doctor` and `replay` open it


def run(recipe: PPORecipe) -> Outcome:
    """`llmkit train`."""
    return run_policy(recipe, PPOTask(recipe))


prepare = prepare_policy


def plan(recipe: PPORecipe) -> Iterator[str]:
    """`llmkit plan`: what a run would cost, line by line."""
    return plan_policy(recipe, critic=recipe.critic.init_from or recipe.init_from or "")


def job(recipe: PPORecipe) -> Job:
    """What `llmkit plan` reckons with."""
    return policy_job("ppo", recipe, critic=recipe.critic.init_from or recipe.init_from or "", asks_old=True)
