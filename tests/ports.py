"""A port of this machine for the processes of a test to meet at."""

from __future__ import annotations

import random
import socket

_PICK = random.SystemRandom()


def free_port() -> int:
    """Free now, and in a moment: below those that the kernel hands out itself, to connections as to whoever binds port 0."""
    while True:
        port = _PICK.randrange(12_000, 32_000)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
