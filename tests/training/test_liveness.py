"""A rank that died, froze, was cut off or stays away is named; one that is busy, asleep with all others or done is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from llmkit.training import liveness
from llmkit.training.dist import Ranks
from llmkit.training.liveness import ElsewhereError, Liveness, Process, Told

LIMITS: Any = SimpleNamespace(stopped_s=0.6, silent_s=1.2, stalled_s=1.5)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"BEAT_S": 0.05, "TICK_S": 0.02, "GONE_S": 0.3, "LEAVE_S": 2.0, "PUBLISH_S": 1.0}.items():
        monkeypatch.setattr(liveness, name, seconds)


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for another rank's."""
    with subprocess.Popen(["sleep", "60"]) as child:
        yield child
        child.kill()


class Rank(Liveness):
    """A rank that only records that it would end its process."""

    def __init__(self, store: Any, rank: int = 0, world: int = 2, local_rank: int = 0):
        self.codes: list[int] = []
        self.ended = threading.Event()
        super().__init__(store, rank, world, local_rank, LIMITS, self._note)

    def _note(self, code: int) -> None:
        self.codes.append(code)
        self.ended.set()


def tell(store: Any, rank: int, pid: int, beat: int = 1, machine: str | None = None, **changes: Any) -> None:
    """Writes what another rank would."""
    here = Process.this()
    started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    process = Process("node7", here.machine if machine is None else machine, pid, started)
    fields = {"step": 41, "calls": 9, "at": "sum_ (engine.py:180, update)", "inside": True, "for_s": 0.1, "left": False}
    store.set(str(rank), json.dumps(asdict(Told(**{**fields, **changes}, beat=beat, process=process))))


def verdict_of(rank: Rank, timeout_s: float = 5) -> str:
    assert rank.ended.wait(timeout_s), "nobody was accused"
    assert rank.codes == [1]
    assert rank.verdict is not None
    return rank.verdict.text


def test_a_dead_process_is_named(other: subprocess.Popen[bytes], capfd: pytest.CaptureFixture[str]) -> None:
    """H1: rank, step and collective of the dead one and of who noticed; said once."""
    store = dist.HashStore()
    tell(store, 1, other.pid)
    rank = Rank(store).start()
    rank.step = 42
    with rank.waiting("sum_", patient=False):
        time.sleep(0.2)
        assert not rank.ended.is_set()
        other.kill()
        other.wait()
        text = verdict_of(rank)
    assert f"rank 1 on node7 (process {other.pid}) has died" in text
    assert "at step 41, in sum_ (engine.py:180, update)" in text
    assert "rank 0 is at step 42, in sum_ (test_liveness.py:" in text
    assert capfd.readouterr().err == f"error: {text}\n"


def test_a_stopped_process_is_named_and_killed(other: subprocess.Popen[bytes]) -> None:
    """Torchrun's SIGTERM would not wake it."""
    store = dist.HashStore()
    tell(store, 1, other.pid)
    other.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    assert "is stopped" in verdict_of(Rank(store).start())
    assert LIMITS.stopped_s <= time.monotonic() - started < 3
    assert other.wait(5) == -signal.SIGKILL


def test_a_silent_machine_is_named(other: subprocess.Popen[bytes]) -> None:
    """What can't be seen from here is judged by its silence alone, and left alone otherwise."""
    store = dist.HashStore()
    tell(store, 1, other.pid, machine="elsewhere")
    started = time.monotonic()
    assert "rank 1 on node7" in (text := verdict_of(Rank(store).start())) and "is silent" in text
    assert LIMITS.silent_s <= time.monotonic() - started < 4
    assert other.poll() is None


@pytest.mark.parametrize("case", ["busy", "left", "stopped for a moment", "not there yet"])
def test_who_is_not_accused(case: str, other: subprocess.Popen[bytes]) -> None:
    """A process that holds Python's lock for long runs; one that has left may go; a short stop is forgiven."""
    store = dist.HashStore()
    if case != "not there yet":
        tell(store, 1, other.pid, left=case == "left")
    rank = Rank(store).start()
    if case == "stopped for a moment":
        other.send_signal(signal.SIGSTOP)
        time.sleep(LIMITS.stopped_s / 2)
        other.send_signal(signal.SIGCONT)
    if case == "left":
        time.sleep(0.2)  # its last word has been read
        other.kill()
        other.wait()
    assert not rank.ended.wait(LIMITS.silent_s + 0.5)
    rank.close()
    assert not any(thread.is_alive() for thread in rank._threads)


def test_a_judge_that_stood_still_hears_anew(other: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop that slept, a job that was suspended whole: everybody's last word is old, and nobody is to blame."""
    store = dist.HashStore()
    tell(store, 1, other.pid, machine="elsewhere")
    ahead = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead, time=time.time)
    monkeypatch.setattr(liveness, "time", clock)
    rank = Rank(store).start()
    time.sleep(0.3)
    ahead = 3600.0
    time.sleep(0.3)
    assert not rank.ended.is_set()
    for beat in range(2, 30):  # and now it is heard again
        tell(store, 1, other.pid, beat, machine="elsewhere")
        time.sleep(0.05)
    assert not rank.ended.is_set()
    assert "is silent" in verdict_of(rank)


def test_who_does_not_come_is_named(other: subprocess.Popen[bytes]) -> None:
    """H1: rank 2 lives, and is at something else while the others wait."""
    store = dist.HashStore()
    for r in (1, 2):
        tell(store, r, other.pid, calls=1 if r == 1 else 0, step=7, at="any (task.py:66)", inside=r == 1, for_s=33.0)
    rank = Rank(store, world=3).start()
    rank.step = 8
    with rank.waiting("sum_", patient=True):
        assert not rank.ended.wait(LIMITS.stalled_s + 0.3)  # rank 0's preparation may take hours
    with rank.waiting("sum_", patient=False):
        text = verdict_of(rank)
    assert text.startswith(
        "rank 2 on node7 did not come within 1.5 s: it was at step 7, after any (task.py:66), for 33 s"
    )
    assert "rank 0 waits at step 8, in sum_" in text


class Broken:
    """A store that stops answering: its connection breaks, or it takes requests and stays silent."""

    def __init__(self, hangs: bool):
        self.hangs, self.inner, self.answers = hangs, dist.HashStore(), True

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            if self.answers:
                return getattr(self.inner, name)(*args)
            if self.hangs:
                time.sleep(30)
            raise RuntimeError("Broken pipe")

        return call


@pytest.mark.parametrize("hangs", [False, True])
def test_a_rank_without_a_store_ends(hangs: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """Cut off from the machine that holds the store: it can't learn of anybody, and says so itself."""
    store = Broken(hangs)
    rank = Rank(store).start()
    time.sleep(0.2)
    store.answers = False
    assert rank.ended.wait(8)
    assert "has had no answer from the rendezvous store for" in capfd.readouterr().err


def test_one_verdict_for_all(capfd: pytest.CaptureFixture[str]) -> None:
    """H2: rank 1's own error is what all ranks end with, those too that only see a broken connection. Root cause first."""
    store = dist.HashStore()
    ranks = [Rank(store, r, 3, r).start() for r in range(3)]
    ranks[1].step = 12
    assert ranks[1].blame(OSError("the shard is gone")) is None  # its own words are best
    said = "rank 1 failed at step 12, before its first collective: OSError: the shard is gone"
    for error in (RuntimeError("[gloo/pair.cc:534] Connection closed by peer"), ElsewhereError("see its message")):
        assert ranks[0].blame(error) == said
    assert verdict_of(ranks[2]) == said  # waits in a collective, so its judge ends it
    assert "error" not in capfd.readouterr().err  # not rank 2's to say: rank 1 does
    for rank in ranks:
        rank.close()
    assert ranks[0].codes == ranks[1].codes == []


def test_torchrun_reports_the_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    rank = Rank(dist.HashStore(), world=2).start()
    rank.blame(ValueError("no"))
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert told["message"] == "rank 0 failed before the first step, before its first collective: ValueError: no"
    assert int(told["extraInfo"]["timestamp"]) > 0
    rank.close()


def test_nobody_watches_alone() -> None:
    with Ranks().watched():
        Ranks().at(3)
        assert Ranks().any(True)
    with pytest.raises(ValueError, match="its own"), Ranks().watched():
        raise ValueError("its own")


RANK = """
import sys, time
import torch
from llmkit.training.config import LivenessConfig
from llmkit.training.dist import connect
ranks = connect("cpu", 60, limits=LivenessConfig(stalled_s=5))
with ranks.watched():
    for step in range(1, 1000):
        ranks.at(step)
        ranks.sum_(torch.ones(1))
        if step == 5 and ranks.rank == 1:
            {what}
        time.sleep(0.01)
"""
WHAT = {
    "raise OSError('shard 7 is gone')": "rank 1 failed at step 5, after sum_ (rank.py:10, <module>): OSError: shard 7 is gone",
    "time.sleep(60)": "rank 1 on * did not come within 5 s: it was at step 5, after sum_ (rank.py:10, <module>), for ",
}


@pytest.mark.parametrize("what", WHAT)
def test_two_ranks_under_torchrun(what: str, tmp_path: Path) -> None:
    """H1, H2: an error of one rank, and one that lives but does not come."""
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(what=what))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 1 and time.monotonic() - started < 30
    before, _, after = WHAT[what].partition("*")
    assert before in done.stderr and after in done.stderr, done.stderr
