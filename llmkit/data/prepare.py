"""Text -> token shards: parallel, resumable, and kept for the next run.

Each source has a folder in the cache, named by a hash of everything its tokens depend on: the files' content, the
tokenizer, and how documents are found, split and framed. Units of it are encoded by several processes, each into a
file of its own, so that the order of the tokens doesn't depend on who was faster; a unit whose file is there is never
done again, and `index.json`, written last, says that a folder is complete. Torch-free.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from llmkit import storage
from llmkit.config import Interrupted, MachineError, UserError
from llmkit.data.config import DataConfig, SourceConfig
from llmkit.data.shards import VERSION, TokenShards, write_index
from llmkit.data.sources import File, files_of, is_one_text, units_of
from llmkit.data.workers import HELD_OUT, KEPT, Job, TokenizerLike, run_jobs

log = logging.getLogger(__name__)
IN_PROCESS = 4 << 20  # bytes of text below which other processes take longer to start than to help
_LOG_EVERY_S = 10.0
_FRESH_NS = 2_000_000_000  # a file younger than this may change again within its time stamp's resolution


@dataclass(frozen=True)
class Prepared:
    """A run's data: one stream of tokens a source."""

    train: list[TokenShards]
    train_weights: list[float]
    valid: list[TokenShards]
    """Empty if nothing was given and nothing held out."""
    test: list[TokenShards]
    fingerprint: str
    """Hex: equal for equal content, tokenizer and splits, wherever the files lie."""


@dataclass(frozen=True)
class _Plan:
    """What is to be done for one source."""

    source: SourceConfig
    files: list[File]
    key: str
    folder: Path
    jobs: list[Job]

    @property
    def splits(self) -> list[str]:
        return [path.parent.name for path in self.jobs[0].outputs]

    def open(self, split: str, tokenizer: str) -> TokenShards:
        return TokenShards(self.folder / split, tokenizer, name=self.source.path)

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


def prepare(
    cfg: DataConfig,
    tokenizer: TokenizerLike,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
) -> Prepared:
    """Makes sure that all token shards of a recipe exist, and opens them.

    One rank of a run calls this first; the others call it afterwards and find everything done.

    Args:
        should_stop: asked between units of work.
        progress: shows a bar on a terminal, else a line in the log every ten seconds.

    Raises:
        UserError: a source can't be read, or holds no text.
        MachineError: a process was killed, or the disk is full.
        Interrupted: should_stop() said so; the next call goes on from there.
    """
    cache = Path(cfg.cache_dir)
    hashes = _Hashes(cache)
    frac = 0.0 if cfg.valid else cfg.valid_frac
    plans = {
        "train": [_plan(cfg, s, frac, tokenizer, cache, hashes) for s in cfg.sources],
        "valid": [_plan(cfg, s, 0.0, tokenizer, cache, hashes) for s in cfg.valid],
        "test": [_plan(cfg, s, 0.0, tokenizer, cache, hashes) for s in cfg.test],
    }
    hashes.save()
    missing = {p.key: p for ps in plans.values() for p in ps if not p.is_done(tokenizer.hash)}
    _run(list(missing.values()), tokenizer, cfg.workers, should_stop, progress)

    opened = {role: [_open(p, tokenizer.hash) for p in ps] for role, ps in plans.items()}
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


def _plan(
    cfg: DataConfig, source: SourceConfig, frac: float, tokenizer: TokenizerLike, cache: Path, hashes: _Hashes
) -> _Plan:
    files = files_of(source)
    bos_id = tokenizer.bos_id if cfg.add_bos else None  # a foreign tokenizer may have none: then there is none to add
    eos_id = tokenizer.eos_id if cfg.add_eos else None
    holdout: Any = "none" if not frac else "tail" if is_one_text(files) else "hash"
    inputs = {
        "version": VERSION,
        "files": [(f.kind, f.compression, sha256) for f, sha256 in zip(files, hashes.of(files), strict=True)],
        "field": source.field,
        "holdout": (holdout, frac),
        "ends": (bos_id, eos_id),
        "tokenizer": tokenizer.hash,
    }
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    folder = cache / key[:32]
    jobs = [
        Job(str(folder), n, tuple(pieces), source.field, holdout, frac, bos_id, eos_id)
        for n, pieces in enumerate(units_of(files))
    ]
    return _Plan(source, files, key, folder, jobs)


def _open(plan: _Plan, tokenizer: str) -> TokenShards:
    """The text itself, which must not be empty."""
    shards = plan.open(KEPT, tokenizer)
    path = plan.source.path
    if not shards.n_docs:
        if HELD_OUT in plan.splits and (n := plan.open(HELD_OUT, tokenizer).n_docs):
            raise UserError(f"{path}: valid_frac holds out all {n} documents: set it lower, or give `valid`")
        empty = f": {shards.n_empty} documents, all of them empty" if shards.n_empty else ": the file is empty"
        raise UserError(f"{path}: no text in it{empty}")
    if shards.n_empty:
        log.info("%s: %d empty documents were left out", path, shards.n_empty)
    return shards


# --- content hashes -------------------------------------------------------------------------------------------------


class _Hashes:
    """SHA-256 of files, remembered by path, size and time stamp."""

    def __init__(self, cache: Path):
        self._file = cache / "hashes.json"
        self._changed = False
        try:
            self._known: dict[str, Any] = dict(json.loads(self._file.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            self._known = {}

    def of(self, files: Sequence[File]) -> list[str]:
        with ThreadPoolExecutor(min(8, len(files))) as pool:
            return list(pool.map(self._one, files))

    def _one(self, file: File) -> str:
        try:
            stat = os.stat(file.path)
            path, stamp = os.path.abspath(file.path), [stat.st_size, stat.st_mtime_ns]
            known = self._known.get(path)
            if isinstance(known, list) and known[:2] == stamp:
                return str(known[2])
            sha256 = storage.sha256_of(Path(file.path))
        except OSError as e:
            raise UserError(f"{file.path}: cannot be read: {e.strerror}") from None
        if time.time_ns() - stat.st_mtime_ns > _FRESH_NS:
            self._known[path] = [*stamp, sha256]
            self._changed = True
        return sha256

    def save(self) -> None:
        if self._changed:
            with _cache_writable(self._file.parent):
                storage.replace_file(self._file, json.dumps(self._known))


# --- work -----------------------------------------------------------------------------------------------------------


def _run(
    plans: Sequence[_Plan],
    tokenizer: TokenizerLike,
    workers: int | None,
    should_stop: Callable[[], bool],
    progress: bool,
) -> None:
    total = sum(job.size for p in plans for job in p.jobs)
    with _Progress(total, progress and bool(plans)) as bar:
        for plan in plans:
            with _locked(plan.folder, should_stop):
                if plan.is_done(tokenizer.hash):  # another run made it while this one waited
                    continue
                _run_plan(plan, tokenizer, workers or _n_cores(), should_stop, bar.add)


def _run_plan(
    plan: _Plan,
    tokenizer: TokenizerLike,
    n_processes: int,
    should_stop: Callable[[], bool],
    on_bytes: Callable[[int], None],
) -> None:
    before = [_stamp(f) for f in plan.files]
    with _cache_writable(plan.folder):
        for split in plan.splits:
            (plan.folder / split).mkdir(exist_ok=True)
            for leftover in (plan.folder / split).glob(".*.tmp-*"):
                leftover.unlink()
    jobs = []
    for job in plan.jobs:
        if job.is_done(tokenizer.hash):
            on_bytes(job.size)
        else:
            jobs.append(job)
    if sum(job.size for job in jobs) < IN_PROCESS:
        n_processes = 1
    folder = None
    if min(n_processes, len(jobs)) > 1:
        folder = plan.folder / "tokenizer"
        with _cache_writable(folder):
            tokenizer.save(folder)
    run_jobs(jobs, tokenizer, folder, n_processes, should_stop, lambda job: on_bytes(job.size))
    for file, stamp in zip(plan.files, before, strict=True):
        if _stamp(file) != stamp:
            raise UserError(f"{file.path}: changed while it was being read: run again")
    with _cache_writable(plan.folder):
        for split in plan.splits:
            write_index(plan.folder / split, [f"{job.number:06d}.tokens" for job in plan.jobs])


def _stamp(file: File) -> tuple[int, int]:
    try:
        stat = os.stat(file.path)
    except OSError as e:
        raise UserError(f"{file.path}: cannot be read: {e.strerror}") from None
    return stat.st_size, stat.st_mtime_ns


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _cache_writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise MachineError(f"{folder}: the cache cannot be written: {e.strerror or e} (set data.cache_dir)") from None


@contextmanager
def _locked(folder: Path, should_stop: Callable[[], bool]) -> Iterator[None]:
    """One run at a time writes a folder. The lock is the system's: it ends with the process that holds it."""
    with _cache_writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    with lock:
        waited = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waited:
                    log.info("%s: another run prepares the same data: waiting for it", folder)
                waited = True
            if should_stop():
                raise Interrupted("stopped while waiting for another run to prepare the same data")
            time.sleep(0.2)
        yield


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
