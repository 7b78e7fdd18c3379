"""Every kind of model in every command that uses one: a run of its own stage, a student, adapters, weights in few bits;
and a reward model, which has no words and is refused in one sentence where words are asked for."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from posttraining import tiny_model, tiny_stage, tiny_world
from safetensors.torch import load_file

from llmkit.cli import main
from llmkit.model.weights import load_model
from llmkit.serving import command
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer, TokenizerConfig

KINDS = ("sft", "student", "adapter", "int8", "int8-dynamic", "int4", "student-int8", "merged-int4")
GREEDY = ("--temperature", "0", "--max-new-tokens", "6")
TEXT = "abc def gha bed cafe fade. " * 6


def train(recipe: Path) -> None:
    assert main(["train", str(recipe)]) == 0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which every kind of model lies under its name, each made by the command that makes it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tiny_world(tmp_path_factory.mktemp("kinds"))
    tokenizer = Tokenizer.train([], TokenizerConfig(kind="byte"))
    tiny_model(folder / "base", tokenizer, seed=0, n_layers=1, d_model=32)  # wide enough for scales to weigh little
    short: dict[str, Any] = {"steps": 8, "eval": {"every": 8}, "save": {"every": 8}}
    train(tiny_stage(folder, "sft", "sft", **short))
    lora = {"r": 2, "targets": ["q_proj", "v_proj"]}
    train(tiny_stage(folder, "sft", "adapter", lora=lora, optim={"lr": 3e-2}, **short))
    train(tiny_stage(folder, "distill", "student", **short))
    train(tiny_stage(folder, "reward", "reward", **short))
    assert main(["merge", str(folder / "adapter"), str(folder / "merged")]) == 0
    for source, name, *options in (
        ("sft", "int8", "--bits", "8"),
        ("sft", "int8-dynamic", "--bits", "8", "--dynamic"),
        ("sft", "int4", "--bits", "4"),
        ("student", "student-int8", "--bits", "8"),
        ("merged", "merged-int4", "--bits", "4"),
        ("reward", "reward-int8", "--bits", "8"),
        ("reward", "reward-int4", "--bits", "4"),
    ):
        assert main(["quantize", str(folder / source), str(folder / name), *options]) == 0
    (folder / "text.txt").write_text(TEXT)
    tasks = folder / "tasks"
    tasks.mkdir()
    choices = ["ab", "cd", "ef", "gh"]
    rows = [{"question": f"{i}?", "choices": choices, "answer": i % 4, "subject": "letters"} for i in range(4)]
    (tasks / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield folder
    torch.set_num_threads(before)


def test_the_kinds_are_what_they_are_called(world: Path) -> None:
    """Adapters change their base; what is in few bits is in a file of its own; the dynamic one says so."""
    assert (resolve_model(str(world / "adapter")) / "adapter_config.json").is_file()
    base, adapted, merged = (load_model(resolve_model(str(world / n))) for n in ("base", "adapter", "merged"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(adapted.get_parameter(name), merged.get_parameter(name))
    assert not torch.equal(base.get_parameter(name), merged.get_parameter(name))
    stored = load_file(world / "int8-dynamic" / "quantized.safetensors")
    assert stored[f"{name}.codes"].dtype == torch.int8
    dynamic = load_model(world / "int8-dynamic").get_parameter(name)
    assert dynamic.dynamic and not load_model(world / "int8").get_parameter(name).dynamic


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_writes_answers_and_serves(
    world: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`generate` with one prompt, `generate` with a file and `serve` give one text."""
    model = str(world / kind)
    assert main(["generate", model, "--raw", "--prompt", "ab", *GREEDY]) == 0
    shown = capsys.readouterr().out
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    prompts.write_text('{"prompt": "ab"}\n')
    argv = ["generate", model, "--raw", "--prompts", str(prompts), "--out", str(out), *GREEDY]
    assert main(argv) == 0
    (row,) = (json.loads(line) for line in out.read_text("utf-8").splitlines())
    text = row["completion"] if "completion" in row else row["text"]
    assert text and text in shown
    body = {"model": "m", "prompt": "ab", "temperature": 0, "max_tokens": 6}
    for library in ("starlette", "uvicorn"):
        pytest.importorskip(library, reason="the extra serve is not installed")
    (reply,) = served(model, [body], monkeypatch)
    assert reply["choices"][0]["text"] == text


def served(model: str, bodies: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `llmkit serve` replies to completions; then it is told to end, and must."""
    import http.client

    replies: list[dict[str, Any]] = []

    def ask(port: int) -> None:
        try:
            for body in bodies:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
                replies.append(json.loads(connection.getresponse().read()))
                connection.close()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def listen(host: str, port: int) -> Any:
        listener = real(host, port)
        threading.Thread(target=ask, args=(listener.getsockname()[1],)).start()
        return listener

    real = command.listen
    monkeypatch.setattr(command, "listen", listen)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Until the server has handlers of its own a signal must not end the tests.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        assert main(["serve", model, "--port", "0", "--name", "m"]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return replies


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_measured(world: Path, tmp_path: Path, kind: str) -> None:
    """`eval` and `bench` find one perplexity, and the questions are all asked."""
    model, text = str(world / kind), str(world / "text.txt")
    common = ["--text", text, "--out"]
    tasks = ["--tasks", "mmlu", "--data", str(world / "tasks")]
    assert main(["eval", model, *tasks, *common, str(tmp_path / "eval")]) == 0
    told = json.loads((tmp_path / "eval" / "eval.json").read_text("utf-8"))
    assert told["tasks"][0]["n"] == 4 and 1 < told["text"]["perplexity"] < 400
    speed = ["--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "1"]
    assert main(["bench", model, *speed, *common, str(tmp_path / "bench")]) == 0
    fp32, bf16 = json.loads((tmp_path / "bench" / "bench.json").read_text("utf-8"))["models"]
    assert fp32["perplexity"] == pytest.approx(told["text"]["perplexity"], rel=1e-4)
    assert 0 < bf16["kl"] < 0.01 and min(*fp32["speed"]["prompt"], *fp32["speed"]["generation"]) > 0
    if "int" in kind:
        bits = {"int8": 12, "int4": 8}["int8" if "int8" in kind else "int4"]  # of so small a model names are a part
        assert fp32["bits_per_weight"] < bits + 4


@pytest.mark.parametrize(("kind", "farthest"), [("reward", 0.0), ("reward-int8", 0.05), ("reward-int4", 0.6)])
def test_a_reward_model_scores(world: Path, tmp_path: Path, kind: str, farthest: float) -> None:
    """In few bits about as whole."""
    found = {}
    for name in ("reward", kind):
        out = tmp_path / f"{name}.jsonl"
        if not out.exists():
            assert main(["score", str(world / name), str(world / "reward.jsonl"), "--out", str(out)]) == 0
        rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        found[name] = torch.tensor([[row["reward_chosen"], row["reward_rejected"]] for row in rows])
    assert len(found[kind]) == 40 and found["reward"].std() > 0
    assert (found[kind] - found["reward"]).norm() <= farthest * found["reward"].norm()


@pytest.mark.parametrize("kind", ["reward", "reward-int8"])
def test_a_reward_model_has_no_words(
    world: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence that names the command that can use it, and nothing is written."""
    model, out = str(world / kind), str(tmp_path / "out")
    prompts = str(world / "ppo.jsonl")
    for argv in (
        ["generate", model, "--prompt", "ab"],
        ["generate", model, "--prompts", prompts, "--out", f"{out}.jsonl"],
        ["chat", model],
        ["serve", model, "--port", "0"],
        ["eval", model, "--text", str(world / "text.txt"), "--out", out],
        ["bench", model, "--repeats", "0", "--out", out],
        ["bench", str(world / "sft"), model, "--repeats", "0", "--out", out],
        ["compare", model, str(world / "sft"), "--repeats", "0", "--out", out],
        ["export", model, out, "--format", "gguf"],
    ):
        assert main(argv) == 2, argv
        error = capsys.readouterr().err
        assert "holds no language model: `llmkit score` asks it for scores" in error and error.count("\n") == 1, argv
        assert not list(tmp_path.iterdir())
    assert main(["score", str(world / "int8"), str(world / "reward.jsonl")]) == 2
    assert "holds a language model, no scores" in capsys.readouterr().err
