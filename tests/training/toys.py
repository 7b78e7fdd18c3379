"""What the tests of training share: a tiny GPT, documents of very uneven length, recipes in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmkit.data.loader import RowLoader, TextRows
from llmkit.data.shards import ShardWriter, TokenShards, write_index
from llmkit.losses import LossSum, squared_error
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, init_weights
from llmkit.training.config import EvalConfig, OptimConfig, RunConfig
from llmkit.training.engine import Engine

VOCAB, T = 64, 16


def recipe(precision: str = "fp64", steps: int = 10, seed: int = 0, weights: str = "model", **optim: Any) -> RunConfig:
    """A recipe without warm-up whose rate stays flat, unless `optim` says otherwise."""
    flat = {"schedule": "constant", **({} if "warmup_frac" in optim else {"warmup_steps": 0})}
    optimizer = OptimConfig(**{**flat, **optim})
    return RunConfig(
        out="unused", steps=steps, seed=seed, precision=precision, optim=optimizer, eval=EvalConfig(weights=weights)
    )


def tiny_gpt(seed: int = 0, activation_checkpointing: bool = False, **shape: Any) -> GPT:
    """Two blocks, 20 k weights; wide noise in the matrices, so that attention is far from flat."""
    sizes = {
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_model": 32,
        "d_ff": 48,
        "max_seq_len": 64,
        "vocab_size": VOCAB,
    }
    model = GPT(GPTConfig(**{**sizes, **shape}), activation_checkpointing)
    init_weights(model, seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(8)
    return model


def uneven_documents(n: int = 24, seed: int = 0) -> list[list[int]]:
    """Long documents between bursts of documents of one to three tokens: rows of 16 hold 2 to 16 labels."""
    rng = np.random.default_rng(seed)
    bursts = ([int(rng.integers(16, 50))] if i % 2 else rng.integers(1, 4, 10).tolist() for i in range(n))
    return [rng.integers(3, VOCAB, length).tolist() for lengths in bursts for length in lengths]


def write_shards(folder: Path, documents: Sequence[Sequence[int]]) -> TokenShards:
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder / "000000.tokens", VOCAB, "hash")
    for ids in documents:
        writer.add(np.array(ids, np.int64), [len(ids)], len(ids))
    writer.close()
    write_index(folder, ["000000.tokens"])
    return TokenShards(folder)


def rows(shards: TokenShards, **options: Any) -> RowLoader:
    text = TextRows([shards], row_len=T, pad_id=0, packing=options.pop("packing", True))
    return RowLoader(text, **{"rows_per_step": 8, "seed": 3, "prefetch": 0, **options})


@dataclass(frozen=True)
class Points:
    """A micro-batch of a regression: inputs [N, A], targets [N, B]."""

    x: Tensor
    y: Tensor

    @property
    def denominator(self) -> float:
        return float(len(self.x))

    def to(self, device: torch.device) -> Points:
        return Points(self.x.to(device), self.y.to(device))


def regression(module: nn.Module, batch: Points) -> LossSum:
    return squared_error(module(batch.x), batch.y)


def points(n: int = 8, inputs: int = 4, outputs: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Points:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda width: torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return Points(draw(inputs), draw(outputs))


def linear(inputs: int = 4, outputs: int = 3, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, dtype=torch.float64)


def snapshot(engine: Engine) -> dict[str, Tensor]:
    """Copies of everything the engine would save."""
    return {f"{file}:{n}": t.clone() for file, tensors in engine.tensors().items() for n, t in tensors.items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max().item() for n in a)
