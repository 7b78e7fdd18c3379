"""What a teacher says of the training data, asked once and kept.

Units in their order (see `units`) make shards, files that are written whole or not at all, by one process or by many; a
shard that is there is never made again. What a shard holds of a unit is found by the unit's number and checked against a
hash of the tokens that a student is about to learn from, so that answer and question can't drift apart.

Shapes: N positions that are trained, in row-major order, K tokens kept of each, B rows, T inputs of a row.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from llmkit import storage
from llmkit.config import Interrupted, MachineError, UserError
from llmkit.data.cache import ContentHashes, cache_writable, key_of, locked
from llmkit.data.loader import PADDING, Batch
from llmkit.distill.asking import Asker, Kept
from llmkit.distill.units import UnitRows, Units, tokens_hash, where
from llmkit.inference.logprobs import folder_files
from llmkit.model.gpt import GPT
from llmkit.training.dist import Ranks

_VERSION = 1
_POSITIONS = 1 << 16  # about what a shard holds, and so what is lost when a process that makes one is killed:
_INPUTS = 1 << 18  # a shard ends earlier where so little is trained that it would cost more than this to ask,
_BYTES = 1 << 26  # or where so much is kept of each position that it would be larger than this
_TELL_EVERY_S = 10.0
_NO_SEAL = "0" * 64
_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"')


def teacher_key(folders: Sequence[Path], tokenizer: str, precision: str, cache: Path) -> dict[str, Any]:
    """What the answers depend on beside the questions and `Kept`: the teacher.

    Args:
        folders: its files', an adapter's with those of its base.
        tokenizer: the hash of its tokenizer, and of the data's.
        precision: what it is computed in.
        cache: remembers the files' hashes.
    """
    hashes = ContentHashes(cache)
    key = {"teacher": [hashes.of(folder_files(f)) for f in folders], "tokenizer": tokenizer, "precision": precision}
    with cache_writable(cache):
        hashes.save()
    return key


# --- shards ----------------------------------------------------------------------------------------------------------


def _cut(units: Units, kept: Kept) -> NDArray[np.int64]:
    """(n_shards + 1,) the first unit of each shard, and how many units there are."""
    most = max(1, min(_POSITIONS, _BYTES // kept.bytes_per_position))
    cost = np.maximum(units.n_labels * _INPUTS, units.lengths * most)  # in integers: the cuts are part of the key
    before = np.cumsum(cost) - cost
    shard_of = before // (most * _INPUTS)
    return np.concatenate([[0], np.flatnonzero(np.diff(shard_of)) + 1, [len(units)]]).astype(np.int64)


def _seal_of(place: str, parts: Sequence[Any]) -> str:
    """The hash of a file in whose header it is itself still zeros; another file in its place has another."""
    digest = hashlib.sha256(place.encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _sealed(tensors: dict[str, Tensor], place: str) -> bytes:
    """A safetensors file with the hash of all its bytes in its header."""
    data = save(tensors, {"sha256": _NO_SEAL})
    return data.replace(_NO_SEAL.encode(), _seal_of(place, [data]).encode(), 1)


class _Shard:
    """A shard, memory-mapped. Raises ValueError if a byte of it is not what was written."""

    def __init__(self, file: Path, place: str):
        raw = np.memmap(file, np.uint8, "r").view(np.ndarray)
        first = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        head = raw[:first].tobytes()
        found = _SEAL.search(head)
        unsealed = head if found is None else head.replace(found[1], _NO_SEAL.encode(), 1)
        if found is None or _seal_of(place, [unsealed, raw[first:]]) != found[1].decode():
            raise ValueError("it doesn't match its hash")
        self._raw, self._first = raw, first
        self._header: dict[str, Any] = json.loads(head[8:])
        self.ids = self._array("ids", {"U16": np.uint16, "I32": np.int32})
        self.bits = self._array("logprobs", {"BF16": np.int16, "F32": np.float32})
        self.tail = self._array("tail", {"F32": np.float32})
        self.starts = self._array("starts", {"I64": np.int64})
        self.hashes = self._array("hashes", {"U8": np.uint8})

    def _array(self, name: str, dtypes: dict[str, Any]) -> NDArray[Any]:
        told = self._header[name]
        start, end = told["data_offsets"]
        return self._raw[self._first + start : self._first + end].view(dtypes[told["dtype"]]).reshape(told["shape"])


Told = tuple[NDArray[Any], NDArray[Any], NDArray[np.float32]]  # ids [n, K], log-probabilities as bits [n, K], tails [n]


class TeacherCache:
    """What a teacher says of one source's units.

    Args:
        units: the source.
        kept: what is kept.
        folder: `data.cache_dir`.
        key: what else the numbers depend on (JSON), see `teacher_key`. What only rounding depends on, such as the number
            of rows in a batch or the device, is no part of it: students on different machines share a cache.
    """

    def __init__(self, units: Units, kept: Kept, folder: Path, key: dict[str, Any]):
        self.units, self.kept = units, kept
        shape = (_POSITIONS, _INPUTS, _BYTES)
        self.inputs = {**key, "version": _VERSION, "units": units.hash, "kept": vars(kept), "shards": shape}
        self.key = key_of(self.inputs)
        self.folder = folder / f"{self.key[:32]}.teacher"
        self.firsts = _cut(units, kept)
        self._shards: dict[int, _Shard] = {}

    @classmethod
    def prepare(
        cls,
        units: Units,
        teacher: Callable[[], GPT],
        *,
        folder: Path,
        key: dict[str, Any],
        top_k: int,
        dtype: Literal["bf16", "fp32"],
        temperature: float,
        vocab_size: int,
        batch_tokens: int,
        device: torch.device,
        should_stop: Callable[[], bool],
        say: Callable[[str], None],
        part: tuple[int, int] | None = None,
        ranks: Ranks | None = None,
    ) -> TeacherCache:
        """Makes sure that the teacher was asked about every unit.

        Each shard is a function of its units alone, so that whoever makes them, and however often they were stopped, the
        bytes are the same.

        Args:
            teacher: gives the model; called only if something is missing.
            folder: `data.cache_dir`.
            key: see `teacher_key`.
            top_k: more than there are tokens means all of them.
            temperature: divides the logits.
            vocab_size: the tokenizer's.
            batch_tokens: most inputs of a forward pass, padding included.
            say: is told the size beforehand, and how far the work is.
            part: (i, n): only about every n-th shard, for the i-th of n jobs that share the folder, counted from 1. The
                cache is then whole only if its `missing` is empty.
            ranks: those that call this together and share the work. Default: each caller is alone.

        Raises:
            Interrupted: should_stop() said so, on any rank; the shards that are done stay.
            UserError: the teacher has fewer tokens than the vocabulary, or gives no probabilities.
            MachineError: the shards would not fit the disk, or can't be written.
        """
        kept = Kept(min(top_k, vocab_size), dtype, temperature, vocab_size)
        cache = cls(units, kept, folder, key)
        asker = Asker(units, kept, teacher, batch_tokens, device, should_stop)
        _Work(cache, asker, should_stop, say, part, ranks or Ranks()).do()
        return cache

    @property
    def n_shards(self) -> int:
        return len(self.firsts) - 1

    def file(self, shard: int) -> Path:
        """Where a shard lies."""
        return self.folder / f"{shard:06d}.safetensors"

    def missing(self, part: tuple[int, int] | None = None) -> list[int]:
        """The shards that are not there, of all or of one job's."""
        number, of = part or (1, 1)
        first = int(self.key[:8], 16)  # so that the jobs share many small sources too, which have one shard each
        return [s for s in range(self.n_shards) if (first + s) % of == number - 1 and not self.file(s).exists()]

    def positions(self, shards: Sequence[int]) -> int:
        """How many positions some shards hold."""
        n_labels = self.units.n_labels
        return sum(int(n_labels[self.firsts[s] : self.firsts[s + 1]].sum()) for s in shards)

    def of(
        self, unit: int, inputs: NDArray[np.int64], labels: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the teacher said at each of a unit's labels that is trained.

        Args:
            unit: its number.
            inputs: what a student is about to learn from: it must be what the teacher was asked about.
            labels: of the inputs.
            positions: of the inputs.

        Returns:
            ids [n, K] int64, log-probabilities [n, K] in the cache's dtype, tails [n] fp32.

        Raises:
            UserError: other tokens, or a shard that is missing or damaged.
        """
        return self.tensors([self.read(unit, inputs, labels, positions)])

    def read(
        self, unit: int, inputs: NDArray[np.int64], labels: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> Told:
        """The same as it lies on disk."""
        number = int(np.searchsorted(self.firsts, unit, "right")) - 1
        shard = self._shards.get(number) or self._opened(number, unit)
        at = unit - int(self.firsts[number])
        if shard.hashes[at].tobytes() != tokens_hash(inputs, labels, positions):
            raise UserError(
                f"{where(self.units, unit)}: its tokens are not those that the teacher was asked about ({self.file(number)}): "
                "the data have changed since: start again, which asks it anew"
            )
        here = slice(shard.starts[at], shard.starts[at + 1])
        return shard.ids[here], shard.bits[here], shard.tail[here]

    def tensors(self, told: Sequence[Told]) -> tuple[Tensor, Tensor, Tensor]:
        """What was said of several units, one after the other."""
        nothing = np.empty((0, self.kept.top_k), self.kept.ids_dtype)
        ids = np.concatenate([nothing, *(ids for ids, _, _ in told)]).astype(np.int64)
        bits = np.concatenate([self.kept.bits(torch.empty(nothing.shape)), *(bits for _, bits, _ in told)])
        tail = np.concatenate([np.empty(0, np.float32), *(tail for _, _, tail in told)])
        return torch.from_numpy(ids), self.kept.tensor(bits), torch.from_numpy(tail)

    def _opened(self, number: int, unit: int) -> _Shard:
        file = self.file(number)
        try:
            shard = _Shard(file, f"{self.key}/{number}")
        except FileNotFoundError:
            raise UserError(f"{where(self.units, unit)}: what the teacher said is gone: {file}: start again") from None
        except (OSError, ValueError, KeyError) as e:
            raise UserError(
                f"{where(self.units, unit)}: what the teacher said can't be read: {file}: damaged: {e}: delete that file and "
                "start again"
            ) from None
        self._shards[number] = shard
        return shard


# --- writing ---------------------------------------------------------------------------------------------------------


class _Work:
    """Makes the shards that are missing."""

    def __init__(
        self,
        cache: TeacherCache,
        asker: Asker,
        should_stop: Callable[[], bool],
        say: Callable[[str], None],
        part: tuple[int, int] | None,
        ranks: Ranks,
    ):
        self.cache, self.asker, self.should_stop = cache, asker, should_stop
        self.say, self.part, self.ranks = say if ranks.is_main else _quiet, part, ranks

    def do(self) -> None:
        cache, ranks = self.cache, self.ranks
        if not ranks.from_main(self._is_done() if ranks.is_main else None):
            with contextlib.ExitStack() as held:
                # At the store and not in a collective: another run may hold the folder for hours.
                ranks.main_first(f"teacher cache {cache.key}", lambda: self._lock(held), Interrupted)
                missing: list[int] = ranks.from_main(cache.missing(self.part) if ranks.is_main else None)
                ranks.together(lambda: self._begin(missing))
                self._make_all(missing)
        if self.part is not None:
            n = len(cache.missing())
            others = f"{n} shards are missing that other parts make" if n else "and so are all others"
            self.say(f"part {self.part[0]}/{self.part[1]}: {cache.units.name}: done; {others}")

    def _is_done(self) -> bool:
        """Says how much there is, and whether that was asked before."""
        cache, kept = self.cache, self.cache.kept
        missing, n = cache.missing(self.part), cache.positions(range(cache.n_shards))
        todo = f"{len(missing)} of {cache.n_shards} shards are to be made" if missing else "asked before"
        self.say(
            f"teacher    {cache.units.name}: {n:,} positions x {kept.bytes_per_position:,} bytes (top {kept.top_k:,} of "
            f"{kept.vocab_size:,} tokens, {kept.dtype}) = {n * kept.bytes_per_position / 1e6:,.1f} MB in {cache.folder}; "
            + todo
        )
        return not missing

    def _lock(self, held: contextlib.ExitStack) -> None:
        if self.ranks.is_main:
            held.enter_context(locked(self.cache.folder, self.should_stop, shared=self.part is not None))

    def _begin(self, missing: Sequence[int]) -> None:
        """What rank 0 does for all before the first shard."""
        if not self.ranks.is_main or not missing:
            return
        folder = self.cache.folder
        with cache_writable(folder):
            if self.part is None:  # else they may be another job's, which writes them now
                for leftover in folder.glob(".*.tmp-*"):
                    leftover.unlink()
            storage.replace_file(folder / "about.json", storage.to_json(self.cache.inputs))
            free = storage.disk.free(folder)
        needed = self.cache.positions(missing) * self.cache.kept.bytes_per_position
        if free < needed:
            raise MachineError(
                f"{folder}: {needed / 1e6:,.1f} MB are needed for what the teacher says but {free / 1e6:,.1f} MB are free: "
                "lower cache.top_k, free some space or set data.cache_dir; the same command then goes on"
            )

    def _make_all(self, missing: Sequence[int]) -> None:
        """Round after round, each with one shard for each rank: none waits long, and all look at the stop flag."""
        ranks, n_done = self.ranks, 0
        start = told = time.monotonic()
        for first in range(0, len(missing), ranks.world):
            shards = missing[first : first + ranks.world]
            mine = shards[ranks.rank] if ranks.rank < len(shards) else None
            if ranks.any(ranks.together(functools.partial(self._make, mine))):
                raise Interrupted("stopped while the teacher was asked about the data; run again to go on")
            n_done += self.cache.positions(shards)
            now, n = time.monotonic(), first + len(shards)
            if n == len(missing) or now - told >= _TELL_EVERY_S:
                told, rate = now, n_done / max(now - start, 1e-9)
                self.say(f"teacher    {n} of {len(missing)} shards, {rate:,.0f} positions/s")

    def _make(self, shard: int | None) -> bool:
        """Writes a shard. True: asked to stop before it was done."""
        if shard is None:
            return False
        cache = self.cache
        tensors = self.asker.tensors(range(int(cache.firsts[shard]), int(cache.firsts[shard + 1])))
        if tensors is None:
            return True
        with cache_writable(cache.folder):
            storage.replace_file(cache.file(shard), _sealed(tensors, f"{cache.key}/{shard}"))
        return False


def _quiet(line: str) -> None:
    pass


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TeacherBatch(Batch):
    """A batch with what the teacher says at each of its N trained positions."""

    top_ids_NK: Tensor
    """int64."""
    top_logprobs_NK: Tensor
    """fp32 or bf16, at the temperature of the cache."""
    tail_N: Tensor
    """fp32: log of the probability of all other tokens together; -inf where there are none."""

    def to(self, device: torch.device | str) -> TeacherBatch:
        top = (self.top_ids_NK, self.top_logprobs_NK, self.tail_N)
        ids, logprobs, tail = (t.to(device, non_blocking=True) for t in top)
        moved = {**vars(self), **vars(super().to(device))}
        return TeacherBatch(**{**moved, "top_ids_NK": ids, "top_logprobs_NK": logprobs, "tail_N": tail})


class TeacherRows:
    """Rows with what the teacher says of them.

    Args:
        rows: what the rows are.
        caches: of each of their sources.
    """

    def __init__(self, rows: UnitRows, caches: Sequence[TeacherCache]):
        assert len(caches) == len(rows.n_rows) and len({cache.kept for cache in caches}) == 1
        self.rows, self.caches = rows, list(caches)
        self.n_rows, self.row_len = rows.n_rows, rows.row_len

    def batch(
        self, numbers: NDArray[np.int64], source: NDArray[np.int64], row: NDArray[np.int64]
    ) -> tuple[TeacherBatch, list[NDArray[Any]]]:
        """See `RowMaker`. Raises UserError as `TeacherCache.of` does."""
        batch, tokens = self.rows.batch(numbers, source, row)
        inputs_BT, labels_BT, positions_BT = (t.numpy() for t in (batch.ids_BT, batch.labels_BT, batch.positions_BT))
        found = list[Told]()
        for b, (s, r) in enumerate(zip(source.tolist(), row.tolist(), strict=True)):
            if s == PADDING:
                continue
            members = self.rows.members(s, r).tolist()
            docs = batch.docs_BT[b].numpy()
            n = int(np.count_nonzero(docs >= 0))
            cuts = (np.flatnonzero(np.diff(docs[:n])) + 1).tolist() if len(members) > 1 else []
            for unit, start, stop in zip(members, [0, *cuts], [*cuts, n], strict=True):
                here = slice(start, stop)
                told = self.caches[s].read(unit, inputs_BT[b, here], labels_BT[b, here], positions_BT[b, here])
                found.append(told)
        top = self.caches[0].tensors(found)
        ids, logprobs, tail = (t.pin_memory() for t in top) if batch.ids_BT.is_pinned() else top
        return TeacherBatch(**vars(batch), top_ids_NK=ids, top_logprobs_NK=logprobs, tail_N=tail), tokens
