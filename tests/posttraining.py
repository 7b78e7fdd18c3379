"""Tiny recipes of the stages after pretraining, for the tests of what they all promise."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from llmkit.model.config import GPTConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT, init_weights
from llmkit.storage import sha256_of
from llmkit.tokenizer import Tokenizer, TokenizerConfig

STAGES = ("sft", "reward", "dpo", "ppo", "grpo", "distill")
ONLINE = ("ppo", "grpo")
STEPS = 16
UPDATES = 4  # of a rollout: 2 minibatches, 2 epochs

_SECTIONS: dict[str, dict[str, Any]] = {
    "sft": {"batch": {"examples_per_step": 6, "micro_tokens": 128}},
    "reward": {"objective": "rank", "batch": {"examples_per_step": 6, "micro_tokens": 128}},
    "dpo": {"batch": {"examples_per_step": 6, "micro_tokens": 128}},
    "ppo": {
        "rollout": {"prompts_per_step": 8},
        "kl": {"coef": 0.1, "target": 3.0, "horizon": 100},
        "missing_eos": -0.1,
    },
    "grpo": {"rollout": {"prompts_per_step": 3, "samples_per_prompt": 4}},
    "distill": {
        "batch": {"examples_per_step": 6, "micro_tokens": 128},
        "losses": [{"kind": "soft"}, {"kind": "hidden"}, {"kind": "relation", "of": ["values", "keys"]}],
        "temperature": 1.5,
        "on_policy_frac": 0.5,
        "on_policy": {"max_new_tokens": 12},
        "term_norms_every": 5,
    },
}


def _word(pick: random.Random, n: int) -> str:
    return "".join(pick.choices("abcdefgh ", k=n)).strip() or "a"


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def tiny_world(folder: Path, **shape: Any) -> Path:
    """A base model of 10 k weights, a teacher of 20 k, and rows for every stage; of uneven lengths. `shape`: of both."""
    pick, tokenizer = random.Random(0), Tokenizer.train([], TokenizerConfig(kind="byte"))
    tiny_model(folder / "base", tokenizer, seed=0, n_layers=1, d_model=16, **shape)
    tiny_model(folder / "teacher", tokenizer, seed=1, n_layers=2, d_model=24, **shape)

    def asked() -> str:
        return _word(pick, pick.randint(1, 8))

    _write(
        folder / "sft.jsonl",
        [{"prompt": asked(), "completion": _word(pick, pick.randint(1, 30))} for _ in range(40)],
    )
    pairs = [
        {
            "prompt": asked(),
            "chosen": "a" + _word(pick, pick.randint(1, 20)),
            "rejected": _word(pick, pick.randint(1, 20)),
        }
        for _ in range(40)
    ]
    _write(folder / "distill.jsonl", [json.loads(line) for line in (folder / "sft.jsonl").read_text().splitlines()])
    for stage in ("reward", "dpo"):
        _write(folder / f"{stage}.jsonl", pairs)
    for stage in ONLINE:
        _write(folder / f"{stage}.jsonl", [{"prompt": asked()} for _ in range(20)])
    return folder


def tiny_model(folder: Path, tokenizer: Tokenizer, seed: int, **shape: Any) -> None:
    """A language model with random weights, as a folder."""
    rows_of_embedding = -(-tokenizer.vocab_size // 64) * 64
    model = GPT(GPTConfig(n_heads=2, max_seq_len=96, vocab_size=rows_of_embedding, **shape))
    init_weights(model, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in model_files(model.config, torch.float32, tokenizer, {"stage": "sft", "step": 1}).items():
        (folder / name).write_bytes(content)
    tensors = {n: t.contiguous() for n, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def tiny_stage(folder: Path, stage: str, out: str, **changes: Any) -> Path:
    """A recipe of some seconds at most: several epochs or rollouts, saves that fall between the updates of a rollout.

    Args:
        folder: what `tiny_world` has filled.
        out: the run's name in it.
        changes: top-level keys; a mapping is merged into the recipe's own.
    """
    recipe: dict[str, Any] = {
        "stage": stage,
        "init_from": str(folder / "base"),
        "out": str(folder / out),
        "data": {"path": str(folder / f"{stage}.jsonl"), "valid_frac": 0.2, "cache_dir": str(folder / "cache")},
        "optim": {"lr": 3e-3, "warmup_steps": 2},
        "steps": STEPS,
        "eval": {"every": 8},
        "save": {"every": 3, "keep": 2},
        "log": {"tensorboard": False, "plot": False},
        "device": "cpu",
        **{key: dict(value) if isinstance(value, dict) else value for key, value in _SECTIONS[stage].items()},
    }
    if stage == "distill":
        recipe["teacher"] = str(folder / "teacher")
    if stage in ONLINE:
        recipe["rewards"] = [{"kind": "python", "function": "killers:reward"}]
        recipe["rollout"] |= {"max_new_tokens": 12, "batch_size": 8, "record_every": 1}
        recipe["update"] = {"minibatches": 2, "epochs": 2}
        recipe["batch"] = {"micro_tokens": 128, "max_len": 64}
    for key, value in changes.items():
        recipe[key] = {**recipe[key], **value} if isinstance(value, dict) and key in recipe else value
    path = folder / f"{out}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def records_of(run: Path) -> dict[str, str]:
    """SHA-256 of what a run tells of its rollouts."""
    return {p.name: sha256_of(p) for p in sorted((run / "rollouts").glob("*.jsonl"))}
