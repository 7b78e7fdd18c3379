"""Losses of reinforcement learning: each against a loop over tokens written from its formula, and against TRL."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from llmkit.losses import (
    cispo,
    full_kl,
    gspo,
    importance_weight,
    kl_loss,
    kl_stats,
    ppo_clip,
    reinforce,
    token_weights,
    value_loss,
)
from llmkit.losses.policy import (
    correction_stats,
    kl_k1,
    kl_k2,
    kl_k3,
    ratio_deviation,
    ratio_max,
    sampler_stats,
)

B, T, MAX_LEN = 4, 7, 9
SURROGATES = {
    "ppo": (ppo_clip, {"clip_low": 0.2, "clip_high": 0.28}),
    "dual": (ppo_clip, {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 1.5}),
    "gspo": (gspo, {"clip_low": 0.05, "clip_high": 0.06}),
    "cispo": (cispo, {"ratio_max": 1.3}),
    "reinforce": (reinforce, {}),
}


def case(seed: int = 0) -> dict[str, Tensor]:
    """Answers of uneven length; one with a gap (a tool's answer), one without any action."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(B, T, generator=g, dtype=torch.float64)  # noqa: E731
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, 1:6] = True
    mask[1, 2] = True
    mask[2, [0, 1, 5, 6]] = True
    old = -draw().abs()
    return {
        "logprobs": (old + 0.4 * draw()).requires_grad_(),
        "old": old,
        "ref": old + 0.3 * draw(),
        "advantages": draw(),
        "mask": mask,
    }


def policy_arguments(c: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return c["logprobs"], c["old"], c["advantages"], c["mask"]


def slow(name: str, lp: Any, old: Any, advantages: Any, mask: Any, **options: Any) -> list[list[Any]]:
    """The formulas, one token at a time. Numbers are 0-d tensors, so that autograd gives the gradient."""
    out = []
    for b in range(len(mask)):
        actions = [t for t in range(len(mask[b])) if mask[b][t]]
        s = torch.stack([lp[b, t] - old[b, t] for t in actions]).mean().exp() if actions else torch.ones(())
        row = []
        for t in range(len(mask[b])):
            A, ratio = advantages[b, t], (lp[b, t] - old[b, t]).exp()
            if not mask[b][t]:
                loss = lp[b, t] * 0
            elif name == "reinforce":
                loss = -A * lp[b, t]
            elif name == "cispo":
                loss = -min(ratio.item(), options["ratio_max"]) * A * lp[b, t]
            else:
                r = s if name == "gspo" else ratio
                clipped = r.clamp(1 - options["clip_low"], 1 + options["clip_high"])
                loss = -torch.min(A * r, A * clipped)
                if options.get("dual_clip") is not None and A < 0:
                    loss = torch.min(loss, -options["dual_clip"] * A)
            row.append(loss)
        out.append(torch.stack(row))
    return torch.stack(out)


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("seed", range(4))
def test_surrogates_equal_a_loop(name: str, seed: int) -> None:
    """Values of every token; the gradient of the loss with the weights that the surrogate is used with."""
    c = case(seed)
    function, options = SURROGATES[name]
    ours, stats = function(*policy_arguments(c), **options)
    theirs = slow(name, *policy_arguments(c), **options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    # The sequence ratio's gradient is spread over the answer's tokens, so it is the sum over an answer that agrees.
    advantages = c["advantages"]
    if name == "gspo":
        c["advantages"] = advantages[:, :1].expand_as(advantages)
        ours, stats = function(*policy_arguments(c), **options)
        theirs = slow(name, *policy_arguments(c), **options)
    for aggregation in ("token_mean", "sequence_mean"):
        weights, denominator = token_weights(c["mask"], aggregation, MAX_LEN)  # type: ignore[arg-type]
        ours_grad, theirs_grad = (
            torch.autograd.grad((weights * x).sum() / denominator, c["logprobs"], retain_graph=True)[0]
            for x in (ours, theirs)
        )
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=0, atol=1e-12)
        assert not ours_grad[~c["mask"]].any()
    assert stats["actions"] == c["mask"].sum()
    assert not any(v.requires_grad for v in stats.values())  # B24


def test_statistics() -> None:
    """B86: of the actions alone; clipped means that no gradient is left."""
    c = case()
    losses, stats = ppo_clip(*policy_arguments(c), clip_low=0.2, clip_high=0.28)
    ratio = (c["logprobs"] - c["old"]).detach().exp()
    pairs = list(zip(ratio[c["mask"]].tolist(), c["advantages"][c["mask"]].tolist(), strict=True))
    assert stats["ratio"].item() == pytest.approx(sum(r for r, _ in pairs))
    assert stats["approx_kl"].item() == pytest.approx(sum(r - 1 - math.log(r) for r, _ in pairs))
    assert stats["clipped_low"] == sum(r < 0.8 and a < 0 for r, a in pairs)
    assert stats["clipped_high"] == sum(r > 1.28 and a > 0 for r, a in pairs)
    (grad,) = torch.autograd.grad(losses.sum(), c["logprobs"])
    still = int((grad[c["mask"]] == 0).sum())
    assert still == stats["clipped_low"] + stats["clipped_high"] > 0
    assert ratio_max(c["logprobs"], c["old"], c["mask"]).item() == pytest.approx(max(r for r, _ in pairs))
    deviation = ratio_deviation(c["logprobs"], c["old"], c["mask"]).item()
    assert deviation == pytest.approx(max(abs(r - 1) for r, _ in pairs))
    nothing = torch.zeros_like(c["mask"])
    assert ratio_max(c["logprobs"], c["old"], nothing) == ratio_deviation(c["logprobs"], c["old"], nothing) == 0


@pytest.mark.parametrize("name", SURROGATES)
def test_on_policy_gradient_is_reinforce(name: str) -> None:
    """B72: with old = logprobs.detach() the ratio is 1 to the bit, and every surrogate's gradient is -A."""
    c = case()
    c["old"] = c["logprobs"].detach().clone()
    function, options = SURROGATES[name]
    if name == "gspo":
        c["advantages"] = c["advantages"][:, :1].expand_as(c["advantages"])
    losses, stats = function(*policy_arguments(c), **options)
    assert ratio_deviation(c["logprobs"], c["old"], c["mask"]) == 0
    assert stats["ratio"] == stats["actions"] and stats["approx_kl"] == stats["clipped_high"] == 0
    weights, _ = token_weights(c["mask"], "sequence_mean", MAX_LEN)
    (grad,) = torch.autograd.grad((weights * losses).sum(), c["logprobs"])
    torch.testing.assert_close(grad, -(weights * c["advantages"]).where(c["mask"], 0.0), rtol=0, atol=1e-12)


def test_dual_clip_bounds_the_loss() -> None:
    """A token whose probability grew by e^5 though it was bad: the plain loss is 148 A, with no end to it."""
    lp, old, mask = torch.tensor([[0.0]]), torch.tensor([[-5.0]]), torch.tensor([[True]])
    args = (lp, old, torch.tensor([[-1.0]]), mask)
    assert ppo_clip(*args, clip_low=0.2, clip_high=0.2)[0].item() == pytest.approx(math.exp(5))
    assert ppo_clip(*args, clip_low=0.2, clip_high=0.2, dual_clip=3.0)[0].item() == 3.0


def test_far_apart_policies_stay_finite() -> None:
    c = case()
    c["old"] = c["old"] - 500
    for function, options in SURROGATES.values():
        losses, stats = function(*policy_arguments(c), **options)
        (grad,) = torch.autograd.grad(losses.sum(), c["logprobs"])
        assert losses.isfinite().all() and grad.isfinite().all() and all(v.isfinite() for v in stats.values())


def test_half_precision_is_widened() -> None:
    """B12."""
    c = {k: v if v.dtype == torch.bool else v.detach().bfloat16() for k, v in case().items()}
    for function, options in SURROGATES.values():
        assert function(*policy_arguments(c), **options)[0].dtype == torch.float32
    assert value_loss(c["logprobs"], c["old"], c["ref"], c["mask"], clip=0.2)[0].dtype == torch.float32


# --- importance weights ----------------------------------------------------------------------------------------------


def test_importance_weight() -> None:
    """TIS: min(ratio, cap) a token. MIS: an answer stays or goes as a whole, by the mean of its log-ratios."""
    old = torch.log(torch.tensor([[0.5, 0.2, 0.9], [0.1, 0.4, 0.7]], dtype=torch.float64))
    sampler = torch.log(torch.tensor([[0.25, 0.1, 0.9], [0.1, 0.1, 0.7]], dtype=torch.float64))
    mask = torch.tensor([[True, True, False], [True, True, True]])
    tokens = importance_weight(old, sampler, mask, 1.5, "token")
    torch.testing.assert_close(tokens, torch.tensor([[1.5, 1.5, 1.0], [1.0, 1.5, 1.0]]).double())
    whole = importance_weight(old, sampler, mask, 1.7, "sequence")  # geometric means 2 and 4^(1/3) = 1.59
    assert whole.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert importance_weight(sampler, old, mask, 1.7, "sequence").tolist() == [[0, 0, 1], [1, 1, 1]]
    products = importance_weight(old, sampler, mask, 3.5, "product")
    torch.testing.assert_close(products, torch.tensor([[3.5, 3.5, 1.0], [3.5, 3.5, 3.5]]).double())  # of 4 and 4
    assert importance_weight(old, sampler, mask, 9.0, "product")[0].tolist() == pytest.approx([4, 4, 1])
    for mode in ("token", "sequence", "product"):
        assert importance_weight(old, old, mask, 2.0, mode).eq(1).all()  # type: ignore[arg-type]
    for weights, cap, mode, mean, cut in ((tokens, 1.5, "token", 6.5, 3), (whole, 1.7, "sequence", 3, 2)):
        told = correction_stats(weights, mask, cap, mode)
        assert (told["correction"].item(), told["correction_cut"].item()) == (pytest.approx(mean), cut)
    gap = sampler_stats(old, sampler, mask)
    assert gap["sampler_gap"].item() == pytest.approx(2 * math.log(2) + math.log(4))
    assert gap["sampler_prob_gap"].item() == pytest.approx(0.25 + 0.1 + 0.3)


def _expected_gradient(correction: str | None, cap: float, sampler_temperature: float) -> tuple[Tensor, Tensor]:
    """Of -E[reward], over all answers of two tokens out of four: exactly, and as it is estimated from a sampler at another
    temperature, in expectation. The second token's scores depend on the first."""
    g = torch.Generator().manual_seed(3)
    first_V, second_VV = (torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in ((4,), (4, 4)))
    reward_VV = torch.randn(4, 4, generator=g, dtype=torch.float64)
    a, b = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T

    def logprobs(temperature: float) -> Tensor:
        """Of both tokens of all 16 answers [16, 2]."""
        return torch.stack(
            [(first_V / temperature).log_softmax(0)[a], (second_VV / temperature).log_softmax(1)[a, b]], 1
        )

    own_BT, sampler_BT = logprobs(1.0), logprobs(sampler_temperature).detach()
    exact = -(own_BT.sum(1).exp() * reward_VV[a, b]).sum()
    mask_BT = torch.ones_like(own_BT, dtype=torch.bool)
    old_BT, advantages_BT = own_BT.detach(), reward_VV[a, b][:, None].expand(-1, 2)
    losses_BT = ppo_clip(own_BT, old_BT, advantages_BT, mask_BT, clip_low=0.2, clip_high=0.2)[0]
    if correction is not None:
        losses_BT = losses_BT * importance_weight(old_BT, sampler_BT, mask_BT, cap, correction)  # type: ignore[arg-type]
    estimate = (sampler_BT.sum(1).exp() * losses_BT.sum(1)).sum()
    both = [
        torch.cat([x.flatten() for x in torch.autograd.grad(t, (first_V, second_VV), retain_graph=True)])
        for t in (exact, estimate)
    ]
    return both[0], both[1]


def test_the_correction_makes_the_gradient_that_of_the_policy() -> None:
    """Answers of a sampler at temperature 1.5: by the product of ratios the gradient is exact, without it far off; token
    by token it is nearer; with a cap it lies between."""
    exact, plain = _expected_gradient(None, 0.0, 1.5)
    error = lambda estimate: ((estimate - exact).norm() / exact.norm()).item()  # noqa: E731
    assert error(plain) > 0.2
    assert error(_expected_gradient("product", 1e9, 1.5)[1]) < 1e-12
    assert error(_expected_gradient("token", 1e9, 1.5)[1]) < 0.9 * error(plain)
    assert 1e-3 < error(_expected_gradient("product", 1.05, 1.5)[1]) < error(plain)
    for mode in ("token", "sequence", "product"):
        assert error(_expected_gradient(mode, 2.0, 1.0)[1]) < 1e-12  # the sampler is the policy


def test_the_correction_of_single_tokens_is_exact() -> None:
    """E_sampler[min(w, C) A grad log pi] with C out of reach is E_pi[A grad log pi], to rounding."""
    scores_V = torch.randn(8, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()
    advantages_V1 = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
    own_V1 = scores_V.log_softmax(0)[:, None]
    mask_V1 = torch.ones_like(own_V1, dtype=torch.bool)
    exact = torch.autograd.grad(-(own_V1.exp() * advantages_V1).sum(), scores_V, retain_graph=True)[0]
    rounded = scores_V.detach().bfloat16().double()  # weights in bf16
    for sampler_V in (rounded.log_softmax(0), (scores_V.detach() / 0.5).log_softmax(0)):
        weights_V1 = importance_weight(own_V1.detach(), sampler_V[:, None], mask_V1, 1e9, "token")
        for weight_V1, right in ((weights_V1, True), (torch.ones_like(weights_V1), False)):
            loss = (sampler_V.exp()[:, None] * weight_V1 * -advantages_V1 * own_V1).sum()
            found = torch.autograd.grad(loss, scores_V, retain_graph=True)[0]
            assert ((found - exact).abs().max().item() < 1e-12) == right


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss(clip: float | None) -> None:
    c = case()
    values, old, returns, mask = c["logprobs"], c["old"], c["advantages"], c["mask"]
    ours, stats = value_loss(values, old, returns, mask, clip=clip)
    total, clipped, error = torch.zeros((), dtype=torch.float64), 0, 0.0
    for b, t in mask.nonzero().tolist():
        v, v0, R = values[b, t], old[b, t], returns[b, t]
        near = v if clip is None else min(max(v, v0 - clip), v0 + clip)
        total = total + 0.5 * max((v - R) ** 2, (near - R) ** 2)
        clipped += bool((near - R) ** 2 > (v - R) ** 2)
        error += abs((v - R).item())
    torch.testing.assert_close(ours.sum(), total, rtol=0, atol=1e-12)
    a, b = (torch.autograd.grad(x, values, retain_graph=True)[0] for x in (ours.sum(), total))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert stats["value_clipped"] == clipped and stats["abs_value_error"].item() == pytest.approx(error)
    assert (clipped > 0) == (clip is not None) and not ours[~mask].any()


# --- KL --------------------------------------------------------------------------------------------------------------


def eight() -> tuple[Tensor, Tensor]:
    """Logits of a policy and a reference over a vocabulary of eight."""
    g = torch.Generator().manual_seed(5)
    logits, ref = torch.randn(8, generator=g, dtype=torch.float64), torch.randn(8, generator=g, dtype=torch.float64)
    return logits.requires_grad_(), ref


def exact_kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def expected_loss_gradient(estimator: str) -> tuple[float, Tensor]:
    """Value and gradient of an estimator as a loss, in expectation over all eight actions drawn from the policy."""
    logits, ref = eight()
    logp, logq = torch.log_softmax(logits, -1), torch.log_softmax(ref, -1)
    function = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}[estimator]
    total = (logp.exp().detach() * function(logp, logq)).sum()
    return total.item(), torch.autograd.grad(total, logits)[0]


def test_kl_values_and_gradients_are_exact() -> None:
    """B80: which estimator has whose value and whose gradient, by summing over all actions."""
    logits, ref = eight()
    p, q = logits.softmax(-1), ref.softmax(-1)
    reverse, forward = exact_kl(p, q), exact_kl(q, p)
    to_reverse, to_forward = (torch.autograd.grad(kl, logits, retain_graph=True)[0] for kl in (reverse, forward))
    value, gradient = expected_loss_gradient("k1")
    assert value == pytest.approx(reverse.item(), abs=1e-12) and gradient.abs().max() < 1e-12  # does nothing
    value, gradient = expected_loss_gradient("k2")
    assert abs(value - reverse.item()) > 0.05
    torch.testing.assert_close(gradient, to_reverse, rtol=0, atol=1e-12)
    value, gradient = expected_loss_gradient("k3")
    assert value == pytest.approx(reverse.item(), abs=1e-12)
    torch.testing.assert_close(gradient, to_forward, rtol=0, atol=1e-12)
    assert torch.cosine_similarity(to_forward, to_reverse, dim=0) < 0.999  # they are not the same thing
    # `full`: hidden states are the logits themselves, the output embedding the identity.
    hidden, eye = logits.detach()[None].requires_grad_(), torch.eye(8, dtype=torch.float64)
    full = full_kl(hidden, eye, ref[None], eye, torch.tensor([True]))
    assert full.item() == pytest.approx(reverse.item(), abs=1e-12)
    torch.testing.assert_close(torch.autograd.grad(full.sum(), hidden)[0][0], to_reverse, rtol=0, atol=1e-12)


def test_only_k1_may_be_a_reward() -> None:
    """B80: the gradient of E[-reward] (score function), for each estimator as a penalty in the reward. Where the
    reference likes best what the policy likes least, k2 and k3 lead away from it."""
    logits = torch.tensor([-1.0, *[0.0] * 7], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([2.0, *[0.0] * 7], dtype=torch.float64)
    logp, logq = torch.log_softmax(logits, -1), torch.log_softmax(ref, -1)
    (exact,) = torch.autograd.grad(exact_kl(logp.exp(), logq.exp()), logits, retain_graph=True)
    cosines = {}
    for name, function in (("k1", kl_k1), ("k2", kl_k2), ("k3", kl_k3)):
        penalty = function(logp, logq).detach()
        (gradient,) = torch.autograd.grad((logp.exp().detach() * penalty * logp).sum(), logits, retain_graph=True)
        cosines[name] = torch.cosine_similarity(gradient, exact, dim=0).item()
        if name == "k1":
            torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-12)
    assert cosines["k2"] < 0 and cosines["k3"] < 0, cosines


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_ratio_corrects_for_an_older_policy(estimator: Any) -> None:
    """Actions drawn from an old policy and weighed by the ratio: the same expectation as drawn from the present one."""
    logits, ref = eight()
    logp, logq = torch.log_softmax(logits, -1), torch.log_softmax(ref, -1)
    old = torch.log_softmax(logits.detach() + torch.linspace(-1, 1, 8), -1)
    mask = torch.ones(1, 8, dtype=torch.bool)
    ratio = (logp - old).exp()[None]
    corrected = (old.exp() * kl_loss(estimator, logp[None], logq[None], mask, ratio)).sum()
    (gradient,) = torch.autograd.grad(corrected, logits, retain_graph=True)
    torch.testing.assert_close(gradient, expected_loss_gradient(estimator)[1], rtol=0, atol=1e-12)
    plain = (old.exp() * kl_loss(estimator, logp[None], logq[None], mask)).sum()
    assert not torch.allclose(torch.autograd.grad(plain, logits)[0], gradient, atol=1e-3)


def test_kl_of_a_policy_and_itself_is_zero() -> None:
    """D6."""
    c = case()
    for estimator in ("k2", "k3"):
        loss = kl_loss(estimator, c["logprobs"], c["logprobs"].detach(), c["mask"])  # type: ignore[arg-type]
        assert not loss.any() and not torch.autograd.grad(loss.sum(), c["logprobs"])[0].any()
    assert not any(kl_stats(c["logprobs"], c["logprobs"], c["mask"]).values())


def test_k3_is_bounded_and_k1_is_no_loss() -> None:
    lp, ref, mask = torch.tensor([[-300.0]]), torch.tensor([[-1.0]]), torch.tensor([[True]])
    assert kl_loss("k3", lp, ref, mask).item() == 10 and kl_loss("k2", lp, ref, mask).item() == 200
    with pytest.raises(ValueError, match="k1"):
        kl_loss("k1", lp, ref, mask)  # type: ignore[arg-type]


# --- aggregation -----------------------------------------------------------------------------------------------------


def test_aggregation_on_two_by_three() -> None:
    """B82: an answer of one token and one of three, losses 1, 2, 3, 4, by hand, for each of the four."""
    losses = torch.tensor([[1.0, 99.0, 99.0], [2.0, 3.0, 4.0]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    expected = {
        "token_mean": (1 + 2 + 3 + 4) / 4,
        "sequence_mean": (1 / 1 + (2 + 3 + 4) / 3) / 2,
        "constant": (1 + 2 + 3 + 4) / (2 * MAX_LEN),
        "sequence_sum": (1 + 2 + 3 + 4) / 2,
    }
    for name, value in expected.items():
        weights, denominator = token_weights(mask, name, MAX_LEN)  # type: ignore[arg-type]
        assert ((weights * losses).sum() / denominator).item() == pytest.approx(value), name
        assert not weights[~mask].any()
        # Cut into micro-batches, the denominators add up and each row keeps its weights.
        parts = [token_weights(mask[i : i + 1], name, MAX_LEN) for i in range(2)]  # type: ignore[arg-type]
        assert sum(d for _, d in parts) == denominator
        assert torch.equal(torch.cat([w for w, _ in parts]), weights)


def test_empty_answers_count_nowhere() -> None:
    """B79: an answer that is left out (overlong, or no answer at all) leaves the denominator too."""
    mask = torch.tensor([[True, True], [False, False]])
    for name, denominator in (("token_mean", 2), ("sequence_mean", 1), ("constant", MAX_LEN), ("sequence_sum", 1)):
        weights, D = token_weights(mask, name, MAX_LEN)  # type: ignore[arg-type]
        assert denominator == D and weights.isfinite().all() and not weights[1].any()


# --- padding ---------------------------------------------------------------------------------------------------------


@given(pads=st.integers(1, 64), left=st.booleans(), seed=st.integers(0, 3), nan=st.booleans())
@settings(max_examples=60, deadline=None)
def test_padding_changes_nothing(pads: int, left: bool, seed: int, nan: bool) -> None:
    """D5, B76, B86: whatever stands at up to 64 more positions, NaN included: losses, gradients, statistics, weights."""

    def widened(t: Tensor) -> Tensor:
        filler = torch.full((B, pads), math.nan if nan else 7.5, dtype=torch.float64)
        if t.dtype == torch.bool:
            filler = torch.zeros(B, pads, dtype=torch.bool)
        return torch.cat((filler, t.detach()) if left else (t.detach(), filler), 1)

    c = case(seed)
    wide = {name: widened(t) for name, t in c.items()}
    wide["logprobs"].requires_grad_()
    kept = slice(pads, None) if left else slice(0, T)

    def everything(c: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        per_token, sums = [], []
        outs = [function(*policy_arguments(c), **options) for function, options in SURROGATES.values()]
        outs.append(value_loss(c["logprobs"], c["old"], c["ref"], c["mask"], clip=0.2))
        outs += [(kl_loss(k, c["logprobs"], c["ref"], c["mask"], c["old"].exp()), {}) for k in ("k2", "k3")]
        for losses, stats in outs:
            per_token += [losses.detach(), torch.autograd.grad(losses.sum(), c["logprobs"], retain_graph=True)[0]]
            sums += [losses.sum().detach(), *stats.values()]
        for aggregation in ("token_mean", "sequence_mean", "constant", "sequence_sum"):
            weights, denominator = token_weights(c["mask"], aggregation, MAX_LEN)  # type: ignore[arg-type]
            per_token.append(weights)
            sums.append(torch.tensor(denominator))
        for mode in ("token", "sequence", "product"):
            weights = importance_weight(c["old"], c["ref"], c["mask"], 1.2, mode)  # type: ignore[arg-type]
            per_token.append(weights.where(c["mask"], 0.0))
        sums += [*kl_stats(c["logprobs"], c["ref"], c["mask"]).values()]
        sums += [f(c["logprobs"], c["old"], c["mask"]) for f in (ratio_max, ratio_deviation)]
        return per_token, sums

    (tokens, sums), (wide_tokens, wide_sums) = everything(c), everything(wide)
    for a, b in zip(tokens, wide_tokens, strict=True):
        torch.testing.assert_close(a, b[:, kept], rtol=0, atol=1e-12)
    for a, b in zip(sums, wide_sums, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# --- TRL -------------------------------------------------------------------------------------------------------------


def trl_loss(c: dict[str, Tensor], *, loss_type: str, level: str = "token", **options: Any) -> Tensor:
    """What TRL 1.16's GRPOTrainer computes of these log-probabilities: its own `_compute_loss`, without a trainer."""
    from trl import GRPOTrainer

    n, t = c["mask"].shape
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (c["logprobs"], torch.zeros(n, t), None),
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=options.get("beta", 0.0),
        epsilon_low=options.get("clip_low", 0.2),
        epsilon_high=options.get("clip_high", 0.28),
        args=SimpleNamespace(
            delta=None, use_bias_correction_kl=options.get("corrected", False), steps_per_generation=1
        ),
        max_completion_length=MAX_LEN,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, **_: x, gather=lambda x: x),
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": torch.zeros(n, 2, dtype=torch.int64),
        "prompt_mask": torch.ones(n, 2, dtype=torch.int64),
        "completion_ids": torch.zeros(n, t, dtype=torch.int64),
        "completion_mask": c["mask"].long(),
        "advantages": c["advantages"],
        "old_per_token_logps": c["old"],
        "ref_per_token_logps": c["ref"],
        "num_items_in_batch": c["mask"].sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize(
    ("loss_type", "level", "surrogate", "aggregation"),
    [
        ("grpo", "token", "ppo", "sequence_mean"),
        ("dapo", "token", "ppo", "token_mean"),
        ("bnpo", "token", "ppo", "token_mean"),  # the same for one micro-batch: TRL's depends on how a batch is cut
        ("dr_grpo", "token", "ppo", "constant"),
        ("luspo", "token", "ppo", "sequence_sum"),
        ("grpo", "sequence", "gspo", "sequence_mean"),
        ("cispo", "token", "cispo", "token_mean"),
    ],
)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_equals_trl(loss_type: str, level: str, surrogate: str, aggregation: Any, beta: float) -> None:
    """Value and gradient; with a KL term (k3, which is the only one TRL has)."""
    c = case()
    c = {name: t[:3].detach() for name, t in c.items()}  # TRL counts answers without an action in its means
    c["logprobs"].requires_grad_()
    if level == "sequence":
        c["advantages"] = c["advantages"][:, :1].expand(3, T)
    function, options = SURROGATES[surrogate]
    clips = options | ({"clip_high": options["ratio_max"]} if surrogate == "cispo" else {})
    theirs = trl_loss(c, loss_type=loss_type, level=level, beta=beta, **clips)
    losses, _ = function(*policy_arguments(c), **options)
    if beta:
        losses = losses + beta * kl_loss("k3", c["logprobs"], c["ref"], c["mask"])
    weights, denominator = token_weights(c["mask"], aggregation, MAX_LEN)
    ours = (weights * losses).sum() / denominator
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    grads = [torch.autograd.grad(x, c["logprobs"])[0] for x in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-5)


def test_trls_corrected_kl_is_our_weighted_k2() -> None:
    """TRL's use_bias_correction_kl (DeepSeek-V3.2) differentiates ratio * k3: the gradient is that of ratio * k2 with
    a constant ratio, so it pulls on the reverse KL, where its uncorrected k3 pulls on the forward one."""
    c = {name: t[:3].detach() for name, t in case().items()}
    c["logprobs"].requires_grad_()
    both, plain = (
        trl_loss(c, loss_type="dapo", beta=beta, corrected=True, clip_low=0.2, clip_high=0.28) for beta in (0.1, 0.0)
    )
    (theirs,) = torch.autograd.grad(both - plain, c["logprobs"], retain_graph=True)
    ratio = (c["logprobs"] - c["old"]).exp()
    weights, denominator = token_weights(c["mask"], "token_mean", MAX_LEN)
    ours = (weights * kl_loss("k2", c["logprobs"], c["ref"], c["mask"], ratio)).sum() * 0.1 / denominator
    torch.testing.assert_close(torch.autograd.grad(ours, c["logprobs"])[0], theirs, rtol=0, atol=1e-10)
