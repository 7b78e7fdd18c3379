"""Losses: pure functions, tensors in, sums out. One module a family; each cites its paper."""

from llmkit.losses.base import IGNORE, LossSum
from llmkit.losses.distillation import DenseTeacher, SoftTerm, TopKTeacher, distillation_loss, uld_loss
from llmkit.losses.features import attention_loss, hidden_loss, relation_loss
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
    "DenseTeacher",
    "LossSum",
    "SoftTerm",
    "TopKTeacher",
    "attention_loss",
    "cispo",
    "classification",
    "distillation_loss",
    "full_kl",
    "gspo",
    "hidden_loss",
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
    "relation_loss",
    "squared_error",
    "step_correctness",
    "token_logprobs",
    "token_weights",
    "uld_loss",
    "value_loss",
]
