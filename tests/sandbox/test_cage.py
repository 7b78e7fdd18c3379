"""Programs in the sandbox: what becomes of them, and that the host never notices."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile import PROGRAMS

from llmkit.config import UserError
from llmkit.sandbox import cage
from llmkit.sandbox.cage import Sandbox, Worker
from llmkit.sandbox.config import SandboxConfig
from llmkit.sandbox.proof import prove
from llmkit.sandbox.verdict import Program, Result

LIMITS = SandboxConfig(timeout_s=0.5, memory_mb=256, file_mb=8, output_kb=16, workers=1)
PATIENT = LIMITS.model_copy(update={"timeout_s": 10.0})


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox(PATIENT)
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker(unsafe=False)
    yield worker
    worker.close()


def descendants(pid: int) -> list[int]:
    """All processes below one, by the host's view."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


# --- what becomes of a program --------------------------------------------------------------------------------------


def test_passed_wrong_and_crash_are_told_apart(sandbox: Sandbox) -> None:
    code = "def f(x):\n    return x + 1"
    results = sandbox.run(
        [
            Program(code, ("assert f(1) == 2",)),
            Program(code, ("assert f(1) == 2", "assert f(1) == 3", "f('a')", "assert f(2) == 3")),
            Program("raise ValueError('no')", ("assert True",)),
            Program(code + "\nsyntax error"),
            Program(""),
        ]
    )
    assert [r.status for r in results] == ["passed", "wrong", "crash", "crash", "passed"]
    assert results[1].passed == (True, False, False, True)
    assert results[2].passed == (False,) and results[2].message == "ValueError: no"


def test_standard_input_and_output(sandbox: Sandbox) -> None:
    """A program of a contest: reads lines, prints lines; blanks at the ends of lines don't count."""
    code = (
        "n = int(input())\nfor _ in range(n):\n    print(sum(map(int, input().split())), '')\nimport sys\nsys.exit(0)"
    )
    right = Program(code, stdin="2\n1 2\n3 4\n", expected="3\n7")
    results = sandbox.run(
        [right, Program(code, stdin="1\n1 2\n", expected="4"), Program("print(input())", stdin="汉字 é")]
    )
    assert [r.status for r in results] == ["passed", "wrong", "passed"]
    assert results[2].stdout == "汉字 é\n"


def test_programs_are_kept_apart(sandbox: Sandbox) -> None:
    """What one program leaves in memory, modules, files or the state of random is gone for the next."""
    dirty = (
        "import random, math, builtins\nmath.pi = 3\nbuiltins.left = 1\nrandom.random()\nopen('left', 'w').write('x')"
    )
    look = (
        "import random, math, builtins, os\n"
        "print(math.pi > 3.1, hasattr(builtins, 'left'), os.listdir('.'), random.random(), list({'x', 'y', 'z'}))"
    )
    before = sandbox.run([Program(look)])[0]
    sandbox.run([Program(dirty)])
    assert sandbox.run([Program(look)])[0].stdout == before.stdout  # the order of sets too: rewards are repeatable
    assert before.stdout.startswith("True False [] ")


def test_results_come_in_order_and_from_threads() -> None:
    """B71: nothing here uses signals, so graders may run in any thread, several at once."""
    sandbox = Sandbox(PATIENT.model_copy(update={"workers": 3}))
    programs = [Program(f"import time\ntime.sleep({0.05 * (i % 3)})\nprint({i})") for i in range(9)]
    seen: list[list[Result]] = []
    threads = [threading.Thread(target=lambda: seen.append(sandbox.run(programs))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sandbox.close()
    assert [[r.stdout for r in results] for results in seen] == [[f"{i}\n" for i in range(9)]] * 2


def test_a_broken_worker_is_a_failure_of_the_sandbox(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """B71: it says nothing of the program, and the next one finds a new worker."""
    sandbox.start()
    worker = sandbox._idle.get()
    assert worker is not None
    worker._process.kill()
    sandbox._idle.put(worker)
    results = [sandbox.run([Program("print(1)")])[0] for _ in range(2)]
    assert [r.status for r in results] == ["failure", "passed"] and "sandbox" in results[0].message


def test_a_closed_sandbox_starts_again(sandbox: Sandbox) -> None:
    sandbox.close()
    assert sandbox.run([Program("print(1)")])[0].status == "passed"


# --- hostile programs (X1) ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """A file, a folder, a server and a process that nobody in the sandbox must reach."""
    folder = tmp_path_factory.mktemp("host")
    (folder / "secret").write_text("secret")
    folder.chmod(0o777)
    os.environ["LLMKIT_TEST_SECRET"] = "secret"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield {"folder": str(folder), "port": server.getsockname()[1], "pid": os.getpid()}
        with pytest.raises(BlockingIOError):
            server.accept()
    del os.environ["LLMKIT_TEST_SECRET"]
    assert sorted(os.listdir(folder)) == ["secret"] and (folder / "secret").read_text() == "secret"


@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_programs_are_contained_and_told_apart(name: str, worker: Worker, host: dict[str, object]) -> None:
    """X1: every one of them ends as it must, and leaves nothing behind in the worker."""
    status, code = PROGRAMS[name]
    code = code.replace("{{", "{").replace("}}", "}")
    for key, value in host.items():
        code = code.replace(f"{{{key}}}", str(value))
    tests = ("assert True",) if "test" in name or name == "speaks for the judge" else ()
    result = worker.run(Program(code, tests), LIMITS if status == "timeout" else PATIENT)
    assert "ESCAPED" not in result.stdout, result
    assert result.status == status, result
    assert len(descendants(worker._process.pid)) == 1  # the process that waits for programs, and nothing else
    assert worker.run(Program("print(6 * 7)"), PATIENT).stdout == "42\n"


def test_there_are_enough_of_them() -> None:
    assert len(PROGRAMS) >= 30


def test_processes_are_bounded_where_some_are_allowed() -> None:
    """A fork bomb with room for eight processes: they are all there is, and all of them end with the program."""
    many = PATIENT.model_copy(update={"processes": 8, "timeout_s": 1.0})
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    orphan = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(100)\n    os._exit(0)"
    )
    thread = "import threading\nt = threading.Thread(target=print, args=('hi',))\nt.start()"
    worker = Worker(unsafe=False)
    try:
        prove(worker, many)
        most, done = 0, threading.Event()
        results: list[Result] = []

        def explode() -> None:
            results.append(worker.run(Program(bomb), many))
            done.set()

        running = threading.Thread(target=explode)
        running.start()
        while not done.wait(0.05):
            most = max(most, len(descendants(worker._process.pid)))
        running.join()
        assert results[0].status in ("timeout", "memory")
        assert 1 < most <= 2 + 8  # Z and B beside them
        assert worker.run(Program(orphan), many).status == "passed"
        assert len(descendants(worker._process.pid)) == 1
        assert worker.run(Program(thread), many).stdout == "hi\n"
    finally:
        worker.close()


def test_programs_die_with_their_host(tmp_path: Path) -> None:
    """A trainer that is killed leaves no program running."""
    worker = Worker(unsafe=False)

    def run() -> None:
        with pytest.raises(OSError, match="process ended"):
            worker.run(Program("while True: pass"), PATIENT)

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 10
    while len(family := descendants(worker._process.pid)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    worker._process.stdin.close()  # what the end of this process would do
    thread.join(10)
    worker.close()
    while any(Path(f"/proc/{pid}").exists() for pid in family):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- the levels -----------------------------------------------------------------------------------------------------


def test_the_levels_that_hold_are_told(sandbox: Sandbox) -> None:
    assert sandbox.describe().startswith("namespaces")


def test_an_ordinary_user_has_the_same_cage(monkeypatch: pytest.MonkeyPatch) -> None:
    """With user namespaces nobody needs to be root. (Modules come first: nobody may not reach this Python's folder.)"""
    if os.geteuid() == 0:
        become = (
            "import importlib, os; from llmkit.sandbox import child, kernel\n"
            "for name in child._PRELOADED.split() + ['json', 'socket', 'encodings.idna']: importlib.import_module(name)\n"
            "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
            "kernel.set_dumpable(True); child.main()"
        )
        start = cage._START.partition("from llmkit")[0].replace("; ", "\n")
        monkeypatch.setattr(cage, "_START", start + become)
    worker = Worker(unsafe=False)
    try:
        assert worker.levels["caged"]
        prove(worker, PATIENT)
    finally:
        worker.close()


def test_no_cage_no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where namespaces are not to be had it is refused in one sentence that says what to do; `unsafe` goes on."""
    broken = cage._START.replace(
        "main()",
        "import llmkit.sandbox.kernel as k; k.unshare = lambda flags: (_ for _ in ()).throw(OSError(1, 'no')); main()",
    )
    monkeypatch.setattr(cage, "_START", broken)
    with pytest.raises(UserError, match=r"no cage .*allow user namespaces.*unsafe: true"):
        Sandbox(PATIENT).run([Program("print(1)")])
    unsafe = Sandbox(PATIENT.model_copy(update={"unsafe": True}))
    assert unsafe.describe().startswith("NO NAMESPACES")
    programs = [Program("open('x', 'w').write('1')\nprint(open('x').read())"), Program("while True:\n    pass")]
    programs.append(Program("x = 'a' * 10**10"))
    unsafe.config = unsafe.config.model_copy(update={"timeout_s": 1.0})
    assert [r.status for r in unsafe.run(programs)] == ["passed", "timeout", "memory"]
    unsafe.close()


class Leaky:
    """A worker that runs programs in this very world."""

    def __init__(self, worker: Worker, leak: str):
        self.worker, self.leak = worker, leak

    def run(self, program: Program, limits: SandboxConfig) -> Result:
        if "found" in program.code:
            return Result("passed", "", (), f'["{self.leak}"]')
        return self.worker.run(program, limits)


def test_a_cage_that_leaks_is_not_used(worker: Worker) -> None:
    prove(worker, PATIENT)
    with pytest.raises(UserError, match="leaks: a program in it reads files of the host"):
        prove(Leaky(worker, "reads files of the host"), PATIENT)


def test_the_proof_sees_a_leak() -> None:
    """Its attempts do get through where nothing holds them: in a worker without namespaces, Landlock and seccomp."""
    open_world = (
        "import llmkit.sandbox.child as c\nc.kernel.landlock_version = lambda: 0\n"
        "c.kernel.seccomp_is_known = lambda: False\nc.kernel.drop_capabilities = lambda: None\nc.main()"
    )
    start, cage._START = cage._START, cage._START.partition("from llmkit")[0].replace("; ", "\n") + open_world
    try:
        worker = Worker(unsafe=True)
    finally:
        cage._START = start
    try:
        with pytest.raises(
            UserError, match=r"leaks: .*network.*reads files.*writes files.*sees other processes.*started 64"
        ):
            prove(worker, PATIENT)
    finally:
        worker.close()
