"""Labelled texts -> rows of ids with a class or a number each: what classifiers and regressors are trained on.

The ids of a source are one file in the cache, keyed by everything they depend on, as token shards are.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmkit.config import Interrupted, UserError
from llmkit.data.config import DataConfig, SourceConfig
from llmkit.data.encoded import Arrays, EncodedSources
from llmkit.data.loader import PADDING
from llmkit.data.packing import IGNORE, bucketed
from llmkit.data.sources import Piece, files_of, records, units_of, where as place_of
from llmkit.data.workers import is_held_out
from llmkit.tokenizer import Tokenizer

Kind = Literal["classify", "regress"]
_BATCH = 1024  # texts that are encoded between two looks at the stop flag
_VERSION = 1


@dataclass(frozen=True)
class Examples:
    """One source: example i has the ids tokens[starts[i] : starts[i + 1]] and the target targets[i]."""

    name: str
    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]
    targets: NDArray[Any]
    """(n,) int64 class numbers, or (n, K) float32."""
    n_cut: int
    """How many texts were longer than a row."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def ids(self, i: int) -> NDArray[np.int32]:
        return self.tokens[self.starts[i] : self.starts[i + 1]]


@dataclass(frozen=True)
class LabelledData:
    """A run's examples, and what its classes are called (none for a regression)."""

    train: list[Examples]
    valid: list[Examples]
    test: list[Examples]
    classes: tuple[str, ...]
    fingerprint: str
    """Hex: equal for equal texts, targets, tokenizer and splits."""


# --- rows -> batches -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExampleBatch:
    """Micro-batch of B rows of at most T ids, padded on the right."""

    ids_BT: Tensor
    lengths_B: Tensor
    """int64; 0: a row of padding."""
    targets: Tensor
    """int64 [B] with IGNORE, or float32 [B, K] with NaN, for a row of padding."""
    denominator: float
    """How many rows are real."""
    n_tokens: float
    """How many ids are no padding."""

    def to(self, device: torch.device | str) -> ExampleBatch:
        """The batch on a device."""
        ids, lengths, targets = (t.to(device, non_blocking=True) for t in (self.ids_BT, self.lengths_B, self.targets))
        return ExampleBatch(ids, lengths, targets, self.denominator, self.n_tokens)


class ExampleRows:
    """Makes the batches of a `RowLoader`: row i of a source is its example i."""

    def __init__(self, sources: Sequence[Examples], *, row_len: int, pad_id: int):
        self.row_len, self._sources, self._pad_id = row_len, list(sources), pad_id
        self.n_rows = [len(s) for s in self._sources]

    def batch(
        self, numbers: NDArray[np.int64], source: NDArray[np.int64], row: NDArray[np.int64]
    ) -> tuple[ExampleBatch, list[NDArray[Any]]]:
        """See `RowMaker`; the sample numbers make no difference."""
        empty = np.empty(0, np.int32)
        pairs = list(zip(source.tolist(), row.tolist(), strict=True))
        texts = [empty if s == PADDING else self._sources[s].ids(r) for s, r in pairs]
        ids = np.full((len(texts), bucketed(max(map(len, texts)), self.row_len)), self._pad_id, np.int64)
        for i, text in enumerate(texts):
            ids[i, : len(text)] = text
        like = self._sources[0].targets
        nothing = np.full(like.shape[1:], math.nan if like.dtype.kind == "f" else IGNORE, like.dtype)
        targets = np.stack([nothing if s == PADDING else self._sources[s].targets[r] for s, r in pairs])
        lengths = np.array([len(t) for t in texts], np.int64)
        n_real = float(np.count_nonzero(source != PADDING))
        tensors = [torch.from_numpy(a) for a in (ids, lengths, targets)]
        return ExampleBatch(tensors[0], tensors[1], tensors[2], n_real, float(lengths.sum())), texts


# --- files -> examples -----------------------------------------------------------------------------------------------


def prepare_examples(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    *,
    kind: Kind,
    classes: Sequence[str],
    row_len: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> LabelledData:
    """Reads and encodes a recipe's labelled texts, or finds them in the cache.

    A source's `columns` say where its `text` (or `messages`, a conversation) and `label` stand.

    Args:
        classes: their names, in the order of the head's rows; empty: those of the training data, sorted.
        row_len: texts are cut to this many tokens; the end-of-text token, at which they are scored, stays.

    Raises:
        UserError: naming file and row, for a text or label that is none, or a class that isn't known.
        Interrupted: should_stop() said so.
    """
    maker = _Maker(cfg, tokenizer, kind, row_len, should_stop)
    train = [maker.read(s, cfg.valid_frac if not cfg.valid else 0.0) for s in cfg.sources]
    valid = [maker.read(s, 0.0)[0] for s in cfg.valid] or [held_out for _, held_out in train if held_out.rows]
    test = [maker.read(s, 0.0)[0] for s in cfg.test]
    kept = [k for k, _ in train]
    for found in (*kept, *test):
        if not found.rows:
            raise UserError(f"{found.name}: no labelled text in it")
    names: tuple[str, ...] = ()
    if kind == "classify":
        found_names = {row.label for part in kept for row in part.rows}
        names = tuple(classes) or tuple(sorted(found_names, key=_number_first))
        if len(names) < 2:
            raise UserError(f"{kept[0].name}: every label is {names[0]!r}: a classifier needs at least two classes")
    splits = [[r.examples(kind, names) for r in split] for split in (kept, valid, test)]
    told = json.dumps([names, [[_hash(e) for e in split] for split in splits]]).encode()
    return LabelledData(splits[0], splits[1], splits[2], names, hashlib.sha256(told).hexdigest())


def _number_first(label: str) -> tuple[bool, float, str]:
    """Sorts 2 before 10, and numbers before words."""
    try:
        return False, float(label), label
    except ValueError:
        return True, 0.0, label


def _hash(examples: Examples) -> str:
    digest = hashlib.sha256()
    for array in (examples.tokens, examples.starts, examples.targets):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class _Row(NamedTuple):
    """One labelled text, encoded."""

    ids: NDArray[np.int32]
    label: str
    """The name of a class, or a JSON list of numbers."""
    piece: int
    """Which of the source's pieces it is from, and which row of it: told when something is wrong with it."""
    number: int
    key: str
    """A hash of the text: which side of a split it falls on."""
    was_cut: bool


@dataclass(frozen=True)
class _Part:
    """The rows of a source that are kept, or those that are held out."""

    name: str
    rows: list[_Row]
    pieces: list[Piece]

    def place(self, row: _Row) -> str:
        return place_of(self.pieces[row.piece], row.number)

    def examples(self, kind: Kind, classes: tuple[str, ...]) -> Examples:
        number = {c: i for i, c in enumerate(classes)}
        targets: list[Any] = []
        for row in self.rows:
            if kind == "regress":
                targets.append(json.loads(row.label))
                if len(targets[-1]) != len(targets[0]):
                    raise UserError(
                        f"{self.place(row)}: {len(targets[-1])} numbers, the first row has {len(targets[0])}"
                    )
            elif row.label in number:
                targets.append(number[row.label])
            else:
                known = ", ".join(map(repr, classes))
                raise UserError(f"{self.place(row)}: label {row.label!r} is none of the classes {known}")
        return Examples(
            self.name,
            np.concatenate([np.empty(0, np.int32), *(row.ids for row in self.rows)]),
            np.cumsum([0, *(len(row.ids) for row in self.rows)]).astype(np.int64),
            np.array(targets, np.float32 if kind == "regress" else np.int64),
            sum(row.was_cut for row in self.rows),
        )


class _Maker:
    """Reads sources, with their encoded rows kept in the cache."""

    def __init__(
        self,
        cfg: DataConfig,
        tokenizer: Tokenizer,
        kind: Kind,
        row_len: int,
        should_stop: Callable[[], bool],
    ):
        self.cfg, self.tokenizer, self.kind, self.row_len = cfg, tokenizer, kind, row_len
        self.should_stop = should_stop
        self.encoded = EncodedSources(cfg, tokenizer)
        self.before = [tokenizer.bos_id] if cfg.add_bos and tokenizer.bos_id is not None else []
        self.after = [tokenizer.eos_id] if cfg.add_eos else []

    def read(self, source: SourceConfig, frac: float) -> tuple[_Part, _Part]:
        """The kept rows of a source, and those that are held out."""
        files = files_of(source)
        pieces = [piece for unit in units_of(files, source.limit) for piece in unit]
        text = {"messages": "messages"} if "messages" in source.columns else {"text": "text"}
        columns = {**text, "label": "label", **source.columns}
        inputs = {
            "version": _VERSION,
            "columns": columns,
            "kind": self.kind,
            "ends": (self.before, self.after),
            "row_len": self.row_len,
        }

        def make() -> Arrays:
            return _packed([row for n, piece in enumerate(pieces) for row in self._encoded(n, piece, columns)])

        parts: tuple[list[_Row], list[_Row]] = [], []
        for row in _unpacked(self.encoded.arrays(source, files, "examples", inputs, make)):
            parts[bool(frac) and is_held_out(row.key, frac)].append(row)
        return _Part(source.label, parts[0], pieces), _Part(source.label, parts[1], pieces)

    def _encoded(self, n: int, piece: Piece, columns: Mapping[str, str]) -> Iterator[_Row]:
        waiting: list[tuple[int, str, Any]] = []
        is_chat = "messages" in columns
        for number, values in records(piece, columns):
            try:
                text = values["messages"] if is_chat else _checked(values["text"])
                waiting.append((number, self._label(values["label"]), text))
            except UserError as e:
                raise UserError(f"{place_of(piece, number)}: {e}") from None
            if len(waiting) == _BATCH:
                yield from self._encode(n, piece, waiting, is_chat)
                waiting = []
        yield from self._encode(n, piece, waiting, is_chat)

    def _label(self, value: Any) -> str:
        if self.kind == "classify":
            if isinstance(value, bool | int | str) and value != "":
                return str(value)
            raise UserError(f"label: the name or number of a class is expected (got {value!r})")
        try:
            numbers = [float(n) for n in (value if isinstance(value, list) else [value])]
        except (TypeError, ValueError):
            numbers = []
        if not numbers or isinstance(value, bool) or not all(map(math.isfinite, numbers)):
            raise UserError(f"label: a number, or a list of numbers, is expected (got {value!r})")
        return json.dumps(numbers)

    def _encode(self, n: int, piece: Piece, rows: list[tuple[int, str, Any]], is_chat: bool) -> Iterator[_Row]:
        if self.should_stop():
            raise Interrupted("stopped while labelled text was being prepared; run again to go on")
        if is_chat:
            for number, label, messages in rows:
                try:
                    chat = self.tokenizer.encode_chat(messages, train_on="all").ids
                except UserError as e:
                    raise UserError(f"{place_of(piece, number)}: {e}") from None
                key = _digest(json.dumps(messages, ensure_ascii=False))
                # The end of a conversation is what is judged.
                ids, was_cut = np.array(chat[-self.row_len :], np.int32), len(chat) > self.row_len
                yield _Row(ids, label, n, number, key, was_cut)
            return
        room = self.row_len - len(self.before) - len(self.after)
        encoded = self.tokenizer.encode_batch([text for _, _, text in rows])
        for (number, label, text), inner in zip(rows, encoded, strict=True):
            ids = np.concatenate([self.before, inner[:room], self.after]).astype(np.int32)
            yield _Row(ids, label, n, number, _digest(self.tokenizer.normalize(text)), len(inner) > room)


def _checked(text: Any) -> str:
    if not isinstance(text, str) or not text:
        raise UserError(f"text: text is expected (got {text!r})")
    return text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _packed(rows: list[_Row]) -> Arrays:
    """Rows as arrays."""
    told = json.dumps([row[1:] for row in rows]).encode()
    return {
        "tokens": np.concatenate([np.empty(0, np.int32), *(row.ids for row in rows)]),
        "lengths": np.array([len(row.ids) for row in rows], np.int64),
        "told": np.frombuffer(told, np.uint8),
    }


def _unpacked(arrays: Arrays) -> list[_Row]:
    told = json.loads(arrays["told"].tobytes())
    ids = np.split(arrays["tokens"], np.cumsum(arrays["lengths"])[:-1]) if told else []
    return [_Row(one, *rest) for one, rest in zip(ids, told, strict=True)]
