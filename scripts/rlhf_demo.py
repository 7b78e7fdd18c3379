"""The whole of RLHF on the demo world: SFT, reward model, PPO, GRPO, DPO; and a table of what each of them achieved.

    python scripts/rlhf_demo.py [--seeds 0,1,2] [--out runs/rlhf] [--stages sft,reward,ppo,...] [ppo.optim.lr=1e-4 ...]

Starts from the demo's base model (`make demo`). Reward model and DPO begin with the SFT model; PPO with `manners`, which
answers in whole sentences, politely or not; GRPO with `short`, a third of the SFT. Every stage runs its recipe with the
seed; an override begins with the stage's name. Run again, it goes on where it stopped, or only shows the table. The judge
is the oracle of data/world.py on data/demo/heldout.jsonl, whose questions no stage has seen.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.cli import main as llmkit
from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import generate
from llmkit.inference.sampling import row_seeds
from llmkit.model.weights import load_model
from llmkit.rollout.rewards.base import Rewards
from llmkit.rollout.rewards.config import ModelReward
from llmkit.rollout.rewards.grading import Answer
from llmkit.stages import load_recipe
from llmkit.storage import replace_file, resolve_model
from llmkit.tokenizer import Tokenizer
from llmkit.training.log import read_lines

# Of every stage: its recipe, and the stage whose model it begins with ("": the recipe's own).
RUNS = {
    "sft": ("configs/sft/demo.yaml", ""),
    "manners": ("configs/sft/demo_manners.yaml", "sft"),
    "short": ("configs/sft/demo_short.yaml", ""),
    "reward": ("configs/reward/demo.yaml", "sft"),
    "ppo": ("configs/ppo/demo.yaml", "manners"),
    "grpo": ("configs/grpo/demo.yaml", "short"),
    "dpo": ("configs/dpo/demo.yaml", "sft"),
}
STAGES = tuple(RUNS)
CHAT = tuple(stage for stage in STAGES if stage != "reward")  # stages whose model answers
HELDOUT = Path("data/demo/heldout.jsonl")
EASY = ("analogy", "safety")
WEAK = "analogy"  # the skill that GRPO is to improve
NEW_TOKENS = 64
EXPLAINED = "train/rollout/explained_variance"


def load_world() -> Any:
    spec = importlib.util.spec_from_file_location("world", Path("data/world.py"))
    assert spec is not None and spec.loader is not None
    world = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(world)
    return world


# --- training --------------------------------------------------------------------------------------------------------


def overrides(stage: str, root: Path, seed: int) -> list[str]:
    """Where a stage of this seed begins and ends."""
    said, before = [f"out={root / stage}", f"seed={seed}"], RUNS[stage][1]
    if before:
        said.append(f"init_from={root / before}")
    if stage == "ppo":
        judge = {"kind": "model", "path": str(root / "reward")}
        rest = [r.model_dump(mode="json") for r in load_recipe(RUNS[stage][0]).rewards if r.kind != "model"]
        said += [f"rewards={json.dumps([judge, *rest])}", f"critic.init_from={root / 'reward'}"]
    return said


def train(stages: Sequence[str], root: Path, seed: int, more: Sequence[str]) -> int:
    """Runs what isn't finished; the exit code of the first that failed, or 0."""
    for stage in stages:
        extra = [text.removeprefix(f"{stage}.") for text in more if text.startswith(f"{stage}.")]
        argv = ["train", RUNS[stage][0], *overrides(stage, root, seed), *extra]
        print(f"\n$ llmkit {' '.join(argv)}", flush=True)
        started, done = time.monotonic(), (root / stage / "DONE").is_file()
        if code := llmkit(argv):
            return code
        if not done:
            seconds = {**_kept(root / "seconds.json"), stage: time.monotonic() - started}
            replace_file(root / "seconds.json", json.dumps(seconds))
    return 0


def _kept(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


# --- what the models answer ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What a model said to every held-out question."""

    texts: list[str]
    lengths: list[int]
    """Tokens, the end of turn too."""
    ids: list[list[int]]
    """Prompt and answer."""
    n_prompts: list[int]


def answers(run: Path, items: Sequence[dict[str, Any]], temperature: float) -> Answers:
    """Greedy at temperature 0; kept beside the run, and asked again only of another checkpoint."""
    folder = resolve_model(run)
    file = run / f"heldout-{temperature:g}.json"
    kept = _kept(file)
    if kept.get("checkpoint") == folder.name and kept.get("n") == len(items):
        return Answers(**kept["answers"])
    tokenizer, model = Tokenizer.load(folder), load_model(folder)
    prompts = [
        tokenizer.encode_chat([{"role": "user", "content": i["prompt"]}], add_generation_prompt=True).ids for i in items
    ]
    longest = model.config.max_seq_len - NEW_TOKENS
    prompts = [ids[-longest:] for ids in prompts]
    sampling, seeds = SamplingConfig(max_new_tokens=NEW_TOKENS, temperature=temperature), row_seeds(0, len(items))
    made: dict[int, Any] = {}
    order = sorted(range(len(items)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), 66):
        part = order[start : start + 66]
        found = generate(
            model, [prompts[i] for i in part], sampling, tokenizer=tokenizer, seeds=[seeds[i] for i in part]
        )
        made |= dict(zip(part, found, strict=True))
    rows = [made[i] for i in range(len(items))]
    said = {
        "texts": [row.text for row in rows],
        "lengths": [len(row.ids) for row in rows],
        "ids": [ids + row.ids for ids, row in zip(prompts, rows, strict=True)],
        "n_prompts": [len(ids) for ids in prompts],
    }
    replace_file(file, json.dumps({"checkpoint": folder.name, "n": len(items), "answers": said}))
    return Answers(**said)


def rewards_of(root: Path, items: Sequence[dict[str, Any]], said: Answers) -> list[float]:
    """What the reward model thinks of the answers, in its own standard deviations."""
    tokenizer = Tokenizer.load(resolve_model(root / "sft"))
    judge = Rewards([ModelReward(kind="model", path=str(root / "reward"))], tokenizer, "cpu")
    given = [
        Answer(i["prompt"], text, ids, n, True, i, [])
        for i, text, ids, n in zip(items, said.texts, said.ids, said.n_prompts, strict=True)
    ]
    return judge.score(given).total


# --- the table -------------------------------------------------------------------------------------------------------


def figures(root: Path, items: Sequence[dict[str, Any]], easy: Sequence[str]) -> dict[str, float]:
    """What the issue asks for, by name, of one seed."""
    world = load_world()
    told: dict[str, float] = {}
    there = [stage for stage in CHAT if (root / stage / "DONE").is_file()]
    greedy = {stage: answers(root / stage, items, 0.0) for stage in there}
    oracle = {
        stage: [world.quality(i, t)["total"] for i, t in zip(items, said.texts, strict=True)]
        for stage, said in greedy.items()
    }
    kinds = sorted({i["kind"] for i in items})
    for stage, said in greedy.items():
        right = [world.score(i, t) for i, t in zip(items, said.texts, strict=True)]
        by_kind = {kind: _mean(r for i, r in zip(items, right, strict=True) if i["kind"] == kind) for kind in kinds}
        told |= {f"{stage}: exact, {kind}": 100 * share for kind, share in by_kind.items()}
        told[f"{stage}: exact, easy skills"] = 100 * _mean(by_kind[kind] for kind in easy)
        told[f"{stage}: exact, all"] = 100 * _mean(right)
        told[f"{stage}: oracle's score"] = _mean(oracle[stage])
        found = [world.quality(i, t)["correct"] for i, t in zip(items, said.texts, strict=True)]
        told[f"{stage}: right answer in the text"] = 100 * _mean(found)
        told[f"{stage}: tokens of an answer"] = _mean(said.lengths)
    if "dpo" in there:
        wins = [(b > a) + (a == b) / 2 for a, b in zip(oracle["sft"], oracle["dpo"], strict=True)]
        told["dpo: preferred to sft, ties half"] = 100 * _mean(wins)
    if (root / "reward" / "DONE").is_file():
        told["reward: accuracy on held-out pairs"] = 100 * _last(root / "reward", "valid/pairs/accuracy")
        told["reward: accuracy on held-out rankings"] = 100 * _last(root / "reward", "valid/rankings/accuracy")
    if "ppo" in there:
        told |= _of_ppo(root, items)
    return told


def _of_ppo(root: Path, items: Sequence[dict[str, Any]]) -> dict[str, float]:
    before = RUNS["ppo"][1]
    sampled = {stage: answers(root / stage, items, 1.0) for stage in (before, "ppo")}
    scores = {stage: rewards_of(root, items, said) for stage, said in sampled.items()}
    gain = (_mean(scores["ppo"]) - _mean(scores[before])) / statistics.pstdev(scores[before])
    lengths = {stage: _mean(said.lengths) for stage, said in sampled.items()}
    steps = read_lines(root / "ppo" / "metrics.jsonl")
    explained = [m[EXPLAINED] for m in steps if EXPLAINED in m]
    return {
        "ppo: reward gained, std of the rewards before": gain,
        "ppo: length against before, sampled": 100 * (lengths["ppo"] / lengths[before] - 1),
        "ppo: KL from before, nats an answer": _last(root / "ppo", "valid/kl_sum"),
        "ppo: explained variance, last quarter": _mean(explained[-max(1, len(explained) // 4) :]),
    }


def _mean(values: Any) -> float:
    return statistics.fmean(values)


def _last(run: Path, name: str) -> float:
    """The last value of a metric."""
    for record in reversed(read_lines(run / "metrics.jsonl")):
        if name in record:
            return float(record[name])
    raise SystemExit(f"{run}: no metric {name} in metrics.jsonl")


def goals(told: dict[str, float], kl_target: float) -> dict[str, tuple[str, bool]]:
    """What must be true of the means: the goal in words, and whether it is met."""
    checks: dict[str, tuple[str, Callable[[float], bool]]] = {
        "sft: exact, easy skills": (">= 80", lambda v: v >= 80),
        "reward: accuracy on held-out pairs": (">= 90", lambda v: v >= 90),
        "ppo: reward gained, std of the rewards before": (">= 1", lambda v: v >= 1),
        "ppo: KL from before, nats an answer": (f"<= {kl_target:g}", lambda v: v <= kl_target),
        "ppo: length against before, sampled": ("within 20 %", lambda v: abs(v) <= 20),
        "ppo: explained variance, last quarter": ("> 0.3", lambda v: v > 0.3),
        "dpo: preferred to sft, ties half": (">= 65", lambda v: v >= 65),
    }
    met = {name: (words, holds(told[name])) for name, (words, holds) in checks.items() if name in told}
    for stage, name, least, words in (
        ("ppo", "oracle's score", 0.0, "above before's"),
        ("ppo", "exact, all", -1.0, "not below before"),
        ("grpo", f"exact, {WEAK}", 20.0, "before's + 20"),
    ):
        if f"{stage}: {name}" in told:
            gained = told[f"{stage}: {name}"] - told[f"{RUNS[stage][1]}: {name}"]
            met[f"{stage}: {name}"] = (words, gained > least if least == 0 else gained >= least)
    return met


def show(seeds: Sequence[int], found: Sequence[dict[str, float]], kl_target: float) -> bool:
    """Prints mean and range of every figure; whether all goals are met."""
    names = [name for name in found[0] if all(name in told for told in found)]
    means = {name: _mean(told[name] for told in found) for name in names}
    met = goals(means, kl_target)
    width = max(map(len, names))
    print(f"\nHeld-out questions, mean of {len(seeds)} seed(s) and range; exact match and shares in %:\n")
    print(f"{'':{width}}  {'mean':>8}  {'range':>17}  goal")
    for name in names:
        values = [told[name] for told in found]
        words, holds = met.get(name, ("", True))
        mark = "" if not words else ("ok" if holds else "MISSED")
        print(f"{name:{width}}  {means[name]:8.2f}  {min(values):8.2f} {max(values):8.2f}  {words:16} {mark}".rstrip())
    return all(holds for _, holds in met.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="default: 0,1,2")
    parser.add_argument("--out", default="runs/rlhf", help="runs go to OUT/seed-N/STAGE; default: runs/rlhf")
    parser.add_argument("--stages", default=",".join(STAGES), help="in this order; default: all")
    parser.add_argument(
        "--easy", default=",".join(EASY), help=f"the skills SFT is measured by; default: {','.join(EASY)}"
    )
    parser.add_argument("overrides", nargs="*", metavar="stage.key=value")
    args = parser.parse_args()
    seeds, stages = [int(text) for text in args.seeds.split(",")], args.stages.split(",")
    for text in args.overrides:
        if text.split(".")[0] not in STAGES or "=" not in text:
            print(f"error: {text}: expected stage.key=value, with one of {', '.join(STAGES)}", file=sys.stderr)
            return 2
    items = read_lines(HELDOUT)
    found = []
    for seed in seeds:
        root = Path(args.out) / f"seed-{seed}"
        if code := train(stages, root, seed, args.overrides):
            return code
        found.append(figures(root, items, args.easy.split(",")))
        seconds = _kept(root / "seconds.json")
        print(f"seed {seed}: " + ", ".join(f"{stage} {s:.0f} s" for stage, s in seconds.items()))
        print(f"seed {seed}: {sum(seconds.values()):.0f} s in all")
    target = load_recipe("configs/ppo/demo.yaml", [t[4:] for t in args.overrides if t.startswith("ppo.")]).kl.target
    return 0 if show(seeds, found, target if target is not None else float("inf")) else 1


if __name__ == "__main__":
    sys.exit(main())
