"""Writing text: new tokens a second, greedy, 128 after a prompt of 128, against transformers' `generate`.

    python scripts/bench/generate.py [--shapes small medium] [--batches 1 8 32] [--repeats 3]

Random weights, the same for both; every run is a fresh process, all with the same allocator; llmkit's packing of the
weights is part of its time. Goals are for each in its faster precision. About 20 minutes on 4 cores.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from common import allocator_for_all, finish, in_fresh_process, interleaved, introduce, median, spread, table

SHAPES: dict[str, dict[str, int]] = {
    "small": {"n_layers": 6, "n_heads": 6, "d_model": 384, "d_ff": 1024, "max_seq_len": 256, "vocab_size": 8192},
    "medium": {"n_layers": 12, "n_heads": 12, "d_model": 768, "d_ff": 2048, "max_seq_len": 512, "vocab_size": 32000},
}
GOALS = {"small": {1: 2.5, 8: 3.0, 32: 2.0}, "medium": {1: 2.5, 8: 1.8, 32: 1.6}}
N_PROMPT, N_WARM = 128, 8
PEER = "transformers"


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One run: seconds, and the tokens that were written."""
    import torch

    from llmkit.model.config import GPTConfig
    from llmkit.model.gpt import GPT, init_weights

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["dtype"]]
    model = GPT(GPTConfig.model_validate(SHAPES[job["shape"]])).eval()
    init_weights(model, 0)
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 250) for _ in range(N_PROMPT)] for _ in range(job["batch"])]
    write = {"llmkit": ours, PEER: theirs}[job["who"]](model, dtype, job["tokenizer"])
    write(prompts, N_WARM)
    clock = time.process_time if job["cpu_time"] else time.perf_counter
    start = clock()
    written = write(prompts, job["new"])
    return {"seconds": clock() - start, "new_tokens": sum(map(len, written)), "ids": written}


def ours(model: Any, dtype: Any, folder: str) -> Any:
    from llmkit.inference.config import SamplingConfig
    from llmkit.inference.generate import generate
    from llmkit.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(Path(folder))
    model.to(dtype)

    def write(prompts: list[list[int]], n: int) -> list[list[int]]:
        sampling = SamplingConfig(temperature=0.0, max_new_tokens=n)
        return [g.ids for g in generate(model, prompts, sampling, tokenizer=tokenizer)]

    return write


def theirs(model: Any, dtype: Any, folder: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmkit.model.hf import config_to_hf

    facts = config_to_hf(model.config, dtype, {}, {})
    peer = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in facts.items() if k not in ("dtype", "torch_dtype")})).eval()
    odd = peer.load_state_dict(model.state_dict(), strict=False)
    assert odd.missing_keys in ([], ["lm_head.weight"]) and not odd.unexpected_keys, odd
    peer.to(dtype).tie_weights()
    peer.generation_config.eos_token_id = None

    def write(prompts: list[list[int]], n: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        out = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=0)
        return out[:, N_PROMPT:].tolist()

    return write


def tokenizer_of(vocab_size: int, folder: Path) -> str:
    """A folder with a tokenizer of just that many tokens, from words that nobody uses."""
    from llmkit.tokenizer import Tokenizer, TokenizerConfig

    rng = random.Random(0)
    words = [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9))) + " " for _ in range(2 * vocab_size)
    ]
    texts = [*words, *words]  # what occurs once is never merged
    tokenizer = Tokenizer.train(texts, TokenizerConfig(kind="bpe", vocab_size=vocab_size))
    assert tokenizer.vocab_size == vocab_size, tokenizer.vocab_size
    folder.mkdir()
    tokenizer.save(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, choices=(1, 8, 32), default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new", type=int, default=128, help="new tokens of a text; default: 128")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds: for one thread of a busy machine")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(json.loads(args.worker))))
        return
    machine = introduce("generate")
    allocator, environment = allocator_for_all()
    print(f"allocator of all: {allocator}; {PEER} {_version()}, its defaults")
    ratios: dict[str, float] = {}
    lines: list[tuple[object, ...]] = []
    scratch = tempfile.TemporaryDirectory()
    for shape in args.shapes:
        tokenizer = tokenizer_of(SHAPES[shape]["vocab_size"], Path(scratch.name) / shape)
        for batch in args.batches:
            best = {"llmkit": 0.0, PEER: 0.0}
            told = {"shape": shape, "batch": batch, "tokenizer": tokenizer, "new": args.new, "cpu_time": args.cpu_time}
            jobs = [{"who": who, "dtype": dtype, **told} for dtype in ("fp32", "bf16") for who in best]
            runs = interleaved(
                {
                    json.dumps(job): lambda job=job: in_fresh_process(Path(__file__), job, env=environment)
                    for job in jobs
                },
                args.repeats,
            )
            for dtype in ("fp32", "bf16"):
                done = {j["who"]: runs[json.dumps(j)] for j in jobs if j["dtype"] == dtype}
                speeds = {w: [r["new_tokens"] / r["seconds"] for r in rs if r is not None] for w, rs in done.items()}
                if not all(speeds.values()):
                    raise SystemExit(f"{shape}, batch {batch}, {dtype}: a contestant failed, see above")
                a, b = (next(r["ids"] for r in done[who] if r is not None) for who in best)
                same = sum(x == y for x, y in zip(a, b, strict=True))
                for who, values in speeds.items():
                    best[who] = max(best[who], median(values))
                    lines.append(
                        (f"{shape}, batch {batch}", dtype, who, f"{median(values):.0f}", spread(values, 0), same)
                    )
            ratio = best["llmkit"] / best[PEER]
            ratios[f"{shape}_batch{batch}"] = round(ratio, 2)
            goal = GOALS[shape][batch]
            lines.append((f"{shape}, batch {batch}", "faster", f"{ratio:.2f}x (goal {goal})", "", "", ""))
    print(table(("", "precision", "who", "new tokens/s", "spread", "equal texts"), lines))
    finish("generate", machine=machine, ratios=ratios)


def _version() -> str:
    from importlib.metadata import version

    return version(PEER)


if __name__ == "__main__":
    main()
