"""Losses of reinforcement learning, per token, and what is told of them.

Every loss here is a tensor [B, T] that is 0 wherever `mask` is False; the caller multiplies it by its weights
(`token_weights`), adds it up and lets the engine divide by the denominator of the whole step. Position t stands for the
choice of token t + 1: an *action*, if the policy made it and is to learn from it. Prompts, padding and what a tool
answered are no actions. Statistics are sums over actions, detached, in fp32 or better; whoever shows them divides.

Shapes: B answers, T positions.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Stats = dict[str, Tensor]
Aggregation = Literal["token_mean", "sequence_mean", "constant", "sequence_sum"]
_LOG_LIMIT = 20.0  # of a log-ratio before it is exponentiated: exp(20) is still far from overflow in fp32
_K3_LIMIT = 10.0  # of a single token's k3 as a loss
_NO_CLIP = float("inf")


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _at(mask_BT: Tensor, *tensors_BT: Tensor) -> tuple[Tensor, ...]:
    """In fp32 or better, 0 where mask is False: whatever stands there, NaN included, reaches no value and no gradient."""
    return tuple(_wide(t).where(mask_BT, 0.0) for t in tensors_BT)


def _sum(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Over the True positions, detached."""
    values_BT = values_BT.detach()
    return (values_BT if values_BT.is_floating_point() else values_BT.float()).where(mask_BT, 0.0).sum()


def log_ratio(logprobs_BT: Tensor, old_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log(pi / pi_old) of every action, limited to +-20; 0 elsewhere."""
    logprobs_BT, old_BT = _at(mask_BT, logprobs_BT, old_BT)
    return (logprobs_BT - old_BT).clamp(-_LOG_LIMIT, _LOG_LIMIT)


# --- surrogates ------------------------------------------------------------------------------------------------------


def ppo_clip(
    logprobs_BT: Tensor,
    old_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Stats]:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) with r = pi / pi_old (PPO, arXiv 1707.06347).

    Unequal bounds are DAPO's clip-higher (arXiv 2503.14476). `dual_clip` c > 1 bounds the loss by -c A where A < 0, so
    that one token that became far more probable can't outweigh all others (arXiv 1912.09729).

    Returns:
        losses [B, T]; sums `actions`, `ratio`, `approx_kl`, `clipped_low`, `clipped_high`.
    """
    (advantages_BT,) = _at(mask_BT, advantages_BT)
    log_ratio_BT = log_ratio(logprobs_BT, old_BT, mask_BT)
    losses_BT = _clipped(log_ratio_BT.exp(), advantages_BT, clip_low, clip_high, dual_clip)
    return losses_BT, _ratio_stats(log_ratio_BT, advantages_BT, mask_BT, clip_low, clip_high)


def gspo(
    logprobs_BT: Tensor,
    old_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Stats]:
    """PPO's clip on the ratio of the whole answer, s = exp(mean over its actions of log r) (GSPO, arXiv 2507.18071).

    In its token form, s_t = sg[s] pi_t / sg[pi_t]: the value is s at every action, and the mean over them has exactly
    the gradient of s. So it takes `sequence_mean` as its aggregation, and advantages may differ within an answer.

    Returns:
        as `ppo_clip`; the sums of ratio and clips are of s at every action, `approx_kl` is of the tokens' own ratios.
    """
    logprobs_BT, advantages_BT = _at(mask_BT, logprobs_BT, advantages_BT)
    log_ratio_BT = log_ratio(logprobs_BT, old_BT, mask_BT)
    log_s_B1 = (log_ratio_BT.sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)).detach()
    log_s_BT = log_s_B1 + (logprobs_BT - logprobs_BT.detach())
    losses_BT = _clipped(log_s_BT.exp(), advantages_BT, clip_low, clip_high, None)
    stats = _ratio_stats(log_s_BT, advantages_BT, mask_BT, clip_low, clip_high)
    return losses_BT, {**stats, "approx_kl": _sum(_k3(log_ratio_BT), mask_BT)}


def cispo(
    logprobs_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, *, ratio_max: float
) -> tuple[Tensor, Stats]:
    """-sg[min(r, ratio_max)] A log pi: weights are bounded, but no token loses its gradient (CISPO, arXiv 2506.13585).

    `ratio_max` bounds r itself; it is no distance from 1 as PPO's are.

    Returns:
        losses [B, T]; sums as `ppo_clip`, with `clipped_high` the actions whose ratio was above the bound.
    """
    logprobs_BT, advantages_BT = _at(mask_BT, logprobs_BT, advantages_BT)
    log_ratio_BT = log_ratio(logprobs_BT, old_BT, mask_BT)
    ratio_BT = log_ratio_BT.detach().exp()
    losses_BT = -ratio_BT.clamp(max=ratio_max) * advantages_BT * logprobs_BT
    stats = _ratio_stats(log_ratio_BT, advantages_BT, mask_BT, _NO_CLIP, _NO_CLIP)
    return losses_BT, {**stats, "clipped_high": _sum(ratio_BT > ratio_max, mask_BT)}


def reinforce(logprobs_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Stats]:
    """-A log pi (Williams 1992; for language models RLOO, arXiv 2402.14740): right for answers of the policy itself.

    `old_BT` is for the statistics alone: nothing corrects for answers that an older policy gave.
    """
    logprobs_BT, advantages_BT = _at(mask_BT, logprobs_BT, advantages_BT)
    log_ratio_BT = log_ratio(logprobs_BT, old_BT, mask_BT)
    return -advantages_BT * logprobs_BT, _ratio_stats(log_ratio_BT, advantages_BT, mask_BT, _NO_CLIP, _NO_CLIP)


def _clipped(ratio: Tensor, advantages: Tensor, low: float, high: float, dual: float | None) -> Tensor:
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    if dual is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual * advantages), losses)
    return losses


def _ratio_stats(log_ratio_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, low: float, high: float) -> Stats:
    """`approx_kl` estimates KL(pi_old || pi), of which the answers are samples; clipped: where no gradient is left."""
    log_ratio_BT = log_ratio_BT.detach()
    ratio_BT = log_ratio_BT.exp()
    below_BT = (ratio_BT < 1 - low) & (advantages_BT < 0)
    above_BT = (ratio_BT > 1 + high) & (advantages_BT > 0)
    return {
        "actions": _sum(mask_BT, mask_BT),
        "ratio": _sum(ratio_BT, mask_BT),
        "approx_kl": _sum(_k3(log_ratio_BT), mask_BT),
        "clipped_low": _sum(below_BT, mask_BT),
        "clipped_high": _sum(above_BT, mask_BT),
    }


def ratio_deviation(logprobs_BT: Tensor, old_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """max |pi / pi_old - 1| over the actions, 0 without any. It is 0 up to rounding before the first update (B72)."""
    deviation_BT = (log_ratio(logprobs_BT, old_BT, mask_BT).detach().exp() - 1).abs().where(mask_BT, 0.0)
    return deviation_BT.amax() if deviation_BT.numel() else deviation_BT.new_zeros(())


def ratio_max(logprobs_BT: Tensor, old_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The largest pi / pi_old of an action, 0 without any."""
    ratio_BT = log_ratio(logprobs_BT, old_BT, mask_BT).detach().exp().where(mask_BT, 0.0)
    return ratio_BT.amax() if ratio_BT.numel() else ratio_BT.new_zeros(())


def importance_weight(
    old_BT: Tensor, sampler_BT: Tensor, mask_BT: Tensor, cap: float, mode: Literal["token", "sequence", "product"]
) -> Tensor:
    """What answers weigh that another engine drew, with other numerics or another distribution than the trainer's.

    token: min(pi_old / pi_sampler, cap) of each action (truncated importance sampling, TIS: Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training"). product: the same of the product of an answer's
    ratios, for each of its actions: without a bias while the cap is not reached, but of large variance for long answers.
    sequence: 1, but 0 for every action of an answer whose geometric mean of the ratios is above the cap or below its
    inverse (masked, MIS): one that the trainer's policy would hardly have given. No gradient; 1 where mask is False.

    Args:
        old_BT: the trainer's log-probabilities of the actions, before any update.
        sampler_BT: the sampler's own, of the distribution it drew from.
        mask_BT: the actions.
        cap: above 1; 2 to 3 is usual for tokens.
    """
    log_weight_BT = log_ratio(old_BT, sampler_BT, mask_BT).detach()
    if mode == "token":
        weight_BT = log_weight_BT.exp().clamp(max=cap)
    elif mode == "product":
        weight_BT = log_weight_BT.sum(1, keepdim=True).exp().clamp(max=cap).expand_as(log_weight_BT)
    else:
        mean_B1 = log_weight_BT.sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)
        weight_BT = (mean_B1.abs() <= math.log(cap)).to(mean_B1.dtype).expand_as(log_weight_BT)
    return weight_BT.where(mask_BT, 1.0)


def correction_stats(weight_BT: Tensor, mask_BT: Tensor, cap: float, mode: str) -> Stats:
    """Sums over actions of what `importance_weight` gave: `correction`, and `correction_cut`, the actions whose weight is
    the cap itself, or that are left out."""
    cut_BT = weight_BT == 0 if mode == "sequence" else weight_BT >= cap
    return {"correction": _sum(weight_BT, mask_BT), "correction_cut": _sum(cut_BT, mask_BT)}


def sampler_stats(old_BT: Tensor, sampler_BT: Tensor, mask_BT: Tensor) -> Stats:
    """Sums over actions of how far the sampler is from the trainer's policy: `sampler_gap` (nats) and `sampler_prob_gap`
    (of the probabilities)."""
    old_BT, sampler_BT = _at(mask_BT, old_BT, sampler_BT)
    return {
        "sampler_gap": _sum((old_BT - sampler_BT).abs(), mask_BT),
        "sampler_prob_gap": _sum((old_BT.exp() - sampler_BT.exp()).abs(), mask_BT),
    }


# --- values ----------------------------------------------------------------------------------------------------------


def value_loss(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, *, clip: float | None = None
) -> tuple[Tensor, Stats]:
    """max((v - R)^2, (clip(v, v_old +- clip) - R)^2) / 2, PPO's critic (arXiv 1707.06347, as in its authors' code).

    Args:
        values_BT: the critic's, of the state before each action.
        old_values_BT: its values when the answers were given.
        returns_BT: what it should have said.
        mask_BT: the actions.
        clip: in units of the reward, so it hinders where returns are far above 1; None: (v - R)^2 / 2.

    Returns:
        losses [B, T]; sums `value_clipped`, `abs_value_error`.
    """
    values_BT, old_values_BT, returns_BT = _at(mask_BT, values_BT, old_values_BT, returns_BT)
    errors_BT = (values_BT - returns_BT).square()
    clipped_BT = torch.zeros_like(mask_BT)
    if clip is not None:
        near_BT = values_BT.clamp(old_values_BT - clip, old_values_BT + clip)
        clipped_BT = (near_BT - returns_BT).square() > errors_BT
        errors_BT = torch.maximum(errors_BT, (near_BT - returns_BT).square())
    stats = {
        "value_clipped": _sum(clipped_BT, mask_BT),
        "abs_value_error": _sum((values_BT - returns_BT).abs(), mask_BT),
    }
    return errors_BT / 2, stats


# --- KL to the reference ---------------------------------------------------------------------------------------------
# Estimates of KL(pi || ref) from one action drawn from pi, with r = log ref - log pi (Schulman 2020). Right in value is
# not right in gradient: see docs/rl.md for which may be rewarded and which may be a loss.


def kl_k1(logprobs: Tensor, ref: Tensor) -> Tensor:
    """-r. Unbiased; as a penalty in the reward also in its gradient. As a loss its expected gradient is 0."""
    return _wide(logprobs) - _wide(ref)


def kl_k2(logprobs: Tensor, ref: Tensor) -> Tensor:
    """r^2 / 2. As a loss its expected gradient is that of KL(pi || ref)."""
    return (_wide(ref) - _wide(logprobs)).clamp(-_LOG_LIMIT, _LOG_LIMIT).square() / 2


def kl_k3(logprobs: Tensor, ref: Tensor) -> Tensor:
    """exp(r) - 1 - r, never negative. As a loss its expected gradient is that of the *forward* KL(ref || pi)."""
    return _k3((_wide(ref) - _wide(logprobs)).clamp(-_LOG_LIMIT, _LOG_LIMIT))


def _k3(r: Tensor) -> Tensor:
    return torch.expm1(r) - r


def kl_loss(
    estimator: Literal["k2", "k3"], logprobs_BT: Tensor, ref_BT: Tensor, mask_BT: Tensor, ratio_BT: Tensor | None = None
) -> Tensor:
    """A KL to the reference as a loss, per token; 0 wherever `mask` is False. (`full`: `logprobs.full_kl`.)

    Args:
        estimator: k2, or k3 as the GRPO paper has it (arXiv 2402.03300), each token's at most 10.
        logprobs_BT: of the policy.
        ref_BT: of the reference.
        mask_BT: the actions.
        ratio_BT: pi / pi_old, for answers that an older policy gave: as a constant weight it makes the expectation one
            over the present policy again. (With k2 this is, in its gradient, DeepSeek-V3.2's k3 times a ratio that is
            differentiated too: both are -ratio r grad log pi.)
    """
    logprobs_BT, ref_BT = _at(mask_BT, logprobs_BT, ref_BT)
    if estimator == "k2":
        losses_BT = kl_k2(logprobs_BT, ref_BT)
    elif estimator == "k3":
        losses_BT = kl_k3(logprobs_BT, ref_BT).clamp(max=_K3_LIMIT)
    else:
        raise ValueError(f"kl_loss: {estimator!r} is no loss of its own: k2, k3, or full_kl")
    return losses_BT if ratio_BT is None else losses_BT * _at(mask_BT, ratio_BT.detach())[0]


def kl_stats(logprobs_BT: Tensor, ref_BT: Tensor, mask_BT: Tensor) -> Stats:
    """Sums over actions of two estimates of KL(pi || ref): `kl` (k1) and `k3`. Both are told, whatever is trained."""
    logprobs_BT, ref_BT = _at(mask_BT, logprobs_BT, ref_BT)
    return {"kl": _sum(kl_k1(logprobs_BT, ref_BT), mask_BT), "k3": _sum(kl_k3(logprobs_BT, ref_BT), mask_BT)}


# --- aggregation -----------------------------------------------------------------------------------------------------


def token_weights(mask_BT: Tensor, aggregation: Aggregation, max_len: int) -> tuple[Tensor, float]:
    """Weights w and denominator D of loss = sum w l / D, which decide what a token of a long answer counts.

    | aggregation | w | D | of |
    |---|---|---|---|
    | token_mean | 1 | actions | DAPO, PPO |
    | sequence_mean | 1 / actions of the answer | answers | GRPO, GSPO |
    | constant | 1 | answers x max_len | Dr. GRPO |
    | sequence_sum | 1 | answers | RLOO |

    Answers without an action count nowhere. D is additive: the sum over micro-batches and ranks is that of the step.

    Args:
        mask_BT: the actions.
        aggregation: which of them.
        max_len: the most new tokens an answer may have, for `constant`.

    Returns:
        fp32 weights [B, T], 0 where mask is False, and the denominator.
    """
    n_actions_B1 = mask_BT.sum(1, keepdim=True)
    n_answers = float((n_actions_B1 > 0).sum())
    weights_BT = mask_BT.float()
    if aggregation == "token_mean":
        return weights_BT, float(n_actions_B1.sum())
    if aggregation == "sequence_mean":
        return weights_BT / n_actions_B1.clamp(min=1), n_answers
    return weights_BT, n_answers * (max_len if aggregation == "constant" else 1)
