"""Losses of reward models against loops written from their formulas, against TRL, and what they do to scores."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmkit.losses import ranking, step_correctness
from llmkit.training.judging import first_errors

GROUPS = (2, 4, 3, 2)  # answers of each prompt


def groups(sizes: tuple[int, ...] = GROUPS, seed: int = 0) -> tuple[Tensor, list[list[int]], dict[str, Tensor]]:
    """Scores, each prompt's rows from best to worst, and the arguments of `ranking`."""
    g = torch.Generator().manual_seed(seed)
    scores_B = torch.randn(sum(sizes), generator=g, dtype=torch.float64) * 2
    ends = list(itertools.accumulate(sizes, initial=0))
    orders = [list(range(a, b)) for a, b in itertools.pairwise(ends)]
    pairs = [(b, w, 1 / math.comb(len(o), 2)) for o in orders for b, w in itertools.combinations(o, 2)]
    better, worse, weights = zip(*pairs, strict=True)
    return (
        scores_B.requires_grad_(),
        orders,
        {
            "better_P": torch.tensor(better),
            "worse_P": torch.tensor(worse),
            "weights_P": torch.tensor(weights, dtype=torch.float64),
            "margins_P": torch.rand(len(pairs), generator=g, dtype=torch.float64),
        },
    )


def by_hand(scores: Tensor, orders: list[list[int]], margins: Tensor, center: float, smoothing: float) -> Tensor:
    """One prompt after the other, one pair after the other, as InstructGPT's equation has it."""
    total, number = torch.zeros((), dtype=torch.float64), 0
    for order in orders:
        mean = torch.zeros((), dtype=torch.float64)
        for better, worse in itertools.combinations(order, 2):
            lead = scores[better] - scores[worse] - margins[number]
            loss = -(1 - smoothing) * torch.log(1 / (1 + torch.exp(-lead)))
            loss = loss - smoothing * torch.log(1 - 1 / (1 + torch.exp(-lead)))
            mean = mean + loss + center * (scores[better] + scores[worse]) ** 2
            number += 1
        total = total + mean / math.comb(len(order), 2)
    return total


@pytest.mark.parametrize(("center", "smoothing"), [(0.0, 0.0), (0.01, 0.0), (0.0, 0.1), (0.05, 0.3)])
def test_ranking_is_its_formula(center: float, smoothing: float) -> None:
    """Value and gradient, fp64, 1e-10: rankings of 2 to 4 answers, each prompt weighing 1."""
    scores_B, orders, args = groups()
    out = ranking(scores_B, **args, center=center, label_smoothing=smoothing)
    expected = by_hand(scores_B, orders, args["margins_P"], center, smoothing)
    assert out.total.item() == pytest.approx(expected.item(), abs=1e-10)
    (mine,) = torch.autograd.grad(out.total, scores_B)
    (theirs,) = torch.autograd.grad(expected, scores_B)
    torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)
    assert torch.autograd.gradcheck(lambda s: ranking(s, **args, center=center).total, (scores_B,))


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("center", [None, 0.01])
def test_pairs_are_those_of_trl(margin: bool, center: float | None) -> None:
    """TRL's own method on the same scores, fp32, 1e-5; it takes means over pairs where we divide by the prompts."""
    from trl import RewardTrainer

    scores_B, _, args = groups((2,) * 8, seed=3)
    scores_B = scores_B.detach().float()
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=SimpleNamespace(gather_for_metrics=lambda t: t, gather=lambda t: t),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen_first = torch.cat([scores_B[args["better_P"]], scores_B[args["worse_P"]]])[:, None]
    inputs = {"attention_mask": torch.ones(16, 3)} | ({"margin": args["margins_P"].float()} if margin else {})
    expected = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=chosen_first), inputs)
    if not margin:
        args["margins_P"] = torch.zeros_like(args["margins_P"])
    out = ranking(scores_B, **args, center=center or 0.0)
    assert out.total.item() / 8 == pytest.approx(expected.item(), abs=1e-5)
    assert out.parts["accuracy"].item() / 8 == pytest.approx(trainer._metrics["eval"]["accuracy"][0])


def test_swapped_pairs_say_the_opposite() -> None:
    scores_B, _, args = groups((2,) * 6)
    args["margins_P"] = torch.zeros(6)
    swapped = {**args, "better_P": args["worse_P"], "worse_P": args["better_P"]}
    a, b = ranking(scores_B, **args), ranking(scores_B, **swapped)
    assert a.parts["accuracy"] + b.parts["accuracy"] == 6
    assert a.parts["margin"].item() == -b.parts["margin"].item() and a.parts["chosen"] == b.parts["rejected"]
    leads = scores_B.detach()[args["better_P"]] - scores_B.detach()[args["worse_P"]]
    assert (b.total - a.total).item() == pytest.approx(leads.sum().item())


def test_a_tie_is_half_right_and_knows_nothing() -> None:
    one = torch.ones(1)
    out = ranking(torch.zeros(2), torch.tensor([0]), torch.tensor([1]), one, 0 * one)
    assert out.parts["accuracy"] == 0.5 and out.total.item() == pytest.approx(math.log(2), abs=1e-6)


def test_statistics_are_fp32_whatever_scores_are() -> None:
    """B12: of bf16 scores the loss is that of the same scores in fp64."""
    scores_B, _, args = groups()
    half = scores_B.detach().bfloat16()
    exact = ranking(half.double(), **args, center=0.01).total
    out = ranking(half, **args, center=0.01).total
    assert out.dtype == torch.float32 and out.item() == pytest.approx(exact.item(), rel=1e-6)


def test_an_empty_batch_is_zero_with_a_gradient() -> None:
    """A rank without a real row still takes part in the backward pass (B8)."""
    scores_B, none = torch.ones(1, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    out = ranking(scores_B, none, none, torch.zeros(0), torch.zeros(0), center=0.01)
    out.total.backward()
    assert out.total == 0 and scores_B.grad is not None and scores_B.grad.item() == 0


def test_centering_draws_the_mean_to_zero() -> None:
    """Differences alone leave the mean where it was; with centering it goes to 0 and the order stays."""
    _, _, args = groups()
    args["margins_P"] = torch.zeros_like(args["margins_P"])
    means = {}
    for center in (0.0, 0.01):
        scores_B = torch.full((sum(GROUPS),), 5.0, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([scores_B], lr=0.05)
        for _ in range(800):
            optimizer.zero_grad()
            out = ranking(scores_B, **args, center=center)
            out.total.backward()
            optimizer.step()
        means[center] = scores_B.mean().item()
        assert out.parts["accuracy"].item() == pytest.approx(len(GROUPS))
    assert abs(means[0.01]) < 0.05 and abs(means[0.0]) > 3


# --- steps -----------------------------------------------------------------------------------------------------------


def test_step_correctness_is_its_formula() -> None:
    """Hard and soft labels, value and gradient, fp64, 1e-10."""
    g = torch.Generator().manual_seed(1)
    scores_S = torch.randn(7, generator=g, dtype=torch.float64).requires_grad_()
    labels_S = torch.tensor([1, 0, 1, 0.25, 0.75, 0, 1], dtype=torch.float64)
    out = step_correctness(scores_S, labels_S)
    p = torch.sigmoid(scores_S)
    expected = sum(-y * torch.log(p[i]) - (1 - y) * torch.log(1 - p[i]) for i, y in enumerate(labels_S))
    torch.testing.assert_close(out.total, expected, atol=1e-10, rtol=0)
    mine, theirs = (torch.autograd.grad(x, scores_S)[0] for x in (out.total, expected))
    torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=0)
    right = sum((s > 0) == (y > 0.5) for s, y in zip(scores_S.tolist(), labels_S.tolist(), strict=True))
    assert out.parts["accuracy"] == right


def test_the_first_wrong_step() -> None:
    """Counts over answers against a loop, with rows that have no step at all."""
    g = torch.Generator().manual_seed(2)
    rows_S = torch.tensor(sorted(torch.randint(0, 12, (30,), generator=g).tolist()))
    rows_S = rows_S[rows_S != 5]
    scores_S = torch.randn(len(rows_S), generator=g)
    labels_S = (torch.rand(len(rows_S), generator=g) > 0.3).float()
    counts = [0, 0, 0, 0]
    for row in range(12):
        here = [i for i in range(len(rows_S)) if rows_S[i] == row]
        wrong = next((i for i in here if labels_S[i] < 0.5), None)
        taken = next((i for i in here if scores_S[i] < 0), None)
        if here:
            flawless = wrong is None
            counts[2 * flawless] += 1
            counts[2 * flawless + 1] += wrong == taken
    assert first_errors(scores_S, labels_S, rows_S, 12).tolist() == counts
    none = torch.zeros(0)
    assert first_errors(none, none, none.long(), 3).tolist() == [0, 0, 0, 0]
