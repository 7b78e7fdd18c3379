"""What a teacher's distribution over the next token teaches: cross entropy and divergences in one pass over the logits.

Shapes: N supervised positions, C of them at once, D width (the teacher's may differ), V vocabulary, K of its tokens kept
by a cache, E events that are compared: the V tokens, or the K kept ones and all others together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llmkit.losses.base import IGNORE, LossSum
from llmkit.losses.logprobs import HeadGradient
from llmkit.products import linear

_CHUNK, _CHUNK_GPU = 2**21, 2**25  # elements of [C, V] at once
_ROWS, _ROWS_GPU = (64, 256), (256, 4096)  # of them, at least and at most: few make products slow, many leave the cache


@dataclass(frozen=True)
class SoftTerm:
    """A divergence between the teacher's distribution and the student's, at the temperature of both.

    With P the teacher's and Q the student's: forward: KL(P || Q); reverse: KL(Q || P); jsd: beta KL(P || M) +
    (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q (GKD, arXiv 2306.13649). As beta goes to 0, jsd / beta goes to
    forward, and as it goes to 1, jsd / (1 - beta) to reverse; the two have names of their own for that reason.
    """

    name: str
    weight: float = 1.0
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    beta: float = 0.5


@dataclass(frozen=True)
class DenseTeacher:
    """The teacher itself: its states after the final norm at the student's positions, and its output embedding."""

    hidden: Tensor
    weight_VD: Tensor


@dataclass(frozen=True)
class TopKTeacher:
    """What is left of the teacher's distributions in a cache, at the temperature of the loss. N supervised positions, in
    row-major order; the ids of a position are distinct."""

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_N: Tensor
    """Log of the probability of all other tokens together; -inf where there is none."""


def distillation_loss(
    hidden: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    teacher: DenseTeacher | TopKTeacher | None,
    soft: Sequence[SoftTerm],
    *,
    ce_weight: float,
    temperature: float,
    vocab_size: int,
    chunk: int | None = None,
    z_loss: float = 0.0,
    accuracy: bool = False,
) -> LossSum:
    """Sum over supervised positions of ce_weight x cross entropy + sum of weight x temperature^2 x divergence.

    temperature^2 keeps the size of the gradient whatever the temperature (Hinton et al. 2015, arXiv 1503.02531). Both
    sides' columns from vocab_size on are cut off before the softmax. Statistics are fp32 or better; memory is a few times
    chunk x V for both models together. The teacher gets no gradient. May be differentiated once.

    A top-k teacher is compared with the student over K + 1 events, its K tokens and all the others together, on both
    sides alike: no token is renormalised away, and a student that equals the teacher has nothing to learn. What rounding
    has taken from the teacher's K + 1 probabilities is given back in proportion.

    Args:
        hidden: [..., D] the student's states after the final norm.
        weight_VD: its output embedding; vocab_size rows or more.
        labels: [...] int64, the id of the next token; IGNORE where nothing is trained.
        teacher: what it says; only read where there are soft terms.
        soft: the divergences. Their logits are made once, together with those of the cross entropy.
        ce_weight: of the cross entropy on the labels; 0: it is not computed.
        temperature: divides the logits of both in the soft terms.
        vocab_size: the tokenizer's size.
        chunk: positions whose logits exist at once; None: what is fast in little memory.
        z_loss: weight of logsumexp(logits)^2, as in `linear_cross_entropy`.
        accuracy: also counts the labels that have the highest score.

    Returns:
        total; parts `loss` (the same, detached), each soft term by its name (temperature^2 x divergence, unweighted) and,
        where asked for, `ce` (nats, unweighted), `z_loss` and `accuracy`.

    Raises:
        ValueError: soft terms without a teacher or of one name, or a teacher of other positions or of too few tokens.
    """
    hidden_ND, labels_N = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    keep_N = labels_N != IGNORE
    whole = bool(keep_N.all())
    if not whole:
        hidden_ND, labels_N = hidden_ND[keep_N], labels_N[keep_N]
    if soft and isinstance(teacher, DenseTeacher):
        states_ND = teacher.hidden.detach().reshape(-1, teacher.hidden.shape[-1])
        if len(states_ND) == len(keep_N):
            states_ND = states_ND if whole else states_ND[keep_N]
        teacher = DenseTeacher(states_ND, teacher.weight_VD.detach())
    _check(len(labels_N), len(weight_VD), teacher, soft, vocab_size)
    asked = bool(soft or ce_weight or z_loss)
    train = asked and torch.is_grad_enabled() and (hidden.requires_grad or weight_VD.requires_grad)
    chunk = chunk or rows_at_once(hidden.device, vocab_size)
    plan = _Plan(tuple(soft), ce_weight, temperature, vocab_size, chunk, z_loss, accuracy, train)
    if len(set(plan.names)) < len(plan.names) or "loss" in plan.names:
        raise ValueError(f"the parts of a loss need names of their own, not: loss, {', '.join(plan.names)}")
    total, *sums = _Distillation.apply(hidden_ND, weight_VD, labels_N, teacher if soft else None, plan)
    parts = {"loss": total.detach()} | dict(zip(plan.names, sums, strict=True))
    return LossSum(total, parts)


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _zero(like: Tensor) -> Tensor:
    """What sums over chunks start from: fp64, where the device has it."""
    return torch.zeros((), dtype=_wide(like) if like.device.type == "mps" else torch.float64, device=like.device)


def rows_at_once(device: torch.device, vocab: int) -> int:
    gpu = device.type == "cuda"
    least, most = _ROWS_GPU if gpu else _ROWS
    return min(most, max(least, (_CHUNK_GPU if gpu else _CHUNK) // vocab))


def _check(n: int, rows: int, teacher: DenseTeacher | TopKTeacher | None, soft: Sequence[SoftTerm], vocab: int) -> None:
    if rows < vocab:
        raise ValueError(f"the student's output embedding has {rows} rows, for {vocab} tokens")
    if not soft:
        return
    if teacher is None:
        raise ValueError(f"the term '{soft[0].name}' needs a teacher, and there is none")
    if isinstance(teacher, DenseTeacher):
        if len(teacher.weight_VD) < vocab:
            raise ValueError(f"the teacher's output embedding has {len(teacher.weight_VD)} rows, for {vocab} tokens")
        given = len(teacher.hidden)
    else:
        given, k = teacher.ids_NK.shape
        if k > vocab:
            raise ValueError(f"a teacher's top {k} of {vocab} tokens: at most all of them")
        if teacher.logprobs_NK.shape != (given, k) or teacher.tail_N.shape != (given,):
            shapes = [tuple(t.shape) for t in (teacher.ids_NK, teacher.logprobs_NK, teacher.tail_N)]
            raise ValueError(f"a top-k teacher's ids, log-probabilities and tails don't fit each other: {shapes}")
    if given != n:
        raise ValueError(f"the teacher speaks of {given} positions, the labels of {n} supervised ones")


@dataclass(frozen=True)
class _Plan:
    """What is asked for."""

    soft: tuple[SoftTerm, ...]
    ce_weight: float
    temperature: float
    vocab: int
    chunk: int
    z_loss: float
    accuracy: bool
    train: bool

    @property
    def names(self) -> list[str]:
        """Of the sums beside the total."""
        asked = {"ce": self.ce_weight, "z_loss": self.z_loss, "accuracy": self.accuracy}
        return [name for name, on in asked.items() if on] + [term.name for term in self.soft]


class _Distillation(torch.autograd.Function):
    """Makes the gradient in the forward pass, a chunk of positions at a time, so that [N, V] never exists."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        teacher: DenseTeacher | TopKTeacher | None,
        plan: _Plan,
    ) -> tuple[Tensor, ...]:
        sums = {name: _zero(hidden_ND) for name in plan.names}
        needs = tuple(plan.train and needed for needed in ctx.needs_input_grad[:2])
        out = HeadGradient(hidden_ND, weight_VD, plan.vocab, (needs[0], needs[1]))
        for start in range(0, len(labels_N), plan.chunk):
            rows = slice(start, start + plan.chunk)
            grad_CV = _chunk(hidden_ND[rows], out.weight_VD, labels_N[rows], teacher, rows, plan, any(needs), sums)
            if grad_CV is not None:
                out.add(rows, grad_CV)
        grad_hidden_ND, grad_weight_VD = out.of_hidden_ND, out.whole_VD
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        ctx.dtype = weight_VD.dtype
        weights = {"ce": plan.ce_weight, "z_loss": 1.0, "accuracy": 0.0} | {t.name: t.weight for t in plan.soft}
        total = _zero(hidden_ND)
        for name, value in sums.items():
            total += weights[name] * value
        ctx.mark_non_differentiable(*sums.values())
        return total.to(_wide(hidden_ND)), *sums.values()

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        return (
            None if grad_hidden_ND is None else grad_hidden_ND.mul_(grad_total),
            None if grad_weight_VD is None else grad_weight_VD.mul_(grad_total).to(ctx.dtype),
            None,
            None,
            None,
        )


def _chunk(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    labels_C: Tensor,
    teacher: DenseTeacher | TopKTeacher | None,
    rows: slice,
    plan: _Plan,
    train: bool,
    sums: dict[str, Tensor],
) -> Tensor | None:
    """Adds a chunk's values to the sums; returns the gradient with respect to its logits. At most five buffers of [C, V]
    exist for a term, since what is no longer needed is overwritten."""
    logits_CV = linear(hidden_CD, weight_VD).to(_wide(hidden_CD))
    grad_CV, logq_CV, T = None, None, plan.temperature
    if plan.accuracy:
        sums["accuracy"] += (logits_CV.argmax(-1) == labels_C).sum()
    if plan.ce_weight or plan.z_loss:
        logq_CV = torch.log_softmax(logits_CV, -1)
        shared = isinstance(teacher, DenseTeacher) and T == 1.0
        grad_CV = _cross_entropy(logits_CV, logq_CV, labels_C[:, None], plan, train, sums, overwrite=not shared)
        logq_CV = logq_CV if shared else None
    if teacher is None:
        return grad_CV
    if T != 1.0:
        logits_CV /= T
    if isinstance(teacher, TopKTeacher):
        soft_CV = _soft_top_k(logits_CV, teacher, rows, plan, train, sums)
    else:
        if logq_CV is None:
            logq_CV = torch.log_softmax(logits_CV, -1)
        del logits_CV
        teachers_CV = linear(teacher.hidden[rows], teacher.weight_VD[: plan.vocab]).to(_wide(hidden_CD))
        logp_CV = torch.log_softmax(teachers_CV if T == 1.0 else teachers_CV.div_(T), -1)
        del teachers_CV
        soft_CV = _soft(logq_CV, logp_CV, plan, train, sums)
    if grad_CV is None or soft_CV is None:
        return soft_CV if grad_CV is None else grad_CV
    return grad_CV.add_(soft_CV)


def _cross_entropy(
    logits_CV: Tensor,
    logq_CV: Tensor,
    labels_C1: Tensor,
    plan: _Plan,
    train: bool,
    sums: dict[str, Tensor],
    overwrite: bool,
) -> Tensor | None:
    """ce_weight x cross entropy + z_loss x logsumexp^2 of a chunk: its sums and its gradient, which may overwrite logq."""
    label_logq_C1 = logq_CV.gather(1, labels_C1)
    if plan.ce_weight:
        sums["ce"] -= label_logq_C1.sum(dtype=sums["ce"].dtype)
    slope: float | Tensor = plan.ce_weight
    if plan.z_loss:
        lse_C1 = logits_CV.gather(1, labels_C1) - label_logq_C1
        sums["z_loss"] += plan.z_loss * lse_C1.square().sum(dtype=sums["z_loss"].dtype)
        slope = plan.ce_weight + 2 * plan.z_loss * lse_C1
    if not train:
        return None
    grad_CV = logq_CV.exp_() if overwrite else logq_CV.exp()
    return grad_CV.mul_(slope).scatter_add_(1, labels_C1, torch.full_like(label_logq_C1, -plan.ce_weight))


def _soft(logq_CE: Tensor, logp_CE: Tensor, plan: _Plan, train: bool, sums: dict[str, Tensor]) -> Tensor | None:
    """The soft terms of a chunk: their sums, and sum of weight x T^2 x the gradient with respect to the logits. Overwrites
    what it is given.

    With z = logits / T: forward: dz = Q - P; reverse: dz = Q (log(Q / P) - KL(Q || P));
    jsd: dz = (1 - beta) Q (log(Q / M) - KL(Q || M)).
    """
    T, total_CE = plan.temperature, None
    q_CE = logq_CE.exp()
    gap_CE = logq_CE.neg_().add_(logp_CE)  # log(P / Q)
    p_CE = logp_CE.exp_()
    for term in plan.soft:
        last = term is plan.soft[-1]
        if term.divergence == "forward":
            slope, value_C = 1.0, torch.linalg.vecdot(p_CE, gap_CE)
            grad_CE = torch.sub(q_CE, p_CE, out=p_CE if last else None)
        elif term.divergence == "reverse":
            slope, value_C = -1.0, -torch.linalg.vecdot(q_CE, gap_CE)
            grad_CE = gap_CE if last else gap_CE.clone()
            grad_CE.add_(value_C[:, None]).mul_(q_CE)
        else:
            slope, common_CE = term.beta - 1, _log_mixture(gap_CE, term.beta)
            p_C = torch.linalg.vecdot(p_CE, gap_CE.clamp_max(0).sub_(common_CE))  # KL(P || M)
            grad_CE = common_CE.add_(gap_CE.clamp_min(0))  # log(M / Q)
            q_C = -torch.linalg.vecdot(q_CE, grad_CE)
            value_C = term.beta * p_C + (1 - term.beta) * q_C
            grad_CE.add_(q_C[:, None]).mul_(q_CE)
        sums[term.name] += T * T * value_C.sum(dtype=sums[term.name].dtype)
        if train:
            grad_CE.mul_(slope * term.weight * T)
            total_CE = grad_CE if total_CE is None else total_CE.add_(grad_CE)
    return total_CE


def _log_mixture(gap: Tensor, beta: float) -> Tensor:
    """log(M / max(P, Q)) of gap = log(P / Q): exactly 0 where they are equal, and accurate for any gap."""
    of_p, of_q = (torch.full((), share, dtype=gap.dtype, device=gap.device) for share in (beta, 1 - beta))
    return gap.abs().neg_().expm1_().mul_(torch.where(gap > 0, of_q, of_p)).log1p_()


def _soft_top_k(
    z_CV: Tensor, teacher: TopKTeacher, rows: slice, plan: _Plan, train: bool, sums: dict[str, Tensor]
) -> Tensor | None:
    """`_soft` over the teacher's K tokens and all the others together; overwrites z, the logits over T."""
    ids_CK = teacher.ids_NK[rows]
    k = ids_CK.shape[1]
    logp_CE = teacher.logprobs_NK[rows].to(z_CV.dtype)
    z_CE = z_CV.gather(1, ids_CK)
    if k < plan.vocab:  # else there is no other token, on either side
        # A tail that was too small for its type is still one: a student's is never quite 0, and its log is compared.
        tail_C1 = teacher.tail_N[rows, None].to(z_CV.dtype).clamp_min(math.log(torch.finfo(torch.float32).tiny))
        logp_CE = torch.cat([logp_CE, tail_C1], 1)
        others_C1 = z_CV.scatter_(1, ids_CK, -math.inf).logsumexp(-1, keepdim=True)
        z_CE = torch.cat([z_CE, others_C1], 1)
    grad_CE = _soft(torch.log_softmax(z_CE, -1), torch.log_softmax(logp_CE, -1), plan, train, sums)
    if grad_CE is None:
        return None
    if k < plan.vocab:  # the others' part is shared out among them as the student shares it
        z_CV.sub_(others_C1).exp_().mul_(grad_CE[:, k:])
    return z_CV.scatter_(1, ids_CK, grad_CE[:, :k])


def uld_loss(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    teacher_hidden_MD: Tensor,
    teacher_weight_VD: Tensor,
    *,
    vocab_size: int,
    teacher_vocab_size: int,
    chunk: int | None = None,
) -> LossSum:
    """Sum over positions of |p - q|_1, both distributions sorted: universal logit distillation (arXiv 2402.12030).

    For models of different tokenizers, at positions where both have read the same text. The smaller vocabulary is filled
    up with zeros. The gradient goes through the sort: each probability is compared with the teacher's of its rank.

    Args:
        hidden_MD: [M, D] the student's states after the final norm at the aligned positions.
        weight_VD: its output embedding.
        teacher_hidden_MD: [M, D'] the teacher's at the same places of the text.
        teacher_weight_VD: its output embedding.
        vocab_size: size of the student's tokenizer; rows beyond are cut off.
        teacher_vocab_size: size of the teacher's.
        chunk: positions whose logits exist at once; None: what is fast in little memory.

    Returns:
        total, and the part `uld`, the same detached.
    """
    for side, weight, size in (("student", weight_VD, vocab_size), ("teacher", teacher_weight_VD, teacher_vocab_size)):
        if len(weight) < size:
            raise ValueError(f"the {side}'s output embedding has {len(weight)} rows, for {size} tokens")
    if len(hidden_MD) != len(teacher_hidden_MD):
        raise ValueError(f"the teacher speaks of {len(teacher_hidden_MD)} positions, the student of {len(hidden_MD)}")
    chunk = chunk or rows_at_once(hidden_MD.device, max(vocab_size, teacher_vocab_size))
    train = torch.is_grad_enabled() and (hidden_MD.requires_grad or weight_VD.requires_grad)
    sizes = (vocab_size, teacher_vocab_size)
    total = _Uld.apply(
        hidden_MD, weight_VD, teacher_hidden_MD.detach(), teacher_weight_VD.detach(), sizes, chunk, train
    )
    return LossSum(total, {"uld": total.detach()})


class _Uld(torch.autograd.Function):
    """d |p - q|_1 / dz = q (s - sum q s), s the sign of q - p at each token's rank."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        teacher_hidden_MD: Tensor,
        teacher_weight_VD: Tensor,
        sizes: tuple[int, int],
        chunk: int,
        train: bool,
    ) -> Tensor:
        total, wide = _zero(hidden_MD), _wide(hidden_MD)
        needs = tuple(train and needed for needed in ctx.needs_input_grad[:2])
        out = HeadGradient(hidden_MD, weight_VD, sizes[0], (needs[0], needs[1]))
        common = min(sizes)
        for start in range(0, len(hidden_MD), chunk):
            rows = slice(start, start + chunk)
            q_CV = torch.softmax(linear(hidden_MD[rows], out.weight_VD).to(wide), -1)
            p_CV = torch.softmax(linear(teacher_hidden_MD[rows], teacher_weight_VD[: sizes[1]]).to(wide), -1)
            ranked_CV, ids_CV = q_CV.sort(-1, descending=True)
            p_CV = p_CV.sort(-1, descending=True).values
            gap_CV = ranked_CV.clone()  # beyond the teacher's vocabulary: q - 0
            gap_CV[:, :common] -= p_CV[:, :common]
            total += gap_CV.abs().sum(dtype=total.dtype) + p_CV[:, common:].sum(dtype=total.dtype)
            if any(needs):
                sign_CV = torch.empty_like(q_CV).scatter_(1, ids_CV, gap_CV.sign_())
                out.add(rows, sign_CV.sub_(torch.linalg.vecdot(q_CV, sign_CV)[:, None]).mul_(q_CV))
        ctx.save_for_backward(out.of_hidden_ND, out.whole_VD)
        ctx.dtype = weight_VD.dtype
        return total.to(wide)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_MD, grad_weight_VD = ctx.saved_tensors
        return (
            None if grad_hidden_MD is None else grad_hidden_MD.mul_(grad_total),
            None if grad_weight_VD is None else grad_weight_VD.mul_(grad_total).to(ctx.dtype),
            *[None] * 5,
        )
