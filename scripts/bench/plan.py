"""How well `llmkit plan` knows this machine: two recipes calibrate it, five others are predicted and then run.

    python scripts/bench/plan.py [--threads N] [--only NAME ...] [--calibration FILE] [--small]

Peak memory is that of a fresh process beyond what it holds after its imports; goal: within 15 %. Seconds a step are
medians after the first steps (of PPO: whole rollouts); goal: within 30 %. On one thread they are that thread's own, so
that other work on the machine disturbs little. The calibration is written to FILE, for `llmkit plan --calibration`.
About 8 minutes on one thread; --small takes one minute and proves nothing but that it runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import KEEP_MEMORY, finish, in_fresh_process, introduce, median, table

DATA = Path(__file__).resolve().parents[2] / "data" / "demo"
CALIBRATED = ("pretrain_fp32", "pretrain_bf16")
MEMORY_GOAL, TIME_GOAL = 0.15, 0.30


def recipes(folder: Path, small: bool) -> dict[str, dict[str, Any]]:
    """What is run, in an order in which each finds the models it needs."""
    size, rows = (0.25, 4) if small else (1, 8)
    vocab, text = 8192, {"path": str(DATA / "corpus.jsonl"), "cache_dir": str(folder / "cache")}
    chats = {"train": [{"path": str(DATA / "chat_train.jsonl")}], "valid_frac": 0.0, "cache_dir": str(folder / "cache")}
    prompts = {"train": [{"path": str(DATA / "prompts.jsonl")}], "valid_frac": 0.0, "cache_dir": str(folder / "cache")}

    def shape(layers: int, heads: int, width: int, length: int, **more: Any) -> dict[str, Any]:
        width = int(width * size)
        return {
            "n_layers": max(2, int(layers * size)), "n_heads": heads, "d_model": width, "max_seq_len": length,
            "vocab_size": vocab, **more,
        }  # fmt: skip

    usual = {
        "steps": 3 if small else 4, "device": "cpu", "eval": {"every": None}, "save": {"keep": 1},
        "log": {"every": 1, "plot": False, "tensorboard": False},
    }  # fmt: skip
    tokenizer = {"kind": "bpe", "vocab_size": 2048}
    pretrain = {**usual, "stage": "pretrain", "data": text}
    first = str(folder / "pretrain_fp32")

    def batch(length: int, micro: int = 1) -> dict[str, int]:
        tokens = max(length, rows * 256)
        return {"tokens_per_step": tokens, "micro_tokens": tokens // micro}

    return {
        "pretrain_fp32": {
            **pretrain, "tokenizer": tokenizer, "model": shape(6, 6, 384, 256, qk_norm=True), "batch": batch(256),
        },
        "pretrain_bf16": {
            **pretrain, "tokenizer": first + "/tokenizer", "model": shape(6, 7, 448, 512), "batch": batch(512),
            "precision": "bf16", "optim": {"name": "muon", "lr": 1e-3},
        },
        "recomputed": {
            **pretrain, "tokenizer": first + "/tokenizer", "model": shape(8, 8, 512, 256, tie_embeddings=False),
            "batch": batch(256), "activation_checkpointing": True, "optim": {"ema_decay": 0.99},
        },
        "grouped_bf16": {
            **pretrain, "tokenizer": first + "/tokenizer", "batch": batch(256, 2), "precision": "bf16",
            "model": shape(4, 8, 640, 256, n_kv_heads=2, qk_norm=True),
        },
        "sft": {**usual, "stage": "sft", "init_from": first, "data": chats, "batch": batch(256)},
        "distill": {
            **usual, "stage": "distill", "teacher": first, "examples": "documents", "data": text, "batch": batch(256),
            "model": shape(4, 4, 256, 256), "losses": [{"kind": "soft"}], "term_norms_every": None,
        },
        "ppo": {
            **usual, "stage": "ppo", "init_from": first, "data": prompts, "steps": 4 if small else 6,
            "rewards": [{"kind": "length", "target": 24}],
            "rollout": {"prompts_per_step": rows * 2, "max_new_tokens": 96, "max_prompt_len": 32, "record_every": None},
            "update": {"minibatches": 1, "epochs": 2},
        },
    }  # fmt: skip


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Runs one recipe; its peak memory beyond the imports', and the seconds of each step."""
    import torch
    from common import peak, reset_peak

    from llmkit.stages import load_recipe, stage_module
    from llmkit.training import meter

    torch.set_num_threads(job["threads"])
    recipe = load_recipe(job["file"])
    module = stage_module(recipe)
    import datasets  # noqa: F401 (what a run imports only when it gets there)

    a = torch.ones(256, 256, requires_grad=True)
    (a @ a).sum().backward()
    clock = time.thread_time if job["threads"] == 1 else time.perf_counter
    ends: list[float] = []
    told = meter.Meter.step

    def step(self: meter.Meter, *args: Any) -> None:
        ends.append(clock())
        told(self, *args)

    meter.Meter.step = step  # type: ignore[method-assign]
    before = reset_peak()
    module.run(recipe)
    return {"peak": peak() - before, "ends": ends}


def predicted(job: dict[str, Any]) -> dict[str, Any]:
    """What the planner says, uncorrected; in a process of its own, since it computes too."""
    import torch

    from llmkit.plan.here import Calibration, activation_peak, predict
    from llmkit.stages import load_recipe, stage_module

    torch.set_num_threads(job["threads"])
    recipe = load_recipe(job["file"])
    planned = stage_module(recipe).job(recipe)
    here = predict(planned, Calibration(1.0, 1.0, 0.0))
    assert here.seconds is not None
    return {
        "peak": here.peak_bytes, "activations": activation_peak(planned), "seconds": sum(here.seconds.values()),
        "parts": here.seconds,
    }  # fmt: skip


def seconds_of(ends: list[float], recipe: dict[str, Any]) -> float:
    """Of one step: the median; where several steps share a rollout, of the means over each such cycle."""
    update = recipe.get("update")
    cycle = update["minibatches"] * update["epochs"] if update else 1
    marks = (
        ends[::cycle] if cycle > 1 else ends[1:]
    )  # from one to the next is a whole cycle; the first step is left out
    return median((b - a) / cycle for a, b in itertools.pairwise(marks))


def calibrate(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The three numbers that make the two recipes come out: time as a geometric mean, memory exactly."""
    a, b = (found[name] for name in CALIBRATED)
    factor = (a["seconds"] / a["told"]["seconds"] * b["seconds"] / b["told"]["seconds"]) ** 0.5
    # peak = what is held + activations x factor + base, for both.
    rest = [r["peak"] - (r["told"]["peak"] - r["told"]["activations"]) for r in (a, b)]
    base = 1.2e8  # two runs of about one size can't tell it from the factor: it is what the smallest runs take
    share = sum(rest_of - base for rest_of in rest) / sum(r["told"]["activations"] for r in (a, b))
    return {"time": factor, "activations": max(1.0, share), "base_bytes": base}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", nargs="*", default=[], help="these predictions only")
    parser.add_argument("--calibration", metavar="FILE", help="where it is written")
    parser.add_argument("--small", action="store_true", help="tiny shapes, three steps")
    args = parser.parse_args()
    facts = introduce("plan")
    env = {**KEEP_MEMORY, "OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": ""}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        every = recipes(folder, args.small)
        for which, recipe in every.items():
            if args.only and which not in args.only and which not in CALIBRATED:
                continue
            file = folder / f"{which}.yaml"
            file.write_text(json.dumps({**recipe, "out": str(folder / which)}))
            job = {"who": which, "file": str(file), "threads": args.threads}
            print(f"{which} ...", file=sys.stderr, flush=True)
            got = in_fresh_process(Path(__file__), {**job, "what": "measure"}, env=env)
            told = in_fresh_process(Path(__file__), {**job, "what": "predicted"}, env=env)
            if got is None or told is None:
                raise SystemExit(f"{which} did not run: see above")
            r = found[which] = {"peak": got["peak"], "seconds": seconds_of(got["ends"], recipe), "told": told}
            print(
                f"  measured {r['peak'] / 1e9:.2f} GB, {r['seconds']:.2f} s; uncorrected {told['peak'] / 1e9:.2f} GB "
                f"({told['activations'] / 1e9:.2f} of them activations), {told['seconds']:.2f} s",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    calibration = calibrate(found)
    if args.calibration:
        Path(args.calibration).write_text(json.dumps(calibration, indent=1) + "\n")
    rows, errors = [], {}
    for which, r in found.items():
        told = r["told"]
        memory = told["peak"] + (calibration["activations"] - 1) * told["activations"] + calibration["base_bytes"]
        seconds = calibration["time"] * told["seconds"]
        errors[which] = (memory / r["peak"] - 1, seconds / r["seconds"] - 1)
        rows.append(
            (
                which + (" (calibrates)" if which in CALIBRATED else ""), f"{r['peak'] / 1e9:.2f}", f"{memory / 1e9:.2f}",
                f"{100 * errors[which][0]:+.0f} %", f"{r['seconds']:.2f}", f"{seconds:.2f}",
                f"{100 * errors[which][1]:+.0f} %",
            )
        )  # fmt: skip
    print(
        f"\n{args.threads} thread(s); calibration: " + ", ".join(f"{k} {v:.4g}" for k, v in calibration.items()) + "\n"
    )
    print(table(("", "GB measured", "predicted", "off", "s a step", "predicted", "off"), rows))
    others = {which: e for which, e in errors.items() if which not in CALIBRATED}
    goals = {
        "memory within 15 %": all(abs(m) <= MEMORY_GOAL for m, _ in others.values()),
        "time within 30 %": all(abs(t) <= TIME_GOAL for _, t in others.values()),
    }
    print("\n" + ("\n".join(f"missed: {goal}" for goal, met in goals.items() if not met) or "every goal is met"))
    finish(
        "plan", machine=facts, threads=args.threads, calibration=calibration,
        off={which: [round(x, 3) for x in e] for which, e in errors.items()}, goals=goals, all_met=all(goals.values()),
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        asked = json.loads(sys.argv[2])
        print("\n" + json.dumps({"measure": measure, "predicted": predicted}[asked["what"]](asked)))
    else:
        main()
