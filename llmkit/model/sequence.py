"""The residual stream of rows that several processes compute together, cut by position (sequence parallelism).

Heads and the MLP's width lie in shares over the N processes (tensor parallelism), so attention and MLP need whole rows and
give sums of which each process has a part. What stands between them - residual stream, norms, dropout - is done to each
position alone: there a process has a share of the positions. Before attention and MLP the shares are put together, after
them the parts are added up and shared out (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2).

Shapes: B rows, T positions, D d_model; P positions of this process, of all rows one after the other, filled up with zeros
to a multiple of N: so P is ceil(B T / N), whatever B and T are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Shape = tuple[int, int]  # rows and positions, B and T
# What `torch.distributed`'s own functions are made of, as the compiler sees them; those have other names in every version.
_collectives = torch.ops._c10d_functional


def _done(sent: Tensor) -> Tensor:
    out: Tensor = _collectives.wait_tensor(sent)
    return out


@dataclass(frozen=True)
class SequenceParallel:
    """Which positions of the residual stream are this process's. Methods are collectives, or their gradients are."""

    n: int
    """Processes that compute rows together."""
    place: int
    """This one's number among them."""
    group: Any
    """Their process group."""
    again: bool
    """In the backward pass the positions that entered attention and MLP are put together again: else every block would keep
    whole rows until then. Needless where all of a block is computed again."""

    def own(self, x_BTD: Tensor) -> Tensor:
        """This process's positions [P, D] of what is whole and the same for all; its gradient is whole again."""
        out: Tensor = _Share.apply(x_BTD, self, False)
        return out

    def whole(self, x_PD: Tensor, shape: Shape) -> Tensor:
        """All positions [B, T, D], with which every process does the same: the gradient is the same for each, too."""
        out: Tensor = _Whole.apply(x_PD, self, *shape, False)
        return out

    def on_whole(self, part: Callable[[Tensor], Tensor], x_PD: Tensor, shape: Shape) -> Tensor:
        """What attention or an MLP, of which this process has a share, makes of all positions; the gradient of those is the
        sum of what the shares have."""

        def gather(x_PD: Tensor) -> Tensor:
            out: Tensor = _Whole.apply(x_PD, self, *shape, True)
            return out

        if not self.again or not torch.is_grad_enabled():
            return part(gather(x_PD))
        if torch.compiler.is_compiling():  # to the compiler, which cuts across, that says what it is not to keep
            return part(checkpoint(gather, x_PD, use_reentrant=False))
        whole_BTD = gather(x_PD)
        kept = _Kept(self, x_PD.detach(), whole_BTD)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
            return part(whole_BTD)

    def summed(self, x_BTD: Tensor) -> Tensor:
        """This process's positions [P, D] of the sum of what the processes have."""
        out: Tensor = _Share.apply(x_BTD, self, True)
        return out

    def dropout(self, x_PD: Tensor, p: float, shape: Shape) -> Tensor:
        """Dropout in training. The draw is of all positions, of which these are a part: what one process draws, and the
        same number of draws in each."""
        kept_BTD = F.dropout(x_PD.new_ones(*shape, x_PD.shape[-1]), p)
        return x_PD * self._part(kept_BTD).clone()

    # --- without gradients -----------------------------------------------------------------------------------------------

    def _padded(self, x_BTD: Tensor) -> Tensor:
        """[N, P, D]: by whose the positions are."""
        x_MD = x_BTD.flatten(0, 1)
        missing = -x_MD.shape[0] % self.n
        x_MD = F.pad(x_MD, (0, 0, 0, missing)) if missing else x_MD
        return x_MD.reshape(self.n, -1, x_MD.shape[-1])

    def _part(self, x_BTD: Tensor) -> Tensor:
        return self._padded(x_BTD)[self.place]

    def _gathered(self, x_PD: Tensor, B: int, T: int) -> Tensor:
        found = _done(_collectives.all_gather_into_tensor(x_PD.contiguous(), self.n, self.group.group_name))
        return found[: B * T].view(B, T, -1)

    def _added(self, x_BTD: Tensor) -> Tensor:
        # Sent as they are and added here, in the processes' order and rounded once: the same bytes as a reduce-scatter, which
        # gloo makes of a whole sum.
        x_NPD = self._padded(x_BTD)
        sent_MD, each = x_NPD.flatten(0, 1).contiguous(), [x_NPD.shape[1]] * self.n
        found_MD = _done(_collectives.all_to_all_single(sent_MD, each, each, self.group.group_name))
        return found_MD.view(x_NPD.shape).sum(0)


class _Whole(torch.autograd.Function):
    """From a share of the positions to all; backwards to the sum of the gradients (`partial`), or to its part of one."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, rows: SequenceParallel, B: int, T: int, partial: bool) -> Tensor:
        ctx.rows, ctx.partial = rows, partial
        found_BTD = rows._gathered(x_PD, B, T)
        # What leaves the network is no view: it may be changed in place.
        return found_BTD if partial else found_BTD.clone()

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, None, None, None, None]:
        own = ctx.rows._added(grad_BTD) if ctx.partial else ctx.rows._part(grad_BTD).clone()
        return own, None, None, None, None


class _Share(torch.autograd.Function):
    """From all positions to a share, of the sum over the processes (`partial`) or of what all have; backwards to all."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, rows: SequenceParallel, partial: bool) -> Tensor:
        ctx.rows, ctx.shape = rows, x_BTD.shape[:2]
        return rows._added(x_BTD) if partial else rows._part(x_BTD).clone()

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None]:
        return ctx.rows._gathered(grad_PD, *ctx.shape), None, None


class _Kept:
    """What autograd keeps of all positions: this process's, and how to put them together once more.

    Several matrices meet the same input: it is put together when the first of them asks, and forgotten after the last.
    """

    def __init__(self, rows: SequenceParallel, x_PD: Tensor, whole_BTD: Tensor):
        self._rows, self._x_PD, self._shape = rows, x_PD, whole_BTD.shape
        self._memory = whole_BTD.untyped_storage().data_ptr()
        self._n_kept = self._n_asked = 0
        self._whole_BTD: Tensor | None = None

    def pack(self, tensor: Tensor) -> Tensor | torch.Size:
        """The shape alone, where a tensor is all positions."""
        is_whole = (
            tensor.untyped_storage().data_ptr() == self._memory
            and tensor.numel() == self._shape.numel()
            and tensor.is_contiguous()
        )
        if not is_whole:
            return tensor
        self._n_kept += 1
        return tensor.shape

    def unpack(self, kept: Tensor | torch.Size) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if self._whole_BTD is None:
            self._whole_BTD = self._rows._gathered(self._x_PD, *self._shape[:2])
        found, self._n_asked = self._whole_BTD, self._n_asked + 1
        if self._n_asked == self._n_kept:
            self._whole_BTD, self._n_asked = None, 0
        return found.view(kept)
