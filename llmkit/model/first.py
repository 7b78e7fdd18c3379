"""First values of a network's parameters: put there at once, or, while these have no memory, when they get some.

A network that is spread over processes is built on PyTorch's meta device. Where its values come from then waits with it:
each process draws or reads them one tensor at a time, and keeps its pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

Values = Callable[[], Iterator[tuple[str, Tensor]]]
"""Gives whole parameters by their names, one at a time and always the same; a view of a file is read where it is used."""


@torch.no_grad()
def give(module: nn.Module, values: Values) -> None:
    """Gives a module's parameters values; some of them may get others later.

    Args:
        module: a GPT, or another head beside a Decoder; all of it has memory, or nothing.
        values: of some parameters or all.
    """
    parameters = dict(module.named_parameters())
    if any(p.is_meta for p in parameters.values()):
        pending_of(module).append(values)
        return
    for name, value in values():
        parameters[name].copy_(value)


def pending_of(module: nn.Module) -> list[Values]:
    """What a module without memory was given, the earliest first."""
    pending = module.get_submodule("model").pending
    assert isinstance(pending, list)
    return pending


@torch.no_grad()
def make(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Moves a module to a device and a precision, and makes it whole there if it had no memory."""
    if not any(p.is_meta for p in module.parameters()):
        module.to(device=device, dtype=dtype)
        return
    before = {name: p.dtype for name, p in module.named_parameters()}  # what values are rounded to first
    module.to(dtype=dtype).to_empty(device=device)
    pending, parameters = pending_of(module), dict(module.named_parameters())
    for values in pending:
        for name, value in values():
            parameters[name].copy_(value.to(before[name]))
    pending.clear()
