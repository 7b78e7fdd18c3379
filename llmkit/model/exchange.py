"""Experts that are spread over several processes (expert parallelism): each holds some of every layer's, and visits travel.

A process sends every visit of its own tokens to the process that holds the expert, which computes the visits of all and
sends them back (GShard, arXiv 2006.16668, section 3.2); gradients go the same ways in reverse. Nothing has a capacity: no
visit is dropped, however uneven the load, so the result is that of one process.

Shapes: E experts, N processes, of which process p holds the p-th E / N of the experts; S visits of this process's tokens,
sorted by expert, and so by who holds it; R visits that arrive here; D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmkit.model.moe import Dispatch, Experts


class _Swap(torch.autograd.Function):
    """Rows for every process, one after the other, to rows from every process; the gradient travels back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, given: list[int], got: list[int], group: Any) -> Tensor:
        ctx.given, ctx.got, ctx.group = given, got, group
        return _swapped(x, given, got, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _swapped(grad, ctx.got, ctx.given, ctx.group), None, None, None


def _swapped(x: Tensor, given: list[int], got: list[int], group: Any) -> Tensor:
    out = x.new_empty((sum(got), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), got, given, group=group)
    return out


@dataclass(frozen=True)
class Exchange:
    """Who computes the visits of a layer. Calling it is a collective, and so is the backward pass of what it gives: a
    process that sends nothing takes part, and so does one that nothing arrives at."""

    n: int
    """Processes that hold a layer's experts together."""
    place: int
    """This one's number among them."""
    group: Any
    """Their process group."""

    def __call__(self, experts: Experts, x_SD: Tensor, sizes_E: Tensor) -> Tensor:
        """What the experts make of this process's visits, [S, D].

        Args:
            experts: of which this process's compute.
            x_SD: states, sorted by expert.
            sizes_E: int64, how many visits each expert gets.
        """
        given_NE = sizes_E.view(self.n, -1)
        got_NE = torch.empty_like(given_NE)
        dist.all_to_all_single(got_NE, given_NE.contiguous(), group=self.group)
        given, got = given_NE.sum(1).tolist(), got_NE.sum(1).tolist()
        if torch.is_grad_enabled() and not x_SD.requires_grad:
            # Below everything is frozen here, and maybe so are these experts: others' may not be, and wait for the gradient.
            x_SD = x_SD.detach().requires_grad_()
        x_RD = _Swap.apply(x_SD, given, got, self.group)
        # They arrive by process, and of each by expert. Each expert computes its own at once, the first process's first:
        # an order that depends on the step alone, not on who was faster.
        each = got_NE.shape[1]
        expert_R = torch.arange(each, device=x_SD.device).repeat(self.n).repeat_interleave(got_NE.flatten())
        order_R = expert_R.argsort(stable=True)
        back_R = order_R.argsort()
        sizes = [0] * len(experts)
        sizes[self.place * each : (self.place + 1) * each] = got_NE.sum(0).tolist()
        y_RD = experts(Dispatch.apply(x_RD, order_R, back_R[:, None]), sizes)
        y_SD: Tensor = _Swap.apply(Dispatch.apply(y_RD, back_R, order_R[:, None]), got, given, self.group)
        return y_SD
