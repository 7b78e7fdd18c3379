"""Expert parallelism: of N neighbouring ranks each holds an N-th of every layer's experts, and computes the visits of all.

Ranks with the same place among their N hold the same experts: they add up the gradients of these, and have them in shares
where the model is. What is no expert is spread as if there were none of this. The visits travel in `model.exchange`.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from llmkit.config import UserError
from llmkit.model.exchange import Exchange
from llmkit.model.moe import MoE
from llmkit.training.dist import Ranks


def place_of(ranks: Ranks) -> int:
    """This rank's place among the N that hold a layer's experts together."""
    return ranks.rank % ranks.experts


def check_experts(module: nn.Module, ranks: Ranks) -> None:
    """Raises UserError, where a model has no experts, or not so many that all ranks get as many."""
    counts = {m.config.n for m in module.modules() if isinstance(m, MoE)}
    if not counts:
        raise UserError(
            f"parallel.experts ({ranks.experts}): the model has no experts: leave it out, or use parallel.shard"
        )
    for n in sorted(counts):
        if n % ranks.experts:
            raise UserError(
                f"parallel.experts ({ranks.experts}) does not divide the {n} experts of a layer: choose a divisor of it"
            )


def share_experts(module: nn.Module, ranks: Ranks) -> dict[str, int]:
    """Takes the experts away that other ranks hold: of their matrices no row is left. A collective.

    Returns:
        For each parameter of an expert: the place of the ranks that hold it.
    """
    group = _groups([list(range(a, a + ranks.experts)) for a in range(0, ranks.world, ranks.experts)], ranks)
    exchange = Exchange(ranks.experts, place_of(ranks), group)
    owners: dict[str, int] = {}
    names = {id(p): n for n, p in module.named_parameters()}
    for mixture in (m for m in module.modules() if isinstance(m, MoE)):
        mixture.exchange = exchange
        each = mixture.config.n // ranks.experts
        for i, expert in enumerate(mixture.experts):
            for p in expert.parameters():
                owners[names[id(p)]] = i // each
                if i // each != exchange.place:
                    p.data = p.data[:0].clone()
    return owners


def same_place_group(ranks: Ranks) -> Any:
    """The process group of the ranks that hold the same experts as this one. A collective."""
    return _groups([list(range(place, ranks.world, ranks.experts)) for place in range(ranks.experts)], ranks)


def experts_mesh(ranks: Ranks, shares: int) -> Any:
    """The DeviceMesh over which FSDP2 shares this rank's experts: over the ranks with the same place alone.

    Args:
        shares: into how many a whole model is cut, by neighbouring ranks.

    Raises:
        UserError: a group of ranks with shares does not hold every expert.
    """
    from torch.distributed.device_mesh import init_device_mesh

    n, replicas = ranks.experts, ranks.world // shares
    if shares % n:
        raise UserError(
            f"parallel.experts ({n}) does not divide the {shares} ranks that share a model ({replicas} groups of {shares} in "
            f"{ranks.world} ranks): lower parallel.replicas or parallel.experts"
        )
    names = ("replicate", "shard", "experts")
    whole = init_device_mesh(ranks.device.type, (replicas, shares // n, n), mesh_dim_names=names)
    return whole["shard"] if replicas == 1 else whole["replicate", "shard"]


def _groups(members: list[list[int]], ranks: Ranks) -> Any:
    """The process group of those that this rank is one of; all processes make all groups."""
    groups = [dist.new_group(m) for m in members]
    return next(group for group, m in zip(groups, members, strict=True) if ranks.rank in m)
