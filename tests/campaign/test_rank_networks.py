"""Two machines, played by network namespaces: `pytest -m campaign tests/campaign/test_rank_networks.py -s`. Needs root.

Each namespace has an interface of its own, joined by a cable that can be pulled; torchrun meets between them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from reliability import assert_same, good_steps, last_step, tiny_recipe, wait_for, write_text

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and `ip`"),
]

SILENT_S = 10.0
SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=not check)


@dataclass
class Machine:
    """A namespace with one interface; number 0 holds the rendezvous."""

    number: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"llmkit{os.getpid()}-{self.number}"

    @property
    def cable(self) -> str:
        return f"lk{os.getpid() % 100000}-{self.number}"

    @property
    def address(self) -> str:
        return f"10.213.77.{self.number + 1}"

    def start(self, recipe: Path, log: Path) -> subprocess.Popen[bytes]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        meeting = [f"--node-rank={self.number}", "--master-addr=10.213.77.1", "--master-port=29513"]
        command = ["ip", "netns", "exec", self.name, *launcher, *meeting, f"--local-addr={self.address}", str(SCRIPT)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.cable}
        with log.open("wb") as f:
            self.processes.append(
                subprocess.Popen([*command, str(recipe)], stdout=f, stderr=subprocess.STDOUT, env=environment)
            )
        return self.processes[-1]


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    both = [Machine(0), Machine(1)]
    try:
        for machine in both:
            ip("netns", "add", machine.name)
        ip("link", "add", both[0].cable, "type", "veth", "peer", "name", both[1].cable)
        for machine in both:
            ip("link", "set", machine.cable, "netns", machine.name)
            ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", machine.cable)
            for link in ("lo", machine.cable):
                ip("-n", machine.name, "link", "set", link, "up")
        yield both
    finally:
        for machine in both:
            for process in machine.processes:
                process.kill()
            ip("netns", "delete", machine.name, check=False)


def test_a_machine_is_cut_off(machines: list[Machine], tmp_path: Path) -> None:
    """H5, point 5: both sides end with a sentence that says what is the matter; started again, they go on."""
    write_text(tmp_path / "text.txt", 3000)
    steps, limits = 400, {"silent_s": SILENT_S}
    save = {"every": 10, "keep": 2}
    quiet = tiny_recipe(tmp_path, out=str(tmp_path / "quiet"), steps=steps, save=save, liveness=limits)
    recipe = tiny_recipe(tmp_path, out=str(tmp_path / "cut"), steps=steps, save=save, liveness=limits)
    run = tmp_path / "cut"

    def start(which: Path, name: str) -> list[subprocess.Popen[bytes]]:
        return [machine.start(which, tmp_path / f"{name}-{machine.number}.log") for machine in machines]

    def said(name: str) -> list[str]:
        return [(tmp_path / f"{name}-{machine.number}.log").read_text(errors="replace") for machine in machines]

    assert [job.wait(300) for job in start(quiet, "quiet")] == [0, 0], said("quiet")
    jobs = start(recipe, "cut")
    wait_for(lambda: last_step(run) >= 100 or jobs[0].poll() is not None, 120)
    ip("-n", machines[0].name, "link", "set", machines[0].cable, "down")
    pulled, ended = time.monotonic(), {}
    sentences = (
        r"error: (rank 1 on \S+ \(process \d+\) is silent: last heard of \d+ s ago, .* rank 0 is at step \d+, in .*)",
        r"error: (rank 1 on \S+ has had no answer from the rendezvous store for \d+ s.*: this machine is cut off.*)",
    )
    while len(ended) < 2 and time.monotonic() - pulled < 60:
        for number, sentence in enumerate(sentences):
            if number not in ended and (found := re.search(sentence, said("cut")[number])):
                ended[number] = time.monotonic() - pulled
                print(f"\nmachine {number} after {ended[number]:.1f} s: {found[1]}")
        time.sleep(0.1)
    assert sorted(ended) == [0, 1] and max(ended.values()) < SILENT_S + 10, said("cut")
    codes = [job.wait(30) for job in jobs]
    print(f"torchrun ended with {codes} after {time.monotonic() - pulled:.1f} s; good checkpoints: {good_steps(run)}")
    assert 0 not in codes
    ip("-n", machines[0].name, "link", "set", machines[0].cable, "up")
    assert [job.wait(300) for job in start(recipe, "again")] == [0, 0], said("again")
    assert "resumed from" in said("again")[0]
    assert_same(run, tmp_path / "quiet")
    print("both started again: resumed, and bitwise equal to a run that was not cut")
