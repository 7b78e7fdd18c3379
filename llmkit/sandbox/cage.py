"""Runs untrusted Python: the side that is not in the cage. See docs/sandbox.md for what is promised.

Workers are processes that lock themselves up and then fork once for every program, so a program costs milliseconds and
still finds a new world: its own processes, network, folder and memory, which end with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import selectors
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from llmkit.config import UserError
from llmkit.sandbox.child import write_frame
from llmkit.sandbox.config import SandboxConfig
from llmkit.sandbox.proof import prove
from llmkit.sandbox.verdict import Program, Result, judge

__all__ = ["Program", "Result", "Sandbox", "Worker"]

_GRACE_S = 10.0  # what a worker may take beyond a program's own limit before it counts as stuck
_START_S = 30.0
_ROOT = str(Path(__file__).resolve().parents[2])
_START = f"import sys; sys.path.insert(0, {_ROOT!r}); from llmkit.sandbox.child import main; main()"


def _folders() -> list[str]:
    """What programs may read of the host: the standard library."""
    paths = sysconfig.get_paths()
    libraries = [paths["stdlib"], str(Path(paths["stdlib"]) / "lib-dynload")]
    return [p for p in dict.fromkeys(os.path.realpath(p) for p in libraries) if os.path.isdir(p)]


class Worker:
    """One caged process, which runs one program at a time."""

    def __init__(self, unsafe: bool):
        """Raises UserError if the cage cannot be made."""
        self._process = subprocess.Popen(
            # No site packages, nothing of the working directory; sets have the same order every time.
            [sys.executable, "-S", "-s", "-P", "-B", "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"},
            cwd="/",
            start_new_session=True,
        )
        # Called by `close`, or when nobody knows the worker any more, or at the end of this process.
        self._end = weakref.finalize(self, _end, self._process, os.getpid())
        try:
            self._send({"unsafe": unsafe, "folders": _folders()})
            self.levels = self._receive(_START_S)
        except (OSError, ValueError) as e:
            self.close()
            raise UserError(f"the sandbox did not start: {e}") from None
        if "error" in self.levels:
            self.close()
            raise UserError(
                f"no cage for programs is to be had here ({self.levels['error']}): allow user namespaces (Ubuntu: sysctl "
                "kernel.apparmor_restrict_unprivileged_userns=0; Docker: --security-opt seccomp=unconfined), or set "
                "`sandbox: {unsafe: true}` where nothing on the machine is worth protecting"
            )

    def _send(self, message: Any) -> None:
        write_frame(_pipe(self._process.stdin).fileno(), message)

    def _receive(self, seconds: float) -> dict[str, Any]:
        """The next answer. Raises OSError if none comes in time, or the process is gone."""
        fd, deadline = _pipe(self._process.stdout).fileno(), time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)

            def take(n: int) -> bytes:
                data = b""
                while len(data) < n:
                    if not selector.select(max(0.0, deadline - time.monotonic())):
                        raise OSError(f"no answer within {seconds:.0f} s")
                    part = os.read(fd, min(n - len(data), 1 << 20))
                    if not part:
                        raise OSError("its process ended")
                    data += part
                return data

            found = json.loads(take(int.from_bytes(take(4), "little")))
        assert isinstance(found, dict)
        return found

    def run(self, program: Program, limits: SandboxConfig) -> Result:
        """Runs a program. Raises OSError if the worker is broken; it is of no use then."""
        token = secrets.token_hex(16)
        job = {"token": token, "code": program.code, "tests": program.tests, "stdin": program.stdin}
        limited = limits.model_dump(include={"timeout_s", "memory_mb", "file_mb", "output_kb", "processes"})
        self._send(job | limited)
        return judge(program, token, self._receive(limits.timeout_s + _GRACE_S))

    def close(self) -> None:
        """Ends it, and whatever runs in it."""
        self._end()


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """Ends a worker's process; not in a fork of the one that started it."""
    if os.getpid() != owner:
        return
    with contextlib.suppress(OSError):
        _pipe(process.stdin).close()
    try:
        process.wait(1.0)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    _pipe(process.stdout).close()


def _pipe(file: IO[bytes] | None) -> IO[bytes]:
    assert file is not None
    return file


class Sandbox:
    """A pool of workers. Threads may share it. Nothing starts before the first program, or `start`."""

    def __init__(self, config: SandboxConfig | None = None):
        self.config = config or SandboxConfig()
        self.n_workers = self.config.workers or min(8, _cores())
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        self._lock = threading.Lock()
        self._started: dict[str, Any] | None = None

    def start(self) -> None:
        """Starts a worker and lets it prove that it holds what it should.

        Raises:
            UserError: no cage is to be had, or it leaks, and the recipe doesn't allow that.
        """
        with self._lock:
            if self._started is not None:
                return
            worker = Worker(self.config.unsafe)
            try:
                prove(worker, self.config)
            except BaseException:
                worker.close()
                raise
            self._idle = queue.LifoQueue()
            for _ in range(self.n_workers - 1):
                self._idle.put(None)  # started when there is something to do
            self._idle.put(worker)
            self._started = worker.levels

    def describe(self) -> str:
        """Which levels hold; starts the sandbox."""
        self.start()
        levels = self._started
        assert levels is not None
        names = ["namespaces" if levels["caged"] else "NO NAMESPACES (unsafe)"]
        names += [f"Landlock {levels['landlock']}"] * bool(levels["landlock"]) + ["seccomp"] * bool(levels["seccomp"])
        return f"{', '.join(names)}; {self.n_workers} at once, {self.config.timeout_s:g} s, {self.config.memory_mb} MB each"

    def run(self, programs: Sequence[Program]) -> list[Result]:
        """Runs programs side by side; the results are in their order.

        Raises:
            UserError: see `start`.
        """
        if not programs:
            return []
        self.start()
        with ThreadPoolExecutor(min(self.n_workers, len(programs))) as pool:
            return list(pool.map(self._one, programs))

    def _one(self, program: Program) -> Result:
        """Takes a worker that is free; one that breaks is replaced, and the program has no verdict."""
        worker = self._idle.get()
        try:
            worker = worker or Worker(self.config.unsafe)
            return worker.run(program, self.config)
        except (OSError, ValueError, UserError) as e:
            if worker is not None:
                worker.close()
            worker = None
            return Result("failure", f"the sandbox broke: {e}")
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends all workers; the next program starts them again."""
        with self._lock:
            while self._started is not None:
                try:
                    worker = self._idle.get_nowait()
                except queue.Empty:
                    self._started = None
                else:
                    if worker is not None:
                        worker.close()


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1
