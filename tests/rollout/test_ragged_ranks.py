"""Ranks whose answers end far apart: each finishes its own share, nobody waits before that, and the rollout is that of
one rank. Also where a rank has no prompt at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from ports import free_port
from safetensors.torch import load_file, save_file

from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, init_weights
from llmkit.rollout.batch import Rollouts
from llmkit.rollout.collector import Collector
from llmkit.rollout.config import RolloutConfig
from llmkit.rollout.prompts import PromptRow
from llmkit.rollout.rewards.base import Rewards
from llmkit.rollout.rewards.config import LengthReward
from llmkit.tokenizer import Tokenizer
from llmkit.tokenizer.config import TokenizerConfig
from llmkit.training.dist import Ranks, connect

MOST = 120
WORLD = 3
PROMPTS = ("aabbc", "cab", "b")


def policy(tokenizer: Tokenizer) -> GPT:
    """Says what the last token of a prompt decides: after a the end, after b more b for ever, after c a coin's throw."""
    model = GPT(GPTConfig(n_layers=1, n_heads=2, d_model=16, max_seq_len=160, vocab_size=320, tie_embeddings=False))
    init_weights(model, 0)
    stop = tokenizer.end_of_turn_id
    assert stop is not None
    a, b, c = tokenizer.encode("abc")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                p.zero_()  # nothing but the last token counts
        model.model.embed_tokens.weight.zero_()
        model.head_weight.zero_()
        for i, token in enumerate((a, b, c)):
            model.model.embed_tokens.weight[token, i] = 1.0
        model.head_weight[stop, 0] = model.head_weight[b, 1] = 20.0
        model.head_weight[c, 2], model.head_weight[stop, 2] = 20.0 + 0.1, 20.0 - 0.5
    return model


def collected(ranks: Ranks, prompts: str) -> Rollouts:
    tokenizer = Tokenizer.from_config(TokenizerConfig(kind="byte"))
    config = RolloutConfig(prompts_per_step=len(prompts), samples_per_prompt=4, max_new_tokens=MOST, batch_size=8)
    reward = LengthReward(kind="length", target=10, spread=50)
    rows = [PromptRow(tokenizer.encode(p), p, {}, None, i) for i, p in enumerate(prompts)]
    collector = Collector(config, tokenizer, Rewards([reward], tokenizer), ranks, seed=5)
    return collector.answers(policy(tokenizer), rows, range(len(rows)), "rollout", lambda: False, torch.float64)


def _child(rank: int, port: int, out: str) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    ranks = connect("cpu", timeout_s=60)
    for prompts in PROMPTS:
        save_file(collected(ranks, prompts).tensors(), f"{out}/{prompts}-{rank}.safetensors")
    ranks.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three ranks made of each set of prompts."""
    folder = tmp_path_factory.mktemp("ragged")
    port = free_port()
    mp.spawn(_child, (port, str(folder)), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("prompts", PROMPTS)
def test_ranks_end_apart(prompts: str, shared: Path) -> None:
    """Of 5 prompts 1, 2 and 2 a rank: answers of one token, of 120, of a random number between; of one prompt two ranks
    have none."""
    torch.set_num_threads(1)
    alone = collected(Ranks(), prompts).tensors()
    lengths = (alone["lengths_N"] - alone["prompt_lengths_N"]).view(len(prompts), 4)
    for prompt, found_4 in zip(prompts, lengths, strict=True):
        assert found_4.tolist() == {"a": [1] * 4, "b": [MOST] * 4}.get(prompt, found_4.tolist())
        assert prompt != "c" or len(set(found_4.tolist())) > 1  # distinct seeds
    for rank in range(WORLD):
        found = load_file(shared / f"{prompts}-{rank}.safetensors")
        assert found.keys() == alone.keys()
        for name, t in alone.items():
            torch.testing.assert_close(found[name], t, rtol=0, atol=1e-6 if t.is_floating_point() else 0)
