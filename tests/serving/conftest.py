"""A tiny chat model behind a real server."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from serving_client import CONTEXT, tiny

from llmkit.inference.engine.config import EngineConfig
from llmkit.inference.engine.engine import Engine
from llmkit.serving.config import Limits, ServingConfig
from llmkit.serving.service import Service


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Running:
    """A server in a thread of its own, with what a test may look at."""

    service: Service
    port: int
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def idle(self) -> bool:
        """Nothing is held for anybody."""
        c = self.service.worker.counters
        return not (self.service.pending or c.n_running or c.n_waiting or c.blocks_in_use)


Start = Callable[..., Running]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts servers, and ends them with the module."""
    for library in ("starlette", "uvicorn"):
        pytest.importorskip(library, reason="the extra serve is not installed")
    from llmkit.serving.server import make_server

    stops: list[Callable[[], None]] = []

    def begin(limits: dict[str, Any] | None = None, chat: bool = True, **config: Any) -> Running:
        model, tokenizer = tiny()
        engine = Engine(model, tokenizer, EngineConfig(max_rows=8, cache_tokens=8 * CONTEXT))
        told = ServingConfig(name="tiny", limits=Limits(**(limits or {})), **config)
        service = Service(told, model, tokenizer, engine, chat)
        server, listener = make_server(service), socket.create_server(("127.0.0.1", 0), backlog=256)
        loops: list[asyncio.AbstractEventLoop] = []

        async def serve() -> None:
            loops.append(asyncio.get_running_loop())
            await server.serve(sockets=[listener])

        thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            thread.join(0.01)

        def stop() -> None:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()

        stops.append(stop)
        return Running(service, listener.getsockname()[1], loops[0])

    yield begin
    for stop in stops:
        stop()


@pytest.fixture(scope="module")
def server(start: Start) -> Running:
    """One with the default limits and no key."""
    return start()
