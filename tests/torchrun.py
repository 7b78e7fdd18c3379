"""`torchrun` on this machine for the campaigns: several ranks of one recipe, each to be found and struck."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent


class Job:
    """One start of a recipe on some ranks."""

    def __init__(self, recipe: Path, log: Path, world: int = 2, restarts: int = 0, **environment: str):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        launcher += [f"--max-restarts={restarts}"]
        signals = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1"  # else SIGUSR1 kills torchrun and tells nobody
        command = [*launcher, signals, str(TESTS.parent / "scripts" / "train.py"), str(recipe)]
        paths = {"PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._log, self.world = log, world
        with log.open("wb") as f:
            self.process = subprocess.Popen(
                command, stdout=f, stderr=subprocess.STDOUT, env={**os.environ, **paths, **threads, **environment}
            )

    def ranks(self) -> dict[int, int]:
        """Rank -> process id, of the children of this torchrun only."""
        found = {}
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for pid in (task / "children").read_text().split():
                environ = Path(f"/proc/{pid}/environ").read_bytes()
                if match := re.search(rb"(?:^|\0)RANK=(\d+)\0", environ):
                    found[int(match[1])] = int(pid)
        return found

    def strike(self, signal: int, *ranks: int) -> float:
        """Sends a signal to ranks, or to torchrun when none is named; returns the time."""
        pids = self.ranks()
        for pid in [pids[r] for r in ranks] or [self.process.pid]:
            os.kill(pid, signal)
        return time.monotonic()

    def down(self, since: float, within_s: float) -> tuple[float, int]:
        """Waits for the job's end: the seconds since some time, and torchrun's exit code."""
        try:
            code = self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            pids = self.ranks()
            self.process.kill()
            for pid in pids.values():
                os.kill(pid, 9)
            raise AssertionError(f"the job is still there after {within_s} s: {self.said}") from None
        return time.monotonic() - since, code

    @property
    def said(self) -> str:
        return self._log.read_text()
