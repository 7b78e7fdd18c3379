"""What stands before every request: who may ask, how large and how slow a body may be, and whether the client is there.

A client that leaves, before its answer or in the midst of it, cancels what is done for it: otherwise the engine would
write on for nobody.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from typing import Any, Protocol

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmkit.serving.config import Limits, ServingConfig
from llmkit.serving.metrics import Metrics
from llmkit.serving.schema import ApiError

OPEN = ("/", "/health")  # paths that tell nothing, and need no key
COUNTED = (*OPEN, "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/embeddings")
LOCAL = ("localhost", "127.0.0.1", "[::1]")
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
]


class Guarded(Protocol):
    """What stands behind the guard, as far as that must know it."""

    @property
    def config(self) -> ServingConfig: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def metrics(self) -> Metrics: ...


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, service: Guarded):
        self.app, self.service = app, service
        self.limits, self.metrics = service.limits, service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499  # what nginx writes down for a client that left before it was answered

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        try:
            try:
                headers = _headers(scope)
                self._check(scope, headers)
                body = await self._body(scope, headers, receive)
            except ApiError as e:
                # The body may not have been read: the connection can't be used for another request.
                await error_response(e, {"Connection": "close"})(scope, receive, tell)
                return
            if body is not None:
                await self._serve(scope, receive, tell, body)
        finally:
            path = scope["path"] if scope["path"] in COUNTED else "other"
            self.metrics.count(path, status)

    def _check(self, scope: Scope, headers: Mapping[str, str]) -> None:
        key = self.service.config.api_key
        if key is None:
            # A page of elsewhere whose name was made to point to this machine would be of the same origin to a browser.
            host = headers.get("host", "")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name.lower() not in (*LOCAL, self.service.config.host, f"[{self.service.config.host}]"):
                raise ApiError(403, "Host: without an API key only names of this machine are answered", code="host")
        elif scope["path"] not in OPEN:
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), key.encode()):
                what = "a valid API key is needed: send it as Authorization: Bearer KEY"
                raise ApiError(401, what, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if (
            scope["method"] == "POST"
            and headers.get("content-type", "").partition(";")[0].strip() != "application/json"
        ):
            # Browsers send anything else to any server, without asking it first.
            raise ApiError(415, "Content-Type must be application/json", code="content_type")

    async def _body(self, scope: Scope, headers: Mapping[str, str], receive: Receive) -> bytes | None:
        """The whole body; None if the client left."""
        most, length = self.limits.max_body_bytes, headers.get("content-length", "0")
        too_long = ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")
        if length.isdigit() and int(length[:18]) > most:
            raise too_long
        parts, n = [], 0
        try:
            async with asyncio.timeout(self.limits.read_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        self.metrics.disconnects += 1
                        return None
                    parts.append(message.get("body", b""))
                    n += len(parts[-1])
                    if n > most:
                        raise too_long
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            what = f"the body did not come within {self.limits.read_timeout_s:g} s"
            raise ApiError(408, what, code="read_timeout") from None

    async def _serve(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """Runs the application until it has answered, or the client has left."""
        given = False

        async def whole_body() -> Message:
            nonlocal given
            if given:  # nothing more comes; whether the client is there is watched below
                await asyncio.Event().wait()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        answering = asyncio.ensure_future(self.app(scope, whole_body, send))
        leaving = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                self.metrics.disconnects += 1
        finally:
            leaving.cancel()
            if not answering.done():
                answering.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            (outcome,) = await asyncio.gather(answering, return_exceptions=True)
        if isinstance(outcome, Exception):
            raise outcome


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> Any:
    """An ApiError as a client gets it."""
    return JSONResponse(error.body(), error.status, {**error.headers, **(headers or {})})
