"""What a teacher is asked about, unit by unit: a conversation, however it is packed later, or a row of running text.

Shapes: B rows, T inputs of a row.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmkit.data.chats import Chats
from llmkit.data.loader import RowMaker, TextRows
from llmkit.data.packing import IGNORE


@dataclass(frozen=True)
class Unit:
    """T inputs that a model reads together."""

    inputs: NDArray[np.int64]
    labels: NDArray[np.int64]
    """The token after each input; IGNORE: not trained."""
    positions: NDArray[np.int64]
    docs: NDArray[np.int32]
    """Number of each input's document, from 0: none sees another's."""

    @property
    def hash(self) -> bytes:
        """See `tokens_hash`."""
        return tokens_hash(self.inputs, self.labels, self.positions)


def tokens_hash(inputs: NDArray[np.int64], labels: NDArray[np.int64], positions: NDArray[np.int64]) -> bytes:
    """16 bytes that name a unit. Documents needn't be told: each begins at position 0, but where they see each other."""
    data = np.concatenate([inputs, labels, positions]).astype("<i4").tobytes()
    return hashlib.blake2b(data, digest_size=16).digest()


class Units(Protocol):
    """One source of training data, in units."""

    @property
    def name(self) -> str:
        """What errors call it."""

    @property
    def kind(self) -> str:
        """What errors call a unit."""

    @property
    def hash(self) -> str:
        """Hex: names the tokens, labels and documents of all units."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n_units,) inputs of each, or somewhat more."""

    @property
    def n_labels(self) -> NDArray[np.int64]:
        """(n_units,) labels of each that are trained."""

    def __len__(self) -> int: ...

    def get(self, i: int) -> Unit:
        """Unit i."""


def where(units: Units, i: int) -> str:
    """What errors call unit i."""
    return f"{units.name}: {units.kind} {i + 1:,}"


class ChatUnits:
    """The conversations of a source."""

    kind = "conversation"

    def __init__(self, chats: Chats):
        self._chats = chats
        self.name, self.hash = chats.name, chats.hash
        self.lengths = chats.lengths - 1
        ends = np.concatenate([[0], np.cumsum(chats.trained)])
        self.n_labels = ends[chats.starts[1:]] - ends[chats.starts[:-1] + 1]  # nothing predicts the first token

    def __len__(self) -> int:
        return len(self._chats)

    def get(self, i: int) -> Unit:
        here = slice(self._chats.starts[i], self._chats.starts[i + 1])
        ids, trained = self._chats.tokens[here].astype(np.int64), self._chats.trained[here]
        n = len(ids) - 1
        return Unit(ids[:-1], np.where(trained[1:], ids[1:], IGNORE), np.arange(n), np.zeros(n, np.int32))


class RowUnits:
    """The rows of a source of running text, as they are trained on."""

    kind = "row"

    def __init__(self, rows: TextRows, source: int):
        self._rows, self._source = rows, source
        self.name, self.hash = rows.name(source), rows.hash(source)
        self.n_labels = rows.n_labels(source)
        self.lengths = np.full(len(self.n_labels), rows.row_len, np.int64)

    def __len__(self) -> int:
        return len(self.n_labels)

    def get(self, i: int) -> Unit:
        rows, _ = self._rows.rows(np.array([self._source]), np.array([i]))
        here = rows.docs_BT[0] >= 0
        return Unit(rows.ids_BT[0][here], rows.labels_BT[0][here], rows.positions_BT[0][here], rows.docs_BT[0][here])


class UnitRows(RowMaker, Protocol):
    """Rows that know which units they are made of: `ChatRows`, `TextRows`."""

    def members(self, source: int, row: int) -> NDArray[np.int64]:
        """The numbers of a row's units, in their order."""
