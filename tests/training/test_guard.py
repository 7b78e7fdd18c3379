"""The spike guard: what it sees, what it leaves out, and that a run with skips and rollbacks is as exact as any: D8, D9."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from ports import free_port
from reliability import (
    Crash,
    ShimDisk,
    assert_same,
    good_steps,
    read_jsonl,
    result_of,
    tiny_recipe,
    train,
)
from test_ranks import on_ranks
from toys import largest_difference, linear, points, recipe, regression, same_bits, snapshot

from llmkit import storage
from llmkit.losses import LossSum
from llmkit.storage import checkpoints_of, newest_good
from llmkit.training.config import GuardConfig, LogConfig, RunConfig
from llmkit.training.dist import Ranks
from llmkit.training.engine import Engine, NonFinite, Spike
from llmkit.training.guard import Guard, Window, learnt_windows

STOPPED_ITSELF, USER_MISTAKE = 3, 2


# --- the detector ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 8])
def test_window_against_numpy(size: int) -> None:
    """(x - median) / (1.4826 MAD) of the last values, kept in order as they come and go, also equal ones."""
    values = np.random.default_rng(0).normal(3, 1, 60).round(1).tolist()
    window = Window(size, 1e-3, relative=True)
    for i, value in enumerate(values):
        if i:
            last = np.array(values[max(0, i - size) : i])
            spread = max(1.4826 * np.median(abs(last - np.median(last))), 1e-3 * abs(np.median(last)))
            assert window.score(value) == pytest.approx((value - np.median(last)) / spread, rel=1e-12)
        window.add(value)
    other = Window(size, 1e-3, relative=True)
    other.fill(list(window.values))
    assert other.score(9.0) == window.score(9.0)


def curve(seed: int, steps: int = 600) -> list[tuple[float, float]]:
    """Loss and gradient norm as they are in a run: a steep fall and then a slow one; norms with a heavy upper tail."""
    rng = np.random.default_rng(seed)
    k = np.arange(steps)
    loss = 2.2 + 3 * np.exp(-k / 40) + 0.8 * (1 + k / 50) ** -0.5 + rng.normal(0, rng.uniform(0.01, 0.15), steps)
    norm = (0.3 + 2 * np.exp(-k / 30)) * np.exp(rng.gumbel(0, 0.12, steps))
    return list(zip(loss.tolist(), norm.tolist(), strict=True))


def refused(curve: list[tuple[float, float]], **config: Any) -> list[int]:
    guard, steps = Guard(GuardConfig(action="skip", **config), None), []
    for step, (loss, norm) in enumerate(curve, 1):
        metrics = {"loss": loss, "grad_norm": norm, **guard.scores(loss, norm)}
        if guard.objection(metrics) is None:
            guard.accept(step, loss, norm)
        else:
            steps.append(step)
    return steps


def test_spikes_are_seen_and_nothing_else() -> None:
    """D9: no false alarm in 20 curves; a loss or a norm that is twice or ten times too high for 5 steps is seen at once."""
    assert [refused(curve(seed)) for seed in range(20)] == [[]] * 20
    for seed in range(20):
        high = [(2 * a, b) if 400 <= k < 405 else (a, b) for k, (a, b) in enumerate(curve(seed), 1)]
        assert refused(high) == [400, 401, 402, 403, 404]
        steep = [(a, 10 * b) if k == 400 else (a, b) for k, (a, b) in enumerate(curve(seed), 1)]
        assert refused(steep) == [400]


def test_outliers_in_the_window_hide_no_other() -> None:
    """Why median and MAD: with five spikes among 60 values the mean's z-score of a sixth falls to 3.3."""
    values = [*np.random.default_rng(1).normal(2, 0.05, 55).tolist(), *[6.0] * 5]
    window = Window(64, 1e-3, relative=True)
    window.fill(values)
    assert (6 - np.mean(values)) / np.std(values) < 3.5 < 40 < window.score(6.0)


def test_limits_hold_before_the_warmup_and_null_is_never() -> None:
    assert refused([(2.0, 1.0), (5.1, 1.0), (2.0, 9.0)], max_loss=5.0, max_grad_norm=8.0) == [2, 3]
    steep = [(9.0, 99.0) if k > 300 else c for k, c in enumerate(curve(0))]
    assert refused(steep, loss_z=None, grad_norm_z=None) == []
    assert refused(steep, warmup=128, window=128)[0] == 302 and not refused(steep[:120], warmup=128, window=128)


@pytest.mark.parametrize(("step", "target"), [(0, 0), (9, 0), (10, 0), (13, 0), (14, 4), (17, 4), (18, 8)])
def test_target_is_a_function_of_the_step(step: int, target: int) -> None:
    """And of the saves before it: after that of step 14 what is older than its target may be gone."""
    guard = Guard(GuardConfig(action="rollback", back=10), save_every=4)
    assert guard.target(step) == target
    guard.note_save(14)
    assert guard.target(step) == max(target, 4)


# --- one step --------------------------------------------------------------------------------------------------------


def spoilt(factor: float) -> Callable[..., LossSum]:
    def loss(module: Any, batch: Any) -> LossSum:
        out = regression(module, batch)
        return LossSum(out.total * factor, {"loss": out.total.detach() * factor}, {"n": torch.tensor(len(batch.x))})

    return loss


def guarded(action: str = "skip", **guard: Any) -> RunConfig:
    plain = recipe(name="adamw", lr=0.01, ema_decay=0.9, schedule="cosine", steps=40)
    return RunConfig(**{**plain.model_dump(), "guard": {"action": action, "warmup": 4, "window": 16, **guard}})


@pytest.mark.parametrize("factor", [1e3, math.nan, math.inf])
def test_a_skipped_step_counts_and_changes_nothing(factor: float) -> None:
    """Weights, moments (Adam's own count too), average and detector stay; the schedule goes on; statistics are summed."""
    engine = Engine(linear(), guarded())
    for k in range(8):
        metrics = engine.update([points(20, seed=k), points(25, seed=k)], spoilt(1.0))
    assert engine.stats["n"].item() == 45 and engine.stats["n"].dtype == torch.int64
    assert {"loss_z", "grad_norm_z"} <= set(metrics) and "skipped" not in metrics
    before, state = snapshot(engine), engine.state()
    data = [points(seed=9)]
    metrics = engine.update(data, spoilt(factor))
    assert metrics["skipped"] == 1.0 and same_bits(before, snapshot(engine)) and engine.step == 9 == engine.data_step
    now = engine.state()
    assert now["guard"]["losses"] == state["guard"]["losses"] and now["guard"]["in_a_row"] == 1
    assert now["guard"]["events"] == [
        {"step": 9, "action": "skip", "why": str(engine.refused[0]), "data": [8, 9]}
    ]  # fmt: skip
    assert engine.refused[0].batches is data
    assert isinstance(engine.refused[0], Spike if math.isfinite(factor) else NonFinite)
    written = json.dumps(now["guard"]["events"])
    assert written == json.dumps(json.loads(storage.to_json(now["guard"]["events"])))  # metrics.jsonl holds these bytes
    rate = engine.update([points(seed=10)], spoilt(1.0))["lr"]
    plain = Engine(linear(), recipe(name="adamw", lr=0.01, schedule="cosine", steps=40))
    assert rate == [plain.update([points(seed=k)], regression)["lr"] for k in range(10)][-1]
    assert engine.guard is not None and engine.guard.in_a_row == 0
    json.dumps(engine.state(), allow_nan=False)


@pytest.mark.parametrize(("limit", "n"), [({"max_in_a_row": 2}, 2), ({"max_in_a_row": 9, "max_total": 3}, 3)])
def test_the_budget(limit: dict[str, int], n: int) -> None:
    engine = Engine(linear(), guarded(**limit))
    for k in range(6):
        engine.update([points(seed=k)], spoilt(1.0))
    for _ in range(n):
        assert engine.update([points()], spoilt(math.nan))["skipped"] == 1.0
    key = "max_in_a_row" if n == 2 else "max_total"
    with pytest.raises(NonFinite, match=rf"step {7 + n}: loss nan.*; {n} .*before it \(guard.{key}\)$"):
        engine.update([points()], spoilt(math.nan))


def test_stop_says_why() -> None:
    engine = Engine(linear(), guarded("stop"))
    for k in range(6):
        engine.update([points(seed=k)], spoilt(1.0))
    with pytest.raises(Spike, match=r"step 7: loss .* deviations above .*, the median of 6 steps \(guard.loss_z 6\)"):
        engine.update([points()], spoilt(1e3))


def test_recipes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="no way back"):
        RunConfig(out="x", eval={"every": None}, guard={"action": "rollback"})
    with pytest.raises(ValueError, match="would never end"):
        GuardConfig(window=32, warmup=40)


# --- whole runs ------------------------------------------------------------------------------------------------------

SPIKES = {21: 40.0, 33: math.nan}  # by window of the data: whenever it is seen, it spikes
SETTINGS: dict[str, dict[str, Any]] = {
    "skip": {"action": "skip", "warmup": 8},
    "rollback": {"action": "rollback", "warmup": 8, "back": 5, "beyond": 1},
}


def spoil(monkeypatch: pytest.MonkeyPatch, spikes: dict[int, float], die_at: int = 0) -> None:
    """Multiplies the loss of some windows of the data; dies in the `die_at`-th update, with whatever is being written."""
    original, calls = Engine.update, [0]

    def update(self: Engine, batches: Any, loss_fn: Any, accept: Any = None) -> Any:
        calls[0] += 1
        if calls[0] == die_at:
            storage.disk.dead = True  # type: ignore[attr-defined]
            raise Crash
        factor = spikes.get(self.data_step, 1.0)

        def loss(module: Any, batch: Any) -> LossSum:
            out = loss_fn(module, batch)
            return LossSum(out.total * factor, {k: v * factor for k, v in out.parts.items()}, out.stats)

        return original(self, batches, loss_fn if factor == 1.0 else loss, accept)

    monkeypatch.setattr(Engine, "update", update)


def guard_recipe(folder: Path, name: str, action: str, **changes: Any) -> tuple[Path, Path]:
    settings = {"steps": 40, "save": {"every": 4, "keep": 1}, "eval": {"every": 10}, "guard": SETTINGS[action]}
    return tiny_recipe(folder, out=str(folder / name), **settings | changes), folder / name


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted runs: `plain` without spikes and guard, `skip` and `rollback` with spikes in two windows."""
    folder = tmp_path_factory.mktemp("guard")
    assert train(tiny_recipe(folder, out=str(folder / "plain"), steps=60)) == 0
    for action in SETTINGS:
        with pytest.MonkeyPatch.context() as patch:
            spoil(patch, SPIKES)
            assert train(guard_recipe(folder, action, action)[0]) == 0
    return folder


def hashes(run: Path) -> list[int]:
    return [r["train/data_hash"] for r in read_jsonl(run / "metrics.jsonl") if "train/data_hash" in r]


def steps_of(run: Path) -> list[int]:
    return [r["step"] for r in read_jsonl(run / "metrics.jsonl") if "train/lr" in r]


def test_what_a_skip_leaves(world: Path) -> None:
    """Every step is there once, on the data it would have had; what was left out is told in four places."""
    run = world / "skip"
    assert steps_of(run) == list(range(1, 41)) and hashes(run) == hashes(world / "plain")[:40]
    lines = {r["step"]: r for r in read_jsonl(run / "metrics.jsonl") if "train/lr" in r}
    assert [s for s, r in lines.items() if "train/skipped" in r] == [22, 34]
    assert lines[22]["train/loss"] > 50 and "train/loss" not in lines[34]  # JSON has no NaN
    events = [lines[22]["guard"], lines[34]["guard"]]
    assert [(e["step"], e["data"]) for e in events] == [(22, [21, 22]), (34, [33, 34])]
    assert "deviations above" in events[0]["why"] and "loss nan" in events[1]["why"]
    folder = newest_good(run)[0]
    assert folder is not None
    assert json.loads((folder / "manifest.json").read_text())["refused"] == events
    state = json.loads((folder / "trainer_state" / "state.json").read_text())
    assert state["engine"]["guard"]["events"] == events and state["engine"]["windows_skipped"] == 0
    assert "step 22 was left out" in (run / "train.log").read_text()
    assert (run / "spikes" / "step-00000022-rank0.safetensors").is_file()
    told = json.loads((run / "nonfinite" / "step-00000034-rank0.json").read_text())
    assert told["why"] in events[1]["why"] and told["metrics"]["loss"] == "nan"


def test_what_a_rollback_leaves(world: Path) -> None:
    """Back to the newest checkpoint 5 steps old; the data from there to one window beyond the spike is never seen.

    The first spike is in window 21: from step 21 back to 16, on with window 23. The second, in window 33, is met at
    step 26: back to 20, on with window 35. The run's own checkpoint of step 16 stood although `keep` is 1.
    """
    run, plain = world / "rollback", hashes(world / "plain")
    assert steps_of(run) == list(range(1, 41))
    assert hashes(run) == plain[:16] + plain[23:27] + plain[35:55]
    events = [r["guard"] for r in read_jsonl(run / "metrics.jsonl") if "guard" in r]
    assert [(e["step"], e["to"], e["data"]) for e in events] == [(22, 16, [16, 23]), (27, 20, [27, 35])]
    folder = newest_good(run)[0]
    assert folder is not None
    state = json.loads((folder / "trainer_state" / "state.json").read_text())["engine"]
    assert state["windows_skipped"] == 15 and state["guard"]["events"] == events
    assert json.loads((folder / "manifest.json").read_text())["refused"] == events
    said = (run / "train.log").read_text()
    assert "back to step 16, without the data of 7 steps" in said and "back to step 20, without the data of 8" in said
    assert all(math.isfinite(r["train/loss"]) and r["train/loss"] < 7 for r in read_jsonl(run / "metrics.jsonl")
               if "train/loss" in r)  # fmt: skip


@pytest.mark.parametrize(
    ("action", "stops"), [("skip", (18, 21, 22)), ("rollback", (18, 21, 22)), ("rollback", (23, 26, 35))], ids=str
)
def test_stopped_around_the_spikes(
    world: Path, action: str, stops: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, at and after; each stop leaves a checkpoint that the recipe doesn't ask for: no rollback goes there."""
    path, run = guard_recipe(world, f"{action}-{stops[0]}", action)
    spoil(monkeypatch, SPIKES)
    for stop in stops:
        assert train(path, f"stop_at={stop}") == 0
    assert train(path) == 0
    assert_same_but_nan(run, world / action)


def assert_same_but_nan(run: Path, reference: Path) -> None:
    """`assert_same` asks for a loss in every step, which one that is not a number has not."""
    a, b = result_of(run), result_of(reference)
    assert {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)} == set()


@pytest.mark.parametrize("lives", [(20, 5, 12), (22, 8), (23, 26, 7)], ids=str)
def test_killed_around_a_rollback(world: Path, lives: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Dies in the given updates of each life: before the spike, after the rollback with and without a new save."""
    path, run = guard_recipe(world, f"killed-{lives[0]}", "rollback")
    for at in lives:
        with monkeypatch.context() as patch:
            patch.setattr(storage, "disk", ShimDisk())
            spoil(patch, SPIKES, die_at=at)
            with pytest.raises(Crash):
                train(path)
    spoil(monkeypatch, SPIKES)
    assert train(path) == 0
    assert_same(run, world / "rollback")


def test_crashes_at_random_file_operations(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R2: in saves, in the deletion of what a rollback gives up, in the dump of the batch."""
    path, run = guard_recipe(world, "random", "rollback")
    pick, crashes = random.Random(5), 0
    spoil(monkeypatch, SPIKES)
    for least in (60, 90, 120, 40, 60, 80):
        with monkeypatch.context() as patch:
            patch.setattr(storage, "disk", ShimDisk(pick.randint(least, least + 40), half=pick.random() < 0.5))
            try:
                train(path)
            except Crash:
                crashes += 1
    assert crashes >= 4
    assert train(path) == 0
    assert_same(run, world / "rollback")


def test_no_checkpoint_is_old_enough(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is skipped instead, whether or not a stop has left a checkpoint."""
    runs = []
    for name, stops in (("early", ()), ("early-stopped", (7,))):
        path, run = guard_recipe(
            world, name, "rollback", steps=12, guard={**SETTINGS["rollback"], "back": 6, "warmup": 4}
        )
        spoil(monkeypatch, {8: 40.0})
        for stop in stops:
            assert train(path, f"stop_at={stop}") == 0
        assert train(path) == 0
        monkeypatch.undo()
        runs.append(run)
    assert [r["step"] for r in read_jsonl(runs[0] / "metrics.jsonl") if "train/skipped" in r] == [9]
    assert_same(*runs)


def test_it_gives_up(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A loss that stays bad: exit code 3 after max_in_a_row rollbacks, and the same again; checkpoints are healthy."""
    path, run = guard_recipe(world, "hopeless", "rollback", guard={**SETTINGS["rollback"], "max_in_a_row": 2})
    spoil(monkeypatch, dict.fromkeys(range(21, 99), math.nan))
    for _ in "ab":
        assert train(path) == STOPPED_ITSELF
        error = capsys.readouterr().err
        assert "loss nan" in error and error.endswith("2 in a row were left out before it (guard.max_in_a_row)\n")
    assert good_steps(run)[0] == 12 == steps_of(run)[-1] and not (run / "DONE").exists()


def test_a_damaged_way_back(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The next older one is taken, aloud."""
    path, run = guard_recipe(world, "damaged", "rollback", guard={**SETTINGS["rollback"], "back": 9})
    spoil(monkeypatch, {21: 40.0})
    assert train(path, "stop_at=20") == 0
    assert {12, 16, 20} <= set(good_steps(run))
    (run / "checkpoints" / "step-00000012" / "config.json").write_text("{}")
    assert train(path, "stop_at=20", "guard.back=8", "allow_changes=true") == 0
    path2, run2 = guard_recipe(world, "damaged2", "rollback", save={"every": 4, "keep": 4})
    assert train(path2, "stop_at=20") == 0
    (run2 / "checkpoints" / "step-00000016" / "config.json").write_text("{}")
    assert train(path2, "stop_at=24") == 0
    said = capsys.readouterr().out
    assert "step-00000016 was passed over: config.json" in said and "back to step 12" in said


def test_how_often_checkpoints_are_made_is_part_of_a_rollback(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = guard_recipe(world, "every", "rollback")
    assert train(path, "stop_at=3") == 0
    assert train(path, "stop_at=4", "save.every=2") == USER_MISTAKE
    assert "save.every: 4 -> 2" in capsys.readouterr().err
    assert train(path, "stop_at=4", "save.keep=2") == 0


# --- ranks -----------------------------------------------------------------------------------------------------------


def _rank(rank: int, world: int, port: int, path: str) -> None:
    """One rank of a run whose rank 1 alone sees a spike in its share of window 21, and a NaN in that of 33."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            spoil(patch, SPIKES)
        assert train(Path(path)) == 0


def test_all_ranks_decide_alike(world: Path) -> None:
    """D8: what one rank sees in its own data, all go back from together, at the same steps as one process does."""
    path, run = guard_recipe(world, "ranks", "rollback", batch={"micro_tokens": 64})
    port = free_port()
    mp.spawn(_rank, (2, port, str(path)), nprocs=2)
    told = [[r["guard"] for r in read_jsonl(r / "metrics.jsonl") if "guard" in r] for r in (run, world / "rollback")]
    assert [{**e, "why": ""} for e in told[0]] == [{**e, "why": ""} for e in told[1]] and len(told[0]) == 2
    assert hashes(run) == hashes(world / "rollback")
    assert [len(list((run / kind).glob("*-rank[01].safetensors"))) for kind in ("spikes", "nonfinite")] == [2, 2]
    assert checkpoints_of(run)[0].name == "step-00000040"


def _skip(ranks: Ranks) -> dict[str, Any]:
    """Each rank's own points; at the sixth step those of rank 1 are wild. Alone: the points of both."""
    config = guarded().model_copy(update={"log": LogConfig(gradient_noise=True, norms_every=1)})
    engine = Engine(linear(), config, ranks)
    for k in range(8):
        batches = [points(20 + 9 * r, seed=2 * k + r) for r in range(2)]
        if k == 5:
            batches[1].y.mul_(1e3)
        engine.update(batches if ranks.world == 1 else [batches[ranks.rank]], spoilt(1.0))
    assert engine.guard is not None
    events = [(e["step"], e["data"]) for e in engine.guard.events]
    return {"state": snapshot(engine), "events": events, "watched": engine.watched}


def test_all_ranks_skip_alike() -> None:
    """And measure alike: the noise scale is that of the micro-batches of all ranks."""
    alone, together = _skip(Ranks()), on_ranks(2, _skip)
    assert alone["events"] == [(6, [5, 6])] and [r["events"] for r in together] == [alone["events"]] * 2
    assert same_bits(together[0]["state"], together[1]["state"])
    assert largest_difference(together[0]["state"], alone["state"]) <= 1e-12
    assert together[0]["watched"] == together[1]["watched"] == pytest.approx(alone["watched"], rel=1e-9)
    assert {"noise/scale_tokens", "norms/weight/grad"} <= alone["watched"].keys()


@pytest.mark.parametrize(
    ("left_out", "learnt"),
    [
        ([], [(0, 20)]),
        ([[3, 4]], [(0, 3), (4, 20)]),
        ([[0, 5], [5, 6]], [(6, 20)]),
        ([[12, 13], [8, 15]], [(0, 8), (15, 20)]),
        ([[18, 25]], [(0, 18)]),
        ([[2, 9], [4, 6], [9, 10]], [(0, 2), (10, 20)]),
    ],
)
def test_what_was_learnt_from_is_all_but_what_was_left_out(left_out, learnt) -> None:
    """Windows may overlap: a rollback leaves out again what a skip left out before it. Brute force as well."""
    windows = learnt_windows(20, [{"data": w} for w in left_out])
    assert windows == learnt
    kept = {k for a, b in windows for k in range(a, b)}
    assert kept == {k for k in range(20) if not any(a <= k < b for a, b in left_out)}
