"""Checkpoints: how long a save holds up training, how long it takes in all, and how long checking one takes.

    python scripts/bench/save.py [--gb 1.5] [--repeats 3] [--dir FOLDER]

The state is a model with its two moments. About 2 minutes on 4 cores, 2 x --gb of memory and 2 x --gb of disk, which is
freed at the end. Training waits for ours while every number is looked at (as the loop does before it saves) and copied;
a thread then writes, hashes and syncs. The others do no such thing but write, and training waits for all of it. The
first save of a run also gets its buffers from the system. Files are checked while they are in the page cache.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import torch
from common import finish, interleaved, introduce, median, spread, table
from safetensors.torch import save_file
from torch import Tensor

from llmkit.storage import checkpoints_of, trash, verify
from llmkit.training.checkpoint import Checkpointer, non_finite

BLOCKED_GOAL, VERIFY_GOAL = 0.1, 1.0  # s per GB
Files = dict[str, dict[str, Tensor]]


def make_state(gb: float, width: int = 1024) -> Files:
    """fp32 matrices of one shape, and Adam's two moments of each, in the files that a run has."""
    n = max(1, round(gb * 1e9 / (3 * 4 * width * width)))
    weights = {f"model.layers.{i}.weight": torch.randn(width, width) for i in range(n)}
    moments = {f"{kind}.{name}": torch.randn(width, width) for kind in ("exp_avg", "exp_avg_sq") for name in weights}
    return {"model.safetensors": weights, "trainer_state/optimizer.safetensors": moments}


def products(until: threading.Thread | float) -> float:
    """Matrix products a second of another thread than the one that saves, until that is done or for some seconds."""
    a = torch.ones(512, 512)
    start, done = time.perf_counter(), 0
    while until.is_alive() if isinstance(until, threading.Thread) else time.perf_counter() - start < until:
        torch.mm(a, a)
        done += 1
    return done / (time.perf_counter() - start)


def ours(state: Files, folder: Path) -> dict[str, float]:
    """Two saves of a new Checkpointer, and a check of the second."""
    saver = Checkpointer(folder, keep=1, asynchronous=True)
    saver.reserve(state)  # as the loop does before its first step
    time.sleep(1.0)
    blobs = {"config.json": b"{}", "trainer_state/state.json": b"{}"}
    result = {}
    alone = products(0.5)
    for step, which in ((1, "first"), (2, "later")):
        start = time.perf_counter()
        assert not non_finite(state)
        if which == "later":
            result["of which are all numbers finite?"] = time.perf_counter() - start
        saver.save(step, state, blobs, {})
        result[f"{which} save: training waits"] = time.perf_counter() - start
        thread = saver._thread
        assert thread is not None
        if which == "later":
            beside = products(thread)
            result["speed beside it"] = beside / alone
        saver.wait()
        result[f"{which} save: until on disk"] = time.perf_counter() - start
    (newest,) = checkpoints_of(folder)
    start = time.perf_counter()
    verify(newest)
    result["check"] = time.perf_counter() - start
    trash(newest)
    return result


def torch_save(state: Files, folder: Path) -> dict[str, float]:
    start = time.perf_counter()
    torch.save(state, folder / "state.pt")
    seconds = time.perf_counter() - start
    (folder / "state.pt").unlink()
    return {"torch.save: training waits": seconds}


def safetensors_save(state: Files, folder: Path) -> dict[str, float]:
    start = time.perf_counter()
    for name, tensors in state.items():
        save_file(tensors, folder / Path(name).name)
    seconds = time.perf_counter() - start
    for name in state:
        (folder / Path(name).name).unlink()
    return {"safetensors: training waits": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.5, help="size of the state")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dir", help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()
    facts = introduce("save")
    state = make_state(args.gb)
    gb = sum(t.numel() * t.element_size() for tensors in state.values() for t in tensors.values()) / 1e9
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        contestants = {f.__name__: partial(f, state, Path(name)) for f in (ours, torch_save, safetensors_save)}
        os.sync()  # what others have left to write would be written in our time
        runs = interleaved(contestants, args.repeats)
    seconds = {key: [r[key] for r in rs] for rs in runs.values() for key in rs[0]}
    speed_beside = seconds.pop("speed beside it")
    print(f"\n{gb:.2f} GB of state, {args.repeats} repeats\n")
    per_gb = {key: median(s) / gb for key, s in seconds.items()}
    rows = [(key, f"{median(s):.3f}", spread(s, 3), f"{per_gb[key]:.3f}") for key, s in seconds.items()]
    print(table(("", "median s", "min-max", "s per GB"), rows))
    print(f"\nmatrix products beside a save run at {100 * median(speed_beside):.0f} % of their speed alone")
    goals = {
        f"first save: training waits <= {BLOCKED_GOAL} s per GB": per_gb["first save: training waits"] <= BLOCKED_GOAL,
        f"later save: training waits <= {BLOCKED_GOAL} s per GB": per_gb["later save: training waits"] <= BLOCKED_GOAL,
        f"check <= {VERIFY_GOAL} s per GB": per_gb["check"] <= VERIFY_GOAL,
    }
    waits = per_gb["later save: training waits"]
    ratios = {f.__name__: round(per_gb[f"{key}: training waits"] / waits, 1) for f, key in
              ((torch_save, "torch.save"), (safetensors_save, "safetensors"))}  # fmt: skip
    print("\n".join(f"missed: {goal}" for goal, met in goals.items() if not met) or "every goal is met")
    finish(
        "save", gb=round(gb, 3), machine=facts, s_per_gb={key: round(s, 4) for key, s in per_gb.items()},
        speed_beside=round(median(speed_beside), 3), ratios=ratios, goals=goals, all_met=all(goals.values()),
    )  # fmt: skip


if __name__ == "__main__":
    main()
