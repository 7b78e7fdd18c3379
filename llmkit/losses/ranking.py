"""Losses of reward models: which of two answers is better, and which step of an answer is right.

Shapes: B answers, P pairs of them, S steps. Statistics are fp32 or better whatever the model computes in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.losses.base import LossSum


def ranking(
    scores_B: Tensor,
    better_P: Tensor,
    worse_P: Tensor,
    weights_P: Tensor,
    margins_P: Tensor,
    *,
    center: float = 0.0,
    label_smoothing: float = 0.0,
) -> LossSum:
    """Sum over pairs of weight * -log sigmoid(better - worse - margin), the model of Bradley and Terry (1952).

    An answer that is in several pairs is scored once. With weight 1 / C(K, 2) a prompt with K ranked answers counts as
    much as one with two (InstructGPT, arXiv 2203.02155, eq. 1); the denominator is the number of prompts.

    Args:
        scores_B: one score for each answer.
        better_P, worse_P: int64, the rows of a pair's two answers.
        weights_P: what a pair counts.
        margins_P: by how much the better one must lead (Llama 2, arXiv 2307.09288, eq. 2); 0: merely lead.
        center: weight of (better + worse)^2, which draws the mean of all scores to 0 (arXiv 2312.09244, eq. 2).
        label_smoothing: the share of pairs that are taken to be the wrong way round.

    Returns:
        total with both terms; parts, weighted alike: `loss` (without centering), `center` where asked for, `accuracy`
        (ties count half), `margin`, `chosen` and `rejected`, the mean scores.
    """
    wide = torch.promote_types(scores_B.dtype, torch.float32)
    scores_B, weights_P = scores_B.to(wide), weights_P.to(wide)
    chosen_P, rejected_P = scores_B[better_P], scores_B[worse_P]
    lead_P = chosen_P - rejected_P
    beyond_P = lead_P - margins_P.to(wide)
    loss_P = -F.logsigmoid(beyond_P)
    if label_smoothing:
        loss_P = (1 - label_smoothing) * loss_P - label_smoothing * F.logsigmoid(-beyond_P)
    total = loss = (weights_P * loss_P).sum()
    parts = {"loss": loss.detach()}
    if center:
        centering = center * (weights_P * (chosen_P + rejected_P).square()).sum()
        total, parts["center"] = loss + centering, centering.detach()
    right_P = (lead_P > 0).to(wide) + 0.5 * (lead_P == 0)
    told = {"accuracy": right_P, "margin": lead_P, "chosen": chosen_P, "rejected": rejected_P}
    return LossSum(total, parts | {name: (weights_P * value.detach()).sum() for name, value in told.items()})


def step_correctness(scores_S: Tensor, labels_S: Tensor) -> LossSum:
    """Sum over steps of the binary cross entropy of sigmoid(score) and the label (arXiv 2211.14275, 2305.20050).

    Args:
        scores_S: the score at the end of each labelled step.
        labels_S: 1 right, 0 wrong, between them the probability that it is right (arXiv 2312.08935).

    Returns:
        parts `loss`, and `accuracy`: the steps whose score is on the label's side of one half.
    """
    wide = torch.promote_types(scores_S.dtype, torch.float32)
    scores_S, labels_S = scores_S.to(wide), labels_S.to(wide)
    total = F.binary_cross_entropy_with_logits(scores_S, labels_S, reduction="sum")
    right = ((scores_S > 0) == (labels_S > 0.5)).sum()
    return LossSum(total, {"loss": total.detach(), "accuracy": right})
