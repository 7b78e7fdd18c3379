"""Token shards: documents as token ids on disk, read through memory maps.

One file: magic (8 bytes), version and length of the header (two uint32), the header as JSON, then, each at a multiple
of 64 bytes, the tokens (uint16 or uint32) and the documents' first tokens (uint64). All numbers are little-endian. A
folder of such files and an `index.json`, written last, is one stream of tokens. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit import storage
from llmkit.config import MachineError, UserError

MAGIC = b"LLMKTOK\x00"
VERSION = 2
INDEX = "index.json"
_ALIGN = 64
_SPOOL = 256 << 20  # tokens of an unfinished shard beyond this many bytes wait on disk
_PREFIX = struct.Struct("<8sII")
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

Array = NDArray[np.integer]


@dataclass(frozen=True)
class Removed:
    """What was left out of a source for one reason."""

    documents: int
    chars: int
    example: str
    """File and row of the first one."""


@dataclass(frozen=True)
class Header:
    """What a shard says of itself."""

    dtype: str
    """uint16 if vocab_size <= 65536, else uint32."""
    vocab_size: int
    tokenizer: str
    """The tokenizer's hash."""
    n_tokens: int
    n_docs: int
    n_bytes: int
    """UTF-8 bytes of the documents' normalised text: what bits per byte are counted on."""
    n_empty: int
    """Documents without any text, which were left out."""
    removed: dict[str, list[int]]
    """Why other documents were left out: how many, their characters, and the piece and row of the first."""
    max_id: int
    """The largest token id; -1 without tokens."""
    sha256: str
    """Of everything after the header."""


def _padding(size: int) -> bytes:
    return bytes(-size % _ALIGN)


# --- writing --------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Gathers documents, then writes one shard file, whole or not at all."""

    def __init__(self, path: Path, vocab_size: int, tokenizer: str):
        self._path = path
        self._name = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self._vocab_size, self._tokenizer = vocab_size, tokenizer
        self._spool = tempfile.SpooledTemporaryFile(_SPOOL, dir=str(path.parent))  # noqa: SIM115 (closed by `close`)
        self._digest = hashlib.sha256()
        self._starts: list[NDArray[np.uint64]] = []
        self._n_tokens, self._n_bytes, self._max_id = 0, 0, -1
        self.n_empty = 0
        self.removed: dict[str, list[int]] = {}

    def add(self, tokens: Array, lengths: Sequence[int], n_bytes: int) -> None:
        """Appends documents.

        Args:
            tokens: (sum of lengths,) ids of all of them.
            lengths: tokens of each.
            n_bytes: UTF-8 bytes of their normalised text.

        Raises:
            ValueError: an id does not fit the vocabulary, which the shard's dtype is chosen for.
        """
        if not len(tokens):
            return
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._vocab_size:
            raise ValueError(f"token id {high if low >= 0 else low} is outside the vocabulary [0, {self._vocab_size})")
        data = tokens.astype(_DTYPES[self._name]).tobytes()
        with _writable(self._path):
            self._spool.write(data)
        self._digest.update(data)
        ends = self._n_tokens + np.cumsum(np.asarray(lengths, np.uint64))
        self._starts.append(ends - np.asarray(lengths, np.uint64))
        self._n_tokens += len(tokens)
        self._n_bytes += n_bytes
        self._max_id = max(self._max_id, high)

    def close(self) -> Header:
        """Writes the file: under another name first, synced, then renamed."""
        starts = np.concatenate([np.empty(0, np.uint64), *self._starts])
        padding = _padding(self._spool.tell())
        tail = padding + starts.astype("<u8").tobytes()
        self._digest.update(tail)
        header = Header(
            dtype=self._name,
            vocab_size=self._vocab_size,
            tokenizer=self._tokenizer,
            n_tokens=self._n_tokens,
            n_docs=len(starts),
            n_bytes=self._n_bytes,
            n_empty=self.n_empty,
            removed=self.removed,
            max_id=self._max_id,
            sha256=self._digest.hexdigest(),
        )
        text = json.dumps(asdict(header)).encode()
        text += b" " * len(_padding(_PREFIX.size + len(text)))
        temporary = self._path.with_name(f".{self._path.name}.tmp-{uuid.uuid4().hex[:8]}")
        with self._spool, _writable(self._path):
            self._spool.seek(0)
            pieces = iter(lambda: self._spool.read(1 << 24), b"")
            storage.write_file(temporary, _chain(_PREFIX.pack(MAGIC, VERSION, len(text)) + text, pieces, tail))
            storage.disk.rename(temporary, self._path)
        return header


def _chain(head: bytes, body: Iterator[bytes], tail: bytes) -> Iterator[bytes]:
    yield head
    yield from body
    yield tail


class _writable:
    """Turns a failing disk into one sentence."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, OSError):
            raise MachineError(f"{self._path}: cannot be written: {error.strerror or error}") from None


# --- reading --------------------------------------------------------------------------------------------------------


class Shard:
    """One shard file, memory-mapped.

    Raises:
        UserError: it is no shard, is damaged, or holds ids beyond its vocabulary.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as f:
                prefix = f.read(_PREFIX.size)
                if len(prefix) < _PREFIX.size or prefix[:8] != MAGIC:
                    raise UserError(f"{path}: not a token shard: delete it and prepare again")
                _, version, length = _PREFIX.unpack(prefix)
                if version != VERSION:
                    raise UserError(
                        f"{path}: shard format {version}, but {VERSION} is read: delete it and prepare again"
                    )
                text = f.read(min(length, size))
        except OSError as e:
            raise UserError(f"{path}: cannot be read: {e.strerror}") from None
        self.header = _header(path, text)
        dtype = _DTYPES[self.header.dtype]
        first = _PREFIX.size + length
        n = self.header.n_tokens * dtype.itemsize
        n += len(_padding(n))
        if size != first + n + 8 * self.header.n_docs:
            expected = first + n + 8 * self.header.n_docs
            raise UserError(
                f"{path}: damaged: {size} bytes, but its header says {expected}: delete it and prepare again"
            )
        self._first = first
        self.tokens = _mapped(path, dtype, first, self.header.n_tokens)
        self.starts = _mapped(path, np.dtype("<u8"), first + n, self.header.n_docs)

    def verify(self) -> None:
        """Reads the whole file. Raises UserError if a bit of it has changed."""
        digest = hashlib.sha256()
        with self.path.open("rb") as f:
            f.seek(self._first)
            while data := f.read(1 << 22):
                digest.update(data)
        if digest.hexdigest() != self.header.sha256:
            raise UserError(f"{self.path}: damaged: its content doesn't match its hash: delete it and prepare again")


def _header(path: Path, text: bytes) -> Header:
    try:
        data = json.loads(text)
        header = Header(**{f.name: data[f.name] for f in fields(Header)})
        counts = [header.n_tokens, header.n_docs, header.n_bytes, header.n_empty, header.vocab_size, header.max_id + 1]
        counts += [n for told in header.removed.values() for n in told]
        sound = header.dtype in _DTYPES and all(type(c) is int and c >= 0 for c in counts)
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise UserError(f"{path}: damaged: its header can't be read: delete it and prepare again")
    if header.max_id >= header.vocab_size:
        raise UserError(f"{path}: holds token id {header.max_id}, but its vocabulary has {header.vocab_size}")
    return header


def _mapped(path: Path, dtype: np.dtype[Any], offset: int, n: int) -> Array:
    """An empty range can't be mapped."""
    return np.memmap(path, dtype, "r", offset, (n,)).view(np.ndarray) if n else np.empty(0, dtype)


def write_index(folder: Path, names: Sequence[str], removed: Mapping[str, Removed] | None = None) -> None:
    """Declares a folder of finished shards complete, and says what was left out of it."""
    shards = {name: Shard(folder / name).header.sha256 for name in names}
    told = {reason: asdict(entry) for reason, entry in (removed or {}).items()}
    storage.sync_folder(folder)
    storage.replace_file(folder / INDEX, storage.to_json({"version": VERSION, "shards": shards, "removed": told}))


class TokenShards:
    """A folder of shards as one stream of tokens.

    Args:
        folder: what `prepare` wrote.
        tokenizer: the hash that the tokenizer must have; None: any.
        name: what errors and logs call it. Default: the folder.

    Raises:
        UserError: the folder is not complete, is damaged, or was made with another tokenizer.
    """

    def __init__(self, folder: str | Path, tokenizer: str | None = None, name: str | None = None):
        self.folder = Path(folder)
        self.name = name or str(folder)
        try:
            index = json.loads((self.folder / INDEX).read_text("utf-8"))
            hashes = [(str(file), str(sha256)) for file, sha256 in index["shards"].items()]
            self.removed = {reason: Removed(**told) for reason, told in index["removed"].items()}
            """What was left out of the source, by reason."""
        except FileNotFoundError:
            raise UserError(f"{folder}: no prepared data: {INDEX} is missing: prepare again") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{folder}: damaged: {INDEX} can't be read: delete the folder and prepare again") from None
        self._shards = [Shard(self.folder / file) for file, _ in hashes]
        for shard, (_, sha256) in zip(self._shards, hashes, strict=True):
            if shard.header.sha256 != sha256:
                raise UserError(f"{shard.path}: not the shard that {INDEX} names: delete the folder and prepare again")
            if tokenizer is not None and shard.header.tokenizer != tokenizer:
                raise UserError(
                    f"{folder}: made with another tokenizer: {shard.header.tokenizer[:12]}, not {tokenizer[:12]}: "
                    f"delete the folder or prepare again"
                )
        headers = [s.header for s in self._shards]
        self.n_tokens = sum(h.n_tokens for h in headers)
        self.n_docs = sum(h.n_docs for h in headers)
        self.n_bytes = sum(h.n_bytes for h in headers)
        self.n_empty = sum(h.n_empty for h in headers)
        self.vocab_size = max((h.vocab_size for h in headers), default=0)
        self._token_offsets = np.cumsum([0] + [h.n_tokens for h in headers])
        self._doc_offsets = np.cumsum([0] + [h.n_docs for h in headers])

    @property
    def hash(self) -> str:
        """Names ids and documents, by what the shards say of themselves (hex SHA-256)."""
        told = [(shard.header.dtype, shard.header.n_tokens, shard.header.sha256) for shard in self._shards]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def verify(self) -> None:
        """Re-reads and hashes every shard. Raises UserError naming the first that is damaged."""
        for shard in self._shards:
            shard.verify()

    def tokens(self, start: int, stop: int) -> Array:
        """(stop - start,) ids of the stream; a view of the file where one shard holds them all."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a stream of {self.n_tokens}")
        parts = [s.tokens[a:b] for s, a, b in self._overlaps(self._token_offsets, start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint16), *parts])

    def starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Positions in the stream, within [start, stop), at which a document begins."""
        found = []
        for i in self._between(self._token_offsets, start, stop):
            first = int(self._token_offsets[i])
            shard = self._shards[i].starts
            a, b = np.searchsorted(shard, np.array([max(start - first, 0), max(stop - first, 0)], np.uint64))
            found.append(shard[a:b].astype(np.int64) + first)
        return np.concatenate([np.empty(0, np.int64), *found])

    def windows(self, firsts: NDArray[np.int64], width: int, fill: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Many equally long stretches of the stream at once.

        Args:
            firsts: (B,) where each begins.
            fill: the id that stands beyond the end of the stream.

        Returns:
            (B, width) ids, and whether each is the first of a document.
        """
        ids = np.full((len(firsts), width), fill, np.int64)
        is_start = np.zeros((len(firsts), width), np.bool_)
        shard_of = np.searchsorted(self._token_offsets, firsts, "right") - 1
        inside = firsts + width <= np.append(self._token_offsets, -1)[shard_of + 1]
        for i in np.unique(shard_of[inside]):
            here = np.flatnonzero(inside & (shard_of == i))
            local = firsts[here] - self._token_offsets[i]
            ids[here] = self._shards[i].tokens[local[:, None] + np.arange(width)]
            starts = self._shards[i].starts
            a, b = (
                np.searchsorted(starts, local.astype(np.uint64)),
                np.searchsorted(starts, (local + width).astype(np.uint64)),
            )
            counts = b - a
            which = np.arange(counts.sum()) + np.repeat(a - (np.cumsum(counts) - counts), counts)
            is_start[np.repeat(here, counts), starts[which].astype(np.int64) - np.repeat(local, counts)] = True
        for row in np.flatnonzero(~inside):  # over the edge of a shard, or of the stream
            first = int(firsts[row])
            stop = min(first + width, self.n_tokens)
            ids[row, : stop - first] = self.tokens(first, stop)
            is_start[row, self.starts(first, stop) - first] = True
        return ids, is_start

    @property
    def doc_starts(self) -> NDArray[np.int64]:
        """(n_docs,) where each document begins: in memory, so for small data only."""
        return self.starts(0, self.n_tokens)

    def doc_lengths(self, first: int = 0, last: int | None = None) -> NDArray[np.int64]:
        """Tokens of documents [first, last)."""
        last = self.n_docs if last is None else last
        parts = [np.empty(0, np.int64)]
        for i in self._between(self._doc_offsets, first, last):
            base, shard = int(self._doc_offsets[i]), self._shards[i]
            a, b = max(first - base, 0), min(last - base, shard.header.n_docs)
            ends = np.append(shard.starts[a + 1 : b + 1], np.uint64(shard.header.n_tokens))[: b - a]
            parts.append((ends - shard.starts[a:b]).astype(np.int64))
        return np.concatenate(parts)

    def document(self, number: int) -> Array:
        """The ids of one document."""
        if not 0 <= number < self.n_docs:
            raise IndexError(f"document {number} of {self.n_docs}")
        i = int(np.searchsorted(self._doc_offsets, number, "right")) - 1
        shard, local = self._shards[i], number - int(self._doc_offsets[i])
        stop = int(shard.starts[local + 1]) if local + 1 < shard.header.n_docs else shard.header.n_tokens
        return shard.tokens[int(shard.starts[local]) : stop]

    def _between(self, offsets: Array, start: int, stop: int) -> range:
        """The shards that hold any of [start, stop)."""
        if start >= stop:
            return range(0)
        first, last = np.searchsorted(offsets, [start, stop - 1], "right") - 1
        return range(int(first), int(last) + 1)

    def _overlaps(self, offsets: Array, start: int, stop: int) -> Iterator[tuple[Shard, int, int]]:
        for i in self._between(offsets, start, stop):
            base = int(offsets[i])
            yield self._shards[i], max(start - base, 0), min(stop, int(offsets[i + 1])) - base
