"""Rows -> batches of one rank, in an order that is a pure function of (seed, step)."""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from llmkit.config import UserError
from llmkit.data.order import SampleOrder
from llmkit.data.packing import (
    IGNORE,
    Masking,
    Rows,
    document_rows,
    masked,
    n_dropped_tokens,
    n_packed_rows,
    packed_rows,
)
from llmkit.data.shards import TokenShards
from llmkit.model.context import Context, RowPart

PADDING = -1  # the source of a row that is all padding
_BLOCK = 1 << 24  # tokens whose documents' beginnings are in memory at once


@dataclass(frozen=True)
class Batch:
    """Micro-batch of B rows with T inputs each."""

    ids_BT: Tensor
    """int64."""
    labels_BT: Tensor
    """int64, the token after each input; -100: not trained."""
    positions_BT: Tensor
    """int64, within the document."""
    docs_BT: Tensor
    """int32, number of the document within its row, from 0; -1: padding."""
    denominator: float
    """How many labels are trained."""
    n_tokens: float
    """How many inputs are no padding."""
    one_document: bool = False
    """Every row holds at most one document, so that plain causal attention isolates them."""
    full: bool = False
    """Every row is one document without padding, so that attention in both directions needs no mask either."""
    part: RowPart | None = None
    """Where other processes have the rows' other positions: what is common to all of them."""

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; from pinned memory the copy runs beside what the GPU does."""
        ids, labels, positions, docs = (
            t.to(device, non_blocking=True) for t in (self.ids_BT, self.labels_BT, self.positions_BT, self.docs_BT)
        )
        part = None if self.part is None else self.part.to(device)
        return Batch(ids, labels, positions, docs, self.denominator, self.n_tokens, self.one_document, self.full, part)

    def part_of(self, context: Context) -> Batch:
        """The positions that one process computes; rows are filled up with padding to a length that can be cut."""
        missing = context.padded(self.ids_BT.shape[1]) - self.ids_BT.shape[1]
        docs_BS = F.pad(self.docs_BT, (0, missing), value=-1)
        labels_BT, docs_BT = context.own(F.pad(self.labels_BT, (0, missing), value=IGNORE)), context.own(docs_BS)
        return replace(
            self,
            ids_BT=context.own(F.pad(self.ids_BT, (0, missing))),  # nothing sees them, whatever they are
            labels_BT=labels_BT,
            positions_BT=context.own(F.pad(self.positions_BT, (0, missing))),
            docs_BT=docs_BT,
            denominator=float((labels_BT != IGNORE).sum()),
            n_tokens=float((docs_BT >= 0).sum()),
            part=RowPart(context, docs_BS, self.one_document, self.full and not missing),
        )


def text_batch(rows: Rows, pin_memory: bool) -> Batch:
    """The tensors of a batch of rows."""
    arrays = (rows.ids_BT, rows.labels_BT, rows.positions_BT, rows.docs_BT)
    tensors = (torch.from_numpy(a) for a in arrays)
    ids, labels, positions, docs = (t.pin_memory() if pin_memory else t for t in tensors)
    n_labels = float(np.count_nonzero(rows.labels_BT != IGNORE))
    one_document, full = bool((rows.docs_BT <= 0).all()), not rows.docs_BT.any()
    n_tokens = float(np.count_nonzero(rows.docs_BT >= 0))
    return Batch(ids, labels, positions, docs, n_labels, n_tokens, one_document, full)


class RowMaker(Protocol):
    """What a loader must know of its rows: how many there are, and how to make batches of them."""

    @property
    def n_rows(self) -> Sequence[int]:
        """Rows of one epoch of each source."""

    @property
    def row_len(self) -> int:
        """Most inputs of a row."""

    def batch(
        self, numbers: NDArray[np.int64], source: NDArray[np.int64], row: NDArray[np.int64]
    ) -> tuple[Any, list[NDArray[Any]]]:
        """A micro-batch, and each row's tokens without padding.

        Args:
            numbers: (B,) sample numbers in the run, or in the split when it is evaluated.
            source: (B,) which source each row is of; PADDING: a row of nothing.
            row: (B,) which row of its source.
        """


class TextRows:
    """Rows of token shards whose labels are the next tokens.

    Args:
        shards: the sources.
        row_len: inputs of a row.
        packing: rows of a stream; False: one document a row.
        cross_document_attention: see `packed_rows`.
        pin_memory: batches lie in pinned memory, for copies to a GPU.

    Raises:
        UserError: a source has no rows.
    """

    def __init__(
        self,
        shards: Sequence[TokenShards],
        *,
        row_len: int,
        pad_id: int,
        packing: bool = True,
        cross_document_attention: bool = False,
        pin_memory: bool = False,
    ):
        self.row_len, self._shards, self._pad_id = row_len, list(shards), pad_id
        self._packing, self._cross, self._pin_memory = packing, cross_document_attention, pin_memory
        self.n_rows = [n_packed_rows(s.n_tokens, row_len) if packing else s.n_docs for s in self._shards]
        for source, n in zip(self._shards, self.n_rows, strict=True):
            if not n:
                raise UserError(f"{source.name}: {source.n_tokens} tokens make no row: at least 2 are needed")

    @property
    def dropped_tokens(self) -> int:
        """Tokens of an epoch that no row holds; without packing, what lies beyond row_len of a document."""
        return 0 if self._packing else sum(n_dropped_tokens(s, self.row_len) for s in self._shards)

    def name(self, source: int) -> str:
        """What errors call a source."""
        return self._shards[source].name

    def hash(self, source: int) -> str:
        """Names a source's rows, their labels and documents (hex SHA-256)."""
        told = [self._shards[source].hash, self.row_len, self._packing, self._cross]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def members(self, source: int, row: int) -> NDArray[np.int64]:
        """What can be learnt only as a whole: the row itself, since its first document may go on from the row before."""
        return np.array([row])

    def n_labels(self, source: int) -> NDArray[np.int64]:
        """(n_rows,) how many labels of each of a source's rows are trained."""
        shards, T = self._shards[source], self.row_len
        if not self._packing:
            return np.clip(shards.doc_lengths() - 1, 0, T)
        n = np.full(self.n_rows[source], T, np.int64)
        n[-1] = shards.n_tokens - 1 - T * (len(n) - 1)
        if self._cross:
            return n
        step = _BLOCK // T + 1  # rows whose documents are looked up at once
        for first in range(0, len(n), step):
            last = min(first + step, len(n))
            begins = shards.starts(first * T + 1, min(last * T + 1, shards.n_tokens))  # nothing predicts these tokens
            n[first:last] -= np.bincount((begins - 1) // T - first, minlength=last - first)
        return n

    def batch(
        self, numbers: NDArray[np.int64], source: NDArray[np.int64], row: NDArray[np.int64]
    ) -> tuple[Batch, list[NDArray[Any]]]:
        """See `RowMaker`; the sample numbers make no difference."""
        rows, tokens = self.rows(source, row)
        return text_batch(rows, self._pin_memory), tokens

    def rows(self, source: NDArray[np.int64], row: NDArray[np.int64]) -> tuple[Rows, list[NDArray[Any]]]:
        """The arrays of a batch, and each row's tokens without padding."""
        if not self._packing:
            empty = np.empty(0, np.int64)
            documents = [
                empty if s == PADDING else self._shards[s].document(r)[: self.row_len + 1]
                for s, r in zip(source.tolist(), row.tolist(), strict=True)
            ]
            return document_rows(documents, self.row_len, self._pad_id), documents
        width = self.row_len + 1
        windows = np.full((len(row), width), self._pad_id, np.int64)
        is_start = np.zeros(windows.shape, np.bool_)
        n_tokens = np.zeros(len(row), np.int64)
        for s in np.unique(source[source != PADDING]).tolist():
            here = np.flatnonzero(source == s)
            firsts = row[here] * self.row_len
            windows[here], is_start[here] = self._shards[s].windows(firsts, width, self._pad_id)
            n_tokens[here] = np.minimum(self._shards[s].n_tokens - firsts, width)
        rows = packed_rows(windows, is_start, n_tokens, self._pad_id, self._cross)
        return rows, [w[:n] for w, n in zip(windows, n_tokens.tolist(), strict=True)]


class MaskedRows:
    """Text rows for masked-token prediction: see `packing.masked`.

    Which tokens are hidden is a function of (seed, sample number): another choice in every epoch, the same after a
    restart and on any number of ranks.
    """

    def __init__(self, text: TextRows, masking: Masking, seed: int, pin_memory: bool = False):
        self._text, self._masking, self._seed, self._pin_memory = text, masking, seed, pin_memory
        self.n_rows, self.row_len = text.n_rows, text.row_len

    def batch(
        self, numbers: NDArray[np.int64], source: NDArray[np.int64], row: NDArray[np.int64]
    ) -> tuple[Batch, list[NDArray[Any]]]:
        """See `RowMaker`."""
        rows, tokens = self._text.rows(source, row)
        return text_batch(masked(rows, self._masking, self._seed, numbers), self._pin_memory), tokens


class RowLoader:
    """The rows of a weighted mixture of sources, cut into steps, ranks and micro-batches.

    Row r of step k is sample k * rows_per_step + r of the run. The mixture says which source it comes from and the
    how-many-th row of that source it is; the source's epoch and a permutation keyed by (seed, source, epoch) say which
    row that is. Rank R of W takes the rows [R * rows / W, (R + 1) * rows / W). Nothing is remembered between steps, so
    there is nothing to restore.

    Args:
        rows: what the rows are.
        rows_per_step: rows of one optimizer step over all ranks.
        weights: share of each source in the samples. Default: equal.
        micro_rows: rows of one forward pass on one rank. Default: the rank's share of a step.
        cut: from a step's sources and rows to the places among them of each micro-batch, instead of runs of micro_rows.
        prefetch: steps built ahead in a thread; 0: none, and no thread.
        context: the rows' positions are shared by several processes, which have one rank here; batches hold this one's.

    Raises:
        UserError: the rows can't be shared out evenly.
    """

    def __init__(
        self,
        rows: RowMaker,
        *,
        rows_per_step: int,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        rank: int = 0,
        world: int = 1,
        micro_rows: int | None = None,
        cut: Callable[[NDArray[np.int64], NDArray[np.int64]], list[NDArray[np.int64]]] | None = None,
        prefetch: int = 2,
        context: Context | None = None,
    ):
        self.rows, self.row_len, self.rows_per_step = rows, rows.row_len, rows_per_step
        self.micro_rows = micro_rows or max(1, rows_per_step // world)
        _check_division(rows_per_step, world, self.micro_rows, self.row_len)
        self._rank, self.world = rank, world
        self.n_rows = list(rows.n_rows)
        """Rows of one epoch of each source."""
        self._order = SampleOrder(self.n_rows, weights, seed)
        self._cut, self._context = cut, context
        self._depth = prefetch
        self._prefetcher: _Prefetcher | None = None
        self._last: tuple[int, int, list[Any]] = (-1, 0, [])

    @property
    def ranks(self) -> str:
        """How many share the data, and each of their rows, in words."""
        return f"{self.world}" if self._context is None else f"{self.world} x {self._context.n}"

    # --- training ----------------------------------------------------------------------------------------------------

    def step(self, k: int) -> list[Any]:
        """This rank's micro-batches of optimizer step k, from 0. Steps in sequence are built ahead; any k will do."""
        if self._last[0] == k:
            return self._last[2]
        if not self._depth:
            batches, tokens_hash = self._build(k)
        else:
            if self._prefetcher is None or self._prefetcher.next_step != k:
                self.close()
                self._prefetcher = _Prefetcher(self._build, k, self._depth)
            try:
                batches, tokens_hash = self._prefetcher.get()
            except BaseException:
                self.close()
                raise
        self._last = (k, tokens_hash, batches)
        return batches

    def tokens_hash(self, k: int) -> int:
        """Sum modulo 2**63 over this rank's rows of step k of a hash of (sample number, tokens).

        The sum of it over ranks, again modulo 2**63, depends only on which samples the step holds. Of the processes that
        share rows the first counts them.
        """
        return self._last[1] if self._last[0] == k else self._build(k)[1]

    def epoch(self, k: int) -> float:
        """How often the data has been seen when step k begins: samples drawn / rows of all sources together."""
        return k * self.rows_per_step / sum(self.n_rows)

    def epochs(self, k: int) -> list[float]:
        """The same for each source."""
        return [c / n for c, n in zip(self.counts(k), self.n_rows, strict=True)]

    def counts(self, k: int) -> list[int]:
        """How many rows of each source the first k steps hold."""
        return self._order.mixture.counts(k * self.rows_per_step)

    def samples(self, k: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """This rank's rows of step k: their sample numbers, sources and rows within the source."""
        share = self.rows_per_step // self.world
        first = k * self.rows_per_step + self._rank * share
        numbers = np.arange(first, first + share)
        return numbers, *self._order.rows(numbers)

    def _build(self, k: int) -> tuple[list[Any], int]:
        numbers, source, row = self.samples(k)
        batches, tokens_hash = [], 0
        runs = (np.arange(n, n + self.micro_rows) for n in range(0, len(row), self.micro_rows))
        for part in runs if self._cut is None else self._cut(source, row):
            batch, tokens = self.rows.batch(numbers[part], source[part], row[part])
            batches.append(self._own(batch))
            if self._context is not None and self._context.place:
                continue
            for number, ids in zip(numbers[part].tolist(), tokens, strict=True):
                data = number.to_bytes(8, "little") + ids.astype("<i4").tobytes()
                tokens_hash += int.from_bytes(blake2b(data, digest_size=8).digest(), "little")
        return batches, tokens_hash % (1 << 63)

    def _own(self, batch: Any) -> Any:
        """What this process computes of its rank's batch."""
        return batch if self._context is None else batch.part_of(self._context)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def eval_batches(self, max_tokens: int | None = None) -> Iterator[Any]:
        """Every row of every source once, in order: this rank's share.

        Every rank gets the same number of batches of the same number of rows; what is missing is padding, never a row
        for the second time.

        Args:
            max_tokens: only the first rows that together hold about so many inputs.
        """
        offsets = np.cumsum([0, *self.n_rows])
        total = int(offsets[-1])
        if max_tokens is not None:
            total = min(total, max(1, max_tokens // self.row_len))
        first, last = (total * r // self.world for r in (self._rank, self._rank + 1))
        most = -(-total // self.world)
        for start in range(first, first + most, self.micro_rows):
            numbers = np.arange(start, start + self.micro_rows)
            source = np.searchsorted(offsets, numbers, "right") - 1
            source[numbers >= last] = PADDING
            yield self._own(self.rows.batch(numbers, source, numbers - offsets[source])[0])

    # --- the thread --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends the thread. A later step starts another."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_division(rows_per_step: int, world: int, micro_rows: int, row_len: int) -> None:
    unit = world * micro_rows
    if rows_per_step > 0 and rows_per_step % unit == 0:
        return
    below = rows_per_step // unit * unit
    near = " or ".join(str(n * row_len) for n in (below, below + unit) if n > 0)
    raise UserError(
        f"batch.tokens_per_step: {rows_per_step} rows of {row_len} tokens can't be shared by {world} ranks with "
        f"{micro_rows} rows a forward pass: set it to {near}, or change batch.micro_tokens"
    )


class _Prefetcher:
    """Builds steps k, k + 1, ... in a thread, a bounded number ahead."""

    def __init__(self, build: Callable[[int], Any], k: int, depth: int):
        self.next_step = k
        self._queue = queue.Queue[tuple[Any, BaseException | None]](depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(build, k), name="prefetch", daemon=True)
        self._thread.start()

    def _work(self, build: Callable[[int], Any], k: int) -> None:
        while not self._stop.is_set():
            item: tuple[Any, BaseException | None]
            try:
                item = (build(k), None)
            except BaseException as e:
                item = (None, e)
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if item[1] is not None:
                return
            k += 1

    def get(self) -> Any:
        item, error = self._queue.get()
        if error is not None:
            raise error
        self.next_step += 1
        return item

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
