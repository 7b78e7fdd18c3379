"""The cache of prepared data: what its folders are keyed by, and who may write them. Torch-free."""

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
from pathlib import Path
from typing import IO, Any

from llmkit import storage
from llmkit.config import Interrupted, MachineError, UserError
from llmkit.data.sources import File

log = logging.getLogger(__name__)
_FRESH_NS = 2_000_000_000  # a file younger than this may change again within its time stamp's resolution


def key_of(inputs: Any) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


class ContentHashes:
    """SHA-256 of files, remembered by path, size and time stamp; of a stream a hash of what names its content."""

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
        if file.kind == "stream":
            return key_of([file.identity, *map(self._of_path, file.parts)])
        return self._of_path(file.path)

    def _of_path(self, name: str) -> str:
        try:
            stat = os.stat(name)
            path, stamp = os.path.abspath(name), [stat.st_size, stat.st_mtime_ns]
            known = self._known.get(path)
            if isinstance(known, list) and known[:2] == stamp:
                return str(known[2])
            sha256 = storage.sha256_of(Path(name))
        except OSError as e:
            raise UserError(f"{name}: cannot be read: {e.strerror}") from None
        if time.time_ns() - stat.st_mtime_ns > _FRESH_NS:
            self._known[path] = [*stamp, sha256]
            self._changed = True
        return sha256

    def save(self) -> None:
        """Remembers them for the next run."""
        if self._changed:
            with cache_writable(self._file.parent):
                storage.replace_file(self._file, json.dumps(self._known))


@contextmanager
def cache_writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise MachineError(f"{folder}: the cache cannot be written: {e.strerror or e} (set data.cache_dir)") from None


@contextmanager
def locked(folder: Path, should_stop: Callable[[], bool], shared: bool = False) -> Iterator[None]:
    """One run at a time writes a folder, or several that share it, each other units of it.

    The lock is the system's: it ends with the process that holds it.
    """
    with cache_writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    with lock:
        take_lock(lock, should_stop, f"{folder}: another run prepares the same data", shared)
        yield


def take_lock(lock: IO[str], should_stop: Callable[[], bool], why: str, shared: bool = False) -> None:
    """Waits for a file's lock. Raises Interrupted if should_stop() says so meanwhile."""
    waited = False
    while True:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not waited:
                log.info("%s: waiting for it", why)
            waited = True
        if should_stop():
            raise Interrupted(f"stopped while waiting: {why}")
        time.sleep(0.2)
