"""Which of two models answers better, going by the demo world's oracle: greedy answers to the held-out prompts.

    python scripts/oracle.py runs/demo/sft runs/demo/dpo [--limit N]

Prints how often the oracle's total prefers the second model's answer (ties count half), and for both the mean total, its
parts, exact match and the answers' length.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkit.data.turns import prompt_ids
from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import generate
from llmkit.model.weights import load_model
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer

DEMO = Path(__file__).parents[1] / "data"
PARTS = ("total", "safe", "correct", "polite", "concise")


def answers(model: str, items: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    """Each item's greedy answer and its length in tokens; prompts of one length go through the model together."""
    folder = resolve_model(model)
    net, tokenizer = load_model(folder), Tokenizer.load(folder)
    asked = [prompt_ids(tokenizer, item["prompt"]) for item in items]
    order = sorted(range(len(items)), key=lambda i: len(asked[i]))
    found: list[tuple[str, int]] = [("", 0)] * len(items)
    sampling = SamplingConfig(max_new_tokens=80, temperature=0.0)
    for first in range(0, len(order), 64):
        part = order[first : first + 64]
        for i, made in zip(part, generate(net, [asked[i] for i in part], sampling, tokenizer=tokenizer), strict=True):
            found[i] = (made.text, len(made.ids))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs=2, metavar="MODEL", help="a run, a checkpoint or a Hugging Face folder")
    parser.add_argument("--limit", type=int, help="only the first so many prompts")
    args = parser.parse_args()
    sys.path.insert(0, str(DEMO))
    import world

    lines = (DEMO / "demo" / "heldout.jsonl").read_text("utf-8").splitlines()[: args.limit]
    items = [json.loads(line) for line in lines]
    totals, told = [], {}
    for model in args.models:
        texts = answers(model, items)
        judged = [world.quality(item, text) for item, (text, _) in zip(items, texts, strict=True)]
        totals.append([j["total"] for j in judged])
        told[model] = {name: sum(float(j[name]) for j in judged) / len(items) for name in PARTS}
        told[model]["exact"] = sum(world.score(i, t) for i, (t, _) in zip(items, texts, strict=True)) / len(items)
        told[model]["tokens"] = sum(n for _, n in texts) / len(items)
    wins = sum((b > a) + (a == b) / 2 for a, b in zip(*totals, strict=True)) / len(items)
    for model, numbers in told.items():
        print(f"{model}: " + "  ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
    print(f"the oracle prefers the second on {100 * wins:.1f} % of {len(items)} prompts")
    print(json.dumps({"wins": round(wins, 4), **{m: {k: round(v, 4) for k, v in n.items()} for m, n in told.items()}}))


if __name__ == "__main__":
    main()
