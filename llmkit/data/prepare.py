"""Text -> token shards: parallel, resumable, and kept for the next run.

Each source has a folder in the cache, named by a hash of everything its tokens depend on: the files' content, the
tokenizer, and how documents are found, cleaned, split and framed. Units of it are encoded by several processes, each
into a file of its own, so that the order of the tokens doesn't depend on who was faster; a unit whose file is there is
never done again, and `index.json`, written last, says that a folder is complete. Where copies are to be left out, every
unit gets a file of signatures first (see `dedup`), and one pass over them decides. Torch-free.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

from safetensors.numpy import save
from tqdm import tqdm

from llmkit import storage
from llmkit.config import UserError
from llmkit.data import dedup
from llmkit.data.cache import ContentHashes, cache_writable, key_of, locked
from llmkit.data.config import DataConfig, SourceConfig
from llmkit.data.shards import VERSION, Removed, Shard, TokenShards, write_index
from llmkit.data.sources import File, Piece, files_of, is_one_text, units_of, where
from llmkit.data.workers import HELD_OUT, KEPT, Job, SignatureJob, TokenizerLike, TokenJob, n_cores, run_jobs

log = logging.getLogger(__name__)
IN_PROCESS = 4 << 20  # bytes of text below which other processes take longer to start than to help
_LOG_EVERY_S = 10.0


@dataclass(frozen=True)
class Prepared:
    """A run's data: one stream of tokens a source, by the names that the recipe gives them."""

    train: list[TokenShards]
    train_weights: list[float]
    valid: list[TokenShards]
    """Empty if nothing was given and nothing held out."""
    test: list[TokenShards]
    fingerprint: str
    """Hex: equal for equal content, tokenizer and splits, wherever the files lie."""

    def report(self) -> str:
        """What was left out of the training text, and why: a line a source and reason; empty if nothing was."""
        lines = []
        for shards in self.train:
            for reason, told in shards.removed.items():
                lines.append(
                    f"{shards.name}: {reason}: {told.documents:,} documents of {told.chars:,} characters left out, "
                    f"such as {told.example}"
                )
        return "\n".join(lines)


class _Found(NamedTuple):
    """A source as it lies there."""

    files: list[File]
    hashes: list[str]
    units: list[list[Piece]]


@dataclass(frozen=True)
class _Work:
    """Units that are done in one folder of the cache."""

    files: list[File]
    key: str
    folder: Path
    jobs: Sequence[Job]
    outputs: tuple[str, ...]
    """Folders within the folder."""


@dataclass(frozen=True)
class _Plan:
    """What is to be done for one source."""

    source: SourceConfig
    files: list[File]
    key: str
    folder: Path
    jobs: list[TokenJob]

    @property
    def splits(self) -> list[str]:
        return [path.parent.name for path in self.jobs[0].outputs] if self.jobs else [KEPT]

    @property
    def work(self) -> _Work:
        return _Work(self.files, self.key, self.folder, self.jobs, tuple(self.splits))

    def open(self, split: str, tokenizer: str) -> TokenShards:
        return TokenShards(self.folder / split, tokenizer, name=self.source.label)

    def is_done(self, tokenizer: str) -> bool:
        """Whether the cache holds it; a damaged cache is mended."""
        if not all((self.folder / split / "index.json").exists() for split in self.splits):
            return False
        try:
            for split in self.splits:
                self.open(split, tokenizer)
        except UserError as e:
            log.warning("%s", e)
            return False
        return True

    def finish(self) -> None:
        """Declares the folders complete, with the sums of what their units left out."""
        names = [f"{job.number:06d}.tokens" for job in self.jobs]
        removed: dict[str, Removed] = {}
        for name, job in zip(names, self.jobs, strict=True):
            for reason, (n, chars, piece, row) in Shard(self.folder / KEPT / name).header.removed.items():
                told = removed.get(reason) or Removed(0, 0, _example(job.pieces[piece], row))
                removed[reason] = Removed(told.documents + n, told.chars + chars, told.example)
        with cache_writable(self.folder):
            for split in self.splits:
                write_index(self.folder / split, names, removed if split == KEPT else None)


@dataclass(frozen=True)
class _Copies:
    """How the copies among a recipe's documents are found."""

    held_out: list[_Work]
    train: list[_Work]
    verdicts: list[Path]
    """For each training source the file that says which of its documents stay. It depends on earlier sources only."""


class _Preparation:
    """What all phases need to know."""

    def __init__(
        self,
        cfg: DataConfig,
        tokenizer: TokenizerLike,
        part: tuple[int, int] | None,
        should_stop: Callable[[], bool],
        progress: bool,
    ):
        self.cfg, self.tokenizer, self.part = cfg, tokenizer, part
        self.should_stop, self.progress = should_stop, progress
        self.cache = Path(cfg.cache_dir)
        self.hashes = ContentHashes(self.cache)
        self._found: dict[str, _Found] = {}

    # --- what is to be done ------------------------------------------------------------------------------------------

    def plans(self) -> tuple[dict[str, list[_Plan]], _Copies | None]:
        cfg = self.cfg
        clean = cfg.clean.rules if cfg.clean.is_on else None
        frac = 0.0 if cfg.valid else cfg.valid_frac
        copies = self._copies(clean) if cfg.dedup.kind else None
        verdicts = copies.verdicts if copies else [None] * len(cfg.sources)
        plans = {
            "train": [self._plan(s, frac, clean, v) for s, v in zip(cfg.sources, verdicts, strict=True)],
            "valid": [self._plan(s, 0.0, None, None) for s in cfg.valid],
            "test": [self._plan(s, 0.0, None, None) for s in cfg.test],
        }
        self.hashes.save()
        return plans, copies

    def find(self, source: SourceConfig) -> _Found:
        """Looks for a source once, also where it is read for signatures and for tokens."""
        key = source.model_dump_json()
        if key not in self._found:
            files = files_of(source)
            self._found[key] = _Found(files, self.hashes.of(files), units_of(files, source.limit))
        return self._found[key]

    def _inputs(self, source: SourceConfig, clean: dict[str, Any] | None) -> dict[str, Any]:
        """What the documents of a source depend on."""
        found = self.find(source)
        return {
            "files": [(f.kind, f.compression, h) for f, h in zip(found.files, found.hashes, strict=True)],
            "field": source.field if source.template is None else None,
            "template": source.template,
            "limit": source.limit,
            "clean": clean,
        }

    def _plan(self, source: SourceConfig, frac: float, clean: dict[str, Any] | None, verdicts: Path | None) -> _Plan:
        if source.columns:
            raise UserError(f"{source.label}: `columns` is for stages that read several: set `field` or `template`")
        cfg, tokenizer, files = self.cfg, self.tokenizer, self.find(source).files
        bos_id = tokenizer.bos_id if cfg.add_bos else None  # a foreign tokenizer may have none: then none is added
        eos_id = tokenizer.eos_id if cfg.add_eos else None
        holdout: Any = "none" if not frac else "tail" if is_one_text(files) else "hash"
        inputs = {
            **self._inputs(source, clean),
            "version": VERSION,
            "verdicts": verdicts and verdicts.name,
            "holdout": (holdout, frac),
            "ends": (bos_id, eos_id),
            "tokenizer": tokenizer.hash,
        }
        key = key_of(inputs)
        folder = self.cache / key[:32]
        ends = (holdout, frac, bos_id, eos_id, None if verdicts is None else str(verdicts))
        jobs = [
            TokenJob(str(folder), n, tuple(pieces), source.field, source.template, clean, *ends)
            for n, pieces in enumerate(self.find(source).units)
        ]
        return _Plan(source, files, key, folder, jobs)

    def _copies(self, clean: dict[str, Any] | None) -> _Copies:
        cfg = self.cfg.dedup
        how: dict[str, Any] = {"version": dedup.VERSION, "kind": cfg.kind}
        if cfg.kind == "near":
            how |= {"ngram": cfg.ngram, "permutations": cfg.permutations, "bands": cfg.bands}
        held_out = [self._signatures(s, None, how) for s in (*self.cfg.test, *self.cfg.valid)]
        train = [self._signatures(s, clean, how) for s in self.cfg.sources]
        keys = [w.key for w in held_out]
        verdicts = []
        for n in range(1, len(train) + 1):
            key = key_of([cfg.model_dump(), keys, [w.key for w in train[:n]]])
            verdicts.append(self.cache / "dedup" / f"{key[:32]}.verdicts")
        return _Copies(held_out, train, verdicts)

    def _signatures(self, source: SourceConfig, clean: dict[str, Any] | None, how: dict[str, Any]) -> _Work:
        key = key_of({**self._inputs(source, clean), **how})
        folder = self.cache / "dedup" / key[:32]
        told = self.cfg.dedup.model_dump()
        jobs = [
            SignatureJob(str(folder), n, tuple(pieces), source.field, source.template, clean, told)
            for n, pieces in enumerate(self.find(source).units)
        ]
        return _Work(self.find(source).files, key, folder, jobs, ())

    # --- doing it ----------------------------------------------------------------------------------------------------

    def do(self, works: Iterable[_Work], finish: Callable[[_Work], None] = lambda work: None) -> int:
        """Does this job's share of some work, and returns how many units are missing then.

        Args:
            finish: called for each folder when all of its units are there; not for a part.
        """
        works = list({w.key: w for w in works}.values())
        numbers, mine = itertools.count(), list[_Work]()
        for work in works:
            number, of = self.part or (1, 1)
            jobs = [job for job in work.jobs if next(numbers) % of == number - 1]
            mine.append(replace(work, jobs=jobs))
        total = sum(job.size for w in mine for job in w.jobs)
        with _Progress(total, self.progress and bool(works)) as bar:
            for work in mine:
                if self.part is not None and not work.jobs:
                    continue
                with locked(work.folder, self.should_stop, shared=self.part is not None):
                    self._do(work, bar.add)
                    if self.part is None:
                        finish(work)
        if self.part is None:
            return 0
        return sum(not job.is_done(self.tokenizer.hash) for w in works for job in w.jobs)

    def _do(self, work: _Work, on_bytes: Callable[[int], None]) -> None:
        before = [_stamp(f) for f in work.files]
        with cache_writable(work.folder):
            for output in work.outputs or (".",):
                (work.folder / output).mkdir(exist_ok=True)
                if self.part is None:  # else they may be another job's, which writes them now
                    for leftover in (work.folder / output).glob(".*.tmp-*"):
                        leftover.unlink()
        jobs = []
        for job in work.jobs:
            if job.is_done(self.tokenizer.hash):
                on_bytes(job.size)
            else:
                jobs.append(job)
        n_processes = min(self.cfg.workers or n_cores(), len(jobs))
        if sum(job.size for job in jobs) < IN_PROCESS:
            n_processes = 1
        with tempfile.TemporaryDirectory(prefix="llmkit-") as folder:
            if n_processes > 1:
                self.tokenizer.save(folder)
            run_jobs(jobs, self.tokenizer, Path(folder), n_processes, self.should_stop, lambda job: on_bytes(job.size))
        for file, stamp in zip(work.files, before, strict=True):
            if _stamp(file) != stamp:
                raise UserError(f"{file.path}: changed while it was being read: run again")

    def find_copies(self, copies: _Copies) -> int:
        """Makes the files of verdicts, and returns how many units' signatures are missing for that."""
        if all(path.exists() for path in copies.verdicts):
            return 0
        missing = self.do([*copies.held_out, *copies.train])
        if missing:
            return missing
        with locked(self.cache / "dedup", self.should_stop):
            if all(path.exists() for path in copies.verdicts):  # another job found them while this one waited
                return 0
            held_out, train = ([_signature_files(w) for w in ws] for ws in (copies.held_out, copies.train))
            found = dedup.CopyFinder(held_out, train, self.cfg.dedup, self.should_stop).find()
            with cache_writable(self.cache / "dedup"):
                for path, units in zip(copies.verdicts, found, strict=True):
                    storage.replace_file(path, save({f"{n:06d}": verdicts for n, verdicts in enumerate(units)}))
        return 0


@overload
def prepare(
    cfg: DataConfig,
    tokenizer: TokenizerLike,
    *,
    part: None = None,
    should_stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
) -> Prepared: ...
@overload
def prepare(
    cfg: DataConfig,
    tokenizer: TokenizerLike,
    *,
    part: tuple[int, int] | None,
    should_stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
) -> Prepared | None: ...
def prepare(
    cfg: DataConfig,
    tokenizer: TokenizerLike,
    *,
    part: tuple[int, int] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
) -> Prepared | None:
    """Makes sure that all token shards of a recipe exist, and opens them.

    One rank of a run calls this first; the others call it afterwards and find everything done.

    Args:
        part: (i, n): only the units i, i + n, i + 2 n ... of all sources, counted from 1, for n jobs that share a
            cache. No index is written and nothing is returned; what is still missing is printed. A later call without
            it finds the units done.
        should_stop: asked between units of work.
        progress: shows a bar on a terminal, else a line in the log every ten seconds.

    Raises:
        UserError: a source can't be read, or holds no text.
        MachineError: a process was killed, or the disk is full.
        Interrupted: should_stop() said so; the next call goes on from there.
    """
    preparation = _Preparation(cfg, tokenizer, part, should_stop, progress)
    plans, copies = preparation.plans()
    missing = {p.key: p for ps in plans.values() for p in ps if not p.is_done(tokenizer.hash)}
    if copies and any(p.key in missing for p in plans["train"]):
        n_missing = preparation.find_copies(copies)
        if part and n_missing:
            print(
                f"part {part[0]}/{part[1]}: signatures done, but those of {n_missing} units are missing: when all jobs "
                f"have ended, run all parts again, which looks for copies and makes the tokens"
            )
            return None
    if part:
        n_missing = preparation.do(p.work for ps in plans.values() for p in ps)
        others = f"{n_missing} units are missing that other parts make" if n_missing else "and so are all others"
        print(f"part {part[0]}/{part[1]}: done; {others}; at the end run without `part`, which writes the index")
        return None
    preparation.do((p.work for p in missing.values()), lambda work: missing[work.key].finish())

    opened = {role: [_open(p, tokenizer.hash) for p in ps] for role, ps in plans.items()}
    frac = 0.0 if cfg.valid else cfg.valid_frac
    if frac:
        held_out = [p.open(HELD_OUT, tokenizer.hash) for p in plans["train"]]
        opened["valid"] = [s for s in held_out if s.n_docs]
        if not opened["valid"]:
            log.warning(
                "no validation text: none of %d documents fell into valid_frac=%g: give `valid`, or set it higher",
                sum(s.n_docs for s in opened["train"]),
                frac,
            )
    keys = {role: [p.key for p in ps] for role, ps in plans.items()}
    return Prepared(
        train=opened["train"],
        train_weights=[s.weight for s in cfg.sources],
        valid=opened["valid"],
        test=opened["test"],
        fingerprint=hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest(),
    )


def _signature_files(work: _Work) -> list[Path]:
    return [job.output for job in work.jobs if isinstance(job, SignatureJob)]


def _example(piece: Piece, row: int) -> str:
    """Where a document stands; deep in a file, whose lines would all have to be counted, by the byte."""
    if piece.kind == "jsonl" and piece.start > 1 << 30:
        return f"{piece.path}: line {row} after byte {piece.start}"
    return where(piece, row)


def _open(plan: _Plan, tokenizer: str) -> TokenShards:
    """The text itself, which must not be empty."""
    shards = plan.open(KEPT, tokenizer)
    path = plan.source.label
    n_removed = sum(told.documents for told in shards.removed.values())
    reasons = ", ".join(f"{reason} {told.documents:,}" for reason, told in shards.removed.items())
    if not shards.n_docs:
        if HELD_OUT in plan.splits and (n := plan.open(HELD_OUT, tokenizer).n_docs):
            raise UserError(f"{path}: valid_frac holds out all {n} documents: set it lower, or give `valid`")
        if n_removed:
            raise UserError(f"{path}: no text in it: all {n_removed} documents were left out ({reasons})")
        empty = f": {shards.n_empty} documents, all of them empty" if shards.n_empty else ": the file is empty"
        raise UserError(f"{path}: no text in it{empty}")
    if shards.n_empty:
        log.info("%s: %d empty documents were left out", path, shards.n_empty)
    if n_removed:
        chars = sum(told.chars for told in shards.removed.values())
        log.info("%s: %d documents of %d characters were left out: %s", path, n_removed, chars, reasons)
    return shards


# --- work -----------------------------------------------------------------------------------------------------------


def _stamp(file: File) -> list[tuple[int, int]]:
    stamps = []
    for name in file.parts if file.kind == "stream" else (file.path,):
        try:
            stat = os.stat(name)
        except OSError as e:
            raise UserError(f"{name}: cannot be read: {e.strerror}") from None
        stamps.append((stat.st_size, stat.st_mtime_ns))
    return stamps


class _Progress:
    """A bar on a terminal, lines in the log elsewhere."""

    def __init__(self, total: int, shown: bool):
        self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="preparing", disable=None if shown else True)
        self._lines = shown and self._bar.disable
        self._total, self._done = total, 0
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._bar.close()
        if self._lines and kind is None:
            self._line()

    def add(self, n_bytes: int) -> None:
        self._bar.update(n_bytes)
        self._done += n_bytes
        if self._lines and time.monotonic() - self._last >= _LOG_EVERY_S:
            self._last = time.monotonic()
            self._line()

    def _line(self) -> None:
        took = max(time.monotonic() - self._start, 1e-9)
        log.info("preparing: %.1f of %.1f MB, %.1f MB/s", self._done / 1e6, self._total / 1e6, self._done / took / 1e6)
