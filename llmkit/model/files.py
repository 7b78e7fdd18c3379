"""The small files that make a checkpoint folder a Hugging Face model."""

from __future__ import annotations

from typing import Any

import torch

from llmkit.model.config import GPTConfig
from llmkit.model.hf import config_to_hf
from llmkit.storage import to_json
from llmkit.tokenizer import Tokenizer


def model_files(config: GPTConfig, dtype: torch.dtype, tokenizer: Tokenizer, facts: dict[str, Any]) -> dict[str, bytes]:
    """config.json, generation_config.json, the tokenizer's files and a model card, by name.

    Args:
        config: with vocab_size set.
        dtype: of the saved weights.
        tokenizer: its special ids go into both configurations.
        facts: stage, step and hashes; kept in config.json under "llmkit" and told by the card.
    """
    ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    if tokenizer.bos_id is not None:
        ids["bos_token_id"] = tokenizer.bos_id
    stops = sorted(tokenizer.stop_ids)
    return {
        "config.json": to_json(config_to_hf(config, dtype, ids, facts)).encode(),
        "generation_config.json": to_json({**ids, "eos_token_id": stops}).encode(),
        **tokenizer.files(config.max_seq_len),
        "README.md": model_card(config, facts).encode(),
    }


def model_card(config: GPTConfig, facts: dict[str, Any]) -> str:
    """README.md of a checkpoint, with the front matter that the hub reads."""
    rows = {
        "architecture": config.family,
        "layers x width": f"{config.n_layers} x {config.d_model}",
        "heads (key/value)": f"{config.n_heads} ({config.kv_heads})",
        "context": f"{config.max_seq_len} tokens",
        "vocabulary": config.vocab_size,
        **facts,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [llmkit]\n---\n\n"
        f"# {facts['stage']} checkpoint, step {facts['step']}\n\n| | |\n|---|---|\n{table}\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n```\n'
    )
