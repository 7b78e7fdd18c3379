"""A model that answers, small enough for tests."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from llmkit.model.config import GPTConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT, init_weights
from llmkit.tokenizer import Tokenizer, TokenizerConfig

ANSWERS = ("yes", "no", "ok", "好", "fine", "well")
STEPS = 120


@pytest.fixture(scope="session")
def answering(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model that answers any question with one of ANSWERS, each about equally often, and then ends its turn."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([], TokenizerConfig(kind="byte"))
    model = GPT(
        GPTConfig(n_layers=1, n_heads=2, d_model=32, max_seq_len=96, vocab_size=-(-tokenizer.vocab_size // 64) * 64)
    )
    init_weights(model, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    pick = random.Random(0)
    for step in range(STEPS):
        ids, labels = torch.zeros(24, 48, dtype=torch.long), torch.full((24, 48), -100)
        for row in range(24):
            turns = [("user", f"q{pick.randrange(100)}"), ("assistant", pick.choice(ANSWERS))]
            chat = tokenizer.encode_chat([{"role": r, "content": c} for r, c in turns])
            n = len(chat.ids)
            ids[row, :n] = torch.tensor(chat.ids)
            labels[row, : n - 1] = torch.tensor(
                [i if m else -100 for i, m in zip(chat.ids[1:], chat.loss_mask[1:], strict=True)]
            )
        loss = cross_entropy(model.logits(model(ids)).flatten(0, 1), labels.flatten())
        for group in optimizer.param_groups:
            group["lr"] = 2e-2 * (1 - step / STEPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("answering")
    for name, content in model_files(model.config, torch.float32, tokenizer, {"stage": "sft", "step": 1}).items():
        (folder / name).write_bytes(content)
    tensors = {n: t.contiguous() for n, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions; the right answer to every one is yes."""
    file = tmp_path_factory.mktemp("questions") / "prompts.jsonl"
    rows = [{"prompt": f"q{i}", "answer": "yes", "kind": "ab"[i % 2]} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file
