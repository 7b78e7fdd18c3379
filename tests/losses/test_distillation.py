"""Divergences from a teacher: directions, temperature, vocabularies, top-k, and the logits that never exist."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmkit.losses import (
    IGNORE,
    DenseTeacher,
    LossSum,
    SoftTerm,
    TopKTeacher,
    distillation_loss,
    linear_cross_entropy,
    uld_loss,
)

N, D, DT, V = 40, 8, 6, 20
ROWS, ROWS_T = 24, 27  # both output embeddings have rows that belong to no token, not as many

FORWARD, REVERSE = SoftTerm("forward", 0.7, "forward"), SoftTerm("reverse", 1.3, "reverse")
JSDS = tuple(SoftTerm(f"jsd-{beta}", 0.9, "jsd", beta) for beta in (0.1, 0.5, 0.8))
TERMS = (FORWARD, REVERSE, *JSDS)


def case(dtype: torch.dtype = torch.float64, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor, DenseTeacher]:
    g = torch.Generator().manual_seed(0)
    hidden, weight, hidden_t, weight_t = (
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        for shape in ((5, N // 5, D), (ROWS, D), (5, N // 5, DT), (ROWS_T, DT))
    )
    labels = torch.randint(0, V, (5, N // 5), generator=g)
    labels[torch.rand(labels.shape, generator=g) < ignored] = IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(), labels, DenseTeacher(hidden_t, weight_t)


def supervised(labels: Tensor, *states: Tensor) -> list[Tensor]:
    return [x.flatten(0, -2)[labels.flatten() != IGNORE] for x in states]


def divergence(p: Tensor, q: Tensor, term: SoftTerm) -> Tensor:
    """From the definition, on probabilities."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum()

    if term.divergence == "forward":
        return kl(p, q)
    if term.divergence == "reverse":
        return kl(q, p)
    m = term.beta * p + (1 - term.beta) * q
    return term.beta * kl(p, m) + (1 - term.beta) * kl(q, m)


def naive(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: DenseTeacher,
    soft: Sequence[SoftTerm],
    ce_weight: float,
    T: float,
    z_loss: float = 0.0,
) -> Tensor:
    h, h_t = supervised(labels, hidden, teacher.hidden)
    y = labels[labels != IGNORE]
    logits, logits_t = (h @ weight.T)[:, :V], (h_t @ teacher.weight_VD.T)[:, :V]
    total = ce_weight * F.cross_entropy(logits, y, reduction="sum") + z_loss * logits.logsumexp(-1).square().sum()
    p, q = (logits_t / T).softmax(-1), (logits / T).softmax(-1)
    return total + sum(term.weight * T**2 * divergence(p, q, term) for term in soft)


def top_k(teacher: DenseTeacher, labels: Tensor, k: int, T: float = 1.0, vocab: int = V) -> TopKTeacher:
    """What a cache keeps."""
    (h_t,) = supervised(labels, teacher.hidden)
    logp = (F.linear(h_t, teacher.weight_VD)[:, :vocab] / T).log_softmax(-1)
    kept = logp.topk(k)
    return TopKTeacher(kept.indices, kept.values, logp.scatter(1, kept.indices, -math.inf).logsumexp(-1))


def gradients(out: LossSum | Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out.total if isinstance(out, LossSum) else out) * 0.37, of)


def close(a: Tensor, b: Tensor, bound: float) -> None:
    """Relative to the largest entry."""
    assert (a.double() - b.double()).abs().max() <= bound * b.double().abs().max().clamp_min(1)


# --- directions ------------------------------------------------------------------------------------------------------

P, Q = (0.5, 0.25, 0.125, 0.0625, 0.0625), (0.1, 0.2, 0.3, 0.15, 0.25)


def five_tokens(term: SoftTerm) -> float:
    """The loss of one position, the teacher saying P and the student Q."""
    teacher = DenseTeacher(torch.ones(1, 1, dtype=torch.float64), torch.tensor(P, dtype=torch.float64).log()[:, None])
    weight = torch.tensor(Q, dtype=torch.float64).log()[:, None]
    hidden, labels = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    options = {"ce_weight": 0.0, "temperature": 1.0, "vocab_size": 5}
    return distillation_loss(hidden, weight, labels, teacher, [term], **options).total.item()  # type: ignore[arg-type]


def test_directions_on_five_tokens() -> None:
    """B89: written out in closed form; the two directions differ, and jsd is between them."""
    forward = sum(p * math.log(p / q) for p, q in zip(P, Q, strict=True))
    reverse = sum(q * math.log(q / p) for p, q in zip(P, Q, strict=True))
    assert forward != pytest.approx(reverse, rel=0.05)
    assert five_tokens(SoftTerm("x", 1.0, "forward")) == pytest.approx(forward, abs=1e-14)
    assert five_tokens(SoftTerm("x", 1.0, "reverse")) == pytest.approx(reverse, abs=1e-14)
    for beta in (0.1, 0.5, 0.9):
        m = [beta * p + (1 - beta) * q for p, q in zip(P, Q, strict=True)]
        jsd = beta * sum(p * math.log(p / x) for p, x in zip(P, m, strict=True))
        jsd += (1 - beta) * sum(q * math.log(q / x) for q, x in zip(Q, m, strict=True))
        assert five_tokens(SoftTerm("x", 1.0, "jsd", beta)) == pytest.approx(jsd, abs=1e-14)
    tiny = 1e-6  # towards its ends jsd goes to 0 as these do
    assert five_tokens(SoftTerm("x", 1.0, "jsd", tiny)) / tiny == pytest.approx(forward, rel=1e-4)
    assert five_tokens(SoftTerm("x", 1.0, "jsd", 1 - tiny)) / tiny == pytest.approx(reverse, rel=1e-4)


@pytest.mark.parametrize("term", TERMS, ids=lambda t: t.name)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_equals_trl(term: SoftTerm, temperature: float) -> None:
    """B89, B90: TRL's generalised JSD, whose beta is ours, 0 and 1 at its ends, and which has no T^2."""
    gkd = pytest.importorskip("trl.experimental.gkd")
    hidden, weight, labels, teacher = case()
    ours = distillation_loss(
        hidden, weight, labels, teacher, [term], ce_weight=0, temperature=temperature, vocab_size=V, chunk=7
    )
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        (hidden @ weight.T)[..., :V],
        (teacher.hidden @ teacher.weight_VD.T)[..., :V],
        labels,
        beta={"forward": 0, "reverse": 1, "jsd": term.beta}[term.divergence],
        temperature=temperature,
        reduction="sum",
    )
    close(ours.parts[term.name], temperature**2 * theirs.detach(), 1e-6)  # it holds its beta in fp32
    close(ours.total.detach(), term.weight * ours.parts[term.name], 1e-14)


# --- value and gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [(FORWARD,), (REVERSE,), (JSDS[0],), (JSDS[2],), TERMS, ()], ids=len)
@pytest.mark.parametrize("ce_weight", [0.0, 0.6])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("kept", [None, V])
def test_equals_naive(soft: tuple[SoftTerm, ...], ce_weight: float, temperature: float, kept: int | None) -> None:
    """B89, B91: value and gradients in fp64, of the teacher itself and of all it says; N no multiple of the chunk."""
    hidden, weight, labels, teacher = case()
    z_loss = 0.01 if ce_weight else 0.0
    wanted = naive(hidden, weight, labels, teacher, soft, ce_weight, temperature, z_loss)
    asked = {"ce_weight": ce_weight, "temperature": temperature, "vocab_size": V, "z_loss": z_loss}
    given = teacher if kept is None else top_k(teacher, labels, kept, temperature)
    learnt = bool(soft or ce_weight)
    wanted_grads = gradients(wanted, hidden, weight) if learnt else ()
    for chunk in (1, 7, N, None):
        out = distillation_loss(hidden, weight, labels, given, soft, chunk=chunk, **asked)  # type: ignore[arg-type]
        close(out.total, torch.as_tensor(wanted), 1e-12)
        assert torch.equal(out.parts["loss"], out.total.detach())
        if learnt:
            grads = gradients(out, hidden, weight)
            for ours, theirs in zip(grads, wanted_grads, strict=True):
                close(ours, theirs, 1e-12)
            assert not grads[1][V:].any()


def test_parts_are_unweighted_and_only_what_was_asked_for() -> None:
    hidden, weight, labels, teacher = case()
    options = {"temperature": 2.0, "vocab_size": V}
    out = distillation_loss(hidden, weight, labels, teacher, TERMS, ce_weight=0.3, accuracy=True, **options)  # type: ignore[arg-type]
    plain = linear_cross_entropy(hidden, weight[:V], labels, accuracy=True)
    close(out.parts["ce"], plain.parts["loss"], 1e-14)
    assert torch.equal(out.parts["accuracy"], plain.parts["accuracy"])
    by_hand = 0.3 * out.parts["ce"] + sum(t.weight * out.parts[t.name] for t in TERMS)
    close(out.total, by_hand, 1e-14)
    out = distillation_loss(hidden, weight, labels, teacher, [FORWARD], ce_weight=0.0, **options)  # type: ignore[arg-type]
    assert list(out.parts) == ["loss", "forward"]
    out = distillation_loss(hidden, weight, labels, None, [], ce_weight=1.0, **options)  # type: ignore[arg-type]
    assert list(out.parts) == ["loss", "ce"]
    close(out.total, plain.total, 1e-14)


def test_nothing_asked_is_nothing_learnt() -> None:
    hidden, weight, labels, _ = case()
    out = distillation_loss(hidden, weight, labels, None, [], ce_weight=0.0, temperature=1.0, vocab_size=V)
    assert out.total == 0
    assert torch.autograd.grad(out.total, (hidden, weight), allow_unused=True) == (None, None)


def test_no_supervised_position() -> None:
    hidden, weight, labels, teacher = case(ignored=1.1)
    for given in (teacher, top_k(teacher, labels, 3)):
        out = distillation_loss(hidden, weight, labels, given, TERMS, ce_weight=1.0, temperature=2.0, vocab_size=V)
        assert out.total == 0
        assert not any(grad.any() for grad in gradients(out, hidden, weight))


def test_frozen_sides_and_no_gradient() -> None:
    """A frozen head, frozen states, and evaluation: the same value, and no gradient where none was asked for."""
    hidden, weight, labels, teacher = case()
    options = {"ce_weight": 0.5, "temperature": 1.5, "vocab_size": V}
    whole = distillation_loss(hidden, weight, labels, teacher, TERMS, **options)  # type: ignore[arg-type]
    wanted = gradients(whole, hidden, weight)
    for i, frozen in enumerate([(hidden, weight.detach()), (hidden.detach(), weight)]):
        out = distillation_loss(*frozen, labels, teacher, TERMS, **options)  # type: ignore[arg-type]
        assert torch.equal(out.total, whole.total)
        torch.testing.assert_close(gradients(out, frozen[i])[0], wanted[i], rtol=0, atol=1e-14)
    with torch.no_grad():
        out = distillation_loss(hidden, weight, labels, teacher, TERMS, **options)  # type: ignore[arg-type]
    assert torch.equal(out.total, whole.total) and not out.total.requires_grad


# --- what must not move a student ------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", TERMS, ids=lambda t: t.name)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_to_its_teacher_nothing_is_learnt(term: SoftTerm, temperature: float, dtype: torch.dtype) -> None:
    """Exactly 0 beside the teacher itself; up to the rounding of what a cache keeps beside that, for any k."""
    hidden, weight, labels, _ = case(dtype)
    teacher = DenseTeacher(hidden.detach(), weight.detach())
    options = {"ce_weight": 0.0, "temperature": temperature, "vocab_size": V}
    out = distillation_loss(hidden, weight, labels, teacher, [term], **options)  # type: ignore[arg-type]
    assert out.total == 0
    assert not any(grad.any() for grad in gradients(out, hidden, weight))
    if dtype == torch.bfloat16:
        return
    for k in (1, 3, V):
        cached = top_k(teacher, labels, k, temperature)
        out = distillation_loss(hidden, weight, labels, cached, [term], **options)  # type: ignore[arg-type]
        bound = 1e-13 if dtype == torch.float64 else 2e-5
        assert abs(out.total.item()) < bound
        assert all(grad.abs().max() < bound for grad in gradients(out, hidden, weight))


@pytest.mark.parametrize("term", [FORWARD, REVERSE, JSDS[1]], ids=lambda t: t.name)
def test_gradient_does_not_depend_on_a_high_temperature(term: SoftTerm) -> None:
    """B90: as T grows, T^2 x divergence goes to half the (weighted) mean square of the centred logits' difference."""
    hidden, weight, labels, teacher = case()
    h, h_t = supervised(labels, hidden.detach(), teacher.hidden)
    gap = F.linear(h, weight.detach()[:V]) - F.linear(h_t, teacher.weight_VD[:V])
    gap -= gap.mean(-1, keepdim=True)
    share = term.beta * (1 - term.beta) if term.divergence == "jsd" else 1.0
    wanted = torch.autograd.grad(
        (hidden.flatten(0, 1)[labels.flatten() != IGNORE] @ weight[:V].T * gap * share * term.weight / V).sum(), weight
    )[0]
    errors = []
    for T in (100.0, 200.0, 400.0):
        out = distillation_loss(hidden, weight, labels, teacher, [term], ce_weight=0, temperature=T, vocab_size=V)
        grad = torch.autograd.grad(out.total, weight)[0]
        errors.append(((grad - wanted).norm() / wanted.norm()).item())
    assert errors[0] < 0.1 and errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1]


def test_padded_columns_say_nothing() -> None:
    """B91: huge numbers in the rows that belong to no token, on either side, change no bit."""
    hidden, weight, labels, teacher = case()
    with torch.no_grad():
        wild, wild_t = weight.clone(), teacher.weight_VD.clone()
        wild[V:], wild_t[V:] = 1e4, -1e4
    outs = []
    for w, t in ((weight, teacher), (wild.requires_grad_(), DenseTeacher(teacher.hidden, wild_t))):
        out = distillation_loss(hidden, w, labels, t, TERMS, ce_weight=0.5, temperature=2.0, vocab_size=V, z_loss=0.1)
        outs.append((out.total, *gradients(out, hidden, w)))
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


# --- top-k -----------------------------------------------------------------------------------------------------------


def of_buckets(p: Tensor, ids: Tensor) -> Tensor:
    """[N, k + 1]: the kept probabilities, and that of all others together."""
    kept = p.gather(1, ids)
    return torch.cat([kept, p.scatter(1, ids, 0).sum(-1, keepdim=True)], 1)


@pytest.mark.parametrize("k", [1, 4, V - 1])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("term", [FORWARD, REVERSE, JSDS[0]], ids=lambda t: t.name)
def test_top_k_compares_k_events_and_the_rest(k: int, temperature: float, term: SoftTerm) -> None:
    """Value and gradient against k + 1 probabilities made from whole softmaxes, on both sides alike."""
    hidden, weight, labels, teacher = case()
    cached = top_k(teacher, labels, k, temperature)
    h, h_t = supervised(labels, hidden, teacher.hidden)
    q, p = ((x @ w[:V].T / temperature).softmax(-1) for x, w in ((h, weight), (h_t, teacher.weight_VD)))
    wanted = temperature**2 * term.weight * divergence(of_buckets(p, cached.ids_NK), of_buckets(q, cached.ids_NK), term)
    wanted_grads = gradients(wanted, hidden, weight)
    for chunk in (7, None):
        out = distillation_loss(
            hidden, weight, labels, cached, [term], ce_weight=0, temperature=temperature, vocab_size=V, chunk=chunk
        )
        close(out.total, wanted, 1e-12)
        for ours, theirs in zip(gradients(out, hidden, weight), wanted_grads, strict=True):
            close(ours, theirs, 1e-11)
    dense = distillation_loss(
        hidden, weight, labels, teacher, [term], ce_weight=0, temperature=temperature, vocab_size=V
    )
    # What is put together can't be told apart; a last token alone is no less known.
    assert out.total < dense.total or (k == V - 1 and out.total.item() == pytest.approx(dense.total.item(), rel=1e-12))


@pytest.mark.parametrize("soft", [(FORWARD,), (REVERSE,), JSDS], ids=["forward", "reverse", "jsd"])
def test_all_tokens_kept_equals_the_teacher(soft: tuple[SoftTerm, ...]) -> None:
    """To 1e-6 in fp32, with what is kept in any order; from bf16 within 1 %."""
    hidden, weight, labels, teacher = case(torch.float32)
    options = {"ce_weight": 0.5, "temperature": 1.0, "vocab_size": V}
    dense = distillation_loss(hidden, weight, labels, teacher, soft, **options)  # type: ignore[arg-type]
    dense_grads = gradients(dense, hidden, weight)
    kept = top_k(teacher, labels, V)
    order = torch.randperm(V, generator=torch.Generator().manual_seed(0))
    for cached in (kept, TopKTeacher(kept.ids_NK[:, order], kept.logprobs_NK[:, order], kept.tail_N)):
        out = distillation_loss(hidden, weight, labels, cached, soft, **options)  # type: ignore[arg-type]
        close(out.total, dense.total, 1e-6)
        for ours, theirs in zip(gradients(out, hidden, weight), dense_grads, strict=True):
            close(ours, theirs, 1e-6)
    halved = TopKTeacher(kept.ids_NK, kept.logprobs_NK.bfloat16(), kept.tail_N.bfloat16())
    out = distillation_loss(hidden, weight, labels, halved, soft, **options)  # type: ignore[arg-type]
    assert out.total.item() == pytest.approx(dense.total.item(), rel=0.01)


def test_extreme_tails_stay_finite() -> None:
    """A teacher that is as good as certain, against a student that is so of another token, and the other way round."""
    hidden = torch.ones(2, 1, requires_grad=True)
    weight = torch.tensor([[300.0], [0.0], [-300.0], [1.0]], requires_grad=True)
    labels = torch.zeros(2, dtype=torch.int64)
    ids = torch.tensor([[2, 1], [0, 1]])
    cached = TopKTeacher(ids, torch.tensor([[0.0, -80.0], [0.0, -300.0]]), torch.tensor([-math.inf, -200.0]))
    dense = DenseTeacher(torch.ones(2, 1), -weight.detach())
    for teacher in (cached, dense):
        for term in TERMS:
            out = distillation_loss(hidden, weight, labels, teacher, [term], ce_weight=0, temperature=1.0, vocab_size=4)
            assert out.total.isfinite() and all(grad.isfinite().all() for grad in gradients(out, hidden, weight))
            if term.divergence == "jsd":  # bounded by the entropy of (beta, 1 - beta)
                bound = -(term.beta * math.log(term.beta) + (1 - term.beta) * math.log(1 - term.beta))
                assert out.parts[term.name] <= 2 * bound + 1e-5


# --- precision, memory, refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [(FORWARD,), (REVERSE,), JSDS], ids=["forward", "reverse", "jsd"])
def test_bf16_inputs(soft: tuple[SoftTerm, ...]) -> None:
    """Statistics are fp32: against fp64 on the same rounded logits, single precision; gradients come in bf16."""
    hidden, weight, labels, teacher = case(torch.bfloat16)
    out = distillation_loss(
        hidden, weight, labels, teacher, soft, ce_weight=0.5, temperature=2.0, vocab_size=V, chunk=9
    )
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = naive(*wide, labels, DenseTeacher(teacher.hidden.double(), teacher.weight_VD.double()), soft, 0.5, 2.0)  # type: ignore[arg-type]
    assert out.total.dtype == torch.float32
    close(out.total, exact, 2e-3)  # the products are rounded to bf16, as in training
    for ours, theirs in zip(gradients(out, hidden, weight), gradients(exact, *wide), strict=True):
        assert ours.dtype == torch.bfloat16
        close(ours, theirs, 2e-2)
    h, h_t = supervised(labels, hidden, teacher.hidden)
    logits, logits_t = (F.linear(x, w)[:, :V].double() for x, w in ((h, weight), (h_t, teacher.weight_VD)))
    p, q = (logits_t / 2).softmax(-1), (logits / 2).softmax(-1)
    for term in soft:
        close(out.parts[term.name], 4 * divergence(p, q, term), 1e-6)


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that are still there, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and not func.is_view:
                storage = t.untyped_storage()
                if (key := storage._cdata) not in self.seen:
                    self.seen.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, n_bytes: int) -> None:
        self.seen.discard(key)
        self.now -= n_bytes


def peak_of(run: Callable[[], Tensor]) -> int:
    gc.collect()
    with Live() as live:
        run().backward()
    return live.peak


@pytest.mark.parametrize("term", [FORWARD, JSDS[1]], ids=lambda t: t.name)
@pytest.mark.parametrize("cached", [False, True])
def test_memory_at_a_large_vocabulary(term: SoftTerm, cached: bool) -> None:
    """With 128k tokens at most 0.2 of what whole logits of both models take."""
    n, d, v = 384, 2, 128_000
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, d, generator=g).requires_grad_() for shape in (n, v))
    teacher = DenseTeacher(torch.randn(n, d, generator=g), torch.randn(v, d, generator=g))
    labels = torch.randint(0, v, (n,), generator=g)
    given = (
        TopKTeacher(*(torch.zeros(n, 8, dtype=t) for t in (torch.int64, torch.float32)), torch.zeros(n))
        if cached
        else teacher
    )
    if isinstance(given, TopKTeacher):
        given.ids_NK[:] = torch.arange(8)

    def ours() -> Tensor:
        return distillation_loss(
            hidden, weight, labels, given, [term], ce_weight=0.5, temperature=1.0, vocab_size=v
        ).total

    def whole() -> Tensor:
        logits, logits_t = F.linear(hidden, weight), F.linear(teacher.hidden, teacher.weight_VD)
        logq, logp = logits.log_softmax(-1), logits_t.log_softmax(-1)
        return F.kl_div(logq, logp, log_target=True, reduction="sum") + 0.5 * F.cross_entropy(logits, labels)

    assert peak_of(ours) <= 0.2 * peak_of(whole)


def test_refusals() -> None:
    """B91: every mismatch names the two numbers."""
    hidden, weight, labels, teacher = case()
    n = int((labels != IGNORE).sum())
    cached = top_k(teacher, labels, 4)
    short = TopKTeacher(cached.ids_NK[1:], cached.logprobs_NK[1:], cached.tail_N[1:])
    odd = TopKTeacher(cached.ids_NK, cached.logprobs_NK[:, :3], cached.tail_N)
    small = DenseTeacher(teacher.hidden, teacher.weight_VD[: V - 1])
    few = DenseTeacher(teacher.hidden[1:], teacher.weight_VD)
    for given, message in (
        (None, "needs a teacher"),
        (short, f"speaks of {n - 1} positions, the labels of {n} "),
        (odd, "don't fit each other"),
        (small, f"the teacher's output embedding has {V - 1} rows, for {V} tokens"),
        (few, f"speaks of {N - N // 5} positions, the labels of {n} "),
    ):
        with pytest.raises(ValueError, match=message):
            distillation_loss(hidden, weight, labels, given, [FORWARD], ce_weight=1, temperature=1.0, vocab_size=V)
    with pytest.raises(ValueError, match=f"the student's output embedding has {ROWS} rows, for {ROWS + 1} tokens"):
        distillation_loss(hidden, weight, labels, None, [], ce_weight=1, temperature=1.0, vocab_size=ROWS + 1)
    with pytest.raises(ValueError, match="names of their own, not: loss, ce, forward, forward"):
        twice = [FORWARD, FORWARD]
        distillation_loss(hidden, weight, labels, teacher, twice, ce_weight=1, temperature=1.0, vocab_size=V)
    with pytest.raises(ValueError, match=f"top {V} of {V - 1} tokens"):
        whole = top_k(teacher, labels, V)
        distillation_loss(hidden, weight, labels, whole, [FORWARD], ce_weight=1, temperature=1.0, vocab_size=V - 1)


# --- other tokenizers ------------------------------------------------------------------------------------------------


def uld_naive(q: Tensor, p: Tensor) -> Tensor:
    width = max(q.shape[1], p.shape[1])
    q, p = (F.pad(x.sort(-1, descending=True).values, (0, width - x.shape[1])) for x in (q, p))
    return (q - p).abs().sum()


@pytest.mark.parametrize("sizes", [(V, V), (V, 13), (13, V), (ROWS, ROWS_T)])
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_uld_equals_naive(sizes: tuple[int, int], chunk: int | None) -> None:
    """Either vocabulary may be the larger; rows beyond a vocabulary are cut off."""
    hidden, weight, _, teacher = case()
    h, h_t = hidden.flatten(0, 1), teacher.hidden.flatten(0, 1)
    out = uld_loss(h, weight, h_t, teacher.weight_VD, vocab_size=sizes[0], teacher_vocab_size=sizes[1], chunk=chunk)
    wanted = uld_naive((h @ weight[: sizes[0]].T).softmax(-1), (h_t @ teacher.weight_VD[: sizes[1]].T).softmax(-1))
    close(out.total, wanted, 1e-13)
    assert torch.equal(out.parts["uld"], out.total.detach())
    for ours, theirs in zip(gradients(out, hidden, weight), gradients(wanted, hidden, weight), strict=True):
        close(ours, theirs, 1e-13)


def test_uld_sees_no_names() -> None:
    """The same probabilities under other ids: 0, with no gradient; and a student that differs is drawn to the teacher."""
    hidden, weight, _, _ = case()
    h = hidden.flatten(0, 1)
    mixed = weight.detach()[torch.randperm(V, generator=torch.Generator().manual_seed(1))]
    out = uld_loss(h, weight[:V], h.detach(), mixed, vocab_size=V, teacher_vocab_size=V)
    assert out.total < 1e-12  # the softmax adds up in another order
    same = uld_loss(h, weight, h.detach(), weight.detach(), vocab_size=V, teacher_vocab_size=V)
    assert same.total == 0 and not any(grad.any() for grad in gradients(same, hidden, weight))
    student = torch.zeros(N, D, dtype=torch.float64, requires_grad=True)
    losses = []
    for _ in range(60):
        out = uld_loss(student, weight.detach(), h.detach(), mixed, vocab_size=V, teacher_vocab_size=V)
        losses.append(out.total.item())
        with torch.no_grad():
            student -= 0.3 * torch.autograd.grad(out.total, student)[0]
    assert losses[-1] < 0.3 * losses[0]


def test_uld_refuses_what_does_not_fit() -> None:
    hidden, weight, _, teacher = case()
    h, h_t = hidden.flatten(0, 1), teacher.hidden.flatten(0, 1)
    with pytest.raises(ValueError, match=f"the teacher speaks of {N - 1} positions, the student of {N}"):
        uld_loss(h, weight, h_t[1:], teacher.weight_VD, vocab_size=V, teacher_vocab_size=V)
    with pytest.raises(ValueError, match=f"the teacher's output embedding has {ROWS_T} rows, for 99 tokens"):
        uld_loss(h, weight, h_t, teacher.weight_VD, vocab_size=V, teacher_vocab_size=99)
