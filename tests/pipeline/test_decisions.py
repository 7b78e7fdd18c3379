"""What is done again and what is not: every kind of change, and every place at which a run may have died."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmkit.pipeline import runner as runner_module
from llmkit.pipeline.graph import Node
from llmkit.pipeline.runner import Runner, decide, forget
from llmkit.pipeline.state import State
from llmkit.storage import Draft


class Fake:
    """Nodes that are done at once: each writes what its inputs and its recipe say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.ran: list[str] = []
        self.fails: dict[str, int] = {}
        monkeypatch.setattr(Runner, "_process", lambda _, node: self.process(node))

    def process(self, node: Node) -> int:
        self.ran.append(node.name)
        if code := self.fails.pop(node.name, 0):
            node.folder.mkdir(parents=True, exist_ok=True)
            (node.folder / "half").touch()
            return code
        if node.does == "tokenizer":
            node.folder.mkdir(parents=True, exist_ok=True)
            (node.folder / "tokenizer.json").write_text("{}")
        elif node.recipe is not None:
            draft = Draft(node.folder / "checkpoints" / "step-00000004", 10)
            draft.write("config.json", [json.dumps(node.what).encode()])
            draft.commit({"step": 4})
            (node.folder / "DONE").touch()
        elif node.file:
            (node.folder / node.file).write_text(json.dumps(node.what))
        else:
            node.folder.mkdir()  # raises, as quantize does, where there is one
            (node.folder / "config.json").touch()
        return 0


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch)


def go(world: Any, fake: Fake, *overrides: str, again: str | None = None) -> tuple[int, list[str], dict[str, str]]:
    """One `llmkit run`: its exit code, the nodes whose process was started, and why."""
    pipeline = world.read(*overrides)
    state = State.read(pipeline)
    if again is not None:
        forget(pipeline, state, again)
    fake.ran = []
    actions = decide(pipeline, state, list(pipeline.nodes))
    code = Runner(pipeline, state, lambda _: None).run(actions)
    return code, fake.ran, {a.node.name: a.why for a in actions}


ALL = ["tokenizer", "pretrain", "sft", "int8", "answers"]


def test_a_second_run_does_nothing(world: Any, fake: Fake) -> None:
    assert go(world, fake)[:2] == (0, ALL)
    code, ran, why = go(world, fake)
    assert (code, ran) == (0, []) and set(why.values()) == {"done"}
    kept = json.loads((world.out / "pipeline.json").read_bytes())
    assert kept["order"] == ALL and all(one["status"] == "done" for one in kept["nodes"].values())


def test_a_changed_recipe_redoes_what_hangs_on_it_and_deletes_nothing(world: Any, fake: Fake) -> None:
    go(world, fake)
    code, ran, why = go(world, fake, "sft.optim.lr=0.5")
    assert (code, ran) == (0, ["sft", "int8", "answers"])
    assert why["sft"] == "optim.lr: 0.001 -> 0.5" and why["int8"] == "sft changed"
    assert (world.out / "sft.old-1" / "DONE").is_file() and (world.out / "int8.old-1" / "config.json").is_file()
    assert go(world, fake)[1] == ["sft", "int8", "answers"], "and back again"
    assert (world.out / "sft.old-2").is_dir()


@pytest.mark.parametrize("override", ["sft.save.keep=7", "sft.log.every=1", "sft.eval.samples.prompts=[a]"])
def test_what_changes_no_result_redoes_nothing(world: Any, fake: Fake, override: str) -> None:
    go(world, fake)
    assert go(world, fake, override)[1] == []


def test_a_changed_file_redoes_who_reads_it(world: Any, fake: Fake) -> None:
    go(world, fake)
    with (world.root / "chats.jsonl").open("a") as f:
        f.write('{"prompt": "a", "completion": "b"}\n')
    _, ran, why = go(world, fake)
    assert ran == ["sft", "int8", "answers"] and why["sft"] == f"{world.root / 'chats.jsonl'} changed"


def test_a_touched_file_with_the_same_content_redoes_nothing(world: Any, fake: Fake) -> None:
    go(world, fake)
    (world.root / "chats.jsonl").touch()
    assert go(world, fake)[1] == []


def test_changed_code_redoes_everything(world: Any, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    go(world, fake)
    monkeypatch.setattr(runner_module, "version", lambda _: "9.9")
    _, ran, why = go(world, fake)
    assert ran == ALL and why["tokenizer"] == "the code changed"


def test_a_moved_pipeline_is_still_done(world: Any, fake: Fake) -> None:
    go(world, fake)
    shutil.move(world.out, world.root / "elsewhere")
    assert go(world, fake, f"out={world.root / 'elsewhere'}")[1] == []


def test_a_result_that_is_gone_is_made_again_only_where_it_is_needed(world: Any, fake: Fake) -> None:
    go(world, fake)
    shutil.rmtree(world.out / "pretrain")
    _, ran, why = go(world, fake)
    assert ran == [] and "not needed" in why["pretrain"]
    assert go(world, fake, "sft.seed=3")[1] == ["pretrain", "sft", "int8", "answers"]
    shutil.rmtree(world.out / "int8")
    assert go(world, fake, "sft.seed=3")[1] == ["int8"]


def test_a_failure_stops_there_and_the_same_command_goes_on(world: Any, fake: Fake) -> None:
    fake.fails = {"sft": 3}
    code, ran, _ = go(world, fake)
    assert (code, ran) == (3, ["tokenizer", "pretrain", "sft"])
    code, ran, why = go(world, fake)
    assert (code, ran) == (0, ["sft", "int8", "answers"]) and why["sft"] == "failed"
    assert (world.out / "sft" / "half").exists(), "a run resumes in its own folder"


def test_what_a_killed_command_left_is_no_obstacle(world: Any, fake: Fake) -> None:
    fake.fails = {"int8": -9}
    (draft := world.out / "int8.tmp-0123abcd").mkdir(parents=True)
    assert go(world, fake)[0] == 1
    assert go(world, fake)[:2] == (0, ["int8", "answers"])
    assert not (world.out / "int8" / "half").exists() and not draft.exists()


def test_a_stop_is_75(world: Any, fake: Fake) -> None:
    fake.fails = {"sft": 75}
    assert go(world, fake)[0] == 75
    assert json.loads((world.out / "pipeline.json").read_bytes())["nodes"]["sft"]["status"] == "stopped"


def test_from_does_a_node_and_all_behind_it_again(world: Any, fake: Fake) -> None:
    go(world, fake)
    assert go(world, fake, again="sft")[1] == ["sft", "int8", "answers"]
    assert go(world, fake)[1] == []
    fake.fails = {"int8": 75}
    assert go(world, fake, again="sft")[1] == ["sft", "int8"]
    assert go(world, fake)[1] == ["int8", "answers"], "without --from it goes on"


def test_a_folder_that_somebody_else_made_is_moved_aside(world: Any, fake: Fake) -> None:
    (world.out / "sft").mkdir(parents=True)
    (world.out / "sft" / "mine").touch()
    assert go(world, fake)[0] == 0
    assert (world.out / "sft.old-1" / "mine").exists()


N_CHANGES = 10  # renames, and files that are removed, from the first to the last of the test below


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it is done."""


@pytest.mark.parametrize("n", range(1, N_CHANGES + 1))
def test_killed_at_any_write_it_ends_with_the_same(
    world: Any, fake: Fake, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """A changed pipeline, dying at the n-th change on disk: what is there in the end is as if it hadn't."""
    go(world, fake)
    count = 0

    def dying(self: Any, function: str, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == n:
            raise Killed
        return getattr(type(self), f"plain_{function}")(self, *args)

    disk = type(runner_module.disk)
    for name in ("rename", "unlink", "remove_tree"):
        monkeypatch.setattr(disk, f"plain_{name}", getattr(disk, name), raising=False)
        monkeypatch.setattr(disk, name, lambda self, *args, name=name: dying(self, name, *args))
    with pytest.raises(Killed):
        go(world, fake, "sft.optim.lr=0.5")
    count = -(10**6)
    assert go(world, fake, "sft.optim.lr=0.5")[0] == 0
    newest = world.out / "sft" / "checkpoints" / "step-00000004" / "config.json"
    assert json.loads(newest.read_bytes())["optim.lr"] == 0.5
    assert json.loads((world.out / "answers" / "rows.jsonl").read_bytes())["model"] == "{node: sft}"
    assert all(o["status"] == "done" for o in json.loads((world.out / "pipeline.json").read_bytes())["nodes"].values())
    assert go(world, fake, "sft.optim.lr=0.5")[1] == []
    old = Path(world.out / "sft.old-1" / "checkpoints" / "step-00000004" / "config.json")
    assert json.loads(old.read_bytes())["optim.lr"] == 0.001, "the old run is kept, once"
    assert not (world.out / "sft.old-2").exists()
