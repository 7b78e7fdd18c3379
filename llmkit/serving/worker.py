"""The one thread that computes, and how the event loop talks to it.

What the loop wants done goes as a function into an inbox, which the thread empties between two steps of the engine; what
comes of a step goes back in one call. So the engine is touched by one thread alone, and a request that is cancelled has
left it before the next step.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from llmkit.config import UserError
from llmkit.inference.engine.engine import Engine
from llmkit.inference.engine.request import Counters, Event, Request

T = TypeVar("T")


class Stopped(Exception):
    """The thread is gone: it was told to stop, or an error ended it."""


class Job:
    """The texts of one request, as they are written; made by `Worker.submit`."""

    def __init__(self, n: int):
        self.n_open = n
        """Texts that haven't ended."""
        self.events: asyncio.Queue[tuple[int, Event] | Stopped] = asyncio.Queue()
        self.ids: list[int] = []
        """Under which the engine knows the texts; the thread's alone."""

    async def next(self) -> tuple[int, Event] | None:
        """The next event with the number of its text; None after the last. Raises Stopped."""
        if not self.n_open:
            return None
        found = await self.events.get()
        if isinstance(found, Stopped):
            raise found
        self.n_open -= found[1].finish_reason is not None
        return found


class Worker:
    """Runs an engine in a thread of its own. All methods belong to the event loop in which `start` was called."""

    def __init__(self, engine: Engine):
        self.counters: Counters = engine.counters
        """How the engine stood after its last step."""
        self.stopped: Stopped | None = None
        self._engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="llmkit-engine", daemon=True)
        self._routes: dict[int, tuple[Job, int]] = {}  # the thread's alone
        self._jobs: set[Job] = set()
        self._waiting: set[asyncio.Future[Any]] = set()

    def start(self) -> None:
        """Begins to work for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after the step it is in; what is unfinished raises Stopped."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        self._end(Stopped("the server stops"))

    async def call(self, function: Callable[[], T]) -> T:
        """Runs a function between two steps. Raises what it raises, or Stopped."""
        if self.stopped is not None:
            raise self.stopped
        answer: asyncio.Future[T] = self._loop.create_future()
        self._waiting.add(answer)

        def run() -> None:
            try:
                result = function()
            except Exception as e:
                self._tell(_settle, answer, None, e)
            else:
                self._tell(_settle, answer, result, None)

        self._inbox.put(run)
        try:
            return await answer
        finally:
            self._waiting.discard(answer)

    async def submit(self, requests: Sequence[Request]) -> Job:
        """Gives the engine all of these, or none. Raises UserError for one that it refuses, or Stopped."""
        job = Job(len(requests))

        def begin() -> None:
            try:
                for request in requests:
                    job.ids.append(self._engine.submit(request))
            except UserError:
                for request_id in job.ids:
                    self._engine.cancel(request_id)
                raise
            self._routes.update({request_id: (job, i) for i, request_id in enumerate(job.ids)})

        self._jobs.add(job)
        try:
            await self.call(begin)
        except BaseException:  # also when whoever asked has left meanwhile
            self.cancel(job)
            raise
        return job

    def cancel(self, job: Job) -> None:
        """Ends what of a job is still written; nothing for one that has ended."""
        self._jobs.discard(job)
        job.n_open = 0

        def end() -> None:
            for request_id in job.ids:
                if self._routes.pop(request_id, None) is not None:
                    self._engine.cancel(request_id)

        self._inbox.put(end)

    # - in the thread -

    def _run(self) -> None:
        try:
            while self._obey():
                events = self._engine.step()
                found = []
                for event in events:
                    job, index = self._routes[event.request_id]
                    if event.finish_reason is not None:
                        del self._routes[event.request_id]
                    found.append((job, index, event))
                self.counters = self._engine.counters
                if found:
                    self._tell(_deliver, found)
        except Exception as e:  # a bug: it is shown here, and clients are told that the server is broken
            traceback.print_exc(file=sys.stderr)
            self._tell(self._end, Stopped(f"the engine failed: {type(e).__name__}"))

    def _obey(self) -> bool:
        """Does what the inbox holds now; waits for something where nothing is to be written. False: stop.

        What comes meanwhile has to wait for a step, so that many who want vectors don't hold up those who write.
        """
        for _ in range(max(1, self._inbox.qsize())):
            try:
                command = self._inbox.get(block=not self._engine.busy)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            self.counters = self._engine.counters
        return True

    def _tell(self, function: Callable[..., None], *args: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    # - in the loop -

    def _end(self, why: Stopped) -> None:
        self.stopped = self.stopped or why
        for job in self._jobs:
            job.events.put_nowait(why)
        for answer in self._waiting:
            _settle(answer, None, why)


def _settle(answer: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if answer.done():  # cancelled, because whoever asked has left
        return
    if error is None:
        answer.set_result(result)
    else:
        answer.set_exception(error)


def _deliver(found: Sequence[tuple[Job, int, Event]]) -> None:
    for job, index, event in found:
        job.events.put_nowait((index, event))
