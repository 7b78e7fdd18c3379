"""What runs in the cage: a process that locks itself up, and forks one locked-up process for every program.

    A  started by `cage`: makes the root folder and the namespaces, then waits for Z
    Z  process 1 of a namespace of its own; trusted; reads programs from a pipe and answers with verdicts
    B  one per program: process 1 of another namespace, so that whatever the program started dies with it; trusted
    C  the program, without capabilities, below resource limits, Landlock and seccomp

Standard library alone. Frames on both pipes: four bytes of length, then JSON.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import resource
import select
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import types
from typing import Any, NoReturn

from llmkit.sandbox import kernel

# Imported before the first program, so that a program finds them at no cost.
_PRELOADED = (
    "abc array ast bisect calendar cmath collections contextlib copy dataclasses datetime decimal enum fractions functools"
    " hashlib heapq io itertools json math numbers operator queue random re statistics string struct textwrap time"
    " traceback typing unittest"
)
_NOBODY, _INSIDE = 65534, 1000
_MINE = 3  # A, Z and B: they count as processes of the program's user too
_DEVICES = ("null", "zero", "full", "random", "urandom")
_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache")
_MOST_FRAME = 64 << 20
_MESSAGE = 500  # characters of an exception that are passed on


# --- frames ----------------------------------------------------------------------------------------------------------


def read_exactly(fd: int, n: int) -> bytes:
    """n bytes, or fewer at the end of the stream."""
    parts = []
    while n and (part := os.read(fd, min(n, 1 << 20))):
        parts.append(part)
        n -= len(part)
    return b"".join(parts)


def read_frame(fd: int) -> Any:
    """The next message; None at the end of the stream."""
    head = read_exactly(fd, 4)
    size = int.from_bytes(head, "little")
    if len(head) < 4 or size > _MOST_FRAME:
        return None
    data = read_exactly(fd, size)
    return json.loads(data) if len(data) == size else None


def write_frame(fd: int, message: Any) -> None:
    data = json.dumps(message).encode()
    _write(fd, len(data).to_bytes(4, "little") + data)


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


# --- the cage --------------------------------------------------------------------------------------------------------


def _flags_of(path: str) -> int:
    """The mount flags that a remount must keep: in a user namespace they are locked."""
    found = os.statvfs(path).f_flag
    kept = found & (kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC | 1024 | 2048)  # noatime, nodiratime
    return kept | (1 << 21 if found & 4096 else 0)  # relatime


def _build_root(folders: list[str]) -> None:
    """Mounts a new root at /tmp and enters it: read-only folders of the host, five devices, an empty /tmp, no /proc."""
    sources = [p for p in dict.fromkeys([*folders, *_LIBRARIES]) if os.path.exists(p)]
    sources += [f"/dev/{name}" for name in _DEVICES]
    # By number, since the new root covers what lies in the old /tmp.
    opened = {path: os.open(path, os.O_PATH) for path in sources}
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", "/tmp", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,mode=755")
    for path, fd in opened.items():
        target = "/tmp" + path
        if stat.S_ISDIR(os.stat(fd).st_mode):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        kernel.mount(f"/proc/self/fd/{fd}", target, None, kernel.MS_BIND | kernel.MS_REC)
        flags = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_NOSUID | _flags_of(target)
        kernel.mount(None, target, None, flags if path.startswith("/dev/") else flags | kernel.MS_RDONLY)
        os.close(fd)
    os.makedirs("/tmp/tmp", exist_ok=True)
    locked = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_RDONLY
    kernel.mount(None, "/tmp", None, kernel.MS_REMOUNT | kernel.MS_BIND | locked)
    kernel.change_root("/tmp")


def _map_user(proc: int) -> None:
    """In a new user namespace: this user, who is no one special in there, and nobody else."""
    user, group = os.getuid(), os.getgid()
    for name, text in (("setgroups", "deny"), ("gid_map", f"{_INSIDE} {group} 1"), ("uid_map", f"{_INSIDE} {user} 1")):
        fd = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def enter_cage(folders: list[str]) -> int:
    """Leaves the host's users, files, network and processes behind; what is forked next is process 1 of a new world.

    Root becomes nobody, since limits on processes don't hold for root; its folders are mounted before, as nobody could
    not reach them.

    Returns:
        /proc of the outside as a file descriptor, which no program ever gets.
    """
    proc = os.open("/proc", os.O_PATH)
    with contextlib.suppress(OSError):  # the first to go when memory runs out
        fd = os.open("self/oom_score_adj", os.O_WRONLY, dir_fd=proc)
        os.write(fd, b"1000")
        os.close(fd)
    if os.geteuid() == 0:
        kernel.unshare(kernel.CLONE_NEWNS)
        _build_root(folders)
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        kernel.set_dumpable(True)  # else root owns its files in /proc
        kernel.unshare(kernel.CLONE_NEWUSER)
        _map_user(proc)
    else:
        kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS)
        _map_user(proc)
        _build_root(folders)
    kernel.unshare(
        kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | kernel.CLONE_NEWCGROUP
    )
    return proc


class Locks:
    """Which levels hold here, beyond the resource limits, which always do."""

    def __init__(self, caged: bool, folders: list[str]):
        self.caged = caged
        self.readable = [p for p in dict.fromkeys((*folders, *_LIBRARIES)) if os.path.exists(p)]
        self.landlock = kernel.landlock_version() if sys.platform == "linux" else 0
        self.seccomp = sys.platform == "linux" and kernel.seccomp_is_known()
        if sys.platform == "linux":
            kernel.bound_capabilities()
        if self.seccomp:
            for may_fork in (False, True):
                kernel.seccomp_filter(may_fork)

    def apply(self, job: dict[str, Any], here: str) -> None:
        """Locks this process, which is about to become the program, for good."""
        _limit(job, self.caged)
        if sys.platform != "linux":
            return
        kernel.no_new_privileges()
        kernel.drop_capabilities()
        if self.landlock:
            kernel.landlock(self.landlock, self.readable, [here, *(f"/dev/{name}" for name in _DEVICES)])
        if self.seccomp:
            kernel.seccomp(kernel.seccomp_filter(job["processes"] > 1))


def _limit(job: dict[str, Any], caged: bool) -> None:
    megabyte = 1 << 20
    seconds = int(job["timeout_s"]) + 1
    limits = {
        "AS": job["memory_mb"] * megabyte, "CPU": seconds, "FSIZE": job["file_mb"] * megabyte, "NOFILE": 64, "CORE": 0,
        "MEMLOCK": 0, "MSGQUEUE": 0, "NICE": 0, "RTPRIO": 0, "SIGPENDING": 64,
    }  # fmt: skip
    if caged:
        limits["NPROC"] = _MINE + job["processes"]
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            with contextlib.suppress(OSError, ValueError):  # macOS knows some by name only
                resource.setrlimit(kind, (value, value + (name == "CPU")))


# --- one program -----------------------------------------------------------------------------------------------------


def _program(job: dict[str, Any], tell_fd: int) -> NoReturn:
    """C, locked up: runs the program and its tests, and tells how far they got."""
    token = job["token"]

    def tell(kind: str, text: str = "") -> None:
        _write(tell_fd, (json.dumps([token, kind, text[:_MESSAGE]]) + "\n").encode())

    sys.stdin = io.TextIOWrapper(io.FileIO(0, "r", closefd=False), encoding="utf-8", errors="replace")
    out = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding="utf-8", errors="replace")
    sys.stdout = out
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "utf-8", "replace", write_through=True)
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    for name in [n for n in sys.modules if n.partition(".")[0] == "llmkit"]:
        del sys.modules[name]
    sys.modules["random"].seed(0)
    stage = "code"
    try:
        exec(compile(job["code"], "<answer>", "exec"), main.__dict__)
        tell("ready")
        stage = "test"
        for number, test in enumerate(job["tests"]):
            try:
                exec(compile(test, f"<test {number}>", "exec"), main.__dict__)
            except Exception as e:
                tell("memory" if isinstance(e, MemoryError) else "fail", f"{type(e).__name__}: {e}")
            else:
                tell("pass")
        threading._shutdown()  # type: ignore[attr-defined]  # as at the end of any program: waits for its threads
        sys.stdout.flush()
        out.flush()
        tell("done")
    except SystemExit as e:
        ended_well = stage == "code" and not job["tests"] and e.code in (None, 0)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        tell("done" if ended_well else "exit", f"SystemExit: {e.code}")
    except MemoryError:
        tell("memory", "MemoryError")
    except BaseException as e:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        tell("error", f"{type(e).__name__}: {e}")
    os._exit(0)


def _init(job: dict[str, Any], locks: Locks, here: str, ends: tuple[int, int, int, int]) -> NoReturn:
    """B: gives the program a folder of its own, starts it, and tells how it ended."""
    out, err, tell, status = ends
    if sys.platform == "linux":
        kernel.die_with_parent()
    if locks.caged:
        kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC)
        flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
        kernel.mount("tmpfs", here, "tmpfs", flags, f"size={job['file_mb']}m,nr_inodes=1024,mode=700")
        kernel.set_dumpable(False)
    os.chdir(here)
    with tempfile.TemporaryFile(dir=here) as file:
        file.write(job["stdin"].encode("utf-8", "surrogatepass"))
        file.flush()
        file.seek(0)
        os.dup2(file.fileno(), 0)
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            os.dup2(out, 1)
            os.dup2(err, 2)
            tell = os.dup2(tell, 3)
            os.closerange(4, 256)
            locks.apply(job, here)
        except BaseException as e:  # nothing of the program has run
            _write(tell, (json.dumps([job["token"], "failure", f"{type(e).__name__}: {e}"]) + "\n").encode())
            os._exit(1)
        _program(job, tell)
    for fd in (0, out, err, tell):
        os.close(fd)
    while (ended := os.wait())[0] != pid:
        pass
    _write(status, str(os.waitstatus_to_exitcode(ended[1])).encode())
    os._exit(0)


class Runner:
    """Z: runs one program after the other."""

    def __init__(self, locks: Locks, requests: int, own_world: int | None):
        self.locks, self.requests, self.own_world = locks, requests, own_world

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """What became of a program; it and all that it started are gone afterwards."""
        here = "/tmp" if self.locks.caged else tempfile.mkdtemp(prefix="llmkit-")
        pipes = [os.pipe() for _ in range(4)]
        if self.own_world is not None:
            kernel.unshare(kernel.CLONE_NEWPID)
        pid = os.fork()
        if pid == 0:
            try:
                if not self.locks.caged:
                    os.setpgid(0, 0)
                for end, _ in pipes:
                    os.close(end)
                _init(job, self.locks, here, tuple(end for _, end in pipes))  # type: ignore[arg-type]
            except BaseException as e:
                message = json.dumps([job["token"], "failure", f"{type(e).__name__}: {e}"]) + "\n"
                _write(pipes[2][1], message.encode())
            os._exit(1)
        if self.own_world is not None:
            kernel.setns(self.own_world, kernel.CLONE_NEWPID)
        for _, end in pipes:
            os.close(end)
        try:
            return self._watch(job, pid, [end for end, _ in pipes])
        finally:
            for end, _ in pipes:
                os.close(end)
            if not self.locks.caged:
                shutil.rmtree(here, ignore_errors=True)

    def _watch(self, job: dict[str, Any], pid: int, ends: list[int]) -> dict[str, Any]:
        """Collects what is written until the program ends, writes too much or takes too long; then kills the rest."""
        texts = {end: bytearray() for end in ends}
        out, err, told, status = ends
        most = {
            out: job["output_kb"] << 10,
            err: job["output_kb"] << 10,
            told: (1 + len(job["tests"])) * 4096,
            status: 16,
        }
        deadline = time.monotonic() + job["timeout_s"]
        open_ends, reason = set(ends), ""
        while status in open_ends and not reason:
            left = deadline - time.monotonic()
            ready = select.select([*open_ends, self.requests], [], [], max(0.0, left))[0]
            if self.requests in ready:  # nothing is sent meanwhile, so this is its end: who asked is gone
                os._exit(0)
            if not ready:
                reason = "timeout"
            for end in ready:
                data = os.read(end, 65536)
                texts[end] += data
                if not data:
                    open_ends.remove(end)
                elif len(texts[end]) > most[end]:
                    reason = "output"
        self._kill(pid)
        for end in open_ends - {status}:
            os.set_blocking(end, False)
            with contextlib.suppress(BlockingIOError):
                while (data := os.read(end, 65536)) and len(texts[end]) <= most[end]:
                    texts[end] += data
        if not reason and any(len(texts[end]) > most[end] for end in ends):
            reason = "output"
        code = bytes(texts[status]).decode() or None
        return {
            "reason": reason,
            "exit": None if code is None else int(code),
            "told": bytes(texts[told][: most[told]]).decode("utf-8", "replace"),
            "stdout": bytes(texts[out][: most[out]]).decode("utf-8", "replace"),
            "stderr": bytes(texts[err][-2000:]).decode("utf-8", "replace"),
        }

    def _kill(self, pid: int) -> None:
        """Ends B, and with it its namespace; without one, the process group."""
        with contextlib.suppress(ProcessLookupError):
            if not self.locks.caged:
                os.killpg(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# --- start -----------------------------------------------------------------------------------------------------------


def _serve(locks: Locks, requests: int, replies: int, own_world: int | None) -> None:
    runner = Runner(locks, requests, own_world)
    write_frame(replies, {"caged": locks.caged, "landlock": locks.landlock, "seccomp": locks.seccomp})
    gc.collect()
    gc.freeze()  # what is there now is shared by all programs
    while (job := read_frame(requests)) is not None:
        write_frame(replies, runner.run(job))


def main() -> None:
    """A, until it forks Z. The first frame says `unsafe` and which `folders` programs may read."""
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    os.close(nothing)
    settings = read_frame(requests)
    if settings is None:
        return
    folders = settings["folders"]
    sys.path[:] = [p for p in sys.path if any(p == f or p.startswith(f"{f}/") for f in folders)]
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name in _PRELOADED.split():
        importlib.import_module(name)
    if settings["unsafe"]:
        _serve(Locks(False, folders), requests, replies, None)
        return
    try:
        proc = enter_cage(folders)
        z = os.fork()
    except OSError as e:
        write_frame(replies, {"error": str(e)})
        return
    if z:
        for fd in (requests, replies, proc):
            os.close(fd)
        os.waitpid(z, 0)
        return
    try:
        kernel.die_with_parent()
        own_world = os.open("self/ns/pid", os.O_RDONLY, dir_fd=proc)
        os.close(proc)
    except OSError as e:
        write_frame(replies, {"error": str(e)})
        os._exit(1)
    with contextlib.suppress(KeyboardInterrupt):
        _serve(Locks(True, folders), requests, replies, own_world)
    os._exit(0)
