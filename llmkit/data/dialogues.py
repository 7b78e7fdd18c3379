"""Conversations of a source -> ids and which of them are learnt, encoded unit by unit, in as many processes as help.

What a unit gives is one file of the cache, keyed by everything it depends on. Torch-free: the processes that encode
load no torch.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from llmkit import storage
from llmkit.config import Interrupted, UserError
from llmkit.data.cache import ContentHashes, cache_writable, key_of, locked
from llmkit.data.config import DataConfig, SourceConfig
from llmkit.data.layouts import Dialogue, Layout, keys_of, read_pieces, reader
from llmkit.data.sources import Piece, files_of, units_of, where
from llmkit.data.turns import TrainOn, Turns, encode_dialogue
from llmkit.data.workers import Job, TokenizerLike, n_cores, run_jobs
from llmkit.tokenizer import Tokenizer

Arrays = dict[str, NDArray[Any]]
VERSION = 1
_BATCH = 256  # rows that are encoded between two looks at the stop flag
_IN_PROCESS = 1 << 20  # bytes below which starting other processes costs more than they save


@dataclass(frozen=True)
class How:
    """What the ids depend on, besides rows and tokenizer."""

    train_on: TrainOn
    row_len: int
    """Most inputs of a row: a conversation of one token more still fits."""
    chat: bool
    system: str | None
    columns: dict[str, str]


def output_of(folder: Path, number: int) -> Path:
    """The file that a unit's arrays are written to."""
    return folder / f"{number:06d}.dialogues"


@dataclass(frozen=True)
class DialogueJob(Job):
    """A unit's conversations, encoded."""

    how: dict[str, Any]
    """A How."""
    keys: dict[str, list[str]]
    """Of each file the columns of its first row, by which its layout is known."""

    @property
    def output(self) -> Path:
        return output_of(Path(self.folder), self.number)

    def is_done(self, tokenizer: str) -> bool:
        return self.output.exists()  # written whole or not at all, into a folder whose name is the key

    def run(self, tokenizer: TokenizerLike, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Reads and encodes, and writes the arrays."""
        assert isinstance(tokenizer, Tokenizer)
        how = How(**self.how)
        layouts = {path: layout_for(keys, how) for path, keys in self.keys.items() if keys}
        made = _Encoded(tokenizer, how)
        rows = read_pieces(
            self.pieces, lambda piece, _: layouts[piece.path], lambda p, n, why: made.drop(p, n, str(why))
        )
        for n, (piece, number, dialogue) in enumerate(rows):
            if n % _BATCH == 0 and should_stop():
                raise Interrupted("stopped while conversations were being prepared; run again to go on")
            try:
                made.add(piece, number, dialogue)
            except UserError as e:
                raise UserError(f"{where(piece, number)}: {e}") from None
        with cache_writable(Path(self.folder)):
            storage.replace_file(self.output, save(made.arrays()))


def layout_for(keys: Sequence[str], how: How) -> Layout:
    """How the rows with these columns are read."""
    return reader(keys, "dialogue", how.columns, how.chat, system=how.system)


class _Encoded:
    """Collects the rows of a unit."""

    def __init__(self, tokenizer: Tokenizer, how: How):
        self.tokenizer, self.how = tokenizer, how
        self.tokens: list[NDArray[np.int32]] = []
        self.trained: list[NDArray[np.bool_]] = []
        self.keys: list[bytes] = []
        self.n_cut = self.n_split = self.n_dropped = self.n_dialogues = 0
        self.first_dropped = ""

    def drop(self, piece: Piece, number: int, why: str) -> None:
        self.first_dropped = self.first_dropped or f"{where(piece, number)}: {why}"
        self.n_dropped += 1
        self.n_dialogues += 1

    def add(self, piece: Piece, number: int, dialogue: Dialogue) -> None:
        how = self.how
        encoded = encode_dialogue(self.tokenizer, dialogue.messages, dialogue.tools, how.train_on, how.chat)
        kept = [row for turns in encoded if (row := self._cut(turns)) is not None]
        if not kept:
            longest = max((len(turns.ids) for turns in encoded), default=0)
            why = f"none of the answer's tokens is among the first {how.row_len + 1} of {longest} (batch.max_len)"
            self.drop(piece, number, why if longest > how.row_len + 1 else "no token of it is an answer's")
            return
        text = json.dumps(dialogue.messages, ensure_ascii=False, sort_keys=True)
        for ids, trained in kept:
            self.tokens.append(ids)
            self.trained.append(trained)
            self.keys.append(hashlib.sha256(text.encode()).digest())
        self.n_split += len(encoded) > 1
        self.n_dialogues += 1

    def _cut(self, turns: Turns) -> tuple[NDArray[np.int32], NDArray[np.bool_]] | None:
        """A row up to the last token that is learnt; None if none is. The first token is never learnt."""
        most = self.how.row_len + 1
        ids, trained = np.array(turns.ids, np.int32), np.array(turns.is_trained, np.bool_)
        trained[:1] = False
        self.n_cut += bool(trained[most:].any())
        where_trained = np.flatnonzero(trained[:most])
        if not where_trained.size:
            return None
        end = int(where_trained[-1]) + 1
        return ids[:end], trained[:end]

    def arrays(self) -> Arrays:
        return {
            "tokens": np.concatenate([np.empty(0, np.int32), *self.tokens]),
            "trained": np.concatenate([np.empty(0, np.bool_), *self.trained]),
            "lengths": np.array([len(t) for t in self.tokens], np.int64),
            "keys": np.frombuffer(b"".join(self.keys), np.uint8).reshape(-1, 32),
            "counts": np.array([self.n_dialogues, self.n_dropped, self.n_cut, self.n_split], np.int64),
            "why_dropped": np.frombuffer(self.first_dropped.encode(), np.uint8),
        }


# --- sources ---------------------------------------------------------------------------------------------------------


def encode_source(
    cfg: DataConfig,
    source: SourceConfig,
    tokenizer: Tokenizer,
    how: How,
    hashes: ContentHashes,
    should_stop: Callable[[], bool],
    say: Callable[[str], None],
) -> Arrays:
    """The encoded conversations of a source, see `_Encoded.arrays`; from the cache if they are there.

    `say` is told the layout of each file that is read.

    Raises:
        UserError: naming file and row, for one that is no conversation, or that the template refuses.
        Interrupted: should_stop() said so; the units that were done stay.
    """
    files = files_of(source)
    inputs: Mapping[str, Any] = {
        "version": VERSION,
        "files": [(f.kind, f.compression, h) for f, h in zip(files, hashes.of(files), strict=True)],
        "limit": source.limit,
        "tokenizer": (tokenizer.hash, tokenizer.template_hash),
        "names": tokenizer.names,
        "how": asdict(how),
    }
    hashes.save()
    key = key_of(inputs)
    folder = Path(cfg.cache_dir) / f"{key[:32]}.dialogues"
    units = [tuple(unit) for unit in units_of(files, source.limit)]
    outputs = [output_of(folder, n) for n in range(len(units))]
    if not all(output.exists() for output in outputs):
        keys = {f.path: keys_of(f) for f in files}
        _tell_layouts(keys, how, say)
        jobs = [
            DialogueJob(str(folder), n, unit, asdict(how), {p.path: keys[p.path] for p in unit})
            for n, unit in enumerate(units)
        ]
        with locked(folder, should_stop):
            _run([job for job in jobs if not job.is_done(tokenizer.hash)], cfg, tokenizer, should_stop)
    parts = [_read(output) for output in outputs]
    told = next((p["why_dropped"] for p in parts if p["why_dropped"].size), np.empty(0, np.uint8))
    counts = sum((p["counts"] for p in parts), np.zeros(4, np.int64))
    whole = {name: np.concatenate([p[name] for p in parts]) for name in ("tokens", "trained", "lengths", "keys")}
    return {**whole, "counts": counts, "why_dropped": told}


def _tell_layouts(keys: Mapping[str, Sequence[str]], how: How, say: Callable[[str], None]) -> None:
    for path, columns in keys.items():
        if columns:
            try:
                say(f"{path}: layout {layout_for(columns, how).name}")
            except UserError as e:
                raise UserError(f"{path}: {e}") from None


def _run(jobs: list[DialogueJob], cfg: DataConfig, tokenizer: Tokenizer, should_stop: Callable[[], bool]) -> None:
    n_processes = min(cfg.workers or n_cores(), len(jobs))
    if n_processes < 2 or sum(job.size for job in jobs) < _IN_PROCESS:
        for job in jobs:
            job.run(tokenizer, should_stop)
        return
    with tempfile.TemporaryDirectory(prefix="llmkit-") as saved:
        tokenizer.save(saved)
        run_jobs(jobs, tokenizer, Path(saved), n_processes, should_stop, lambda job: None)


def _read(file: Path) -> Arrays:
    try:
        return dict(load_file(file))
    except Exception as e:
        raise UserError(f"{file}: damaged: {e}: delete it and start again") from None
