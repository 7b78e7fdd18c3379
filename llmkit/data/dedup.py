"""Copies of documents: found by signatures, checked by what they really have in common. Torch-free.

Every unit of a source gets a file of signatures, made in parallel and kept in the cache: a digest of each document's
normal form, and for near copies its n-grams and the bands of its MinHash (Broder 1997; banding as in Leskovec et al.,
Mining of Massive Datasets, chapter 3). Then one pass over all sources, in one process, decides: a document is a copy if
its digest stood before, or if it has a band in common with an earlier document that stays, and the Jaccard similarity
of their n-grams, counted exactly, reaches the threshold. So whatever is left out is that similar to a document that is
still there, and what is decided depends on earlier documents only, never on the number of processes.
"""

from __future__ import annotations

import json
import struct
import tempfile
import unicodedata
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit import storage
from llmkit.config import Interrupted, UserError
from llmkit.data.config import CleanConfig, DedupConfig
from llmkit.data.grams import grams_of, points_of

VERSION = 1
EXACT_COPY, NEAR_COPY, HELD_OUT_COPY = "exact_copy", "near_copy", "copy_of_held_out"
REASONS = ("", *CleanConfig.model_fields, EXACT_COPY, NEAR_COPY, HELD_OUT_COPY)
"""Why a document is left out, by the number of the verdict."""
EMPTY = 255
_BLOCK = 512  # n-grams hashed at once: so that what is computed stays in the processor's cache
_DOCUMENTS = 1024  # signatures that wait to be cut into bands
_SPOOL = 64 << 20  # n-grams of an unfinished file beyond this many bytes wait on disk
_OPEN = 128  # signature files that are mapped at once
_BUCKET = 64  # documents of one bucket that a later one is compared with
_LENGTH = struct.Struct("<Q")

U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]


def normal_form(text: str) -> U32:
    """The characters of a text when case, width, blanks and composed or decomposed accents make no difference."""
    points = points_of(" ".join(unicodedata.normalize("NFC", text).casefold().split()))
    wide = points - np.uint32(0xFF01)
    return np.where(wide < 0x5E, wide + np.uint32(0x21), points)


def digest(form: U32) -> bytes:
    """16 bytes that stand for a normal form."""
    return blake2b(form.tobytes(), digest_size=16).digest()


# --- signatures -----------------------------------------------------------------------------------------------------


@cache
def _permutations(n: int) -> tuple[U32, U32]:
    """Factors and terms of n hash functions; the same on every machine."""
    data = blake2b(b"llmkit minhash", digest_size=64).digest()
    while len(data) < 8 * n:
        data += blake2b(data, digest_size=64).digest()
    numbers = np.frombuffer(data[: 8 * n], "<u4").reshape(2, n, 1)
    return numbers[0] | np.uint32(1), numbers[1]


def shingles(form: U32, n: int) -> U32:
    """The hashes of a text's n-grams: a sorted set."""
    hashes = (grams_of(form, n) >> np.uint64(32)).astype(np.uint32)
    hashes.sort()
    is_new = np.ones(len(hashes), np.bool_)
    np.not_equal(hashes[1:], hashes[:-1], out=is_new[1:])
    return hashes[is_new]


def minhash(grams: U32, n: int) -> U32:
    """(n,) the least hash of a set under each of n hash functions."""
    factors, terms = _permutations(n)
    least = np.full(n, 0xFFFFFFFF, np.uint32)
    for start in range(0, len(grams), _BLOCK):
        hashes = factors * grams[start : start + _BLOCK]
        hashes += terms
        np.minimum(least, hashes.min(axis=1), out=least)
    return least


def band_keys(signatures: U32, bands: int, width: int) -> U64:
    """(bands, documents) one number for each band of each signature."""
    keys = np.zeros((bands, len(signatures)), np.uint64)
    for i in range(bands * width):
        keys[i // width] = (keys[i // width] ^ signatures[:, i]) * np.uint64(0x9E3779B97F4A7C15)
        keys[i // width] ^= keys[i // width] >> np.uint64(29)
    return keys


class SignatureWriter:
    """Gathers the signatures of a unit's documents, then writes them as one safetensors file, whole or not at all."""

    def __init__(self, path: Path, cfg: DedupConfig):
        self._path, self._cfg = path, cfg
        self._verdicts = bytearray()
        self._digests: list[bytes] = []
        self._sizes: list[int] = []
        self._waiting: list[U32] = []
        self._keys: list[U64] = []
        self._spool = tempfile.SpooledTemporaryFile(_SPOOL, dir=str(path.parent))  # noqa: SIM115 (closed by `close`)

    def skip(self, verdict: int) -> None:
        """A document that takes no part: it is left out already, for reason `verdict`, or is EMPTY."""
        self._verdicts.append(verdict)

    def add(self, text: str) -> None:
        """A document."""
        form = normal_form(text)
        self._verdicts.append(0)
        self._digests.append(digest(form))
        if self._cfg.kind == "near":
            grams = shingles(form, self._cfg.ngram)
            self._sizes.append(len(grams))
            self._spool.write(grams.astype("<u4").tobytes())
            self._waiting.append(minhash(grams, self._cfg.permutations))
            if len(self._waiting) == _DOCUMENTS:
                self._cut()

    def _cut(self) -> None:
        if self._waiting:
            self._keys.append(band_keys(np.stack(self._waiting), *self._cfg.bands))
            self._waiting.clear()

    def close(self) -> None:
        """Writes the file: under another name first, synced, then renamed."""
        self._cut()
        bands = self._cfg.bands[0] if self._cfg.kind == "near" else 0
        keys = np.concatenate([np.empty((bands, 0), np.uint64), *self._keys], axis=1)
        parts: list[tuple[str, str, list[int], Any]] = [
            ("digests", "U64", [len(self._digests), 2], b"".join(self._digests)),
            ("bands", "U64", list(keys.shape), keys.astype("<u8").tobytes()),
            ("sizes", "U32", [len(self._sizes)], np.array(self._sizes, "<u4").tobytes()),
            ("grams", "U32", [sum(self._sizes)], None),
            ("verdicts", "U8", [len(self._verdicts)], bytes(self._verdicts)),
        ]
        header, end = {}, 0
        for name, dtype, shape, _ in parts:
            start, end = end, end + int(np.prod(shape)) * int(dtype[1:]) // 8
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        temporary = self._path.with_name(f".{self._path.name}.tmp-{uuid.uuid4().hex[:8]}")
        with self._spool:
            self._spool.seek(0)
            storage.write_file(temporary, self._chunks(_LENGTH.pack(len(text)) + text, [data for *_, data in parts]))
        storage.disk.rename(temporary, self._path)

    def _chunks(self, head: bytes, parts: Sequence[bytes | None]) -> Iterator[bytes]:
        yield head
        for data in parts:
            if data is None:
                yield from iter(lambda: self._spool.read(1 << 24), b"")
            else:
                yield data


class Signatures:
    """One file of signatures.

    Raises:
        UserError: it is none, or was cut off.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as f:
                (length,) = _LENGTH.unpack(f.read(_LENGTH.size))
                self._header: dict[str, Any] = json.loads(f.read(min(length, 1 << 20)))
            self._first = _LENGTH.size + length
            whole = path.stat().st_size == self._first + self._header["verdicts"]["data_offsets"][1]
            self.n_documents, self.n_signed = (int(self._header[k]["shape"][0]) for k in ("verdicts", "digests"))
        except (OSError, ValueError, KeyError, TypeError, struct.error):
            whole = False
        if not whole:
            raise UserError(f"{path}: damaged: delete it and prepare again")

    def read(self, name: str, row: int | None = None) -> NDArray[Any]:
        """An array of the file, or one row of it."""
        told = self._header[name]
        dtype = np.dtype(f"<{told['dtype'].lower()[0]}{int(told['dtype'][1:]) // 8}")
        shape, start = told["shape"], self._first + told["data_offsets"][0]
        if row is not None:
            shape, start = shape[1:], start + row * int(np.prod(shape[1:])) * dtype.itemsize
        return np.fromfile(self.path, dtype, int(np.prod(shape)), offset=start).reshape(shape)

    def map_grams(self) -> tuple[U32, NDArray[np.int64]]:
        """All n-grams, mapped, and where each document's begin."""
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.read("sizes"), dtype=np.int64)])
        if not starts[-1]:
            return np.empty(0, np.uint32), starts
        offset = self._first + self._header["grams"]["data_offsets"][0]
        return np.memmap(self.path, "<u4", "r", offset, (int(starts[-1]),)).view(np.ndarray), starts


# --- copies ---------------------------------------------------------------------------------------------------------


def jaccard(a: U32, b: U32) -> float:
    """The share of the elements of two sorted sets that is in both."""
    if len(a) > len(b):
        a, b = b, a
    if not len(a):
        return float(not len(b))
    where = np.searchsorted(b, a)
    where[where == len(b)] = 0
    both = int(np.count_nonzero(b[where] == a))
    return both / (len(a) + len(b) - both)


class CopyFinder:
    """Decides which documents are copies of earlier ones.

    Args:
        held_out: the signature files of each source of validation and test text, whose documents all stay.
        train: those of each training source; earlier ones win.
        should_stop: asked every second or so.

    It holds about 40 bytes a document, and about 30 for every band in which a document agrees with another.
    """

    def __init__(
        self,
        held_out: Sequence[Sequence[Path]],
        train: Sequence[Sequence[Path]],
        cfg: DedupConfig,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        self._cfg, self._should_stop = cfg, should_stop
        self._files = [Signatures(path) for paths in (*held_out, *train) for path in paths]
        self._firsts = np.cumsum([0, *(f.n_signed for f in self._files)])
        """The number of each file's first document, counted over all files."""
        n_held_out_files = sum(map(len, held_out))
        self._train_files = np.cumsum([n_held_out_files, *map(len, train)])
        self._n_held_out = int(self._firsts[n_held_out_files])
        self._n = int(self._firsts[-1])
        self._mapped: Callable[[int], tuple[U32, NDArray[np.int64]]] = lru_cache(_OPEN)(
            lambda i: self._files[i].map_grams()
        )

    def find(self) -> list[list[NDArray[np.uint8]]]:
        """For each training source and unit the verdict on every document: 0 to keep it, or the place in REASONS."""
        copies = np.zeros(self._n, np.uint8)
        self._exact(copies)
        if self._cfg.kind == "near":
            self._near(copies)
        result = []
        for first, last in pairwise(self._train_files.tolist()):
            result.append([self._verdicts(i, copies) for i in range(first, last)])
        return result

    def _verdicts(self, file: int, copies: NDArray[np.uint8]) -> NDArray[np.uint8]:
        verdicts = self._files[file].read("verdicts")
        verdicts[verdicts == 0] = copies[self._firsts[file] : self._firsts[file + 1]]
        verdicts[verdicts == EMPTY] = 0
        return verdicts

    def _poll(self) -> None:
        if self._should_stop():
            raise Interrupted("stopped while copies were being looked for; run again to go on")

    def _exact(self, copies: NDArray[np.uint8]) -> None:
        digests = np.concatenate([np.empty((0, 2), np.uint64), *(f.read("digests") for f in self._files)])
        members, edges = _runs(digests[:, 0])
        second = digests[members, 1]
        del digests
        run = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
        order = np.lexsort((members, second, run))  # apart from accidents of 64 bits, as it was
        members, second, run = members[order], second[order], run[order]
        first = np.ones(len(members), np.bool_)
        first[1:] = (run[1:] != run[:-1]) | (second[1:] != second[:-1])
        originals = members[first][np.cumsum(first) - 1]
        copies[members[~first]] = REASONS.index(EXACT_COPY)
        copies[members[originals < self._n_held_out]] = REASONS.index(HELD_OUT_COPY)
        copies[: self._n_held_out] = 0

    def _near(self, copies: NDArray[np.uint8]) -> None:
        sizes = np.concatenate([np.empty(0, np.uint32), *(f.read("sizes") for f in self._files)])
        signed = (copies == 0) & (sizes > 0)
        documents, buckets, n_buckets = [], [], 0
        for band in range(self._cfg.bands[0]):
            self._poll()
            members, runs = _runs(np.concatenate([f.read("bands", band) for f in self._files])[signed])
            documents.append(members)
            buckets.append(np.repeat(np.arange(n_buckets, n_buckets + len(runs) - 1), np.diff(runs)))
            n_buckets += len(runs) - 1
        numbers = np.flatnonzero(signed)
        self._decide(numbers[np.concatenate(documents)], np.concatenate(buckets), sizes, copies)

    def _decide(
        self, documents: NDArray[np.int64], buckets: NDArray[np.int64], sizes: U32, copies: NDArray[np.uint8]
    ) -> None:
        """Goes through the documents that share a band with another, in order.

        Args:
            documents, buckets: (pairs,) sorted by bucket, then document.
        """
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(buckets))])
        staying = np.empty(len(documents), np.int64)  # of each bucket, from its start on, the documents that stay
        n_staying = np.zeros(len(starts) - 1, np.int64)
        order = np.argsort(documents, kind="stable")
        documents, buckets = documents[order], buckets[order]
        del order
        edges = np.flatnonzero(np.diff(documents, prepend=-1, append=-1))
        for n, (a, b) in enumerate(pairwise(edges.tolist())):
            if n % 4096 == 0:
                self._poll()
            document, mine = int(documents[a]), buckets[a:b]
            if document >= self._n_held_out:
                counts = n_staying[mine]
                lists = [
                    staying[starts[i] : starts[i] + min(c, _BUCKET)]
                    for i, c in zip(mine.tolist(), counts.tolist(), strict=True)
                    if c
                ]
                original = self._original(document, np.unique(np.concatenate(lists)), sizes) if lists else None
                if original is not None:
                    copies[document] = REASONS.index(HELD_OUT_COPY if original < self._n_held_out else NEAR_COPY)
                    continue
            staying[starts[mine] + n_staying[mine]] = document
            n_staying[mine] += 1

    def _original(self, document: int, candidates: NDArray[np.int64], sizes: U32) -> int | None:
        """The first of the candidates that the document is a near copy of."""
        threshold, size = self._cfg.threshold, int(sizes[document])
        theirs = sizes[candidates]
        possible = np.minimum(theirs, size) >= threshold * np.maximum(theirs, size) - 1e-6
        grams = self._grams(document)
        for candidate in candidates[possible].tolist():
            if jaccard(grams, self._grams(candidate)) >= threshold:
                return int(candidate)
        return None

    def _grams(self, document: int) -> U32:
        file = int(np.searchsorted(self._firsts, document, "right")) - 1
        grams, starts = self._mapped(file)
        i = document - int(self._firsts[file])
        return grams[starts[i] : starts[i + 1]]


def _runs(keys: U64) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where equal keys are: their places, ascending within each key, and the edges of each key's places."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    same = keys[1:] == keys[:-1]
    several = np.zeros(len(keys), np.bool_)
    several[1:] |= same
    several[:-1] |= same
    first = several.copy()
    first[1:] &= ~same
    edges = np.flatnonzero(first[several])
    n = int(np.count_nonzero(several))
    return order[several], np.append(edges, n)
