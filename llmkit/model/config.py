"""The shape of the network, and which Hugging Face family can express it. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llmkit.config import Config

Family = Literal["llama", "qwen2", "qwen3"]


class RopeScaling(Config):
    """Llama 3.1's frequency-dependent stretching of RoPE (config.json of meta-llama/Llama-3.1-8B)."""

    kind: Literal["llama3"] = "llama3"
    """Only llama3; other kinds are refused rather than approximated."""
    factor: float = Field(8.0, ge=1.0)
    """How many times longer the longest wavelengths become."""
    low_freq_factor: float = Field(1.0, gt=0)
    """Wavelengths above original_max_seq_len / low_freq_factor are stretched in full."""
    high_freq_factor: float = Field(4.0, gt=0)
    """Wavelengths below original_max_seq_len / high_freq_factor stay as they are."""
    original_max_seq_len: int = Field(8192, gt=0)
    """Context length, in tokens, of the model before it was stretched."""

    @model_validator(mode="after")
    def _ordered(self) -> RopeScaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor ({self.high_freq_factor}) must be above low_freq_factor ({self.low_freq_factor})"
            )
        return self


class GPTConfig(Config):
    """A decoder-only Transformer of the Llama family. Sizes left out are derived from `d_model`."""

    n_layers: int = Field(6, ge=1, le=10_000)
    """Number of blocks."""
    n_heads: int = Field(6, ge=1)
    """Query heads per block."""
    n_kv_heads: int | None = Field(None, ge=1)
    """Key and value heads; fewer than n_heads is GQA, 1 is MQA. Default: n_heads."""
    d_model: int = Field(384, ge=1)
    """Width of the residual stream."""
    head_dim: int | None = Field(None, ge=2)
    """Width of one head; even, for RoPE. Default: d_model / n_heads."""
    d_ff: int | None = Field(None, ge=1)
    """Width of the gated MLP. Default: 8/3 of d_model, rounded up to a multiple of 64 (Llama)."""
    max_seq_len: int = Field(256, ge=1)
    """Longest sequence, in tokens, that is trained on or generated."""
    vocab_size: int | None = Field(None, ge=1)
    """Rows of the embedding. Default: the tokenizer's size, rounded up to a multiple of 64."""
    tie_embeddings: bool = True
    """Input and output embeddings are one tensor."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary frequencies (Su et al. 2021, arXiv 2104.09864)."""
    rope_scaling: RopeScaling | None = None
    """Stretches RoPE to longer contexts than the model was first trained on."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the mean square in RMSNorm."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    o_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Biases on the three MLP projections."""
    qk_norm: bool = False
    """RMSNorm per head on queries and keys before RoPE (Qwen3)."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Probability of dropping embeddings, attention weights and residual branches in training."""

    @model_validator(mode="after")
    def _consistent(self) -> GPTConfig:
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model ({self.d_model}) must be a multiple of n_heads ({self.n_heads}), or set head_dim"
            )
        if self.width_of_head % 2:
            raise ValueError(f"head_dim ({self.width_of_head}) must be even: RoPE turns pairs of numbers")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        _ = self.family
        return self

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def width_of_head(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def width_of_mlp(self) -> int:
        return self.d_ff or -(-8 * self.d_model // (3 * 64)) * 64

    @property
    def family(self) -> Family:
        """The Hugging Face architecture that computes exactly this network.

        Raises ValueError where none does, naming the nearest, so that every checkpoint can be loaded by transformers.
        """
        options = f"qkv_bias {self.qkv_bias}, o_bias {self.o_bias}, mlp_bias {self.mlp_bias}, qk_norm {self.qk_norm}"
        if self.qk_norm:
            if self.qkv_bias == self.o_bias and not self.mlp_bias:
                return "qwen3"
            raise ValueError(
                f"no Hugging Face class expresses {options}; the nearest is Qwen3: qk_norm with mlp_bias false and "
                "qkv_bias equal to o_bias"
            )
        if self.qkv_bias == self.o_bias:
            return "llama"
        if self.qkv_bias and not self.mlp_bias:
            return "qwen2"
        raise ValueError(
            f"no Hugging Face class expresses {options}; the nearest are Qwen2 (qkv_bias alone) and Llama "
            "(qkv_bias equal to o_bias)"
        )
