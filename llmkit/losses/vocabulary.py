"""Losses over the next token: cross entropy without the logits ever being whole.

Shapes: N supervised positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.losses.base import IGNORE, LossSum
from llmkit.products import add_weight_gradient, linear, matmul, zeros_for_gradient

_ROWS = 4096  # of the output embedding whose gradient is made at once


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
        grad_weight_VD = zeros_for_gradient(weight_VD, wide) if needs_weight else None
        for start in range(0, len(labels_N), chunk):
            h_CD, y_C1 = hidden_ND[start : start + chunk], labels_N[start : start + chunk, None]
            logits_CV = linear(h_CD, weight_VD).to(wide)
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
                grad_hidden_ND[start : start + chunk] = matmul(grad_CV, weight_VD)
            if grad_weight_VD is None:  # the head is frozen
                continue
            if grad_weight_VD.dtype == grad_CV.dtype:
                add_weight_gradient(grad_weight_VD, grad_CV, h_CD)
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
