"""Pretraining, tokens a second: llmkit against the Hugging Face Trainer, a plain transformers loop and litgpt.

    python scripts/bench/pretrain.py [--mode shipped|same|both] [--shape small medium] [--dtype bf16|f32]
        [--steps N] [--repeats 3] [--check-loss 200] [--text FILE] [--profile FILE]

shipped: each tool as its user gets it. same: everybody compiled, with the fused optimizer and an allocator that keeps
memory. About 20 minutes a mode with both shapes on 4 cores, 5 of them for `small`; --dtype f32 takes about twice as
long at `medium`. Losses are compared after the timed steps; --check-loss 200 trains everybody once more for so many,
which takes 15 minutes at `small` and hours at `medium`.

Each run is a fresh process, A B C A B C. nanoGPT and minimind are not on PyPI and so not here. litgpt pins an older
huggingface_hub than transformers 5 needs: where it can't be imported it gets a venv of its own in the user's cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from common import allocator_for_all, finish, in_fresh_process, interleaved, introduce, median, spread, table

WORKER = Path(__file__).with_name("trainers.py")
LITGPT = "0.5.13"
WARM_UP = 2  # steps that are not timed; the first one compiles
TOLERANCE = 0.005  # how far from the f32 run a loss may be


@dataclass(frozen=True)
class Shape:
    model: dict[str, Any]
    batch: int
    steps: int
    """Timed steps of one run."""
    goals: dict[str, float]
    """Least ratio of ours to others, by mode and other."""


def _sizes(n_layers: int, width: int, heads: int, vocab: int, length: int) -> dict[str, Any]:
    return {
        "n_layers": n_layers, "n_heads": heads, "d_model": width, "d_ff": -(-8 * width // 192) * 64,
        "vocab_size": vocab, "max_seq_len": length,
    }  # fmt: skip


SHAPES = {
    "tiny": Shape(_sizes(2, 64, 2, 512, 64), 4, 4, {}),
    "small": Shape(
        _sizes(6, 384, 6, 8192, 256), 16, 8, {"shipped/hf_trainer": 2.2, "shipped/best": 1.5, "same/best": 1.15}
    ),
    "medium": Shape(
        _sizes(12, 768, 12, 32000, 512), 8, 3, {"shipped/hf_trainer": 1.6, "shipped/best": 1.4, "same/best": 1.15}
    ),
}
F32_GOAL, MFU_GOAL = 0.95, 0.40


def litgpt_python() -> str:
    """An interpreter that has litgpt, with the torch of this one."""
    if importlib.util.find_spec("litgpt"):
        return sys.executable
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llmkit-bench" / "litgpt"
    python = cache / "bin" / "python"
    if not (cache / "ready").exists():
        print(f"installing litgpt {LITGPT} into {cache}", file=sys.stderr, flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        pins = cache / "constraints.txt"
        pins.write_text(f"torch=={version('torch').split('+')[0]}\nnumpy=={version('numpy')}\n")
        subprocess.run([sys.executable, "-m", "venv", str(cache)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(pins)]
        subprocess.run([*pip, f"litgpt=={LITGPT}"], check=True)
        (cache / "ready").touch()
    return str(python)


def write_inputs(folder: Path, shape: Shape, steps: int, text: str | None) -> None:
    """tokens.npy, enough for every step and the held-out rows, and init.safetensors, the weights all start from."""
    from safetensors.torch import save_file
    from trainers import EVAL_STEPS

    from llmkit.model.config import GPTConfig
    from llmkit.model.gpt import GPT, init_weights
    from llmkit.tokenizer import Tokenizer, TokenizerConfig

    vocab = shape.model["vocab_size"]
    n = (steps + EVAL_STEPS) * shape.batch * shape.model["max_seq_len"] + 1
    if text is None:
        tokens = markov(n, vocab)
    else:
        content = Path(text).read_text("utf-8")
        tokenizer = Tokenizer.train([content], TokenizerConfig(vocab_size=vocab))
        tokens = np.resize(np.asarray(tokenizer.encode(content)), n)
    np.save(folder / "tokens.npy", tokens.astype(np.int32))
    model = GPT(GPTConfig(**shape.model))
    init_weights(model, 0)
    save_file(dict(model.named_parameters()), folder / "init.safetensors")


def markov(n: int, vocab: int) -> np.ndarray:
    """A source with something to learn: token frequencies of Zipf's law, and half of all tokens one of four usual
    successors of the token before."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, vocab + 1)
    drawn = rng.choice(vocab, n, p=share / share.sum())
    successors = rng.choice(vocab, (vocab, 4), p=share / share.sum()).tolist()
    follows, which, tokens = (rng.random(n) < 0.5).tolist(), rng.integers(0, 4, n).tolist(), drawn.tolist()
    for i in range(1, n):
        if follows[i]:
            tokens[i] = successors[tokens[i - 1]][which[i]]
    return np.asarray(tokens)


def contestants(dtype: str, mode: str, with_litgpt: bool) -> list[str]:
    names = ["ours", "hf_trainer", "hf_plain", *(["hf_plain_bf16"] if mode == "same" and dtype == "bf16" else [])]
    if with_litgpt:
        names += ["litgpt_mixed", *(["litgpt_true"] if dtype == "bf16" else [])]
    return names


def compare(name: str, mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs one shape in one mode, prints its table and returns its part of the last line."""
    from llmkit.model.config import GPTConfig
    from llmkit.plan import flops_per_token

    shape = SHAPES[name]
    length, per_step = shape.model["max_seq_len"], shape.batch * shape.model["max_seq_len"]
    timed_steps = args.steps or shape.steps
    allocator, env = allocator_for_all() if mode == "same" else ("each tool's own", {})
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        write_inputs(folder, shape, max(WARM_UP + timed_steps, args.check_loss), args.text)
        # Compiled code is kept between repeats, but never beyond this bench.
        env = {**env, "CUDA_VISIBLE_DEVICES": "", "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}

        def run(who: str, dtype: str, steps: int, same: bool, profile: str | None = None) -> dict[str, Any] | None:
            job = {
                "who": who, "model": shape.model, "batch": shape.batch, "folder": folder_name, "steps": steps,
                "dtype": dtype, "same_tricks": same, "profile": profile,
            }  # fmt: skip
            python = args.litgpt_python if who.startswith("litgpt") else sys.executable
            return in_fresh_process(WORKER, job, python, env)

        same, names = mode == "same", contestants(args.dtype, mode, args.litgpt_python is not None)
        runs = interleaved(
            {who: partial(run, who, args.dtype, WARM_UP + timed_steps, same) for who in [*names, "ceiling"]},
            args.repeats,
        )
        results = {who: [r for r in rs if r] for who, rs in runs.items()}
        names = [who for who in names if results[who]]
        if "ours" not in names or not results["ceiling"]:
            raise SystemExit("ours did not run: see above")
        ceiling = max(r["flops"] for r in results["ceiling"])
        loss_steps = args.check_loss or WARM_UP + timed_steps
        losses = {who: results[who][0]["loss"] for who in names}
        if args.check_loss:
            checks = interleaved({who: partial(run, who, args.dtype, args.check_loss, same) for who in names}, 1)
            losses = {who: r[0]["loss"] if r[0] else float("nan") for who, r in checks.items()}
        reference = run("hf_plain", "f32", loss_steps, False)
        if args.profile:
            run("ours", args.dtype, WARM_UP, same, f"{args.profile}.{name}.{mode}.txt")

    assert reference is not None, "the f32 run failed: see above"
    speeds = {who: [per_step / median(r["seconds"][WARM_UP:]) for r in results[who]] for who in names}
    speed = {who: median(s) for who, s in speeds.items()}
    flops = flops_per_token(GPTConfig(**shape.model), length)
    mfu = {who: speed[who] * flops / ceiling for who in names}
    off = {who: losses[who] / reference["loss"] - 1 for who in names}
    counts = {who: abs(off[who]) <= TOLERANCE for who in names}

    print(
        f"\n{name}, {args.dtype}, {mode}: {shape.model}, batch {shape.batch}; {args.repeats} runs of {timed_steps} "
        f"timed steps; allocator: {allocator}; matrix product {ceiling / 1e9:.0f} GFLOP/s\n"
        f"loss on held-out rows after {loss_steps} steps, against {reference['loss']:.4f} of a plain f32 run\n"
    )
    rows = []
    for who in names:
        first = results[who][0]
        figures = (
            f"{speed[who]:.0f}",
            spread(speeds[who], 0),
            f"{100 * mfu[who]:.1f}",
            f"{speed['ours'] / speed[who]:.2f}",
        )
        start = f"{first['seconds'][0]:.1f}"
        loss = (f"{losses[who]:.4f}", f"{100 * off[who]:+.2f}" + (" " if counts[who] else "!"))
        rows.append((who, *figures, start, first["n_params"], *loss, first["setting"]))
    header = ("", "tokens/s", "min-max", "MFU %", "ours is x", "first step s", "parameters", "loss", "off %", "setting")
    print(table(header, rows), flush=True)
    return verdict(shape, mode, args.dtype, speed, mfu, counts) | {
        "tokens_per_s": {who: round(s) for who, s in speed.items()},
        "mfu": {who: round(m, 3) for who, m in mfu.items()},
        "loss_off_pct": {who: round(100 * x, 3) for who, x in off.items()},
        "loss_steps": loss_steps,
        "gflops_ceiling": round(ceiling / 1e9),
    }


def verdict(
    shape: Shape, mode: str, dtype: str, speed: dict[str, float], mfu: dict[str, float], counts: dict[str, bool]
) -> dict[str, Any]:
    """Ratios to the peers whose loss holds, and which goals are met."""
    peers = {who: s for who, s in speed.items() if who != "ours" and counts[who]}
    ratios = {who: round(speed["ours"] / s, 3) for who, s in peers.items()}
    best = max(peers, key=lambda who: peers[who], default=None)
    goals: dict[str, bool] = {"loss": counts["ours"]}
    if best is not None and dtype == "f32" and shape.goals:
        goals[f"best >= {F32_GOAL}"] = ratios[best] >= F32_GOAL
    elif best is not None:
        for key, least in shape.goals.items():
            of_mode, other = key.split("/")
            other = best if other == "best" else other
            if of_mode == mode and other in ratios:
                goals[f"{key} >= {least}"] = ratios[other] >= least
    if shape.goals and dtype == "bf16":
        goals[f"MFU >= {MFU_GOAL}"] = mfu["ours"] >= MFU_GOAL
    return {"ratios": ratios, "best_peer": best, "goals": goals}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("shipped", "same", "both"), default="shipped")
    parser.add_argument("--shape", nargs="+", choices=tuple(SHAPES), default=["small", "medium"])
    parser.add_argument("--dtype", choices=("bf16", "f32"), default="bf16")
    parser.add_argument("--steps", type=int, help="timed steps of a run (default: the shape's own)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--check-loss", type=int, default=0, metavar="N", help="compares losses after N steps of runs apart"
    )
    parser.add_argument("--text", help="a file to learn instead of random tokens")
    parser.add_argument("--profile", help="writes FILE.<shape>.<mode>.txt: where the time of ours goes")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--no-litgpt", action="store_true")
    args = parser.parse_args()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    args.litgpt_python = None if args.no_litgpt else litgpt_python()
    facts = introduce("pretrain")
    peers = f"transformers {version('transformers')}, accelerate {version('accelerate')}"
    print(
        f"peers: {peers}" + ("" if args.no_litgpt else f", litgpt {LITGPT}") + "; nanoGPT and minimind are not on PyPI"
    )
    modes = ("shipped", "same") if args.mode == "both" else (args.mode,)
    results = {f"{name}/{mode}": compare(name, mode, args) for name in args.shape for mode in modes}
    missed = [f"{key}: {goal}" for key, r in results.items() for goal, met in r["goals"].items() if not met]
    print("\n" + ("\n".join(f"missed: {goal}" for goal in missed) or "every goal is met"))
    finish("pretrain", dtype=args.dtype, machine=facts, results=results, all_met=not missed)


if __name__ == "__main__":
    main()
