"""A run that is killed, stopped or crashes anywhere ends bitwise as one that never was: R1, R2, R5, R7, R8, D8."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reliability import (
    Crash,
    Server,
    ShimDisk,
    assert_same,
    flip_bit,
    good_steps,
    last_step,
    leftovers,
    read_jsonl,
    result_of,
    tiny_recipe,
    train,
    wait_for,
)

from llmkit import storage
from llmkit.stages.pretrain import PretrainTask
from llmkit.storage import Disk, checkpoints_of, newest_good, step_name
from llmkit.training import loop
from llmkit.training.engine import Engine

PREEMPTED, STOPPED_ITSELF, USER_MISTAKE = 75, 3, 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an uninterrupted run in `reference/`."""
    folder = tmp_path_factory.mktemp("world")
    assert train(tiny_recipe(folder, out=str(folder / "reference"))) == 0
    assert read_jsonl(folder / "reference" / "metrics.jsonl")[-2]["train/epoch"] > 2
    return folder


@pytest.fixture(scope="module")
def server(world: Path) -> Iterator[Server]:
    (world / "logs").mkdir()
    with Server(world / "logs") as it:
        yield it


@pytest.fixture
def fresh(world: Path, request: pytest.FixtureRequest) -> Callable[..., tuple[Path, Path]]:
    """fresh(**changes) -> a recipe with a folder of its own, and that folder."""

    def make(**changes: Any) -> tuple[Path, Path]:
        run = world / "".join(c if c.isalnum() else "_" for c in request.node.name)
        return tiny_recipe(world, out=str(run), **changes), run

    return make


Fresh = Callable[..., tuple[Path, Path]]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, do: Callable[[Engine], None]) -> None:
    """Does something when the given update begins, once."""
    original = PretrainTask.step

    def wrapped(self: PretrainTask, engine: Engine, ctx: loop.Context) -> Any:
        if engine.step + 1 == step:
            monkeypatch.setattr(PretrainTask, "step", original)
            do(engine)
        return original(self, engine, ctx)

    monkeypatch.setattr(PretrainTask, "step", wrapped)


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


# --- stopping and going on -------------------------------------------------------------------------------------------


def test_the_reference_is_what_it_should_be(world: Path) -> None:
    run = world / "reference"
    assert_same(run, run)
    told = json.loads((run / "checkpoints" / step_name(48) / "trainer_state" / "state.json").read_text())
    best = told["progress"]["best_saved_step"]
    assert good_steps(run) == sorted({48, 44, best}, reverse=True)  # keep: 2, and the best
    assert (run / "DONE").is_file() and not (run / "PREEMPTED").exists()
    assert [r["step"] for r in read_jsonl(run / "metrics.jsonl") if "valid/loss" in r] == list(range(0, 49, 6))
    assert [r["step"] for r in read_jsonl(run / "samples.jsonl")] == list(range(0, 49, 6))


def test_stop_at_twice(world: Path, fresh: Fresh) -> None:
    """Once where a checkpoint is due and once where none is."""
    recipe, run = fresh()
    assert train(recipe, "stop_at=20") == 0
    assert last_step(run) == 20 and good_steps(run)[0] == 20 and not (run / "DONE").exists()
    assert train(recipe, "stop_at=33") == 0
    assert good_steps(run)[0] == 33
    assert train(recipe) == 0
    assert_same(run, world / "reference")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_in_a_step(world: Path, fresh: Fresh, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """R5: the step is finished and saved, exit code 75; a second signal changes nothing."""
    recipe, run = fresh()
    at_step(monkeypatch, 15, lambda engine: (send(number), send(signal.SIGTERM), None)[2])
    handler = signal.getsignal(number)
    assert train(recipe) == PREEMPTED
    assert signal.getsignal(number) is handler
    assert (run / "PREEMPTED").is_file() and good_steps(run)[0] == last_step(run) == 15
    assert train(recipe) == 0
    assert not (run / "PREEMPTED").exists()
    assert_same(run, world / "reference")


@pytest.mark.parametrize("step", [0, 18, 24, 48])
def test_a_signal_in_an_evaluation(world: Path, fresh: Fresh, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """B101: cut short and done again; at a step without a checkpoint of its own (18), with one (24), at both ends."""
    recipe, run = fresh()
    original = PretrainTask.evaluate

    def evaluate(self: PretrainTask, engine: Engine, ctx: loop.Context, split: str) -> Any:
        if engine.step == step and split == "valid" and not ctx.stop:
            send()
            monkeypatch.setattr(PretrainTask, "evaluate", original)
        return original(self, engine, ctx, split)

    monkeypatch.setattr(PretrainTask, "evaluate", evaluate)
    assert train(recipe) == PREEMPTED
    assert good_steps(run)[:1] == ([step] if step else [])
    assert step not in [r["step"] for r in read_jsonl(run / "metrics.jsonl") if "valid/loss" in r]
    assert train(recipe) == 0
    assert_same(run, world / "reference")


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_among_the_samples(world: Path, fresh: Fresh, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """An evaluation counts as a whole: no samples without metrics, no metrics without samples."""
    from llmkit.training import supervised

    recipe, run = fresh()
    original, calls = supervised.generate, []

    def generate(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4 and when == "before":
            send()
        result = original(*args, **kwargs)
        if len(calls) == 4 and when == "after":
            send()
        return result

    monkeypatch.setattr(supervised, "generate", generate)
    assert train(recipe) == PREEMPTED
    assert train(recipe) == 0
    assert_same(run, world / "reference")


def test_a_signal_while_data_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B101: nothing is saved for there is nothing to save; the exit code is the same."""
    recipe = tiny_recipe(tmp_path, steps=4)
    original = PretrainTask.prepare

    def prepare(self: PretrainTask, ctx: loop.Context) -> None:
        if not (tmp_path / "cache" / "hashes.json").exists():
            send()
        original(self, ctx)

    monkeypatch.setattr(PretrainTask, "prepare", prepare)
    assert train(recipe) == PREEMPTED
    assert (tmp_path / "run" / "PREEMPTED").is_file()
    monkeypatch.setattr(PretrainTask, "prepare", original)
    assert train(recipe) == 0


def test_a_signal_while_a_save_is_under_way(world: Path, fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Second signals too: the save ends, once."""
    recipe, run = fresh()
    original, sent = Disk.sync, []

    def first(engine: Engine) -> None:
        sent.append(signal.SIGTERM)
        send()

    def sync(self: Disk, fd: int) -> None:
        if sent:
            sent.append(signal.SIGINT)
            send(signal.SIGINT)
        original(self, fd)

    at_step(monkeypatch, 9, first)  # the save of step 8 has just begun
    monkeypatch.setattr(Disk, "sync", sync)
    assert train(recipe) == PREEMPTED
    assert good_steps(run)[:2] == [9, 8] and len(sent) > 5
    monkeypatch.undo()
    assert train(recipe) == 0
    assert_same(run, world / "reference")


# --- dying -----------------------------------------------------------------------------------------------------------


def test_kill_9_in_three_places(world: Path, fresh: Fresh, server: Server) -> None:
    """R1, B93, B107, B110, B117: in the first epoch, with a save half done, and in the third epoch."""
    recipe, run = fresh()

    def half_saved() -> bool:
        return last_step(run) >= 20 and any(".tmp-" in p.name for p in (run / "checkpoints").iterdir())

    for moment in (lambda: last_step(run) >= 10, half_saved, lambda: last_step(run) >= 41):
        child = server.start(recipe)
        wait_for(moment)
        child.kill()
        assert child.wait() == -signal.SIGKILL, child.said
    child = server.start(recipe)
    assert child.wait() == 0, child.said
    assert "resumed from" in child.said
    assert_same(run, world / "reference")


def test_sigterm_to_a_process(world: Path, fresh: Fresh, server: Server) -> None:
    recipe, run = fresh()
    child = server.start(recipe)
    wait_for(lambda: last_step(run) >= 5)
    child.kill(signal.SIGTERM)
    assert child.wait() == PREEMPTED, child.said
    assert "stopped by SIGTERM" in child.said
    assert server.start(recipe).wait() == 0
    assert_same(run, world / "reference")


def test_two_processes_do_not_train_in_one_folder(fresh: Fresh, server: Server) -> None:
    recipe, run = fresh(steps=1000)
    first = server.start(recipe)
    wait_for(lambda: last_step(run) >= 3)
    second = server.start(recipe)
    assert second.wait() == USER_MISTAKE and "another process is training here" in second.said
    first.kill()
    assert first.wait() == -signal.SIGKILL


def test_a_crash_at_random_file_operations_of_a_run(world: Path, fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    """R2, R6: in saves, logs, marks, deletions, and in the restarts as well; each start gets further or dies early."""
    recipe, run = fresh()
    pick = random.Random(3)
    crashes = 0
    for lives in (5, 20, 40, 60, 90, 150, 200, 250, 300, 350):
        monkeypatch.setattr(storage, "disk", ShimDisk(pick.randint(1, 5 * lives), half=pick.random() < 0.5))
        try:
            assert train(recipe) == 0
        except Crash:
            crashes += 1
    assert crashes >= 6
    monkeypatch.setattr(storage, "disk", ShimDisk())
    assert train(recipe) == 0
    assert_same(run, world / "reference")


def test_a_full_disk_stops_with_one_sentence_and_space_lets_it_go_on(
    world: Path, fresh: Fresh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """C3, C4, B106: in the background save, in the log, in a file of the run's folder."""
    import errno

    recipe, run = fresh()
    for at, half in ((3, False), (40, True), (90, True), (140, False)):
        monkeypatch.setattr(storage, "disk", ShimDisk(at, errno.ENOSPC, half))
        before = good_steps(run)
        assert train(recipe) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert str(run) in error and "No space left on device" in error and "bytes are free" in error
        assert good_steps(run)[: len(before)] >= before
    monkeypatch.setattr(storage, "disk", ShimDisk())
    assert train(recipe) == 0
    assert_same(run, world / "reference")


def test_too_little_space_is_said_before_the_first_step(
    fresh: Fresh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = fresh()
    monkeypatch.setattr(Disk, "free", lambda self, path: 1000)
    assert train(recipe) == 1
    assert "MB are needed for a checkpoint but 0.0 MB are free" in capsys.readouterr().err
    assert last_step(run) == 0


# --- what is found on disk -------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_passed_over_aloud(
    world: Path, fresh: Fresh, capsys: pytest.CaptureFixture[str]
) -> None:
    """B98: also with keep=1, where a damaged newer one must not count as the one to keep."""
    recipe, run = fresh()
    assert train(recipe, "stop_at=24", "save.keep=2") == 0
    flip_bit(run / "checkpoints" / step_name(24) / "trainer_state" / "optimizer.safetensors", 90_000)
    capsys.readouterr()
    assert train(recipe, "stop_at=21", "save.keep=1") == 0
    said = capsys.readouterr().out
    assert (
        "step-00000024 was passed over: trainer_state/optimizer.safetensors: its SHA-256 is not the manifest's" in said
    )
    assert "is now damaged-step-00000024-" in said and f"resumed from {run}/checkpoints/step-00000020" in said
    assert good_steps(run)[0] == 21
    assert train(recipe) == 0
    assert_same(run, world / "reference")


def test_when_no_checkpoint_holds_nothing_is_begun_anew(fresh: Fresh, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, run = fresh()
    assert train(recipe, "stop_at=8") == 0
    for folder in checkpoints_of(run):
        (folder / "manifest.json").write_text("{}")
    metrics = (run / "metrics.jsonl").read_bytes()
    assert train(recipe) == USER_MISTAKE
    assert "no checkpoint of this run holds" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == metrics and len(checkpoints_of(run)) == 2


def test_leftovers_of_every_kind_are_swept(world: Path, fresh: Fresh) -> None:
    """B96: half a save, half a deletion, half a replaced file, half a line of the log."""
    recipe, run = fresh()
    assert train(recipe, "stop_at=22") == 0
    good, _ = newest_good(run)
    assert good is not None
    for name in ("step-00000024.tmp-0a1b2c3d", ".trash-step-00000016-0a1b2c3d"):
        shutil.copytree(good, run / "checkpoints" / name)
        (run / "checkpoints" / name / "manifest.json").unlink()
    (run / ".recipe.yaml.tmp-0a1b2c3d").write_text("stage: pre")
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"step": 23, "train/loss": 1.0}\n{"step": 24, "trai')
    with (run / "samples.jsonl").open("a") as f:
        f.write('{"step": 24')
    assert train(recipe) == 0
    assert_same(run, world / "reference")


def test_a_finished_run_is_left_alone(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """R7, B113: neither bytes nor time stamps change; keys that don't matter may differ."""
    run = world / "reference"
    recipe = tiny_recipe(world, out=str(run))

    def look() -> dict[str, tuple[int, bytes]]:
        return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob("*") if p.is_file()}

    before = look()
    assert train(recipe) == 0
    assert train(recipe, "save.keep=5", "stop_at=10") == 0
    assert "this run is finished: nothing to do" in capsys.readouterr().out
    assert look() == before


def test_a_changed_recipe_is_shown_and_refused_unless_allowed(fresh: Fresh, capsys: pytest.CaptureFixture[str]) -> None:
    """R7, B111."""
    recipe, run = fresh()
    assert train(recipe, "stop_at=8") == 0
    before = result_of(run)
    capsys.readouterr()
    assert train(recipe, "optim.lr=1e-3", "batch.micro_tokens=64", "save.keep=1") == USER_MISTAKE
    error = capsys.readouterr().err
    assert "  optim.lr: 0.003 -> 0.001\n" in error and "  batch.micro_tokens: 128 -> 64\n" in error
    assert "save.keep" not in error and "allow_changes=true" in error
    assert result_of(run) == before
    assert train(recipe, "optim.lr=1e-3", "allow_changes=true", "stop_at=12") == 0
    assert "recipe changed: optim.lr: 0.003 -> 0.001" in capsys.readouterr().out
    assert train(recipe, "optim.lr=1e-3", "stop_at=14") == 0  # allowed once, it is the run's recipe
    lrs = [r["train/lr"] for r in read_jsonl(run / "metrics.jsonl") if "train/lr" in r]
    assert len(lrs) == 14 and lrs[8] < 0.5 * lrs[7]


def test_a_longer_run_of_a_finished_one_must_be_allowed(fresh: Fresh, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, run = fresh(steps=8)
    assert train(recipe) == 0
    assert train(recipe, "steps=12") == USER_MISTAKE
    assert "steps: 8 -> 12" in capsys.readouterr().err and (run / "DONE").exists()
    assert train(recipe, "steps=12", "allow_changes=true") == 0
    assert good_steps(run)[0] == 12 and json.loads((run / "DONE").read_text())["step"] == 12


def test_a_changed_environment_is_said(fresh: Fresh, capsys: pytest.CaptureFixture[str]) -> None:
    """B114: another number of threads or another torch may change the last bits."""
    recipe, run = fresh()
    assert train(recipe, "stop_at=4") == 0
    file = run / "environment.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "threads": told["threads"] + 7}))
    capsys.readouterr()
    assert train(recipe, "stop_at=5") == 0
    assert f"environment changed: threads: {told['threads'] + 7} -> {told['threads']}" in capsys.readouterr().out
    assert train(recipe, "stop_at=6") == 0
    assert "environment changed" not in capsys.readouterr().out


# --- stopping itself -------------------------------------------------------------------------------------------------


def test_a_nan_stops_before_the_update_and_keeps_the_batch(
    world: Path, fresh: Fresh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """D8: exit code 3; the same run goes on from its last checkpoint once the cause is gone."""
    recipe, run = fresh()

    def poison(engine: Engine) -> None:
        next(iter(engine.parameters.values())).data.view(-1)[0] = float("nan")

    at_step(monkeypatch, 15, poison)
    assert train(recipe) == STOPPED_ITSELF
    assert "step 15: " in capsys.readouterr().err
    assert sorted(p.name for p in (run / "nonfinite").iterdir()) == [
        "step-00000015-rank0.json", "step-00000015-rank0.safetensors",
    ]  # fmt: skip
    told = json.loads((run / "nonfinite" / "step-00000015-rank0.json").read_text())
    assert told["step"] == 15 and told["tensors"]
    assert good_steps(run)[0] == 12 and last_step(run) == 14 and leftovers(run) == []
    assert not (run / "DONE").exists()
    assert train(recipe) == 0
    assert_same(run, world / "reference")


def test_weights_that_are_not_finite_are_not_saved(
    fresh: Fresh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """D8: what an update itself overflowed, with a finite loss and gradient before it, is seen at the save."""
    recipe, run = fresh()
    original = Engine.update

    def update(self: Engine, *args: Any, **kwargs: Any) -> Any:
        metrics = original(self, *args, **kwargs)
        if self.step == 8:
            next(iter(self.ema.values())).view(-1)[3] = float("inf")
        return metrics

    monkeypatch.setattr(Engine, "update", update)
    assert train(recipe) == STOPPED_ITSELF
    assert "step 8: weights nan in trainer_state/ema.safetensors: " in capsys.readouterr().err
    assert good_steps(run) == [4] and leftovers(run) == []


def test_an_absurd_learning_rate_stops_the_run_or_ends_it_finite(fresh: Fresh) -> None:
    recipe, run = fresh(optim={"lr": 1e30, "clip": None, "ema_decay": None})
    assert train(recipe) == STOPPED_ITSELF
    for folder in checkpoints_of(run):
        for tensors in loop.checkpoint.load(folder)[0].values():
            assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


@pytest.mark.parametrize("every", [4, 5])
def test_early_stopping_and_its_resume(fresh: Fresh, every: int, world: Path) -> None:
    """B109: the count of bad evaluations survives; the end is the same whether a checkpoint was due there or not."""
    changes = {"eval": {"every": 4, "patience": 2, "min_delta": 0.8}, "save": {"every": every}}
    recipe, run = fresh(**changes)
    assert train(recipe) == 0
    ended = last_step(run)
    assert 8 <= ended < 48 and json.loads((run / "DONE").read_text())["step"] == ended
    assert good_steps(run)[0] == ended
    other = tiny_recipe(world, out=f"{run}-2", **changes)
    assert train(other, f"stop_at={ended - 3}") == 0
    assert train(other) == 0
    assert_same(Path(f"{run}-2"), run)
    assert train(other) == 0  # and again is nothing


def test_another_metric_and_the_other_direction(fresh: Fresh) -> None:
    """What early stopping and keep_best look at: of a loss that falls, the highest is the first."""
    metric = {"every": 4, "metric": "valid/perplexity", "better": "higher", "patience": 3}
    recipe, run = fresh(eval=metric, save={"every": 4, "keep": 1})
    assert train(recipe) == 0
    values = {r["step"]: r["valid/perplexity"] for r in read_jsonl(run / "metrics.jsonl") if "valid/loss" in r}
    assert list(values) == [0, 4, 8, 12] and values[0] == max(values.values())
    assert json.loads((run / "DONE").read_text()) == {"step": 12, "metric": "valid/perplexity", "best": values[0]}
    best = max((v, s) for s, v in values.items() if s)[1]
    assert good_steps(run) == sorted({12, best}, reverse=True)
    assert "no better valid/perplexity in 3 evaluations" in (run / "train.log").read_text()


def test_a_metric_that_is_not_there(fresh: Fresh, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, run = fresh(eval={"metric": "valid/acuracy"})
    assert train(recipe) == USER_MISTAKE
    error = capsys.readouterr().err
    assert "eval.metric: 'valid/acuracy' is not evaluated: choose one of valid/loss, valid/perplexity, " in error
    assert last_step(run) == 0 and error.count("\n") == 1


def test_everything_that_changes_in_the_loop_is_in_the_checkpoint(
    fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B109 by reflection: after a resume every number of engine, progress and optimizer is what it was."""
    kept: list[dict[str, Any]] = []

    def note(engine: Engine) -> None:
        numbers = {k: v for k, v in vars(engine).items() if isinstance(v, int | float)}
        tensors = {f"{f}/{n}": t.clone() for f, ts in engine.tensors().items() for n, t in ts.items()}
        kept.append({**numbers, **tensors})

    recipe, _ = fresh()
    at_step(monkeypatch, 11, note)
    assert train(recipe, "stop_at=11") == 0
    recipe.write_text(recipe.read_text().replace(str(fresh()[1]), f"{fresh()[1]}-2"))
    assert train(recipe, "stop_at=10") == 0
    at_step(monkeypatch, 11, note)
    assert train(recipe, "stop_at=11") == 0
    a, b = kept
    assert a.keys() == b.keys() and len(a) > 20
    for name, value in a.items():
        assert torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name], name
