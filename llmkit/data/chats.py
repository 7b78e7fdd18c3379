"""Encoded conversations -> rows of inputs and labels: what supervised fine-tuning learns from.

A conversation of n tokens has n - 1 inputs; a label is the next token where that one is learnt, IGNORE elsewhere. With
packing a row holds several conversations, each seeing only itself, with positions of its own. Which ones share a row is a
function of their lengths alone, so a row has a number that means the same in every epoch, on every rank and after a
restart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.config import UserError
from llmkit.data.cache import ContentHashes
from llmkit.data.config import DataConfig, SourceConfig
from llmkit.data.dialogues import Arrays, How, encode_source
from llmkit.data.loader import PADDING, Batch, text_batch
from llmkit.data.packing import IGNORE, Rows, bucketed
from llmkit.data.sequences import held_out_mask, taken
from llmkit.data.turns import TrainOn
from llmkit.tokenizer import Tokenizer


@dataclass(frozen=True)
class Chats:
    """One source: conversation i has the ids tokens[starts[i] : starts[i + 1]]."""

    name: str
    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    """(n_tokens,) which of them are learnt."""
    starts: NDArray[np.int64]
    n_dropped: int
    """Conversations of the source from which nothing can be learnt."""
    n_cut: int
    """Rows that lost some of what is learnt, being longer than a row."""
    n_split: int
    """Conversations that are several rows, one for each turn."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.starts)

    @property
    def hash(self) -> str:
        """Names ids and what is learnt of them (hex SHA-256)."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.trained, self.starts):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class ChatData:
    """A run's conversations."""

    train: list[Chats]
    valid: list[Chats]
    test: list[Chats]
    fingerprint: str
    """Hex: equal for equal ids, labels and splits."""


# --- packing ---------------------------------------------------------------------------------------------------------


def best_fit(lengths: NDArray[np.int64], row_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Packs lengths into rows: the longest first, each into the fullest row that still takes it (best-fit decreasing).

    It needs at most 11/9 of the fewest rows possible and 4 more (Johnson et al. 1974, SIAM J. Comput. 3, 299-325).

    Args:
        lengths: none above row_len.

    Returns:
        The numbers of the lengths, row after row, and (n_rows + 1,) where each row begins in them.
    """
    order = np.argsort(-lengths, kind="stable")
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(row_len + 1)]  # by what is left, the rows that have it left
    some = 0  # bit n: there is a row with n left
    for i, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fits = some >> length
        if fits:
            room = length + (fits & -fits).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                some &= ~(1 << room)
        else:
            room, row = row_len, len(rows)
            rows.append([])
        rows[row].append(i)
        with_room[room - length].append(row)
        some |= 1 << (room - length)
    starts = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    return np.array([i for row in rows for i in row], np.int64), starts


class ChatRows:
    """Makes the batches of a `RowLoader`: row i of a source is its pack i, or without packing its conversation i.

    Args:
        row_len: most inputs of a row; no conversation has more than one token more.
        packing: see `best_fit`.
        pin_memory: batches lie in pinned memory, for copies to a GPU.
    """

    def __init__(
        self, sources: Sequence[Chats], *, row_len: int, pad_id: int, packing: bool = True, pin_memory: bool = False
    ):
        self.row_len, self._sources, self._pad_id, self._pin_memory = row_len, list(sources), pad_id, pin_memory
        alone = [(np.arange(len(s)), np.arange(len(s) + 1)) for s in self._sources]
        self._packs = [best_fit(s.lengths - 1, row_len) for s in self._sources] if packing else alone
        self.n_rows = [len(starts) - 1 for _, starts in self._packs]

    @property
    def fill(self) -> float:
        """Share of the rows that is no padding."""
        n_inputs = sum(int(s.lengths.sum()) - len(s) for s in self._sources)
        return n_inputs / (sum(self.n_rows) * self.row_len)

    def batch(
        self, numbers: NDArray[np.int64], source: NDArray[np.int64], row: NDArray[np.int64]
    ) -> tuple[Batch, list[NDArray[Any]]]:
        """See `RowMaker`; the sample numbers make no difference."""
        rows, tokens = self.rows(source, row)
        return text_batch(rows, self._pin_memory), tokens

    def rows(self, source: NDArray[np.int64], row: NDArray[np.int64]) -> tuple[Rows, list[NDArray[Any]]]:
        """The arrays of a batch, and each row's tokens without padding."""
        packs = [
            [] if s == PADDING else self.documents(s, r) for s, r in zip(source.tolist(), row.tolist(), strict=True)
        ]
        width = bucketed(max(sum(len(ids) - 1 for ids, _ in pack) for pack in packs), self.row_len)
        shape = (len(packs), width)
        ids_BT, labels_BT = np.full(shape, self._pad_id, np.int64), np.full(shape, IGNORE, np.int64)
        positions_BT, docs_BT = np.zeros(shape, np.int64), np.full(shape, -1, np.int32)
        for b, pack in enumerate(packs):
            at = 0
            for n, (ids, trained) in enumerate(pack):
                here = slice(at, at + len(ids) - 1)
                ids_BT[b, here] = ids[:-1]
                labels_BT[b, here] = np.where(trained[1:], ids[1:], IGNORE)
                positions_BT[b, here] = np.arange(len(ids) - 1)
                docs_BT[b, here] = n
                at = here.stop
        tokens = [np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in pack)]) for pack in packs]
        return Rows(ids_BT, labels_BT, positions_BT, docs_BT), tokens

    def members(self, source: int, row: int) -> NDArray[np.int64]:
        """Which conversations of its source a row holds, in their order."""
        members, starts = self._packs[source]
        return members[starts[row] : starts[row + 1]]

    def documents(self, source: int, row: int) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """The conversations of a row: their ids, and which of these are learnt."""
        data, found = self._sources[source], []
        for i in self.members(source, row).tolist():
            here = slice(data.starts[i], data.starts[i + 1])
            found.append((data.tokens[here], data.trained[here]))
        return found


# --- files -> conversations ------------------------------------------------------------------------------------------


def prepare_chats(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    *,
    row_len: int,
    train_on: TrainOn = "assistant",
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> ChatData:
    """Reads and encodes a recipe's conversations, or finds them in the cache.

    One that is longer than a row is cut from the right; if no token that is learnt is left, it is left out.

    Args:
        row_len: most inputs of a row.
        train_on: the assistant's turns with their ends, the last of them, or every token.
        say: is told which layout each file has.

    Raises:
        UserError: naming file and row, for one that is no conversation; if nothing can be learnt from more of them than
            the recipe allows; if the tokenizer can't end a turn.
        Interrupted: should_stop() said so.
    """
    check_tokenizer(tokenizer, cfg.chat)
    hashes = ContentHashes(Path(cfg.cache_dir))

    def read(source: SourceConfig, frac: float) -> tuple[Chats, Chats]:
        how = How(train_on, row_len, cfg.chat, cfg.system, dict(source.columns))
        made = encode_source(cfg, source, tokenizer, how, hashes, should_stop, say)
        _refuse_dropped(source.label, made, cfg.max_dropped_frac)
        held = held_out_mask(made["keys"], frac)
        return _chosen(source.label, made, ~held), _chosen(source.label, made, held)

    both = [read(s, cfg.valid_frac if not cfg.valid else 0.0) for s in cfg.sources]
    train = [kept for kept, _ in both]
    valid = [read(s, 0.0)[0] for s in cfg.valid] or [held for _, held in both if len(held)]
    test = [read(s, 0.0)[0] for s in cfg.test]
    for kept, held in both:
        if not len(kept) and len(held):
            raise UserError(f"{kept.name}: valid_frac holds out all of its conversations: lower data.valid_frac")
    for found in (*train, *valid, *test):
        if not len(found):
            raise UserError(f"{found.name}: no conversation in it")
    told = json.dumps([[s.hash for s in split] for split in (train, valid, test)]).encode()
    return ChatData(train, valid, test, hashlib.sha256(told).hexdigest())


def check_tokenizer(tokenizer: Tokenizer, chat: bool) -> None:
    """Refuses a tokenizer or template with which a model could not learn where an answer ends."""
    if chat and tokenizer.template is not None and not tokenizer.ends_turns:
        raise UserError(
            f"{tokenizer.template.name}: it writes no end of turn (a control token) after the assistant's text, so the "
            "model would never learn to stop: set tokenizer.chat_template to chatml, or to a copy that writes one"
        )
    end = tokenizer.end_of_turn_id if chat else tokenizer.eos_id
    if tokenizer.pad_id == end:
        raise UserError(
            "the padding token is also the token that ends an answer, and tools that mask padding by its id would never "
            "learn to stop: give it one of its own with `tokenizer: {path: ..., add: ['<|pad|>']}`"
        )


def _refuse_dropped(name: str, made: Arrays, max_frac: float) -> None:
    n, n_dropped = made["counts"][:2].tolist()
    if n_dropped > max_frac * n:
        first = made["why_dropped"].tobytes().decode()
        raise UserError(
            f"{name}: from {n_dropped:,} of {n:,} conversations ({100 * n_dropped / n:.1f} %) nothing can be learnt, "
            f"data.max_dropped_frac allows {100 * max_frac:g} %; the first: {first}"
        )


def _chosen(name: str, made: Arrays, keep: NDArray[np.bool_]) -> Chats:
    """The conversations of a source that are kept, as if there were no others."""
    places, starts = taken(np.cumsum([0, *made["lengths"]]).astype(np.int64), keep)
    _, n_dropped, n_cut, n_split = made["counts"].tolist()
    return Chats(name, made["tokens"][places], made["trained"][places], starts, n_dropped, n_cut, n_split)
