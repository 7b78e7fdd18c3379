"""Who may ask, how much, how slowly; and that nothing stays behind of those who leave (B118, B119)."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time
from typing import Any

import pytest
from serving_client import ask, connect, request_bytes, wait_until

LONG = {"model": "tiny", "prompt": "a", "max_tokens": 120, "min_tokens": 110}
SHORT = {"model": "tiny", "prompt": "a", "max_tokens": 2}
TALK = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def refused(reply: Any, status: int, code: str | None = None) -> str:
    """Checks OpenAI's shape of an error; returns its message."""
    assert reply.status == status, reply.data
    error = reply.json["error"]
    assert (
        set(error) == {"message", "type", "param", "code"} and error["message"] and "Traceback" not in error["message"]
    )
    assert code is None or error["code"] == code
    return error["message"]


# --- who -------------------------------------------------------------------------------------------------------------


def test_a_key_is_asked_for(start: Any) -> None:
    locked = start(api_key="sesame")
    for headers in (
        {},
        {"authorization": "Bearer open"},
        {"authorization": "sesame"},
        {"authorization": "Bearer sésame"},
    ):
        for path, body in (("/v1/models", None), ("/v1/completions", SHORT), ("/metrics", None)):
            message = refused(ask(locked, path, body, headers), 401, "invalid_api_key")
            assert "sesame" not in message
    right = {"authorization": "Bearer sesame"}
    assert ask(locked, "/v1/models", None, right).status == 200
    assert ask(locked, "/v1/completions", SHORT, right).status == 200
    assert (
        ask(locked, "/health").status == ask(locked, "/").status == 200
    )  # a browser must get the page to send the key
    assert ask(locked, "/v1/models", None, {**right, "host": "example.com"}).status == 200  # behind a proxy


def test_pages_of_elsewhere_can_not_ask(server: Any) -> None:
    """A name that is made to point here, and what browsers send anywhere without asking."""
    refused(ask(server, "/v1/models", None, {"host": "evil.example"}), 403, "host")
    refused(ask(server, "/v1/completions", SHORT, {"content-type": "text/plain"}), 415)
    for host in ("localhost", f"127.0.0.1:{server.port}", "[::1]:80", "LOCALHOST:1"):
        assert ask(server, "/v1/models", None, {"host": host}).status == 200
    assert "access-control-allow-origin" not in ask(server, "/v1/models", None, {"origin": "http://x"}).headers


def test_unknown_paths_and_methods(server: Any) -> None:
    refused(ask(server, "/v1/nothing"), 404)
    refused(ask(server, "/v1/completions"), 405)
    refused(ask(server, "/v1/models", SHORT), 405)
    refused(ask(server, "/v1/models/../../etc/passwd"), 404)
    assert ask(server, "/v1/models/tiny").json["id"] == "tiny"


# --- how much --------------------------------------------------------------------------------------------------------

LIMITS = {
    "n": ({"n": 8}, {"n": 9}),
    "stop": ({"stop": ["a"] * 4}, {"stop": ["a"] * 5}),
    "stop length": ({"stop": "a" * 64}, {"stop": "a" * 65}),
    "logit_bias": ({"logit_bias": {str(i): 1 for i in range(250)}}, {"logit_bias": {str(i): 0 for i in range(301)}}),
    "max_tokens": ({"max_tokens": 128}, {"max_tokens": 129}),
    "temperature": ({"temperature": 2}, {"temperature": 2.1}),
    "top_p": ({"top_p": 0}, {"top_p": -0.1}),
    "seed": ({"seed": -(1 << 63)}, {"seed": 1 << 63}),
}
OF_TEXT = {
    "logprobs": ({"logprobs": 20}, {"logprobs": 21}),
    "prompts": ({"prompt": ["a"] * 64}, {"prompt": ["a"] * 65}),
    "context": ({"prompt": "a" * 120}, {"prompt": "a" * 130}),
    "ids": ({"prompt": [5]}, {"prompt": [10**6]}),
}
OF_CHAT = {
    "messages": (
        {"messages": TALK["messages"]},
        {"messages": TALK["messages"] * 257},
    ),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 20}, {"logprobs": True, "top_logprobs": 21}),
    "logprobs": ({"logprobs": True}, {"top_logprobs": 2}),
    "tokens": ({"max_completion_tokens": 2}, {"max_completion_tokens": 3}),
}
CASES = [
    *(("/v1/completions", SHORT, *both) for both in (*LIMITS.values(), *OF_TEXT.values())),
    *(("/v1/chat/completions", TALK, *both) for both in (*LIMITS.values(), *OF_CHAT.values())),
]


@pytest.mark.parametrize(("path", "base", "most", "more"), CASES)
def test_limits(server: Any, path: str, base: dict[str, Any], most: dict[str, Any], more: dict[str, Any]) -> None:
    """What is just allowed is, and what is one more is refused."""
    got = ask(server, path, {**base, **most})
    assert got.status == 200, got.data
    refused(ask(server, path, {**base, **more}), 400)


def test_a_large_body_is_not_read(start: Any) -> None:
    small = start({"max_body_bytes": 1000})
    fits = json.dumps(SHORT).encode()
    assert ask(small, "/v1/completions", fits + b" " * (1000 - len(fits))).status == 200
    refused(ask(small, "/v1/completions", fits + b" " * (1001 - len(fits))), 413, "body_too_large")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connect(small, head + b"Content-Length: 999999999999999999\r\n\r\n") as declared:
        assert declared.recv(20).startswith(b"HTTP/1.1 413")
    chunk = b"ff\r\n" + b" " * 255 + b"\r\n"
    with connect(small, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 5) as endless:
        assert endless.recv(20).startswith(b"HTTP/1.1 413")


def test_a_long_prompt_is_refused_before_it_is_cut_into_tokens(server: Any) -> None:
    began = time.monotonic()
    refused(ask(server, "/v1/completions", {**SHORT, "prompt": "a" * 900_000}), 400, "context_length_exceeded")
    talk = {**TALK, "messages": [{"role": "user", "content": "x" * 900_000}]}
    refused(ask(server, "/v1/chat/completions", talk), 400, "context_length_exceeded")
    assert time.monotonic() - began < 2


def test_a_full_queue_tells_to_come_back(start: Any) -> None:
    narrow = start({"max_pending": 2})
    with connect(narrow, request_bytes("/v1/completions", {**LONG, "n": 2, "stream": True})) as busy:
        assert busy.recv(12) == b"HTTP/1.1 200"
        reply = ask(narrow, "/v1/completions", SHORT)
        if reply.status != 200:  # else the two were written already
            refused(reply, 429, "queue_full")
            assert reply.headers["retry-after"] == "1"
    wait_until(lambda: narrow.idle)
    refused(ask(narrow, "/v1/completions", {**SHORT, "n": 3}), 400, "limit_exceeded")
    assert ask(narrow, "/v1/completions", {**SHORT, "n": 2}).status == 200


# --- how slowly ------------------------------------------------------------------------------------------------------


def test_slow_clients_are_dropped(start: Any) -> None:
    """Heads and bodies that don't come, and connections that say nothing at all."""
    quick = start({"read_timeout_s": 0.3})
    with connect(quick) as silent, connect(quick, b"POST /v1/comp") as half:
        assert silent.recv(10) == b"" and half.recv(10) == b""
    with connect(quick, request_bytes("/v1/completions", SHORT)[:-5]) as slow:
        assert b"408" in slow.recv(20)
    with connect(quick, request_bytes("/v1/completions", SHORT)) as good:
        assert good.recv(12) == b"HTTP/1.1 200"


def test_slow_clients_hold_up_nobody(server: Any) -> None:
    """Heads that never end, bodies that never come and streams that nobody reads, beside clients that behave."""
    half = [b"POST /v1/completions HTTP/1.1\r\nHost: loc", request_bytes("/v1/completions", SHORT)[:-5]]
    unread = request_bytes("/v1/completions", {**LONG, "stream": True})
    with contextlib.ExitStack() as stack:
        for i in range(60):
            stack.enter_context(connect(server, [*half, unread][i % 3]))
        for i in range(8):
            assert ask(server, "/v1/completions", {**SHORT, "seed": i}).status == 200
    wait_until(lambda: server.idle)


def test_a_client_that_does_not_read_is_dropped(start: Any) -> None:
    """Its stream is larger than what the buffers between the two hold."""
    quick = start({"write_timeout_s": 0.3})
    service = quick.service
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    connection.connect(("127.0.0.1", quick.port))
    body = {**LONG, "prompt": ["a"] * 8, "n": 8, "logprobs": 20, "stream": True}
    with contextlib.closing(connection):
        connection.sendall(request_bytes("/v1/completions", body))
        wait_until(lambda: service.metrics.disconnects == 1, 20)
        wait_until(lambda: quick.idle)


def test_requests_end_in_time(start: Any) -> None:
    brief = start({"request_timeout_s": 0.02})
    refused(ask(brief, "/v1/completions", {**LONG, "n": 8}), 504, "timeout")
    streamed = ask(brief, "/v1/completions", {**LONG, "n": 8, "stream": True})
    last = streamed.data.decode().rstrip("\n").split("\n\n")[-1]
    assert streamed.status == 200 and json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    assert brief.service.metrics.timeouts == 2
    wait_until(lambda: brief.idle)


# --- who leaves ------------------------------------------------------------------------------------------------------


def leave_at_random(server: Any, n: int) -> None:
    pick = random.Random(0)
    for _ in range(n):
        body = {**LONG, "stream": pick.random() < 0.5, "n": pick.randrange(1, 4), "max_tokens": pick.randrange(1, 120)}
        body["min_tokens"] = body["max_tokens"] // 2
        sent = request_bytes("/v1/completions", body)
        how = pick.randrange(4)
        with connect(server, sent[: pick.randrange(len(sent))] if how == 0 else sent) as leaving:
            if how == 2:
                time.sleep(pick.random() * 0.02)
            elif how == 3:
                leaving.recv(pick.randrange(1, 3000))
            if pick.random() < 0.5:  # a reset, not a goodbye
                leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    wait_until(lambda: server.idle)
    assert ask(server, "/v1/completions", SHORT).status == 200
    wait_until(lambda: server.idle)
    assert not server.service.worker._jobs and not server.service.worker._routes and not server.service.worker._waiting


def test_those_who_leave_leave_nothing_behind(server: Any) -> None:
    leave_at_random(server, 80)


@pytest.mark.campaign
def test_a_thousand_who_leave(server: Any) -> None:
    leave_at_random(server, 1000)


def test_an_engine_that_fails_is_told(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever waits gets an answer, later ones too, and health says so."""
    broken = start()
    engine = broken.service.worker._engine
    step = engine.step

    def fail() -> Any:
        if engine.counters.steps > 3:
            raise RuntimeError("secret detail")
        return step()

    engine.step = fail
    for body in (LONG, SHORT):
        message = refused(ask(broken, "/v1/completions", body), 503)
        assert "secret" not in message
    assert ask(broken, "/health").status == 503
    assert "secret detail" in capsys.readouterr().err


# --- what is no request ----------------------------------------------------------------------------------------------


def junk(pick: random.Random, depth: int = 0) -> Any:
    kinds = [None, True, 0, -1, 1e308, 1 << 70, "", "x", "\ud800", "\x00", [], {}, 0.5, "1", [[]], {"a": None}]
    if depth < 3 and pick.random() < 0.3:
        inner = [junk(pick, depth + 1) for _ in range(pick.randrange(4))]
        return inner if pick.random() < 0.5 else {str(i): x for i, x in enumerate(inner)}
    return pick.choice(kinds)


def spoilt(pick: random.Random) -> tuple[str, bytes]:
    """A request with something wrong, or strange, about it."""
    path, base = pick.choice(
        [
            ("/v1/completions", {**SHORT, "n": 1, "stop": ["a"], "seed": 1}),
            ("/v1/chat/completions", {**TALK, "temperature": 0.5, "stream": False, "logprobs": True}),
            ("/v1/embeddings", {"model": "tiny", "input": ["a"], "encoding_format": "float"}),
        ]
    )
    body: dict[str, Any] = json.loads(json.dumps(base))
    for _ in range(pick.randrange(1, 4)):
        names = [
            *body,
            "logit_bias",
            "stream_options",
            "top_logprobs",
            "echo",
            "user",
            "top_k",
            "min_tokens",
            "x\ud800",
        ]
        name = pick.choice(names)
        if pick.random() < 0.15:
            body.pop(name, None)
        elif name == "messages" and pick.random() < 0.7:
            message = {"role": pick.choice(["user", "assistant", "tool", junk(pick)]), "content": junk(pick)}
            body[name] = [message, {**message, **({"name": junk(pick)} if pick.random() < 0.3 else {})}]
        else:
            body[name] = junk(pick)
    data = json.dumps(body).encode()
    how = pick.random()
    if how < 0.1:
        data = data[: pick.randrange(len(data))]
    elif how < 0.2:
        at = pick.randrange(len(data))
        data = data[:at] + bytes([pick.randrange(256)]) + data[at + 1 :]
    elif how < 0.22:
        data = b"[" * 50_000
    elif how < 0.24:
        data = data.replace(b"1", b"NaN").replace(b"0.5", b"-Infinity") + b""
    elif how < 0.26:
        data = b'{"model": "tiny", "prompt": ' + b"9" * 5000 + b"}"
    return path, data


def send_spoilt(server: Any, n: int) -> None:
    pick = random.Random(1)
    statuses = set()
    for _ in range(n):
        path, data = spoilt(pick)
        reply = ask(server, path, data)
        statuses.add(reply.status)
        if reply.status != 200:
            assert 400 <= reply.status < 500, (path, data, reply.data)
            refused(reply, reply.status)
    assert {200, 400} <= statuses
    wait_until(lambda: server.idle)


def test_malformed_bodies_are_the_clients_fault(server: Any) -> None:
    send_spoilt(server, 400)


@pytest.mark.campaign
def test_ten_thousand_malformed_bodies(server: Any) -> None:
    send_spoilt(server, 10_000)
