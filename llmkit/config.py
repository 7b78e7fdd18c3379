"""Typed recipes: YAML -> pydantic models.

A recipe is read in four steps: defaults of the model < `base:` file < the file < `key.sub=value` overrides. Whatever is
wrong is reported at once, each as `file:line: key: what (got value)` with the nearest known key. The YAML dialect is
1.2: `3e-4` is a number, `yes` and `no` are words, `010` is not eight, a key may stand only once.

Nothing here is heavy: no torch, no tokenizers. Every other module may import this one.
"""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 20_000  # after aliases are expanded: a "billion laughs" file is refused before it is built

Data = dict[str, Any]
KeyPath = tuple[str | int, ...]
Where = dict[KeyPath, str]  # key path -> "file:line" or "override 'x=y'"


class UserError(ValueError):
    """A mistake the user can mend: shown as it is, without a traceback; the command exits with code 2."""


class MachineError(RuntimeError):
    """Something outside the recipe failed, such as a full disk: shown in one sentence; the command exits with 1."""


class Interrupted(Exception):
    """Long work was stopped by a signal at a safe point; what it had finished is kept, and the next start goes on."""


class TrainingStopped(RuntimeError):
    """Training ended itself for a stated reason, before harm was done; the command exits with code 3."""


class Config(BaseModel):
    """Base of every configuration class: strict types, no unknown keys, no changes after validation."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


# --- finding files ---------------------------------------------------------------------------------------------------


def locate(path: str | Path) -> Path:
    """The file itself, or else the copy of it that ships with the package (`configs/...`, `data/demo/...`).

    A clone keeps those folders beside the package, a wheel inside it, so that the recipes named in the README run from
    any working directory.
    """
    path = Path(path)
    if path.exists() or path.is_absolute():
        return path
    package = Path(__file__).resolve().parent
    for root in (package / "_shipped", package.parent):
        if path.parts and path.parts[0] in ("configs", "data") and (root / path).exists():
            return root / path
    return path


# --- YAML -----------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars."""


_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
}
# SafeLoader's own table also holds dates, sexagesimal numbers and yes/no: it is replaced, but for `<<` (merge keys).
_Loader.yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}
for _tag, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


_TAGS = {f"tag:yaml.org,2002:{name}" for name in (*_SCALARS, "str", "seq", "map")}
_MAX_DIGITS = 300  # more than any number needs, and far below what Python refuses to read


def _check(node: yaml.Node, file: str, depth: int = 0, budget: list[int] | None = None) -> None:
    """Refuses what no recipe needs, naming file and line.

    That is: duplicate keys, keys that aren't text, foreign tags, deep nesting, alias bombs, endless numbers, and text
    that can be neither a path nor UTF-8.
    """
    budget = [MAX_NODES] if budget is None else budget
    budget[0] -= 1
    at = f"{file}:{node.start_mark.line + 1}"
    if budget[0] < 0:
        raise UserError(f"{at}: more than {MAX_NODES} values once aliases are expanded: write them out or drop some")
    if depth > MAX_DEPTH:
        raise UserError(f"{at}: nested more than {MAX_DEPTH} levels deep")
    if node.tag not in _TAGS:
        raise UserError(f"{at}: {node.tag.replace('tag:yaml.org,2002:', '!!')}: only plain values are read: quote it")
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node, at)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line = f"{file}:{key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (
                "tag:yaml.org,2002:str",
                "tag:yaml.org,2002:merge",
            ):
                raise UserError(f"{line}: a key must be text (got {getattr(key, 'value', key)!r}): quote it")
            if key.value in seen:
                raise UserError(f"{line}: duplicate key '{key.value}'")
            seen.add(key.value)
            _check_scalar(key, line)
            _check(value, file, depth + 1, budget)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check(value, file, depth + 1, budget)


def _check_scalar(node: yaml.ScalarNode, at: str) -> None:
    for character in node.value:
        if character == "\0" or "\ud800" <= character <= "\udfff":
            what = "a NUL character" if character == "\0" else "half of a surrogate pair"
            raise UserError(f"{at}: {what} is no text (got {_brief(node.value)})")
    kind = node.tag.rpartition(":")[2]
    patterns = {**{k: v[0] for k, v in _SCALARS.items()}, "float": f"{_SCALARS['float'][0]}|{_SCALARS['int'][0]}"}
    if kind in patterns and not re.fullmatch(patterns[kind], node.value):  # only a tag can claim so: `!!int x`
        raise UserError(f"{at}: not of the type that its tag !!{kind} says (got {_brief(node.value)})")
    if kind in ("int", "float") and len(node.value) > _MAX_DIGITS:
        raise UserError(f"{at}: a number of {len(node.value)} digits: at most {_MAX_DIGITS} are read")


def _lines(node: yaml.Node, file: str, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Every key path of a checked node with its `file:line`; of a key that stands twice, the last one counts."""
    yield path, f"{file}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":  # the first of several merged mappings wins, own keys over all
                merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
                yield from (line for one in reversed(merged) for line in _lines(one, file, path) if line[0] != path)
        for key, value in node.value:
            yield from _lines(value, file, (*path, key.value))
            yield (*path, key.value), f"{file}:{key.start_mark.line + 1}"
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield from _lines(value, file, (*path, i))


def parse_yaml(text: str, name: str = "<text>") -> tuple[Any, Where]:
    """Parses one YAML document; returns the data and where each key stands. Raises UserError with `name:line`."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return {}, {(): f"{name}:1"}
        _check(node, name)
        lines = dict(_lines(node, name))  # before merged keys are put into their mappings
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        at = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise UserError(f"{at}: {e.problem or e.context}") from None
    except yaml.YAMLError as e:  # a control character, a wrong encoding
        raise UserError(f"{name}: not YAML: {' '.join(str(e).split())}") from None
    except RecursionError:
        raise UserError(f"{name}: nested more than {MAX_DEPTH} levels deep") from None


def _read_text(file: Path, at: str) -> str:
    if not file.is_file():
        folder = file.parent
        names = [p.name for p in folder.glob("*.y*ml")] if folder.is_dir() else []
        near = difflib.get_close_matches(file.name, names, 1)
        hint = f" - did you mean {folder / near[0]}?" if near else ""
        raise UserError(f"{at}recipe not found: {file}{hint}")
    try:
        if file.stat().st_size > MAX_BYTES:
            raise UserError(f"{file}: {file.stat().st_size} bytes is no recipe: at most {MAX_BYTES} are read")
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: not UTF-8 at byte {e.start}: save it as UTF-8") from None
    except OSError as e:
        raise UserError(f"{file}: cannot be read: {e.strerror}") from None


def _merge(old: Data, new: Data) -> Data:
    both = {k: _merge(old[k], v) for k, v in new.items() if isinstance(old.get(k), dict) and isinstance(v, dict)}
    return {**old, **new, **both}


def _read(file: Path, stack: tuple[Path, ...] = (), at: str = "") -> tuple[Data, Where]:
    """One file over its `base:`; `at` is where its name stands in the file above it."""
    if file.resolve() in [s.resolve() for s in stack]:
        raise UserError(f"{at}runs in a circle: {' -> '.join(map(str, (*stack, file)))}")
    if len(stack) > MAX_DEPTH:
        raise UserError(f"{at}more than {MAX_DEPTH} recipes, each the base of the next")
    data, where = parse_yaml(_read_text(file, at), str(file))
    data = {} if data is None else data  # nothing but `---`
    if not isinstance(data, dict):
        raise UserError(f"{file}:1: a recipe is a mapping of keys to values (got {_brief(data)})")
    base = data.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{where[('base',)]}: base: a file name is expected (got {_brief(base)})")
        beside, shipped = file.parent / base, locate(base)
        below_file = shipped if shipped.exists() and not beside.exists() else beside
        below, below_where = _read(below_file, (*stack, file), f"{where[('base',)]}: base: ")
        data, where = _merge(below, data), {**below_where, **where}
    return data, where


def _override(data: Data, where: Where, text: str) -> Data:
    """Applies one `key.sub=value`; the value is YAML. Numbers in the path index lists: `data.train.0.path=x`."""
    key, equals, value = text.partition("=")
    path: KeyPath = tuple(int(k) if re.fullmatch("[0-9]{1,9}", k) else k for k in key.split("."))
    if not equals or not all(str(k) for k in path) or len(path) > MAX_DEPTH:
        raise UserError(f"override '{text}': expected key.sub=value")
    try:
        parsed, inner = parse_yaml(value, "") if value.strip() else (None, {})
    except UserError as e:
        raise UserError(f"override '{text}': " + re.sub(r"^[:0-9]*: ", "", str(e))) from None

    def put(node: Any, rest: KeyPath) -> Any:
        if not rest:
            return _merge(node, parsed) if isinstance(node, dict) and isinstance(parsed, dict) else parsed
        head, tail = rest[0], rest[1:]
        if isinstance(node, list) and isinstance(head, int):
            if head >= len(node):
                raise UserError(f"override '{text}': the list has {len(node)} entries, so the last is {len(node) - 1}")
            return [put(v, tail) if i == head else v for i, v in enumerate(node)]
        node = node if isinstance(node, dict) else {}
        return {**node, str(head): put(node.get(str(head)), tail)}

    for n in range(1, len(path) + 1):
        where[path[:n]] = f"override '{text}'"
    where.update({(*path, *sub): f"override '{text}'" for sub in inner})
    return typing.cast(Data, put(data, path))


# --- validation -----------------------------------------------------------------------------------------------------


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The configuration classes that a field's type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in typing.get_args(annotation) for m in _models_in(a)]


def _below(models: list[type[BaseModel]], key: str | int) -> tuple[list[type[BaseModel]], bool]:
    """The classes that may stand under a key of any of `models`, and whether the key is one of a recipe.

    If not, it is a tag: where a field is one of several classes told apart by a field such as `kind`, pydantic's paths
    name the value of that field too.
    """
    if isinstance(key, int):  # an entry of a list: the list's own type already named the class
        return models, True
    fields = [m.model_fields[key] for m in models if key in m.model_fields]
    tagged = [m for m in models if any(key in typing.get_args(f.annotation) for f in m.model_fields.values())]
    if tagged and not fields:
        return tagged, False
    return [m for field in fields for m in _models_in(field.annotation)], True


def known_keys(model: type[BaseModel], path: KeyPath) -> list[str]:
    """The keys a recipe may hold at a key path."""
    models = [model]
    for key in path:
        models, _ = _below(models, key)
    return list(dict.fromkeys(name for m in models for name in m.model_fields))


def _as_written(model: type[BaseModel], path: KeyPath, unknown: bool) -> str:
    """A key path without tags; the last key of an `unknown` one is what the recipe holds, whatever it is."""
    models, keys = [model], []
    for n, key in enumerate(path, 1):
        models, is_key = _below(models, key)
        if is_key or (unknown and n == len(path)):
            keys.append(str(key))
    return ".".join(keys)


_WORDS = {
    "Input should be a valid integer": "expected an integer",
    "Input should be a valid ": "expected a ",
    "Input should be greater": "must be greater",
    "Input should be less": "must be less",
    "Input should be an instance of ": "expected ",
    "Input should be ": "expected ",
    "Value error, ": "",
}


def _by_line(line: tuple[str, str]) -> tuple[bool, str, int]:
    """Sorts as one reads: file by file, downwards; then overrides."""
    file, colon, number = line[0].rpartition(":")
    return (False, file, int(number)) if colon and number.isdecimal() else (True, "", 0)


def _explain(model: type[BaseModel], where: Where, error: ValidationError) -> str:
    lines: list[tuple[str, str]] = []
    for e in error.errors():
        loc = tuple(e["loc"])
        at = next(where[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in where)
        message = e["msg"]
        for old, new in _WORDS.items():
            message = message.replace(old, new)
        if e["type"] == "extra_forbidden":
            keys = known_keys(model, loc[:-1])
            near = difflib.get_close_matches(str(loc[-1]), keys, 1, 0.5)
            message = "unknown key" + (f" - did you mean '{near[0]}'?" if near else f"; known: {', '.join(keys)}")
        elif e["type"] == "missing":
            message = "missing: this key has no default"
        elif e["type"] != "value_error":
            message += f" (got {_brief(e['input'])})"
        name = _as_written(model, loc, e["type"] == "extra_forbidden")
        lines.append((at, f"{at}: {name}: {message}" if name else f"{at}: {message}"))
    return "\n".join(dict.fromkeys(text for _, text in sorted(lines, key=_by_line)))


def validate(model: type[BaseModel], data: Data, where: Where | None = None) -> Any:
    """Builds a configuration from plain data. Raises UserError that names every wrong key and where it stands."""
    where = {(): "<data>"} if where is None else where
    try:
        # JSON mode is strict where it should be ("yes" is no bool, 1.5 no int); a list may be a tuple, an int a float.
        return model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as e:
        raise UserError(_explain(model, where, e)) from None
    except (TypeError, ValueError) as e:
        raise UserError(f"{where[()]}: {e}") from None


def load(
    pick: type[BaseModel] | Callable[[Data, Where], type[BaseModel]], file: str | Path, overrides: Sequence[str] = ()
) -> Any:
    """Reads a recipe.

    Args:
        pick: the configuration class, or a function that chooses it from the merged data (by `stage:`, say).
        file: the YAML file; one that ships with the package is found from any folder (see `locate`).
        overrides: `key.sub=value` texts, applied in order.

    Raises:
        UserError: with one line per mistake.
    """
    data, where = _read(locate(file))
    for text in overrides:
        data = _override(data, where, text)
    where.setdefault((), f"{file}:1")
    model = pick if isinstance(pick, type) else pick(data, where)
    return validate(model, data, where)


def dump(config: BaseModel) -> str:
    """The resolved configuration as YAML, in the order of the fields, readable by `load` again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """{'optim.lr': 0.001, ...}: for showing what differs between two recipes."""
    if isinstance(data, dict) and data:
        return {k: v for key, value in data.items() for k, v in flatten(value, f"{prefix}{key}.").items()}
    if isinstance(data, list) and data:
        return {k: v for i, value in enumerate(data) for k, v in flatten(value, f"{prefix}{i}.").items()}
    return {prefix[:-1]: data}
