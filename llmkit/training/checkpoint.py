"""Saving and loading of a run's state, on `storage`'s folders.

A save first copies every tensor into buffers that live as long as the run (the only time training waits for), then
writes the files, in a thread if asked. At most one save is under way; an error in the thread is raised by the next call
here. Where a model is spread over processes each writes files of its own into one folder, and process 0 commits it.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkit.config import MachineError
from llmkit.model.weights import read_tensors
from llmkit.storage import Draft, machine_errors, retain, step_name, to_json, why
from llmkit.training.team import Team

MAX_SHARD_BYTES = 5_000_000_000
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
Tensors = dict[str, Tensor]


def safetensors_chunks(tensors: Tensors) -> Iterator[bytes | memoryview]:
    """A safetensors file, piece by piece: no second copy in memory, and every write passes through `storage`.

    Tensors lie on the CPU.
    """
    return safetensors_stream(tensors, tensors.values())


def safetensors_stream(like: Tensors, tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    """The same of tensors that are made one at a time, with names, shapes and dtypes as in `like`, in its order.

    Format: https://github.com/huggingface/safetensors#format.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, t in like.items():
        start, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for t in tensors:
        yield t.contiguous().reshape(-1).view(torch.uint8).numpy().data if t.numel() else b""


def shard(file: str, tensors: Tensors, limit: int = MAX_SHARD_BYTES) -> dict[str, Tensors]:
    """Splits a model's tensors over files of at most `limit` bytes, named as Hugging Face does."""
    bins: list[Tensors] = [{}]
    filled = 0
    for name, t in tensors.items():
        size = t.numel() * t.element_size()
        if bins[-1] and filled + size > limit:
            bins.append({})
            filled = 0
        bins[-1][name] = t
        filled += size
    if len(bins) == 1:
        return {file: tensors}
    stem = file.removesuffix(".safetensors")
    return {f"{stem}-{i:05d}-of-{len(bins):05d}.safetensors": b for i, b in enumerate(bins, 1)}


def index_of(shards: dict[str, Tensors]) -> bytes:
    """`model.safetensors.index.json` of a model in several files."""
    total = sum(t.numel() * t.element_size() for tensors in shards.values() for t in tensors.values())
    names = {name: file for file, tensors in shards.items() for name in tensors}
    return to_json({"metadata": {"total_size": total}, "weight_map": names}).encode()


def whole_name(file: str) -> str:
    """The file of which this may be one part of several."""
    return re.sub(r"-\d{5,}-of-\d{5,}\.safetensors$", ".safetensors", file)


class Checkpointer:
    """Writes a run's checkpoints. Where every process has the whole model, only that of process 0 does."""

    def __init__(
        self,
        run: Path,
        keep: int,
        asynchronous: bool,
        before_commit: Callable[[], None] = lambda: None,
        team: Team | None = None,
    ):
        """
        Args:
            run: the run's folder.
            keep: the newest checkpoints that stay; the best stays too if `save` names it.
            asynchronous: write in a thread.
            before_commit: called when the files are written: syncs the logs, so that no checkpoint is ahead of them.
            team: the processes that write one checkpoint together; None: this one alone.
        """
        self.run, self.keep, self.asynchronous, self.before_commit = run, keep, asynchronous, before_commit
        self.team = team
        self._buffers: dict[str, Tensors] = {}
        self._thread: threading.Thread | None = None
        self._reserving: threading.Thread | None = None
        self._error: BaseException | None = None

    def reserve(self, tensors: dict[str, Tensors]) -> None:
        """Allocates the buffers in a thread, so that the first save doesn't wait for fresh pages either."""

        def allocate() -> None:
            for file, source in tensors.items():
                pinned = any(t.device.type == "cuda" for t in source.values())
                self._buffers[file] = {
                    name: torch.zeros(t.shape, dtype=t.dtype, pin_memory=pinned) for name, t in source.items()
                }

        self._reserving = threading.Thread(target=allocate, name="reserve")
        self._reserving.start()

    def poll(self) -> None:
        """Raises what a save in the background died of, if it did."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Waits for the save under way; raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()

    def save(
        self, step: int, tensors: dict[str, Tensors], blobs: dict[str, bytes], facts: dict[str, Any],
        keep_also: Collection[int] = (), wait: bool = False, n_bytes: int = 0,
    ) -> None:  # fmt: skip
        """Saves one checkpoint.

        Args:
            step: names the folder.
            tensors: file name -> tensors, on any device; copied before this returns. In a team: this process's files,
                copies that nobody else changes.
            blobs: file name -> content of the small files.
            facts: goes into the manifest.
            keep_also: steps whose checkpoints are kept whatever their age.
            wait: returns only when the checkpoint is on disk.
            n_bytes: of the tensors of all, in a team.

        Raises:
            MachineError: no space, or a file operation failed. Older checkpoints are untouched, nothing is left over.
        """
        self.wait()
        if self.team is None:
            self._snapshot(tensors)
            write = functools.partial(self._write, step, blobs, facts, keep_also)
        else:
            n_bytes += sum(len(b) for b in blobs.values()) + (1 << 16)
            write = functools.partial(self._write_together, step, tensors, blobs, facts, keep_also, n_bytes)
        if self.asynchronous and not wait:
            self._thread = threading.Thread(target=self._write_safely, args=(write,), name="save")
            self._thread.start()
        else:
            write()

    @property
    def failed(self) -> bool:
        """Whether a save in the background has died: `wait` raises what of."""
        return self._error is not None

    def give_up(self) -> None:
        """Tells the save under way that other processes may be gone: it waits for them for some seconds only."""
        if self.team is not None:
            self.team.give_up()

    @torch.no_grad()
    def _snapshot(self, tensors: dict[str, Tensors]) -> None:
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        self._buffers = {file: self._buffers.get(file, {}) for file in tensors}
        for file, source in tensors.items():
            buffers = self._buffers[file] = {n: b for n, b in self._buffers[file].items() if n in source}
            for name, t in source.items():
                if name not in buffers or buffers[name].shape != t.shape or buffers[name].dtype != t.dtype:
                    buffers[name] = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.device.type == "cuda")
                buffers[name].copy_(t, non_blocking=True)
        if any(t.device.type == "cuda" for source in tensors.values() for t in source.values()):
            torch.cuda.synchronize()

    def _write_safely(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as e:  # handed to the training thread, which raises it
            self._error = e

    def _write(self, step: int, blobs: dict[str, bytes], facts: dict[str, Any], keep_also: Collection[int]) -> None:
        files: dict[str, Tensors] = {}
        for file, tensors in self._buffers.items():
            shards = shard(file, tensors) if file.rpartition("/")[2] == "model.safetensors" else {file: tensors}
            if len(shards) > 1:
                names = {name.rpartition("/")[2]: part for name, part in shards.items()}
                blobs = {**blobs, f"{file}.index.json": index_of(names)}
            files |= shards
        size = sum(len(b) for b in blobs.values()) + (1 << 16)
        size += sum(t.numel() * t.element_size() for tensors in files.values() for t in tensors.values())
        final = self.run / "checkpoints" / step_name(step)
        draft: Draft | None = None
        try:
            draft = Draft(final, size)
            for file, tensors in files.items():
                draft.write(file, safetensors_chunks(tensors))
            for file, content in blobs.items():
                draft.write(file, [content])
            self.before_commit()
            draft.commit({**facts, "step": step})
        except OSError as e:
            if draft is not None:
                draft.discard()
            raise self._told(e, step, size) from e
        except MachineError:
            if draft is not None:
                draft.discard()
            raise
        with machine_errors(final.parent):
            retain(self.run, self.keep, keep_also)

    def _told(self, error: OSError, step: int, size: int) -> MachineError:
        at = error.filename or self.run / "checkpoints" / step_name(step)
        reason = why(error, self.run)
        return MachineError(f"{at}: the checkpoint of step {step} ({size:,} bytes) could not be written: {reason}")

    def _write_together(
        self, step: int, files: dict[str, Tensors], blobs: dict[str, bytes], facts: dict[str, Any],
        keep_also: Collection[int], n_bytes: int,
    ) -> None:  # fmt: skip
        """This process's part of a checkpoint. It is there for all or for none: process 0 commits when it has heard of all
        files of the others, and discards everything if one of them failed."""
        assert self.team is not None
        final = self.run / "checkpoints" / step_name(step)

        def begin(name: str | None) -> Draft:
            return Draft(final, n_bytes) if name is None else Draft.joined(final, name)

        def fill(draft: Draft) -> None:
            for file, tensors in files.items():
                draft.write(file, safetensors_chunks(tensors))
            for file, content in blobs.items():
                draft.write(file, [content])

        def commit(draft: Draft) -> None:
            self.before_commit()
            draft.commit({**facts, "step": step})

        self.team.write(begin, fill, commit, lambda e: self._told(e, step, n_bytes))
        if self.team.is_main:
            with machine_errors(final.parent):
                retain(self.run, self.keep, keep_also)


def non_finite(tensors: dict[str, Tensors]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity."""
    floats = {f"{file}: {n}": t for file, named in tensors.items() for n, t in named.items() if t.is_floating_point()}
    # A sum takes half the time of a copy; it is not finite if a number isn't, or if it overflows: then look closer.
    sums = torch.stack([t.sum().float() for t in floats.values()]).isfinite().tolist() if floats else []
    return [name for (name, t), good in zip(floats.items(), sums, strict=True) if not good and not t.isfinite().all()]


def load(folder: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """A verified checkpoint's tensors by file (a sharded model as one), and its state.json."""
    tensors: dict[str, Tensors] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        name = file.relative_to(folder).as_posix()
        tensors.setdefault(whole_name(name), {}).update(read_tensors(file))
    return tensors, json.loads((folder / "trainer_state" / "state.json").read_bytes())
