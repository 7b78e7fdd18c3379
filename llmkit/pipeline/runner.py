"""Decides what each node needs, and does it: each in a process of its own, killed with this one. Torch-free.

Everything is decided from `pipeline.json` and what lies on disk, and written down before it is done:

1. an old result that is not wanted any more is renamed (never deleted), and only then
2. the node's key is noted as begun, and only then
3. its process starts.

So, killed anywhere, the same command finds either the old key with nothing to move, or the new key with a result in the
making, which its own command resumes.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import llmkit
from llmkit.lineage import code_hash
from llmkit.pipeline.graph import Node, Pipeline
from llmkit.pipeline.keys import Parts, changes, key_of, parts_of
from llmkit.pipeline.state import Record, State
from llmkit.storage import Damaged, checkpoints_of, disk, sync_folder, trash, verify
from llmkit.training.config import RunConfig

PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1
_SHOWN = 4  # changes, in words


@dataclass(frozen=True)
class Action:
    """What a node needs."""

    node: Node
    does: Literal["skip", "resume", "run"]
    why: str
    key: str
    parts: Parts
    aside: bool = False
    """What lies in its folder is moved out of the way first."""


# --- deciding --------------------------------------------------------------------------------------------------------


def decide(pipeline: Pipeline, state: State, names: Sequence[str]) -> list[Action]:
    """What each of these nodes needs, in order. The state is told of the files that were read, and not written."""
    code = code_hash() if pipeline.config.code == "sources" else version("llmkit")
    keys: dict[str, str] = {}
    found: list[Action] = []
    folders = [node.folder for node in pipeline.nodes.values()]
    for node in pipeline.nodes.values():
        parts = parts_of(node, code, keys, folders, state.files)
        keys[node.name] = key_of(parts)
        if node.name in names:
            found.append(_action(node, keys[node.name], parts, state.nodes.get(node.name)))
    return _without_the_needless(found)


def _action(node: Node, key: str, parts: Parts, record: Record | None) -> Action:
    there = node.folder.exists()
    if record is None:
        return Action(node, "run", "not made by this pipeline" if there else "new", key, parts, there)
    if record["key"] != key:
        told = changes(record["parts"], parts)
        more = [f"and {len(told) - _SHOWN} more"] if len(told) > _SHOWN else []
        return Action(node, "run", "; ".join([*told[:_SHOWN], *more]), key, parts, there)
    if record["status"] == "again":
        return Action(node, "run", "asked for", key, parts, there)
    if record["status"] != "done":
        why = {"running": "was killed", "stopped": "was stopped", "failed": "failed"}[record["status"]]
        return Action(node, "resume" if node.resumes else "run", why, key, parts)
    if problem := _problem(node):
        return Action(node, "run", problem, key, parts, there)
    return Action(node, "skip", "done", key, parts)


def _problem(node: Node) -> str | None:
    """Why what was done does not count any more. Sizes are looked at, not hashes: they would take as long as reading."""
    if not node.is_made():
        return "its result is gone"
    if isinstance(node.recipe, RunConfig):
        newest = checkpoints_of(node.folder)[:1]
        if not newest:
            return "its checkpoint is gone"
        try:
            verify(newest[0], hashes=False)
        except Damaged as e:
            return f"its checkpoint is damaged: {e}"
    return None


def _without_the_needless(actions: Sequence[Action]) -> list[Action]:
    """A result that is gone is only made again where it is read, or is nobody's input."""
    found: list[Action] = []
    for action in reversed(actions):
        readers = [one for one in found if action.node.name in one.node.parents]
        gone = action.why.endswith("is gone") and not action.node.folder.exists()
        if gone and readers and all(one.does == "skip" for one in readers):
            action = replace(action, does="skip", why="done; its result is gone, and not needed")
        found.insert(0, action)
    return found


def forget(pipeline: Pipeline, state: State, name: str) -> None:
    """Marks a node and all behind it, where they are done, to be done again."""
    for one in pipeline.behind(name):
        if state.nodes.get(one, {}).get("status") == "done":
            state.nodes[one] = {**state.nodes[one], "status": "again"}
    state.write()


# --- doing -----------------------------------------------------------------------------------------------------------


class Runner:
    """Does what is needed, node by node, and passes signals on."""

    def __init__(self, pipeline: Pipeline, state: State, say: Callable[[str], None]):
        self.pipeline, self.state, self.say = pipeline, state, say
        self.signal: signal.Signals | None = None
        self.child: subprocess.Popen[bytes] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are for the node's process, which saves; then nothing else is begun."""

        def note(number: int, _: Any) -> None:
            self.signal = signal.Signals(number)
            self._pass_on()

        old = {s: signal.signal(s, note) for s in SIGNALS}
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)

    def _pass_on(self) -> None:
        child = self.child
        if child is not None and child.poll() is None and self.signal is not None:
            child.send_signal(self.signal)

    def run(self, actions: Sequence[Action]) -> int:
        """All that is to be done; the exit code: 0, that of the node that failed, or 75 after a signal."""
        for number, action in enumerate(actions, 1):
            if action.does == "skip":
                continue
            if self.signal is not None:
                return PREEMPTED
            self.say(f"\n[{number}/{len(actions)}] {action.node.name}: {action.why}\n$ {action.node.command}")
            if code := self._node(action):
                return code
        return 0

    def _node(self, action: Action) -> int:
        node, before = action.node, self.state.nodes.get(action.node.name, {})
        if action.aside:
            self.say(f"{node.folder} is now {_move_aside(node.folder)}")
        elif action.does == "run":
            _clear(node.folder)
        resumed = before.get("key") == action.key and action.does == "resume"
        told: Record = {
            "does": node.does,
            "folder": str(node.folder),
            "file": node.file,
            "parents": list(node.parents),
            "command": node.command,
            "key": action.key,
            "parts": action.parts,
            "seconds": before.get("seconds", 0.0) if resumed else 0.0,
        }
        self.state.note(node.name, **told, status="running", code=None, finished=None)
        started = time.monotonic()
        if node.file and node.recipe is None:
            disk.mkdir((node.folder / node.file).parent)
        code = self._process(node)
        told["seconds"] = round(told["seconds"] + time.monotonic() - started, 1)
        if code == 0 and node.is_made():
            took = {"seconds": told["seconds"], "steps": getattr(node.recipe, "steps", None)}
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self.state.note(node.name, **told, status="done", code=0, finished=now, took=took)
            return 0
        stopped = self.signal is not None or code == PREEMPTED or (code != 0 and (node.folder / "PREEMPTED").is_file())
        self.state.note(node.name, **told, status="stopped" if stopped else "failed", code=code)
        if stopped:
            return PREEMPTED
        return self._failed(node, code)

    def _failed(self, node: Node, code: int) -> int:
        if code < 0:
            self.say(f"error: {node.name}: killed by {signal.Signals(-code).name}{' (out of memory?)' * (code == -9)}")
            return 1
        if code == 0:
            self.say(f"error: {node.name}: ended without {node.folder / (node.file or 'DONE')}")
            return 1
        self.say(f"error: {node.name}: exit code {code}, see above: what was done is kept, the same command goes on")
        return code

    def _process(self, node: Node) -> int:
        """Runs a node's command; its exit code, negative if a signal killed it.

        It has a process group of its own, so that a Ctrl-C reaches it once, through this process. Should this process be
        killed, so is it: two of them would otherwise work in one folder after the next start.
        """
        sys.stdout.flush()
        self.child = subprocess.Popen(
            node.process,
            stdin=subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,
            preexec_fn=_bound_to(os.getpid(), signal.SIGKILL if node.ranks == 1 else signal.SIGTERM),
        )
        if self.signal is not None:  # it came while the process was started
            self._pass_on()
        try:
            return self.child.wait()
        finally:
            self.child = None


def _environment() -> dict[str, str]:
    """Ours, so that the process runs this very package, also where the working directory holds another one of the name."""
    paths = [str(Path(llmkit.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def _bound_to(parent: int, when_it_dies: signal.Signals) -> Callable[[], None] | None:
    """What ties a new process to this one's life, where the system can (Linux)."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def tie() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(when_it_dies), 0, 0, 0)
        if os.getppid() != parent:  # it died in the meantime
            os._exit(1)

    return tie


# --- folders ---------------------------------------------------------------------------------------------------------


def _move_aside(folder: Path) -> Path:
    """Renames a result that is not wanted any more: NAME.old-1, NAME.old-2, ..."""
    taken = [
        int(m[1])
        for p in folder.parent.iterdir()
        if (m := re.fullmatch(rf"{re.escape(folder.name)}\.old-(\d+)", p.name))
    ]
    aside = folder.with_name(f"{folder.name}.old-{max(taken, default=0) + 1}")
    disk.rename(folder, aside)
    sync_folder(folder.parent)
    return aside


def _clear(folder: Path) -> None:
    """Removes what a killed command left half-made, and the drafts beside it, where it can't go on with them."""
    if folder.exists():
        trash(folder)
    pattern = rf"{re.escape(folder.name)}\.tmp-[0-9a-f]{{8}}|\.trash-{re.escape(folder.name)}-[0-9a-f]{{8}}"
    for path in sorted(folder.parent.glob("*")) if folder.parent.is_dir() else []:
        if re.fullmatch(pattern, path.name):
            disk.remove_tree(path)
