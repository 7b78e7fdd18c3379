"""The teacher's answers in place of the data's: what is asked, written, kept, left out, and found again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit import storage
from llmkit.config import Interrupted, UserError
from llmkit.data.chats import prepare_chats
from llmkit.data.config import DataConfig, SourceConfig
from llmkit.data.turns import prompt_ids
from llmkit.distill import answers
from llmkit.distill.answers import source_of_answers, teacher_dialogues
from llmkit.distill.config import TeacherAnswersConfig
from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import generate
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.training.engine import seed_of

TOKENIZER = Tokenizer.train([], TokenizerConfig(kind="byte"))
N = 22


GPT2: dict[str, Any] = {"positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh"} | dict.fromkeys(
    ("qkv_bias", "o_bias", "mlp_bias"), True
)


def model(ends: float = 4.5) -> GPT:
    """Random weights in fp64, and a push towards the end of turn, so that answers are some tokens long."""
    sizes: dict[str, Any] = {"n_layers": 1, "n_heads": 2, "d_model": 16, "vocab_size": 320, "max_seq_len": 256}
    made = GPT(GPTConfig(tie_embeddings=False, **GPT2, **sizes)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(0.0, 0.5, generator=generator)
        bias = made.model.norm.bias
        made.head_weight[TOKENIZER.end_of_turn_id] = ends * bias / bias.square().sum()
    return made.eval()


def rows(n: int = N) -> list[dict[str, Any]]:
    """Conversations of all shapes: with a system message, several turns, tools, and words after the last answer."""
    made: list[dict[str, Any]] = []
    for i in range(n):
        said = [{"role": "user", "content": "q" * (1 + i % 5) + str(i)}, {"role": "assistant", "content": "old"}]
        if i % 4 == 1:
            said = [{"role": "system", "content": "米"}, *said]
        if i % 4 == 2:
            said += [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "older"}]
        if i % 4 == 3:
            said += [{"role": "user", "content": "bye"}]
        made.append({"messages": said})
    made[5]["tools"] = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    return made


class World:
    """A source, a teacher's folder, and what was loaded and said."""

    def __init__(self, folder: Path, data: list[dict[str, Any]] | None = None, **changes: Any):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.n_loaded, self.said = folder, 0, list[str]()
        (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in data or rows()))
        (folder / "teacher").mkdir(exist_ok=True)
        (folder / "teacher" / "config.json").write_text("{}")
        (folder / "teacher" / "model.safetensors").write_bytes(b"weights")
        self.data = DataConfig(path=str(folder / "rows.jsonl"), cache_dir=str(folder / "cache"), **changes)
        self.model = model()

    def load(self) -> GPT:
        self.n_loaded += 1
        return self.model

    def run(self, source: SourceConfig | None = None, **changes: Any) -> Path:
        given = {"tokenizer": TOKENIZER, "data": self.data, "seed": 0, "precision": "fp64", **changes}
        settings = {"max_new_tokens": 12, "batch_size": 3, "temperature": 1.0, **given.pop("settings", {})}
        return teacher_dialogues(
            TeacherAnswersConfig(**settings),
            source or self.data.sources[0],
            given.pop("data"),
            given.pop("tokenizer"),
            self.load,
            folders=[self.folder / "teacher"],
            say=self.said.append,
            **given,
        )


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_SHARD_ROWS", 4)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def before_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return messages[: max(i for i, m in enumerate(messages) if m["role"] == "assistant")]


@pytest.mark.parametrize(("temperature", "ends"), [(0.0, 2.4), (1.0, 4.5)])
def test_each_last_answer_is_the_teachers(tmp_path: Path, temperature: float, ends: float) -> None:
    """A function of the seed and the row's number: what stands beside it makes no difference, nor does the batch. An
    answer that was cut off, or is empty, is left out and counted."""
    world = World(tmp_path)
    world.model = model(ends)
    found = read(world.run(settings={"temperature": temperature, "max_new_tokens": 6}))
    expected, n_cut = [], 0
    sampling = SamplingConfig(max_new_tokens=6, temperature=temperature)
    for number, row in enumerate(rows()):
        asked = before_answer(row["messages"])
        ids = prompt_ids(TOKENIZER, asked, tools=row.get("tools"))
        seed = seed_of(0, "teacher's answer", number)
        (made,) = generate(world.model, [ids], sampling, tokenizer=TOKENIZER, seeds=[seed])
        n_cut += made.finish_reason == "length"
        if made.finish_reason == "stop" and made.text.strip():
            answer = {"role": "assistant", "content": made.text}
            expected.append({**row, "messages": [*asked, answer]})
    assert found == expected and n_cut and len(found) > 5
    assert f"{len(found)} by the teacher" in world.said[-1]
    n_empty = N - n_cut - len(found)
    told = f"; left out: {n_cut} not done after 6 tokens" + (f"; left out: {n_empty} without a word" if n_empty else "")
    assert world.said[-1].endswith(told)
    assert world.n_loaded == 1


def test_they_are_written_once(tmp_path: Path) -> None:
    """Found again whatever the batch size; another teacher, tokenizer, source, seed or setting is another file."""
    world = World(tmp_path)
    first = world.run()
    content = first.read_bytes()
    assert world.run() == world.run(settings={"batch_size": 5}) == first and world.n_loaded == 1
    assert not list(first.parent.glob("*.parts"))
    other = World(tmp_path / "other").run(settings={"batch_size": 64})
    assert other.name == first.name and other.read_bytes() == content
    template = tmp_path / "template"
    template.write_text(TOKENIZER.chat_template or "")
    own = Tokenizer.train([], TokenizerConfig(kind="byte", special=("<|tool|>",)))
    names = [
        world.run(**changes)
        for changes in (
            {"seed": 1},
            {"precision": "bf16"},
            {"settings": {"temperature": 0.5}},
            {"settings": {"max_new_tokens": 11}},
            {"data": world.data.model_copy(update={"system": "be kind"})},
            {"source": world.data.sources[0].model_copy(update={"limit": 7})},
            {"tokenizer": own},
        )
    ]
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"Weights")
    names.append(world.run())
    lines = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(lines.replace("qq1", "qq2"))
    names.append(world.run())
    assert len({first, *names}) == len(names) + 1
    assert names[0].read_bytes() != content and len(read(names[5])) <= 7


def test_stopped_and_resumed_it_is_the_same_file(tmp_path: Path) -> None:
    """It stops within an answer, and the shards that are done are not asked for again."""
    expected = World(tmp_path / "a").run().read_bytes()
    world = World(tmp_path / "b")
    polls, n_stops = 0, 0

    def should_stop(after: int) -> Callable[[], bool]:
        nonlocal polls
        polls = 0

        def stop() -> bool:
            nonlocal polls
            polls += 1
            return polls > after

        return stop

    while True:
        try:
            file = world.run(should_stop=should_stop(30))
            break
        except Interrupted:
            n_stops += 1
            assert n_stops < 20
    assert n_stops > 1 and file.read_bytes() == expected


_KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from llmkit import storage
from llmkit.distill import answers
from test_teacher_answers import World
answers._SHARD_ROWS = 4
rename, n = storage.disk.rename, 0
def dies(old, new):
    global n
    n += str(new).endswith(".jsonl")
    if n == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(old, new)
storage.disk.rename = dies
World(Path({folder!r})).run()
"""


@pytest.mark.parametrize("at", [3, 7])
def test_killed_and_resumed_it_is_the_same_file(tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed while it writes a shard, or the whole, has lost that one alone."""
    expected = World(tmp_path / "a").run().read_bytes()
    script = _KILLED.format(tests=str(Path(__file__).parent), at=at, folder=str(tmp_path / "b"))
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    shards = sorted((tmp_path / "b" / "cache").glob("*.parts/0*.jsonl"))
    assert len(shards) == at - 1 and not list((tmp_path / "b" / "cache").glob("*.jsonl"))
    stamps = [s.stat().st_mtime_ns for s in shards]
    world = World(tmp_path / "b")
    kept: list[int] = []
    join = answers._join

    def watched(found: list[Path], *rest: Any) -> None:
        kept.extend(s.stat().st_mtime_ns for s in found[: len(shards)])
        join(found, *rest)

    monkeypatch.setattr(answers, "_join", watched)
    assert world.run().read_bytes() == expected
    assert kept == stamps


def test_parts_of_several_jobs_make_the_file_of_one(tmp_path: Path) -> None:
    expected = World(tmp_path / "a").run().read_bytes()
    world = World(tmp_path / "b")
    file = world.run(part=(2, 3))
    assert not file.exists() and [s.name for s in sorted(file.with_suffix(".parts").glob("*.jsonl"))] == [
        "000001.jsonl",
        "000004.jsonl",
    ]
    for i in (1, 3):
        assert world.run(part=(i, 3)) == file
    assert world.n_loaded == 3 and not file.exists()
    assert world.run() == file and file.read_bytes() == expected and world.n_loaded == 3


def test_they_are_read_as_conversations(tmp_path: Path) -> None:
    """What was no conversation is counted by that reading, as it would be in the data; columns and limits are done with."""
    data = rows()
    data[3]["messages"] = [{"role": "user", "content": "nobody answers"}]
    data[9]["messages"][-1]["content"] = ""
    named = [{"talk": r["messages"], **{k: v for k, v in r.items() if k != "messages"}} for r in data]
    world = World(tmp_path, named)
    source = SourceConfig(path=str(tmp_path / "rows.jsonl"), columns={"messages": "talk"}, limit=20, weight=2.0)
    file = world.run(source)
    assert sum("left_out" in line for line in read(file)) == 2
    made = source_of_answers(source, file)
    assert (made.label, made.weight, made.columns, made.limit) == (source.label, 2.0, {}, None)
    cfg = world.data.model_copy(update={"path": None, "train": (made,), "max_dropped_frac": 0.5, "valid_frac": 0.0})
    (chats,) = prepare_chats(cfg, TOKENIZER, row_len=255).train
    assert chats.n_dropped == 2 and chats.name == source.label
    plain = cfg.model_copy(update={"train": (source,)})
    whole = prepare_chats(plain, TOKENIZER, row_len=255)  # the data's own answers
    assert whole.train[0].n_dropped == 2 and chats.hash != whole.train[0].hash


def test_prompts_may_be_text(tmp_path: Path) -> None:
    data = [{"prompt": f"q{i}", "completion": "old"} for i in range(9)]
    world = World(tmp_path, data, chat=False)
    world.model = model()
    with torch.no_grad():
        world.model.head_weight[TOKENIZER.eos_id] = world.model.head_weight[TOKENIZER.end_of_turn_id]
    found = read(world.run())
    assert found and all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in found)
    assert {row["messages"][0]["content"] for row in found} <= {f"q{i}" for i in range(9)}
    made = source_of_answers(world.data.sources[0], world.run())
    cfg = world.data.model_copy(update={"path": None, "train": (made,), "valid_frac": 0.0})
    (chats,) = prepare_chats(cfg, TOKENIZER, row_len=255).train
    assert len(chats) + chats.n_dropped == len(found)


def test_what_cannot_be_asked_is_left_out(tmp_path: Path) -> None:
    """A question that fills the teacher's context, and a conversation that begins with its answer."""
    data = rows(8)
    data[1]["messages"] = [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]
    data[2]["messages"] = [{"role": "assistant", "content": "hello"}]
    world = World(tmp_path, data)
    found = read(world.run())
    assert all(len(row["messages"][0]["content"]) < 300 for row in found)
    assert "1 whose question fills the teacher's context; left out: 1 that ask nothing" in world.said[-1]


def test_errors_are_for_people(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(
        UserError, match=r"none of the teacher's answers .* 22 were not done after 1 tokens \(teacher_an"
    ):
        world.model = model(ends=-50.0)
        world.run(settings={"max_new_tokens": 1, "temperature": 0.0})
    strict = Tokenizer(TOKENIZER._spec, TOKENIZER.names, None)
    with pytest.raises(UserError, match=r"rows.jsonl:1: this tokenizer has no chat template"):
        world.run(tokenizer=strict)
    file = world.run(part=(2, 2))
    shard = min(file.with_suffix(".parts").glob("*.jsonl"))
    shard.write_text("{")
    with pytest.raises(UserError, match=f"{shard.name}: damaged: .* delete it and start again"):
        world.run()


def test_the_cache_may_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(old: Any, new: Any) -> None:
        raise OSError(28, "No space left on device")

    world = World(tmp_path)
    monkeypatch.setattr(storage.disk, "rename", full)
    with pytest.raises(Exception, match=r"the cache cannot be written: No space left .*data.cache_dir"):
        world.run()
