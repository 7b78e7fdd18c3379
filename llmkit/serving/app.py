"""The application: paths, streams, and the shape of errors."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator
from importlib.resources import files

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llmkit.serving.guard import Guard, error_response
from llmkit.serving.schema import ApiError, ChatRequest, CompletionRequest, EmbeddingRequest, read
from llmkit.serving.service import Service, Writing

CHAT = "/v1/chat/completions"


class EventStream(Response):
    """A streamed answer. The request is closed however it ends, also when the client leaves before the first byte."""

    def __init__(self, service: Service, writing: Writing, with_usage: bool):
        super().__init__(media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.service, self.writing, self.with_usage = service, writing, with_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with contextlib.aclosing(self.service.pieces(self.writing, self.with_usage)) as pieces:
                async for piece in pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.service.close(self.writing)


def build_app(service: Service) -> ASGIApp:
    """The ASGI application of a service."""

    async def text(request: Request) -> Response:
        data, chat = await request.body(), request.url.path == CHAT
        body: ChatRequest | CompletionRequest = (
            read(ChatRequest, data, service.limits) if chat else read(CompletionRequest, data, service.limits)
        )
        writing = await service.begin(body)
        if body.stream:
            return EventStream(service, writing, body.stream_options is not None and body.stream_options.include_usage)
        try:
            return JSONResponse(await service.whole(writing))
        finally:
            service.close(writing)

    async def embeddings(request: Request) -> Response:
        body: EmbeddingRequest = read(EmbeddingRequest, await request.body(), service.limits)
        return JSONResponse(await service.embed(body))

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [service.model_card()]})

    async def one_model(request: Request) -> Response:
        service.check_model(request.path_params["name"])
        return JSONResponse(service.model_card())

    async def health(_: Request) -> Response:
        broken = service.worker.stopped
        return JSONResponse({"status": "ok" if broken is None else str(broken)}, 200 if broken is None else 503)

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(service.metrics_text(), media_type="text/plain; version=0.0.4")

    page, policy = read_page()

    async def chat_page(_: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    routes = [
        Route("/", chat_page),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/completions", text, methods=["POST"]),
        Route(CHAT, text, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers=HANDLERS, lifespan=lifespan)
    app.router.redirect_slashes = False
    return Guard(app, service)


def read_page(name: str = "page.html") -> tuple[str, str]:
    """A page of this folder, and the policy that lets it run its own script and nothing else."""
    page = (files("llmkit.serving") / name).read_text("utf-8")

    def own(tag: str) -> str:
        found = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert found is not None
        return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"

    inline = f"script-src {own('script')}; style-src {own('style')}"
    return (
        page,
        f"default-src 'none'; {inline}; connect-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'",
    )


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:100]}: {error.detail.lower()}"
    return error_response(ApiError(error.status_code, what, code="no_such_path"), error.headers)


async def _bug(_: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "an error of the server: its log tells more", code="internal_error"))


HANDLERS = {ApiError: _api_error, HTTPException: _http_error, Exception: _bug}
"""Errors as clients get them."""
