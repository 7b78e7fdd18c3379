"""Where a task's questions and examples come from: files of one's own or the hub. Torch-free."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from llmkit.config import UserError
from llmkit.data.config import SourceConfig
from llmkit.data.sources import KINDS, Piece, files_of, units_of, where, whole_records
from llmkit.evaluation.tasks import TASKS, Item, Record, Task, own_task

_SPLIT = re.compile(r"(?:^|[^a-z])(test|dev|validation|valid|val|train)(?:[^a-z]|$)", re.IGNORECASE)
_MAX_EXAMPLES = 2000  # rows of a training split that are looked at
_SAME = {"valid": "validation", "val": "validation"}


@dataclass(frozen=True)
class Questions:
    """A task with its items."""

    task: Task
    items: list[Item]
    examples: list[Item]
    """May be shown before a question: of the same group where there are any."""
    source: str
    """File, folder or hub data set."""

    def examples_for(self, item: Item) -> tuple[tuple[str, str], ...]:
        """The first examples of the item's group, or of all where its group has none; never the item itself."""
        same = [e for e in self.examples if e.group == item.group] or self.examples
        return tuple((e.question, e.answer) for e in same if e.question != item.question)[: self.task.n_shots]


def read_task(name: str, data: Path | None, limit: int | None = None, n_shots: int | None = None) -> Questions:
    """The questions of a task, from below `data` or, if that is None, from the hub.

    Args:
        name: one of TASKS; with `data` also that of a file of one's own.
        data: a folder with `<name>.jsonl` (or .json, .csv, .parquet ...) or a folder `<name>`. Files whose name tells a split
            (`test-00000.parquet`, `dev.jsonl`) are questions or examples by it; others are questions.
        limit: only so many questions, taken at equal distances from all.
        n_shots: examples to a question; None: the task's own number, where there are any.

    Raises:
        UserError: there is no such task or file, a row does not hold what it should, or examples are asked for and missing.
    """
    if data is None and name not in TASKS:
        raise UserError(
            f"eval: --tasks {name}: no such task: {', '.join(TASKS)}; --data DIR reads others from DIR/{name}.jsonl"
        )
    task, rows, examples, source = _hub(TASKS[name]) if data is None else local_rows(name, data)
    items = _items(task, rows)
    if not items:
        raise UserError(f"{source}: there are no questions in it")
    if limit is not None and limit < len(items):
        items = [items[k * len(items) // limit] for k in range(limit)]
    shown = (
        _items(task, itertools.islice(examples, _MAX_EXAMPLES)) if n_shots or (n_shots is None and task.n_shots) else []
    )
    if n_shots and not shown:
        where_from = f"{source}/{task.shots_split or 'dev'}.jsonl" if data is not None else "another --data"
        raise UserError(
            f"eval: --shots {n_shots}: {source} has no examples for {name}: give {where_from}, or --shots 0"
        )
    return Questions(replace(task, n_shots=task.n_shots if n_shots is None else n_shots), items, shown, source)


Rows = Iterator[tuple[Callable[[], str], str, Record]]
"""Where a row stands, the group that its file tells, and the row."""


def _items(task: Task, rows: Rows) -> list[Item]:
    found = []
    for place, group, row in rows:
        try:
            item = task.read(row)
        except UserError as e:
            raise UserError(f"{place()}: task {task.name}: {e}") from None
        found.append(item if item.group else replace(item, group=group))
    return found


# --- files -----------------------------------------------------------------------------------------------------------


def local_rows(name: str, data: Path) -> tuple[Task, Rows, Rows, str]:
    """A task, the rows to ask and those to show as they are in its files, and where these lie. Raises UserError."""
    path = _path_of(name, data)
    files = files_of(SourceConfig(path=str(path)))
    splits = {file.path: _split_of(Path(file.path), path) for file in files}
    task = TASKS.get(name)
    if task is None:
        first = next((row for file in files for piece in _pieces(file.path) for _, row in whole_records(piece)), None)
        if first is None:
            raise UserError(f"{path}: there are no rows in it")
        task = replace(own_task(name, first), split="test", shots_split="dev")
    wanted, shown = _same(task.split), _same(task.shots_split or "")
    known = {split for split in splits.values() if split}
    if wanted not in known:
        # No file is called by the hub's split, so what lies there besides examples is what to ask.
        wanted = next((s for s in ("test", "validation", "train", "dev") if s in known - {shown}), "")
    asked = [p for p, split in splits.items() if split == wanted or (split == "" and wanted not in known)]
    asked = asked or [p for p, split in splits.items() if split != shown] or list(splits)
    examples = [p for p, split in splits.items() if split == shown and p not in asked] if shown else []
    return task, _rows(asked, path), _rows(examples, path), str(path)


def _path_of(name: str, data: Path) -> Path:
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise UserError(f"eval: --tasks {name}: no name of a task")
    if not data.is_dir():
        raise UserError(f"eval: --data {data}: no such folder")
    if (data / name).is_dir():
        return data / name
    found = [data / f"{name}.{kind}{pressed}" for kind in KINDS if kind != "txt" for pressed in ("", ".gz", ".zst")]
    file = next((f for f in found if f.is_file()), None)
    if file is None:
        there = sorted({p.name.split(".")[0] for p in data.iterdir() if not p.name.startswith(".")})
        raise UserError(
            f"eval: --data {data}: there is no {name}.jsonl, {name}.parquet or folder {name} in it; it has "
            f"{', '.join(there) or 'nothing'}"
        )
    return file


def _same(split: str) -> str:
    return _SAME.get(split, split)


def _split_of(file: Path, root: Path) -> str:
    """The split that a file's name tells, or a folder's below the task's; "" if none."""
    if file == root:
        return ""
    for part in (file.name.split(".")[0], *(p.name for p in file.relative_to(root).parents if p.name)):
        if match := _SPLIT.search(part):
            return _same(match[1].lower())
    return ""


def _group_of(file: Path, root: Path) -> str:
    """What of a file's name or folder is neither a split nor a number: `anatomy/test-0.parquet`, `anatomy_val.csv`."""
    if file == root:
        return ""
    parts = [file.name.split(".")[0], *(p.name for p in file.relative_to(root).parents if p.name)]
    names = [re.sub(r"[-_]*\d+(-of-\d+)?$", "", _SPLIT.sub("", f"{part}")).strip("-_ ") for part in parts]
    return next((n for n in names if n and not n.isdecimal()), "")


def _pieces(path: str) -> Iterator[Piece]:
    for unit in units_of(files_of(SourceConfig(path=path))):
        yield from unit


def _rows(paths: Sequence[str], root: Path) -> Rows:
    for path in paths:
        group = _group_of(Path(path), root)
        for piece in _pieces(path):
            for number, row in whole_records(piece):
                yield partial(where, piece, number), group, row


# --- the hub ---------------------------------------------------------------------------------------------------------


def _hub(task: Task) -> tuple[Task, Rows, Rows, str]:
    shots = iter(()) if task.shots_split is None else _hub_rows(task, task.shots_split)
    return task, _hub_rows(task, task.split), shots, task.path


def _hub_rows(task: Task, split: str) -> Rows:
    for subset in _subsets(task):
        source = SourceConfig(path=task.path, subset=subset, split=split)
        try:
            files = files_of(source)
        except UserError as e:
            raise UserError(f"task {task.name}: {e}; --data DIR reads it from files") from None
        for unit in units_of(files):
            for piece in unit:
                for number, row in whole_records(piece):
                    group = subset if task.subset == "*" and subset else ""
                    yield partial(where, piece, number), group, row


def _subsets(task: Task) -> list[str | None]:
    if task.subset != "*":
        return [task.subset]
    import datasets

    try:
        return list(datasets.get_dataset_config_names(task.path))
    except Exception as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(
            f"task {task.name}: {task.path} can't be read from the hub: {reason}; --data DIR reads it from files"
        ) from None
