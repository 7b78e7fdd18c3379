"""The next token of rows that each have their own settings, and whether a draft's token may stand for it.

Shapes: B rows, G rows with the same settings, V the tokenizer's vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkit.inference.config import SamplingConfig
from llmkit.inference.engine.scheduler import Row
from llmkit.inference.sampling import draw, drawn_log_probs, filtered, log_probs, sample


@dataclass(frozen=True)
class Proposal:
    """A draft model's token."""

    token: int
    probs_V: Tensor | None
    """The distribution from which it was drawn; None: it is the most probable."""


@dataclass(frozen=True)
class Choice:
    """A token and what the events of the engine say of it."""

    token: int
    logprob: float
    drawn_logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]


def distribution(logits_GV: Tensor, sampling: SamplingConfig, vocab_size: int) -> Tensor:
    """What temperature and filters make of scores: the probabilities from which is drawn, fp32 [G, V]."""
    kept_GV = filtered(log_probs(logits_GV, sampling.temperature, vocab_size), sampling)
    return kept_GV / kept_GV.sum(-1, keepdim=True)


def by_settings(rows: Sequence[Row], *more: Sequence[object]) -> list[list[int]]:
    """Indices of rows that can be drawn together: of equal temperature and filters, and equal in what else is given."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, row in enumerate(rows):
        s = row.request.sampling
        key = (s.temperature, s.top_k, s.top_p, s.min_p, *(values[i] for values in more))
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def accepted(probs_GV: Tensor, draft_GV: Tensor, tokens_G: Tensor, uniforms_G2: Tensor) -> Tensor:
    """Tokens [G] that follow `probs` exactly, although each is the draft's where that is possible.

    A drafted x is taken with probability min(1, p(x) / q(x)); else the token is drawn from what q lacks of p,
    max(0, p - q) (Leviathan et al. 2023, arXiv 2211.17192, theorem 1).

    Args:
        probs_GV: p, the model's distributions.
        draft_GV: q, those from which the draft's tokens were drawn.
        tokens_G: the draft's tokens.
        uniforms_G2: float64 in [0, 1): for taking, and for drawing anew.
    """
    p_G, q_G = (x.double().gather(1, tokens_G[:, None])[:, 0] for x in (probs_GV, draft_GV))
    missing_GV = (probs_GV - draft_GV).clamp(min=0)
    # By rounding, p and q may differ by nothing although x was refused: then p itself is as good.
    missing_GV = torch.where(missing_GV.sum(-1, keepdim=True) > 0, missing_GV, probs_GV)
    others_G = draw(missing_GV, uniforms_G2[:, 1]).clamp(max=probs_GV.shape[1] - 1)
    return torch.where(uniforms_G2[:, 0] * q_G < p_G, tokens_G, others_G)


def choose(
    rows: Sequence[Row], logits_BV: Tensor, vocab_size: int, proposals: Sequence[Proposal | None] | None = None
) -> list[Choice]:
    """One token for every row, by its own settings and random numbers: those that `generate` would draw.

    With a proposal the token comes from the same distribution, but by other draws. A row whose scores are not finite
    gets a log-probability that is not.

    Args:
        rows: each with the tokens that stand before.
        logits_BV: the model's scores after these tokens, [B, V or more].
        vocab_size: V.
        proposals: what the draft proposes for each row; of a greedy row it changes nothing.
    """
    proposals = [None] * len(rows) if proposals is None else proposals
    drafted = [p is not None and p.probs_V is not None for p in proposals]
    steered = [row.steering is not None for row in rows]
    n_top = [row.request.top_logprobs for row in rows]
    found: dict[int, Choice] = {}
    for group in by_settings(rows, drafted, steered, n_top):
        among = [rows[i] for i in group]
        logits_GV = logits_BV if len(group) == len(rows) else logits_BV[torch.tensor(group, device=logits_BV.device)]
        steered_GV = (
            torch.cat(
                [
                    logits_GV[g : g + 1] if r.steering is None else r.steering(logits_GV[g : g + 1])
                    for g, r in enumerate(among)
                ]
            )
            if steered[group[0]]
            else None
        )
        choices = _choose_alike(among, logits_GV, steered_GV, vocab_size, [proposals[i] for i in group])
        found.update(zip(group, choices, strict=True))
    return [found[i] for i in range(len(rows))]


def _choose_alike(
    rows: Sequence[Row],
    logits_GV: Tensor,
    steered_GV: Tensor | None,
    vocab_size: int,
    proposals: Sequence[Proposal | None],
) -> list[Choice]:
    """`choose` for rows of equal temperature and filters, all of them with a draft's distribution or none."""
    sampling, device = rows[0].request.sampling, logits_GV.device
    chosen_from_GV = logits_GV if steered_GV is None else steered_GV
    drafts = [p for p in proposals if p is not None and p.probs_V is not None]
    logprobs_GV = log_probs(logits_GV, sampling.temperature, vocab_size)
    if drafts and sampling.temperature > 0:
        uniforms_G2 = torch.tensor([[r.random.random(), r.random.random()] for r in rows], dtype=torch.float64)
        draft_GV = torch.stack([p.probs_V for p in drafts if p.probs_V is not None])
        tokens_G = torch.tensor([p.token for p in drafts], device=device)
        probs_GV = distribution(chosen_from_GV, sampling, vocab_size)
        ids_G = accepted(probs_GV, draft_GV, tokens_G, uniforms_G2.to(device))
        logprobs_G = logprobs_GV.gather(1, ids_G[:, None])[:, 0]
    else:
        uniforms_G = torch.tensor([r.random.random() for r in rows], dtype=torch.float64).to(device)
        ids_G, logprobs_G = sample(logits_GV, uniforms_G, sampling, vocab_size, steered_GV)
    drawn: list[float] | list[None] = [None] * len(rows)
    if sampling.has_filters:
        drawn = drawn_log_probs(chosen_from_GV, ids_G, sampling, vocab_size).tolist()
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(rows)
    if n_top := min(rows[0].request.top_logprobs, vocab_size):
        best = logprobs_GV.topk(n_top)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        tops = [tuple(zip(ids, values, strict=True)) for ids, values in pairs]
    for g, row in enumerate(rows):
        if row.steering is not None:
            row.steering.update(ids_G[g : g + 1])
    return [Choice(*c) for c in zip(ids_G.tolist(), logprobs_G.tolist(), drawn, tops, strict=True)]
