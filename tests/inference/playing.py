"""An engine run to its end, for its tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmkit.inference.engine.engine import Engine
from llmkit.inference.engine.request import Event, Request
from llmkit.inference.stream import Generation


def drain(engine: Engine, arrivals: Mapping[int, Sequence[Request]] | None = None) -> dict[int, list[Event]]:
    """Steps until nothing is left; `arrivals` are submitted before the step of that number. Events of every request."""
    arrivals = dict(arrivals or {})
    found: dict[int, list[Event]] = {}
    step = 0
    while engine.busy or arrivals:
        for request in arrivals.pop(step, ()):
            engine.submit(request)
        for event in engine.step():
            found.setdefault(event.request_id, []).append(event)
        step += 1
        assert step < 5000, "the engine does not come to an end"
    return found


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events)


def ids_of(events: Sequence[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


def check_equal(events: Sequence[Event], expected: Generation, abs_tol: float = 1e-4) -> None:
    """The events say what `generate` says."""
    assert ids_of(events) == expected.ids
    assert text_of(events) == expected.text
    assert [e.finish_reason for e in events] == [None] * (len(events) - 1) + [expected.finish_reason]
    logprobs = [e.logprob for e in events]
    assert max(abs(a - b) for a, b in zip(logprobs, expected.logprobs, strict=True)) < abs_tol
    if expected.drawn_logprobs is not None:
        drawn = [e.drawn_logprob for e in events]
        assert max(abs(a - b) for a, b in zip(drawn, expected.drawn_logprobs, strict=True)) < abs_tol
    else:
        assert {e.drawn_logprob for e in events} == {None}


def check_empty(engine: Engine) -> None:
    """Nothing is held, and every block can be had."""
    counters = engine.counters
    assert (counters.n_running, counters.n_waiting, counters.blocks_in_use) == (0, 0, 0)
    blocks = engine._scheduler.blocks
    assert blocks.n_available == counters.n_blocks
    assert sorted(blocks.take(counters.n_blocks)) == list(range(1, counters.n_blocks + 1))
    blocks.release(range(1, counters.n_blocks + 1))
