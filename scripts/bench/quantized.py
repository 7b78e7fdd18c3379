"""Weights in few bits against whole ones: tokens a second of one prompt read and of one text written.

    python scripts/bench/quantized.py [--repeats 5] [--prompt-tokens 512] [--new-tokens 64] [--small]

The medium shape (12 layers, width 768, vocabulary 32,000) with random weights, of which speed doesn't depend; the forms
take turns. --small takes seconds and proves nothing but that it runs. What a text loses is `llmkit bench`'s to tell.
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch
from common import finish, introduce, median, spread, table

from llmkit.export.calibration import quantize_model
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.quantization import Quantization
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.tools.measures import Timed, speeds

FORMS = {
    "fp32": (None, torch.float32),
    "bf16": (None, torch.bfloat16),
    "int8, fp32": (Quantization(8), torch.float32),
    "int8, bf16": (Quantization(8), torch.bfloat16),
    "int8 dynamic, fp32": (Quantization(8, dynamic=True), torch.float32),
    "int8 dynamic, bf16": (Quantization(8, dynamic=True), torch.bfloat16),
    "int4, bf16": (Quantization(4), torch.bfloat16),
}
GOAL = 1.0  # of int8 over bf16, in writing


def models(config: GPTConfig, tokenizer: Tokenizer) -> dict[str, Timed]:
    """The same weights in every form."""
    original = GPT(config)
    init_weights(original, 0)
    found = {}
    for name, (quantization, dtype) in FORMS.items():
        print(f"made: {name}", file=sys.stderr, flush=True)
        model = copy.deepcopy(original).eval().requires_grad_(False)
        if quantization is not None:
            quantize_model(model, quantization)
        found[name] = Timed(model.to(dtype), tokenizer)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--small", action="store_true", help="2 layers of width 64")
    args = parser.parse_args()
    facts = introduce("quantized")
    shape = {"n_layers": 12, "n_heads": 12, "d_model": 768, "vocab_size": 32000}
    if args.small:
        shape = {"n_layers": 2, "n_heads": 2, "d_model": 64, "vocab_size": 512}
    config = GPTConfig.model_validate({**shape, "max_seq_len": args.prompt_tokens + args.new_tokens})
    forms = models(config, Tokenizer.train([], TokenizerConfig(kind="byte")))
    found = dict(
        zip(forms, speeds(list(forms.values()), args.prompt_tokens, args.new_tokens, args.repeats), strict=True)
    )
    base = found["bf16"]
    rows = [
        (name, f"{median(s.prompt):.0f}", spread(s.prompt, 0), f"{median(s.prompt) / median(base.prompt):.2f}",
         f"{median(s.generation):.1f}", spread(s.generation, 1), f"{median(s.generation) / median(base.generation):.2f}")
        for name, s in found.items()
    ]  # fmt: skip
    print(table(("weights, computed in", "read/s", "range", "of bf16", "written/s", "range", "of bf16"), rows))
    over = {
        name: max(median(found[f"{name}, {dtype}"].generation) for dtype in ("fp32", "bf16")) / median(base.generation)
        for name in ("int8", "int8 dynamic")
    }
    told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in over.items())
    print(f"times as fast as bf16 in writing, each in its faster dtype: {told} (goal {GOAL})")
    finish(
        "quantized",
        machine=facts,
        read={name: round(median(s.prompt), 1) for name, s in found.items()},
        written={name: round(median(s.generation), 2) for name, s in found.items()},
        over_bf16={name: round(ratio, 3) for name, ratio in over.items()},
    )


if __name__ == "__main__":
    main()
