"""Loading what scores texts: all of it or nothing, and never a head that was made up (B87)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkit.config import UserError
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.heads import SequenceClassifier, init_head
from llmkit.model.hf import config_to_hf
from llmkit.model.reward_facts import RewardFacts, read_reward_facts
from llmkit.model.weights import load_classifier

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"qk_norm": True, "tie_embeddings": False},
    "gpt2": {
        "positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "qkv_bias": True, "o_bias": True,
        "mlp_bias": True, "n_kv_heads": 4,
    },
    "eurobert": {"causal": False},
}  # fmt: skip
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "mask_token_id": 3}


def saved(folder: Path, shape: str = "llama", n_scores: int = 1, **extra: Any) -> SequenceClassifier:
    """A folder as training leaves it."""
    sizes = {
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_model": 16,
        "d_ff": 24,
        "max_seq_len": 32,
        "vocab_size": 64,
    }
    config = GPTConfig(**{**sizes, **SHAPES[shape]})
    model = SequenceClassifier(config, n_scores)
    init_weights(model, 0)
    init_head(model, 1)
    folder.mkdir(exist_ok=True)
    save_file({k: t.contiguous() for k, t in model.state_dict().items()}, folder / "model.safetensors")
    hf = config_to_hf(config, torch.float32, IDS, extra, head="classify", n_labels=n_scores)
    (folder / "config.json").write_text(json.dumps(hf))
    return model.eval()


def changed(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replaces tensors, or takes them away."""
    found = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        del found[name]
        if tensor is not None:
            found[name] = tensor
    save_file(found, folder / "model.safetensors")


@pytest.mark.parametrize("shape", SHAPES)
def test_saved_and_loaded_scores_are_equal(tmp_path: Path, shape: str) -> None:
    """B87: two loads are equal, and equal to what was saved, bit for bit."""
    model = saved(tmp_path / "m", shape)
    ids, lengths = torch.randint(4, 64, (3, 9), generator=torch.Generator().manual_seed(0)), torch.tensor([9, 4, 1])
    with torch.no_grad():
        expected = model(ids, lengths)
    for _ in range(2):
        loaded = load_classifier(tmp_path / "m", n_scores=1)
        assert torch.equal(loaded(ids, lengths), expected) and not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
    assert load_classifier(tmp_path / "m", torch.float64)(ids, lengths).dtype == torch.float64


@pytest.mark.parametrize("shape", ["llama", "gpt2", "eurobert"])
def test_a_head_that_is_missing_or_was_never_trained_is_refused(tmp_path: Path, shape: str) -> None:
    """B87: transformers would draw a random one and say so in a warning."""
    model, folder = saved(tmp_path / "m", shape), tmp_path / "m"
    head = "classifier.weight" if shape == "eurobert" else "score.weight"
    changed(folder, **{head: torch.zeros_like(model.get_parameter(head))})
    with pytest.raises(UserError, match="every weight of the head is 0: it was never trained"):
        load_classifier(folder)
    changed(folder, **{head: None})
    with pytest.raises(UserError, match=f"the weights hold no {head}: the head, and with it every score"):
        load_classifier(folder)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "three", n_scores=3)
    with pytest.raises(UserError, match=r"has 3 scores \(LABEL_0, LABEL_1, LABEL_2\), 1 expected"):
        load_classifier(tmp_path / "three", n_scores=1)
    assert load_classifier(tmp_path / "three").score.out_features == 3
    changed(tmp_path / "three", **{"score.weight": torch.ones(2, 16)})
    with pytest.raises(UserError, match=r"score.weight: the weights hold \(2, 16\), config.json asks for \(3, 16\)"):
        load_classifier(tmp_path / "three")
    config = GPTConfig(n_layers=1, n_heads=2, d_model=16, max_seq_len=32, vocab_size=64)
    lm = GPT(config)
    init_weights(lm, 0)
    (tmp_path / "lm").mkdir()
    save_file(lm.state_dict(), tmp_path / "lm" / "model.safetensors")
    (tmp_path / "lm" / "config.json").write_text(json.dumps(config_to_hf(config, torch.float32, IDS, {})))
    with pytest.raises(UserError, match="holds a language model, no scores of texts"):
        load_classifier(tmp_path / "lm")


def test_a_config_that_claims_too_much_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    hf = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**hf, "num_hidden_layers": 9000}))
    with pytest.raises(UserError, match="they do not belong together"):
        load_classifier(tmp_path / "m")


def test_a_language_models_head_may_lie_beside_it(tmp_path: Path) -> None:
    """Reward models of others often keep the vocabulary's head."""
    saved(tmp_path / "m", "qwen3")
    found = load_file(tmp_path / "m" / "model.safetensors")
    save_file({**found, "lm_head.weight": torch.ones(64, 16)}, tmp_path / "m" / "model.safetensors")
    load_classifier(tmp_path / "m", n_scores=1)


def test_facts_of_rewards(tmp_path: Path) -> None:
    facts = RewardFacts(1.5, 0.5, 100, 0.93, 40)
    saved(tmp_path / "m", stage="reward", **facts.to_json())
    assert read_reward_facts(tmp_path / "m") == facts and facts.normalised(2.5) == 2
    saved(tmp_path / "foreign")
    assert read_reward_facts(tmp_path / "foreign") is None
    saved(tmp_path / "short", reward_mean=0.0, reward_std=1)
    assert read_reward_facts(tmp_path / "short") == RewardFacts(0.0, 1, 0)
    for bad in (0.0, -1.0, "x", None, float("inf")):
        saved(tmp_path / "bad", reward_mean=0.0, reward_std=bad)
        with pytest.raises(UserError, match="reward_mean and reward_std must be numbers"):
            read_reward_facts(tmp_path / "bad")
