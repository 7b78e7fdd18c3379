"""A tokenizer of bytes, a random model and random prompts, for the tests of this folder."""

from __future__ import annotations

import random

import torch

from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import Generation, generate
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT
from llmkit.tokenizer import Tokenizer, TokenizerConfig

TOKENIZER = Tokenizer.train([], TokenizerConfig(kind="byte"))
V = TOKENIZER.vocab_size
ROWS = -(-V // 64) * 64  # the embedding is rounded up: the last rows belong to no token


def build(std: float = 0.25, seed: int = 0, **shape) -> GPT:
    """Wide random weights, so that rows differ and logits are far apart."""
    sizes = {
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_model": 32,
        "d_ff": 48,
        "max_seq_len": 64,
        "vocab_size": ROWS,
    }
    model = GPT(GPTConfig(**{**sizes, **shape}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if name.endswith("norm.weight") else 0.0, std, generator=generator)
    return model.eval()


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, V) for _ in range(n)] for n in lengths]


def run(model: GPT, prompts: list[list[int]], sampling: SamplingConfig, **options) -> list[Generation]:
    return generate(model, prompts, sampling, tokenizer=TOKENIZER, **options)
