"""A file of JSON lines that grows prompt by prompt and goes on where it stopped: what `rank` and `sample` write.

`FILE` holds the rows, each with the number of its prompt (`prompt_row`), and nothing else, so that any tool reads it.
`FILE.notes` holds, a line each, the settings, then what became of every prompt, also of those that gave no row. A prompt
counts as done when its note is on disk; rows without one are taken out at the next start and made again. Where several
people judge the same prompts, rows and notes also hold whose they are (`annotator`), and each does a prompt once.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkit import storage
from llmkit.config import UserError, flatten

ROW, BY = "prompt_row", "annotator"
Record = dict[str, Any]
Key = int | tuple[int, str]
"""A prompt's number; with whose judgement it is, where there are several people."""


def _bytes_of(records: Sequence[Record]) -> bytes:
    return b"".join(json.dumps(r, ensure_ascii=False, allow_nan=False).encode() + b"\n" for r in records)


class Ledger:
    """The rows of one command, appended; a context manager that holds the files for this process alone."""

    def __init__(self, out: Path, settings: Record):
        """Opens both files, or goes on with them.

        Args:
            out: the rows' file.
            settings: all that the rows depend on, JSON. A file that was begun with others is refused.

        Raises:
            UserError: for other settings, a file that isn't this command's, or one that another process writes.
        """
        self.out, self.notes = out, out.with_name(out.name + ".notes")
        if out.exists() and not self.notes.exists():
            raise UserError(f"{out}: exists, and {self.notes.name} does not: choose another --out, or remove it")
        storage.disk.mkdir(out.parent)
        self._files = [path.open("ab", buffering=0) for path in (self.out, self.notes)]
        try:
            fcntl.flock(self._files[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise UserError(f"{out}: another process is writing it: wait for it, or choose another --out") from None
        try:
            self._resume(json.loads(json.dumps(settings)))
        except BaseException:
            self.close()
            raise

    def _resume(self, settings: Record) -> None:
        _cut(self.notes, _whole_lines(self.notes))
        lines = read_rows(self.notes)
        if not lines:
            self._append(1, [{"settings": settings}])
            storage.sync_folder(self.out.parent)
        elif lines[0].get("settings") != settings:
            old, new = flatten(lines[0].get("settings", {})), flatten(settings)
            keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            changed = "".join(f"\n  {key}: {_brief(old.get(key))} -> {_brief(new.get(key))}" for key in keys)
            raise UserError(
                f"{self.out}: was begun with other settings:{changed}\nput them back, or choose another --out"
            )
        self.done: dict[Key, Record] = {}
        """What was noted of each prompt, in the order in which they were done."""
        self.remarks: list[Record] = []
        """The notes that are about no prompt."""
        for line in lines[1:]:
            if line.get("undone"):
                self.done.pop(_key(line), None)
            elif ROW in line:
                self.done[_key(line)] = line
            else:
                self.remarks.append(line)
        self._cut_rows()

    def _append(self, file: int, records: Sequence[Record]) -> None:
        fd = self._files[file].fileno()
        storage.write_all(fd, memoryview(_bytes_of(records)))
        storage.disk.sync(fd)

    def _cut_rows(self) -> None:
        """Cuts a torn last line, and takes out the rows whose prompt isn't done; lines that aren't ours stay."""
        whole = _whole_lines(self.out)
        with self.out.open("rb") as f:
            lines = f.read(whole).splitlines(keepends=True)
        kept = [line for line in lines if (key := _key_of(line)) is None or key in self.done]
        if kept == lines[: len(kept)]:
            _cut(self.out, sum(map(len, kept)))
        else:
            storage.replace_file(self.out, b"".join(kept))
            self._files[0].close()
            self._files[0] = self.out.open("ab", buffering=0)

    def add(self, number: int, rows: Sequence[Record], note: Record | None = None, by: str | None = None) -> None:
        """Notes a prompt as done (`by` somebody), with the rows it gave, which may be none."""
        place = {ROW: number} if by is None else {ROW: number, BY: by}
        if rows:
            self._append(0, [{**row, **place} for row in rows])
        told = {**place, **(note or {})}
        self._append(1, [told])
        self.done[_key(told)] = told

    def take_back(self, by: str | None = None) -> tuple[int, Record] | None:
        """Undoes the last prompt, or the last of somebody's: its number and note, or None if there is none."""
        key = next((key for key in reversed(self.done) if by is None or self.done[key].get(BY) == by), None)
        if key is None:
            return None
        note = self.done.pop(key)
        self._append(1, [{k: note[k] for k in (ROW, BY) if k in note} | {"undone": True}])
        self._cut_rows()
        return note[ROW], note

    def tell(self, record: Record) -> None:
        """Adds a line to the notes that is about no prompt, such as a summary."""
        self._append(1, [record])
        self.remarks.append(record)

    def rows(self) -> list[Record]:
        """All rows so far."""
        return read_rows(self.out)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _key(record: Record) -> Key:
    return (record[ROW], record[BY]) if BY in record else record[ROW]


def _key_of(line: bytes) -> Key | None:
    """Whose row of which prompt it is; None for a line that isn't ours."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return _key(row) if isinstance(row, dict) and type(row.get(ROW)) is int else None


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of the last line that has one."""
    return path.read_bytes().rfind(b"\n") + 1


def _cut(path: Path, length: int) -> None:
    if path.stat().st_size > length:
        os.truncate(path, length)


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_rows(path: Path) -> list[Record]:
    """The rows of a JSON-lines file; UserError naming file and line for one that is none."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as e:
            raise UserError(f"{path}:{number}: not JSON: {e}") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: not a JSON object")
        found.append(record)
    return found
