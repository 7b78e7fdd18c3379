"""The network's section of a recipe: what is derived, what is refused, and how it is said."""

from __future__ import annotations

import pytest

from llmkit.config import UserError, validate
from llmkit.model.config import GPTConfig, Llama3Scaling, YarnScaling, count_params

GPT2 = {
    "positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "qkv_bias": True, "o_bias": True, "mlp_bias": True,
}  # fmt: skip


def read(data: dict) -> GPTConfig:
    return validate(GPTConfig, data, {(): "r.yaml:1", ("rope_scaling",): "r.yaml:7"})


def test_todays_recipes_mean_what_they_meant():
    config = GPTConfig()
    assert config.family == "llama" and config.causal and config.sliding_window is None
    assert (config.width_of_mlp, GPTConfig(**GPT2).width_of_mlp) == (1024, 4 * 384)
    scaled = {"rope_scaling": {"factor": 2.0, "original_max_seq_len": 128}}
    assert read(scaled).rope_scaling == Llama3Scaling(factor=2.0, original_max_seq_len=128)


@pytest.mark.parametrize(
    "scaling,message",
    [
        ({"kind": "yarn", "factor": 2, "original_max_seq_len": 128, "beta_fats": 3},
         "r.yaml:7: rope_scaling.beta_fats: unknown key - did you mean 'beta_fast'?"),
        ({"kind": "linear"}, "r.yaml:7: rope_scaling.factor: missing: this key has no default"),
        ({"factor": "two"}, "r.yaml:7: rope_scaling.factor: expected a number (got 'two')"),
        ({"kind": "ntk", "factor": 2}, "r.yaml:7: rope_scaling: kind: llama3, yarn and linear are supported"),
        ({"kind": "linear", "yarn": 2, "factor": 2}, "r.yaml:7: rope_scaling.yarn: unknown key; known: kind, factor"),
        (4, "r.yaml:7: rope_scaling: expected an object (got 4)"),
        ({"kind": "yarn", "factor": 4, "original_max_seq_len": 128, "beta_slow": 64},
         "r.yaml:7: rope_scaling: beta_fast (32.0) must not be below beta_slow (64.0)"),
        ({"kind": "yarn", "factor": 4, "original_max_seq_len": 128},
         "max_seq_len (256) must be rope_scaling's factor x original_max_seq_len (4 x 128)"),
        ({"original_max_seq_len": 256}, "max_seq_len (256) must be above rope_scaling's original_max_seq_len (256)"),
    ],
)  # fmt: skip
def test_scaling_is_read_by_its_kind(scaling, message):
    with pytest.raises(UserError) as e:
        read({"rope_scaling": scaling})
    assert message in str(e.value)


def test_yarn_at_its_own_length_or_before_it():
    for longest in (128, 512):
        read({"max_seq_len": longest, "rope_scaling": {"kind": "yarn", "factor": 4, "original_max_seq_len": 128}})
    assert YarnScaling(kind="yarn", factor=4.0, original_max_seq_len=128).attention_factor is None


@pytest.mark.parametrize(
    "options,message",
    [
        ({"n_full_layers": 1}, "n_full_layers (1) means something with a sliding_window only"),
        ({"n_full_layers": 6, "sliding_window": 8}, "n_full_layers (6) must be below n_layers (6)"),
        ({**GPT2, "rope_theta": 5e5}, "rope_theta and rope_scaling mean something with positions: rope only"),
        ({**GPT2, "rope_scaling": {"kind": "linear", "factor": 2}}, "mean something with positions: rope only"),
        ({"head_dim": 3}, "head_dim (3) must be even"),
        ({"n_heads": 5}, "d_model (384) must be a multiple of n_heads (5), or set head_dim"),
        ({"sliding_window": 0}, "sliding_window: must be greater"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(UserError) as e:
        read(options)
    assert message in str(e.value)


def test_the_parameters_of_known_models():
    """124,439,808 are what transformers counts in openai-community/gpt2, 7,241,732,096 in Mistral-7B-v0.1."""
    gpt2 = GPTConfig(**GPT2, n_layers=12, n_heads=12, d_model=768, max_seq_len=1024, vocab_size=50257)
    assert count_params(gpt2).total == 124_439_808
    mistral = GPTConfig(
        n_layers=32, n_heads=32, n_kv_heads=8, d_model=4096, d_ff=14336, vocab_size=32000, sliding_window=4096,
        tie_embeddings=False,
    )  # fmt: skip
    assert count_params(mistral).total == 7_241_732_096


def test_heads_of_any_width_without_rope():
    assert GPTConfig(**GPT2, n_heads=3, d_model=9).family == "gpt2"
