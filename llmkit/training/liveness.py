"""Whether all ranks are alive: one that died, froze, was cut off or stays away ends the job, with one sentence.

A collective waits for everybody. Without more, a rank that is gone shows as a broken connection on gloo and as ten silent
minutes on NCCL, and nobody is told which rank it was. Here every rank has two threads of its own. One beats: once a
second it tells the rendezvous store what its rank is at, reads what the next rank told (a ring, so that the store's work
grows with the ranks and not with their square), and looks for a verdict. The other judges, by memory and the clock alone,
so that a store that no longer answers can't hold it up. The first verdict is final: all ranks say it and end themselves.

What a rank is at is noted before each collective, by the thread that trains; nothing is sent for it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

from llmkit.config import MachineError, TrainingStopped, UserError
from llmkit.training.config import LivenessConfig

P = ParamSpec("P")
R = TypeVar("R")
BEAT_S = 1.0  # between what a rank tells of itself
TICK_S = 0.25  # between two looks of the judge
ASLEEP_S = 5.0  # a judge that did not run for so long stood still itself, and hears anew before it judges
GONE_S = 2.0  # a process that is gone is given so long for its last word to be read
LEAVE_S = 10.0  # the training thread may take so long to end by itself once the verdict is known
PUBLISH_S = 3.0  # so long the store may take to make a suspicion everybody's verdict
OWN_FILES = ("/dist.py", "/liveness.py", "/contextlib.py")  # not the place in the code that people look for
VERDICT = "verdict"
# How collectives fail when somebody else did: gloo raises plain RuntimeErrors.
SECONDARY = re.compile(
    r"gloo|closed by peer|reset by peer|Broken pipe|Timed out waiting|NCCL|ncclRemoteError", re.IGNORECASE
)


class ElsewhereError(MachineError):
    """Another rank failed, and this one only follows: it has nothing to tell of the cause."""


def noted(patient: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a method in which all ranks wait for each other: where this rank is, is noted meanwhile.

    Args:
        patient: others may work for any length of time before they come.
    """

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(method)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            liveness: Liveness | None = args[0].liveness  # type: ignore[attr-defined]
            if liveness is None:
                return method(*args, **kwargs)
            with liveness.waiting(method.__name__, patient):
                return method(*args, **kwargs)

        return wrapper

    return decorate


class Process(NamedTuple):
    """What makes a process the same one: on one machine its state can be asked of the kernel."""

    host: str
    machine: str  # boot, process and network namespace; empty where there is no /proc
    pid: int
    started: int

    @classmethod
    def this(cls) -> Process:
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            spaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net")]
            machine, started = " ".join([boot, *spaces]), int(_stat(os.getpid())[19])
        except OSError:
            machine, started = "", 0
        return cls(socket.gethostname(), machine, os.getpid(), started)

    def state(self, here: Process) -> str:
        """ "gone", "stopped", "runs", or "unknown" where it can't be seen from here."""
        if not here.machine or here.machine != self.machine:
            return "unknown"
        try:
            fields = _stat(self.pid)
        except OSError:
            return "gone"
        if int(fields[19]) != self.started or fields[0] in "ZX":
            return "gone"
        return "stopped" if fields[0] in "Tt" else "runs"


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; the name before them may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@dataclass(frozen=True)
class Told:
    """What a rank last told of itself."""

    beat: int
    step: int  # the step it works on; 0 before the first
    calls: int  # collectives it has entered
    at: str  # the collective it is in, or the last one it was in
    inside: bool
    for_s: float  # how long it has been there
    left: bool  # it has ended in good order
    process: Process

    @classmethod
    def parse(cls, text: bytes) -> Told:
        fields = json.loads(text)
        return cls(**{**fields, "process": Process(*fields["process"])})

    def place(self) -> str:
        where = "before the first step" if self.step == 0 else f"at step {self.step}"
        if not self.at:
            return f"{where}, before its first collective"
        return f"{where}, {'in' if self.inside else 'after'} {self.at}"


class Verdict(NamedTuple):
    """Why the job ends, as all ranks say it."""

    rank: int  # the culprit
    by: int  # who found out
    text: str


class Liveness:
    """Beats for this rank and judges the next one, from `start` to `close`."""

    def __init__(
        self, store: Any, rank: int, world: int, local_rank: int, limits: LivenessConfig,
        end: Callable[[int], None] = os._exit,
    ):  # fmt: skip
        """
        Args:
            store: a connection to the rendezvous store that nobody else uses, under a prefix of its own.
            rank, world, local_rank: of this process.
            limits: how long is too long.
            end: ends the process with an exit code, whatever its other threads are waiting for.
        """
        self.store, self.rank, self.world, self.local_rank, self.limits = store, rank, world, local_rank, limits
        self.next = (rank + 1) % world
        self._end = end
        self.step, self._calls, self._at, self._since = 0, 0, "", time.monotonic()
        self._inside, self._patient, self._depth, self._trainer = False, False, 0, threading.get_ident()
        self._process = Process.this()
        self._heard: Told | None = None
        self._heard_at = self._answered_at = self._gone_at = time.monotonic()
        self._suspicion: Verdict | None = None
        self._suspected_at = 0.0
        self._lost: str | None = None  # what the store's connection broke with
        self.verdict: Verdict | None = None
        self._known, self._wake, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._ending_itself = self._left = False
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("beat", self._beat), ("judge", self._judge))
        ]

    def start(self) -> Liveness:
        for thread in self._threads:
            thread.start()
        return self

    def close(self) -> None:
        """Tells the others that this rank ends in good order, and watches no longer."""
        self._left = True
        self._closed.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(PUBLISH_S)

    # --- noted by the training thread ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def waiting(self, name: str, patient: bool) -> Iterator[None]:
        """Around a collective: notes its name and the place in the code that called it."""
        if threading.get_ident() != self._trainer:  # a save's thread waits on its own account
            yield
            return
        self._depth += 1
        try:
            if self._depth == 1:
                self._enter(name, patient)
            yield
            if self._depth == 1:
                self._inside, self._since = False, time.monotonic()  # not after an error: that was in there
        finally:
            self._depth -= 1

    def _enter(self, name: str, patient: bool) -> None:
        frame = sys._getframe(3)
        while frame.f_back is not None and frame.f_code.co_filename.endswith(OWN_FILES):
            frame = frame.f_back
        code = frame.f_code
        self._at = f"{name} ({Path(code.co_filename).name}:{frame.f_lineno}, {code.co_name})"
        self._calls, self._inside, self._since, self._patient = self._calls + 1, True, time.monotonic(), patient

    def _now(self) -> Told:
        return Told(
            0, self.step, self._calls, self._at, self._inside, time.monotonic() - self._since, self._left, self._process
        )

    # --- the end ---------------------------------------------------------------------------------------------------

    def blame(self, error: Exception) -> str | None:
        """What to say instead of an error that ended this rank's training; None if the error is its own.

        An error of its own becomes everybody's verdict. One that another rank caused waits for the verdict on that
        rank, so that what is shown is the cause.
        """
        self._ending_itself = True
        if not self._follows(error):
            said = " ".join(str(error).split()) or "no message"
            if not isinstance(error, UserError | MachineError | TrainingStopped):
                said = f"{type(error).__name__}: {said}"
            text = f"rank {self.rank} failed {self._now().place()}: {said}"
            self._suspect(self.rank, text)
            self._note_for_torchrun(text)
            self._known.wait(PUBLISH_S)
            return None
        self._known.wait(LEAVE_S)
        if self.verdict is not None:
            self._note_for_torchrun(self.verdict.text)
            return self.verdict.text
        text = f"rank {self.rank}: {self._now().place()} another rank or the network failed: {error}"
        self._note_for_torchrun(text)
        return text

    def _follows(self, error: Exception) -> bool:
        from torch.distributed import DistError

        if isinstance(error, ElsewhereError | DistError):
            return True
        return type(error) is RuntimeError and SECONDARY.search(str(error)) is not None

    def _suspect(self, rank: int, text: str) -> None:
        """Hands a verdict to the thread that talks to the store: the first of all ranks' becomes everybody's."""
        if self._suspicion is None:
            self._suspected_at = time.monotonic()
            self._suspicion = Verdict(rank, self.rank, text)
            self._wake.set()

    def _execute(self, verdict: Verdict) -> None:
        """Ends this process, unless its training thread is about to."""
        if self._ending_itself and self._closed.wait(LEAVE_S):
            return
        if verdict.by == self.rank or self.local_rank == 0:  # once for each machine, not once for each rank
            print(f"error: {verdict.text}", file=sys.stderr, flush=True)
        self._note_for_torchrun(verdict.text)
        heard = self._heard
        # A stopped process does not see torchrun's SIGTERM; without this the job would wait for 30 s more.
        if heard is not None and verdict.rank == self.next and heard.process.state(self._process) == "stopped":
            with contextlib.suppress(OSError):
                os.kill(heard.process.pid, 9)
        self._end(1)

    @staticmethod
    def _note_for_torchrun(text: str) -> None:
        """torchrun's own report then shows the sentence instead of "see its message"."""
        file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if file:
            extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
            with contextlib.suppress(OSError):
                Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}), "utf-8")

    # --- the thread that beats -------------------------------------------------------------------------------------

    def _beat(self) -> None:
        beat = 0
        try:
            while True:
                beat += 1
                last = self._closed.is_set()
                self._wake.clear()
                self.store.set(str(self.rank), json.dumps(asdict(replace(self._now(), beat=beat))))
                self._listen()
                if last or self.verdict is not None:
                    return
                self._wake.wait(BEAT_S)
        except Exception as e:  # a broken connection is not mended: the judge knows what to do
            self._lost = " ".join(str(e).split())

    def _listen(self) -> None:
        """Reads the neighbour's last word and the verdict, and publishes a suspicion."""
        neighbour = str(self.next)
        if self._heard is not None or self.store.check([neighbour]):
            told = Told.parse(self.store.get(neighbour))
            if self._heard is None or told.beat != self._heard.beat:
                self._heard, self._heard_at = told, time.monotonic()
        suspicion = self._suspicion or self._stalled()
        if suspicion is not None:
            self.store.compare_set(VERDICT, "", json.dumps(suspicion))
        if suspicion is not None or self.store.check([VERDICT]):
            self.verdict = Verdict(*json.loads(self.store.get(VERDICT)))
            self._known.set()
        self._answered_at = time.monotonic()

    def _stalled(self) -> Verdict | None:
        """Names the ranks that have not come to the collective in which this one has waited for too long."""
        mine, limit = self._now(), self.limits.stalled_s
        if not mine.inside or self._patient or mine.for_s < limit:
            return None
        all_told = [Told.parse(text) for text in self.store.multi_get([str(r) for r in range(self.world)])]
        fewest = min(told.calls for told in all_told)
        late = [r for r, told in enumerate(all_told) if told.calls == fewest]
        if fewest == mine.calls:  # all are there: the network is what fails
            text = f"all ranks have waited for {limit:g} s {mine.place()}: the network between them fails"
            return Verdict(self.rank, self.rank, text)
        names = ", ".join(f"rank {r} on {all_told[r].process.host}" for r in late[:4])
        more = f" and {len(late) - 4} more" if len(late) > 4 else ""
        text = (
            f"{names}{more} did not come within {limit:g} s: {'they were' if len(late) > 1 else 'it was'} "
            f"{all_told[late[0]].place()}, for {all_told[late[0]].for_s:.0f} s; rank {self.rank} waits {mine.place()}"
        )
        return Verdict(late[0], self.rank, text)

    # --- the thread that judges ------------------------------------------------------------------------------------

    def _judge(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(TICK_S):
            now = time.monotonic()
            if now - last > ASLEEP_S:
                self._heard_at = self._answered_at = self._gone_at = now
            last = now
            if self.verdict is None:
                self._look(now)
            verdict = self.verdict
            if verdict is None and self._suspicion is not None and now - self._suspected_at > PUBLISH_S:
                verdict = self._suspicion  # the store does not answer: at least this rank ends
            if verdict is not None:
                return self._execute(verdict)
        return None

    def _look(self, now: float) -> None:
        """Suspects the neighbour or the store."""
        silent, told = now - self._heard_at, self._heard
        unanswered = now - self._answered_at
        if unanswered > self.limits.silent_s or (self._lost and unanswered > ASLEEP_S):
            why = f" ({self._lost})" if self._lost else ""
            place = self._now().place()
            self._suspect(
                self.rank,
                f"rank {self.rank} on {self._process.host} has had no answer from the rendezvous store for "
                f"{unanswered:.0f} s{why}, {place}: this machine is cut off, or the one that holds the store is down",
            )
        if told is None or told.left:
            return
        state = told.process.state(self._process)
        if state != "gone":
            self._gone_at = now
        # Its last word, that it left in good order or what it failed of, may not have been read yet.
        elif now - self._gone_at > GONE_S and (self._lost or unanswered < GONE_S):
            self._accuse(told, "has died", silent)
        if state == "stopped" and silent > self.limits.stopped_s:
            self._accuse(told, "is stopped", silent)
        if state == "unknown" and silent > self.limits.silent_s:
            self._accuse(told, "is silent", silent)

    def _accuse(self, told: Told, what: str, silent: float) -> None:
        self._suspect(
            self.next,
            f"rank {self.next} on {told.process.host} (process {told.process.pid}) {what}: last heard of {silent:.0f} s ago, "
            f"{told.place()}; rank {self.rank} is {self._now().place()}. The same command resumes the run",
        )
