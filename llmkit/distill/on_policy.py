"""The student's own answers: generalised knowledge distillation (Agarwal et al. 2023, arXiv 2306.13649).

At a share of the steps the data give only the questions: the student answers, the teacher says at every token of the
answer what it would have written there, and no gradient goes through the sampling. Which steps, and what is written, are
functions of the seed, the step and the weights, so nothing of it is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from llmkit.config import Interrupted
from llmkit.data.chats import ChatRows
from llmkit.data.loader import Batch, RowLoader, text_batch
from llmkit.data.packing import IGNORE, Rows
from llmkit.distill.config import OnPolicyConfig
from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import generate
from llmkit.model.gpt import GPT
from llmkit.rollout.batch import by_length
from llmkit.tokenizer import Tokenizer
from llmkit.training.dist import Ranks
from llmkit.training.engine import seed_of


def is_on_policy(seed: int, step: int, frac: float) -> bool:
    """Whether the student writes the answers of a step."""
    return seed_of(seed, "on policy", step) < frac * 2**63


def questions(rows: ChatRows, loader: RowLoader, step: int, row_len: int, seed: int) -> list[tuple[list[int], int]]:
    """The prompts of this rank's conversations of a step, each with the seed of its answer.

    A conversation's prompt is all that stands before its last answer. One that leaves no room for an answer is passed
    over.
    """
    found = []
    for number, source, row in zip(*(a.tolist() for a in loader.samples(step)), strict=True):
        for k, (ids, trained) in enumerate(rows.documents(source, row)):
            end = last_answer(trained)
            if 0 < end <= row_len:
                found.append((ids[:end].tolist(), seed_of(seed, "answer", number, k)))
    return found


def last_answer(trained: NDArray[np.bool_]) -> int:
    """Where the last run of trained tokens begins."""
    where = np.flatnonzero(trained)
    gaps = np.flatnonzero(np.diff(where) > 1)
    return int(where[gaps[-1] + 1] if len(gaps) else where[0])


def own_answers(
    student: GPT,
    asked: Sequence[tuple[list[int], int]],
    config: OnPolicyConfig,
    tokenizer: Tokenizer,
    ranks: Ranks,
    *,
    row_len: int,
    most_tokens: int,
    should_stop: Callable[[], bool],
) -> list[Batch]:
    """Micro-batches of this rank's answers, on which only what the student wrote is trained; all ranks have as many.

    Args:
        student: in evaluation mode.
        asked: prompts with seeds, from `questions`.
        row_len: most inputs of a row; answers end there.
        most_tokens: of a micro-batch, padding included.

    Raises:
        Interrupted: on all ranks, if should_stop() said so on one.
    """
    answered = ranks.together(lambda: _written(student, asked, config, tokenizer, row_len, should_stop))
    if ranks.any(answered is None):
        raise Interrupted("stopped while the student wrote its answers: the step begins anew")
    lengths = [len(ids) - 1 for ids, _ in answered]
    batches = [_batch([answered[i] for i in part], tokenizer.pad_id) for part in by_length(lengths, most_tokens)]
    n = int(ranks.max_number(float(len(batches))))
    return batches + [_batch([], tokenizer.pad_id)] * (n - len(batches))


def _written(
    student: GPT,
    asked: Sequence[tuple[list[int], int]],
    config: OnPolicyConfig,
    tokenizer: Tokenizer,
    row_len: int,
    should_stop: Callable[[], bool],
) -> list[tuple[list[int], int]] | None:
    """Prompts with their answers, and how many ids are the prompt's, the longest prompt first. None: asked to stop."""
    order = sorted(range(len(asked)), key=lambda i: (-len(asked[i][0]), i))
    settings = SamplingConfig(max_new_tokens=config.max_new_tokens, temperature=config.temperature)
    found = []
    for start in range(0, len(order), config.batch_size):
        part = [asked[i] for i in order[start : start + config.batch_size]]
        made = generate(
            student,
            [ids for ids, _ in part],
            settings,
            tokenizer=tokenizer,
            seeds=[seed for _, seed in part],
            should_stop=should_stop,
        )
        for (prompt, _), answer in zip(part, made, strict=True):
            if answer.finish_reason == "interrupted":
                return None
            found.append(((prompt + answer.ids)[: row_len + 1], len(prompt)))
    return found


def _batch(answers: Sequence[tuple[list[int], int]], pad_id: int) -> Batch:
    width = max((len(ids) - 1 for ids, _ in answers), default=1)
    shape = (max(1, len(answers)), width)
    ids_BT, labels_BT = np.full(shape, pad_id, np.int64), np.full(shape, IGNORE, np.int64)
    docs_BT = np.full(shape, -1, np.int32)
    for b, (ids, n_prompt) in enumerate(answers):
        n = len(ids) - 1
        ids_BT[b, :n], docs_BT[b, :n] = ids[:-1], 0
        labels_BT[b, n_prompt - 1 : n] = ids[n_prompt:]
    positions_BT = np.broadcast_to(np.arange(width), shape).copy()
    return text_batch(Rows(ids_BT, labels_BT, positions_BT, docs_BT), pin_memory=False)
