"""What clients get: with the official `openai` client where it is there, else with plain HTTP."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import struct
from typing import Any

import pytest
from serving_client import ask, events, wait_until

from llmkit.inference.config import SamplingConfig
from llmkit.inference.embed import text_vectors
from llmkit.inference.generate import generate

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "从前有座山 <|im_end|>"}]


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": TALK, "max_tokens": 12, "seed": 3, **more}


def text(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "One morning", "max_tokens": 12, "seed": 3, **more}


@pytest.fixture
def openai(server: Any) -> Any:
    return pytest.importorskip("openai").OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def test_the_official_client_talks_to_it(server: Any, openai: Any) -> None:
    assert [m.id for m in openai.models.list()] == ["tiny"] and openai.models.retrieve("tiny").id == "tiny"
    asked = {"model": "tiny", "messages": TALK, "max_tokens": 12, "seed": 3}
    whole = openai.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=2)
    assert len(whole.choices) == 2 and whole.usage.completion_tokens <= 24
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    told = whole.choices[0].logprobs.content
    assert told and all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in told)
    pieces = list(openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert pieces[0].choices[0].delta.role == "assistant" and pieces[-1].usage.completion_tokens <= 12
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert "".join(p.choices[0].delta.content or "" for p in pieces[:-1]) == whole.choices[0].message.content
    told_text = openai.completions.create(model="tiny", prompt=["a", "b"], max_tokens=4, seed=1, logprobs=3)
    assert [c.index for c in told_text.choices] == [0, 1] and len(told_text.choices[0].logprobs.top_logprobs[0]) >= 1
    vectors = openai.embeddings.create(model="tiny", input=["你好", "hello there"])  # it asks for base64
    assert len(vectors.data) == 2 and len(vectors.data[0].embedding) == 32
    assert sum(x * x for x in vectors.data[1].embedding) == pytest.approx(1.0, abs=1e-4)


def test_the_official_client_knows_the_errors(server: Any, openai: Any) -> None:
    library = pytest.importorskip("openai")
    with pytest.raises(library.NotFoundError, match="does not exist"):
        openai.chat.completions.create(model="../../etc/passwd", messages=TALK)
    with pytest.raises(library.BadRequestError) as e:
        openai.chat.completions.create(model="tiny", messages=TALK, tools=[])
    assert e.value.param == "tools" and e.value.code == "unknown_field"


def test_texts_are_those_of_generate(server: Any) -> None:
    """Greedy and drawn, the same seed gives what the command line writes."""
    service = server.service
    ids = service.tokenizer.encode_chat(TALK, add_generation_prompt=True).ids
    for temperature in (0.0, 1.0):
        sampling = SamplingConfig(temperature=temperature, max_new_tokens=12)
        (expected,) = generate(service.model, [ids], sampling, tokenizer=service.tokenizer, seeds=[3])
        got = ask(server, "/v1/chat/completions", chat(temperature=temperature)).json["choices"][0]
        assert got["message"]["content"] == expected.text and got["finish_reason"] == expected.finish_reason


def test_several_prompts_and_samples(server: Any) -> None:
    """Numbered prompt by prompt; the first sample is the one that is drawn alone; ids are taken as they are."""
    got = ask(server, "/v1/completions", text(prompt=["a", "b"], n=2)).json
    assert [c["index"] for c in got["choices"]] == [0, 1, 2, 3]
    alone = ask(server, "/v1/completions", text(prompt="a")).json
    assert alone["choices"][0]["text"] == got["choices"][0]["text"]
    bos = server.service.tokenizer.bos_id
    ids = ([] if bos is None else [bos]) + server.service.tokenizer.encode("a")
    for prompt in (ids, [ids]):
        by_ids = ask(server, "/v1/completions", text(prompt=prompt)).json
        assert by_ids["choices"] == alone["choices"] and by_ids["usage"] == alone["usage"]
    echoed = ask(server, "/v1/completions", text(prompt="a", echo=True)).json
    assert echoed["choices"][0]["text"] == "a" + alone["choices"][0]["text"]


def test_settings_act(server: Any) -> None:
    """A ban, a minimum, a stop string, and the default length of a chat: to the context's end."""
    first = ask(server, "/v1/completions", text(temperature=0, max_tokens=1, logprobs=1)).json["choices"][0]
    service = server.service
    (best,) = (
        generate(
            service.model,
            [service.tokenizer.encode("One morning")],
            SamplingConfig(temperature=0, max_new_tokens=1),
            tokenizer=service.tokenizer,
        )[0].ids,
    )
    assert len(first["logprobs"]["tokens"]) == 1 and len(first["logprobs"]["top_logprobs"]) == 1
    banned = text(temperature=0, max_tokens=1, logprobs=1, logit_bias={str(best[0]): -100})
    assert (
        ask(server, "/v1/completions", banned).json["choices"][0]["logprobs"]["tokens"] != first["logprobs"]["tokens"]
    )
    got = ask(server, "/v1/chat/completions", {"model": "tiny", "messages": TALK, "min_tokens": 90, "seed": 1})
    assert got.status == 400 and "min_new_tokens" in got.json["error"]["message"]
    longest = ask(server, "/v1/chat/completions", {"model": "tiny", "messages": TALK[1:], "seed": 1}).json
    assert longest["usage"]["total_tokens"] <= 128


def compare_streams(server: Any, n: int) -> None:
    pick = random.Random(0)
    letters = "ab 山河\U0001f600\n<|im_end|>é"
    for _ in range(n):
        said = "".join(pick.choices(letters, k=pick.randrange(1, 12)))
        more: dict[str, Any] = {
            "n": pick.randrange(1, 3),
            "max_tokens": pick.randrange(1, 16),
            "seed": pick.getrandbits(40),
        }
        more |= {"temperature": pick.choice([0, 0.7, 1.0]), "stop": pick.choice([None, "\ufffd", ["e", "t"]])}
        if pick.random() < 0.5:
            path, body = "/v1/completions", text(prompt=said, **more)
        else:
            path, body = "/v1/chat/completions", chat(messages=[{"role": "user", "content": said}], **more)
        whole = ask(server, path, body).json["choices"]
        found = [["", None] for _ in whole]
        for chunk in events(ask(server, path, {**body, "stream": True}).data):
            choice = chunk["choices"][0]
            found[choice["index"]][0] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            found[choice["index"]][1] = choice["finish_reason"] or found[choice["index"]][1]
        texts = [c["text"] if "text" in c else c["message"]["content"] for c in whole]
        assert found == [[t, c["finish_reason"]] for t, c in zip(texts, whole, strict=True)]
        for stop in more["stop"] or ():
            assert not any(stop in t for t in texts)


def test_streamed_is_whole(server: Any) -> None:
    """Any prompt, any stop string, any number of texts: the pieces add up to what comes at once (B68, B69)."""
    compare_streams(server, 60)


@pytest.mark.campaign
def test_streamed_is_whole_five_thousand_times(server: Any) -> None:
    compare_streams(server, 5000)


def test_embeddings_are_those_of_the_command(server: Any) -> None:
    service = server.service
    bos = service.tokenizer.bos_id
    rows = [([] if bos is None else [bos]) + service.tokenizer.encode(t) for t in ("你好", "hello there", "x")]
    expected = text_vectors(service.model, rows, n_skip=int(bos is not None))
    body = {"model": "tiny", "input": ["你好", "hello there", "x"]}
    got = ask(server, "/v1/embeddings", body).json
    for i, one in enumerate(got["data"]):
        assert one["index"] == i and one["embedding"] == pytest.approx(expected[i].tolist(), abs=1e-5)
    packed = ask(server, "/v1/embeddings", {**body, "encoding_format": "base64"}).json["data"][1]["embedding"]
    assert struct.unpack("<32f", base64.b64decode(packed)) == pytest.approx(expected[1].tolist(), abs=1e-5)
    assert got["usage"]["total_tokens"] == sum(map(len, rows))
    for wrong in ("", [], [""], "x" * 400, [1 << 20]):
        assert ask(server, "/v1/embeddings", {"model": "tiny", "input": wrong}).status == 400
    assert ask(server, "/v1/embeddings", {**body, "dimensions": 8}).status == 400


def test_many_clients_at_once(server: Any) -> None:
    """Side by side each gets what it gets alone."""
    bodies = [text(prompt=f"p{i}", seed=i, max_tokens=8, temperature=i % 2) for i in range(24)]
    alone = [ask(server, "/v1/completions", body).json["choices"] for body in bodies]

    async def together() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(ask, server, "/v1/completions", body) for body in bodies))

    for got, expected in zip(asyncio.run(together()), alone, strict=True):
        assert got.status == 200 and got.json["choices"] == expected
    wait_until(lambda: server.idle)


def test_health_metrics_and_the_page(server: Any) -> None:
    ask(server, "/v1/completions", text())
    assert ask(server, "/health").json == {"status": "ok"}
    wait_until(lambda: server.idle)
    lines = ask(server, "/metrics").data.decode().splitlines()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
    assert values['llmkit_requests_total{path="/v1/completions",status="200"}'] >= 1
    assert values["llmkit_kv_blocks_in_use"] == 0 and values["llmkit_new_tokens_total"] >= 1
    assert values['llmkit_request_seconds_bucket{le="+Inf"}'] == values["llmkit_request_seconds_count"] >= 1
    page = ask(server, "/")
    assert page.headers["content-type"].startswith("text/html") and b"<textarea" in page.data
    assert "script-src 'sha256-" in page.headers["content-security-policy"]
    for outside in (b"http://", b"https://", b"innerHTML", b"eval("):
        assert outside not in page.data  # nothing of elsewhere, and no text of a model becomes a page


def test_a_base_model_has_completions_only(start: Any) -> None:
    base = start(chat=False)
    got = ask(base, "/v1/chat/completions", chat())
    assert got.status == 400 and got.json["error"]["code"] == "no_chat_template"
    assert ask(base, "/v1/completions", text()).status == 200
    assert ask(base, "/v1/models").json["data"][0]["chat"] is False


def test_developers_and_parts_are_understood(server: Any) -> None:
    """The newer role and contents in parts say what the older forms say; what an answer held may be sent back."""
    old = ask(server, "/v1/chat/completions", chat(messages=[*TALK, {"role": "assistant", "content": "ok"}, TALK[1]]))
    parts = [{"type": "text", "text": "从前有座山"}, {"type": "text", "text": " <|im_end|>"}]
    new = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    answer = {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": None}
    got = ask(server, "/v1/chat/completions", chat(messages=[*new, answer, TALK[1]]))
    assert got.json["choices"] == old.json["choices"] and json.dumps(got.json["usage"]) == json.dumps(old.json["usage"])
