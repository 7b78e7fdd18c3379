"""Answers whose steps were judged one by one -> rows of ids: what process reward models learn from.

A row is a prompt and the steps of one answer to it, each followed by a separator. A step is judged at the separator's
last token, which has seen the prompt and all steps up to there and nothing else: so the score of a step is what a
sequence classifier gives the row that ends there. The ids of a source are one file in the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmkit.config import Interrupted, UserError
from llmkit.data.config import DataConfig, SourceConfig
from llmkit.data.encoded import Arrays, EncodedSources
from llmkit.data.layouts import Steps, UnusableRow, read_source
from llmkit.data.loader import PADDING
from llmkit.data.packing import bucketed
from llmkit.data.sequences import (
    Dropped,
    Sequences,
    held_out_mask,
    moved,
    prompt_key,
    read_splits,
    refuse_dropped,
    taken,
)
from llmkit.data.sources import Piece, files_of, where
from llmkit.data.turns import prompt_ids
from llmkit.tokenizer import Tokenizer

_VERSION = 1
_BATCH = 256  # rows that are encoded between two looks at the stop flag


@dataclass(frozen=True)
class JudgedSteps(Sequences):
    """One source: sequence i has the labelled steps step_starts[i] : step_starts[i + 1]."""

    step_starts: NDArray[np.int64]
    ends: NDArray[np.int32]
    """Where in its sequence each labelled step's last token stands."""
    labels: NDArray[np.float32]
    """Of each labelled step: 1 right, 0 wrong, or the probability that it is right."""

    def __len__(self) -> int:
        return self.n_sequences


@dataclass(frozen=True)
class StepData:
    """A run's judged answers."""

    train: list[JudgedSteps]
    valid: list[JudgedSteps]
    test: list[JudgedSteps]
    fingerprint: str
    """Hex: equal for equal ids, labels and splits."""


# --- rows -> batches -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepBatch:
    """Micro-batch of B rows of at most T ids, padded on the right, with S labelled steps."""

    ids_BT: Tensor
    lengths_B: Tensor
    """int64; 0: a row of padding."""
    rows_S: Tensor
    """int64, ascending: which row of the batch each step is of."""
    ends_S: Tensor
    """int64: where in the row it is judged."""
    labels_S: Tensor
    """float32."""
    denominator: float
    """How many steps are labelled."""
    n_tokens: float
    """How many ids are no padding."""

    def to(self, device: torch.device | str) -> StepBatch:
        """The batch on a device."""
        return StepBatch(**moved(self, device))


class StepRows:
    """Makes the batches of a `RowLoader`: row i of a source is its answer i."""

    def __init__(self, sources: Sequence[JudgedSteps], *, row_len: int, pad_id: int):
        self.row_len, self._sources, self._pad_id = row_len, list(sources), pad_id
        self.n_rows = [len(s) for s in self._sources]

    def batch(
        self, numbers: NDArray[np.int64], source: NDArray[np.int64], row: NDArray[np.int64]
    ) -> tuple[StepBatch, list[NDArray[Any]]]:
        """See `RowMaker`; the sample numbers make no difference."""
        texts: list[NDArray[Any]] = []
        rows, ends, labels = [], [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
        for s, r in zip(source.tolist(), row.tolist(), strict=True):
            if s == PADDING:
                texts.append(np.empty(0, np.int32))
                continue
            data = self._sources[s]
            steps = slice(*data.step_starts[r : r + 2].tolist())
            rows += [len(texts)] * (steps.stop - steps.start)
            ends.append(data.ends[steps])
            labels.append(data.labels[steps])
            texts.append(data.ids(r))
        lengths = np.array([len(t) for t in texts], np.int64)
        ids = np.full((len(texts), bucketed(int(lengths.max(initial=0)), self.row_len)), self._pad_id, np.int64)
        for i, text in enumerate(texts):
            ids[i, : len(text)] = text
        return StepBatch(
            ids_BT=torch.from_numpy(ids),
            lengths_B=torch.from_numpy(lengths),
            rows_S=torch.tensor(rows, dtype=torch.int64),
            ends_S=torch.from_numpy(np.concatenate(ends).astype(np.int64)),
            labels_S=torch.from_numpy(np.concatenate(labels)),
            denominator=float(len(rows)),
            n_tokens=float(lengths.sum()),
        ), texts


# --- one row ---------------------------------------------------------------------------------------------------------


def encode_steps(
    tokenizer: Tokenizer, row: Steps, separator: str, row_len: int, chat: bool
) -> tuple[list[int], list[int], int, bool]:
    """A prompt with its steps as ids, where in them each step ends, the prompt's length, and whether something was cut.

    The separator is encoded apart, so that its last token is the same after every step. Of a row that is too long the
    prompt loses its beginning, down to one token; steps that do not fit even then are left out.

    Raises:
        UserError: the separator has no tokens.
    """
    prompt = prompt_ids(tokenizer, row.prompt, chat, tools=row.tools)
    mark = tokenizer.encode(separator)
    if not mark:
        raise UserError(f"step_separator {separator!r} has no tokens: a step is judged at the last of them")
    steps: list[int] = []
    ends: list[int] = []
    for step in row.steps:
        ids = tokenizer.encode(step) + mark
        if 1 + len(steps) + len(ids) > row_len:
            break
        steps += ids
        ends.append(len(steps) - 1)
    kept = prompt[max(0, len(prompt) + len(steps) - row_len) :]
    was_cut = len(kept) < len(prompt) or len(ends) < len(row.steps)
    return kept + steps, [len(kept) + end for end in ends], len(kept), was_cut


# --- files -> rows ---------------------------------------------------------------------------------------------------


def prepare_steps(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    *,
    separator: str,
    row_len: int,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> StepData:
    """Reads and encodes a recipe's judged steps, or finds them in the cache.

    Args:
        separator: written after every step.
        row_len: most tokens of a row, see `encode_steps`.
        say: is told which layout each file has.

    Raises:
        UserError: naming file and row, for one that has no layout of steps; or if too many rows are left out, because no
            labelled step of theirs fits.
        Interrupted: should_stop() said so.
    """
    encoded = EncodedSources(cfg, tokenizer)

    def read(source: SourceConfig, frac: float) -> tuple[JudgedSteps, JudgedSteps]:
        inputs = {
            "version": _VERSION,
            "separator": separator,
            "row_len": row_len,
            "chat": cfg.chat,
            "system": cfg.system,
        }

        def make() -> Arrays:
            return _encoded(source, cfg, tokenizer, separator, row_len, should_stop, say)

        made = encoded.arrays(source, files_of(source), "steps", inputs, make)
        refuse_dropped(source.label, "rows", made, len(made["keys"]), cfg)
        held = held_out_mask(made["keys"], frac)
        return _chosen(source.label, made, ~held), _chosen(source.label, made, held)

    train, valid, test = read_splits(cfg, read, "judged step")
    told = json.dumps([[s.hash for s in split] for split in (train, valid, test)]).encode()
    return StepData(train, valid, test, hashlib.sha256(told).hexdigest())


def _encoded(
    source: SourceConfig,
    cfg: DataConfig,
    tokenizer: Tokenizer,
    separator: str,
    row_len: int,
    should_stop: Callable[[], bool],
    say: Callable[[str], None],
) -> Arrays:
    """The rows of a source as arrays, see `JudgedSteps`; `keys` (n, 32) name their prompts."""
    rows: list[NDArray[np.int32]] = []
    prompts: list[int] = []
    n_steps: list[int] = []
    ends: list[int] = []
    labels: list[float] = []
    keys: list[bytes] = []
    was_cut: list[bool] = []
    dropped = Dropped()

    def unusable(piece: Piece, number: int, why: UnusableRow) -> None:
        dropped.add(piece, number, str(why))

    found = read_source(source, "steps", cfg.chat, system=cfg.system, say=say, on_unusable=unusable)
    for n, (piece, number, row) in enumerate(found):
        if n % _BATCH == 0 and should_stop():
            raise Interrupted("stopped while judged steps were being prepared; run again to go on")
        try:
            _check_labels(row)
            ids, places, n_prompt, cut = encode_steps(tokenizer, row, separator, row_len, cfg.chat)
        except UserError as e:
            raise UserError(f"{where(piece, number)}: {e}") from None
        judged = [(end, label) for end, label in zip(places, row.labels, strict=False) if label is not None]
        if not judged:
            dropped.add(piece, number, f"no labelled step fits a row of {row_len} tokens (batch.max_len)")
            continue
        rows.append(np.array(ids, np.int32))
        prompts.append(n_prompt)
        ends += [end for end, _ in judged]
        labels += [label for _, label in judged]
        n_steps.append(len(judged))
        keys.append(prompt_key(row.prompt))
        was_cut.append(cut)
    return {
        "tokens": np.concatenate([np.empty(0, np.int32), *rows]),
        "starts": np.cumsum([0, *map(len, rows)]).astype(np.int64),
        "prompt_lengths": np.array(prompts, np.int64),
        "step_starts": np.cumsum([0, *n_steps]).astype(np.int64),
        "ends": np.array(ends, np.int32),
        "labels": np.array(labels, np.float32),
        "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32),
        "was_cut": np.array(was_cut, np.bool_),
        **dropped.arrays(),
    }


def _check_labels(row: Steps) -> None:
    """Raises UserError for a label that is no probability."""
    for i, label in enumerate(row.labels):
        if label is not None and not 0 <= label <= 1:
            raise UserError(f"labels: item {i}: a number from 0 (wrong) to 1 (right) is expected (got {label:g})")


def _chosen(name: str, made: Arrays, keep: NDArray[np.bool_]) -> JudgedSteps:
    """The rows of a source that are kept, as if there were no others."""
    places, starts = taken(made["starts"], keep)
    steps, step_starts = taken(made["step_starts"], keep)
    return JudgedSteps(
        name=name,
        tokens=made["tokens"][places],
        starts=starts,
        prompt_lengths=made["prompt_lengths"][keep],
        n_cut=int(made["was_cut"][keep].sum()),
        n_dropped=int(made["n_dropped"]),
        step_starts=step_starts,
        ends=made["ends"][steps],
        labels=made["labels"][steps],
    )
