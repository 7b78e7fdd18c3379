"""Matrix products in fp32 on a CPU, by whichever of PyTorch's two libraries is faster.

PyTorch sends them to MKL, which on the AMD processor that was measured gained little from a third and a fourth thread;
oneDNN, to which it sends bf16, gained from all of them (docs/performance.md). Small products stay where they are: oneDNN's
start costs more than the product. Few rows times a matrix that stays the same is another matter: there oneDNN spends much of
its time in laying out the matrix, which `PackedMatrix` does once.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEAST = 2**25  # multiplications from which oneDNN wins


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _by_onednn(x: Tensor, n_products: int) -> bool:
    return (
        n_products >= _LEAST
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.get_num_threads() > 1
        and not torch.compiler.is_compiling()  # the compiler chooses for itself
        and _has_onednn()
    )


def _onednn(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, weight_NK, bias_N, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_MK, weight_NK)
        return _onednn(x_MK, weight_NK, bias_N)

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, ...]:
        x_MK, weight_NK = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _onednn(grad_MN, weight_NK.t()) if needs_x else None,
            _weight_gradient(grad_MN, x_MK) if needs_weight else None,
            grad_MN.sum(0) if needs_bias else None,
        )


def _weight_gradient(grad_MN: Tensor, x_MK: Tensor) -> Tensor:
    """grad.T @ x, [N, K]; oneDNN is faster where the result has more columns than rows, so the other one is turned."""
    if grad_MN.shape[1] <= x_MK.shape[1]:
        return _onednn(grad_MN.t(), x_MK.t())
    return _onednn(x_MK.t(), grad_MN.t()).t()


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`F.linear`: x @ weight.T + bias, [..., N]. May be differentiated once.

    Args:
        x: [..., K].
        weight_NK: the matrix.
        bias_N: added to every row.
    """
    if weight_NK.dtype != x.dtype or not _by_onednn(x, x.numel() * weight_NK.shape[0]):
        return F.linear(x, weight_NK, bias_N)
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight_NK, bias_N).view(*x.shape[:-1], -1)


def matmul(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b, without a gradient."""
    return _onednn(a_MK, b_KN.t()) if _by_onednn(a_MK, a_MK.numel() * b_KN.shape[1]) else a_MK @ b_KN


def zeros_for_gradient(weight_NK: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of a matrix's shape for `add_weight_gradient`, laid out as that makes its terms."""
    N, K = weight_NK.shape
    if N <= K:
        return torch.zeros(N, K, dtype=dtype, device=weight_NK.device)
    return torch.zeros(K, N, dtype=dtype, device=weight_NK.device).t()


def add_weight_gradient(total_NK: Tensor, grad_MN: Tensor, x_MK: Tensor) -> None:
    """total += grad.T @ x: what some rows add to the gradient of a matrix."""
    if _by_onednn(grad_MN, grad_MN.numel() * x_MK.shape[1]):
        total_NK += _weight_gradient(grad_MN, x_MK)
    else:
        total_NK.addmm_(grad_MN.t(), x_MK)


def can_pack(weight_NK: Tensor) -> bool:
    """Whether `PackedMatrix` takes a matrix: plain, on a CPU, and of a precision for which oneDNN has a layout of its own."""
    plain = type(weight_NK) in (Tensor, nn.Parameter)
    if not plain or weight_NK.device.type != "cpu" or not _has_onednn() or not torch.backends.mkldnn.enabled:
        return False
    if weight_NK.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight_NK.dtype == torch.float32


class PackedMatrix:
    """A copy of a matrix in the layout in which oneDNN multiplies few rows by it. Without gradients, not saved.

    Packing takes about as long as it saves in some tens of products of one row, or in some of several.
    """

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None = None, n_rows: int = 32):
        """Takes what `can_pack` allows. `n_rows`: most rows that are expected at once; 1 has a layout of its own."""
        # That for 32 rows serves two as well; in fp32 it reads a matrix for one row up to 1.7 times as long as that for one.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach(), 1 if n_rows == 1 else 32)
        self._bias_N = bias_N

    def __call__(self, x_MK: Tensor) -> Tensor:
        """x @ weight.T + bias, [M, N]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, self._weight, self._bias_N, "none", [], "")
        return out

    def plus(self, x_MK: Tensor, more_MN: Tensor) -> Tensor:
        """x @ weight.T + bias + more, rounded once."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x_MK, more_MN, self._weight, self._bias_N, "add")
        return out


class Linear(nn.Linear):
    """`nn.Linear` on these products."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
