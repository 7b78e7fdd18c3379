"""`stage: ppo`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llmkit.config import Config
from llmkit.rollout.config import KLConfig, UpdateConfig
from llmkit.stages.recipes.policy import PolicyRecipe


class CriticConfig(Config):
    """The model that estimates what reward is still to come."""

    init_from: str | None = None
    """Its first weights: a reward model, whose head is then set to zero, or a language model. Default: the policy's."""
    keep_head: bool = False
    """Keeps a reward model's head instead of starting at zero."""
    lr: float | None = Field(None, ge=0)
    """Its peak learning rate. Default: five times the policy's."""
    clip: float | None = Field(1.0, gt=0)
    """Largest L2 norm of its gradient, apart from the policy's; null: none."""
    warmup_updates: int = Field(0, ge=0)
    """Optimizer steps at the start in which it alone learns (VC-PPO, arXiv 2503.01491)."""
    coef: float = Field(0.1, gt=0)
    """Weight of its loss beside the policy's. They share no parameter: with AdamW it matters to the logged sum only."""
    value_clip: float | None = Field(0.2, gt=0)
    """How far a value may move from that of the rollout, in units of the reward, before its loss stops; null: any."""


class PPOUpdateConfig(UpdateConfig):
    """What is done with one rollout, and the surrogate (Schulman et al. 2017, arXiv 1707.06347)."""

    minibatches: int = Field(4, ge=1)
    """Optimizer steps in one pass over the rollout."""
    epochs: int = Field(2, ge=1)
    """Passes over the rollout."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """The ratio counts no lower than 1 - this."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio counts no higher than 1 + this."""
    dual_clip: float | None = Field(None, gt=1)
    """Bounds the loss of a bad answer's token at this times its advantage (arXiv 1912.09729)."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Every token counts alike, or every answer."""
    entropy: float = Field(0.0, ge=0)
    """Weight of an entropy bonus."""


class PPORecipe(PolicyRecipe):
    """Proximal policy optimisation with a critic (Ziegler et al. 2019, arXiv 1909.08593; Ouyang et al. 2022, arXiv
    2203.02155)."""

    stage: Literal["ppo"]
    update: PPOUpdateConfig = PPOUpdateConfig()
    kl: KLConfig = KLConfig()
    critic: CriticConfig = CriticConfig()
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount of a token's reward per token before it."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE's lambda (arXiv 1506.02438): 1 takes the whole return, 0 the next value."""
    whiten_rewards: bool = False
    """Divides the rewards of a rollout by their deviation; their mean stays."""
    whiten_advantages: bool = True
    """Gives the advantages of a rollout mean 0 and variance 1, over all ranks."""
    reward_clip: float | None = Field(10.0, gt=0)
    """An answer's reward counts at most so much, and at least minus that; null: any."""
    missing_eos: float | None = None
    """What is added to the reward of an answer that was cut off; negative punishes."""
    cut_off: Literal["end", "bootstrap"] = "end"
    """end: an answer that was cut off is over. bootstrap: its last token also gets the critic's value of what follows."""

    @model_validator(mode="after")
    def _ppo_fits(self) -> PPORecipe:
        if self.init_from is None and self.model is not None and self.critic.init_from is not None:
            raise ValueError("critic.init_from without init_from: give the policy its first weights too")
        return self
