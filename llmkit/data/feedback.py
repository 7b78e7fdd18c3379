"""Answers that were judged one by one, good or bad -> rows: what KTO learns from.

Each row comes with a mismatched sequence too, its prompt with the answer to another one: the log-ratios of those tell how
far the policy has gone from the reference.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmkit.config import Interrupted, UserError
from llmkit.data.config import DataConfig, SourceConfig
from llmkit.data.encoded import Arrays, EncodedSources
from llmkit.data.layouts import Feedback, read_source, reader
from llmkit.data.loader import PADDING
from llmkit.data.sequences import (
    Dropped,
    Sequences,
    cut_by_length,
    encoded_answers,
    held_out_mask,
    moved,
    numbers_of,
    padded,
    prompt_key,
    read_splits,
    refuse_dropped,
    taken,
)
from llmkit.data.sources import Piece, files_of, units_of, where, whole_records
from llmkit.tokenizer import Tokenizer

_VERSION = 1
_BATCH = 256  # rows that are encoded between two looks at the stop flag


@dataclass(frozen=True)
class FeedbackSequences(Sequences):
    """One source: sequence i is row i."""

    is_good: NDArray[np.bool_]
    partner: NDArray[np.int64]
    """For each row, another one with another prompt: the next there is, after the last the first."""

    def __len__(self) -> int:
        return self.n_sequences

    def mismatched(self, i: int, row_len: int) -> tuple[NDArray[np.int32], int]:
        """The prompt of row i with the answer of its partner, and how many of the ids are the prompt's."""
        partner = int(self.partner[i])
        answer = self.ids(partner)[self.prompt_lengths[partner] :]
        prompt = self.ids(i)[: self.prompt_lengths[i]][-(row_len - len(answer)) :]
        return np.concatenate([prompt, answer]), len(prompt)


@dataclass(frozen=True)
class FeedbackData:
    """A run's judged answers."""

    train: list[FeedbackSequences]
    valid: list[FeedbackSequences]
    test: list[FeedbackSequences]
    fingerprint: str
    """Hex: equal for equal ids, judgements and splits."""


# --- rows -> batches -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """B sequences of at most T ids, padded on the right."""

    ids_BT: Tensor
    lengths_B: Tensor
    prompt_lengths_B: Tensor
    extra_B: Tensor | None
    """A number that belongs to each sequence: its log-probability under the reference model, in nats."""

    def to(self, device: torch.device | str) -> Answers:
        """The sequences on a device."""
        return Answers(**moved(self, device))


@dataclass(frozen=True)
class FeedbackBatch:
    """Micro-batch of B rows."""

    matched: Answers
    mismatched: Answers
    is_good_B: Tensor
    weights_B: Tensor
    """1; 0: padding."""
    denominator: float
    """How many rows are real."""
    n_tokens: float
    """How many ids of the matched sequences are no padding."""

    def to(self, device: torch.device | str) -> FeedbackBatch:
        """The batch on a device."""
        answers = {"matched": self.matched.to(device), "mismatched": self.mismatched.to(device)}
        return FeedbackBatch(**{**moved(self, device), **answers})


class FeedbackRows:
    """Makes the batches of a `RowLoader`: row i of a source is its sequence i.

    Args:
        sources: the judged answers.
        row_len: most ids of a sequence.
        pad_id: fills the rows up.
        micro_tokens: most ids of a micro-batch that `cut` makes, padding included; a row that is longer is alone.
        extra: two numbers for each row of each source (n, 2), of the matched and the mismatched sequence.
    """

    def __init__(
        self,
        sources: Sequence[FeedbackSequences],
        *,
        row_len: int,
        pad_id: int,
        micro_tokens: int = 8192,
        extra: Sequence[NDArray[Any]] | None = None,
    ):
        self.row_len, self._sources, self._pad_id, self._extra = row_len, list(sources), pad_id, extra
        self._micro_tokens = micro_tokens
        self.n_rows = [len(s) for s in self._sources]
        self._lengths = [s.lengths for s in self._sources]

    @property
    def widest(self) -> int:
        """Most ids of a row."""
        return max(int(lengths.max()) for lengths in self._lengths)

    def cut(self, source: NDArray[np.int64], row: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Which of the rows make up each micro-batch: sorted by length, so that little of it is padding."""
        lengths = [self._lengths[s][r] for s, r in zip(source.tolist(), row.tolist(), strict=True)]
        return cut_by_length(np.array(lengths, np.int64), np.ones(len(lengths), np.int64), self._micro_tokens)

    def batch(
        self, numbers: NDArray[np.int64], source: NDArray[np.int64], row: NDArray[np.int64]
    ) -> tuple[FeedbackBatch, list[NDArray[Any]]]:
        """See `RowMaker`; the sample numbers make no difference."""
        rows = list(zip(source.tolist(), row.tolist(), strict=True))
        real = [(self._sources[s], r) for s, r in rows if s != PADDING]
        sequences = [[(data.ids(r), int(data.prompt_lengths[r])) for data, r in real],
                     [data.mismatched(r, self.row_len) for data, r in real]]  # fmt: skip
        answers = []
        for which, pairs in enumerate(sequences):
            tensors = padded([ids for ids, _ in pairs], [n for _, n in pairs], self.row_len, self._pad_id)
            extra = (
                [] if self._extra is None else [self._extra[s][r, which : which + 1] for s, r in rows if s != PADDING]
            )
            answers.append(Answers(*tensors, numbers_of(extra, len(tensors[0]), self._extra)))
        n = max(1, len(real))
        batch = FeedbackBatch(
            matched=answers[0],
            mismatched=answers[1],
            is_good_B=torch.tensor([bool(data.is_good[r]) for data, r in real] or [True]),
            weights_B=torch.full((n,), float(bool(real)), dtype=torch.float64),
            denominator=float(len(real)),
            n_tokens=float(sum(len(ids) for ids, _ in sequences[0])),
        )
        empty = np.empty(0, np.int32)
        return batch, [empty if s == PADDING else self._sources[s].ids(r) for s, r in rows]


# --- files -> judged answers -----------------------------------------------------------------------------------------


def prepare_feedback(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    *,
    row_len: int,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> FeedbackData:
    """Reads and encodes a recipe's judged answers, or finds them in the cache. See `preferences.prepare_preferences`.

    Raises:
        UserError: also if all rows of a split have the same prompt, so that there are no mismatched sequences.
    """
    encoded = EncodedSources(cfg, tokenizer)

    def read(source: SourceConfig, frac: float) -> tuple[FeedbackSequences, FeedbackSequences]:
        inputs = {"version": _VERSION, "row_len": row_len, "chat": cfg.chat, "system": cfg.system}
        made = encoded.arrays(
            source,
            files_of(source),
            "feedback",
            inputs,
            lambda: _encoded(source, cfg, tokenizer, row_len, should_stop, say),
        )
        refuse_dropped(source.label, "rows", made, len(made["keys"]), cfg)
        held = held_out_mask(made["keys"], frac)
        return _chosen(source.label, made, ~held), _chosen(source.label, made, held)

    train, valid, test = read_splits(cfg, read, "judged answer")
    told = json.dumps([[s.hash for s in split] for split in (train, valid, test)]).encode()
    return FeedbackData(train, valid, test, hashlib.sha256(told).hexdigest())


def _judged(
    source: SourceConfig, cfg: DataConfig, say: Callable[[str], None], dropped: Dropped
) -> Iterator[tuple[Piece, int, Feedback]]:
    """The rows of a source. Preferences are taken apart: a response that is only better is good, one only worse bad."""
    rows = read_source(
        source,
        _kind(source, cfg.chat),
        cfg.chat,
        system=cfg.system,
        say=say,
        on_unusable=lambda piece, number, why: dropped.add(piece, number, str(why)),
    )
    for piece, number, row in rows:
        if isinstance(row, Feedback):
            yield piece, number, row
            continue
        better, worse = ({pair[side] for pair in row.pairs} for side in (0, 1))
        for i in sorted(better ^ worse):
            yield piece, number, Feedback(row.prompt, row.responses[i], i in better, row.tools)


def _kind(source: SourceConfig, chat: bool) -> Literal["feedback", "preference"]:
    """Which of the two a source holds, by the columns of its first row."""
    pieces = (piece for unit in units_of(files_of(source), source.limit) for piece in unit)
    keys = next((record.keys() for piece in pieces for _, record in whole_records(piece)), None)
    if keys is None:
        return "feedback"
    try:
        reader(keys, "feedback", source.columns, chat)
    except UserError:
        with contextlib.suppress(UserError):
            reader(keys, "preference", source.columns, chat)
            return "preference"
    return "feedback"


def _encoded(
    source: SourceConfig,
    cfg: DataConfig,
    tokenizer: Tokenizer,
    row_len: int,
    should_stop: Callable[[], bool],
    say: Callable[[str], None],
) -> Arrays:
    tokens: list[NDArray[np.int32]] = []
    prompts: list[int] = []
    labels: list[bool] = []
    keys: list[bytes] = []
    was_cut: list[bool] = []
    dropped = Dropped()
    for n, (piece, number, row) in enumerate(_judged(source, cfg, say, dropped)):
        if n % _BATCH == 0 and should_stop():
            raise Interrupted("stopped while judged answers were being prepared; run again to go on")
        try:
            prompt, (answer,), cut = encoded_answers(
                tokenizer, row.prompt, [row.response], row_len, cfg.chat, row.tools
            )
        except UserError as e:
            raise UserError(f"{where(piece, number)}: {e}") from None
        if answer is None:
            dropped.add(piece, number, f"the answer is longer than a row of {row_len} tokens (batch.max_len)")
            continue
        tokens.append(np.array(prompt + answer, np.int32))
        prompts.append(len(prompt))
        labels.append(row.label)
        keys.append(prompt_key(row.prompt))
        was_cut.append(cut)
    return {
        "tokens": np.concatenate([np.empty(0, np.int32), *tokens]),
        "starts": np.cumsum([0, *map(len, tokens)]).astype(np.int64),
        "prompt_lengths": np.array(prompts, np.int64),
        "is_good": np.array(labels, np.bool_),
        "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32),
        "was_cut": np.array(was_cut, np.bool_),
        **dropped.arrays(),
    }


def partners(keys: NDArray[np.uint8]) -> NDArray[np.int64]:
    """For each row the next one with another key, the first following the last; -1 where all have the same."""
    n = len(keys)
    if n == 0:
        return np.empty(0, np.int64)
    _, ids = np.unique(keys, axis=0, return_inverse=True)
    twice = np.concatenate([ids.ravel()] * 2)
    found = np.full(2 * n, -1, np.int64)
    for i in range(2 * n - 2, -1, -1):  # the next row differs, or the next that differs from it also does from this one
        found[i] = i + 1 if twice[i] != twice[i + 1] else found[i + 1]
    return np.where(found[:n] < 0, -1, found[:n] % n)


def _chosen(name: str, made: Arrays, keep: NDArray[np.bool_]) -> FeedbackSequences:
    """The rows of a source that are kept, as if there were no others."""
    places, starts = taken(made["starts"], keep)
    partner = partners(made["keys"][keep])
    if (partner < 0).any():
        raise UserError(
            f"{name}: all {len(partner)} rows have the same prompt: kto measures how far the model has moved on prompts "
            "with answers to others: give at least two prompts in each split"
        )
    return FeedbackSequences(
        name=name,
        tokens=made["tokens"][places],
        starts=starts,
        prompt_lengths=made["prompt_lengths"][keep],
        n_cut=int(made["was_cut"][keep].sum()),
        n_dropped=int(made["n_dropped"]),
        is_good=made["is_good"][keep],
        partner=partner,
    )
