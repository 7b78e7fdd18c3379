"""Answers behind one copy of their prompt are computed as answers that stand alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmkit.data.shared import share_prompts
from llmkit.inference.scoring import shared_scores
from llmkit.losses import token_logprobs
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.heads import SequenceClassifier, init_head
from llmkit.rollout.batch import AnswerBatch, Rollouts, hidden_states
from llmkit.rollout.minibatch import passes

SHAPE = GPTConfig(vocab_size=64, n_layers=2, n_heads=2, d_model=16, d_ff=24, max_seq_len=64)


def rollouts(groups: list[int], prompts: list[int], answers: list[int]) -> Rollouts:
    """Answers of the given groups; those of one group have its prompt. The second of a turn's tokens is a tool's."""
    g = torch.Generator().manual_seed(0)
    prompt_of = {group: torch.randint(1, 60, (prompts[group],), generator=g) for group in sorted(set(groups))}
    N, lengths = len(groups), [prompts[group] + n for group, n in zip(groups, answers, strict=True)]
    T = max(lengths)
    ids, actions = torch.zeros(N, T, dtype=torch.int64), torch.zeros(N, T, dtype=torch.bool)
    for i, group in enumerate(groups):
        n = prompts[group]
        ids[i, : lengths[i]] = torch.cat([prompt_of[group], torch.randint(1, 60, (answers[i],), generator=g)])
        actions[i, n - 1 : lengths[i] - 1] = True
        if answers[i] > 3:
            actions[i, n + 1] = False
    number = torch.tensor(groups)
    zeros = torch.zeros(N, T, dtype=torch.float64)
    return Rollouts(
        ids_NT=ids,
        actions_NT=actions,
        lengths_N=torch.tensor(lengths),
        prompt_lengths_N=torch.tensor([prompts[group] for group in groups]),
        group_N=number,
        prompt_N=number,
        finished_N=torch.ones(N, dtype=torch.bool),
        sampler_NT=zeros,
        scores_N=torch.zeros(N),
    )


SOME = rollouts([0, 1, 0, 2, 1, 0, 2], [5, 9, 3], [7, 2, 6, 11, 8, 1, 4])


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("most", [12, 40, 1000])
def test_every_answer_is_in_one_pass(share: bool, world: int, most: int) -> None:
    """Whatever the sizes; the answers to a prompt stay together as long as there is a prompt for every rank."""
    found = [passes(SOME, most, rank, world, share) for rank in range(world)]
    rows = [part.tolist() for of_rank in found for part, _ in of_rank]
    assert sorted(i for part in rows for i in part) == list(range(len(SOME)))
    assert all((shared is not None) == share for of_rank in found for _, shared in of_rank) or world > 3
    if share and world <= 3:
        of_group = {n: {k for k, part in enumerate(rows) if n in SOME.group_N[part]} for n in (0, 1, 2)}
        assert all(len(parts) == 1 for parts in of_group.values())


def test_one_answer_to_a_prompt_shares_nothing() -> None:
    """Their rows would only need a mask."""
    alone = rollouts([0, 1, 2], [5, 9, 3], [7, 2, 6])
    assert [shared for _, shared in passes(alone, 100, 0, 1, True)] == [None]


def test_log_probabilities_and_gradients() -> None:
    """fp64: those of every action, and of all weights, are those of rows of one answer each."""
    sums = []
    for share in (True, False):
        model = GPT(SHAPE).double()
        init_weights(model, 0)
        total, found = torch.zeros((), dtype=torch.float64), torch.zeros(SOME.ids_NT.shape, dtype=torch.float64)
        for rows, shared in passes(SOME, 40, 0, 1, share):
            part = SOME.rows(rows)
            batch = AnswerBatch(part.ids_NT, part.labels_NT, part.prompt_lengths_N, shared)
            logprobs, _ = token_logprobs(hidden_states(model, batch), model.head_weight, batch.labels_BT)
            total = total + (logprobs * torch.arange(1, 1 + logprobs.shape[1])).sum()
            found[rows, : logprobs.shape[1]] = logprobs.detach()
        total.backward()
        sums.append((found, {n: p.grad for n, p in model.named_parameters()}))
    (one, gradients), (other, expected) = sums
    assert ((one != 0) == SOME.actions_NT).all()
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-11, msg=name)


def test_scores() -> None:
    """A reward model's of every answer; an answer may be empty, and then its prompt is scored."""
    model = SequenceClassifier(SHAPE, 2).double()
    init_weights(model, 0)
    init_head(model, 1)
    g = np.random.default_rng(0)
    prompts = [g.integers(1, 60, n) for n in (6, 3)]
    texts = [np.concatenate([prompts[p], g.integers(1, 60, n)]) for p, n in ((0, 4), (0, 0), (0, 9), (1, 2))]
    shared = share_prompts(texts, [6, 6, 6, 3], [3, 1], 0)
    alone = [model(torch.from_numpy(t)[None], torch.tensor([len(t)]))[0] for t in texts]
    torch.testing.assert_close(shared_scores(model, shared), torch.stack(alone), rtol=0, atol=1e-12)
