"""Post-training, seconds a step: SFT, reward, DPO, GRPO and PPO of llmkit against TRL's.

    python scripts/bench/posttrain.py [--task sft reward dpo grpo ppo] [--mode shipped best both] [--dtype f32|bf16]
        [--steps N] [--repeats 3] [--threads N]

shipped: each tool as its user gets it. best: TRL without gradient checkpointing, and everybody, llmkit too, with an
allocator that keeps memory (tcmalloc where it is installed). DPO is also compared with TRL's reference log-probabilities
computed before training, as llmkit's are; and llmkit's time with its share of that work, spread over one epoch.

A tiny model: 4 layers, width 256, vocabulary 8192. Steps of 8 conversations, 8 pairs, 16 answers of 64 tokens to 4
prompts (GRPO, one update), 16 answers of 64 tokens (PPO, four updates, reward model and critic of the same size). Each
run is a fresh process, A B A B. The time of a step is that of the tool's whole loop: data, update, logs at every step.

TRL 1.16 has no PPO trainer: the newest on PyPI that has one, under trl.experimental, is 1.12.0. It gets a venv of its
own in the user's cache, with this one's torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import allocator_for_all, finish, in_fresh_process, interleaved, introduce, median, spread, table

WORKER = Path(__file__).with_name("posttrainers.py")
TRL_WITH_PPO = "1.12.0"
WARM_UP = 3  # steps that are not timed
TOLERANCE = 0.02  # relative difference of mean losses; the order of the rows is each tool's own
MODEL = {"n_layers": 4, "n_heads": 4, "d_model": 256, "d_ff": 704, "vocab_size": 8192, "max_seq_len": 512}


@dataclass(frozen=True)
class Task:
    examples: int
    steps: int
    """Timed steps of one run."""
    shipped: float
    """Least ratio to TRL as shipped."""
    best: float
    samples: int = 1


TASKS = {
    "sft": Task(8, 20, 3.5, 1.6),
    "reward": Task(8, 20, 1.8, 1.2),
    "dpo": Task(8, 15, 4.0, 2.0),
    "grpo": Task(16, 10, 3.0, 2.0, samples=4),
    "ppo": Task(16, 6, 3.0, 2.2),
}


def ppo_python() -> str:
    """An interpreter that has a TRL with a PPO trainer, and the torch and transformers of this one."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llmkit-bench" / "trl-ppo"
    python = cache / "bin" / "python"
    if not (cache / "ready").exists():
        print(f"installing trl {TRL_WITH_PPO} into {cache}", file=sys.stderr, flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        pins = cache / "constraints.txt"
        kept = {name: version(name).split("+")[0] for name in ("torch", "numpy", "transformers")}
        pins.write_text("".join(f"{name}=={number}\n" for name, number in kept.items()))
        subprocess.run([sys.executable, "-m", "venv", str(cache)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(pins)]
        subprocess.run([*pip, f"trl=={TRL_WITH_PPO}"], check=True)
        (cache / "ready").touch()
    return str(python)


def contestants(task: str, mode: str) -> dict[str, dict[str, Any]]:
    """Name -> what its job says beside the sizes."""
    best = mode == "best"
    found: dict[str, dict[str, Any]] = {"ours": {"who": "ours"}, "trl": {"who": "trl", "best": best}}
    if task == "dpo" and best:
        found["trl_precomputed"] = {"who": "trl", "best": True, "precomputed": True}
    return found


def compare(name: str, mode: str, folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs one task in one mode, prints its table and returns its part of the last line."""
    task = TASKS[name]
    timed = args.steps or task.steps
    allocator, env = allocator_for_all() if mode == "best" else ("each tool's own", {})
    env = {**env, "CUDA_VISIBLE_DEVICES": "", "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}

    def run(said: dict[str, Any]) -> dict[str, Any] | None:
        job = {
            "task": name, "folder": folder, "steps": WARM_UP + timed, "examples": task.examples, "samples": task.samples,
            "new_tokens": 64, "max_len": 256, "dtype": args.dtype, **said,
        }  # fmt: skip
        return in_fresh_process(
            WORKER, job, ppo_python() if name == "ppo" and said["who"] == "trl" else sys.executable, env
        )

    asked = contestants(name, mode)
    runs = interleaved({who: partial(run, said) for who, said in asked.items()}, args.repeats)
    results = {who: [r for r in rs if r] for who, rs in runs.items()}
    if not results["ours"] or not results["trl"]:
        return {"failed": [who for who, rs in results.items() if not rs], "met": False}
    seconds = {who: [median(r["seconds"][WARM_UP:]) for r in rs] for who, rs in results.items() if rs}
    middle = {who: median(s) for who, s in seconds.items()}
    prepared = median(r.get("prepare_s_per_step", 0.0) for r in results["ours"])
    ours = middle["ours"] + prepared
    cpu = {who: median(median(r["cpu"][WARM_UP:]) for r in rs) for who, rs in results.items() if rs}
    losses = {who: statistics.fmean(rs[0]["losses"]) for who, rs in results.items() if rs}

    print(
        f"\n{name}, {args.dtype}, {mode}: {task.examples} examples a step; {args.repeats} runs of {timed} timed steps; "
        f"allocator: {allocator}; goal: {task.shipped if mode == 'shipped' else task.best} times as fast\n"
    )
    rows = []
    for who, values in seconds.items():
        time_of = ours if who == "ours" else middle[who]
        first = results[who][0]
        facts = (f"{cpu[who]:.3f}", f"{losses[who]:.4f}", first["setting"])
        rows.append((who, f"{time_of:.3f}", spread(values, 3), f"{time_of / ours:.2f}", *facts))
    print(table(("", "s/step", "min-max", "ours is x", "CPU s", "mean loss", "setting"), rows), flush=True)
    if prepared:
        print(
            f"of ours, {prepared:.3f} s are the reference's log-probabilities, computed once and spread over one epoch"
        )
    split = _split(results["ours"])
    if split:
        total = sum(split.values())
        print(
            "ours: " + ", ".join(f"{key} {value:.3f} s ({100 * value / total:.0f} %)" for key, value in split.items())
        )
    goal = task.shipped if mode == "shipped" else task.best
    ratios = {who: round(middle[who] / ours, 3) for who in middle if who != "ours"}
    # A policy's loss is about 0 whatever it learns, and the losses of preference at the start are all ln 2.
    comparable = name in ("grpo", "ppo") or abs(losses["ours"] / losses["trl"] - 1) <= TOLERANCE
    return {
        "ratios": ratios, "goal": goal, "met": ratios["trl"] >= goal and comparable, "loss_agrees": comparable,
        "seconds": {who: round(s, 4) for who, s in {**middle, "ours": ours}.items()},
        "split_s": {key: round(value, 4) for key, value in split.items()},
    }  # fmt: skip


def _split(results: list[dict[str, Any]]) -> dict[str, float]:
    """Generation, scoring and update: medians over the timed steps of all runs."""
    names = {"rollout_s": "generation", "score_s": "scoring", "update_s": "update"}
    found = {}
    for key, name in names.items():
        values = [v for r in results for v in r["split"].get(key, [])[WARM_UP:]]
        if values:
            found[name] = median(values)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--mode", choices=("shipped", "best", "both"), default="both")
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--steps", type=int, help="timed steps of a run (default: the task's own)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: all cores")
    args = parser.parse_args()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    facts = introduce("posttrain")
    print(f"peers: trl {version('trl')}; for PPO trl {TRL_WITH_PPO}; transformers {version('transformers')}")
    modes = ("shipped", "best") if args.mode == "both" else (args.mode,)
    with tempfile.TemporaryDirectory() as folder:
        longest = max(WARM_UP + (args.steps or TASKS[name].steps) for name in args.task)
        made = in_fresh_process(
            WORKER, {"who": "inputs", "folder": folder, "model": MODEL, "n_rows": max(200, 20 * longest)}
        )
        if made is None:
            raise SystemExit("the inputs could not be made: see above")
        print(
            f"model: {json.dumps(MODEL)}; tokens of a row, longest and mean: {json.dumps(made['tokens'])}", flush=True
        )
        results = {f"{name}/{mode}": compare(name, mode, folder, args) for name in args.task for mode in modes}
    missed = [key for key, result in results.items() if not result["met"]]
    print("\n" + ("\n".join(f"missed: {key}" for key in missed) or "every goal is met"))
    finish("posttrain", dtype=args.dtype, machine=facts, results=results, all_met=not missed)


if __name__ == "__main__":
    main()
