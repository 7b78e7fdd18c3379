"""Hub models that recipes name, as folders without weights: their published shapes, so that a recipe builds offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmkit.tokenizer import Tokenizer, TokenizerConfig

_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 131072,
}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-7B": {
        **_QWEN2,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "HuggingFaceTB/SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000,
        "max_position_embeddings": 8192,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
SHAPES["Qwen/Qwen2.5-7B-Instruct"] = SHAPES["Qwen/Qwen2.5-7B"]
SHAPES["Qwen/Qwen2.5-1.5B-Instruct"] = {
    **_QWEN2,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
PARAMETERS = {  # as the hub counts them
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
}


def stand_in(name: str, folder: Path) -> Path:
    """A folder with a hub model's config.json and a tokenizer of bytes, which has no id that the model lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name]))
    Tokenizer.train([], TokenizerConfig(kind="byte")).save(folder)
    return folder
