"""What the reliability tests share: a tiny recipe, a disk that fails or dies, hashes of a run, processes to kill.

`python tests/reliability.py` is a server that imports torch once and then forks a process for each run it is told of,
so that a test that kills twenty processes doesn't wait for twenty imports.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from llmkit import storage
from llmkit.storage import Damaged, Disk, checkpoints_of, newest_good, sha256_of, verify

WORDS = (
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sat",
    "ran",
    "flew",
    "on",
    "under",
    "mat",
    "tree",
    "hill",
    "then",
    "it",
    "was",
)


def write_text(path: Path, n_words: int = 1200) -> Path:
    """Made-up text with some structure to learn."""
    pick = random.Random(0)
    path.write_text(" ".join(pick.choice(WORDS) for _ in range(n_words)))
    return path


def tiny_recipe(folder: Path, **changes: Any) -> Path:
    """A pretraining recipe of about a second: two epochs and more, dropout, saves beside training, samples.

    Args:
        folder: gets the text, the recipe and the cache, which all runs of the folder share.
        changes: top-level keys; a mapping is merged into the recipe's own.
    """
    recipe: dict[str, Any] = {
        "stage": "pretrain",
        "out": str(folder / "run"),
        "tokenizer": {"kind": "byte"},
        "data": {"path": str(folder / "text.txt"), "valid_frac": 0.1, "cache_dir": str(folder / "cache")},
        "model": {"n_layers": 2, "n_heads": 2, "d_model": 32, "max_seq_len": 32, "dropout": 0.1},
        "batch": {"tokens_per_step": 256, "micro_tokens": 128},
        "optim": {"lr": 3e-3, "ema_decay": 0.9},
        "steps": 48,
        "eval": {"every": 6, "samples": {"prompts": ["the "], "max_new_tokens": 4}},
        "save": {"every": 4, "keep": 2},
        "log": {"tensorboard": False, "plot": False},
        "device": "cpu",
    }
    for key, value in changes.items():
        recipe[key] = {**recipe[key], **value} if isinstance(value, dict) and key in recipe else value
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "text.txt").exists():
        write_text(folder / "text.txt")
    path = folder / f"{Path(recipe['out']).name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def train(recipe: Path, *overrides: str) -> int:
    """`llmkit train` in this process; its exit code."""
    from llmkit.cli import main

    return main(["train", str(recipe), *overrides])


# --- what must be equal ----------------------------------------------------------------------------------------------


def result_of(run: Path) -> dict[str, str]:
    """SHA-256 of all that is promised to be bitwise equal: the final checkpoint but its manifest, and the logs."""
    final, passed_over = newest_good(run)
    assert final is not None and not passed_over, passed_over
    files = {p.relative_to(final).as_posix(): sha256_of(p) for p in final.rglob("*") if p.is_file()}
    del files["manifest.json"]  # it holds the run's name
    logs = {name: sha256_of(run / name) for name in ("metrics.jsonl", "samples.jsonl")}
    return {"final": final.name, **files, **logs}


def assert_same(run: Path, reference: Path) -> None:
    """Bitwise: weights, optimizer, average, state.json, metrics.jsonl, samples.jsonl; nothing is left lying about."""
    a, b = result_of(run), result_of(reference)
    assert {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)} == set()
    steps = [r["step"] for r in read_jsonl(run / "metrics.jsonl") if "train/loss" in r]
    assert steps == list(range(1, len(steps) + 1))  # B117: every step exactly once
    assert leftovers(run) == []


def leftovers(run: Path) -> list[str]:
    """Names that a clean run doesn't leave."""
    return sorted(p.name for p in run.rglob("*") if ".tmp-" in p.name or p.name.startswith(".trash-"))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def good_steps(run: Path) -> list[int]:
    """The steps of all checkpoints that verify, newest first."""
    steps = []
    for folder in checkpoints_of(run):
        try:
            verify(folder)
            steps.append(storage.step_of(folder))
        except Damaged:
            pass
    return steps


def flip_bit(path: Path, bit: int) -> None:
    """Flips one bit in place; again undoes it."""
    with path.open("r+b") as f:
        f.seek(bit // 8)
        (byte,) = f.read(1)
        f.seek(bit // 8)
        f.write(bytes([byte ^ (1 << bit % 8)]))


# --- a disk that fails or dies ---------------------------------------------------------------------------------------


class Crash(BaseException):
    """Stands for the death of the process: nothing of the product catches it."""


class ShimDisk(Disk):
    """Counts file operations; at the n-th it dies (and every later one too), or fails with an errno.

    Dying before operation n + 1 is dying after operation n. `half` does half of a write or of a removal first. Syncs
    are only counted.
    """

    def __init__(self, at: int = 0, error: int | None = None, half: bool = False):
        self.at, self.error, self.half = at, error, half
        self.operations: list[str] = []
        self.dead = False

    def _before(self, name: str, halfway: Callable[[], Any] = lambda: None) -> None:
        if self.dead:
            raise Crash
        self.operations.append(name)
        if len(self.operations) != self.at:
            return
        if self.half:
            halfway()
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        self.dead = True
        raise Crash

    def create(self, path: Path) -> int:
        self._before("create")
        return super().create(path)

    def write(self, fd: int, data: memoryview) -> int:
        self._before("write", lambda: os.write(fd, data[: len(data) // 2]))
        return super().write(fd, data)

    def sync(self, fd: int) -> None:
        self._before("sync")

    def rename(self, old: Path, new: Path) -> None:
        self._before("rename")
        super().rename(old, new)

    def mkdir(self, path: Path) -> None:
        self._before("mkdir")
        super().mkdir(path)

    def unlink(self, path: Path) -> None:
        self._before("unlink")
        super().unlink(path)

    def remove_tree(self, path: Path) -> None:
        def some() -> None:
            files = [p for p in sorted(path.rglob("*")) if p.is_file()]
            for file in files[: len(files) // 2]:
                file.unlink()

        self._before("remove_tree", some)
        super().remove_tree(path)


# --- processes -------------------------------------------------------------------------------------------------------


class Child:
    """One run in a process of its own, started by the server."""

    def __init__(self, server: Server, pid: int, log: Path):
        self._server, self.pid, self._log = server, pid, log

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal; the server reaps only when asked to, so the id is still this process's."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, negative for a signal."""
        return int(self._server.ask({"wait": self.pid})["code"])

    @property
    def said(self) -> str:
        return self._log.read_text()


class Server:
    """Starts runs quickly. A context manager: it ends with the test module."""

    def __init__(self, logs: Path, *stages: str):
        """`stages`: those whose modules are imported once, besides pretraining's."""
        self._logs, self._n = logs, 0
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, __file__, *stages]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **threads}
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def start(self, recipe: Path, *overrides: str) -> Child:
        self._n += 1
        log = self._logs / f"{self._n}.log"
        return Child(self, self.ask({"argv": ["train", str(recipe), *overrides], "log": str(log)})["pid"], log)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """Polls every millisecond or so."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.001)


def last_step(run: Path) -> int:
    """The step of the last line in metrics.jsonl, 0 before there is one."""
    try:
        tail = (run / "metrics.jsonl").read_bytes()[-2000:]
    except FileNotFoundError:
        return 0
    found = re.findall(rb'"step": (\d+)', tail)
    return int(found[-1]) if found else 0


def _serve() -> None:
    import torch

    import llmkit.stages.pretrain  # noqa: F401 (imported once, for all runs)
    from llmkit.cli import main

    for stage in sys.argv[1:]:
        import_module(f"llmkit.stages.{stage}")
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)
            continue
        pid = os.fork()
        if pid:
            print(json.dumps({"pid": pid}), flush=True)
            continue
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        code = 1
        try:
            code = main(request["argv"])
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
