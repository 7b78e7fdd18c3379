"""What a server counts, as Prometheus reads it (text format 0.0.4). Only the event loop's thread changes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """How many observations, in seconds, are at most each of BUCKETS_S."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Adds one."""
        self.counts[sum(seconds > bound for bound in BUCKETS_S)] += 1
        self.total += seconds

    def lines(self, name: str) -> Iterator[str]:
        """Its samples: buckets hold all that is below them."""
        n = 0
        for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), self.counts, strict=True):
            n += count
            yield f'{name}_bucket{{le="{bound}"}} {n}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {n}"


class Metrics:
    """Counters of a server's life."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, int], int] = {}
        """(path, status) -> requests."""
        self.prompt_tokens = 0
        self.new_tokens = 0
        self.disconnects = 0
        self.timeouts = 0
        self.first_token = Histogram()
        self.duration = Histogram()

    def count(self, path: str, status: int) -> None:
        """Adds a request that was answered."""
        key = (path, status)
        self.requests[key] = self.requests.get(key, 0) + 1

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """The page that Prometheus reads.

        Args:
            gauges: name -> (what it is, its value now), of the engine.
        """
        return "\n".join(self._lines(gauges)) + "\n"

    def _lines(self, gauges: Mapping[str, tuple[str, float]]) -> Iterator[str]:
        yield from _head("llmkit_requests_total", "counter", "Requests by path and status.")
        for (path, status), n in sorted(self.requests.items()):
            yield f'llmkit_requests_total{{path="{path}",status="{status}"}} {n}'
        for name, what, value in (
            ("prompt_tokens", "Tokens of prompts that were accepted.", self.prompt_tokens),
            ("new_tokens", "Tokens that were written.", self.new_tokens),
            ("disconnects", "Requests whose client left before the end.", self.disconnects),
            ("timeouts", "Requests that were cancelled because they took too long.", self.timeouts),
        ):
            yield from _head(f"llmkit_{name}_total", "counter", what)
            yield f"llmkit_{name}_total {value}"
        for name, (what, number) in gauges.items():
            yield from _head(f"llmkit_{name}", "gauge", what)
            yield f"llmkit_{name} {number:g}"
        yield from _head("llmkit_first_token_seconds", "histogram", "From a request to its first token.")
        yield from self.first_token.lines("llmkit_first_token_seconds")
        yield from _head("llmkit_request_seconds", "histogram", "From a request for text to the end of its answer.")
        yield from self.duration.lines("llmkit_request_seconds")


def _head(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP {name} {what}"
    yield f"# TYPE {name} {kind}"
