"""Several ranks on the cores of one machine: tokens a second against one process on the same cores, and what a save costs.

    python scripts/bench/cluster.py [--repeats 3] [--steps 12] [--small]

One pretraining recipe with the same global batch on 1, 2 and 4 ranks (gloo), each rank with its share of the cores, in
turns: replicated, sharded (`parallel.shard: full`), and split by width (`parallel.tensor: 2`). On one machine ranks win
nothing by themselves: what is measured is what messages cost. A save is asynchronous, in the middle of the run: the stall
is how long training waits for it, in seconds and per GB of checkpoint. About 5 minutes on four quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from common import KEEP_MEMORY, finish, interleaved, introduce, median, spread, table

ROOT = Path(__file__).resolve().parents[2]
CASES = {  # name -> ranks, overrides
    "1 rank": (1, {}),
    "2 ranks, replicated": (2, {}),
    "2 ranks, sharded": (2, {"shard": "full"}),
    "2 ranks, tensor 2": (2, {"tensor": 2}),
    "4 ranks, replicated": (4, {}),
    "4 ranks, sharded": (4, {"shard": "full"}),
    "4 ranks, sharded, tensor 2": (4, {"shard": "full", "tensor": 2}),
}


def recipe(folder: Path, steps: int, small: bool) -> dict[str, Any]:
    """A network large enough that products outweigh messages on one machine."""
    width, rows = (64, 4) if small else (512, 16)
    return {
        "stage": "pretrain", "device": "cpu", "steps": steps, "tokenizer": {"kind": "bpe", "vocab_size": 2048},
        "data": {"path": str(ROOT / "data/demo/corpus.jsonl"), "cache_dir": str(folder / "cache")},
        "model": {"n_layers": 6, "n_heads": 8, "d_model": width, "max_seq_len": 256, "vocab_size": 4096},
        "batch": {"tokens_per_step": rows * 256}, "eval": {"every": None}, "save": {"every": steps // 2, "keep": 1},
        "log": {"every": 1, "plot": False, "tensorboard": False},
    }  # fmt: skip


def run(base: dict[str, Any], folder: Path, name: str, cores: int, counter: list[int]) -> dict[str, float] | None:
    """One run in processes of its own; None, with its last words shown, if it failed."""
    n_ranks, parallel = CASES[name]
    counter[0] += 1
    out, file = folder / f"run{counter[0]}", folder / f"run{counter[0]}.yaml"
    file.write_text(json.dumps({**base, "out": str(out), "parallel": parallel}))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
    command = [*(launcher if n_ranks > 1 else [sys.executable]), str(ROOT / "scripts/train.py"), str(file)]
    env = {**os.environ, **KEEP_MEMORY, "OMP_NUM_THREADS": str(max(1, cores // n_ranks)), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        print(f"failed ({done.returncode}): {name}\n" + "\n".join(done.stderr.splitlines()[-12:]), file=sys.stderr)
        return None
    records = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
    state = sum(f.stat().st_size for f in (out / "checkpoints").rglob("*.safetensors"))
    return {
        "tokens_per_s": median(r["tokens_per_s"] for r in records if "tokens_per_s" in r and r["step"] > 2),
        "stall": max(r["save_blocked_s"] for r in records if "save_blocked_s" in r and r["step"] < base["steps"]),
        "gb": state / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of one run, at least 6")
    parser.add_argument("--small", action="store_true", help="a tiny network; proves nothing but that it runs")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    facts = introduce("cluster")
    with tempfile.TemporaryDirectory() as name:
        folder, counter = Path(name), [0]
        base = recipe(folder, max(6, args.steps), args.small)
        runs = interleaved({case: partial(run, base, folder, case, cores, counter) for case in CASES}, args.repeats)
    good = {case: [r for r in rs if r] for case, rs in runs.items()}
    if not good["1 rank"]:
        raise SystemExit("one rank did not run: see above")
    speed = {case: median(r["tokens_per_s"] for r in rs) for case, rs in good.items() if rs}
    stall = {case: median(r["stall"] for r in good[case]) for case in speed}
    rows = [
        (
            case, max(1, cores // CASES[case][0]), f"{speed[case]:.0f}", spread((r["tokens_per_s"] for r in good[case]), 0),
            f"{speed[case] / speed['1 rank']:.2f}", f"{stall[case]:.3f}", f"{stall[case] / good[case][0]['gb']:.2f}",
        )
        for case in speed
    ]  # fmt: skip
    print(f"\n{cores} cores; checkpoint {good['1 rank'][0]['gb']:.2f} GB\n")
    print(table(("", "threads a rank", "tokens/s", "min-max", "of 1 rank", "a save stalls, s", "s per GB"), rows))
    finish(
        "cluster", machine=facts, of_one_rank={case: round(s / speed["1 rank"], 3) for case, s in speed.items()},
        stall_s={case: round(s, 4) for case, s in stall.items()}, failed=[c for c, rs in good.items() if not rs],
    )  # fmt: skip


if __name__ == "__main__":
    main()
