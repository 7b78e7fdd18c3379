"""What a teacher is good for, on the demo world: a student taught by soft labels, by features, by both, and by nobody.

    python scripts/distill_demo.py [--seeds 0,1,2] [--out runs/distill_demo] [--runs soft,features,...] [--jobs 3]

Starts from the demo's chat model (`make demo`, then `llmkit train configs/sft/demo.yaml`). All students are of one shape and
see the same tokens in the same order; the one without a teacher is trained at three learning rates, of which the best on the
held-out questions counts, in its favour. Every run is a process with one thread; so many as `--jobs` go side by side. Run
again, it goes on where it stopped, or only shows the table: exact answers to data/demo/heldout.jsonl, which no run has seen.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmkit.stages import load_recipe
from llmkit.training.log import read_lines

DEMO, ALONE, FEATURES = (f"configs/{name}.yaml" for name in ("distill/demo", "sft/demo_alone", "distill/features"))
RATES = ("5e-3", "1e-2", "2e-2")
HIDDEN, RELATION = "{kind: hidden, weight: 0.5}", "{kind: relation, of: [queries, keys, values]}"
# Of every run: its recipe, and what is changed in it.
RUNS: dict[str, tuple[str, list[str]]] = {
    "soft": (DEMO, []),
    "both": (FEATURES, []),
    "features": (FEATURES, [f"losses=[{HIDDEN}, {RELATION}]", "ce_weight=1.0"]),
    **{f"alone-{rate}": (ALONE, [f"optim.lr={rate}"]) for rate in RATES},
}
KEPT, KEPT_ALONE, LEAD = 0.95, 0.90, 0.02


def finished(run: Path) -> bool:
    return (run / "DONE").exists()


def train(name: str, seed: int, root: Path) -> int:
    """Runs what isn't finished, in a process with one thread; its exit code."""
    recipe, changes = RUNS[name]
    out = root / f"{name}-{seed}"
    if finished(out):
        return 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{out}.log").open("w") as log:
        command = [sys.executable, "-m", "llmkit.cli", "train", recipe, *changes, f"out={out}", f"seed={seed}"]
        begun = time.monotonic()
        code = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        ).returncode
    print(f"{name}, seed {seed}: {time.monotonic() - begun:.0f} s, exit code {code}", flush=True)
    return code


def score(run: Path) -> float:
    """Share of the held-out questions that are answered exactly, after the last step."""
    return float([m for m in read_lines(run / "metrics.jsonl") if "answers/exact" in m][-1]["answers/exact"])


def show(seeds: Sequence[int], root: Path, names: Sequence[str]) -> bool:
    """Prints the table; whether the goals are met."""
    teacher = score(Path(load_recipe(DEMO).teacher))
    found = {name: [score(root / f"{name}-{seed}") for seed in seeds] for name in names}
    rates = [name for name in names if name.startswith("alone-")]
    if rates:
        found["alone, its best rate"] = [max(found[name][i] for name in rates) for i in range(len(seeds))]
    print(f"\nteacher: {100 * teacher:.1f} % exact\n\n{'':22s} exact % (range)      kept %")
    for name, scores in found.items():
        mean = statistics.mean(scores)
        low, high = 100 * min(scores), 100 * max(scores)
        kept = f"{100 * mean / teacher:6.1f}" if teacher else "     -"  # of a teacher that knows nothing
        print(f"{name:22s} {100 * mean:5.1f} ({low:.1f}-{high:.1f})   {kept}")
    if "soft" not in found or not rates:
        return True
    taught, alone = found["soft"], found["alone, its best rate"]
    leads = [a - b for a, b in zip(taught, alone, strict=True)]
    told = ", ".join(f"{100 * lead:+.1f}" for lead in leads)
    goals = {
        f"taught keeps {KEPT:.0%} at least": statistics.mean(taught) >= KEPT * teacher,
        f"alone keeps less than {KEPT_ALONE:.0%}": statistics.mean(alone) < KEPT_ALONE * teacher,
        f"taught leads by {100 * LEAD:.0f} points in every seed ({told})": min(leads) >= LEAD,
    }
    for goal, met in goals.items():
        print(f"{'met   ' if met else 'MISSED'} {goal}")
    return all(goals.values())


def main() -> int:
    """Trains what is missing, and tells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("runs/distill_demo"))
    parser.add_argument("--runs", default=",".join(RUNS), help=f"of {', '.join(RUNS)}")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 1))
    args = parser.parse_args()
    seeds, names = [int(s) for s in args.seeds.split(",")], args.runs.split(",")
    if unknown := [name for name in names if name not in RUNS]:
        parser.error(f"--runs: {unknown[0]} is none of {', '.join(RUNS)}")
    with ThreadPoolExecutor(args.jobs) as pool:
        codes = list(pool.map(lambda pair: train(*pair, args.out), [(n, s) for s in seeds for n in names]))
    if any(codes):
        return max(codes)
    return 0 if show(seeds, args.out, names) else 1


if __name__ == "__main__":
    sys.exit(main())
