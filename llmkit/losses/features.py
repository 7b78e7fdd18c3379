"""What a teacher's inside teaches: its hidden states, its attention scores, and how alike it finds two tokens.

Each loss is a sum over supervised positions of a mean over what is compared there, in fp32 or better; the teacher gets no
gradient.

Shapes: N positions, S and T widths of the student and the teacher (in attention T tokens of a row), B rows, H heads, K
key-value heads, E width of a head, Q queries at once.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_CELLS = 2**22  # attention cells of all heads at once, of one model


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def hidden_loss(
    student_NS: Tensor,
    teacher_NT: Tensor,
    projection_TS: Tensor | None = None,
    measure: Literal["mse", "cosine"] = "mse",
) -> Tensor:
    """Sum over positions of how far the student's states are from the teacher's (FitNets, arXiv 1412.6550; TinyBERT, arXiv
    1909.10351).

    mse: both sides are divided by the teacher's root mean square: in raw residual streams a few tokens' states are hundreds
    of times larger than all others', and a mean of squares would see only them.

    Args:
        student_NS: the student's states at the supervised positions.
        teacher_NT: the teacher's.
        projection_TS: takes the student's width to the teacher's; None where they are the same.
        measure: mse: mean over the width of the squared difference, sizes and all; cosine: 1 - cosine, angles alone.
    """
    x_NT = student_NS.to(_wide(student_NS))
    if projection_TS is not None:
        x_NT = F.linear(x_NT, projection_TS.to(x_NT.dtype))
    y_NT = teacher_NT.detach().to(x_NT.dtype)
    if x_NT.shape != y_NT.shape:
        raise ValueError(
            f"states of {tuple(x_NT.shape)} can't be compared with the teacher's {tuple(y_NT.shape)}: "
            "give a projection from the student's width to the teacher's"
        )
    if measure == "cosine":
        # With both of length 1, 1 - x y = |x - y|^2 / 2, which loses no digits where they are close.
        return (_unit(x_NT) - _unit(y_NT)).square().sum() * 0.5
    eps = torch.finfo(torch.float32).eps
    size_N = y_NT.square().mean(-1).clamp(min=eps**2)
    return ((x_NT - y_NT).square().mean(-1) / size_N).sum()


def _unit(x_ND: Tensor) -> Tensor:
    """x / |x|: the square of a difference of these is the mean square of the difference of x / rms(x)."""
    return F.normalize(x_ND, dim=-1, eps=torch.finfo(torch.float32).eps)


def attention_loss(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, visible_BTT: Tensor, queries_BT: Tensor
) -> Tensor:
    """Sum over supervised positions of the mean over heads and visible cells of (score - teacher's score)^2, a score being
    q k / sqrt(width of a head), before the softmax (TinyBERT, arXiv 1909.10351).

    Args:
        q_s: [B, H, T, E] the student's queries as its attention uses them, after norms and rotation.
        k_s: [B, K, T, E] its keys, K dividing H; one of them serves H / K heads.
        q_t: [B, H, T, E'] the teacher's, of as many heads.
        k_t: [B, K', T, E'].
        visible_BTT: [B or 1, 1, T, T] bool, True where a query may look: causal, in the same document, no padding.
        queries_BT: [B, T] bool, True where the position is supervised.

    Raises:
        ValueError: the two have different numbers of heads.
    """
    H = q_s.shape[1]
    if q_t.shape[1] != H:
        raise ValueError(f"attention of {H} heads can't be compared with the teacher's {q_t.shape[1]}: use relations")
    return _of_cells(q_s, _for_heads(k_s, H), q_t, _for_heads(k_t, H), visible_BTT, queries_BT, relation=False)


def relation_loss(x_s_BTW: Tensor, x_t_BTW: Tensor, heads: int, visible_BTT: Tensor, queries_BT: Tensor) -> Tensor:
    """Sum over supervised positions of the mean over heads of KL(teacher's row || student's row), a row being
    softmax(x_q x / sqrt(width of a head)) over what the query sees (MiniLMv2, arXiv 2012.15828).

    Args:
        x_s_BTW: [B, T, W] the student's queries, keys or values, all heads side by side.
        x_t_BTW: [B, T, W'] the teacher's.
        heads: into how many both are cut anew; divides W and W'.
        visible_BTT: [B or 1, 1, T, T] bool, True where a query may look.
        queries_BT: [B, T] bool, True where the position is supervised.

    Raises:
        ValueError: a width is no multiple of the heads.
    """
    for side, x in (("student", x_s_BTW), ("teacher", x_t_BTW)):
        if x.shape[-1] % heads:
            raise ValueError(f"{heads} relation heads don't divide the {side}'s width of {x.shape[-1]}")
    x_s, x_t = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (x_s_BTW, x_t_BTW))
    return _of_cells(x_s, x_s, x_t, x_t, visible_BTT, queries_BT, relation=True)


def _for_heads(k_BKTE: Tensor, heads: int) -> Tensor:
    """Each key head as often as it serves a query head."""
    return k_BKTE if k_BKTE.shape[1] == heads else k_BKTE.repeat_interleave(heads // k_BKTE.shape[1], 1)


def _of_cells(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, visible: Tensor, queries_BT: Tensor, *, relation: bool
) -> Tensor:
    train = torch.is_grad_enabled() and (q_s.requires_grad or k_s.requires_grad)
    visible = visible.expand(len(q_s), -1, -1, -1)
    return _Cells.apply(q_s, k_s, q_t.detach(), k_t.detach(), visible, queries_BT, relation, train)


class _Cells(torch.autograd.Function):
    """Makes the gradient in the forward pass, some rows and queries at a time: all cells of all heads never exist.

    With s a score and w what a query's value is weighed with: attention: ds = 2 w (s - s'); relation, softmax rows p:
    ds = w (p - p'). Then dq = ds k / sqrt(E) and dk = ds^T q / sqrt(E).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_s: Tensor,
        k_s: Tensor,
        q_t: Tensor,
        k_t: Tensor,
        visible: Tensor,
        queries_BT: Tensor,
        relation: bool,
        train: bool,
    ) -> Tensor:
        B, H, T, _ = q_s.shape
        wide = _wide(q_s)
        n_rows, n_queries = max(1, _CELLS // (H * T * T)), min(T, max(1, _CELLS // (H * T)))
        total = torch.zeros((), dtype=torch.float64 if q_s.device.type != "mps" else wide, device=q_s.device)
        grad_q, grad_k = (torch.zeros_like(t, dtype=wide) if train else None for t in (q_s, k_s))
        for row in range(0, B, n_rows):
            b = slice(row, row + n_rows)
            for query in range(0, T, n_queries):
                at = slice(query, query + n_queries)
                q_BHQE, k_BHTE = (t.to(wide) for t in (q_s[b, :, at], k_s[b]))
                scale = q_BHQE.shape[-1] ** -0.5
                s_BHQT = (q_BHQE * scale) @ k_BHTE.transpose(-1, -2)
                t_BHQT = (q_t[b, :, at].to(wide) * q_t.shape[-1] ** -0.5) @ k_t[b].to(wide).transpose(-1, -2)
                w_B1Q1 = queries_BT[b, None, at, None].to(wide) / H
                compare = _relation_cells if relation else _attention_cells
                value, ds_BHQT = compare(s_BHQT, t_BHQT, visible[b, :, at], w_B1Q1)
                total += value
                if grad_q is not None and grad_k is not None:
                    ds_BHQT *= scale
                    grad_q[b, :, at] = ds_BHQT @ k_BHTE
                    grad_k[b] += ds_BHQT.transpose(-1, -2) @ q_BHQE
        ctx.save_for_backward(grad_q, grad_k)
        ctx.dtypes = q_s.dtype, k_s.dtype
        return total.to(wide)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            (grad * grad_total).to(dtype) if grad is not None and needed else None
            for grad, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
        )
        return (*grads, *[None] * 6)


def _attention_cells(s: Tensor, t: Tensor, visible: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Their value and its gradient with respect to the student's scores, [B, H, Q, T]."""
    w = w / visible.sum(-1, keepdim=True).clamp_min(1)
    gap = s.sub_(t).masked_fill_(~visible, 0)
    weighed = gap * w
    return torch.sum(weighed * gap), weighed.mul_(2)


def _relation_cells(s: Tensor, t: Tensor, visible: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    # Not -inf: a padded query sees nothing, and its row, which weighs 0, would be NaN.
    hidden, least = ~visible, torch.finfo(s.dtype).min
    logq, logp = (torch.log_softmax(x.masked_fill_(hidden, least), -1) for x in (s, t))
    p = logp.exp()
    value = (p * (logp - logq) * w).sum()
    return value, logq.exp_().sub_(p).mul_(w)
