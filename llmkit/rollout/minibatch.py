"""A rollout -> the answers of one update -> a rank's micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llmkit.config import UserError
from llmkit.data.order import Permutation, epoch_key
from llmkit.data.shared import SharedRows, cut_by_sum, share_prompts as layout_of
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
    answers: Rollouts,
    aggregation: Aggregation,
    max_new_tokens: int,
    most_tokens: int,
    rank: int,
    world: int,
    share_prompts: bool = False,
) -> list[PolicyBatch]:
    """This rank's share of an update's answers.

    Args:
        answers: with advantages; all of the update's.
        aggregation: weighs tokens; its denominators add up over micro-batches and ranks.
        max_new_tokens: of an answer.
        most_tokens: of a micro-batch, padding included.
        share_prompts: see `passes`.

    Raises:
        UserError: there are fewer answers than ranks.
    """
    if world > len(answers):
        raise UserError(f"{len(answers)} answers of a minibatch for {world} ranks: raise rollout.prompts_per_step")
    return [
        _batch(answers.rows(rows), shared, aggregation, max_new_tokens)
        for rows, shared in passes(answers, most_tokens, rank, world, share_prompts)
    ]


def passes(
    answers: Rollouts, most_tokens: int, rank: int, world: int, share_prompts: bool
) -> list[tuple[Tensor, SharedRows | None]]:
    """The forward passes in which this rank computes its share of some answers: which answers, and their layout.

    Answers of about one length stand side by side, so that little is padding.

    Args:
        answers: all ranks'.
        most_tokens: of a pass, padding included.
        share_prompts: the answers to a prompt stay together, and go through the network behind one copy of it: the
            layout is then that of `Rollouts.rows` of the answers.
    """
    lengths = answers.lengths_N.tolist()
    order = sorted(range(len(answers)), key=lambda i: (-lengths[i], i))
    groups = _groups(answers, order) if share_prompts else []
    if len(groups) == len(answers):  # one answer to each prompt: there is nothing to share
        groups = []
    if not groups:
        mine = order[rank::world]
        cut = by_length([lengths[i] for i in mine], most_tokens)
        return [(torch.tensor([mine[i] for i in part]), None) for part in cut]
    own = groups[rank::world] if len(groups) >= world else _groups(answers, order[rank::world])
    prompts = answers.prompt_lengths_N.tolist()
    sizes = np.array([sum(lengths[i] - prompts[i] for i in group) + prompts[group[0]] for group in own], np.int64)
    found: list[tuple[Tensor, SharedRows | None]] = []
    for part in cut_by_sum(sizes, most_tokens):
        chosen = [own[i] for i in part.tolist()]
        rows = [i for group in chosen for i in group]
        texts = [answers.ids_NT[i, : lengths[i]].numpy() for i in rows]
        layout = layout_of(texts, [prompts[i] for i in rows], [len(group) for group in chosen], pad_id=0)
        found.append((torch.tensor(rows), layout))
    return found


def _groups(answers: Rollouts, order: Sequence[int]) -> list[list[int]]:
    """Answers by their prompts, in the order in which these are first met."""
    found: dict[int, list[int]] = {}
    numbers = answers.group_N.tolist()
    for i in order:
        found.setdefault(numbers[i], []).append(i)
    return list(found.values())


def _batch(answers: Rollouts, shared: SharedRows | None, aggregation: Aggregation, max_new_tokens: int) -> PolicyBatch:
    assert answers.advantages_NT is not None
    weights_BT, denominator = token_weights(answers.actions_NT, aggregation, max_new_tokens)
    return PolicyBatch(
        ids_BT=answers.ids_NT,
        labels_BT=answers.labels_NT,
        prompt_lengths_B=answers.prompt_lengths_N,
        shared=shared,
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
