"""Tiny Shakespeare, two recipes side by side: nanoGPT's published CPU budget, and the same size with our best settings.

    python scripts/bench/shakespeare.py TEXT [--seeds 3] [--plot docs/images/shakespeare.png]

Each run is `llmkit train` in a process of its own, first to last line, start-up, evaluations and saves included; the two
recipes take turns. Prints a table and, last, one line of JSON. About 5 minutes on 4 cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

from common import finish, introduce, spread, table

RECIPES = {
    "published budget": "configs/pretrain/shakespeare_char_cpu.yaml",
    "best settings": "configs/pretrain/shakespeare_char_fast.yaml",
}
LIMIT = 1.90  # nats per character; nanoGPT publishes 1.88 on 20 batches


def run(recipe: str, text: Path, seed: int, out: Path) -> dict[str, Any]:
    """One training run: wall-clock seconds, the evaluations, and when each stood in the log."""
    command = [sys.executable, "-m", "llmkit.cli", "train", recipe, f"data.path={text}", f"seed={seed}", f"out={out}"]
    command += [f"data.cache_dir={out.parent / 'cache'}", "log.tensorboard=false", "log.plot=false"]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curve = [(r["step"], r["valid/loss"]) for r in records if "valid/loss" in r]
    stepping = {r["step"]: r["step_s"] for r in map(json.loads, (out / "timing.jsonl").open()) if "step_s" in r}
    return {"seconds": seconds, "curve": curve, "loss": curve[-1][1], "step_s": median(stepping.values())}


def plot(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Validation loss over seconds of training, every seed of both recipes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=130)
    for color, (name, results) in zip(("tab:blue", "tab:orange"), runs.items(), strict=True):
        for i, r in enumerate(results):
            seconds = [step * r["seconds"] / r["curve"][-1][0] for step, _ in r["curve"]]
            axes.plot(
                seconds, [loss for _, loss in r["curve"]], marker="o", ms=3, color=color, label=name if not i else None
            )
    axes.axhline(1.88, color="gray", ls=":", label="nanoGPT, published")
    axes.set(xlabel="seconds of wall clock", ylabel="validation loss, nats per character", ylim=(1.5, 3.0))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Runs, prints, plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="tinyshakespeare.txt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    introduce("shakespeare")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in RECIPES}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for i, (name, recipe) in enumerate(RECIPES.items()):
                runs[name].append(run(recipe, args.text, seed, Path(folder) / f"{i}-{seed}"))
    rows = [
        [
            name,
            f"{mean(r['loss'] for r in results):.4f}",
            spread((r["loss"] for r in results), 4),
            f"{median(r['seconds'] for r in results):.1f}",
            spread((r["seconds"] for r in results), 1),
            f"{1e3 * median(r['step_s'] for r in results):.1f}",
        ]
        for name, results in runs.items()
    ]
    print(table(["recipe", "loss, mean", "spread", "seconds, median", "spread", "ms a step"], rows))
    slow, fast = runs.values()
    ratio = median(r["seconds"] for r in fast) / median(r["seconds"] for r in slow)
    if args.plot:
        plot(runs, args.plot)
    finish(
        "shakespeare",
        loss_published_budget=round(mean(r["loss"] for r in slow), 4),
        loss_best_settings=round(mean(r["loss"] for r in fast), 4),
        time_ratio=round(ratio, 3),
        goal_loss=mean(r["loss"] for r in slow) <= LIMIT,
        goal_time=ratio <= 0.5 and mean(r["loss"] for r in fast) <= mean(r["loss"] for r in slow),
    )


if __name__ == "__main__":
    main()
