"""Losses: pure functions, tensors in, sums out. One module a family; each cites its paper."""

from llmkit.losses.base import IGNORE, LossSum
from llmkit.losses.logprobs import full_kl, token_logprobs
from llmkit.losses.policy import (
    cispo,
    gspo,
    importance_weight,
    kl_loss,
    kl_stats,
    ppo_clip,
    reinforce,
    token_weights,
    value_loss,
)
from llmkit.losses.preference import kto_loss, preference_loss
from llmkit.losses.ranking import ranking, step_correctness
from llmkit.losses.sequence import classification, regression, squared_error
from llmkit.losses.vocabulary import linear_cross_entropy

__all__ = [
    "IGNORE",
    "LossSum",
    "cispo",
    "classification",
    "full_kl",
    "gspo",
    "importance_weight",
    "kl_loss",
    "kl_stats",
    "kto_loss",
    "linear_cross_entropy",
    "ppo_clip",
    "preference_loss",
    "ranking",
    "regression",
    "reinforce",
    "squared_error",
    "step_correctness",
    "token_logprobs",
    "token_weights",
    "value_loss",
]
