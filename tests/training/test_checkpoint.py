"""Saving: a crash or an error at every file operation, in the background too. Goals R2, C3, C4, C5, C6."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reliability import Crash, ShimDisk, flip_bit, good_steps, leftovers
from torch import Tensor

from llmkit import storage
from llmkit.config import MachineError
from llmkit.storage import newest_good, set_aside, step_name, sweep, verify
from llmkit.training.checkpoint import Checkpointer, load, non_finite

ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES]
Disks = Callable[[ShimDisk], ShimDisk]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Disks:
    """Replaces the disk."""

    def put(disk: ShimDisk) -> ShimDisk:
        monkeypatch.setattr(storage, "disk", disk)
        return disk

    return put


def state(step: int, size: int = 8) -> dict[str, dict[str, Tensor]]:
    """Tensors that differ from step to step."""
    generator = torch.Generator().manual_seed(step)
    random = [torch.randn(size, size, generator=generator) for _ in range(4)]
    return {
        "model.safetensors": {"embed.weight": random[0], "head.weight": random[1].bfloat16()},
        "trainer_state/optimizer.safetensors": {"embed.weight.exp_avg": random[2]},
        "trainer_state/ema.safetensors": {"embed.weight": random[3], "scalar": torch.tensor(step)},
    }


def save(run: Path, step: int, keep: int = 2, best: int | None = None, saver: Checkpointer | None = None) -> None:
    saver = saver or Checkpointer(run, keep, asynchronous=False)
    blobs = {"config.json": b"{}", "trainer_state/state.json": b'{"step": %d}' % step}
    saver.save(step, state(step), blobs, {"data": "hash"}, [] if best is None else [best])


def assert_holds(folder: Path, step: int) -> None:
    """The checkpoint is whole and of this step, bit by bit."""
    verify(folder)
    tensors, told = load(folder)
    assert told == {"step": step}
    expected = state(step)
    assert tensors.keys() == expected.keys()
    for file, named in expected.items():
        assert tensors[file].keys() == named.keys()
        assert all(torch.equal(t, tensors[file][n]) and t.dtype == tensors[file][n].dtype for n, t in named.items())


def kept_after(run: Path) -> list[int]:
    """Sweeps as the next start does; nothing but checkpoints is left; their steps, newest first."""
    sweep(run)
    steps = good_steps(run)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == sorted(step_name(s) for s in steps)
    assert leftovers(run) == []
    return steps


def copies(template: Path, tmp_path: Path) -> Iterator[Path]:
    for i in range(10_000):
        yield Path(shutil.copytree(template, tmp_path / "copies" / str(i)))
        shutil.rmtree(tmp_path / "copies" / str(i))


@pytest.fixture(params=["keep 2", "keep 1", "keep 1 and the best", "over a damaged one"])
def case(request: pytest.FixtureRequest, tmp_path: Path, use: Disks) -> dict[str, Any]:
    """A run that has saved steps 1 and 2, what saving step 3 deletes, and how many must hold at every moment."""
    run = tmp_path / "template"
    use(ShimDisk())
    keep, best = (2, None) if request.param == "keep 2" else (1, 1 if "best" in request.param else None)
    if request.param == "over a damaged one":
        keep = 2
    save(run, 1, keep=2)
    save(run, 2, keep=keep, best=best)
    if request.param == "over a damaged one":
        save(run, 3, keep=3)
        flip_bit(run / "checkpoints" / step_name(3) / "config.json", 3)
    expected = {"keep 2": [3, 2], "keep 1": [3], "keep 1 and the best": [3, 1], "over a damaged one": [3, 2]}
    return {"run": run, "keep": keep, "best": best, "after": expected[request.param], "least": keep}


def test_a_crash_at_every_file_operation_recovers(case: dict[str, Any], tmp_path: Path, use: Disks) -> None:
    """R2, C6, B93, B94, B96: also half-way through every write and removal."""
    runs = copies(case["run"], tmp_path)
    counting = use(ShimDisk())
    save(next(runs), 3, case["keep"], case["best"])
    operations = counting.operations
    assert {"create", "write", "sync", "rename", "mkdir", "remove_tree"} <= set(operations) and len(operations) >= 25
    before = good_steps(case["run"])
    seen = set()
    for at in range(1, len(operations) + 2):  # the last of them: no crash at all
        for half in (False, True) if operations[at - 1 : at] in (["write"], ["remove_tree"]) else (False,):
            run = next(runs)
            use(ShimDisk(at, half=half))
            try:
                save(run, 3, case["keep"], case["best"])
                assert at > len(operations)
            except Crash:
                pass
            use(ShimDisk())
            good, passed_over = newest_good(run)  # as a new process finds it
            assert good is not None
            step = storage.step_of(good)
            assert step in (3, before[0])
            assert [storage.step_of(p) for p in passed_over] in ([], [3])  # only what was damaged before
            assert_holds(good, step)
            assert len(good_steps(run)) >= case["least"]  # C6
            seen.add(step)
            for damaged in passed_over:
                shutil.rmtree(set_aside(damaged))
            kept_after(run)
            save(run, step + 1, case["keep"], case["best"])  # the run goes on
            assert kept_after(run)[0] == step + 1
            if step + 1 == 3:
                assert good_steps(run) == case["after"]
    assert seen == {3, before[0]}


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_an_error_at_every_file_operation_is_told_and_harms_nothing(
    case: dict[str, Any], number: int, tmp_path: Path, use: Disks
) -> None:
    """C3: one sentence with path and bytes; older checkpoints hold; nothing half-written is left."""
    runs = copies(case["run"], tmp_path)
    counting = use(ShimDisk())
    save(next(runs), 3, case["keep"], case["best"])
    committed = max(i for i, name in enumerate(counting.operations) if name == "create")
    before = good_steps(case["run"])
    for at, name in enumerate(counting.operations, 1):
        run = next(runs)
        use(ShimDisk(at, number, half=name in ("write", "remove_tree")))
        with pytest.raises(MachineError) as error:
            save(run, 3, case["keep"], case["best"])
        text = str(error.value)
        assert str(run) in text and os.strerror(number) in text
        if at <= committed:
            assert re.search(r"step 3 \([\d,]+ bytes\) could not be written", text)
        assert ("bytes are free" in text) == (number in (errno.ENOSPC, errno.EDQUOT))
        assert "\n" not in text
        use(ShimDisk())
        good, passed_over = newest_good(run)
        assert good is not None and storage.step_of(good) in (before[0], 3)
        assert_holds(good, storage.step_of(good))
        assert len(good_steps(run)) >= case["least"]
        for damaged in passed_over:
            shutil.rmtree(set_aside(damaged))
        assert all(n.startswith(".trash-") for n in leftovers(run))  # what could not be deleted, the next start deletes
        assert at >= committed or not leftovers(run)
        kept_after(run)
        save(run, storage.step_of(good) + 1, case["keep"], case["best"])  # once there is space again


def test_an_error_in_the_background_surfaces_at_the_next_call(tmp_path: Path, use: Disks) -> None:
    """C4, B106: at the next poll or the next save, once; after that saving works again."""
    counting = use(ShimDisk())
    save(tmp_path / "counted", 1)
    for at in range(1, len(counting.operations) + 1):
        for number in (errno.ENOSPC, errno.EIO):
            run = tmp_path / f"{at}-{number}"
            use(ShimDisk(at, number))
            saver = Checkpointer(run, keep=2, asynchronous=True)
            save(run, 1, saver=saver)
            assert saver._thread is not None
            saver._thread.join()
            with pytest.raises(MachineError, match=str(run)):
                save(run, 2, saver=saver) if at % 2 else saver.poll()
            use(ShimDisk())
            save(run, 3, saver=saver)
            saver.wait()
            assert good_steps(run)[0] == 3 and leftovers(run) == []


class Gate(ShimDisk):
    """Writes wait until the gate is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()

    def create(self, path: Path) -> int:
        assert self.open.wait(30)
        return super().create(path)


def test_a_save_in_the_background_holds_the_moment_it_was_asked_for(tmp_path: Path, use: Disks) -> None:
    """C5, B106: tensors change while the files are written; the buffers are made once."""
    gate = use(Gate())
    saver = Checkpointer(tmp_path, keep=3, asynchronous=True)
    addresses = set()
    for step in (1, 2, 3):
        gate.open.clear()
        tensors = state(step)
        saver.save(step, tensors, {"trainer_state/state.json": b'{"step": %d}' % step}, {})
        for named in tensors.values():
            for t in named.values():
                t.zero_()
        assert good_steps(tmp_path) == list(range(step - 1, 0, -1))
        gate.open.set()
        saver.wait()
        assert_holds(tmp_path / "checkpoints" / step_name(step), step)
        addresses.add(tuple(t.data_ptr() for named in saver._buffers.values() for t in named.values()))
    assert len(addresses) == 1


def test_background_and_foreground_write_the_same_bytes(tmp_path: Path) -> None:
    for name, asynchronous in (("a", False), ("b", True)):
        saver = Checkpointer(tmp_path / name, 2, asynchronous)
        save(tmp_path / name, 1, saver=saver)
        saver.wait()
    a, b = (tmp_path / name / "checkpoints" / step_name(1) for name in "ab")
    files = [p.relative_to(a) for p in a.rglob("*") if p.is_file()]
    assert len(files) == 6 and all((a / f).read_bytes() == (b / f).read_bytes() for f in files)


def test_at_most_one_save_is_under_way(tmp_path: Path, use: Disks) -> None:
    """C5: the second waits for the first, and its snapshot doesn't reach into the first one's files."""
    gate = use(Gate())
    saver = Checkpointer(tmp_path, keep=3, asynchronous=True)
    save(tmp_path, 1, saver=saver)
    second = threading.Thread(target=save, args=(tmp_path, 2), kwargs={"saver": saver})
    second.start()
    time.sleep(0.1)
    assert second.is_alive()
    assert [t.name for t in threading.enumerate()].count("save") == 1
    gate.open.set()
    second.join()
    saver.wait()
    for step in (1, 2):
        assert_holds(tmp_path / "checkpoints" / step_name(step), step)


def test_logs_are_on_disk_before_the_checkpoint_that_counts_on_them(tmp_path: Path, use: Disks) -> None:
    disk = use(ShimDisk())
    marks: list[int] = []
    saver = Checkpointer(tmp_path, 2, False, before_commit=lambda: marks.append(len(disk.operations)))
    save(tmp_path, 1, saver=saver)
    assert "rename" not in disk.operations[: marks[0]] and "rename" in disk.operations[marks[0] :]


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, use: Disks) -> None:
    class Full(ShimDisk):
        def free(self, path: Path) -> int:
            return 1000

    save(tmp_path, 1)
    use(Full())
    with pytest.raises(MachineError, match=r"MB are needed for a checkpoint but 0\.0 MB are free"):
        save(tmp_path, 2)
    assert good_steps(tmp_path) == [1] and leftovers(tmp_path) == []


def test_a_really_full_disk(tmp_path: Path, use: Disks) -> None:
    """C3 on a small tmpfs, with the free-space check blinded so that the write itself fails."""
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        run = small / "run"
        blobs = {"trainer_state/state.json": b'{"step": 1}'}
        Checkpointer(run, 2, False).save(1, {"model.safetensors": {"w": torch.ones(300_000)}}, blobs, {})
        with pytest.raises(MachineError, match=r"1\.3 MB are needed for a checkpoint but 0\.\d MB are free"):
            Checkpointer(run, 2, False).save(2, {"model.safetensors": {"w": torch.ones(300_000)}}, blobs, {})

        class Blind(storage.Disk):
            def free(self, path: Path) -> int:
                return 1 << 40

        use(Blind())  # type: ignore[arg-type]
        with pytest.raises(MachineError, match=r"run/checkpoints/step-00000002\.tmp-.*No space left on device"):
            Checkpointer(run, 2, False).save(2, {"model.safetensors": {"w": torch.ones(300_000)}}, blobs, {})
        assert good_steps(run) == [1] and leftovers(run) == []
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        with pytest.raises(MachineError, match="Read-only file system"):
            save(run, 2)
        assert good_steps(run) == [1]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_limit_on_file_size(tmp_path: Path) -> None:
    """C3: RLIMIT_FSIZE, as batch systems set it."""
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(MachineError, match="File too large"):
            Checkpointer(tmp_path, 2, False).save(2, state(2, size=100), {}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert good_steps(tmp_path) == [1] and leftovers(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; the shim's EACCES and the tmpfs stand in")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints").chmod(0o555)
    try:
        with pytest.raises(MachineError, match="Permission denied"):
            save(tmp_path, 2)
    finally:
        (tmp_path / "checkpoints").chmod(0o755)
    assert good_steps(tmp_path) == [1]


def test_a_damaged_newer_checkpoint_is_not_counted_among_those_to_keep(tmp_path: Path, use: Disks) -> None:
    """C6, B94: its sizes hold, so once it is set aside only; else keep=1 would delete what was just saved."""
    use(ShimDisk())
    save(tmp_path, 5, keep=2)
    save(tmp_path, 9, keep=2)
    flip_bit(tmp_path / "checkpoints" / step_name(9) / "model.safetensors", 2000)
    _, passed_over = newest_good(tmp_path)
    for damaged in passed_over:
        aside = set_aside(damaged)
    save(tmp_path, 6, keep=1)
    assert good_steps(tmp_path) == [6]
    sweep(tmp_path)
    assert aside.is_dir()  # for whoever wants to know what happened to it


def test_non_finite_tensors_are_named() -> None:
    tensors = state(1)
    tensors["model.safetensors"]["large.weight"] = torch.full((8, 8), 3e38)  # its sum overflows, it doesn't
    assert non_finite(tensors) == [] == non_finite({"f": {"empty": torch.empty(0), "count": torch.tensor(3)}})
    tensors["model.safetensors"]["head.weight"][3, 3] = float("nan")
    tensors["trainer_state/ema.safetensors"]["embed.weight"][0, 1] = -float("inf")
    assert non_finite(tensors) == ["model.safetensors: head.weight", "trainer_state/ema.safetensors: embed.weight"]


def test_a_sharded_model_comes_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.training.checkpoint.shard", lambda file, tensors: _by_one(tensors))
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints" / step_name(1)
    assert sorted(p.name for p in folder.glob("model*")) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    assert_holds(folder, 1)


def _by_one(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {f"model-{i:05d}-of-{len(tensors):05d}.safetensors": {n: t} for i, (n, t) in enumerate(tensors.items(), 1)}
