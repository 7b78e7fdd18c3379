"""Log-probabilities and full KL: equal to the logits that never exist, and to what the sampler computes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmkit.inference.sampling import log_probs
from llmkit.losses import IGNORE, full_kl, linear_cross_entropy, token_logprobs

B, T, D, V, ROWS = 3, 11, 8, 20, 24  # the embedding has four rows that belong to no token


def case(dtype: torch.dtype = torch.float64, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=g, dtype=torch.float64)
    weight = torch.randn(ROWS, D, generator=g, dtype=torch.float64)
    labels = torch.randint(0, V, (B, T), generator=g)
    labels[torch.rand(B, T, generator=g) < ignored] = IGNORE
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def upstream(seed: int) -> Tensor:
    """What a loss might weigh the positions with: any sign, some of them 0."""
    weights = torch.randn(B, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return weights * (weights.abs() > 0.3)


def naive(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Position by position, from the formula."""
    logprobs, entropies = [], []
    for h, label in zip(hidden.reshape(-1, D), labels.reshape(-1).tolist(), strict=True):
        z = weight[:V] @ h / temperature
        p = z.exp() / z.exp().sum()
        logprobs.append(p[label].log() if label != IGNORE else z.sum() * 0)
        entropies.append(-(p * p.log()).sum() if label != IGNORE else z.sum() * 0)
    return torch.stack(logprobs).view(B, T), torch.stack(entropies).view(B, T)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.3])
@pytest.mark.parametrize("chunk", [None, 1, 7, 100])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_equals_a_loop(temperature: float, chunk: int | None, ignored: float) -> None:
    """B62, B73: value and gradients, temperature and cut vocabulary included, kept logits and recomputed ones."""
    hidden, weight, labels = case(ignored=ignored)
    ours = token_logprobs(hidden, weight, labels, temperature=temperature, vocab_size=V, chunk=chunk, entropy=True)
    theirs = naive(hidden, weight, labels, temperature)
    for a, b in zip(ours, theirs, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for terms in ((1, 0), (0, 1), (1, 1)):  # log-probabilities alone, entropy alone, both
        grads = [
            torch.autograd.grad(
                sum((x * upstream(i)).sum() for i, (x, on) in enumerate(zip(pair, terms, strict=True)) if on),
                (hidden, weight),
                retain_graph=True,
            )
            for pair in (ours, theirs)
        ]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
        assert not grads[0][1][V:].any()


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_the_samplers_distribution(temperature: float, dtype: torch.dtype) -> None:
    """B73, D6: bit by bit, given the same logits."""
    hidden, weight, labels = case(dtype, ignored=0.0)
    ours, _ = token_logprobs(hidden, weight, labels, temperature=temperature, vocab_size=V)
    logits = torch.nn.functional.linear(hidden.detach().view(-1, D), weight.detach())
    sampler = log_probs(logits, temperature, V).gather(1, labels.view(-1, 1)).view(B, T)
    torch.testing.assert_close(ours.detach(), sampler, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-13)


def test_agrees_with_the_cross_entropy() -> None:
    """The sum of log-probabilities is the other loss with its sign changed: one definition of a label's place."""
    hidden, weight, labels = case()
    ours, _ = token_logprobs(hidden, weight, labels)
    total = linear_cross_entropy(hidden, weight, labels).total
    assert ours.sum().item() == pytest.approx(-total.item(), abs=1e-10)


def test_bf16_is_wide_from_the_logits_on() -> None:
    """B12."""
    hidden, weight, labels = case(torch.bfloat16, ignored=0.0)
    ours, entropy = token_logprobs(hidden, weight, labels, vocab_size=V, entropy=True)
    assert entropy is not None and ours.dtype == entropy.dtype == torch.float32
    logits = torch.nn.functional.linear(hidden, weight[:V]).detach().double()
    exact = torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(ours.detach().double(), exact, rtol=0, atol=1e-5)
    grads = torch.autograd.grad((ours * upstream(0).float()).sum(), (hidden, weight))
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact_grads = torch.autograd.grad((naive(*wide, labels, 1.0)[0] * upstream(0)).sum(), wide)
    for a, b in zip(grads, exact_grads, strict=True):
        assert a.dtype == torch.bfloat16 and (a.double() - b).norm() <= 2e-2 * b.norm()


def test_ignored_positions_have_no_influence() -> None:
    """B8, B76: NaN at an ignored position changes nothing; nothing but ignored positions is a zero with a graph."""
    hidden, weight, labels = case()
    spoilt = torch.where((labels == IGNORE)[..., None], torch.nan, hidden.detach()).requires_grad_()
    grads = []
    for h in (hidden, spoilt):
        logprobs, entropy = token_logprobs(h, weight, labels, entropy=True)
        assert entropy is not None and not logprobs[labels == IGNORE].any() and not entropy[labels == IGNORE].any()
        grads.append(torch.autograd.grad((logprobs + entropy).sum(), (h, weight)))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
    nothing, _ = token_logprobs(hidden, weight, torch.full_like(labels, IGNORE))
    assert not nothing.any()
    for grad, t in zip(torch.autograd.grad(nothing.sum(), (hidden, weight)), (hidden, weight), strict=True):
        assert torch.equal(grad, torch.zeros_like(t))


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_parts_get_no_gradient(frozen: int) -> None:
    """LoRA: the head is frozen; or only the head is trained."""
    whole = case()
    (expected,) = torch.autograd.grad(token_logprobs(*whole)[0].sum(), whole[1 - frozen])
    part = case()
    part[frozen].requires_grad_(False)
    (got,) = torch.autograd.grad(token_logprobs(*part)[0].sum(), part[1 - frozen])
    assert torch.equal(got, expected)


class Largest(TorchDispatchMode):
    """The most elements that a tensor made by an operation has."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            outs = out if isinstance(out, tuple | list) else [out]
            self.size = max([self.size, *(t.numel() for t in outs if isinstance(t, Tensor))])
        return out


def test_full_logits_never_exist() -> None:
    """Given a chunk, nothing as large as [N, V] is made, forward or backward; of neither model for the full KL."""
    n, d, v, chunk = 512, 8, 1000, 16
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    ref, ref_weight = torch.randn(n, d), torch.randn(v, d)
    with Largest() as largest:
        logprobs, entropy = token_logprobs(hidden, weight, torch.randint(0, v, (n,)), chunk=chunk, entropy=True)
        assert entropy is not None
        kl = full_kl(hidden, weight, ref, ref_weight, torch.ones(n, dtype=torch.bool), chunk=chunk)
        (logprobs + entropy + kl).sum().backward()
    assert largest.size <= max(chunk * v, v * d, n * d) < n * v / 10


def test_evaluation_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old and reference log-probabilities are asked for without a gradient: the logits of one chunk at a time."""
    monkeypatch.setattr("llmkit.losses.logprobs._CHUNK", 16 * 1000)
    hidden, weight = torch.randn(512, 8, requires_grad=True), torch.randn(1000, 8)
    with torch.no_grad(), Largest() as largest:
        logprobs, _ = token_logprobs(hidden, weight, torch.zeros(512, dtype=torch.int64))
    assert largest.size <= 16 * 1000 and not logprobs.requires_grad


# --- the whole KL ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 1, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_full_kl(chunk: int | None, temperature: float) -> None:
    """B80: value and gradient against the formula; the reference may have another width and more rows."""
    hidden, weight, labels = case()
    g = torch.Generator().manual_seed(3)
    ref = torch.randn(B, T, 5, generator=g, dtype=torch.float64, requires_grad=True)
    ref_weight = torch.randn(V + 1, 5, generator=g, dtype=torch.float64)
    mask = labels != IGNORE
    ours = full_kl(hidden, weight, ref, ref_weight, mask, temperature=temperature, vocab_size=V, chunk=chunk)
    logp, logq = (
        torch.log_softmax(h @ w[:V].T / temperature, -1) for h, w in ((hidden, weight), (ref.detach(), ref_weight))
    )
    theirs = (logp.exp() * (logp - logq)).sum(-1) * mask
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert (ours[mask] > 0).all() and not ours[~mask].any()
    grads = [torch.autograd.grad((x * upstream(1)).sum(), (hidden, weight)) for x in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    assert torch.autograd.grad(ours.sum() + ref.sum() * 0, ref)[0].eq(0).all()  # the reference is not trained


def test_kl_of_a_model_and_itself_is_zero() -> None:
    """D6: to the bit, and without a gradient."""
    hidden, weight, labels = case()
    kl = full_kl(hidden, weight, hidden, weight, labels != IGNORE)
    assert not kl.any()
    assert not any(g.any() for g in torch.autograd.grad(kl.sum(), (hidden, weight)))


def test_entropy_is_that_of_the_distribution() -> None:
    """A head that knows nothing: log V, and no gradient, since it is the maximum."""
    hidden, _, labels = case()
    weight = torch.zeros(ROWS, D, dtype=torch.float64, requires_grad=True)
    _, entropy = token_logprobs(hidden, weight, labels, vocab_size=V, entropy=True)
    assert entropy is not None
    torch.testing.assert_close(entropy[labels != IGNORE].detach().unique(), torch.tensor([math.log(V)]).double())
    assert torch.autograd.grad(entropy.sum(), weight)[0].abs().max() < 1e-12
