"""Losses of answers that were compared with each other, or judged one by one: DPO and its family.

`w` is an answer's log-ratio: the sum over its tokens of log p(policy) - log p(reference), in nats, the token that ends the
turn among them, the prompt's not. `delta` is w of the better answer less w of the worse.

Shapes: P pairs, B answers (of preferences: those of all pairs; of judgements: one a row).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.losses.base import LossSum

PairLoss = Literal["dpo", "robust", "hinge", "ipo", "simpo", "orpo"]
_LARGEST = -1e-7  # of a mean log-probability in ORPO's odds, which have none for a probability of 1


# --- one loss a pair -------------------------------------------------------------------------------------------------


def dpo(delta_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - s) log sigma(beta delta) - s log sigma(-beta delta); s is the share of pairs that are the wrong way round.

    DPO: Rafailov et al. 2023 (arXiv 2305.18290), equation 7; s > 0, conservative DPO: Mitchell 2023
    (ericmitchell.ai/cdpo.pdf). ln 2 where policy and reference agree.
    """
    right_P, wrong_P = -F.logsigmoid(beta * delta_P), -F.logsigmoid(-beta * delta_P)
    return (1 - label_smoothing) * right_P + label_smoothing * wrong_P


def robust(delta_P: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """[-(1 - s) log sigma(beta delta) + s log sigma(-beta delta)] / (1 - 2 s): what DPO's loss would be on average, if
    a share s < 1/2 of the pairs were not the wrong way round. Chowdhury et al. 2024 (arXiv 2403.00409), equation 12."""
    right_P, wrong_P = -F.logsigmoid(beta * delta_P), -F.logsigmoid(-beta * delta_P)
    return ((1 - label_smoothing) * right_P - label_smoothing * wrong_P) / (1 - 2 * label_smoothing)


def hinge(delta_P: Tensor, beta: float) -> Tensor:
    """relu(1 - beta delta): Zhao et al. 2023 (SLiC, arXiv 2305.10425), on ratios as in Liu et al. 2023 (arXiv 2309.06657)."""
    return F.relu(1 - beta * delta_P)


def ipo(delta_P: Tensor, beta: float) -> Tensor:
    """(delta - 1 / (2 beta))^2: Azar et al. 2023 (arXiv 2310.12036), equation 17, whose tau is beta.

    Args:
        delta_P: of mean log-ratios a token, or of sums.
    """
    return (delta_P - 1 / (2 * beta)).square()


def simpo(gap_P: Tensor, beta: float, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigma(beta gap - gamma), smoothed as in `dpo`: Meng et al. 2024 (arXiv 2405.14734), equation 6.

    Args:
        gap_P: mean log-probability a token of the better answer less that of the worse; there is no reference.
    """
    logits_P = beta * gap_P - gamma
    return -(1 - label_smoothing) * F.logsigmoid(logits_P) - label_smoothing * F.logsigmoid(-logits_P)


def orpo(better_P: Tensor, worse_P: Tensor) -> Tensor:
    """-log sigma(log-odds of the better answer - those of the worse): Hong et al. 2024 (arXiv 2403.07691), equation 7.

    The term that the paper weighs by lambda and adds to the negative log-likelihood of the better answer.

    Args:
        better_P: mean log-probability a token, x; the odds are those of p = e^x.
        worse_P: the same of the worse.
    """
    return -F.logsigmoid(_log_odds(better_P) - _log_odds(worse_P))


def _log_odds(x: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = e^x, without the cancellation in 1 - e^x near 1 or in log near 0."""
    x = x.clamp(max=_LARGEST)
    return x - torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


# --- sums over a batch -----------------------------------------------------------------------------------------------


def preference_loss(
    kind: PairLoss,
    logps_B: Tensor,
    n_tokens_B: Tensor,
    reference_B: Tensor | None,
    better_P: Tensor,
    worse_P: Tensor,
    weights_P: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    ipo_mean: bool = True,
    nll_weight: float = 0.0,
) -> LossSum:
    """Weighted sum over pairs of one of the losses above; its denominator is the number of prompts.

    Args:
        kind: which. With orpo, the loss is NLL + beta * the odds term (beta is the paper's lambda).
        logps_B: sum of the log-probabilities of each answer's tokens, in nats.
        n_tokens_B: how many tokens each answer has.
        reference_B: logps of the reference model; simpo and orpo have none.
        better_P: int64, which answer of each pair is preferred.
        worse_P: int64, to which.
        weights_P: 1 / number of pairs of the prompt.
        beta: strength of the pull to the reference; of simpo and orpo a scale.
        label_smoothing: of dpo, robust and simpo.
        gamma: simpo's margin, in units of beta * gap.
        ipo_mean: ipo compares means over tokens, as its authors meant it; False: sums.
        nll_weight: weight of -(mean log-probability of the better answer), which keeps it from falling: Pang et al.
            2024 (arXiv 2404.19733), equation 1.

    Returns:
        parts `loss`; `nll` where it is part of it, and then `preference`, the rest; `rewards/chosen`, `rewards/rejected`
        and `rewards/margin` (beta w; of simpo and orpo beta * mean log-probability); `accuracy`, how often the margin is
        positive (0: half); `logps/chosen`, `logps/rejected`; with a reference `drift/chosen` and `drift/rejected`, w a
        token. All are means over prompts, once divided.
    """
    wide = torch.promote_types(logps_B.dtype, torch.float32)
    logps_B, n_B, weights_P = logps_B.to(wide), n_tokens_B.clamp(min=1).to(wide), weights_P.to(wide)
    means_B = logps_B / n_B
    needs_reference = kind not in ("simpo", "orpo")
    if needs_reference != (reference_B is not None):
        raise ValueError(f"{kind}: reference log-probabilities are {'missing' if needs_reference else 'not used'}")
    w_B = means_B if reference_B is None else logps_B - reference_B.to(wide)
    delta_P = w_B[better_P] - w_B[worse_P]
    nll_P = -means_B[better_P]
    if kind == "dpo":
        loss_P = dpo(delta_P, beta, label_smoothing)
    elif kind == "robust":
        loss_P = robust(delta_P, beta, label_smoothing)
    elif kind == "hinge":
        loss_P = hinge(delta_P, beta)
    elif kind == "ipo":
        loss_P = ipo((w_B / n_B)[better_P] - (w_B / n_B)[worse_P] if ipo_mean else delta_P, beta)
    elif kind == "simpo":
        loss_P = simpo(delta_P, beta, gamma, label_smoothing)
    else:
        loss_P, nll_weight = beta * orpo(means_B[better_P], means_B[worse_P]), 1.0 + nll_weight
    total_P = loss_P + nll_weight * nll_P if nll_weight else loss_P
    shown: dict[str, Tensor] = {"loss": total_P}
    if nll_weight:
        shown |= {"preference": loss_P, "nll": nll_P}
    shown |= {
        "rewards/chosen": beta * w_B[better_P],
        "rewards/rejected": beta * w_B[worse_P],
        "rewards/margin": beta * delta_P,
        "accuracy": (delta_P.sign() + 1) / 2,
        "logps/chosen": logps_B[better_P],
        "logps/rejected": logps_B[worse_P],
    }
    if reference_B is not None:
        shown |= {"drift/chosen": (w_B / n_B)[better_P], "drift/rejected": (w_B / n_B)[worse_P]}
    return LossSum((weights_P * total_P).sum(), {k: (weights_P * v.detach()).sum() for k, v in shown.items()})


def kto_loss(
    w_B: Tensor,
    is_good_B: Tensor,
    weights_B: Tensor,
    z0: Tensor | float,
    *,
    beta: float,
    good_weight: float = 1.0,
    bad_weight: float = 1.0,
) -> LossSum:
    """Sum over answers of lambda_D (1 - sigma(beta (w - z0))) if good, of lambda_U (1 - sigma(beta (z0 - w))) if not.

    Ethayarajh et al. 2024 (KTO, arXiv 2402.01306), equation 8. The denominator is the number of answers.

    Args:
        w_B: log-ratios.
        is_good_B: bool, the judgements.
        weights_B: 1, and 0 for padding.
        z0: max(0, mean w of prompts with answers to other prompts), in nats: an estimate of the divergence from the
            reference, a constant of the whole step.
        beta: strength of the pull to the reference.
        good_weight: lambda_D.
        bad_weight: lambda_U.

    Returns:
        parts `loss`; stats `n_good`, `n_bad` and the sums over each kind of `rewards_*` (beta w) and `right_*` (w on the
        right side of z0), for the means of each kind apart.
    """
    wide = torch.promote_types(w_B.dtype, torch.float32)
    w_B, weights_B = w_B.to(wide), weights_B.to(wide)
    # 1 - sigma(x) = sigma(-x), which keeps its digits where sigma(x) is near 1.
    good_B = is_good_B.to(wide)
    side_B, scale_B = 2 * good_B - 1, good_weight * good_B + bad_weight * (1 - good_B)
    distance_B = side_B * (w_B - z0)
    total = (weights_B * scale_B * torch.sigmoid(-beta * distance_B)).sum()
    stats = {}
    for name, chosen_B in (("good", is_good_B), ("bad", ~is_good_B)):
        counted_B = weights_B * chosen_B
        stats[f"n_{name}"] = counted_B.sum()
        stats[f"rewards_{name}"] = (counted_B * beta * w_B.detach()).sum()
        stats[f"right_{name}"] = (counted_B * (distance_B.detach() > 0)).sum()
    return LossSum(total, {"loss": total.detach()}, stats)
