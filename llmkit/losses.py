"""Losses: pure functions, tensors in, sums out. The engine divides once, by the count of the whole optimizer step.

Shapes: N supervised positions, D width, V vocabulary, B rows, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 4096  # of the output embedding whose gradient is made at once
IGNORE = -100  # label of a position that is not trained on


@dataclass(frozen=True)
class LossSum:
    """What a loss function hands the engine: sums over its micro-batch, not means.

    `total` is differentiated; `parts` are detached sums that are shown, divided by the same denominator; `stats` are
    detached sums that are divided by nothing, such as how many tokens each expert got: the engine adds them up over the
    whole step, micro-batches and ranks, and keeps them as `engine.stats`, for the task to use as constants of the next.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)


# --- cross entropy over a vocabulary ----------------------------------------------------------------------------------


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradient in the forward pass, a chunk of positions at a time, so that [N, V] never exists."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        z_loss: float,
        chunk: int,
        train: bool,
        count_right: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        ce, z, right = (
            torch.zeros((), dtype=torch.float64 if hidden_ND.device.type != "mps" else wide, device=hidden_ND.device)
            for _ in range(3)
        )
        needs_hidden, needs_weight = (train and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        # fp32, since it is a sum over chunks: in bf16 each addition would lose the small terms.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        for start in range(0, len(labels_N), chunk):
            h_CD, y_C1 = hidden_ND[start : start + chunk], labels_N[start : start + chunk, None]
            logits_CV = F.linear(h_CD, weight_VD).to(wide)
            label_logit_C1 = logits_CV.gather(1, y_C1)
            if count_right:
                right += (logits_CV.argmax(-1, keepdim=True) == y_C1).sum()
            logp_CV = F.log_softmax(logits_CV, -1)
            label_logp_C1 = logp_CV.gather(1, y_C1)
            lse_C1 = label_logit_C1 - label_logp_C1
            del logits_CV  # a chunk of fp32 logits is tens of megabytes: one copy at a time
            ce -= label_logp_C1.sum(dtype=ce.dtype)
            z += lse_C1.square().sum(dtype=z.dtype)
            if grad_hidden_ND is None and grad_weight_VD is None:
                continue
            grad_CV = logp_CV.exp_()  # softmax: d lse / d logits
            if z_loss:
                grad_CV *= 1 + 2 * z_loss * lse_C1
            grad_CV.scatter_add_(1, y_C1, torch.full_like(label_logp_C1, -1.0))
            del logp_CV
            grad_CV = grad_CV.to(hidden_ND.dtype)
            if grad_hidden_ND is not None:
                torch.mm(grad_CV, weight_VD, out=grad_hidden_ND[start : start + chunk])
            if grad_weight_VD is None:  # the head is frozen
                continue
            if grad_weight_VD.dtype == grad_CV.dtype:
                grad_weight_VD.addmm_(grad_CV.t(), h_CD)
            else:
                # A block of rows at a time: the product in half precision then stays in the cache until it is added.
                for rows in range(0, len(grad_weight_VD), _ROWS):
                    block = slice(rows, rows + _ROWS)
                    grad_weight_VD[block] += grad_CV[:, block].t() @ h_CD
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        ctx.dtype = weight_VD.dtype
        ctx.mark_non_differentiable(ce, z, right)
        return (ce + z_loss * z).to(wide), ce, z, right

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        return (
            None if grad_hidden_ND is None else grad_hidden_ND.mul_(grad_total),
            None if grad_weight_VD is None else grad_weight_VD.mul_(grad_total).to(ctx.dtype),
            None,
            None,
            None,
            None,
            None,
        )


def linear_cross_entropy(
    hidden: Tensor, weight_VD: Tensor, labels: Tensor, z_loss: float = 0.0, chunk: int = 256, accuracy: bool = False
) -> LossSum:
    """Sum over supervised positions of -log softmax(hidden @ weight.T)[label] + z_loss * logsumexp(logits)^2.

    Statistics are fp32 or better; memory is chunk x V, not N x V. Equal to `F.cross_entropy` on the full logits.
    The z term is that of PaLM (arXiv 2204.02311). May be differentiated once.

    Args:
        hidden: [..., D] states after the final norm.
        weight_VD: the output embedding.
        labels: [...] int64, the id of the next token; IGNORE where nothing is trained.
        z_loss: weight of the z term.
        chunk: positions whose logits exist at once.
        accuracy: also counts the labels that have the highest score.

    Returns:
        total with both terms; parts `loss` (cross entropy alone, in nats) and, where asked for, `z_loss` and `accuracy`.
    """
    hidden_ND, labels_N = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    keep = labels_N != IGNORE
    if not keep.all():
        hidden_ND, labels_N = hidden_ND[keep], labels_N[keep]
    train = torch.is_grad_enabled() and (hidden.requires_grad or weight_VD.requires_grad)
    total, ce, z, right = _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, z_loss, chunk, train, accuracy)
    parts = {"loss": ce} | ({"z_loss": z_loss * z} if z_loss else {}) | ({"accuracy": right} if accuracy else {})
    return LossSum(total, parts)


# --- one label a sequence --------------------------------------------------------------------------------------------


def classification(scores_BC: Tensor, labels_B: Tensor) -> LossSum:
    """Sum over rows of -log softmax(scores)[label], in fp32 or better.

    Args:
        scores_BC: one score for each class.
        labels_B: int64, the right class; IGNORE for a row of padding.

    Returns:
        parts `loss` and `accuracy`; stats `confusion` [C, C], how often each class (row) was taken for which (column).
    """
    n_classes = scores_BC.shape[1]
    keep_B = labels_B != IGNORE
    scores_NC, labels_N = scores_BC[keep_B], labels_B[keep_B]
    wide = torch.promote_types(scores_NC.dtype, torch.float32)
    total = F.cross_entropy(scores_NC.to(wide), labels_N, reduction="sum")
    predicted_N = scores_NC.argmax(-1)
    cells_N = labels_N * n_classes + predicted_N
    confusion_CC = torch.bincount(cells_N, minlength=n_classes * n_classes).view(n_classes, n_classes)
    right = (predicted_N == labels_N).sum()
    return LossSum(total, {"loss": total.detach(), "accuracy": right}, {"confusion": confusion_CC})


def regression(scores_BK: Tensor, targets_BK: Tensor) -> LossSum:
    """Sum over rows of (score - target)^2 / 2, in fp32 or better; a row whose targets are NaN is padding.

    Returns:
        parts `loss`, and `abs_error`, the sum of |score - target|.
    """
    keep_B = ~targets_BK.isnan().any(-1)
    wide = torch.promote_types(scores_BK.dtype, torch.float32)
    scores_NK, targets_NK = scores_BK[keep_B].to(wide), targets_BK[keep_B].to(wide)
    out = squared_error(scores_NK, targets_NK)
    return LossSum(out.total, {**out.parts, "abs_error": (scores_NK - targets_NK).detach().abs().sum()})


def squared_error(prediction: Tensor, target: Tensor) -> LossSum:
    """Sum of (prediction - target)^2 / 2 over all elements, which must have one shape (no silent broadcasting)."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    total = (prediction - target).square().sum() / 2
    return LossSum(total, {"loss": total.detach()})
