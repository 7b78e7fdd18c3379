"""Checkpoint folders on disk: written whole or not at all, checked before they are trusted. Files only, no torch.

A folder is built under a temporary name, every file is synced, `manifest.json` (each file's size and SHA-256, and a
hash of the manifest itself) is written last, and one rename makes it visible. So a reader that finds a folder whose
manifest holds has found a complete one, whatever was killed, and whenever. `newest_good` is the only way in: it scans,
newest first.

All file operations go through `disk`, which the tests replace by one that fails or dies at the n-th operation.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.config import MachineError, UserError

MANIFEST = "manifest.json"
FORMAT = 1
_STEP = re.compile(r"step-(\d{8,})")
_PIECE = 16 << 20  # bytes per write: small enough that a full disk or a signal is noticed soon


class Disk:
    """The operating system's file operations, one method each."""

    def create(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)

    def write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def sync(self, fd: int) -> None:
        os.fsync(fd)

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def mkdir(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def remove_tree(self, path: Path) -> None:
        shutil.rmtree(path)

    def free(self, path: Path) -> int:
        return shutil.disk_usage(path).free


disk = Disk()
_OF_THE_MACHINE = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES", "EPERM", "EFBIG", "EMFILE", "ENFILE", "ESTALE")
    if hasattr(errno, name)
}


class Damaged(Exception):
    """A folder or file is not what its manifest says."""


@dataclass(frozen=True)
class FileRecord:
    """What the manifest keeps of one file."""

    size: int
    sha256: str


def why(error: OSError, folder: Path) -> str:
    """What the system said, and for a full disk how much is free."""
    text = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            text += f" ({disk.free(folder):,} bytes are free)"
    return text


@contextlib.contextmanager
def machine_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk, a read-only folder and the like into one sentence; other errors pass."""
    try:
        yield
    except OSError as e:
        if e.errno not in _OF_THE_MACHINE:
            raise
        raise MachineError(f"{e.filename or folder}: {why(e, folder)}") from e


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the path to errors that don't name one: those of writes and syncs, which know a number only."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or str(path)
        raise


# --- single files ---------------------------------------------------------------------------------------------------


def write_all(fd: int, data: memoryview) -> None:
    """Writes everything: the system may take a part only, as it does when a disk fills up."""
    while len(data):
        data = data[disk.write(fd, data) :]


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Writes and syncs one file, hashing on the way. The folder entry is not synced: see `sync_folder`."""
    digest, size = hashlib.sha256(), 0
    with _naming(path):
        fd = disk.create(path)
        try:
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                for start in range(0, len(view), _PIECE):
                    piece = view[start : start + _PIECE]
                    digest.update(piece)
                    size += len(piece)
                    write_all(fd, piece)
            disk.sync(fd)
        finally:
            os.close(fd)
    return FileRecord(size, digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """Makes created, renamed and deleted names in a folder survive a power cut."""
    with _naming(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            disk.sync(fd)
        finally:
            os.close(fd)


def replace_file(path: Path, data: bytes | str) -> None:
    """Writes a file so that readers see the old content or the new one, never a part."""
    data = data.encode() if isinstance(data, str) else data
    disk.mkdir(path.parent)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        write_file(temporary, [data])
        disk.rename(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            disk.unlink(temporary)
        raise
    sync_folder(path.parent)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb", buffering=0) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def to_json(value: Any) -> str:
    """JSON as it is kept on disk: readable, in a fixed order, no NaN."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


# --- the manifest ---------------------------------------------------------------------------------------------------


def _seal(body: dict[str, Any]) -> bytes:
    """The manifest's bytes: its content, and last the hash of every byte before that."""
    text = to_json(body).rstrip("\n").removesuffix("}").rstrip("\n").encode()
    return text + b',\n "sha256": "' + hashlib.sha256(text).hexdigest().encode() + b'"\n}\n'


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked manifest of a folder. Raises Damaged if it is missing or altered."""
    try:
        raw = (folder / MANIFEST).read_bytes()
    except OSError as e:
        raise Damaged(f"{MANIFEST}: {e.strerror}: the folder was not finished") from None
    text, mark, _ = raw.rpartition(b',\n "sha256": "')
    if not mark or text + mark + hashlib.sha256(text).hexdigest().encode() + b'"\n}\n' != raw:
        raise Damaged(f"{MANIFEST}: its own hash does not hold")
    manifest: dict[str, Any] = json.loads(raw)
    if manifest.get("format") != FORMAT:
        raise Damaged(f"{MANIFEST}: format {manifest.get('format')!r}: this version reads {FORMAT}")
    return manifest


def _files_in(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = name.startswith(".") or "/." in name  # a file manager's, a hub client's
        if (path.is_file() or path.is_symlink()) and not hidden and name != MANIFEST:
            yield name


def verify(folder: Path, hashes: bool = True) -> dict[str, Any]:
    """Checks a folder against its manifest and returns the manifest.

    Args:
        folder: the checkpoint.
        hashes: False compares names and sizes only.

    Raises:
        Damaged: naming the first file that is missing, extra, of another size or of another hash.
    """
    manifest = read_manifest(folder)
    if step_of(folder) not in (-1, manifest.get("step")):
        raise Damaged(f"{MANIFEST}: of step {manifest.get('step')}: the folder was renamed")
    files = manifest["files"]
    present = set(_files_in(folder))
    if odd := sorted(set(files) ^ present):
        raise Damaged(f"{odd[0]}: {'missing' if odd[0] in files else 'not named in the manifest'}")
    for name, record in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as e:
            raise Damaged(f"{name}: cannot be read: {e.strerror}") from None
        if size != record["size"]:
            raise Damaged(f"{name}: {size} bytes, the manifest says {record['size']}")
    for name, record in files.items() if hashes else ():
        try:
            if sha256_of(folder / name) != record["sha256"]:
                raise Damaged(f"{name}: its SHA-256 is not the manifest's")
        except OSError as e:
            raise Damaged(f"{name}: cannot be read: {e.strerror}") from None
    return manifest


# --- folders of a run ------------------------------------------------------------------------------------------------


class Draft:
    """A checkpoint folder in the making: `write` its files, then `commit` it. Used by one thread."""

    def __init__(self, final: Path, needed: int):
        """Creates the temporary folder.

        Args:
            final: the folder's name once it is committed.
            needed: bytes that will be written; too little free space raises MachineError before anything is.
        """
        self.final = final
        self.folder = final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex[:8]}")
        self.files: dict[str, FileRecord] = {}
        disk.mkdir(final.parent)
        require_free(final.parent, needed)
        disk.mkdir(self.folder)

    @classmethod
    def joined(cls, final: Path, name: str) -> Draft:
        """The draft that another process has begun in a folder of this name, for files of this one's; the other commits."""
        draft = cls.__new__(cls)
        draft.final, draft.folder, draft.files = final, final.with_name(name), {}
        return draft

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        path = self.folder / name
        if path.parent != self.folder:
            disk.mkdir(path.parent)
        self.files[name] = write_file(path, chunks)

    def commit(self, facts: dict[str, Any]) -> None:
        """Writes the manifest (with `facts` in it) and makes the folder visible under its final name."""
        for folder in {(self.folder / name).parent for name in self.files} - {self.folder}:
            sync_folder(folder)
        files = {n: {"size": r.size, "sha256": r.sha256} for n, r in sorted(self.files.items())}
        write_file(self.folder / MANIFEST, [_seal({**facts, "format": FORMAT, "files": files})])
        sync_folder(self.folder)
        if self.final.exists():  # a damaged folder of the same step that was passed over on resume
            trash(self.final)
        disk.rename(self.folder, self.final)
        sync_folder(self.final.parent)

    def discard(self) -> None:
        """Removes what was written. Never raises: it runs while another error is on its way."""
        with contextlib.suppress(OSError):
            disk.remove_tree(self.folder)


def require_free(folder: Path, needed: int) -> None:
    """Raises MachineError, naming both figures, if `needed` bytes would not fit."""
    free = disk.free(folder)
    if free < needed:
        raise MachineError(
            f"{folder}: {needed / 1e6:.1f} MB are needed for a checkpoint but {free / 1e6:.1f} MB are free: "
            "free some space or set `out` elsewhere; the same command then goes on"
        )


def trash(folder: Path) -> None:
    """Deletes a folder by renaming it first, so that a half-deleted checkpoint never carries a checkpoint's name."""
    gone = folder.with_name(f".trash-{folder.name}-{uuid.uuid4().hex[:8]}")
    disk.rename(folder, gone)
    sync_folder(folder.parent)
    disk.remove_tree(gone)


def set_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint, so that it is neither counted among those to keep nor looked at again.

    It isn't deleted: someone may want to know what happened to it, or a newer version may read it.
    """
    aside = folder.with_name(f"damaged-{folder.name}-{uuid.uuid4().hex[:8]}")
    disk.rename(folder, aside)
    sync_folder(folder.parent)
    return aside


def sweep(run: Path) -> None:
    """Removes what killed saves, deletions and replacements left behind. For the process that holds the run's lock."""
    for path in sorted((run / "checkpoints").glob("*")):
        if path.name.startswith(".trash-") or re.fullmatch(_STEP.pattern + r"\.tmp-[0-9a-f]+", path.name):
            disk.remove_tree(path)
    for path in sorted([*run.glob(".*.tmp-*"), *run.glob("*/.*.tmp-*")]):
        if re.fullmatch(r"\..+\.tmp-[0-9a-f]{8}", path.name):
            disk.unlink(path)


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name, -1 for other names."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else -1


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first, unchecked."""
    folder = run / "checkpoints"
    names = [p for p in folder.iterdir() if step_of(p) >= 0 and p.is_dir()] if folder.is_dir() else []
    return sorted(names, key=step_of, reverse=True)


def newest_good(run: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that holds, and each newer one that was passed over with a sentence that says why."""
    passed_over: dict[Path, str] = {}
    for folder in checkpoints_of(run):
        try:
            verify(folder)
            return folder, passed_over
        except Damaged as e:
            passed_over[folder] = f"{folder} was passed over: {e}"
    return None, passed_over


def retain(run: Path, keep: int, also: Collection[int]) -> None:
    """Deletes old checkpoints but the newest `keep` whose sizes hold and those of the steps in `also`."""
    good = 0
    for folder in checkpoints_of(run):
        if good < keep:
            with contextlib.suppress(Damaged):
                verify(folder, hashes=False)
                good += 1
        elif step_of(folder) not in also:
            trash(folder)


def resolve_model(path: str | Path) -> Path:
    """The model folder meant by a run (its newest good checkpoint), a checkpoint, a Hugging Face folder or a hub name.

    Raises:
        UserError: if there is none, or a checkpoint of ours is damaged.
    """
    name, path = str(path), Path(path)
    if (path / MANIFEST).is_file():
        try:
            verify(path)
        except Damaged as e:
            raise UserError(f"{path}: damaged checkpoint: {e}") from None
        return path
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return path
    if (path / "checkpoints").is_dir():
        good, passed_over = newest_good(path)
        if good is not None:
            return good
        raise UserError("; ".join([f"{path}: the run has no good checkpoint", *passed_over.values()]))
    if path.is_dir():
        raise UserError(
            f"{path}: holds neither config.json nor checkpoints/: give a run, a checkpoint or a Hugging Face folder"
        )
    # A path into a folder that exists is a mistyped path: no use in asking the hub for it.
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not path.parent.is_dir():
        return _from_hub(name)
    raise UserError(f"{path}: no such folder: give a run, a checkpoint, a Hugging Face folder or a hub name")


# Weights as safetensors, configurations and tokenizers: nothing that could be code, or a pickle.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]


def _from_hub(name: str) -> Path:
    """A hub model's folder in the hub's own cache, downloaded if it isn't there."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as e:  # its classes are many, and the network's come through
        reason = str(e).strip().split("\n")[0] or type(e).__name__
        raise UserError(f"{name}: no such folder, nor can it be loaded from the hub: {reason}") from None


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Holds the run's folder for this process; a second one is refused rather than let both write."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("a+") as f:
        for attempt in range(20):
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as e:
                if e.errno not in (errno.EAGAIN, errno.EACCES):
                    break  # a file system without locks: nothing to hold
                if attempt == 19:  # a killed run's lock goes with it, but its last threads may take a moment to
                    raise UserError(f"{run}: another process is training here: wait for it, or set `out`") from None
                time.sleep(0.1)
        yield
