"""A mixture of experts against a plain MLP of the same active width: tokens a second, forward and backward.

    python scripts/bench/moe.py [--passes 9] [--small]

4096 tokens, one thread. About 2 minutes; --small takes seconds and proves nothing but that it runs.

A fresh process that keeps freed memory for each shape and dtype, in which the contestants take turns pass by pass. What
is counted is the process's own time in its fastest pass, so that other work on the machine disturbs little. `slices` is
what is left of the mixture without a router and without moving states: every expert on an even share of states that lie
in order already. So dense to slices is what many narrow products cost against few wide ones, slices to experts what
routing costs. `transformers` is its block for Qwen3-MoE in its usual setting, where it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import KEEP_MEMORY, finish, in_fresh_process, introduce, median, table


@dataclass(frozen=True)
class Shape:
    """Sizes of one comparison."""

    tokens: int
    d_model: int
    n: int
    n_active: int
    d_ff: int

    def __str__(self) -> str:
        return f"{self.n_active} of {self.n} experts of {self.d_ff}, width {self.d_model}"


SHAPES = [Shape(4096, 384, 8, 2, 512), Shape(4096, 384, 64, 8, 128), Shape(4096, 768, 16, 2, 1024)]


def contestant(who: str, shape: Shape, dtype: Any) -> Callable[[], Any]:
    """One forward and backward pass over states [1, tokens, d_model]."""
    import torch

    from llmkit.model.config import ExpertsConfig, GPTConfig
    from llmkit.model.gpt import MLP
    from llmkit.model.moe import MoE

    torch.manual_seed(0)
    experts = ExpertsConfig(n=shape.n, n_active=shape.n_active, d_ff=shape.d_ff)
    config = GPTConfig(d_model=shape.d_model, n_heads=1, qk_norm=True, experts=experts)
    module: Any
    if who == "dense":
        module = MLP(config, experts.active_width)
    elif who == "transformers":
        module = block_of_transformers(shape)
    else:
        module = MoE(experts, shape.d_model, lambda width: MLP(config, width))
    module = module.to(dtype).train()
    n_rows = shape.tokens * (shape.n_active if who == "slices" else 1)
    x, grad = (torch.empty(1, n_rows, shape.d_model, dtype=dtype).normal_() for _ in "ab")
    x.requires_grad_()

    def run() -> None:
        x.grad = None
        module.zero_grad()
        if who == "slices":
            pieces = x[0].chunk(shape.n)
            out = torch.cat([expert(piece) for expert, piece in zip(module.experts, pieces, strict=True)])[None]
        else:
            out = module(x)
            out = out[0] if who == "experts" else out
        out.backward(grad)

    return run


def block_of_transformers(shape: Shape) -> Any:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=shape.d_model, num_experts=shape.n, num_experts_per_tok=shape.n_active, norm_topk_prob=True,
        moe_intermediate_size=shape.d_ff, num_hidden_layers=1, vocab_size=8, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    block = Qwen3MoeForCausalLM(config).model.layers[0].mlp
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(0.0, 0.02)
    return block


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each pass of each contestant."""
    import torch

    torch.set_num_threads(1)
    shape, dtype = Shape(**job["shape"]), getattr(torch, job["dtype"])
    runs = {who: contestant(who, shape, dtype) for who in job["whos"]}
    seconds: dict[str, list[float]] = {who: [] for who in runs}
    for _ in range(1 + job["passes"]):
        for who, run in runs.items():
            start = time.process_time()
            run()
            seconds[who].append(time.process_time() - start)
    return {who: passes[1:] for who, passes in seconds.items()}


def compare(shape: Shape, dtype: str, whos: list[str], passes: int) -> dict[str, Any]:
    """Runs and prints one shape in one dtype; returns its part of the last line."""
    job = {"whos": whos, "shape": asdict(shape), "dtype": dtype, "passes": passes}
    seconds = in_fresh_process(Path(__file__), job, env={**KEEP_MEMORY, "OMP_NUM_THREADS": "1"})
    if seconds is None:
        raise SystemExit("that did not run: see above")
    speed = {who: shape.tokens / min(seconds[who]) for who in whos}
    rows = [
        (
            who, f"{speed[who]:.0f}", f"{1e3 * min(seconds[who]):.0f}", f"{1e3 * median(seconds[who]):.0f}",
            f"{speed[who] / speed['dense']:.2f}",
        )
        for who in whos
    ]  # fmt: skip
    print(f"\n{shape}, {dtype}, {passes} passes over {shape.tokens} tokens\n")
    print(table(("", "tokens/s", "ms, fastest", "median", "x dense"), rows), flush=True)
    return {
        "tokens_per_s": {who: round(s) for who, s in speed.items()},
        "of_dense": {who: round(s / speed["dense"], 3) for who, s in speed.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--small", action="store_true", help="64 tokens, two passes")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    shapes, passes = ([Shape(64, 32, 8, 2, 16)], 2) if args.small else (SHAPES, args.passes)
    whos = ["dense", "slices", "experts", *(["transformers"] if find_spec("transformers") else [])]
    facts = introduce("moe")
    results = {
        f"{shape}, {dtype}": compare(shape, dtype, whos, passes)
        for shape in shapes
        for dtype in ("float32", "bfloat16")
    }
    finish("moe", machine=facts, results=results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print("\n" + json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        main()
