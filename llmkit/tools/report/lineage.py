"""What a model was made from, and what those were made from: as far as manifests and recipes tell. Reads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llmkit.config import flatten
from llmkit.lineage import folder_of, manifest_of, parents_in, sources_in
from llmkit.storage import checkpoints_of, step_of

Record = dict[str, Any]
_DEPTH = 12


def read_recipe(run: Path) -> Record:
    """The recipe of a run as it was resolved; empty where there is none."""
    file = run / "recipe.yaml"
    if not file.is_file():
        return {}
    read = yaml.load(file.read_text("utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return read if isinstance(read, dict) else {}


def lineage(run: Path) -> Record:
    """A run's ancestors: those of its newest checkpoint, or of its recipe while there is none.

    Returns:
        name, path, stage, step, data (the fingerprint of what was learnt from) and `from`: for each parent its role in the
        recipe, and either another such record or, where it isn't on this machine any more, its path; and the files.
    """
    newest = next(iter(checkpoints_of(run)), None)
    manifest = None if newest is None else manifest_of(newest)
    return _node(run if newest is None else newest, manifest or {"recipe": flatten(read_recipe(run))}, _DEPTH)


def _node(folder: Path, manifest: Mapping[str, Any], depth: int) -> Record:
    recipe = manifest.get("recipe") or {}
    step = step_of(folder)
    made: list[Record] = []
    for parent in parents_in(manifest):
        found = folder_of(parent) if depth else None
        inner = {"path": parent["path"]} if found is None else _node(found, manifest_of(found) or {}, depth - 1)
        made.append({"key": parent["role"], **inner})
    return {
        "name": folder.name if step < 0 else folder.parent.parent.name,
        "path": str(folder),
        "stage": recipe.get("stage"),
        "step": None if step < 0 else step,
        "data": manifest.get("data"),
        "from": [*made, *({"key": "data", "path": path} for path in sources_in(recipe))],
    }
