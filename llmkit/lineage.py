"""Where a checkpoint comes from: its parents, the code, the packages. Files only, no torch.

A run notes it once, when it begins (`lineage.json` in its folder), and every checkpoint's manifest repeats it under
"lineage": what a parent was, by the hash of its manifest, is still known when that parent has trained on or is gone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import llmkit
from llmkit.config import UserError
from llmkit.storage import MANIFEST, Damaged, checkpoints_of, read_manifest, replace_file, resolve_model, to_json

FILE, CARD = "lineage.json", "README.md"
PACKAGES = ("torch", "numpy", "tokenizers", "tiktoken", "datasets", "safetensors")
# Rooms that no result comes from.
_ASIDE = ("pipeline", "serving", "_shipped")
# Keys of a recipe that name a model.
_MODELS = ("init_from", "teacher", "reference", "critic.init_from")

Record = dict[str, Any]


@dataclass(frozen=True)
class Lineage:
    """What a run began with."""

    parents: list[Record]
    """Models: {"role": the recipe's key, "path": as the recipe has it, "checkpoint": its folder's name, "stage", "step",
    "manifest": SHA-256 that stands for all its files, or null for a folder that has none}."""
    code: str
    """SHA-256 of the package's sources."""
    version: str
    packages: dict[str, str]

    @classmethod
    def note(cls, out: Path, recipe: Mapping[str, Any], begun: bool) -> Lineage:
        """Reads what the run noted when it began, or notes it now; `begun` runs keep what they have."""
        file = out / FILE
        with contextlib.suppress(OSError, ValueError, TypeError):
            if begun:
                return cls(**json.loads(file.read_bytes()))
        packages = {}
        for name in PACKAGES:
            with contextlib.suppress(PackageNotFoundError):
                packages[name] = version(name)
        lineage = cls(list(_parents(recipe)), code_hash(), version("llmkit"), packages)
        replace_file(file, to_json(asdict(lineage)))
        return lineage

    def facts(self) -> Record:
        """For the manifest."""
        return {"lineage": asdict(self)}

    def card(self, recipe: Mapping[str, Any]) -> bytes:
        """A section of the model card; `recipe` holds what is not as it is by default, flat, without the run's folder."""
        lines = ["\n## Where it comes from\n", "| | |", "|---|---|"]
        for one in self.parents:
            where = f"{one['stage'] or Path(one['path']).name}, step {one['step']}" if one["manifest"] else one["path"]
            lines.append(f"| {one['role']} | {where} {_short(one['manifest'])} |")
        lines.append(f"| llmkit | {self.version}, sources {_short(self.code)} |")
        lines += [f"| {name} | {number} |" for name, number in sorted(self.packages.items())]
        lines += ["", "What the recipe says beyond the defaults:", "", "```"]
        models = dict(models_in(recipe))
        lines += [f"{key}: {_portable(value)}" for key, value in recipe.items() if key not in models]
        return "\n".join([*lines, "```", ""]).encode()


def _portable(value: Any) -> str:
    """A value as JSON; of a file of this machine its name."""
    if isinstance(value, str) and Path(value).is_absolute():
        value = Path(value).name
    return json.dumps(value, ensure_ascii=False)


def _short(value: str | None) -> str:
    return "" if value is None else value[:12]


def code_hash() -> str:
    """Of all sources that results come from, and of the version's number."""
    digest = hashlib.sha256(version("llmkit").encode())
    root = Path(llmkit.__file__).parent
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if name.parts[0] not in _ASIDE:
            data = file.read_bytes()
            digest.update(f"{name.as_posix()}\0{len(data)}\0".encode())
            digest.update(data)
    return digest.hexdigest()


# --- parents ---------------------------------------------------------------------------------------------------------


def models_in(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, path) of every model that a flat recipe names."""
    for key, value in recipe.items():
        last = key.rpartition(".")[2]
        judge = last == "path" and key.startswith("rewards.") and recipe.get(f"{key[:-5]}.kind") == "model"
        if isinstance(value, str) and (key in _MODELS or judge):
            yield key, value


def _parents(recipe: Mapping[str, Any]) -> Iterator[Record]:
    for role, path in models_in(recipe):
        folder = _found(path)
        manifest = None if folder is None else manifest_of(folder)
        told = manifest or {}
        yield {
            "role": role,
            "path": path,
            "checkpoint": None if folder is None else folder.name,
            "stage": told.get("recipe", {}).get("stage"),
            "step": told.get("step"),
            "manifest": told.get("sha256"),
        }


def _found(path: str) -> Path | None:
    """The folder of a model that is on this machine; nothing is downloaded."""
    if not Path(path).is_dir():
        return None
    try:
        return resolve_model(path)
    except UserError:  # whoever loads it says what is wrong
        return None


def manifest_of(folder: Path) -> Record | None:
    """The manifest of a folder, None where there is none that holds."""
    try:
        return read_manifest(folder)
    except Damaged:
        return None


def parents_in(manifest: Mapping[str, Any]) -> list[Record]:
    """The parents that a manifest tells of, whatever made it: a run, or quantize, merge, average and export."""
    if "lineage" in manifest:
        return list(manifest["lineage"]["parents"])
    found = []
    for command, keys in {"quantize": ("from",), "export": ("from",), "merge": ("base", "adapters")}.items():
        told = manifest.get(command) or {}
        found += [_named(command, told[key]) for key in keys if key in told]
    if not found and "lineage" not in manifest and isinstance(manifest.get("parents"), list):
        found = [_named("average", one["folder"]) for one in manifest["parents"]]
    if not found:  # a checkpoint from before lineage was kept
        found = [_named(role, path) for role, path in models_in(manifest.get("recipe", {}))]
    return found


def _named(role: str, path: str) -> Record:
    return {"role": role, "path": path, "checkpoint": None, "stage": None, "step": None, "manifest": None}


def folder_of(parent: Mapping[str, Any]) -> Path | None:
    """Where a parent lies now: the very checkpoint, if it is still there; else what its path leads to."""
    path = Path(parent["path"])
    for folder in (path, path / "checkpoints" / str(parent["checkpoint"])):
        if parent["manifest"] is not None and (manifest_of(folder) or {}).get("sha256") == parent["manifest"]:
            return folder
    if parent["manifest"] is not None or not path.is_dir():
        return None
    newest = checkpoints_of(path)[:1]
    return newest[0] if newest else path if (path / MANIFEST).is_file() or (path / "config.json").is_file() else None


def sources_in(recipe: Mapping[str, Any]) -> list[str]:
    """The files and data sets that a flat recipe learns from."""
    return list(
        dict.fromkeys(
            value
            for key, value in recipe.items()
            if key.startswith("data.") and key.rpartition(".")[2] == "path" and isinstance(value, str)
        )
    )
