"""DPO and its family: against a loop over pairs written from the papers' formulas, against TRL, and at the edges."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmkit.losses.preference import dpo, hinge, ipo, kto_loss, orpo, preference_loss, robust, simpo

KINDS: dict[str, dict[str, Any]] = {
    "dpo": {"kind": "dpo", "beta": 0.1},
    "cdpo": {"kind": "dpo", "beta": 0.3, "label_smoothing": 0.2},
    "dpo+nll": {"kind": "dpo", "beta": 0.1, "nll_weight": 0.7},
    "robust": {"kind": "robust", "beta": 0.2, "label_smoothing": 0.1},
    "hinge": {"kind": "hinge", "beta": 0.5},
    "ipo": {"kind": "ipo", "beta": 0.4},
    "ipo sums": {"kind": "ipo", "beta": 0.4, "ipo_mean": False},
    "simpo": {"kind": "simpo", "beta": 2.5, "gamma": 1.4},
    "simpo smoothed": {"kind": "simpo", "beta": 2.0, "gamma": 0.5, "label_smoothing": 0.1, "nll_weight": 0.3},
    "orpo": {"kind": "orpo", "beta": 0.2},
}


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def of_pair(c: list[Tensor], r: list[Tensor], ref: tuple[float, float], options: dict[str, Any]) -> Tensor:
    """The loss of one pair from its tokens' log-probabilities, as algorithms have it: sums and means by hand."""
    beta, s = options["beta"], options.get("label_smoothing", 0.0)
    w_c, w_r = sum(c) - ref[0], sum(r) - ref[1]
    mean_c, mean_r = sum(c) / len(c), sum(r) / len(r)
    kind, d = options["kind"], w_c - w_r
    nll = options.get("nll_weight", 0.0) * -mean_c
    if kind == "dpo":
        return -(1 - s) * torch.log(sigmoid(beta * d)) - s * torch.log(sigmoid(-beta * d)) + nll
    if kind == "robust":
        return (-(1 - s) * torch.log(sigmoid(beta * d)) + s * torch.log(sigmoid(-beta * d))) / (1 - 2 * s) + nll
    if kind == "hinge":
        return torch.clamp(1 - beta * d, min=0) + nll
    if kind == "ipo":
        gap = w_c / len(c) - w_r / len(r) if options.get("ipo_mean", True) else d
        return (gap - 1 / (2 * beta)) ** 2 + nll
    if kind == "simpo":
        x = beta * mean_c - beta * mean_r - options["gamma"]
        return -(1 - s) * torch.log(sigmoid(x)) - s * torch.log(sigmoid(-x)) + nll
    p_c, p_r = torch.exp(mean_c), torch.exp(mean_r)
    odds = torch.log(p_c / (1 - p_c)) - torch.log(p_r / (1 - p_r))
    return -mean_c - beta * torch.log(sigmoid(odds)) + nll


def answers(n: int, seed: int = 0) -> tuple[list[list[Tensor]], Tensor]:
    """n answers of very uneven length: log-probabilities of their tokens, and a reference's sums."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 13, (n,), generator=g).tolist()
    tokens = [[-torch.rand((), generator=g, dtype=torch.float64) * 2 - 0.05 for _ in range(k)] for k in lengths]
    noise = torch.randn(n, generator=g, dtype=torch.float64)
    reference = torch.stack([torch.stack(t).sum() for t in tokens]) + noise
    return [[t.requires_grad_() for t in row] for row in tokens], reference


def sums_of(tokens: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([torch.stack(t).sum() for t in tokens]), torch.tensor([len(t) for t in tokens])


PAIRS = [(0, 1), (3, 2), (4, 5), (4, 6), (5, 6), (7, 8)]  # a group of three answers among groups of two
WEIGHTS = [1.0, 1.0, 1 / 3, 1 / 3, 1 / 3, 1.0]


@pytest.mark.parametrize("name", KINDS)
def test_against_a_loop(name: str) -> None:
    """B84: sums where sums are meant and means where means are, per prompt; value and gradient to 1e-10 in fp64."""
    options = KINDS[name]
    tokens, reference = answers(9)
    leaves = [t for row in tokens for t in row]
    loop = sum(
        w * of_pair(tokens[b], tokens[c], (reference[b].item(), reference[c].item()), options)
        for w, (b, c) in zip(WEIGHTS, PAIRS, strict=True)
    )
    wanted = torch.autograd.grad(loop, leaves)
    logps_B, n_B = sums_of(tokens)
    with_reference = options["kind"] not in ("simpo", "orpo")
    better_P, worse_P = (torch.tensor([pair[i] for pair in PAIRS]) for i in (0, 1))
    out = preference_loss(
        **options,
        logps_B=logps_B,
        n_tokens_B=n_B,
        reference_B=reference if with_reference else None,
        better_P=better_P,
        worse_P=worse_P,
        weights_P=torch.tensor(WEIGHTS, dtype=torch.float64),
    )
    assert out.total.item() == pytest.approx(loop.item(), abs=1e-10)
    got = torch.autograd.grad(out.total, leaves)
    assert max((a - b).abs().item() for a, b in zip(got, wanted, strict=True)) < 1e-10
    assert out.parts["loss"].item() == pytest.approx(loop.item(), abs=1e-10)
    if "nll" in out.parts:
        weight = options.get("nll_weight", 0.0) + (options["kind"] == "orpo")
        rest = out.parts["preference"] + weight * out.parts["nll"]
        assert rest.item() == pytest.approx(loop.item(), abs=1e-10)


SINGLE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dpo": lambda a, b: dpo(a - b, 0.3, 0.1),
    "robust": lambda a, b: robust(a - b, 0.3, 0.2),
    "hinge": lambda a, b: hinge(a - b, 0.3),
    "ipo": lambda a, b: ipo(a - b, 0.3),
    "simpo": lambda a, b: simpo(a - b, 2.0, 1.0, 0.1),
    "orpo": lambda a, b: orpo(-a.abs() - 0.1, -b.abs() - 0.1),
}


@pytest.mark.parametrize("name", SINGLE)
def test_gradients(name: str) -> None:
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(6, dtype=torch.float64, generator=g).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(SINGLE[name], (a, b))


@pytest.mark.parametrize("name", SINGLE)
def test_the_better_answer_is_pulled_up(name: str) -> None:
    """B89: the sign of the gradient, where the pair is still open."""
    a = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([-0.9], dtype=torch.float64, requires_grad=True)
    loss = orpo(a, b) if name == "orpo" else SINGLE[name](a, b)
    up, down = torch.autograd.grad(loss.sum(), (a, b))
    assert up.item() < 0 < down.item()


def test_where_policy_and_reference_agree() -> None:
    """B84: ln 2 whatever the noise, however long the answers; hinge 1, ipo 1 / (4 beta^2); half of the pairs are right."""
    tokens, _ = answers(4)
    logps_B, n_B = sums_of(tokens)
    wanted = {"dpo": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": 1 / (4 * 0.3**2)}
    for kind, value in wanted.items():
        out = preference_loss(
            kind, logps_B, n_B, logps_B.detach(), torch.tensor([0, 2]), torch.tensor([1, 3]), torch.ones(2),
            beta=0.3, label_smoothing=0.1 if kind in ("dpo", "robust") else 0.0,
        )  # fmt: skip
        assert out.total.item() / 2 == pytest.approx(value, abs=1e-12)
        assert out.parts["accuracy"].item() == 1.0 and out.parts["rewards/margin"].item() == 0.0
        assert out.parts["drift/chosen"].item() == 0.0


def test_what_is_shown() -> None:
    """B92: rewards are beta times the log-ratio, once; all are means over prompts when divided."""
    logps_B, n_B = torch.tensor([-3.0, -4.0, -8.0, -2.0]), torch.tensor([2, 4, 4, 1])
    reference_B = torch.tensor([-4.0, -4.0, -4.0, -4.0])
    out = preference_loss(
        "dpo", logps_B, n_B, reference_B, torch.tensor([0, 2]), torch.tensor([1, 3]), torch.ones(2), beta=0.5
    )
    shown = {name: value.item() / 2 for name, value in out.parts.items()}
    assert shown["rewards/chosen"] == pytest.approx(0.5 * (1 - 4) / 2)
    assert shown["rewards/rejected"] == pytest.approx(0.5 * (0 + 2) / 2)
    assert shown["rewards/margin"] == pytest.approx(0.5 * (1 - 6) / 2) and shown["accuracy"] == 0.5
    assert shown["logps/chosen"] == pytest.approx(-5.5) and shown["logps/rejected"] == pytest.approx(-3.0)
    assert shown["drift/chosen"] == pytest.approx((1 / 2 - 4 / 4) / 2) and shown["drift/rejected"] == pytest.approx(1.0)


def test_odds_at_the_edges() -> None:
    """A certain answer, and one that is all but impossible, have finite losses and gradients in fp32."""
    x = torch.tensor([0.0, -1e-9, -1e-4, -30.0, -200.0], requires_grad=True)
    loss = orpo(x, x.detach().flip(0))
    loss.sum().backward()
    assert loss.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    near = torch.tensor([-1e-4, -0.5, -3.0], dtype=torch.float64)
    exact = torch.log(torch.exp(near) / -torch.expm1(near))
    got = -torch.log(torch.expm1(orpo(near, torch.full_like(near, -math.log(2)))))  # -log sigma(x) = log(1 + e^-x)
    assert torch.allclose(got, exact, atol=1e-9)


def test_a_missing_reference_is_no_zero() -> None:
    """B83."""
    one = torch.tensor([-1.0, -2.0])
    args = (one, torch.tensor([1, 1]))
    rest = (torch.tensor([0]), torch.tensor([1]), torch.ones(1))
    with pytest.raises(ValueError, match="dpo: reference log-probabilities are missing"):
        preference_loss("dpo", *args, None, *rest, beta=0.1)
    with pytest.raises(ValueError, match="simpo: reference log-probabilities are not used"):
        preference_loss("simpo", *args, one, *rest, beta=0.1)


# --- KTO -------------------------------------------------------------------------------------------------------------


def test_kto_against_a_loop() -> None:
    """Value and gradient of every row to 1e-10; padding counts nothing; figures of good and bad answers apart."""
    g = torch.Generator().manual_seed(2)
    w_B = torch.randn(7, dtype=torch.float64, generator=g).mul(3).requires_grad_()
    is_good_B = torch.tensor([True, False, True, True, False, False, True])
    weights_B = torch.tensor([1.0, 1, 1, 1, 1, 1, 0], dtype=torch.float64)
    z0, beta, good, bad = 0.7, 0.4, 1.3, 0.8
    loop = torch.zeros((), dtype=torch.float64)
    for w, is_good, real in zip(w_B, is_good_B.tolist(), weights_B.tolist(), strict=True):
        if real:
            loop = loop + (good * (1 - sigmoid(beta * (w - z0))) if is_good else bad * (1 - sigmoid(beta * (z0 - w))))
    out = kto_loss(w_B, is_good_B, weights_B, z0, beta=beta, good_weight=good, bad_weight=bad)
    assert out.total.item() == pytest.approx(loop.item(), abs=1e-10)
    (wanted,), (got,) = torch.autograd.grad(loop, w_B), torch.autograd.grad(out.total, w_B)
    assert torch.allclose(got, wanted, atol=1e-10)
    real, stats = w_B.detach()[:6], out.stats
    assert stats["n_good"] == 3 and stats["n_bad"] == 3
    assert stats["rewards_good"].item() == pytest.approx(beta * real[is_good_B[:6]].sum().item())
    assert stats["right_bad"] == (real[~is_good_B[:6]] < z0).sum()
    assert torch.autograd.gradcheck(lambda w: kto_loss(w, is_good_B, weights_B, z0, beta=beta).total, w_B)


def test_kto_keeps_its_digits() -> None:
    """1 - sigma(x) of a large x is no 0 in fp32."""
    out = kto_loss(torch.tensor([60.0]), torch.tensor([True]), torch.ones(1), 0.0, beta=1.0)
    assert out.total.item() == pytest.approx(math.exp(-60), rel=1e-4)


# --- TRL -------------------------------------------------------------------------------------------------------------


class Fixed(torch.nn.Module):
    """What TRL's trainers ask of a model with a fused head: here its outputs are given."""

    def __init__(self, logits_BTV: Tensor):
        super().__init__()
        self.logits_BTV = logits_BTV

    def forward(self, labels: Tensor, **_: Any) -> SimpleNamespace:
        labels, logits = labels[:, 1:], self.logits_BTV[:, :-1]
        logps = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
        nothing = torch.zeros_like(logps)
        return SimpleNamespace(log_probs=logps, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


def alone() -> Any:
    """An `accelerate.Accelerator` of one process, as far as the losses use it."""
    same = lambda x: x  # noqa: E731
    return SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same, unwrap_model=same)


def trl_self(**fields: Any) -> Any:
    base = {
        "accelerator": alone(), "aux_loss_enabled": False, "precompute_ref_logps": True, "_tp_size": 1,
        "_total_train_tokens": 0, "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
    }  # fmt: skip
    return SimpleNamespace(**{**base, "model": Fixed(torch.zeros(1)), **fields})


def random_batch(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, ids, mask of the answers, and the sums of their log-probabilities."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(n, 12, 20, generator=g)
    ids = torch.randint(0, 20, (n, 12), generator=g)
    mask = torch.zeros(n, 12, dtype=torch.long)
    for i, (first, last) in enumerate(itertools.islice(itertools.cycle([(3, 12), (4, 6), (2, 9), (5, 10)]), n)):
        mask[i, first:last] = 1
    picked = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return logits, ids, mask, (picked * mask[:, 1:]).sum(-1)


@pytest.mark.parametrize(
    ("theirs", "name"), [("sigmoid", "dpo"), ("hinge", "hinge"), ("ipo", "ipo"), ("robust", "robust")]
)
def test_against_trl_dpo(theirs: str, name: str) -> None:
    """TRL's DPOTrainer on the same logits, with its own masks: loss and rewards to 1e-5."""
    from trl import DPOTrainer

    logits, ids, mask, logps = random_batch(8)
    reference = logps + torch.randn(8, generator=torch.Generator().manual_seed(4))
    options = KINDS[name]
    trainer = trl_self(
        beta=options["beta"], label_smoothing=options.get("label_smoothing", 0.0), loss_types=[theirs],
        loss_weights=[1.0], f_divergence_type="reverse_kl", ld_alpha=None, use_weighting=False,
    )  # fmt: skip
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask,
        "ref_chosen_logps": reference[:4], "ref_rejected_logps": reference[4:],
    }  # fmt: skip
    wanted = DPOTrainer._compute_loss(trainer, Fixed(logits), inputs, False)
    better, worse = torch.arange(4), torch.arange(4, 8)
    out = preference_loss(
        **options, logps_B=logps, n_tokens_B=mask.sum(1), reference_B=reference, better_P=better, worse_P=worse,
        weights_P=torch.ones(4),
    )  # fmt: skip
    assert out.total.item() / 4 == pytest.approx(wanted.item(), abs=1e-5)
    shown = trainer._metrics["train"]
    assert out.parts["rewards/chosen"].item() / 4 == pytest.approx(shown["rewards/chosen"][0], abs=1e-5)
    assert out.parts["accuracy"].item() / 4 == pytest.approx(shown["rewards/accuracies"][0], abs=1e-5)


def test_against_trl_simpo_and_orpo() -> None:
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    _, _, mask, logps = random_batch(8)
    n_B = mask.sum(1)
    means = logps / n_B
    better, worse, ones = torch.arange(4), torch.arange(4, 8), torch.ones(4)
    trainer = trl_self(beta=2.5, simpo_gamma=1.4, label_smoothing=0.0, loss_type="simpo", alpha=0.0)
    wanted, rewards, _ = CPOTrainer.cpo_loss(trainer, means[:4], means[4:])
    out = preference_loss(**KINDS["simpo"], logps_B=logps, n_tokens_B=n_B, reference_B=None, better_P=better,
                          worse_P=worse, weights_P=ones)  # fmt: skip
    assert out.total.item() == pytest.approx(wanted.sum().item(), abs=1e-5)
    assert out.parts["rewards/chosen"].item() == pytest.approx(rewards.sum().item(), abs=1e-5)
    # TRL's losses are the odds term alone, with its sign turned; the likelihood is added elsewhere.
    wanted, *_ = ORPOTrainer.odds_ratio_loss(trl_self(beta=0.2), means[:4], means[4:])
    out = preference_loss(**KINDS["orpo"], logps_B=logps, n_tokens_B=n_B, reference_B=None, better_P=better,
                          worse_P=worse, weights_P=ones)  # fmt: skip
    assert out.parts["preference"].item() == pytest.approx(-wanted.sum().item(), abs=1e-5)
    assert out.parts["nll"].item() == pytest.approx(-means[:4].sum().item(), abs=1e-5)


def test_against_trl_kto() -> None:
    """On the micro-batch that TRL takes its KL from: ours is that of the whole step."""
    from trl import KTOTrainer

    logits, ids, mask, logps = random_batch(8)
    g = torch.Generator().manual_seed(5)
    reference, kl_policy, kl_reference = logps + torch.randn(8, generator=g), *torch.randn(2, 8, generator=g)
    label = torch.tensor([True, False, False, True, True, False, True, True])
    trainer = trl_self(
        beta=0.3, desirable_weight=1.2, undesirable_weight=0.9, loss_type="kto", calculate_KL=True,
        _compute_kl_logps=lambda model, batch: kl_policy,
    )  # fmt: skip
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask, "label": label,
        "ref_logps": reference, "ref_KL_logps": kl_reference,
    }  # fmt: skip
    wanted = KTOTrainer._compute_loss(trainer, Fixed(logits), inputs, False)
    z0 = max(0.0, (kl_policy - kl_reference).mean().item())
    out = kto_loss(logps - reference, label, torch.ones(8), z0, beta=0.3, good_weight=1.2, bad_weight=0.9)
    assert out.total.item() / 8 == pytest.approx(wanted.item(), abs=1e-5)
    shown = trainer._metrics["train"]
    assert z0 == pytest.approx(shown["kl"][0], abs=1e-5)
    assert (out.stats["rewards_bad"] / out.stats["n_bad"]).item() == pytest.approx(
        shown["rewards/rejected"][0], abs=1e-5
    )
