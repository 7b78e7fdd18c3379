"""Answers that were compared with each other -> groups of rows: what preference losses and reward models learn from.

A group is one prompt and the answers to it that take part in a comparison; the prompt is encoded once, so that all of
them begin with the same ids. Every sequence ends with the token that ends the turn. The ids of a source are one file in
the cache.

Legend: B sequences of a batch, T ids of the longest, P pairs.
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
from llmkit.data.layouts import Preference, read_source
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
from llmkit.data.shared import SharedRows, cut_by_sum, share_prompts
from llmkit.data.sources import Piece, files_of, where
from llmkit.tokenizer import Tokenizer

_VERSION = 1
_BATCH = 256  # rows that are encoded between two looks at the stop flag


@dataclass(frozen=True)
class Preferences(Sequences):
    """One source: group i holds the sequences group_starts[i] : group_starts[i + 1], all with the same prompt."""

    group_starts: NDArray[np.int64]
    pairs: NDArray[np.int32]
    """(n_pairs, 3): the group, the better and the worse sequence; sorted by group."""
    margins: NDArray[np.float32]
    """(n_pairs,) by how much the better one is better; 0: not told."""

    def __len__(self) -> int:
        return len(self.group_starts) - 1

    @property
    def pair_starts(self) -> NDArray[np.int64]:
        """Where each group's pairs begin, and the end: (n_groups + 1,)."""
        return np.searchsorted(self.pairs[:, 0], np.arange(len(self) + 1))


@dataclass(frozen=True)
class PreferenceData:
    """A run's preferences."""

    train: list[Preferences]
    valid: list[Preferences]
    test: list[Preferences]
    fingerprint: str
    """Hex: equal for equal ids, pairs, margins and splits."""


# --- rows -> batches -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferenceBatch:
    """Micro-batch of groups: B sequences of at most T ids, padded on the right, and P pairs of them."""

    ids_BT: Tensor
    lengths_B: Tensor
    """int64; a batch without a real row has one sequence of padding, all of it prompt."""
    prompt_lengths_B: Tensor
    """int64: how many ids of each sequence are the prompt's."""
    better_P: Tensor
    """int64: which sequences of the batch are preferred ..."""
    worse_P: Tensor
    """... to which."""
    weights_P: Tensor
    """float64: 1 / number of pairs of the group: every prompt counts the same."""
    margins_P: Tensor
    extra_B: Tensor | None
    """A number that belongs to each sequence: its log-probability under the reference model, in nats."""
    denominator: float
    """How many groups are real."""
    n_tokens: float
    """How many ids are no padding."""
    shared: SharedRows | None = None
    """The same sequences in rows that hold each prompt once."""

    def to(self, device: torch.device | str) -> PreferenceBatch:
        """The batch on a device."""
        shared = None if self.shared is None else self.shared.to(device)
        return PreferenceBatch(**{**moved(self, device), "shared": shared})


class PreferenceRows:
    """Makes the batches of a `RowLoader`: row i of a source is its group i.

    Args:
        sources: the preferences.
        row_len: most ids of a sequence.
        pad_id: fills the rows up.
        micro_tokens: most ids of a micro-batch that `cut` makes, padding included; a group that is longer is alone.
        extra: a number for each sequence of each source, which batches then carry.
        share_prompts: batches also carry their sequences as `SharedRows`.
    """

    def __init__(
        self,
        sources: Sequence[Preferences],
        *,
        row_len: int,
        pad_id: int,
        micro_tokens: int = 8192,
        extra: Sequence[NDArray[Any]] | None = None,
        share_prompts: bool = False,
    ):
        self.row_len, self._sources, self._pad_id, self._extra = row_len, list(sources), pad_id, extra
        self._micro_tokens, self._share_prompts = micro_tokens, share_prompts
        self.n_rows = [len(s) for s in self._sources]
        self._pair_starts = [s.pair_starts for s in self._sources]
        self._longest = [np.maximum.reduceat(s.lengths, s.group_starts[:-1]) for s in self._sources]

    def cut(self, source: NDArray[np.int64], row: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Which of the rows make up each micro-batch: sorted by length, so that little of it is padding."""
        pairs = list(zip(source.tolist(), row.tolist(), strict=True))
        if self._share_prompts:
            return cut_by_sum(np.array([self._shared_size(s, r) for s, r in pairs], np.int64), self._micro_tokens)
        longest = np.array([self._longest[s][r] for s, r in pairs], np.int64)
        counts = np.array([self._sources[s].group_starts[r + 1] - self._sources[s].group_starts[r] for s, r in pairs])
        return cut_by_length(longest, counts, self._micro_tokens)

    def _shared_size(self, s: int, r: int) -> int:
        """Ids of a group whose prompt is there once."""
        data = self._sources[s]
        first, last = int(data.group_starts[r]), int(data.group_starts[r + 1])
        return int(data.starts[last] - data.starts[first] - (last - first - 1) * data.prompt_lengths[first])

    @property
    def widest(self) -> int:
        """Most ids of any group, padded."""
        found = (int((w * np.diff(s.group_starts)).max()) for w, s in zip(self._longest, self._sources, strict=True))
        return max(found)

    def batch(
        self, numbers: NDArray[np.int64], source: NDArray[np.int64], row: NDArray[np.int64]
    ) -> tuple[PreferenceBatch, list[NDArray[Any]]]:
        """See `RowMaker`; the sample numbers make no difference."""
        texts: list[NDArray[Any]] = []
        prompts: list[int] = []
        better: list[int] = []
        worse: list[int] = []
        weights: list[float] = []
        margins: list[float] = []
        extra: list[NDArray[Any]] = []
        whole: list[NDArray[Any]] = []
        sizes: list[int] = []
        for s, r in zip(source.tolist(), row.tolist(), strict=True):
            if s == PADDING:
                whole.append(np.empty(0, np.int32))
                continue
            data = self._sources[s]
            first, last = int(data.group_starts[r]), int(data.group_starts[r + 1])
            pairs = slice(*self._pair_starts[s][r : r + 2].tolist())
            better += (data.pairs[pairs, 1] - first + len(texts)).tolist()
            worse += (data.pairs[pairs, 2] - first + len(texts)).tolist()
            n_pairs = pairs.stop - pairs.start
            weights += [1 / n_pairs] * n_pairs
            margins += data.margins[pairs].tolist()
            texts += [data.ids(i) for i in range(first, last)]
            prompts += data.prompt_lengths[first:last].tolist()
            sizes.append(last - first)
            whole.append(data.tokens[data.starts[first] : data.starts[last]])
            if self._extra is not None:
                extra.append(self._extra[s][first:last])
        n_tokens = float(sum(map(len, texts)))
        ids, lengths, prompt_lengths = padded(texts, prompts, self.row_len, self._pad_id)
        return PreferenceBatch(
            ids_BT=ids,
            lengths_B=lengths,
            prompt_lengths_B=prompt_lengths,
            better_P=torch.tensor(better, dtype=torch.int64),
            worse_P=torch.tensor(worse, dtype=torch.int64),
            weights_P=torch.tensor(weights, dtype=torch.float64),
            margins_P=torch.tensor(margins, dtype=torch.float32),
            extra_B=numbers_of(extra, len(lengths), self._extra),
            denominator=float(np.count_nonzero(source != PADDING)),
            n_tokens=n_tokens,
            shared=share_prompts(texts, prompts, sizes, self._pad_id) if self._share_prompts else None,
        ), whole


# --- files -> preferences --------------------------------------------------------------------------------------------


def prepare_preferences(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    *,
    row_len: int,
    margin: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> PreferenceData:
    """Reads and encodes a recipe's preferences, or finds them in the cache.

    Where prompt and answer are longer than a row, the prompt loses its beginning, by as much for every answer to it; an
    answer that does not even fit a row without its prompt is left out, with its pairs.

    Args:
        row_len: most tokens of a prompt with one of its answers.
        margin: of answers with scores, a pair's margin is their difference.
        say: is told which layout each file has, when it is read.

    Raises:
        UserError: naming file and row, for one that is no preference; if more of them can't be used than the recipe
            allows.
        Interrupted: should_stop() said so.
    """
    encoded = EncodedSources(cfg, tokenizer)

    def read(source: SourceConfig, frac: float) -> tuple[Preferences, Preferences]:
        inputs = {"version": _VERSION, "row_len": row_len, "chat": cfg.chat, "system": cfg.system, "margin": margin}
        made = encoded.arrays(
            source,
            files_of(source),
            "preferences",
            inputs,
            lambda: _GroupMaker(cfg, tokenizer, row_len, should_stop).read(source, margin, say),
        )
        refuse_dropped(source.label, "pairs", made, len(made["pairs"]), cfg)
        held = held_out_mask(made["keys"], frac)
        return _chosen(source.label, made, ~held), _chosen(source.label, made, held)

    train, valid, test = read_splits(cfg, read, "pair of answers")
    told = json.dumps([[s.hash for s in split] for split in (train, valid, test)]).encode()
    return PreferenceData(train, valid, test, hashlib.sha256(told).hexdigest())


class _GroupMaker:
    """Collects the groups of a source."""

    def __init__(self, cfg: DataConfig, tokenizer: Tokenizer, row_len: int, should_stop: Callable[[], bool]):
        self.cfg, self.tokenizer, self.row_len, self.should_stop = cfg, tokenizer, row_len, should_stop
        self.tokens: list[NDArray[np.int32]] = []
        self.prompts: list[int] = []
        self.sizes: list[int] = []
        self.pairs: list[tuple[int, int, int]] = []
        self.margins: list[float] = []
        self.keys: list[bytes] = []
        self.was_cut: list[bool] = []
        self.dropped = Dropped()

    def read(self, source: SourceConfig, margin: bool, say: Callable[[str], None]) -> Arrays:
        """The groups of a source as arrays, see `Preferences`; `keys` (n_groups, 32) name their prompts."""
        rows = read_source(
            source,
            "preference",
            self.cfg.chat,
            system=self.cfg.system,
            margin=margin,
            say=say,
            on_unusable=lambda piece, number, why: self.dropped.add(piece, number, str(why)),
        )
        for n, (piece, number, row) in enumerate(rows):
            if n % _BATCH == 0 and self.should_stop():
                raise Interrupted("stopped while preferences were being prepared; run again to go on")
            try:
                self._add(piece, number, row)
            except UserError as e:
                raise UserError(f"{where(piece, number)}: {e}") from None
        return {
            "tokens": np.concatenate([np.empty(0, np.int32), *self.tokens]),
            "starts": np.cumsum([0, *map(len, self.tokens)]).astype(np.int64),
            "prompt_lengths": np.array(self.prompts, np.int64),
            "group_starts": np.cumsum([0, *self.sizes]).astype(np.int64),
            "pairs": np.array(self.pairs, np.int32).reshape(-1, 3),
            "margins": np.array(self.margins, np.float32),
            "keys": np.frombuffer(b"".join(self.keys), np.uint8).reshape(-1, 32),
            "was_cut": np.array(self.was_cut, np.bool_),
            **self.dropped.arrays(),
        }

    def _add(self, piece: Piece, number: int, row: Preference) -> None:
        used = sorted({i for better, worse, _ in row.pairs for i in (better, worse)})
        prompt, encoded, was_cut = encoded_answers(
            self.tokenizer, row.prompt, [row.responses[i] for i in used], self.row_len, self.cfg.chat, row.tools
        )
        answers = {i: ids for i, ids in zip(used, encoded, strict=True) if ids is not None}
        kept = [pair for pair in row.pairs if pair[0] in answers and pair[1] in answers]
        if len(kept) < len(row.pairs):
            longest = max(len(row.responses[i]) for i in used if i not in answers)
            why = f"an answer of {longest:,} characters is longer than a row of {self.row_len} tokens (batch.max_len)"
            self.dropped.add(piece, number, why, len(row.pairs) - len(kept))
        if not kept:
            return
        at: dict[int, int] = {}
        for i in sorted({i for better, worse, _ in kept for i in (better, worse)}):
            at[i] = len(self.tokens)
            self.tokens.append(np.array(prompt + answers[i], np.int32))
            self.prompts.append(len(prompt))
        self.pairs += [(len(self.sizes), at[better], at[worse]) for better, worse, _ in kept]
        self.margins += [margin for _, _, margin in kept]
        self.sizes.append(len(at))
        self.keys.append(prompt_key(row.prompt))
        self.was_cut.append(was_cut)


def _chosen(name: str, made: Arrays, keep: NDArray[np.bool_]) -> Preferences:
    """The groups of a source that are kept, as if there were no others."""
    group_starts, starts = made["group_starts"], made["starts"]
    sequences, new_groups = taken(group_starts, keep)
    is_kept = np.zeros(len(starts) - 1, np.bool_)
    is_kept[sequences] = True
    places, new_starts = taken(starts, is_kept)
    pair_kept = keep[made["pairs"][:, 0]]
    number_of_group, number_of_sequence = np.cumsum(keep) - 1, np.cumsum(is_kept) - 1
    old = made["pairs"][pair_kept]
    pairs = np.stack([number_of_group[old[:, 0]], *(number_of_sequence[old[:, i]] for i in (1, 2))], 1)
    return Preferences(
        name=name,
        tokens=made["tokens"][places],
        starts=new_starts,
        prompt_lengths=made["prompt_lengths"][is_kept],
        n_cut=int(made["was_cut"][keep].sum()),
        n_dropped=int(made["n_dropped"]),
        group_starts=new_groups,
        pairs=pairs.astype(np.int32),
        margins=made["margins"][pair_kept],
    )
