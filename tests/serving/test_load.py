"""Many clients for a while: no failure, no wrong text, nothing left behind. The full size runs with `-m campaign`."""

from __future__ import annotations

import http.client
import json
import queue
import random
import statistics
import threading
import time
from typing import Any

import pytest
from serving_client import ask, events, wait_until

from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import generate

N_TEXTS = 100  # different requests, whose answers are computed one by one beforehand


def requests_with_answers(service: Any) -> list[tuple[dict[str, Any], str, str]]:
    """(body, text, finish_reason): half greedy, half drawn, some with a stop string."""
    pick, found = random.Random(0), []
    for i in range(N_TEXTS):
        prompt = "".join(pick.choices("ab 山河\n", k=pick.randrange(1, 40)))
        settings: dict[str, Any] = {"temperature": i % 2, "stop": ("e",) if i % 5 == 0 else ()}
        n = pick.randrange(1, 24)
        (told,) = generate(
            service.model,
            [
                ([] if service.tokenizer.bos_id is None else [service.tokenizer.bos_id])
                + service.tokenizer.encode(prompt)
            ],
            SamplingConfig(max_new_tokens=n, **settings),
            tokenizer=service.tokenizer,
            seeds=[i],
        )
        body = {"model": "tiny", "prompt": prompt, "max_tokens": n, "seed": i, "stream": i % 3 == 0, **settings}
        found.append((body, told.text, str(told.finish_reason)))
    return found


def work(
    server: Any, todo: queue.SimpleQueue[int], cases: list[tuple[dict[str, Any], str, str]], wrong: list[Any]
) -> None:
    """One client on one connection, which comes back when it is told to."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    while True:
        try:
            body, text, reason = cases[todo.get_nowait() % len(cases)]
        except queue.Empty:
            connection.close()
            return
        while True:
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            reply = connection.getresponse()
            data = reply.read()
            if reply.status != 429:
                break
            time.sleep(0.01)
        if reply.status != 200:
            wrong.append((body, reply.status, data))
            continue
        choices = [c["choices"][0] for c in events(data)] if body["stream"] else json.loads(data)["choices"]
        if ("".join(c["text"] for c in choices), choices[-1]["finish_reason"]) != (text, reason):
            wrong.append((body, text, choices))


def load(server: Any, n_clients: int, n_requests: int) -> None:
    cases = requests_with_answers(server.service)
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for i in range(n_requests):
        todo.put(i)
    wrong: list[Any] = []
    clients = [threading.Thread(target=work, args=(server, todo, cases, wrong)) for _ in range(n_clients)]
    began, health = time.monotonic(), []
    for client in clients:
        client.start()
    while any(client.is_alive() for client in clients):
        asked = time.monotonic()
        assert ask(server, "/health").status == 200
        health.append(time.monotonic() - asked)
        time.sleep(0.02)
    seconds = time.monotonic() - began
    slowest = statistics.quantiles(health, n=100)[-1] if len(health) > 1 else health[0]
    print(f"{n_requests} requests in {seconds:.1f} s; health: p99 {1000 * slowest:.0f} ms of {len(health)}")
    assert not wrong, wrong[0]
    wait_until(lambda: server.idle)


def test_clients_side_by_side(server: Any) -> None:
    load(server, 12, 150)


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_twenty_thousand_requests(server: Any) -> None:
    load(server, 64, 20_000)
