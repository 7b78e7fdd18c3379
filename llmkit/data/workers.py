"""Units of text -> shard files, in this process and in children of it.

A child is `python -m llmkit.data.workers FOLDER MODULE:CLASS`: it reads one job a line as JSON, and answers each with
a line. So nothing is pickled, the parent's main module is not imported again (it may load torch), no torch is loaded
here, and a child ends when its parent does, whatever ended that: its standard input closes. Torch-free.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from safetensors import safe_open

from llmkit.config import Interrupted, MachineError, UserError
from llmkit.data.config import CleanConfig, DedupConfig
from llmkit.data.dedup import EMPTY, Signatures, SignatureWriter
from llmkit.data.documents import Account, judged_documents, kept_documents
from llmkit.data.filters import Cleaner
from llmkit.data.shards import Shard, ShardWriter
from llmkit.data.sources import Piece

KEPT, HELD_OUT = "kept", "held_out"
_BATCH = 1 << 20  # characters that are encoded at once


class TokenizerLike(Protocol):
    """What is used of a tokenizer here."""

    vocab_size: int
    bos_id: int | None
    eos_id: int

    @property
    def hash(self) -> str: ...
    def normalize(self, text: str) -> str: ...
    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]: ...
    def save(self, folder: Any) -> Any: ...


@dataclass(frozen=True)
class Job(ABC):
    """What is to be done with one unit of a source."""

    folder: str
    """Where the result goes."""
    number: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """About how many bytes are read."""
        return sum(p.size for p in self.pieces)

    @abstractmethod
    def is_done(self, tokenizer: str) -> bool:
        """Whether the result is there and whole; what an earlier run wrote is not read through."""

    @abstractmethod
    def run(self, tokenizer: TokenizerLike) -> None:
        """Does it."""

    def to_json(self) -> str:
        return json.dumps({"job": [type(self).__module__, type(self).__name__], **asdict(self)})

    @staticmethod
    def from_json(text: str) -> Job:
        data = json.loads(text)
        module, name = data.pop("job")
        kind = getattr(importlib.import_module(module), name)
        made = kind(**{**data, "pieces": tuple(Piece(**p) for p in data["pieces"])})
        assert isinstance(made, Job)
        return made


@dataclass(frozen=True)
class TextJob(Job):
    """What is to be done with a unit of plain documents."""

    field: str
    template: str | None
    clean: dict[str, Any] | None
    """The rules of a CleanConfig; None: there are none."""

    @property
    def cleaner(self) -> Cleaner | None:
        return Cleaner(CleanConfig(**self.clean)) if self.clean else None


@dataclass(frozen=True)
class TokenJob(TextJob):
    """A unit's documents as token shards."""

    holdout: Literal["none", "tail", "hash"]
    """What is held out: nothing, the end of every text, or documents by their hash."""
    frac: float
    bos_id: int | None
    """What every document begins with; None: nothing."""
    eos_id: int | None
    """What every document ends with; None: nothing."""
    verdicts: str | None = None
    """A file that says which documents stay; None: the rules say it."""

    @property
    def outputs(self) -> list[Path]:
        """The shard files; the one of the kept text is written last."""
        names = [KEPT] if self.holdout == "none" else [HELD_OUT, KEPT]
        return [Path(self.folder, name, f"{self.number:06d}.tokens") for name in names]

    def is_done(self, tokenizer: str) -> bool:
        try:
            return all(path.exists() and Shard(path).header.tokenizer == tokenizer for path in self.outputs)
        except UserError:
            return False

    def run(self, tokenizer: TokenizerLike) -> None:
        """Reads, cleans, splits and encodes, and writes the shards."""
        writers, texts, account = {}, {}, Account()
        for path in self.outputs:
            writers[path.parent.name] = ShardWriter(path, tokenizer.vocab_size, tokenizer.hash)
            texts[path.parent.name] = list[str]()
        verdicts = None
        if self.verdicts is not None:
            with safe_open(self.verdicts, "np") as f:
                verdicts = f.get_tensor(f"{self.number:06d}").tolist()
        waiting = 0
        for document in kept_documents(self.pieces, self.field, self.template, self.cleaner, verdicts, account):
            document = tokenizer.normalize(document)
            if not document:
                writers[KEPT].n_empty += 1
                continue
            for split, text in split_text(self.holdout, self.frac, document):
                if text:
                    texts[split].append(text)
            waiting += len(document)
            if waiting >= _BATCH:
                waiting = 0
                for split, writer in writers.items():
                    _flush(self, tokenizer, writer, texts[split])
        writers[KEPT].removed = account.removed
        for split, writer in writers.items():
            _flush(self, tokenizer, writer, texts[split])
            writer.close()


@dataclass(frozen=True)
class SignatureJob(TextJob):
    """A unit's documents as signatures, by which copies are found."""

    dedup: dict[str, Any]
    """A DedupConfig."""

    @property
    def output(self) -> Path:
        return Path(self.folder, f"{self.number:06d}.signatures")

    def is_done(self, tokenizer: str) -> bool:
        try:
            return self.output.exists() and Signatures(self.output).n_documents >= 0
        except UserError:
            return False

    def run(self, tokenizer: TokenizerLike) -> None:
        """Reads and cleans, and writes the signatures. They don't depend on the tokenizer."""
        writer = SignatureWriter(self.output, DedupConfig(**self.dedup))
        for document in judged_documents(self.pieces, self.field, self.template, self.cleaner):
            if document.verdict or not document.text:
                writer.skip(document.verdict or EMPTY)
            else:
                writer.add(document.text)
        writer.close()


# --- one unit -------------------------------------------------------------------------------------------------------


def is_held_out(text: str, frac: float) -> bool:
    """Chooses by the text alone, so that copies of a document never lie on both sides of a split."""
    number = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
    return number < int(frac * 2**64)


def split_text(holdout: str, frac: float, text: str) -> Iterator[tuple[str, str]]:
    """A normalised document's parts and which split each belongs to (see `Job`)."""
    if holdout == "tail":
        cut = int(len(text) * (1 - frac))
        yield KEPT, text[:cut]
        yield HELD_OUT, text[cut:]
    else:
        held_out = holdout == "hash" and is_held_out(text, frac)
        yield HELD_OUT if held_out else KEPT, text


def _flush(job: TokenJob, tokenizer: TokenizerLike, writer: ShardWriter, texts: list[str]) -> None:
    """Encodes documents and appends them, each between its bos and eos."""
    encoded = tokenizer.encode_batch(texts)
    n_extra = (job.bos_id is not None) + (job.eos_id is not None)
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded)) + n_extra
    starts = np.cumsum(lengths) - lengths
    tokens = np.empty(int(lengths.sum()), np.int64)
    is_text = np.ones(len(tokens), bool)
    if job.bos_id is not None:
        tokens[starts] = job.bos_id
        is_text[starts] = False
    if job.eos_id is not None:
        tokens[starts + lengths - 1] = job.eos_id
        is_text[starts + lengths - 1] = False
    tokens[is_text] = np.concatenate([np.empty(0, np.int64), *encoded])
    n_bytes = sum(len(t) if t.isascii() else len(t.encode()) for t in texts)
    writer.add(tokens, lengths.tolist(), n_bytes)
    texts.clear()


def run_job(job: Job, tokenizer: TokenizerLike) -> None:
    """Does one job."""
    job.run(tokenizer)


# --- many units -----------------------------------------------------------------------------------------------------


def n_cores() -> int:
    """How many processes can compute at once here."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    jobs: Sequence[Job],
    tokenizer: TokenizerLike,
    folder: Path | None,
    n_processes: int,
    should_stop: Callable[[], bool],
    on_done: Callable[[Job], None],
) -> None:
    """Runs jobs here and in n_processes - 1 children; this process works too, so that it doesn't wait for their start.

    Args:
        folder: where the tokenizer is saved, for the children to load; needed with more than one process.
        should_stop: asked between units.
        on_done: called in this thread after each unit.

    Raises:
        Interrupted: should_stop() said so.
        UserError: a file is not what it should be.
        MachineError: a child was killed, or a disk is full.
    """
    pending, answers = deque(jobs), queue.Queue[Job | BaseException]()
    children = [_Child(folder, tokenizer, pending, answers) for _ in range(min(n_processes, len(jobs)) - 1)]
    try:
        left = len(jobs)
        while left:
            if should_stop():
                raise Interrupted("stopped while text was being prepared; run again to go on")
            job = _next(pending)
            if job:
                run_job(job, tokenizer)
                answers.put(job)
            try:
                while left:
                    answer = answers.get(timeout=0.1)
                    if isinstance(answer, BaseException):
                        raise answer
                    left -= 1
                    on_done(answer)
                    if pending and answers.empty():
                        break
            except queue.Empty:
                pass
    finally:
        pending.clear()
        for child in children:
            child.stop()


def _next(pending: deque[Job]) -> Job | None:
    try:
        return pending.popleft()
    except IndexError:  # none is left to begin
        return None


class _Child:
    """A child process and the thread that hands it jobs."""

    def __init__(self, folder: Path | None, tokenizer: TokenizerLike, pending: deque[Job], answers: queue.Queue[Any]):
        kind = type(tokenizer)
        command = [sys.executable, "-m", __name__, str(folder), f"{kind.__module__}:{kind.__qualname__}"]
        paths = os.pathsep.join(p or os.getcwd() for p in sys.path)
        threads = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths, **threads},
        )
        self._thread = threading.Thread(target=self._drive, args=(pending, answers), daemon=True)
        self._thread.start()

    def _drive(self, pending: deque[Job], answers: queue.Queue[Any]) -> None:
        requests, replies = self._process.stdin, self._process.stdout
        assert requests and replies
        while job := _next(pending):
            try:
                requests.write(job.to_json().encode() + b"\n")
                requests.flush()
                line = replies.readline()
            except (OSError, ValueError):  # the child is gone, or the pipe was closed by `stop`
                line = b""
            if not line:
                answers.put(MachineError(self._epitaph(job)))
                return
            kind, text = json.loads(line)
            if kind != "done":
                answers.put({"user": UserError, "machine": MachineError, "fault": RuntimeError}[kind](text))
                return
            answers.put(job)

    def _epitaph(self, job: Job) -> str:
        code = self._process.wait()
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
        why = ", often for want of memory" if code == -signal.SIGKILL else ""
        return (
            f"a process that prepares data {how}{why}, at {job.pieces[0].path}: "
            f"run again to go on, or set data.workers lower"
        )

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            with contextlib.suppress(OSError):  # a request that the child never read
                pipe.close()


def _answer(text: str, tokenizer: TokenizerLike) -> tuple[str, str]:
    try:
        run_job(Job.from_json(text), tokenizer)
        return "done", ""
    except UserError as e:
        return "user", str(e)
    except (MachineError, OSError, MemoryError) as e:
        return "machine", str(e) or type(e).__name__
    except Exception:
        return "fault", traceback.format_exc()


def main(folder: str, name: str) -> None:
    """A child's life. Signals are the parent's business: a terminal or a scheduler sends them to the whole group."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not end up among the replies
    module, _, qualname = name.partition(":")
    tokenizer = getattr(importlib.import_module(module), qualname).load(folder)
    for line in sys.stdin.buffer:
        replies.write(json.dumps(_answer(line.decode(), tokenizer)) + "\n")
        replies.flush()


if __name__ == "__main__":
    # Under its own name, which is what the modules of other jobs import.
    importlib.import_module("llmkit.data.workers").main(*sys.argv[1:])
