"""Frozen matrices in 4 bits while adapters are trained (QLoRA, Dettmers et al. 2023, arXiv 2305.14314): NormalFloat4 in
blocks of 64, whose scales are quantised once more, by bitsandbytes where that is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.config import UserError

BLOCK = 64  # weights that share a scale, as in the paper


def bitsandbytes() -> Any:
    """The library's functions. Raises UserError if it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "lora.quantize: nf4 needs bitsandbytes, which is not installed: `pip install llmkit[quant]`, or drop it"
        )
    from bitsandbytes import functional

    return functional


class _Product(torch.autograd.Function):
    """x W^T with W unpacked where it is needed and kept nowhere: in the backward pass once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Nf4) -> Tensor:
        ctx.packed = packed
        return F.linear(x, packed.dense().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.packed.dense().to(grad.dtype), None


class Nf4(nn.Module):
    """A matrix [O, I] in about 4.1 bits a weight. State dicts leave it out: it is made from the base each time."""

    def __init__(self, weight_OI: Tensor):
        """Quantises a matrix, on its device. Raises UserError without bitsandbytes."""
        super().__init__()
        quantize = bitsandbytes().quantize_4bit
        packed, self.state = quantize(
            weight_OI.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        self.register_buffer("codes", packed, persistent=False)
        self.codes: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Nf4:
        """`.to(...)`: another device moves codes and scales; another dtype is that of the unpacked matrix alone."""
        super()._apply(fn, recurse)
        self.state.to(self.codes.device)
        self.state.dtype = fn(torch.empty(0, dtype=self.state.dtype, device=self.codes.device)).dtype
        return self

    def dense(self) -> Tensor:
        """The matrix [O, I], unpacked."""
        out: Tensor = bitsandbytes().dequantize_4bit(self.codes, self.state)
        return out

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias."""
        out: Tensor = _Product.apply(x, self)
        return out if bias is None else out + bias
