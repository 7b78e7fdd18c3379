"""From rewards to advantages: how much better an action was than expected.

All functions take the whole batch, of every rank: means and deviations over a part of it would make the result depend
on how the batch was cut. Positions and masks are those of `losses.policy`: t stands for the choice of token t + 1, and
only actions are True. Nothing here is differentiated.

Shapes: B = N answers, T positions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

EPS = 1e-4  # added to the deviation of a group's rewards: far above the rounding of equal ones
_VAR_EPS = 1e-8


def shaped_rewards(scores_B: Tensor, mask_BT: Tensor, kl_BT: Tensor | None = None, kl_coef: float = 0.0) -> Tensor:
    """Rewards [B, T]: -kl_coef * kl at every action, and the answer's score at its last one.

    The last action is the end of turn, or where the answer was cut off; never a pad or what a tool said (B77). So the
    sum over an answer is score - kl_coef * sum of kl. (InstructGPT, arXiv 2203.02155; k1 is the only estimate whose
    use as a reward has the right gradient.)

    Raises:
        ValueError: for an answer without an action: its score would be lost.
    """
    if not mask_BT.any(1).all():
        row = int((~mask_BT.any(1)).nonzero()[0, 0])
        raise ValueError(f"answer {row} has no action that its score could be for")
    rewards_BT = torch.zeros(mask_BT.shape, dtype=scores_B.dtype, device=mask_BT.device)
    if kl_BT is not None:
        rewards_BT = (-kl_coef * kl_BT).to(scores_B.dtype).where(mask_BT, 0.0)
    columns_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B1 = columns_T.where(mask_BT, -1).amax(1, keepdim=True)
    return rewards_BT.scatter_add(1, last_B1, scores_B[:, None])


def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438), from one action to the next across what lies between.

    delta_t = r_t + gamma V_next - V_t; A_t = delta_t + gamma lam A_next, where next is the following *action*: tokens of
    a tool's answer neither end an episode nor count as steps.

    Args:
        rewards_BT: of every action (`shaped_rewards`).
        values_BT: the critic's, of the state before each action.
        mask_BT: the actions.
        gamma: what a reward one action later is worth; 1 is usual for text.
        lam: 1 trusts the rewards alone, 0 the critic's next value alone.
        bootstrap_B: value of the state after the last action, for answers that were cut off; None: 0, all ended.

    Returns:
        advantages and returns (advantages + values) [B, T], 0 where mask is False.

    Raises:
        ValueError: if a reward stands where there is no action: it would be lost.
    """
    if rewards_BT.where(mask_BT, 0.0).ne(rewards_BT).any():
        raise ValueError("gae: a reward stands at a position that is no action")
    advantages_BT = torch.zeros_like(values_BT)
    next_advantage_B = values_BT.new_zeros(len(values_BT))
    next_value_B = next_advantage_B if bootstrap_B is None else bootstrap_B.to(values_BT.dtype)
    for t in range(mask_BT.shape[1] - 1, -1, -1):
        mask_B, value_B = mask_BT[:, t], values_BT[:, t]
        advantage_B = rewards_BT[:, t] + gamma * next_value_B - value_B + gamma * lam * next_advantage_B
        next_advantage_B = advantage_B.where(mask_B, next_advantage_B)
        next_value_B = value_B.where(mask_B, next_value_B)
        advantages_BT[:, t] = advantage_B.where(mask_B, 0.0)
    return advantages_BT, (advantages_BT + values_BT).where(mask_BT, 0.0)


def rewards_to_go(rewards_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0) -> Tensor:
    """The discounted sum of rewards from each action on, [B, T]: REINFORCE++'s return (arXiv 2501.03262)."""
    return gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, gamma=gamma, lam=1.0)[0]


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the True positions, 0 elsewhere; without `shift_mean` the mean stays.

    The variance is the population's, as in lm-human-preferences. Advantages lose their mean; rewards keep it
    (shift_mean=False), since a shift of every token's reward would pay or fine length.
    """
    n = mask.sum().clamp(min=1)
    known = x.where(mask, 0.0)
    mean = known.sum() / n
    centred = (x - mean).where(mask, 0.0)
    scaled = centred * torch.rsqrt(centred.square().sum() / n + _VAR_EPS)
    return scaled if shift_mean else (scaled + mean).where(mask, 0.0)


# --- groups: several answers to one prompt ---------------------------------------------------------------------------


def _group_sums(values_N: Tensor, group_N: Tensor) -> tuple[Tensor, Tensor]:
    """Of every answer's group: the sum of the values and the number of answers, [N] each."""
    _, place_N = torch.unique(group_N, return_inverse=True)
    sums = values_N.new_zeros(len(values_N)).index_add_(0, place_N, values_N)
    sizes = values_N.new_zeros(len(values_N)).index_add_(0, place_N, torch.ones_like(values_N))
    return sums[place_N], sizes[place_N]


def _deviation(rewards_N: Tensor, group_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reward minus the group's mean, exactly 0 where all rewards of a group are the same; its std (n - 1); its size."""
    sums_N, sizes_N = _group_sums(rewards_N, group_N)
    centred_N = (rewards_N - sums_N / sizes_N).where(group_varies(rewards_N, group_N), 0.0)
    squares_N, _ = _group_sums(centred_N.square(), group_N)
    return centred_N, (squares_N / (sizes_N - 1).clamp(min=1)).sqrt(), sizes_N


def group_varies(rewards_N: Tensor, group_N: Tensor) -> Tensor:
    """Whether the rewards of an answer's group differ at all, bool [N]. Where not, there is nothing to learn from it."""
    _, place_N = torch.unique(group_N, return_inverse=True)
    highest, lowest = (
        rewards_N.new_zeros(len(rewards_N)).scatter_reduce(0, place_N, rewards_N, how, include_self=False)
        for how in ("amax", "amin")
    )
    return (highest > lowest)[place_N]


def group_relative(
    rewards_N: Tensor, group_N: Tensor, scale: Literal["std", "batch", "none"] = "std", eps: float = EPS
) -> Tensor:
    """(R - mean of its group) / (deviation + eps), [N] (GRPO, arXiv 2402.03300).

    A group whose rewards are all the same, and so one of a single answer, has advantage 0.

    Args:
        rewards_N: one per answer.
        group_N: which group it belongs to: any numbers, in any order.
        scale: by the group's std (n - 1); by that of all rewards (batch); or not at all (Dr. GRPO, arXiv 2503.20783,
            since dividing by the group's std favours prompts that are too easy or too hard).
        eps: keeps groups whose rewards are nearly equal from being blown up.
    """
    centred_N, std_N, _ = _deviation(rewards_N, group_N)
    if scale == "std":
        return centred_N / (std_N + eps)
    if scale == "batch":
        return centred_N / (rewards_N.std() + eps) if len(rewards_N) > 1 else centred_N
    return centred_N


def leave_one_out(rewards_N: Tensor, group_N: Tensor) -> Tensor:
    """R - mean of the *other* rewards of its group, [N] (RLOO, arXiv 2402.14740); 0 for a group of one."""
    centred_N, _, sizes_N = _deviation(rewards_N, group_N)
    return centred_N * sizes_N / (sizes_N - 1).clamp(min=1)


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> float:
    """1 - Var(R - V) / Var(R) over the actions: 1 is a perfect critic, 0 one that knows the mean. NaN if R is constant."""
    returns_K, errors_K = returns_BT[mask_BT].double(), (returns_BT - values_BT)[mask_BT].double()
    variance = returns_K.var(correction=0).item() if len(returns_K) else 0.0
    return 1 - errors_K.var(correction=0).item() / variance if variance > 0 else float("nan")
