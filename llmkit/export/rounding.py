"""How the numbers of a matrix become small whole ones: the choice of scales and codes.

Shapes: N rows, K columns, G groups of g neighbours in a row; R groups of any rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkit.config import UserError
from llmkit.model.coded import pack
from llmkit.model.quantization import Quantization, QuantizedWeight, groups_of

_LEVELS = 15  # the largest code of 4 bits
# Shares of a group's range that its codes first cover: a narrower one rounds the many more finely, and cuts the few.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_ROUNDS = 3  # of fitting scale and low to the codes, and choosing the codes again
_ROWS = 1 << 21  # weights that are fitted at once
# Of a matrix's largest weight: where a group's scale is a number that fp16 holds with all its digits.
_FP16 = (2.0**-8, 2.0**15)
_DAMPING = 0.01  # of the mean of the diagonal, as in GPTQ


def quantize_weight(W_NK: Tensor, quantization: Quantization, hessian_KK: Tensor | None = None) -> QuantizedWeight:
    """A matrix in few bits, which computes in the dtype it had.

    Args:
        W_NK: finite numbers.
        quantization: how many bits, for how many weights a scale, and how products with it are to be computed.
        hessian_KK: sum of x x^T over the inputs that the matrix is used on. With it, the error is that of its products
            (`round_by_products`), without that of its weights; in 8 bits it makes no difference worth the work.

    Raises:
        UserError: a weight is not finite.
    """
    W = W_NK.detach().float()
    if not W.isfinite().all():
        raise UserError("the weights are not finite: look at the model with `llmkit verify`")
    if quantization.bits == 8:
        return QuantizedWeight(*_round_rows(W), None, W.shape[1], W_NK.dtype, quantization.dynamic)
    small, large = _FP16
    dtype = torch.float16 if small <= W.abs().max() <= large else torch.float32
    G, g = groups_of(W.shape[1], quantization.group)
    if hessian_KK is None:
        real_Gg = _filled_up(torch.ones(1, W.shape[1]), G * g).view(G, g)
        codes, scales, lows = _in_parts(_filled_up(W, G * g).view(-1, G, g), real_Gg, dtype)
    else:
        codes, scales, lows = round_by_products(W, hessian_KK, g, dtype)
    return QuantizedWeight(pack(codes.view(len(W), G * g)), scales, lows, W.shape[1], W_NK.dtype)


def _round_rows(W_NK: Tensor) -> tuple[Tensor, Tensor]:
    """8 bits: codes from -127 to 127 and a scale for each row, whose largest weight has the largest code."""
    scales_N = W_NK.abs().amax(1) / 127
    codes_NK = (W_NK / scales_N.where(scales_N > 0, 1.0)[:, None]).round().clamp(-127, 127)
    return codes_NK.to(torch.int8), scales_N


def _filled_up(W_NK: Tensor, n_columns: int) -> Tensor:
    """With columns of 0 up to whole groups."""
    return torch.nn.functional.pad(W_NK, (0, n_columns - W_NK.shape[1]))


def _in_parts(W_NGg: Tensor, weight_Gg: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`fit_groups` of some rows after the others: it needs several times the memory of what it is given."""
    step = max(1, _ROWS // W_NGg[0].numel())
    parts = [fit_groups(W_NGg[at : at + step], weight_Gg, dtype) for at in range(0, len(W_NGg), step)]
    codes, scales, lows = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes, scales, lows


def fit_groups(values: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The codes, scale and low of each group with the least sum of weight (value - scale code - low)^2 that is found.

    From several ranges, each a share of the group's own, codes and line are fitted to each other in turns: codes to the
    line by rounding, the line to the codes by least squares. The line counts as it is kept, rounded to `dtype`.

    Args:
        values: fp32 [..., g].
        weight: how much each error counts, [..., g] or fewer dimensions; above 0 for at least one value of a group.
        dtype: of scales and lows.

    Returns:
        uint8 codes [..., g], scales and lows [...].
    """
    weight = weight.expand_as(values)
    real = weight > 0
    least = values.masked_fill(~real, torch.inf).amin(-1, keepdim=True)
    most = values.masked_fill(~real, -torch.inf).amax(-1, keepdim=True)
    middle = (least + most) / 2
    best: tuple[Tensor, ...] | None = None
    for share in _SHARES:
        scale = share * (most - least) / _LEVELS
        low = middle - share * (most - least) / 2
        for _ in range(_ROUNDS):
            kept_scale, kept_low = scale.to(dtype), low.to(dtype)
            codes = _codes(values, kept_scale.float(), kept_low.float())
            error = (weight * (values - codes * kept_scale.float() - kept_low.float()).square()).sum(-1, keepdim=True)
            found = (error, codes, kept_scale, kept_low)
            best = found if best is None else tuple(
                torch.where(error < best[0], new, old) for new, old in zip(found, best, strict=True)
            )  # fmt: skip
            scale, low = _line(values, codes, weight, scale, low)
    assert best is not None
    _, codes, kept_scale, kept_low = best
    return codes.to(torch.uint8), kept_scale[..., 0], kept_low[..., 0]


def _codes(values: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """The nearest codes, as floats."""
    return ((values - low) / scale.where(scale != 0, 1.0)).round_().clamp_(0, _LEVELS)


def _line(values: Tensor, codes: Tensor, weight: Tensor, scale: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and low that fit given codes best; those there are, where all codes are one."""
    total = weight.sum(-1, keepdim=True)
    code = (weight * codes).sum(-1, keepdim=True) / total
    value = (weight * values).sum(-1, keepdim=True) / total
    spread = (weight * (codes - code).square()).sum(-1, keepdim=True)
    slope = (weight * (codes - code) * (values - value)).sum(-1, keepdim=True) / spread.where(spread > 0, 1.0)
    fits = (spread > 0) & (slope > 0)
    return slope.where(fits, scale), (value - slope * code).where(fits, low)


def round_by_products(W_NK: Tensor, hessian_KK: Tensor, g: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes that keep the matrix's products, not its weights: GPTQ (Frantar et al. 2022, arXiv 2210.17323).

    Columns are rounded one after the other; what a column's rounding does to the products is taken back by the columns
    that are still to come, as far as the inputs' correlations allow. A group's line is fitted when its turn has come, each
    column's error counting as its inputs are large.

    Args:
        W_NK: fp32.
        hessian_KK: sum of x x^T over inputs x.
        g: size of a group.
        dtype: of scales and lows.

    Returns:
        uint8 codes [N, G, g], scales and lows [N, G].
    """
    K, G = W_NK.shape[1], -(-W_NK.shape[1] // g)
    H_KK = hessian_KK.double()
    diagonal_K = H_KK.diagonal().clone()
    damping = _DAMPING * diagonal_K.mean().clamp(min=1e-12)  # inputs that are always 0 are rounded as weights
    H_KK = H_KK + damping * torch.eye(K, dtype=torch.float64, device=H_KK.device)
    upper_KK = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H_KK)), upper=True).float()
    importance_K = (diagonal_K + damping).float()
    W_NK = W_NK.clone()
    codes, scales, lows = [], [], []
    for first in range(0, K, g):
        columns = slice(first, min(first + g, K))
        block, U = W_NK[:, columns], upper_KK[columns, columns]
        _, scale, low = fit_groups(block, importance_K[columns], dtype)
        s, m = scale.float(), low.float()
        codes_Ng = torch.zeros(len(W_NK), g, dtype=torch.uint8, device=W_NK.device)
        errors = torch.empty_like(block)
        for j in range(block.shape[1]):
            code = _codes(block[:, j], s, m)
            codes_Ng[:, j] = code.to(torch.uint8)
            errors[:, j] = (block[:, j] - code * s - m) / U[j, j]
            block[:, j + 1 :] -= errors[:, j, None] * U[j, j + 1 :]
        W_NK[:, columns.stop :] -= errors @ upper_KK[columns, columns.stop :]
        codes.append(codes_Ng)
        scales.append(scale)
        lows.append(low)
    assert len(codes) == G
    return torch.stack(codes, 1), torch.stack(scales, 1), torch.stack(lows, 1)
