"""What a node's result depends on, and one hash of it. Torch-free.

A key is made of what is asked for (the resolved recipe without what changes no result, or the command's options), the code,
the keys of the nodes that are read, and the content of the files that are. So a change is seen wherever it is made, and
all that hang on it have other keys too.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkit.config import locate
from llmkit.pipeline.graph import Node
from llmkit.storage import MANIFEST, checkpoints_of, sha256_of, to_json
from llmkit.training.config import FREE_KEYS

_WHOLE_BYTES = 64 << 20  # up to here a file is hashed whole
_PIECES, _PIECE_BYTES = 64, 1 << 20
_NO_INPUT = ("out", "cache_dir")
# Keys whose values may be names of folders without a sign of it.
_OF_PATHS = (
    "path",
    "init_from",
    "teacher",
    "reference",
    "model",
    "models",
    "others",
    "prompts",
    "answers",
    "text",
    "chats",
)
_NO_PATH = ("", ".", "..", "/")
_FUNCTION = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)[.:][A-Za-z_]\w*")

Parts = dict[str, Any]
Seen = dict[str, list[Any]]
"""Of files by their paths: size, time of change in ns, hash. Files that have both still are not read again."""


def parts_of(node: Node, code: str, keys: Mapping[str, str], folders: Sequence[Path], seen: Seen) -> Parts:
    """What a node depends on.

    Args:
        code: its hash.
        keys: of all nodes before it.
        folders: of all nodes: what lies in them is no file of the user's.
        seen: is read, and told of files that are new.
    """
    asked = node.what
    if node.recipe is not None:
        asked = {k: v for k, v in asked.items() if not f"{k}.".startswith(FREE_KEYS)}
    files = dict(sorted(_inputs(node.what, folders, seen)))
    return {"asked": asked, "code": code, "nodes": {name: keys[name] for name in node.parents}, "files": files}


def key_of(parts: Parts) -> str:
    return hashlib.sha256(to_json(parts).encode()).hexdigest()


def changes(old: Parts, new: Parts) -> list[str]:
    """What differs between what a node depended on and what it does now, a few words each."""
    found = []
    for key in {**old["asked"], **new["asked"]}:
        before, now = old["asked"].get(key), new["asked"].get(key)
        if before != now:
            found.append(f"{key}: {_brief(before)} -> {_brief(now)}")
    found += [
        f"{path} changed"
        for path in {**old["files"], **new["files"]}
        if old["files"].get(path) != new["files"].get(path)
    ]
    found += [
        f"{name} changed"
        for name in {**old["nodes"], **new["nodes"]}
        if old["nodes"].get(name) != new["nodes"].get(name)
    ]
    return found + ["the code changed"] * (old["code"] != new["code"])


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


# --- files -----------------------------------------------------------------------------------------------------------


def _inputs(what: Mapping[str, Any], folders: Sequence[Path], seen: Seen) -> Iterator[tuple[str, str]]:
    """(path, hash) of everything on disk that a node's values name."""
    for key, value in what.items():
        last = next((part for part in reversed(key.split(".")) if not part.isdecimal()), key)
        if not isinstance(value, str) or value in _NO_PATH or last in _NO_INPUT or value.startswith("{node:"):
            continue
        if not (last in _OF_PATHS or "/" in value or "." in value) or "\n" in value or len(value) > 1024:
            continue
        for name, path in _named(value):
            if not any(folder == path or folder in path.parents for folder in folders):
                yield name, fingerprint(path, seen)


def _named(value: str) -> Iterator[tuple[str, Path]]:
    """What a value names on disk, called by it: a file or a folder, what a glob finds, the module of a function."""
    path = locate(value)
    if path.exists():
        yield value, path
    elif any(c in value for c in "*?["):
        yield from ((one, Path(one)) for one in sorted(glob.glob(value, recursive=True)))
    elif (match := _FUNCTION.fullmatch(value)) is not None:
        module = locate(Path(*match[1].split(".")).with_suffix(".py"))
        if module.is_file():  # with what lies beside it, for that is what it may import
            yield from ((f"{value}: {file.name}", file) for file in sorted(module.parent.glob("*.py")))


def fingerprint(path: Path, seen: Seen) -> str:
    """Of a file its content; of a checkpoint its manifest, of a run its newest checkpoint's; else of all files below."""
    if path.is_file():
        return _of_file(path, seen)
    if (path / MANIFEST).is_file():
        return _of_file(path / MANIFEST, seen)
    if newest := checkpoints_of(path)[:1]:
        return fingerprint(newest[0], seen)
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    told = [[file.relative_to(path).as_posix(), _of_file(file, seen)] for file in files]
    return hashlib.sha256(to_json(told).encode()).hexdigest()


def _of_file(path: Path, seen: Seen) -> str:
    stat, name = path.stat(), str(path.absolute())
    known = seen.get(name)
    if known is None or known[:2] != [stat.st_size, stat.st_mtime_ns]:
        told = sha256_of(path) if stat.st_size <= _WHOLE_BYTES else _sampled(path, stat.st_size)
        known = seen[name] = [stat.st_size, stat.st_mtime_ns, told]
    return str(known[2])


def _sampled(path: Path, size: int) -> str:
    """Of a large file: its size, and pieces at equal distances, the first and the last among them."""
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as f:
        for i in range(_PIECES):
            f.seek(i * (size - _PIECE_BYTES) // (_PIECES - 1))
            digest.update(f.read(_PIECE_BYTES))
    return digest.hexdigest()
