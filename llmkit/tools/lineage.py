"""`llmkit lineage`: what a model comes from, and what that comes from, as a tree. Files only, no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmkit.config import UserError
from llmkit.lineage import folder_of, manifest_of, parents_in, sources_in
from llmkit.storage import resolve_model, sha256_of, to_json

Record = dict[str, Any]
_DEPTH = 32
PIPELINE = "pipeline.json"
_NOTES = ".notes"  # beside a file of answers: `llmkit rank`, `sample` and `generate` keep there who wrote them


def run(args: argparse.Namespace) -> int:
    """Prints the tree, or all of it as JSON."""
    folder = resolve_model(args.folder)
    tree = tree_of(folder)
    print(to_json(tree) if args.json else "\n".join(_lines(tree)), end="" if args.json else "\n")
    return 0


def tree_of(folder: Path, path: Sequence[Path] = ()) -> Record:
    """A model with its parents and data, and theirs, as JSON.

    Raises:
        UserError: for a folder that comes from itself, as only altered files can say.
    """
    here = folder.resolve()
    if here in path or len(path) > _DEPTH:
        raise UserError(f"{folder}: comes from itself: its manifest or a parent's was altered")
    manifest = manifest_of(folder)
    told = manifest or {}
    recipe = told.get("recipe") or {}
    lineage = told.get("lineage") or {}
    made_by = recipe.get("stage") or next((c for c in ("quantize", "merge", "export") if c in told), None)
    node: Record = {
        "folder": str(folder),
        "made_by": made_by or ("average" if isinstance(told.get("parents"), list) else None),
        "step": told.get("step"),
        "manifest": told.get("sha256"),
        "data": told.get("data"),
        "seed": recipe.get("seed"),
        "version": lineage.get("version"),
        "code": lineage.get("code"),
        "packages": lineage.get("packages"),
        "parents": [],
        "sources": [_source(name, (*path, here)) for name in sources_in(recipe)],
    }
    for parent in parents_in(told):
        found = folder_of(parent)
        below = None if found is None else tree_of(found, (*path, here))
        node["parents"].append({**parent, "tree": below})
    return node


def _source(name: str, path: Sequence[Path]) -> Record:
    """A file that was learnt from, and the model that wrote it, if one did."""
    file = Path(name)
    told: Record = {"path": name, "sha256": sha256_of(file) if file.is_file() else None, "answers_of": None}
    seen: list[Path] = []
    rows: Path | None = file
    while rows is not None and rows not in seen and (notes := rows.with_name(rows.name + _NOTES)).is_file():
        if isinstance(model := _settings(notes).get("model"), str):
            folder = Path(model)
            told["answers_of"] = {"path": model, "tree": tree_of(folder, path) if folder.is_dir() else None}
            break
        seen.append(rows)
        rows = _rows_before(rows)
    return told


def _rows_before(rows: Path) -> Path | None:
    """The answers that were ranked: those of the node before, where a pipeline made both."""
    out = rows.parent.parent
    try:
        nodes = json.loads((out / PIPELINE).read_bytes())["nodes"]
        before = [(name, nodes[name]["file"]) for name in nodes[rows.parent.name]["parents"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return next((out / name / file for name, file in before if file.endswith(".jsonl")), None)


def _settings(notes: Path) -> Record:
    with notes.open("rb") as f:
        try:
            settings = json.loads(f.readline()).get("settings")
        except (ValueError, AttributeError):
            return {}
    return settings if isinstance(settings, dict) else {}


# --- as text ---------------------------------------------------------------------------------------------------------


def _lines(node: Record, role: str = "", indent: str = "", told: set[str] | None = None) -> Iterator[str]:
    """A model, then what it was made of, further to the right; what was told already is only named."""
    told = set() if told is None else told
    step = "" if node["step"] is None else f", step {node['step']}"
    made = "made by another program" if node["made_by"] is None else f"{node['made_by']}{step}"
    known = node["folder"] in told
    yield f"{indent}{role}{node['folder']}  ({made}{_part('manifest', node['manifest'])}){', as above' * known}"
    if known:
        return
    told.add(node["folder"])
    facts = [
        f"seed {node['seed']}" if node["seed"] is not None else "",
        _part("data", node["data"]).removeprefix(", "),
        f"llmkit {node['version']}{_part('sources', node['code'])}" if node["version"] else "",
        ", ".join(f"{name} {number}" for name, number in (node["packages"] or {}).items()),
    ]
    for fact in filter(None, facts):
        yield f"{indent}  {fact}"
    for source in node["sources"]:
        yield f"{indent}  data: {source['path']}{_part('SHA-256', source['sha256'])}"
        if (writer := source["answers_of"]) is not None:
            yield from _below(writer["tree"], "answers of: ", writer["path"], f"{indent}    ", told)
    for parent in node["parents"]:
        missing = parent["path"] + _part("then manifest", parent["manifest"])
        yield from _below(parent["tree"], f"{parent['role']}: ", missing, f"{indent}  ", told)


def _below(tree: Record | None, role: str, name: str, indent: str, told: set[str]) -> Iterator[str]:
    if tree is None:
        yield f"{indent}{role}{name}  (not here any more)"
    else:
        yield from _lines(tree, role, indent, told)


def _part(name: str, value: str | None) -> str:
    return "" if not value else f", {name} {value[:12]}"
