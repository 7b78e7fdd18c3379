"""The server on a socket: uvicorn, with an end to clients that neither send nor take."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any, ClassVar

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from llmkit.serving.app import build_app
from llmkit.serving.config import Limits, ServingConfig
from llmkit.serving.service import Service

if TYPE_CHECKING:
    from llmkit.inference.engine.engine import Engine
    from llmkit.model.gpt import GPT
    from llmkit.tokenizer import Tokenizer

KEEP_ALIVE_S = 30  # a connection may be silent between two requests


class PatientProtocol(H11Protocol):
    """uvicorn's, but patient for a limited time: with heads that don't come to an end, and clients that don't read."""

    limits: ClassVar[Limits] = Limits()

    def connection_made(self, transport: Any) -> None:
        """Waits for the first head."""
        super().connection_made(transport)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Waits for the rest of a head that has begun."""
        super().data_received(data)
        self._watch_head()

    def _watch_head(self) -> None:
        waits = self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete)
        if waits and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.read_timeout_s, self.transport.close)
        elif not waits:
            self._head_timer = _no_more(self._head_timer)

    def pause_writing(self) -> None:
        """The client takes nothing: its buffers are full."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It took something."""
        super().resume_writing()
        self._write_timer = _no_more(self._write_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._head_timer, self._write_timer = _no_more(self._head_timer), _no_more(self._write_timer)
        super().connection_lost(exc)


def _no_more(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancels a timer, if there is one; there is none then."""
    if timer is not None:
        timer.cancel()
    return None


def make_server(service: Service) -> uvicorn.Server:
    """A server that is not yet running."""
    return server_of(build_app(service), service.limits)


def server_of(app: ASGIApp, limits: Limits) -> uvicorn.Server:
    """A server of any application, with these limits to its clients' patience."""
    # uvicorn makes protocols by the class alone, so that the limits of this server go into a class of its own.
    protocol = type("Protocol", (PatientProtocol,), {"limits": limits})
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="on",
            loop="asyncio",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(limits.drain_s)),
        )
    )


def serve(
    config: ServingConfig, model: GPT, tokenizer: Tokenizer, engine: Engine, chat: bool, listener: socket.socket
) -> None:
    """Serves on a socket that listens until a signal comes; then what is being answered has `limits.drain_s` to end."""
    make_server(Service(config, model, tokenizer, engine, chat)).run(sockets=[listener])
