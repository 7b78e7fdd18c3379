"""Distillation: samples a second of `llmkit train` beside TRL's trainers, and what the loss takes at a large vocabulary.

    python scripts/bench/distill.py [--part on_policy data memory] [--mode shipped best both] [--dtype f32|bf16]
        [--divergence forward|reverse|jsd] [--steps N] [--repeats 3] [--threads N] [--vocab 128256] [--positions 2048]

on_policy: the student samples answers of 64 tokens to 8 prompts (lambda = 1 of TRL's GKDTrainer). data: 8 conversations
with the data's answers (lambda = 0); there the losses of all must agree. Student and teacher are tiny models: 4 layers,
width 256, vocabulary 8192. Each run is a fresh process, A B A B; the time of a step is that of the tool's whole loop.

shipped: each tool as its user gets it; TRL then recomputes activations, and its GKD generates without a KV cache. best:
TRL without that, and everybody, llmkit too, with an allocator that keeps memory (tcmalloc where it is installed).
DistillationTrainer, which TRL recommends where all answers are sampled, is shown too; the goals are about GKDTrainer.

memory: the divergence of two models' outputs in bf16, forward and backward: the peak above what the inputs take and the
seconds, ours against both logits whole, TRL's GKD loss, and TRL's chunked one. As in loss.py, ours with memory kept, as
llmkit's loop sets it, is held against the naive form as users run it; with memory kept that would be faster, and take
twice as much. TRL's loss takes 10 GB, and 18 for jsd: where that is not there, its line is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import (
    KEEP_MEMORY,
    allocator_for_all,
    finish,
    in_fresh_process,
    interleaved,
    introduce,
    median,
    spread,
    table,
)

WORKER = Path(__file__).with_name("distillers.py")
WARM_UP = 3  # steps that are not timed
EXAMPLES, NEW_TOKENS, MAX_LEN = 8, 64, 256
TOLERANCE = 0.02  # relative difference of mean losses; the order of the rows is each tool's own
MODEL = {"n_layers": 4, "n_heads": 4, "d_model": 256, "d_ff": 704, "vocab_size": 8192, "max_seq_len": 512}
ENV = {"CUDA_VISIBLE_DEVICES": "", "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
LOSSES = ("naive", "trl", "trl_chunked", "ours")
MEMORY_GOAL = 0.2
PASSES = 3  # timed passes of a loss in a run


@dataclass(frozen=True)
class Task:
    steps: int
    """Timed steps of one run."""
    goals: dict[str, float]
    """Mode -> least ratio of samples a second to TRL's GKD."""


TASKS = {"on_policy": Task(10, {"shipped": 6.0, "best": 2.2}), "data": Task(15, {"shipped": 3.0})}


def contestants(name: str, mode: str) -> dict[str, dict[str, Any]]:
    """Name -> what its job says beside the sizes."""
    best = mode == "best"
    found: dict[str, dict[str, Any]] = {"ours": {"who": "ours"}, "trl": {"who": "trl", "best": best}}
    if name == "on_policy":
        found["trl_distillation"] = {"who": "trl_distillation", "best": best}
    return found


def compare(name: str, mode: str, folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains with everybody in one mode, prints the table and returns its part of the last line."""
    task = TASKS[name]
    goal = task.goals.get(mode)
    timed = args.steps or task.steps
    allocator, env = allocator_for_all() if mode == "best" else ("each tool's own", {})

    def run(said: dict[str, Any]) -> dict[str, Any] | None:
        job = {
            "part": "train", "folder": folder, "steps": WARM_UP + timed, "examples": EXAMPLES,
            "on_policy": name == "on_policy", "divergence": args.divergence or "jsd", "new_tokens": NEW_TOKENS,
            "max_len": MAX_LEN, "dtype": args.dtype, **said,
        }  # fmt: skip
        return in_fresh_process(WORKER, job, env={**ENV, **env})

    runs = interleaved({who: partial(run, said) for who, said in contestants(name, mode).items()}, args.repeats)
    results = {who: [r for r in rs if r] for who, rs in runs.items()}
    if not results["ours"] or not results["trl"]:
        return {"failed": [who for who, rs in results.items() if not rs], "met": False}
    seconds = {who: [median(r["seconds"][WARM_UP:]) for r in rs] for who, rs in results.items() if rs}
    middle = {who: median(s) for who, s in seconds.items()}
    losses = {who: statistics.fmean(results[who][0]["losses"]) for who in middle}

    print(
        f"\n{name}, {args.dtype}, {mode}: {EXAMPLES} conversations a step; {args.repeats} runs of {timed} timed steps; "
        f"allocator: {allocator}; goal: {f'{goal:g} times TRL' if goal else 'none'}\n"
    )
    rows = []
    for who, values in seconds.items():
        cpu = median(median(r["cpu"][WARM_UP:]) for r in results[who])
        rate, ratio = EXAMPLES / middle[who], middle[who] / middle["ours"]
        first, facts = results[who][0], (f"{cpu:.3f}", f"{losses[who]:.5f}", _generation(results[who]))
        rows.append(
            (who, f"{rate:.2f}", f"{middle[who]:.3f}", spread(values, 3), f"{ratio:.2f}", *facts, first["setting"])
        )
    header = ("", "samples/s", "s/step", "min-max", "ours is x", "CPU s", "mean loss", "generation", "setting")
    print(table(header, rows), flush=True)
    ratios = {who: round(middle[who] / middle["ours"], 3) for who in middle if who != "ours"}
    # Where answers are sampled each tool has its own, and GKDTrainer divides by the number of the data's tokens.
    agrees = name == "on_policy" or abs(losses["ours"] / losses["trl"] - 1) <= TOLERANCE
    return {
        "divergence": args.divergence or "jsd", "ratios": ratios, "goal": goal, "loss_agrees": agrees,
        "met": agrees and (goal is None or ratios["trl"] >= goal),
        "seconds": {who: round(s, 4) for who, s in middle.items()},
        "samples_per_s": {who: round(EXAMPLES / s, 3) for who, s in middle.items()},
        "losses": {who: round(loss, 6) for who, loss in losses.items()},
    }  # fmt: skip


def _generation(results: list[dict[str, Any]]) -> str:
    """The median time of writing a step's answers, and their mean length."""
    written = [w for r in results for w in r["written"][WARM_UP:]]
    if not written:
        return "-"
    return f"{median(s for s, _ in written):.3f} s, {statistics.fmean(n for _, n in written):.0f} tokens"


def speed(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Makes the models and rows, and compares in every part and mode."""
    modes = ("shipped", "best") if args.mode == "both" else (args.mode,)
    steps = WARM_UP + max(args.steps or TASKS[name].steps for name in names)
    least = max(200, 2 * EXAMPLES * steps)
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "part": "inputs", "folder": folder, "model": MODEL, "teacher": MODEL, "max_len": MAX_LEN,
            "n_rows": 2 * least, "least_rows": least,
        }  # fmt: skip
        made = in_fresh_process(WORKER, job, env=ENV)
        if made is None:
            raise SystemExit("the inputs could not be made: see above")
        print(f"student and teacher: {json.dumps(MODEL)}; tokens of a row: {json.dumps(made)}", flush=True)
        return {f"{name}/{mode}": compare(name, mode, folder, args) for name in names for mode in modes}


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Runs every loss alone, with and without kept memory; prints the table and returns its part of the last line."""

    divergence = args.divergence or "forward"  # of which the naive form takes least

    def run(who: str, kept: bool) -> dict[str, Any] | None:
        job = {
            "part": "measure", "who": who, "divergence": divergence, "n": args.positions, "vocab": args.vocab,
            "passes": PASSES,
        }  # fmt: skip
        return in_fresh_process(WORKER, job, env={**ENV, **(KEEP_MEMORY if kept else {})})

    kinds = {f"{who}, default": (who, False) for who in LOSSES} | {"ours, kept": ("ours", True)}
    done = interleaved({name: partial(run, *kind) for name, kind in kinds.items()}, args.repeats)
    runs = {name: [r for r in rs if r] for name, rs in done.items() if any(rs)}
    naive, ours = "naive, default", "ours, kept"
    if naive not in runs or ours not in runs:
        return {"failed": [name for name in kinds if name not in runs], "met": False}
    seconds = {name: [median(r["seconds"]) for r in rs] for name, rs in runs.items()}
    middle = {name: median(s) for name, s in seconds.items()}
    extra, whole = ({name: median(r[key] for r in rs) for name, rs in runs.items()} for key in ("extra", "whole"))
    rows = [
        (
            *name.split(", "), f"{middle[name]:.3f}", spread(seconds[name], 3), f"{middle[name] / middle[naive]:.2f}",
            f"{extra[name] / 1e6:.0f}", f"{extra[name] / extra[naive]:.3f}", f"{whole[name] / 1e6:.0f}",
        )
        for name in runs
    ]  # fmt: skip
    print(
        f"\nmemory: {divergence}, {args.positions} positions, vocabulary {args.vocab}, bf16; {args.repeats} runs of "
        f"{PASSES} passes; goal: at most {MEMORY_GOAL} times the extra memory of the naive form\n"
    )
    header = ("", "memory", "median s", "min-max", "x naive", "extra MB", "x naive", "whole process MB")
    print(table(header, rows), flush=True)

    job = {"part": "errors", "divergence": divergence, "whos": LOSSES, "n": 256, "vocab": min(args.vocab, 8192)}
    errors = in_fresh_process(WORKER, job, env=ENV)
    if errors is None:
        raise SystemExit("the gradients could not be compared: see above")
    agree = errors["ours"] <= 1.5 * errors["naive"] + 1e-3
    print("\nrelative error of gradients: " + ", ".join(f"{who} {error:.2e}" for who, error in errors.items()))
    ratios = {"memory": extra[ours] / extra[naive], "time": middle[ours] / middle[naive]}
    return {
        "divergence": divergence, "ratios": {key: round(r, 3) for key, r in ratios.items()}, "goal": MEMORY_GOAL,
        "met": agree and ratios["memory"] <= MEMORY_GOAL, "gradients_agree": agree,
        "seconds": {name: round(s, 4) for name, s in middle.items()},
        "extra_mb": {name: round(b / 1e6, 1) for name, b in extra.items()},
        "gradient_errors": {who: float(f"{error:.2e}") for who, error in errors.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=(*TASKS, "memory"), default=[*TASKS, "memory"])
    parser.add_argument("--mode", choices=("shipped", "best", "both"), default="both")
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    parser.add_argument(
        "--divergence", choices=("forward", "reverse", "jsd"), help="default: jsd, TRL's; memory: forward"
    )
    parser.add_argument("--steps", type=int, help="timed steps of a run (default: the part's own)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--vocab", type=int, default=128256, help="memory: size of the vocabulary")
    parser.add_argument("--positions", type=int, default=EXAMPLES * MAX_LEN, help="memory: trained tokens")
    args = parser.parse_args()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    facts = introduce("distill")
    print(f"peers: trl {version('trl')}, transformers {version('transformers')}", flush=True)
    names = [name for name in args.part if name in TASKS]
    results = speed(args, names) if names else {}
    if "memory" in args.part:
        results["memory"] = memory(args)
    missed = [key for key, result in results.items() if not result["met"]]
    print("\n" + ("\n".join(f"missed: {key}" for key in missed) or "every goal is met"))
    finish("distill", dtype=args.dtype, machine=facts, results=results, all_met=not missed)


if __name__ == "__main__":
    main()
