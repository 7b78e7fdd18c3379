"""A tiny model, and plain HTTP for what the official client wouldn't send."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, init_weights
from llmkit.tokenizer import Tokenizer, TokenizerConfig

CONTEXT = 128


def tiny() -> tuple[GPT, Tokenizer]:
    """Random weights: its texts are bytes that are seldom UTF-8, which streams have to cope with."""
    tokenizer = Tokenizer.train([], TokenizerConfig(kind="byte"))
    vocab_size = -(-tokenizer.vocab_size // 64) * 64
    model = GPT(GPTConfig(n_layers=2, n_heads=2, d_model=32, max_seq_len=CONTEXT, vocab_size=vocab_size))
    init_weights(model, 0)
    return model.eval().requires_grad_(False), tokenizer


@dataclass
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)


def ask(server: Any, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Reply:
    """One request over a connection of its own; bytes are sent as they are, everything else as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        if body is None:
            connection.request("GET", path, headers=dict(headers or {}))
        else:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", path, data, {"content-type": "application/json", **(headers or {})})
        reply = connection.getresponse()
        return Reply(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())
    finally:
        connection.close()


def events(data: bytes) -> list[Any]:
    """The chunks of a stream that came to its end."""
    *found, last, rest = data.decode().split("\n\n")
    assert last == "data: [DONE]" and not rest
    return [json.loads(one.removeprefix("data: ")) for one in found]


def connect(server: Any, sent: bytes = b"") -> socket.socket:
    """A bare connection."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(sent)
    return connection


def request_bytes(path: str, body: Any) -> bytes:
    """A whole request."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def wait_until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    """Waits, and fails loudly."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.005)
