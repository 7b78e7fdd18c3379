"""The engine: rows of unlike lengths beside rows alike, requests that come late, shared beginnings, a draft's gain.

    python scripts/bench/engine.py [--rows 32] [--repeats 3] [--model MODEL --draft DRAFT --prompts FILE]

Random weights of the small shape (6 layers, width 384) for what depends on the shape alone; MODEL and DRAFT, which share
a tokenizer, for drafts, whose gain depends on what they learnt. Some minutes on 4 cores.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

from common import finish, interleaved, introduce, median, table

from llmkit.inference.config import SamplingConfig
from llmkit.inference.engine.config import EngineConfig
from llmkit.inference.engine.engine import Engine
from llmkit.inference.engine.request import Request
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.weights import load_model
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer, TokenizerConfig

RAGGED_GOAL, DRAFT_GOAL, LATE_GOAL = 0.8, 1.2, 3


def timed(engine: Engine, requests: list[Request]) -> tuple[float, dict[int, list[int]]]:
    """New tokens a second, and each request's."""
    found: dict[int, list[int]] = {engine.submit(request): [] for request in requests}
    start = time.perf_counter()
    while engine.busy:
        for event in engine.step():
            assert event.token is not None, event.error
            found[event.request_id].append(event.token)
    return sum(map(len, found.values())) / (time.perf_counter() - start), found


def late_steps(model: GPT, tokenizer: Tokenizer, requests: list[Request], rows: int) -> int:
    """Steps from the arrival of a request, while all others write, to its first token."""
    engine = Engine(model, tokenizer, EngineConfig(max_rows=rows))
    for request in requests[: rows - 1]:
        engine.submit(request)
    for _ in range(8):
        engine.step()
    late = engine.submit(requests[-1])
    return next(n for n in range(1, 1000) if any(event.request_id == late for event in engine.step()))


def batches(rows: int, repeats: int) -> dict[str, Any]:
    tokenizer, rng = Tokenizer.train([], TokenizerConfig(kind="byte")), random.Random(0)
    shape = {"n_layers": 6, "n_heads": 6, "d_model": 384, "max_seq_len": 256, "vocab_size": 8192}
    model = GPT(GPTConfig.model_validate(shape)).eval()
    init_weights(model, 0)

    def request(n_prompt: int, n_new: int, begin: list[int]) -> Request:
        ids = begin + [rng.randrange(5, 250) for _ in range(n_prompt - len(begin))]
        return Request(ids, SamplingConfig(temperature=0.0, max_new_tokens=n_new), 0)

    alike = [request(64, 64, []) for _ in range(3 * rows)]
    unlike = [request(rng.randint(1, 127), rng.randint(1, 127), []) for _ in range(3 * rows)]
    begin = [rng.randrange(5, 250) for _ in range(96)]
    shared = [request(112, 16, begin) for _ in range(3 * rows)]
    counters: dict[str, Any] = {}

    def run(name: str, requests: list[Request], reuse: bool = True) -> float:
        engine = Engine(model, tokenizer, EngineConfig(max_rows=rows, reuse_prefixes=reuse))
        speed, _ = timed(engine, requests)
        counters[name] = engine.counters
        return speed

    speeds = interleaved(
        {
            "alike": lambda: run("alike", alike),
            "unlike": lambda: run("unlike", unlike),
            "shared beginning": lambda: run("shared beginning", shared),
            "shared, computed anew": lambda: run("shared, computed anew", shared, reuse=False),
        },
        repeats,
    )
    rows_of_table = [
        (
            name,
            f"{median(values):.0f}",
            counters[name].steps,
            f"{counters[name].prefix_hit_frac:.2f}",
            counters[name].blocks_kept,
        )
        for name, values in speeds.items()
    ]
    print(table(("requests", "new tokens/s", "steps", "prefix hits", "blocks kept"), rows_of_table))
    late = late_steps(model, tokenizer, [request(100, 60, []) for _ in range(rows)], rows)
    ragged = median(speeds["unlike"]) / median(speeds["alike"])
    reuse = median(speeds["shared beginning"]) / median(speeds["shared, computed anew"])
    print(
        f"unlike / alike {ragged:.2f} (goal {RAGGED_GOAL}); sharing {reuse:.2f}x; "
        f"a late request's first token in step {late} (goal {LATE_GOAL})\n"
    )
    return {"ragged_frac": round(ragged, 3), "sharing_speedup": round(reuse, 2), "late_steps": late}


def drafts(model_path: str, draft_path: str, prompts: Path, repeats: int) -> dict[str, Any]:
    folder = resolve_model(model_path)
    tokenizer = Tokenizer.load(folder)
    model, draft = load_model(folder), load_model(resolve_model(draft_path))
    text = prompts.read_text("utf-8")
    n = model.config.max_seq_len
    starts = [len(text) * i // 8 for i in range(8)]
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=n // 2)
    requests = [Request(tokenizer.encode(text[at : at + 4 * n])[: n // 3], sampling, 0) for at in starts]
    facts: dict[str, Any] = {}
    lines = []
    for rows in (1, 8):
        outputs: dict[str, Any] = {}

        def run(k: int) -> float:
            config = EngineConfig(max_rows=rows, draft_tokens=max(k, 1))  # noqa: B023
            engine = Engine(model, tokenizer, config, draft=draft if k else None)
            speed, outputs[str(k)] = timed(engine, requests)  # noqa: B023
            outputs[f"accepted {k}"] = engine.counters.acceptance_frac  # noqa: B023
            return speed

        speeds = interleaved({str(k): lambda k=k: run(k) for k in (0, 2, 4, 6)}, repeats)
        for k in ("2", "4", "6"):
            gain = median(speeds[k]) / median(speeds["0"])
            same = sum(outputs[k][i] == ids for i, ids in outputs["0"].items())
            lines.append((rows, k, f"{outputs['accepted ' + k]:.2f}", f"{gain:.2f}", f"{same} of {len(requests)}"))
            facts[f"draft_speedup_rows{rows}_k{k}"] = round(gain, 2)
            facts[f"draft_acceptance_rows{rows}_k{k}"] = round(outputs["accepted " + k], 3)
    print(table(("rows", "drafted", "accepted", f"x plain (goal {DRAFT_GOAL})", "same texts"), lines))
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", help="run, checkpoint or Hugging Face folder")
    parser.add_argument("--draft", help="a smaller one")
    parser.add_argument("--prompts", type=Path, help="text from which prompts are cut")
    args = parser.parse_args()
    machine = introduce("engine")
    facts = batches(args.rows, args.repeats)
    if args.model and args.draft and args.prompts:
        facts |= drafts(args.model, args.draft, args.prompts, args.repeats)
    finish("engine", machine=machine, **facts)


if __name__ == "__main__":
    main()
