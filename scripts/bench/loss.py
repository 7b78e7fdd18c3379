"""Cross entropy over a large vocabulary, forward and backward in bf16: seconds and extra memory, ours against others.

    python scripts/bench/loss.py [--repeats 3] [--small] [--vocab 50304 128256] [--chunks 128 256 512 1024]

4096 positions of width 768. About 5 minutes on 4 cores; --small takes seconds and proves nothing but that it runs.

Each run is a fresh process, A B C A B C. Extra memory is the peak of the first full run above what the inputs take,
with the gradients in it, and depends on the allocator: glibc gives large blocks back at once, so that the peak is what
is alive, but pays for fresh pages every time; kept memory (as llmkit's loop sets it, and as others get by tcmalloc) is
faster and a little larger for the gaps. Both are shown. The goal compares ours as the loop runs it with the naive way
as users run it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    KEEP_MEMORY,
    finish,
    in_fresh_process,
    interleaved,
    introduce,
    median,
    peak,
    reset_peak,
    spread,
    table,
)

N, D, CHECKPOINT_CHUNK, GOAL_CHUNK = 4096, 768, 1024, 256
TIME_GOAL, MEMORY_GOAL = 0.5, 0.12
FULL_STEPS = 3  # timed passes of a run


def loss_of(who: str) -> Callable[[Any, Any, Any], Any]:
    """(hidden, weight, labels) -> mean loss. `who` is naive, checkpoint or ours-CHUNK."""
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint

    from llmkit.losses import linear_cross_entropy

    def piece(h: Any, w: Any, y: Any) -> Any:
        return F.cross_entropy((h @ w.t()).float(), y, reduction="sum")

    def naive(h: Any, w: Any, y: Any) -> Any:
        return F.cross_entropy((h @ w.t()).float(), y)

    def checkpointed(h: Any, w: Any, y: Any) -> Any:
        parts = zip(h.split(CHECKPOINT_CHUNK), y.split(CHECKPOINT_CHUNK), strict=True)
        return sum(checkpoint(piece, h_part, w, y_part, use_reentrant=False) for h_part, y_part in parts) / len(y)

    def ours(h: Any, w: Any, y: Any) -> Any:
        return linear_cross_entropy(h, w, y, chunk=int(who.split("-")[1])).total / len(y)

    return {"naive": naive, "checkpoint": checkpointed}.get(who, ours)


def inputs(n: int, vocab: int, dtype: Any) -> tuple[Any, Any, Any]:
    import torch

    torch.manual_seed(0)  # in place: freed memory that is kept would hide what comes after it
    hidden = torch.empty(n, D, dtype=dtype).normal_().requires_grad_()
    weight = torch.empty(vocab, D, dtype=dtype).normal_(std=D**-0.5).requires_grad_()
    return hidden, weight, torch.randint(vocab, (n,))


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each pass, and the extra bytes of the first."""
    import torch

    loss_fn = loss_of(job["who"])
    small_h, small_w, small_y = inputs(64, 512, torch.bfloat16)
    loss_fn(small_h, small_w, small_y).backward()  # threads, kernels and buffers of the libraries
    hidden, weight, labels = inputs(job["n"], job["vocab"], torch.bfloat16)
    before, seconds, extra = reset_peak(), [], 0
    for i in range(1 + job["steps"]):
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        loss_fn(hidden, weight, labels).backward()
        seconds.append(time.perf_counter() - start)
        extra = peak() - before if i == 0 else extra
    return {"seconds": seconds[1:], "extra": extra}


def gradient_errors(whos: list[str], n: int, vocab: int) -> dict[str, float]:
    """Relative error of both gradients in bf16 against naive in f32 from the same numbers, the larger of the two."""
    import torch

    hidden, weight, labels = inputs(n, vocab, torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    loss_of("naive")(*exact, labels).backward()
    errors = {}
    for who in whos:
        hidden.grad = weight.grad = None
        loss_of(who)(hidden, weight, labels).backward()
        pairs = zip((hidden, weight), exact, strict=True)
        errors[who] = max(((t.grad.float() - e.grad).norm() / e.grad.norm()).item() for t, e in pairs)
    return errors


def compare(vocab: int, whos: list[str], n: int, repeats: int) -> dict[str, Any]:
    """Runs and prints one vocabulary; returns its part of the last line."""

    def run(who: str, kept: bool) -> dict[str, Any]:
        job = {"who": who, "n": n, "vocab": vocab, "steps": FULL_STEPS}
        result = in_fresh_process(Path(__file__), job, env=KEEP_MEMORY if kept else None)
        if result is None:
            raise SystemExit(f"{who} did not run: see above")
        return result

    kinds = [(who, kept) for who in whos for kept in (False, True)]
    name = {kind: f"{kind[0]}, {'kept' if kind[1] else 'default'}" for kind in kinds}
    runs = interleaved({name[kind]: partial(run, *kind) for kind in kinds}, repeats)
    seconds = {key: [median(r["seconds"]) for r in rs] for key, rs in runs.items()}
    extra = {key: median(r["extra"] for r in rs) for key, rs in runs.items()}
    time_of = {key: median(s) for key, s in seconds.items()}
    naive = name[("naive", False)]
    rows = [
        (
            *(key.split(", ")), f"{time_of[key]:.3f}", spread(seconds[key], 3), f"{time_of[key] / time_of[naive]:.2f}",
            f"{extra[key] / 1e6:.0f}", f"{extra[key] / extra[naive]:.3f}",
        )
        for key in name.values()
    ]  # fmt: skip
    print(f"\n{n} positions, width {D}, vocabulary {vocab}, bf16, {repeats} runs of {FULL_STEPS} passes\n")
    print(table(("", "memory", "median s", "min-max", "x naive", "extra MB", "x naive"), rows), flush=True)
    ours = name[(f"ours-{GOAL_CHUNK}", True)]
    ratios = {"time": time_of[ours] / time_of[naive], "memory": extra[ours] / extra[naive]}
    same = name[("naive", True)]
    goals = {
        f"time <= {TIME_GOAL}": ratios["time"] <= TIME_GOAL,
        f"memory <= {MEMORY_GOAL}": ratios["memory"] <= MEMORY_GOAL,
    }
    return {
        "ratios": {key: round(r, 3) for key, r in ratios.items()},
        "ratios_memory_kept": {"time": round(time_of[ours] / time_of[same], 3)},
        "goals": goals,
        "seconds": {key: round(s, 4) for key, s in time_of.items()},
        "extra_mb": {key: round(b / 1e6, 1) for key, b in extra.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocab", type=int, nargs="+", default=[50304, 128256])
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--small", action="store_true", help="256 positions, vocabulary 2048, one repeat")
    parser.add_argument("--threads", type=int, help="default: all cores")
    args = parser.parse_args()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    n, vocabs, repeats = (256, [2048], 1) if args.small else (N, args.vocab, args.repeats)
    whos = ["naive", "checkpoint", *(f"ours-{chunk}" for chunk in sorted({*args.chunks, GOAL_CHUNK}))]
    facts = introduce("loss")
    results = {str(vocab): compare(vocab, whos, n, repeats) for vocab in vocabs}
    errors = gradient_errors(whos, min(n, 512), min(vocabs))
    agree = all(error <= 1.5 * errors["naive"] + 1e-3 for error in errors.values())
    print("\nrelative error of gradients: " + ", ".join(f"{who} {error:.2e}" for who, error in errors.items()))
    met = agree and all(all(r["goals"].values()) for r in results.values())
    rounded = {who: float(f"{error:.2e}") for who, error in errors.items()}
    finish("loss", n=n, machine=facts, results=results, gradient_errors=rounded, gradients_agree=agree, all_met=met)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print("\n" + json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        main()
