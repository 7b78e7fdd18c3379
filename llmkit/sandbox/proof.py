"""The sandbox's own test, before the first program of others: it tries to get out, within bounds that harm nobody."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Protocol

from llmkit.config import UserError
from llmkit.sandbox.config import SandboxConfig
from llmkit.sandbox.verdict import Program, Result


class Runs(Protocol):
    """A worker."""

    def run(self, program: Program, limits: SandboxConfig) -> Result: ...


_CHILDREN = 64  # as many as the fork test tries: no bomb, even where nothing stops it

_ESCAPES = """
import json, os, socket, time
folder, port, host_pid = {folder!r}, {port}, {pid}
found = []
def attempt(name, action):
    try:
        action()
    except OSError:
        return
    found.append(name)
attempt("connects to this machine's network", lambda: socket.create_connection(("127.0.0.1", port), 0.5))
attempt("reads files of the host", lambda: open(os.path.join(folder, "secret")).read())
attempt("writes files of the host", lambda: open(os.path.join(folder, "left"), "w").write("x"))
attempt("sees other processes", lambda: os.kill(host_pid, 0))
if os.environ.get({variable!r}):
    found.append("sees the environment")
children = []
for _ in range({children}):
    try:
        pid = os.fork()
    except OSError:
        break
    if pid == 0:
        time.sleep(0.2)
        os._exit(0)
    children.append(pid)
for pid in children:
    os.waitpid(pid, 0)
if len(children) >= {processes}:
    found.append(f"started {{len(children)}} processes")
print(json.dumps(found))
"""


def prove(worker: Runs, config: SandboxConfig) -> None:
    """Has a worker run programs that try what they must not be able to do.

    Raises:
        UserError: naming what got through. With `unsafe`, only the limits of time and output are asked for.
    """
    short = config.model_copy(update={"timeout_s": min(0.3, config.timeout_s)})
    expected = [
        ("passed", config, Program("def f(x):\n    return x + 1", ("assert f(1) == 2",))),
        ("wrong", config, Program("def f(x):\n    return x", ("assert f(1) == 2",))),
        ("crash", config, Program("raise SystemExit(0)", ("assert True",))),
        ("timeout", short, Program("while True:\n    pass")),
        ("output", config, Program(f"print('x' * {(config.output_kb + 64) << 10})")),
    ]
    if not config.unsafe:
        expected.append(("memory", config, Program(f"x = bytearray({(config.memory_mb + 64) << 20})")))
    for status, limits, program in expected:
        result = worker.run(program, limits)
        if result.status != status:
            raise UserError(
                f"the sandbox failed its own test: {program.code[:40]!r} gave '{result.status}' "
                f"({result.message or result.stderr[-200:]}), '{status}' expected"
            )
    if not config.unsafe and (found := _escapes(worker, config)):
        raise UserError(f"the sandbox leaks: a program in it {', '.join(found)}: nothing is run in it")


def _escapes(worker: Runs, config: SandboxConfig) -> list[str]:
    """What a program got done that it must not: it is given a server, a file and a folder that all may use."""
    variable = next(iter(os.environ.keys() - {"LC_ALL", "PYTHONHASHSEED", "PYTHONUTF8"}), "HOME")
    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as server:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "secret").write_text("secret", "utf-8")
        told = {
            "folder": name, "port": server.getsockname()[1], "pid": os.getpid(), "variable": variable,
            "children": _CHILDREN, "processes": config.processes,
        }  # fmt: skip
        result = worker.run(Program(_ESCAPES.format(**told)), config)
        if result.status != "passed":
            raise UserError(f"the sandbox failed its own test: {result.status}: {result.message}")
        found: list[str] = json.loads(result.stdout)
        if (folder / "left").exists() and "writes files of the host" not in found:
            found.append("writes files of the host")
    return found
