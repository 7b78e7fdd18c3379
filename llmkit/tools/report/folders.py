"""What kind of folder a report is asked about, and the folders it is made of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.config import UserError

Record = dict[str, Any]
PIPELINE = "pipeline.json"
RESULTS = ("compare", "bench", "eval")
"""Commands that leave `<name>.json` and, as a table with remarks, `<name>.md` in a folder."""
_DEPTH = 3  # folders below the one that is named


@dataclass
class Found:
    """Folders to report on, each once, in the order in which they were found."""

    runs: list[Path] = field(default_factory=list)
    results: list[Path] = field(default_factory=list)
    """Of eval, bench and compare."""
    pipelines: list[Path] = field(default_factory=list)


def is_run(folder: Path) -> bool:
    """Whether a training stage wrote it; a tokenizer's folder has no metrics, and nothing to show."""
    return (folder / "metrics.jsonl").is_file()


def is_result(folder: Path) -> bool:
    """Whether eval, bench or compare wrote into it."""
    return any((folder / f"{name}.json").is_file() for name in RESULTS)


def find(paths: Sequence[str]) -> Found:
    """Runs, pipelines and results: the folders themselves, or those within them, the oldest first.

    Raises:
        UserError: for a path that is no folder, or that holds nothing to report on.
    """
    found = Found()
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"report: {path}: no such folder: give a run, a pipeline's folder or one that holds them")
        anything = False
        for folder in _walk(path):
            for kind, known in (
                (is_run(folder), found.runs),
                (is_result(folder), found.results),
                ((folder / PIPELINE).is_file(), found.pipelines),
            ):
                anything = anything or kind
                if kind and folder.resolve() not in {one.resolve() for one in known}:
                    known.append(folder)
        if not anything:
            raise UserError(
                f"report: {path}: holds no run (metrics.jsonl), no pipeline ({PIPELINE}) and no results "
                f"({', '.join(f'{name}.json' for name in RESULTS)})"
            )
    return found


def _walk(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """A folder, then what is below it by age; not what is inside a run's own folders, nor hidden ones.

    Of a pipeline only its nodes' folders in their order, wherever they are: others may lie beside them.
    """
    yield folder
    if depth == 0:
        return
    if (folder / PIPELINE).is_file():
        for node in nodes_of(folder):
            if node["folder"] is not None and node["folder"] != folder:
                yield from _walk(node["folder"], depth - 1)
        return
    within = ("checkpoints", "rollouts", "tensorboard", "plots", "tokenizer", "spikes", "nonfinite")
    below = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
    below = [p for p in below if not (is_run(folder) and p.name in within)]
    for one in sorted(below, key=lambda p: (_began(p), p.name)):
        yield from _walk(one, depth - 1)


def _began(folder: Path) -> float:
    """When a run was begun: its recipe is written first."""
    recipe = folder / "recipe.yaml"
    return (recipe if recipe.is_file() else folder).stat().st_mtime


def nodes_of(pipeline: Path) -> list[Record]:
    """What is known of a pipeline's nodes, in their order; `folder` is None where a node made only a file, or nothing yet."""
    state = read_json(pipeline / PIPELINE)
    nodes = state.get("nodes", {}) if isinstance(state, dict) else {}
    found = []
    for name in state["order"] if nodes else []:
        told = nodes.get(name, {})
        folder = Path(told["folder"]) if told.get("folder") else None
        found.append({**told, "name": name, "folder": folder if folder is not None and folder.is_dir() else None})
    return found


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each: its last parts, as many as tell it from the others."""
    whole = [folder.resolve().parts for folder in folders]
    names = []
    for parts in whole:
        n = next(n for n in range(1, len(parts) + 1) if sum(other[-n:] == parts[-n:] for other in whole) == 1)
        names.append("/".join(parts[-n:]))
    return names


def read_json(path: Path) -> Any:
    """A JSON file's content; None where there is none, or only half of one."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
