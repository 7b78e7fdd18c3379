"""`make demo`: a model's whole life, from text to a quantised student, and a table of what came of it.

Runs configs/demo/pipeline.yaml, whose nodes are stages and commands. Stopped or killed, it goes on where it was; run again, it
only shows the table. Arguments are those of `llmkit run`: `scripts/demo.py --dry-run`, `scripts/demo.py ppo.steps=16`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.cli import main as llmkit
from llmkit.data.prepare import Prepared, prepare
from llmkit.stages import load_recipe
from llmkit.tokenizer import Tokenizer
from llmkit.tools.comparison import markdown
from llmkit.training.log import read_lines

PIPELINE, OUT = "configs/demo/pipeline.yaml", Path("runs/demo")
LIMIT = 0.6  # of the unigram entropy


def unigram_bits_per_byte(data: Prepared, vocab_size: int) -> float:
    """Bits per byte of held-out text when every token is guessed from how often it occurs in the training text."""
    counts = np.ones(vocab_size)  # one more than seen, so that no token is impossible
    for shards in data.train:
        counts += np.bincount(shards.tokens(0, shards.n_tokens), minlength=vocab_size)
    bits = -np.log2(counts / counts.sum())
    held_out = np.concatenate([s.tokens(0, s.n_tokens) for s in data.valid])
    return float(bits[held_out].sum()) / sum(s.n_bytes for s in data.valid)


def last(run: Path, name: str) -> float:
    """The last value of a metric of a run."""
    return float(next(r[name] for r in reversed(read_lines(run / "metrics.jsonl")) if name in r))


def table(models: list[dict[str, Any]]) -> str:
    """What `llmkit compare` found of all models, a model a column."""
    rows = {
        "exact answers, %": lambda m: f"{100 * m['scores']['exact']['mean']:.1f}",
        "perplexity of held-out answers": lambda m: f"{m['perplexity']:.2f}",
        "parameters, M": lambda m: f"{m['parameters'] / 1e6:.2f}",
        "size, MB": lambda m: f"{m['bytes'] / 1e6:.2f}",
        "prompts read, tokens/s": lambda m: f"{np.median(m['speed']['prompt']):,.0f}",
        "answers written, tokens/s": lambda m: f"{np.median(m['speed']['generation']):,.0f}",
    }
    head = ["", *(m["name"] for m in models)]
    return markdown([head, *([name, *map(cell, models)] for name, cell in rows.items())], [])


def main() -> int:
    """Runs what is missing and prints the table; returns the exit code."""
    started = time.monotonic()
    if (code := llmkit(["run", PIPELINE, *sys.argv[1:]])) or "--dry-run" in sys.argv:
        return code
    recipe = load_recipe(str(OUT / "pretrain" / "recipe.yaml"))
    tokenizer = Tokenizer.load(OUT / "tokenizer")
    unigram = unigram_bits_per_byte(prepare(recipe.data, tokenizer, progress=False), tokenizer.vocab_size)
    reached = last(OUT / "pretrain", "valid/bits_per_byte")
    found = json.loads((OUT / "compare" / "compare.json").read_bytes())
    print(f"\nHeld-out questions and answers ({found['questions']['path']}, {found['held_out']['path']}):\n")
    print(f"{table(found['models']).rstrip()}\n")
    told = {
        "base model": f"{reached:.3f} bits per byte of held-out text, {reached / unigram:.0%} of the unigram's {unigram:.3f} "
        f"(must be below {LIMIT:.0%}); perplexity {math.exp(last(OUT / 'pretrain', 'valid/loss')):.2f} per token",
        "reward model": f"{100 * last(OUT / 'reward', 'valid/pairs/accuracy'):.1f} % of held-out pairs in the right order",
        "report": f"{OUT / 'report' / 'report.html'}: curves, answers side by side, rollouts, lineage",
        "try": f".venv/bin/llmkit chat {OUT / 'distill'}   or   .venv/bin/llmkit lineage {OUT / 'int8'}",
        "took": f"{time.monotonic() - started:.0f} s",
    }
    for name, text in told.items():
        print(f"{name:13s} {text}")
    if not reached < LIMIT * unigram:
        print(
            f"error: {reached:.3f} is not below {LIMIT:.0%} of {unigram:.3f}: the base learnt too little",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
