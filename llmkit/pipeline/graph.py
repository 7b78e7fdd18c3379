"""A pipeline's nodes, checked and in the order in which they run. Torch-free."""

from __future__ import annotations

import argparse
import contextlib
import graphlib
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.config import Config, UserError, flatten, load, locate
from llmkit.pipeline.config import NodeConfig, PipelineConfig
from llmkit.stages import load_recipe
from llmkit.training.config import RunConfig

_NODE = re.compile(r"\{node: *([^{}]+?) *\}")
_PIPELINE = "{pipeline}"


@dataclass(frozen=True)
class Made:
    """What a command makes."""

    file: str | None
    """The file in the node's folder, where `out` doesn't say another; "": the folder itself; None: `out` must say."""
    resumes: bool = False
    """Begun again, it goes on where it stopped."""


COMMANDS = {
    "generate": Made("rows.jsonl", resumes=True),
    "sample": Made("rows.jsonl", resumes=True),
    "rank": Made("rows.jsonl", resumes=True),
    "score": Made("rows.jsonl"),
    "quantize": Made(""),
    "merge": Made(""),
    "average": Made(""),
    "compare": Made(""),
    "eval": Made(""),
    "bench": Made(""),
    "export": Made(None),
    "report": Made("report.html"),
}


@dataclass(frozen=True)
class Node:
    """A node with its references resolved."""

    name: str
    folder: Path
    argv: list[str]
    """After `llmkit`."""
    parents: tuple[str, ...]
    what: dict[str, Any]
    """All that is asked for, flat; other nodes' folders stand in it as `{node: NAME}`."""
    recipe: Any = None
    """The resolved recipe; None for a command."""
    file: str = ""
    """What a command makes, within the folder; "": the folder itself."""
    resumes: bool = True
    ranks: int = 1

    @property
    def does(self) -> str:
        """The stage or the command."""
        return str(self.argv[0] if self.recipe is None else self.recipe.stage)

    @property
    def command(self) -> str:
        """As one would type it."""
        return shlex.join(["llmkit", *self.argv])

    @property
    def process(self) -> list[str]:
        """The arguments of its process."""
        ranks = ["torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}", "-m"] * (self.ranks > 1)
        return [sys.executable, "-m", *ranks, "llmkit.cli", *self.argv]

    def is_made(self) -> bool:
        """Whether the result of a node that was done is still there."""
        if self.recipe is None:
            return (self.folder / self.file).exists()
        return (self.folder / ("DONE" if isinstance(self.recipe, RunConfig) else "tokenizer.json")).is_file()


@dataclass(frozen=True)
class Pipeline:
    """A pipeline as its file and the command line say."""

    file: str
    config: PipelineConfig
    nodes: dict[str, Node] = field(default_factory=dict)
    """In the order in which they run."""

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    def behind(self, name: str) -> set[str]:
        """A node and all that hang on it."""
        found = {name}
        for node in self.nodes.values():
            if found & set(node.parents):
                found.add(node.name)
        return found

    def before(self, name: str) -> set[str]:
        """A node and all that it hangs on."""
        return {name}.union(*(self.before(parent) for parent in self.nodes[name].parents))

    def find(self, name: str, option: str) -> Node:
        """The node that an option names; UserError for none."""
        if name not in self.nodes:
            raise UserError(f"{option} {name}: is no node: {', '.join(self.nodes)}")
        return self.nodes[name]


def read_pipeline(file: str, overrides: Sequence[str], parsers: Mapping[str, argparse.ArgumentParser]) -> Pipeline:
    """Reads and checks a pipeline with all its recipes and commands.

    Args:
        file: the YAML; one that ships with the package is found from any folder.
        overrides: `key=value` of the pipeline, or `NODE.key=value` of a node's `set`.
        parsers: of the commands, by name.

    Raises:
        UserError: for a mistake in the file, in a node's recipe or options, and for nodes that refer to each other.
    """
    config = _load(file, overrides)
    out = Path(config.out)
    folders = {name: out / name for name in config.nodes}
    found: dict[str, Node] = {}
    for name, one in config.nodes.items():
        try:
            if one.recipe is not None:
                found[name] = _recipe_node(name, one, folders, config, Path(file))
            else:
                found[name] = _command_node(name, one, folders, parsers)
        except UserError as e:
            raise UserError("\n".join(f"{file}: nodes.{name}: {line}" for line in str(e).splitlines())) from None
    return Pipeline(file, config, {name: found[name] for name in _in_order(found, file)})


def _load(file: str, overrides: Sequence[str]) -> PipelineConfig:
    keys = tuple(PipelineConfig.model_fields)
    texts = [t if t.startswith(tuple(f"{k}{c}" for k in keys for c in ".=")) else _of_node(t) for t in overrides]
    try:
        plain: PipelineConfig = load(PipelineConfig, file)
        for text in texts:
            if text.startswith("nodes.") and (name := text.split(".")[1]) not in plain.nodes:
                raise UserError(f"override '{text}': '{name}' is no node: {', '.join(plain.nodes)}")
        config: PipelineConfig = load(PipelineConfig, file, texts)
        return config
    except UserError as e:
        hint = 'a reference with more text around it is quoted: "{node: rank}/rows.jsonl"'
        raise UserError(f"{e}: {hint}" if "but got '<scalar>'" in str(e) or "block end" in str(e) else str(e)) from None


def _of_node(text: str) -> str:
    """`pretrain.steps=10` is a value of that node's `set`."""
    name, dot, rest = text.partition(".")
    if not dot or "=" in name:
        raise UserError(
            f"override '{text}': expected NODE.key=value, or one of {', '.join(PipelineConfig.model_fields)}"
        )
    return f"nodes.{name}.set.{rest}"


def _in_order(nodes: Mapping[str, Node], file: str) -> list[str]:
    """Every node behind its parents; otherwise the file's order stands."""
    try:
        graphlib.TopologicalSorter({n: node.parents for n, node in nodes.items()}).prepare()
    except graphlib.CycleError as e:
        raise UserError(f"{file}: nodes run in a circle: {' -> '.join(reversed(e.args[1]))}") from None
    order: list[str] = []
    while len(order) < len(nodes):
        order.append(next(n for n in nodes if n not in order and set(nodes[n].parents) <= set(order)))
    return order


# --- references ------------------------------------------------------------------------------------------------------


def _resolved(value: Any, folders: Mapping[str, Path]) -> Any:
    """A value with the folders of the nodes that it names. Raises UserError for a name that is none."""
    if isinstance(value, dict):
        if value.keys() == {"node"} and isinstance(value["node"], str):
            return str(_folder(value["node"], folders))
        return {key: _resolved(one, folders) for key, one in value.items()}
    if isinstance(value, list):
        return [_resolved(one, folders) for one in value]
    if not isinstance(value, str):
        return value
    text = _NODE.sub(lambda match: str(_folder(match[1], folders)), value)
    return text.replace(_PIPELINE, str(next(iter(folders.values())).parent))


def _folder(name: str, folders: Mapping[str, Path]) -> Path:
    if name not in folders:
        raise UserError(f"{{node: {name}}}: there is no such node: {', '.join(folders)}")
    return folders[name]


def _symbolic(flat: Mapping[str, Any], folders: Mapping[str, Path]) -> dict[str, Any]:
    """The same with names for the folders, so that a pipeline that was moved asks for the same."""
    return {key: _as_name(value, folders) if isinstance(value, str) else value for key, value in flat.items()}


def _as_name(text: str, folders: Mapping[str, Path]) -> str:
    for name, folder in folders.items():
        text = re.sub(rf"(?<![\w./-]){re.escape(str(folder))}(?![\w.-])", f"{{node: {name}}}", text)
    out = str(next(iter(folders.values())).parent)
    return _PIPELINE + text.removeprefix(out) if text == out or text.startswith(f"{out}/") else text


def _parents(name: str, what: Mapping[str, Any], after: Sequence[str], folders: Mapping[str, Path]) -> tuple[str, ...]:
    named = {m for value in what.values() if isinstance(value, str) for m in _NODE.findall(value)}
    for one in after:
        _folder(one, folders)
    if name in {*named, *after}:
        raise UserError("refers to itself")
    return tuple(one for one in folders if one in named or one in after)


# --- recipes ---------------------------------------------------------------------------------------------------------


def _recipe_node(
    name: str, config: NodeConfig, folders: Mapping[str, Path], pipeline: PipelineConfig, file: Path
) -> Node:
    assert config.recipe is not None
    if "out" in config.set:
        raise UserError("set.out: a node's folder is the pipeline's with its name: drop it")
    beside = locate(file).parent / config.recipe
    path = os.path.normpath(beside) if beside.is_file() and not Path(config.recipe).is_file() else config.recipe
    values = {"out": str(folders[name]), **_resolved(config.set, folders)}
    overrides = [f"{key}={_as_yaml(value)}" for key, value in values.items()]
    recipe: Config = load_recipe(path, overrides)
    if isinstance(recipe, RunConfig) and recipe.stop_at is not None:
        raise UserError("stop_at: a run that stops before its end is never done: drop it")
    what = _symbolic(flatten(json.loads(recipe.model_dump_json())), folders)
    what.pop("out")
    return Node(
        name=name,
        folder=folders[name],
        argv=["train", path, *overrides],
        parents=_parents(name, what, config.after, folders),
        what=what,
        recipe=recipe,
        ranks=config.ranks or pipeline.ranks if isinstance(recipe, RunConfig) else 1,
    )


def _as_yaml(value: Any) -> str:
    """A value as the command line takes it: text as it is, where that can only be text."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z./][\w./-]*", value) and value.lower() not in _WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)


_WORDS = ("true", "false", "null")


# --- commands --------------------------------------------------------------------------------------------------------


def _command_node(
    name: str,
    config: NodeConfig,
    folders: Mapping[str, Path],
    parsers: Mapping[str, argparse.ArgumentParser],
) -> Node:
    run = config.run
    if run not in COMMANDS or run not in parsers:
        raise UserError(f"run: one of {', '.join(c for c in COMMANDS if c in parsers)} (got '{run}')")
    made = COMMANDS[run]
    options = {key.replace("-", "_"): value for key, value in config.set.items()}
    if run == "rank" and options.get("annotator") not in ("simulated", "none"):
        raise UserError(
            "set.annotator: simulated or none, for a pipeline waits for nobody: have people rank the answers of a node "
            "with annotator: none, and name their file in the next recipe"
        )
    file = _file_of(made, options)
    asked = {"run": run, **{key: value for key, value in options.items() if key != "out"}, "out": file}
    what = _symbolic(flatten(_resolved(asked, folders)), folders)
    values = {**_resolved(options, folders), "out": str(folders[name] / file)}
    argv = [run, *_arguments(parsers[run], values)]
    _check(parsers[run], argv[1:])
    parents = _parents(name, what, config.after, folders)
    return Node(name, folders[name], argv, parents, what, None, file, made.resumes)


def _file_of(made: Made, options: Mapping[str, Any]) -> str:
    file = options.get("out", made.file)
    if made.file == "" and "out" in options:
        raise UserError("set.out: the node's folder is what this command makes: drop it")
    if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
        raise UserError(f"set.out: the name of a file within the node's folder is expected (got {file!r})")
    return file


def _arguments(parser: argparse.ArgumentParser, values: Mapping[str, Any]) -> Iterator[str]:
    """A command's options and then its places, from their values by name. Raises UserError for what it doesn't know."""
    known = {a.dest: a for a in parser._actions if a.dest != "help"}
    for key in values:
        if key not in known:
            raise UserError(f"set.{key}: `{parser.prog}` has no such option: {', '.join(known)}")
    for key, value in values.items():
        action = known[key]
        if not action.option_strings or value is None or value is False:
            continue
        option = max(action.option_strings, key=len)
        if action.nargs == 0:
            if value is not True:
                raise UserError(f"set.{key}: true or false is expected (got {value!r})")
            yield option
            continue
        for one in value if isinstance(value, list) else [value]:
            text = _as_text(one)
            yield from [f"{option}={text}"] if option.startswith("--") else [option, text]
    for action in parser._actions:  # in the parser's order
        if not action.option_strings and (value := values.get(action.dest)) is not None:
            yield from map(_as_text, value if isinstance(value, list) else [value])


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _check(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Raises UserError with what the command's own parser says."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            parser.parse_args(argv)
        except SystemExit:
            last = said.getvalue().strip().splitlines()[-1]
            raise UserError(f"set: {last.removeprefix(f'{parser.prog}: error: ')}") from None
