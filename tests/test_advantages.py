"""Advantages: each against a loop written from its formula, by hand where it is small, and against TRL where it has it."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from llmkit.advantages import (
    explained_variance,
    gae,
    group_relative,
    group_varies,
    leave_one_out,
    rewards_to_go,
    shaped_rewards,
    whiten,
)

B, T = 3, 8


def case(seed: int = 0) -> dict[str, Tensor]:
    """Answers of uneven length, one with a gap that a tool's answer fills."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, 2:7] = True
    mask[1, 3] = True
    mask[2, [0, 1, 2, 5, 6]] = True
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return {"scores": draw(B), "kl": draw(B, T), "values": draw(B, T), "bootstrap": draw(B), "mask": mask}


def slow_gae(rewards: list[float], values: list[float], gamma: float, lam: float, bootstrap: float) -> list[float]:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, of the actions alone."""
    following = [*values[1:], bootstrap]
    deltas = [r + gamma * n - v for r, v, n in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_rewards_are_conserved() -> None:
    """B77: the score stands at the last action, not on a pad or a tool's token, and nothing is lost or doubled."""
    c = case()
    rewards = shaped_rewards(c["scores"], c["mask"], c["kl"], 0.3)
    for b, last in enumerate((6, 3, 6)):
        actions = c["mask"][b].nonzero()[:, 0].tolist()
        for t in range(T):
            expected = (-0.3 * c["kl"][b, t] if t in actions else 0.0) + (c["scores"][b] if t == last else 0.0)
            assert rewards[b, t].item() == pytest.approx(float(expected), abs=1e-12)
        assert rewards[b].sum().item() == pytest.approx((c["scores"][b] - 0.3 * c["kl"][b][actions].sum()).item())
    assert torch.equal(shaped_rewards(c["scores"], c["mask"]).sum(1), c["scores"])
    with pytest.raises(ValueError, match="answer 1 has no action"):
        shaped_rewards(c["scores"], c["mask"] & torch.tensor([[True], [False], [True]]))


# --- GAE -------------------------------------------------------------------------------------------------------------


def test_gae_by_hand() -> None:
    """B77: four tokens of which the third is a tool's. gamma 0.5, lam 0.5; actions 0, 1, 3; reward 1 at the end.

    delta_3 = 1 - 0.4 = 0.6, A_3 = 0.6; delta_1 = 0.5 * 0.4 - 0.2 = 0, A_1 = 0.25 * 0.6 = 0.15;
    delta_0 = 0.5 * 0.2 - 0.8 = -0.7, A_0 = -0.7 + 0.25 * 0.15 = -0.6625.
    """
    mask = torch.tensor([[True, True, False, True]])
    values = torch.tensor([[0.8, 0.2, 99.0, 0.4]], dtype=torch.float64)
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    torch.testing.assert_close(
        advantages, torch.tensor([[-0.6625, 0.15, 0.0, 0.6]], dtype=torch.float64), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(
        returns, torch.tensor([[0.1375, 0.35, 0.0, 1.0]], dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
@pytest.mark.parametrize("cut_off", [False, True])
def test_gae_equals_a_loop(gamma: float, lam: float, cut_off: bool) -> None:
    c = case()
    rewards = shaped_rewards(c["scores"], c["mask"], c["kl"], 0.1)
    bootstrap = c["bootstrap"] if cut_off else None
    advantages, returns = gae(rewards, c["values"], c["mask"], gamma=gamma, lam=lam, bootstrap_B=bootstrap)
    for b in range(B):
        mask = c["mask"][b]
        expected = slow_gae(
            rewards[b][mask].tolist(),
            c["values"][b][mask].tolist(),
            gamma,
            lam,
            c["bootstrap"][b].item() if cut_off else 0.0,
        )
        assert advantages[b][mask].tolist() == pytest.approx(expected, abs=1e-10)
        assert not advantages[b][~mask].any() and not returns[b][~mask].any()
    torch.testing.assert_close(returns, (advantages + c["values"]).where(c["mask"], 0.0), rtol=0, atol=1e-12)


def test_a_perfect_critic_leaves_no_advantage() -> None:
    """V = the reward to go, gamma 1: nothing was better or worse than expected, across the gap too."""
    c = case()
    rewards = shaped_rewards(c["scores"], c["mask"], c["kl"], 0.1)
    values = rewards_to_go(rewards, c["mask"])
    advantages, _ = gae(rewards, values, c["mask"], gamma=1.0, lam=0.95)
    assert advantages.abs().max() < 1e-12
    assert explained_variance(values, values, c["mask"]) == 1


def test_lost_rewards_are_refused() -> None:
    c = case()
    with pytest.raises(ValueError, match="no action"):
        gae(torch.ones(B, T), c["values"], c["mask"], gamma=1.0, lam=1.0)


def test_rewards_to_go() -> None:
    """REINFORCE++: discounted by actions, not by tokens of a tool."""
    c = case()
    rewards = shaped_rewards(c["scores"], c["mask"], c["kl"], 0.1)
    got = rewards_to_go(rewards, c["mask"], 0.9)
    for b in range(B):
        own = rewards[b][c["mask"][b]].tolist()
        expected = [sum(0.9**k * r for k, r in enumerate(own[t:])) for t in range(len(own))]
        assert got[b][c["mask"][b]].tolist() == pytest.approx(expected, abs=1e-10)


# --- whitening -------------------------------------------------------------------------------------------------------


def test_whiten() -> None:
    """B76: over the actions alone. [1, 2, 3, 10] loses its mean of 4 only where that is asked for."""
    mask = torch.tensor([[True, True, False], [True, True, False]])
    x = torch.tensor([[1.0, 2.0, 1e6], [3.0, 10.0, math.nan]], dtype=torch.float64)
    values = [1.0, 2.0, 3.0, 10.0]
    scale = statistics.pstdev(values)
    centred, kept = whiten(x, mask), whiten(x, mask, shift_mean=False)
    assert centred[mask].tolist() == pytest.approx([(v - 4) / scale for v in values], abs=1e-8)
    assert kept[mask].tolist() == pytest.approx([(v - 4) / scale + 4 for v in values], abs=1e-8)
    assert not centred[~mask].any() and not kept[~mask].any()
    assert centred[mask].mean().abs() < 1e-12 and kept[mask].mean().item() == pytest.approx(4)


def test_whitening_constant_values_is_finite() -> None:
    mask = torch.tensor([True, True, False])
    assert whiten(torch.tensor([3.0, 3.0, 1.0]), mask).tolist() == [0, 0, 0]
    assert whiten(torch.tensor([3.0, 5.0, 1.0]), torch.zeros(3, dtype=torch.bool)).tolist() == [0, 0, 0]


@given(pads=st.integers(1, 64), left=st.booleans(), seed=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_padding_changes_nothing(pads: int, left: bool, seed: int) -> None:
    """D5, B76: up to 64 more positions with anything in them."""
    c = case(seed)

    def wide(t: Tensor) -> Tensor:
        filler = torch.full((B, pads), 7.5).to(t.dtype) if t.dtype != torch.bool else torch.zeros(B, pads).bool()
        return torch.cat((filler, t) if left else (t, filler), 1)

    def everything(kl: Tensor, values: Tensor, mask: Tensor) -> list[Tensor]:
        rewards = shaped_rewards(c["scores"], mask, kl, 0.1)
        advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8, bootstrap_B=c["bootstrap"])
        tokens = [rewards, advantages, returns, whiten(advantages, mask), whiten(values, mask, shift_mean=False)]
        return [t[mask] for t in [*tokens, rewards_to_go(rewards, mask, 0.9)]] + [
            torch.tensor(explained_variance(values, returns, mask))
        ]

    narrow = everything(c["kl"], c["values"], c["mask"])
    for a, b in zip(narrow, everything(wide(c["kl"]), wide(c["values"]), wide(c["mask"])), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# --- groups ----------------------------------------------------------------------------------------------------------

REWARDS = [1.0, 0.0, 0.5, 2.0, 2.0, 2.0, -1.0, 3.0, 0.25]
GROUPS = [7, 7, 7, 3, 3, 3, 7, 5, 5]  # of four, three and two answers, out of order


def slow_groups(kind: str, eps: float = 1e-4) -> list[float]:
    out = []
    for reward, group in zip(REWARDS, GROUPS, strict=True):
        rewards = [r for r, g in zip(REWARDS, GROUPS, strict=True) if g == group]
        others = (sum(rewards) - reward) / (len(rewards) - 1)
        out.append(
            {
                "std": (reward - statistics.mean(rewards)) / (statistics.stdev(rewards) + eps),
                "none": reward - statistics.mean(rewards),
                "batch": (reward - statistics.mean(rewards)) / (statistics.stdev(REWARDS) + eps),
                "loo": reward - others,
            }[kind]
        )
    return out


@pytest.mark.parametrize("order", [list(range(9)), [4, 0, 8, 2, 6, 1, 3, 7, 5]])
def test_groups_equal_a_loop(order: list[int]) -> None:
    """B81: by the ids, so that shuffled answers find their group."""
    rewards, groups = torch.tensor(REWARDS, dtype=torch.float64)[order], torch.tensor(GROUPS)[order]
    for kind in ("std", "none", "batch"):
        expected = [slow_groups(kind)[i] for i in order]
        assert group_relative(rewards, groups, kind).tolist() == pytest.approx(expected, abs=1e-10)  # type: ignore[arg-type]
    assert leave_one_out(rewards, groups).tolist() == pytest.approx([slow_groups("loo")[i] for i in order], abs=1e-10)
    assert group_varies(rewards, groups).tolist() == [GROUPS[i] != 3 for i in order]


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1 + 0.2, 1e8 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_teach_nothing(reward: float, dtype: torch.dtype) -> None:
    """B81: zero and finite, to the bit, whatever the rounding of a mean of seven equal numbers."""
    rewards, groups = torch.full((7,), reward, dtype=dtype), torch.zeros(7, dtype=torch.int64)
    for advantages in (*(group_relative(rewards, groups, k) for k in ("std", "none")), leave_one_out(rewards, groups)):  # type: ignore[arg-type]
        assert advantages.eq(0).all()


def test_nearly_equal_rewards_stay_small() -> None:
    """Rewards that differ by rounding alone: eps is far above it."""
    rewards = torch.tensor([0.3, 0.1 + 0.2, 0.3, 0.6 / 2], dtype=torch.float64)
    assert group_relative(rewards, torch.zeros(4, dtype=torch.int64)).abs().max() < 1e-9
    rewards = torch.tensor([0.3, 0.3 + 1e-7, 0.3, 0.3])
    assert group_relative(rewards, torch.zeros(4, dtype=torch.int64)).abs().max() < 2e-3


def test_a_group_of_one() -> None:
    """B81: no NaN; there is nothing to compare it with."""
    rewards, groups = torch.tensor([5.0, 1.0, 2.0]), torch.tensor([0, 1, 1])
    for kind in ("std", "none", "batch"):
        advantages = group_relative(rewards, groups, kind)  # type: ignore[arg-type]
        assert advantages[0] == 0 and advantages.isfinite().all() and advantages[2] > 0
    assert leave_one_out(rewards, groups).tolist() == [0, -1, 1]
    assert group_relative(rewards[:1], groups[:1], "batch").tolist() == [0]


def test_equals_trl() -> None:
    """TRL 1.16's GRPO advantage, with its own deviation (`nanstd`, n - 1) and its eps of 1e-4."""
    from trl.trainer.utils import nanstd

    rewards = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    rewards[2] = 1.0
    groups = torch.arange(6).repeat_interleave(4)
    centred = rewards - rewards.mean(1, keepdim=True)
    theirs = {"std": centred / (nanstd(rewards, dim=1)[:, None] + 1e-4), "batch": centred / (nanstd(rewards) + 1e-4)}
    for kind, expected in theirs.items():
        ours = group_relative(rewards.view(-1), groups, kind)  # type: ignore[arg-type]
        torch.testing.assert_close(ours, expected.reshape(-1), rtol=0, atol=1e-5)


def test_explained_variance() -> None:
    values, returns = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[1.0, 4.0, -9.0]])
    mask = torch.tensor([[True, True, False]])
    assert explained_variance(values, returns, mask) == pytest.approx(1 - 1 / 2.25)
    assert explained_variance(torch.full((1, 3), 2.5), returns, mask) == pytest.approx(0)
    assert math.isnan(explained_variance(values, torch.ones(1, 3), mask))
