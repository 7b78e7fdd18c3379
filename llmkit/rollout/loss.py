"""The loss of a policy on its own answers: a surrogate, and what a recipe adds to it.

Shapes: B answers, T positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmkit.losses import LossSum
from llmkit.losses.logprobs import full_kl, token_logprobs
from llmkit.losses.policy import (
    Stats,
    correction_stats,
    importance_weight,
    kl_loss,
    kl_stats,
    log_ratio,
    ratio_deviation,
    sampler_stats,
)
from llmkit.model.gpt import GPT
from llmkit.rollout.batch import PolicyBatch, hidden_states
from llmkit.rollout.config import KLConfig, RolloutConfig
from llmkit.training.setup import Reference

Surrogate = Callable[[Tensor, Tensor], tuple[Tensor, Stats]]


def policy_loss(
    actor: GPT,
    batch: PolicyBatch,
    surrogate: Surrogate,
    *,
    rollout: RolloutConfig,
    kl: KLConfig,
    kl_coef: float,
    reference: Reference | None,
    entropy: float,
    vocab_size: int,
) -> tuple[LossSum, dict[str, Tensor]]:
    """A surrogate weighed as the aggregation says, corrected for a sampler that was not the policy, with a KL to the
    reference and a bonus for entropy where these are asked for.

    Args:
        actor: the policy.
        batch: its answers; where `old_BT` is None, the policy itself is the old one.
        surrogate: (log-probabilities, old ones) [B, T] -> losses [B, T] and sums over actions.
        rollout: temperature and correction.
        kl: where the KL stands, and which estimate of it.
        kl_coef: its weight at present.
        reference: asked for `full`.
        entropy: weight of the bonus.
        vocab_size: the tokenizer's.

    Returns:
        parts `policy_loss` and, where asked for, `kl_loss`; stats are sums over actions; and the largest of some numbers of
        an action: `ratio_deviation`, how far its ratio is from 1, and `correction_max`, its weight.
    """
    actions_BT, weights_BT = batch.actions_BT, batch.weights_BT
    hidden_BTD = hidden_states(actor, batch)
    logprobs_BT, entropy_BT = token_logprobs(
        hidden_BTD,
        actor.head_weight,
        batch.labels_BT,
        temperature=rollout.temperature,
        vocab_size=vocab_size,
        entropy=True,
    )
    assert entropy_BT is not None
    old_BT = logprobs_BT.detach() if batch.old_BT is None else batch.old_BT
    losses_BT, stats = surrogate(logprobs_BT, old_BT)
    largest = {"ratio_deviation": ratio_deviation(logprobs_BT, old_BT, actions_BT)}
    if rollout.correction != "none":
        mode, cap = rollout.correction, rollout.correction_cap
        correction_BT = importance_weight(old_BT, batch.sampler_BT, actions_BT, cap, mode)
        losses_BT = losses_BT * correction_BT
        stats |= correction_stats(correction_BT, actions_BT, cap, mode)
        largest["correction_max"] = correction_BT.where(actions_BT, 0.0).amax()
    total = (weights_BT * losses_BT).sum()
    parts = {"policy_loss": total.detach()}
    stats = {
        **stats,
        "entropy": entropy_BT.detach().where(actions_BT, 0.0).sum(),
        **sampler_stats(old_BT, batch.sampler_BT, actions_BT),
    }
    if entropy:
        total = total - entropy * (weights_BT * entropy_BT).sum()
    if batch.ref_BT is not None:
        stats |= kl_stats(logprobs_BT, batch.ref_BT, actions_BT)
    if kl.where == "loss":
        if kl.kind == "full":
            assert reference is not None
            kl_BT = _exact_kl(hidden_BTD, actor, batch, reference, rollout.temperature, vocab_size)
        else:
            assert batch.ref_BT is not None and kl.kind in ("k2", "k3")
            ratio_BT = log_ratio(logprobs_BT, old_BT, actions_BT).exp()
            kl_BT = kl_loss("k2" if kl.kind == "k2" else "k3", logprobs_BT, batch.ref_BT, actions_BT, ratio_BT)
        kl_sum = (weights_BT * kl_BT).sum()
        total, parts["kl_loss"] = total + kl_coef * kl_sum, kl_sum.detach()
    return LossSum(total, parts, stats), largest


def _exact_kl(
    hidden_BTD: Tensor, actor: GPT, batch: PolicyBatch, reference: Reference, temperature: float, vocab_size: int
) -> Tensor:
    """KL(policy || reference) over the whole vocabulary at every action [B, T]."""
    with torch.no_grad(), reference(actor) as model:
        ref_hidden_BTD = hidden_states(model, batch)
        ref_weight_VD = model.head_weight
    return full_kl(
        hidden_BTD,
        actor.head_weight,
        ref_hidden_BTD,
        ref_weight_VD,
        batch.actions_BT,
        temperature=temperature,
        vocab_size=vocab_size,
    )
