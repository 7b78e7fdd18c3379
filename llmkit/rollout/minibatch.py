"""A rollout -> the answers of one update -> a rank's micro-batches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llmkit.config import UserError
from llmkit.data.order import Permutation, epoch_key
from llmkit.losses.policy import Aggregation, token_weights
from llmkit.rollout.batch import PolicyBatch, Rollouts, by_length
from llmkit.training.engine import seed_of


def minibatch(n: int, n_parts: int, cursor: int, rollout: int, seed: int) -> Tensor:
    """Which of a rollout's n answers its update number `cursor` is of: every epoch has an order of its own."""
    epoch, part = divmod(cursor, n_parts)
    order = Permutation(n, epoch_key(seed_of(seed, "minibatches"), rollout, epoch))
    bounds = [n * i // n_parts for i in (part, part + 1)]
    return torch.from_numpy(order.many(np.arange(*bounds)))


def micro_batches(
    answers: Rollouts, aggregation: Aggregation, max_new_tokens: int, most_tokens: int, rank: int, world: int
) -> list[PolicyBatch]:
    """This rank's share of an update's answers: those of about one length side by side, so that little is padding.

    Args:
        answers: with advantages; all of the update's.
        aggregation: weighs tokens; its denominators add up over micro-batches and ranks.
        max_new_tokens: of an answer.
        most_tokens: of a micro-batch, padding included.

    Raises:
        UserError: there are fewer answers than ranks.
    """
    lengths = answers.lengths_N.tolist()
    if world > len(lengths):
        raise UserError(f"{len(lengths)} answers of a minibatch for {world} ranks: raise rollout.prompts_per_step")
    mine = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))[rank::world]
    parts = by_length([lengths[i] for i in mine], most_tokens)
    return [_batch(answers.rows(torch.tensor([mine[i] for i in p])), aggregation, max_new_tokens) for p in parts]


def _batch(answers: Rollouts, aggregation: Aggregation, max_new_tokens: int) -> PolicyBatch:
    assert answers.advantages_NT is not None
    weights_BT, denominator = token_weights(answers.actions_NT, aggregation, max_new_tokens)
    return PolicyBatch(
        ids_BT=answers.ids_NT,
        labels_BT=answers.labels_NT,
        actions_BT=answers.actions_NT,
        weights_BT=weights_BT.to(answers.advantages_NT.dtype),
        lengths_B=answers.lengths_N,
        sampler_BT=answers.sampler_NT,
        advantages_BT=answers.advantages_NT,
        old_BT=answers.old_NT,
        ref_BT=answers.ref_NT,
        values_BT=answers.values_NT,
        returns_BT=answers.returns_NT,
        denominator=denominator,
        n_tokens=float(answers.lengths_N.sum()),
    )


def tokens_hash(answers: Rollouts) -> int:
    """Identifies the tokens of an update, whatever the number of ranks."""
    total = 0
    for group, length, ids_T in zip(answers.group_N.tolist(), answers.lengths_N.tolist(), answers.ids_NT, strict=True):
        total += seed_of(group, ids_T[:length].numpy().astype("<i4").tobytes().hex())
    return total % (1 << 63)
