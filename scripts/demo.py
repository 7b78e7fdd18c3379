"""`make demo`: trains a tokenizer and a GPT on the demo world, shows what it learnt, and fails if it learnt too little.

Run again, it goes on where it stopped, or only shows the result.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from llmkit.cli import main as llmkit
from llmkit.data.prepare import Prepared, prepare
from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import generate
from llmkit.model.weights import load_model
from llmkit.stages import load_recipe
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer
from llmkit.training.log import read_lines

TOKENIZER, PRETRAIN = "configs/tokenizer/demo.yaml", "configs/pretrain/demo.yaml"
LIMIT = 0.6  # of the unigram entropy
FORMS = {"en": "Question: {}\nAnswer:", "zh": "问：{}\n答："}


def unigram_bits_per_byte(data: Prepared, vocab_size: int) -> float:
    """Bits per byte of held-out text when every token is guessed from how often it occurs in the training text."""
    counts = np.ones(vocab_size)  # one more than seen, so that no token is impossible
    for shards in data.train:
        counts += np.bincount(shards.tokens(0, shards.n_tokens), minlength=vocab_size)
    bits = -np.log2(counts / counts.sum())
    held_out = np.concatenate([s.tokens(0, s.n_tokens) for s in data.valid])
    return float(bits[held_out].sum()) / sum(s.n_bytes for s in data.valid)


def answered(run: Path, tokenizer: Tokenizer) -> dict[str, tuple[float, int]]:
    """Share of held-out questions that the model completes exactly as the oracle wants, and their number, by kind."""
    spec = importlib.util.spec_from_file_location("world", Path("data/world.py"))
    assert spec is not None and spec.loader is not None
    world = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(world)
    items = [i for i in read_lines(Path("data/demo/heldout.jsonl")) if len(i["prompt"]) < 160]
    model = load_model(resolve_model(run))
    prompts = [[tokenizer.bos_id or 0, *tokenizer.encode(FORMS[i["lang"]].format(i["prompt"]))] for i in items]
    sampling = SamplingConfig(max_new_tokens=24, temperature=0, stop=("\n",))
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for start in range(0, len(items), 64):
        part = slice(start, start + 64)
        for item, made in zip(items[part], generate(model, prompts[part], sampling, tokenizer=tokenizer), strict=True):
            total[item["kind"]] += 1
            right[item["kind"]] += world.score(item, made.text) == 1.0
    return {kind: (right[kind] / n, n) for kind, n in sorted(total.items())}


def main() -> int:
    """Trains what is missing and prints the table; returns the exit code."""
    started = time.monotonic()
    for recipe in (TOKENIZER, PRETRAIN):
        print(f"\n$ llmkit train {recipe}", flush=True)
        if code := llmkit(["train", recipe]):
            return code
    recipe = load_recipe(PRETRAIN)
    run = Path(recipe.out)
    tokenizer = Tokenizer.load(recipe.tokenizer.path)
    data = prepare(recipe.data, tokenizer, progress=False)
    steps = read_lines(run / "metrics.jsonl")
    valid = next(r for r in reversed(steps) if "valid/bits_per_byte" in r)
    unigram, reached = unigram_bits_per_byte(data, tokenizer.vocab_size), valid["valid/bits_per_byte"]
    speed = np.median([r["tokens_per_s"] for r in read_lines(run / "timing.jsonl") if "tokens_per_s" in r])
    print(f"\nHeld-out text after {valid['step']} steps ({speed:,.0f} tokens/s):")
    for name, value in {
        "unigram": f"{unigram:.3f} bits per byte",
        "this model": f"{reached:.3f} bits per byte, {reached / unigram:.0%} of the unigram (must be below {LIMIT:.0%})",
        "perplexity": f"{math.exp(valid['valid/loss']):.2f} per token",
    }.items():
        print(f"  {name:12s} {value}")
    print("\nHeld-out questions completed exactly (a base model, greedy, nothing but `Question: ... Answer:`):")
    for kind, (share, n) in answered(run, tokenizer).items():
        print(f"  {kind:12s} {100 * share:5.1f} %  of {n}")
    print(f"\nplot         {run / 'plots' / 'loss.png'}")
    print(f"try          .venv/bin/llmkit generate {run} --prompt $'Question: Where does Mira live?\\nAnswer:'")
    print(f"took         {time.monotonic() - started:.0f} s")
    if not reached < LIMIT * unigram:
        print(
            f"error: {reached:.3f} is not below {LIMIT:.0%} of {unigram:.3f}: the model learnt too little",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
