"""A port of this machine for the processes of a test to meet at."""

from __future__ import annotations

import fcntl
import itertools
import os
import socket
import tempfile
from pathlib import Path

# Below those that the kernel hands out itself, to connections as to whoever binds port 0.
_FIRST, _END = 12_000, 32_000


def free_port() -> int:
    """Free now, and for long: all tests of this machine go through the ports in turn, so that none is drawn twice before it
    is used."""
    told = Path(tempfile.gettempdir()) / f"llmkit-test-port-{os.getuid()}"
    with told.open("a+") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.seek(0)
        last = int(f.read() or _FIRST)
        for step in itertools.count(1):
            port = _FIRST + (last - _FIRST + step) % (_END - _FIRST)
            with socket.socket() as s:
                try:
                    s.bind(("127.0.0.1", port))
                except OSError:
                    continue
            f.truncate(0)
            f.write(str(port))
            return port
    raise AssertionError
