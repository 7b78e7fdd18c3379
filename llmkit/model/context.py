"""Rows of which several processes compute a share of the positions each (context parallelism).

What is done to each position alone needs nothing of the others. Attention does: a layer at a time, keys and values of all
positions are put together, and in the backward pass their gradients are added up where the positions are. With N
processes a row is cut into 2 N chunks, of which process p computes the p-th from either end, so that under a causal mask
all have as much to look at (Llama 3, arXiv 2407.21783, section 3.3.2).

Shapes: B rows, T positions of this process, S of the whole row, K key/value heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """All processes' tensors, [N, ...]; the gradient of each is the sum of what they all have of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int, group: Any) -> Tensor:
        ctx.group = group
        out = x.new_empty((n, *x.shape))
        dist.all_gather(list(out), x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        own = grad.new_empty(grad.shape[1:])
        dist.reduce_scatter(own, list(grad.contiguous()), group=ctx.group)
        return own, None, None


@dataclass(frozen=True)
class Context:
    """Which positions of its rows this process computes."""

    n: int
    """Processes that share a row."""
    place: int
    """This one's number among them."""
    group: Any
    """Their process group."""

    def padded(self, length: int) -> int:
        """The length of a row that can be cut into chunks."""
        return -(-length // (2 * self.n)) * 2 * self.n

    def spans(self, S: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """First and last column, exclusive, of the two chunks of this process."""
        chunk, late = S // (2 * self.n), 2 * self.n - 1 - self.place
        return (self.place * chunk, (self.place + 1) * chunk), (late * chunk, (late + 1) * chunk)

    def own(self, x_BS: Tensor) -> Tensor:
        """This process's columns, [B, T]."""
        return torch.cat([x_BS[:, first:end] for first, end in self.spans(x_BS.shape[1])], 1)

    def whole(self, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions, [B, K, S, E] each, in the row's order."""
        early, late = _Gather.apply(torch.stack((k_BKTE, v_BKTE)), self.n, self.group).chunk(2, dim=4)
        k_BKSE, v_BKSE = torch.cat((*early, *late.flip(0)), dim=3)
        return k_BKSE, v_BKSE


@dataclass(frozen=True)
class RowPart:
    """What stands in place of a mask, where this process computes a part of the rows: who sees whom in all of them."""

    context: Context
    docs_BS: Tensor
    """int32, as in `data.loader.Batch`, of whole rows."""
    one_document: bool
    full: bool

    def to(self, device: torch.device | str) -> RowPart:
        return replace(self, docs_BS=self.docs_BS.to(device, non_blocking=True))


@dataclass(frozen=True)
class PartMask:
    """The masks of a part's two chunks, for one kind of layer."""

    context: Context
    chunks: tuple[tuple[int, Tensor | None], ...]
    """For each: the columns before which all lies that it may see, and bool [B or 1, 1, T / 2, columns], as in `attend`."""
    again: bool
    """In the backward pass keys and values are put together, and attention is computed, again: else every layer would keep
    those of whole rows until then. Needless where all of a block is computed again."""
