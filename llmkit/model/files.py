"""The small files that make a checkpoint folder a Hugging Face model."""

from __future__ import annotations

from typing import Any

import torch

from llmkit.config import UserError
from llmkit.model.config import GPTConfig
from llmkit.model.hf import Head, config_to_hf
from llmkit.storage import to_json
from llmkit.tokenizer import Tokenizer

# What a model is for, as the hub calls it, and the class of transformers that loads it.
_TASKS = {
    "generate": ("text-generation", "AutoModelForCausalLM"),
    "fill": ("fill-mask", "AutoModelForMaskedLM"),
    "classify": ("text-classification", "AutoModelForSequenceClassification"),
}


def model_files(
    config: GPTConfig, dtype: torch.dtype, tokenizer: Tokenizer, facts: dict[str, Any], *, head: Head = "lm",
    n_labels: int = 1, labels: tuple[str, ...] | None = None, problem_type: str | None = None,
) -> dict[str, bytes]:  # fmt: skip
    """config.json, generation_config.json, the tokenizer's files and a model card, by name.

    Args:
        config: with vocab_size set.
        dtype: of the saved weights.
        tokenizer: its special ids go into both configurations.
        facts: stage, step and hashes; kept in config.json under "llmkit" and told by the card.
        head: this and the rest as in `hf.config_to_hf`.
    """
    ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    if tokenizer.bos_id is not None:
        ids["bos_token_id"] = tokenizer.bos_id
    task = "classify" if head == "classify" else "generate" if config.causal else "fill"
    files: dict[str, bytes] = {}
    if task == "generate":
        files["generation_config.json"] = to_json({**ids, "eos_token_id": sorted(tokenizer.stop_ids)}).encode()
    if not config.causal:
        if tokenizer.mask_id is None:
            raise UserError("tokenizer: it has no mask token, which a model with causal: false is asked to fill in")
        ids["mask_token_id"] = tokenizer.mask_id
    hf = config_to_hf(config, dtype, ids, facts, head=head, n_labels=n_labels, labels=labels, problem_type=problem_type)
    return {
        "config.json": to_json(hf).encode(),
        **files,
        **tokenizer.files(config.max_seq_len),
        "README.md": model_card(config, facts, task).encode(),
    }


def model_card(config: GPTConfig, facts: dict[str, Any], task: str = "generate") -> str:
    """README.md of a checkpoint, with the front matter that the hub reads."""
    rows = {
        "architecture": config.family,
        "layers x width": f"{config.n_layers} x {config.d_model}",
        "heads (key/value)": f"{config.n_heads} ({config.kv_heads})",
        "context": f"{config.max_seq_len} tokens",
        "vocabulary": config.vocab_size,
        **facts,
    }
    if config.experts is not None:
        rows["experts"] = f"{config.experts.n}, {config.experts.n_active} for each token"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    tag, loader = _TASKS[task]
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {tag}\ntags: [llmkit]\n---\n\n"
        f"# {facts['stage']} checkpoint, step {facts['step']}\n\n| | |\n|---|---|\n{table}\n\n"
        f"```python\nfrom transformers import {loader}, AutoTokenizer\n\n"
        f'model = {loader}.from_pretrained("THIS_FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n```\n'
    )
