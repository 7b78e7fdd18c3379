"""Scores of whole texts, or at given tokens, by a classifier or reward model, in batches of about one length.

Shapes: N texts, B rows of a batch, T tokens, C scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmkit.data.shared import SharedRows
from llmkit.inference.batch import evaluating
from llmkit.inference.embed import BATCH_TOKENS, batches_of
from llmkit.model.heads import SequenceClassifier


def score_sequences(
    model: SequenceClassifier,
    rows: Sequence[Sequence[int]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    share: tuple[int, int] = (0, 1),
    should_stop: Callable[[], bool] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor | None:
    """Scores [N, C] of texts given as ids, on the CPU, fp32 or better; a text's does not depend on the others.

    Args:
        model: a causal model's texts are scored at their last token, by length (B78).
        rows: ids, none empty.
        batch_tokens: most tokens of a forward pass, padding included.
        share: (rank, world): only every world-th batch is computed here; the others' rows are 0, so that a sum over
            ranks is the whole.
        should_stop: asked before every batch, as often on every rank.
        on_batch: called with the number of texts done since the last call.

    Returns:
        None if it was asked to stop.
    """
    rank, world = share
    batches = list(batches_of(rows, batch_tokens))
    wide, n_scores = _kind(model)
    scores_NC = torch.zeros(len(rows), n_scores, dtype=wide)
    with evaluating(model), torch.no_grad():
        for first in range(0, len(batches), world):
            if should_stop is not None and should_stop():
                return None
            if first + rank >= len(batches):
                continue
            batch = batches[first + rank]
            scores_NC[batch] = model(*_padded(model, [rows[i] for i in batch])).to(wide).cpu()
            if on_batch is not None:
                on_batch(len(batch))
    return scores_NC


def score_tokens(
    model: SequenceClassifier,
    rows: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """The first score at each of the given places of each text: a process reward model's, at the ends of steps."""
    found: list[list[float]] = [[] for _ in rows]
    with evaluating(model), torch.no_grad():
        for batch in batches_of(rows, batch_tokens):
            scores_BT = model.at_tokens(_padded(model, [rows[i] for i in batch])[0])[..., 0].float().cpu()
            for row_T, i in zip(scores_BT, batch, strict=True):
                found[i] = row_T[list(places[i])].tolist()
            if on_batch is not None:
                on_batch(len(batch))
    return found


def shared_scores(model: SequenceClassifier, shared: SharedRows) -> Tensor:
    """A causal model's scores [B, C] of sequences in rows that hold each prompt once, in their order.

    As with `inference.logprobs.shared_logprobs`, a model with a sliding window can't be asked so.
    """
    return model.at_ends(shared.ids_RT, shared.positions_RT, shared.mask(), shared.ends_B)


def _kind(model: SequenceClassifier) -> tuple[torch.dtype, int]:
    """The precision of scores, and how many a text has."""
    head = model.get_parameter("score.weight" if model.config.causal else "classifier.weight")
    return torch.promote_types(head.dtype, torch.float32), head.shape[0]


def _padded(model: SequenceClassifier, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids [B, T], padded on the right, and lengths [B]."""
    lengths = [len(row) for row in rows]
    ids_BT = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    for b, row in enumerate(rows):
        ids_BT[b, : lengths[b]] = torch.as_tensor(row)
    device = next(model.parameters()).device
    return ids_BT.to(device), torch.tensor(lengths, device=device)
