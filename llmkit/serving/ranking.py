"""The page on which people rank answers, and what it asks its server: `llmkit rank --serve`."""

from __future__ import annotations

import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

from pydantic import Field
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from llmkit.config import Config, UserError
from llmkit.serving.app import HANDLERS, read_page
from llmkit.serving.config import Limits, ServingConfig
from llmkit.serving.guard import Guard
from llmkit.serving.metrics import Metrics
from llmkit.serving.schema import ApiError, parse
from llmkit.serving.server import server_of

if TYPE_CHECKING:
    from llmkit.tools.sitting import Question, Sitting

MAX_NAME, MAX_ANSWERS = 60, 1000


class Who(Config):
    """Somebody who ranks."""

    annotator: str = Field(min_length=1, max_length=MAX_NAME, pattern=r"^\S(.*\S)?$")


class Said(Who):
    """What somebody says of a prompt's answers."""

    number: int
    """The prompt."""
    ranking: list[list[int]] | None = Field(None, max_length=MAX_ANSWERS)
    """Groups of answers, best first, equally good ones in one. None: the prompt is skipped."""
    scores: list[float] | None = Field(None, max_length=MAX_ANSWERS)
    """Of each answer, by its number; they must say the same as the ranking."""
    comment: str | None = Field(None, max_length=10_000)


class RankingPage:
    """A sitting behind HTTP.

    Args:
        config: where it listens and who may come.
        sitting: what is asked, and where it is kept.
        annotator: the name that stands in the page's field at first; "" where people give their own.
    """

    def __init__(self, config: ServingConfig, sitting: Sitting, annotator: str = ""):
        self.config, self.sitting, self.annotator = config, sitting, annotator
        self.metrics = Metrics()

    @property
    def limits(self) -> Limits:
        return self.config.limits

    def app(self) -> ASGIApp:
        """The ASGI application."""
        page, policy = read_page("ranking.html")

        async def show(_: Request) -> Response:
            return HTMLResponse(page, headers={"Content-Security-Policy": policy})

        async def health(_: Request) -> Response:
            return JSONResponse({"status": "ok"})

        routes = [
            Route("/", show),
            Route("/health", health),
            Route("/v1/ranking", self._begin),
            Route("/v1/ranking/next", self._next, methods=["POST"]),
            Route("/v1/ranking/judge", self._judge, methods=["POST"]),
            Route("/v1/ranking/undo", self._undo, methods=["POST"]),
            Route("/v1/ranking/agreement", self._agreement),
        ]
        app = Starlette(routes=routes, exception_handlers=HANDLERS)
        app.router.redirect_slashes = False
        return Guard(app, self)

    async def _begin(self, _: Request) -> Response:
        return JSONResponse({"annotator": self.annotator, "name": self.config.name, "total": len(self.sitting.rows)})

    async def _next(self, request: Request) -> Response:
        """May take as long as the model takes to answer."""
        who = parse(Who, await request.body()).annotator
        question = await run_in_threadpool(self.sitting.next, who)
        progress = self.sitting.progress(who)
        return JSONResponse({**progress, "question": None if question is None else _shown(question)})

    async def _judge(self, request: Request) -> Response:
        """Answers when it is on disk."""
        said = parse(Said, await request.body())
        try:
            await run_in_threadpool(
                self.sitting.judge, said.annotator, said.number, said.ranking, said.scores, said.comment
            )
        except UserError as e:
            raise ApiError(400, str(e), str(e).partition(":")[0], "not_kept") from None
        return JSONResponse(self.sitting.progress(said.annotator))

    async def _undo(self, request: Request) -> Response:
        who = parse(Who, await request.body()).annotator
        return JSONResponse({"undone": await run_in_threadpool(self.sitting.undo, who)})

    async def _agreement(self, _: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self.sitting.agreement))


def _shown(question: Question) -> dict[str, Any]:
    """A question as the page has it: the answers with their numbers, in the order in which they are shown."""
    prompt = question.row.prompt
    turns = [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt
    return {
        "number": question.row.number,
        "prompt": [{"role": str(turn["role"]), "content": _text(turn.get("content"))} for turn in turns],
        "answers": [{"id": i, "text": question.responses[i]} for i in question.places],
    }


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "" if content is None else str(content)


def serve(config: ServingConfig, sitting: Sitting, annotator: str, listener: socket.socket) -> None:
    """Serves on a socket that listens, until a signal comes."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"rank at http://{shown}:{port}/ (Ctrl-C ends it; everything is kept)", file=sys.stderr, flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # to stop a server is no failure
        signal.signal(number, lambda *_: None)
    page = RankingPage(config, sitting, annotator)
    server_of(page.app(), page.limits).run(sockets=[listener])
