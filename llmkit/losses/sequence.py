"""Losses of whole texts: their class, or numbers.

Shapes: B rows, C classes, K numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.losses.base import IGNORE, LossSum


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
