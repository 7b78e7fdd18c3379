"""The shape of the network, which Hugging Face family can express it, and how many parameters it has. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from llmkit.config import Config

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gpt2", "eurobert", "qwen2_moe", "qwen3_moe"]


class Llama3Scaling(Config):
    """Llama 3.1's frequency-dependent stretching of RoPE (config.json of meta-llama/Llama-3.1-8B)."""

    kind: Literal["llama3"] = "llama3"
    """The kind of stretching; this one if it is left out."""
    factor: float = Field(8.0, ge=1.0)
    """How many times longer the longest wavelengths become."""
    low_freq_factor: float = Field(1.0, gt=0)
    """Wavelengths above original_max_seq_len / low_freq_factor are stretched in full."""
    high_freq_factor: float = Field(4.0, gt=0)
    """Wavelengths below original_max_seq_len / high_freq_factor stay as they are."""
    original_max_seq_len: int = Field(8192, gt=0)
    """Context length, in tokens, of the model before it was stretched."""

    @model_validator(mode="after")
    def _ordered(self) -> Llama3Scaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor ({self.high_freq_factor}) must be above low_freq_factor ({self.low_freq_factor})"
            )
        return self


class YarnScaling(Config):
    """YaRN (Peng et al. 2023, arXiv 2309.00071): slow pairs are stretched, fast ones kept, scores sharpened."""

    kind: Literal["yarn"]
    """The kind of stretching."""
    factor: float = Field(ge=1.0)
    """How many times longer the slowest wavelengths become: max_seq_len / original_max_seq_len."""
    original_max_seq_len: int = Field(gt=0)
    """Context length, in tokens, of the model before it was stretched."""
    beta_fast: float = Field(32.0, gt=0)
    """Pairs that turn more often than this over the original context stay as they are."""
    beta_slow: float = Field(1.0, gt=0)
    """Pairs that turn less often than this are stretched in full."""
    attention_factor: float | None = Field(None, gt=0)
    """Queries and keys are multiplied by it. Default: 0.1 ln(factor) + 1, the paper's."""
    truncate: bool = True
    """Both ends of the ramp between the two are rounded outwards to whole pairs."""

    @model_validator(mode="after")
    def _ordered(self) -> YarnScaling:
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast ({self.beta_fast}) must not be below beta_slow ({self.beta_slow})")
        return self


class LinearScaling(Config):
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): every position is divided by the factor."""

    kind: Literal["linear"]
    """The kind of stretching."""
    factor: float = Field(ge=1.0)
    """How many times longer all wavelengths become."""


def _kind(value: Any) -> str:
    if isinstance(value, Llama3Scaling | YarnScaling | LinearScaling):
        return value.kind
    return str(value.get("kind", "llama3")) if isinstance(value, dict) else "llama3"


RopeScaling = Annotated[
    Annotated[Llama3Scaling, Tag("llama3")]
    | Annotated[YarnScaling, Tag("yarn")]
    | Annotated[LinearScaling, Tag("linear")],
    Discriminator(_kind, custom_error_type="kind", custom_error_message="kind: llama3, yarn and linear are supported"),
]


class ExpertsConfig(Config):
    """A mixture of experts in place of the MLP: a router sends each token to a few of many small MLPs (Shazeer et al.
    2017, arXiv 1701.06538)."""

    n: int = Field(ge=1, le=4096)
    """Experts per layer."""
    n_active: int = Field(ge=1)
    """Experts that each token is sent to."""
    d_ff: int = Field(ge=1)
    """Width of one expert; the model's own d_ff is that of the layers without experts."""
    normalize: bool = True
    """The router's weights of a token's experts are divided by their sum (norm_topk_prob; Qwen3-MoE's models do)."""
    shared_d_ff: int | None = Field(None, ge=1)
    """Width of one more expert that sees every token, through a gate of its own (Qwen2-MoE). Default: none."""
    balance: float = Field(0.01, ge=0.0)
    """Weight of the term that keeps the experts' loads equal (Switch, arXiv 2101.03961, takes 0.01); 0: off."""
    dense_layers: tuple[int, ...] = ()
    """Layers, counted from 0, that keep a plain MLP (mlp_only_layers)."""
    every: int = Field(1, ge=1)
    """Only every so many layers, the last of each so many, have experts (decoder_sparse_step)."""

    @model_validator(mode="before")
    @classmethod
    def _tuple(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("dense_layers"), list):
            return {**data, "dense_layers": tuple(data["dense_layers"])}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> ExpertsConfig:
        if self.n_active > self.n:
            raise ValueError(f"n_active ({self.n_active}) must not be above n ({self.n}), the number of experts")
        return self

    def has_experts(self, layer: int) -> bool:
        """Whether this layer, counted from 0, is a mixture; else it has a plain MLP."""
        return layer not in self.dense_layers and (layer + 1) % self.every == 0

    @property
    def active_width(self) -> int:
        """Width of all MLPs that one token goes through."""
        return self.n_active * self.d_ff + (self.shared_d_ff or 0)


class GPTConfig(Config):
    """A Transformer of the Llama or GPT-2 kind. Sizes left out are derived from `d_model`."""

    n_layers: int = Field(6, ge=1, le=10_000)
    """Number of blocks."""
    n_heads: int = Field(6, ge=1)
    """Query heads per block."""
    n_kv_heads: int | None = Field(None, ge=1)
    """Key and value heads; fewer than n_heads is GQA, 1 is MQA. Default: n_heads."""
    d_model: int = Field(384, ge=1)
    """Width of the residual stream."""
    head_dim: int | None = Field(None, ge=1)
    """Width of one head; even, for RoPE. Default: d_model / n_heads."""
    d_ff: int | None = Field(None, ge=1)
    """Width of the MLP. Default: 8/3 of d_model, rounded up to a multiple of 64 (Llama); for gelu_tanh 4 d_model (GPT-2)."""
    max_seq_len: int = Field(256, ge=1)
    """Longest sequence, in tokens, that is trained on or generated."""
    vocab_size: int | None = Field(None, ge=1)
    """Rows of the embedding. Default: the tokenizer's size, rounded up to a multiple of 64."""
    tie_embeddings: bool = True
    """Input and output embeddings are one tensor."""
    causal: bool = True
    """Tokens see what comes before them. false: they see everything, for masked language modelling (EuroBERT)."""
    sliding_window: int | None = Field(None, ge=1)
    """A token sees itself and the so many less one before it (Mistral, arXiv 2310.06825). Default: all before it."""
    n_full_layers: int = Field(0, ge=0)
    """So many of the first blocks have no sliding window (`max_window_layers` of Qwen2 and Qwen3)."""
    positions: Literal["rope", "learned"] = "rope"
    """Rotary angles, or an embedding of each position that is added to the token's (GPT-2)."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary frequencies (Su et al. 2021, arXiv 2104.09864)."""
    rope_scaling: RopeScaling | None = None
    """Stretches RoPE to longer contexts than the model was first trained on."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """RMSNorm, or LayerNorm with a bias (GPT-2)."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the mean square, or the variance, in the norms."""
    mlp: Literal["swiglu", "gelu_tanh"] = "swiglu"
    """Gated by SiLU, or two matrices around a GELU in its tanh form (GPT-2)."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    o_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Biases on the MLP's projections."""
    qk_norm: bool = False
    """RMSNorm per head on queries and keys before RoPE (Qwen3)."""
    experts: ExpertsConfig | None = None
    """A mixture of experts in place of the MLP (Qwen3-MoE; with a shared expert Qwen2-MoE). Default: none."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Probability of dropping embeddings, attention weights and residual branches in training."""

    @model_validator(mode="after")
    def _consistent(self) -> GPTConfig:
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model ({self.d_model}) must be a multiple of n_heads ({self.n_heads}), or set head_dim"
            )
        if self.positions == "rope" and self.width_of_head % 2:
            raise ValueError(f"head_dim ({self.width_of_head}) must be even: RoPE turns pairs of numbers")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        if self.n_full_layers and self.sliding_window is None:
            raise ValueError(f"n_full_layers ({self.n_full_layers}) means something with a sliding_window only")
        if self.n_full_layers >= self.n_layers:
            raise ValueError(
                f"n_full_layers ({self.n_full_layers}) must be below n_layers ({self.n_layers}): leave sliding_window "
                "out if no block has it"
            )
        if self.positions == "learned" and (self.rope_scaling is not None or self.rope_theta != 10000.0):
            raise ValueError("rope_theta and rope_scaling mean something with positions: rope only")
        self._check_scaling()
        self._check_experts()
        _ = self.family
        return self

    def _check_scaling(self) -> None:
        """What transformers would warn of: a context that isn't the one the stretching was made for."""
        scaling, longest = self.rope_scaling, self.max_seq_len
        if isinstance(scaling, YarnScaling) and longest / scaling.original_max_seq_len not in (1.0, scaling.factor):
            raise ValueError(
                f"max_seq_len ({longest}) must be rope_scaling's factor x original_max_seq_len "
                f"({scaling.factor:g} x {scaling.original_max_seq_len})"
            )
        if isinstance(scaling, Llama3Scaling) and longest <= scaling.original_max_seq_len:
            raise ValueError(
                f"max_seq_len ({longest}) must be above rope_scaling's original_max_seq_len "
                f"({scaling.original_max_seq_len}): RoPE is stretched to longer contexts"
            )

    def _check_experts(self) -> None:
        if self.experts is None:
            return
        beyond = [i for i in self.experts.dense_layers if not 0 <= i < self.n_layers]
        if beyond:
            raise ValueError(f"experts.dense_layers names layer {beyond[0]}: there are 0 to {self.n_layers - 1}")
        if not self.n_expert_layers:
            raise ValueError(
                f"experts.dense_layers and experts.every ({self.experts.every}) leave none of the {self.n_layers} layers "
                "with experts"
            )

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def width_of_head(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def width_of_mlp(self) -> int:
        if self.d_ff is None and self.mlp == "gelu_tanh":
            return 4 * self.d_model
        return self.d_ff or -(-8 * self.d_model // (3 * 64)) * 64

    @property
    def n_expert_layers(self) -> int:
        """Blocks with a mixture of experts in place of the MLP."""
        if self.experts is None:
            return 0
        every = self.experts.every
        return len(set(range(every - 1, self.n_layers, every)) - set(self.experts.dense_layers))

    @property
    def family(self) -> Family:
        """The Hugging Face architecture that computes exactly this network.

        Raises ValueError where none does, naming the nearest, so that every checkpoint can be loaded by transformers.
        """
        family = self._nearest()
        fixed = {
            "gpt2": {
                "positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "qkv_bias": True, "o_bias": True,
                "mlp_bias": True, "qk_norm": False, "causal": True, "sliding_window": None,
                "kv_heads": self.n_heads, "width_of_head": self.d_model / self.n_heads,
            },
            "eurobert": {**_LLAMA, "causal": False, "o_bias": self.qkv_bias, "mlp_bias": False, "sliding_window": None},
            "qwen3": {**_LLAMA, "qk_norm": True, "o_bias": self.qkv_bias, "mlp_bias": False},
            "qwen2": {**_LLAMA, "qkv_bias": True, "o_bias": False, "mlp_bias": False},
            "mistral": {**_LLAMA, "qkv_bias": False, "o_bias": False, "mlp_bias": False, "n_full_layers": 0},
            "llama": {**_LLAMA, "o_bias": self.qkv_bias, "sliding_window": None},
            "qwen3_moe": {**_LLAMA, "qk_norm": True, "o_bias": self.qkv_bias, "mlp_bias": False, "n_full_layers": 0},
            "qwen2_moe": {
                **_LLAMA, "qkv_bias": True, "o_bias": False, "mlp_bias": False, "sliding_window": None,
                "width_of_head": self.d_model / self.n_heads,
            },
        }[family]  # fmt: skip
        wrong = {key: asked for key, asked in fixed.items() if getattr(self, key) != asked}
        if family in ("llama", "eurobert") and self.d_model % self.n_heads:
            wrong["d_model"] = f"a multiple of n_heads ({self.n_heads})"
        if wrong:
            names = {"kv_heads": "n_kv_heads", "width_of_head": "head_dim"}
            has = ", ".join(
                f"{names.get(key, key)} {_written(asked)} (here {_written(getattr(self, key))})"
                for key, asked in wrong.items()
            )
            raise ValueError(
                f"no Hugging Face class expresses this model; the nearest is {_TITLES[family]}, which has {has}"
            )
        return family

    def _nearest(self) -> Family:
        """The family that shares the options which set families apart."""
        if self.experts is not None:
            return "qwen3_moe" if self.experts.shared_d_ff is None else "qwen2_moe"
        if [self.positions, self.norm, self.mlp] != ["rope", "rmsnorm", "swiglu"]:
            return "gpt2"
        if not self.causal:
            return "eurobert"
        if self.qk_norm:
            return "qwen3"
        if (self.qkv_bias and not self.o_bias) or (
            self.sliding_window is not None and (self.qkv_bias or self.n_full_layers)
        ):
            return "qwen2"
        return "llama" if self.sliding_window is None else "mistral"


class LoraConfig(Config):
    """Trains small matrices beside a model's own, which stay as they are: W x + scale B A x (LoRA, Hu et al. 2021, arXiv
    2106.09685). Saved as PEFT saves it."""

    r: int = Field(16, ge=1)
    """Rank of the update: A is r wide, B r narrow."""
    alpha: float = Field(32.0, gt=0)
    """The update is multiplied by alpha / r, so that r can change without a new rate."""
    rslora: bool = False
    """By alpha / sqrt(r) instead, which suits large r (arXiv 2312.03732)."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Probability of dropping an input of A in training."""
    targets: tuple[str, ...] = ()
    """Matrices that get an update: names (`q_proj`, `self_attn`, `layers.0-3.mlp`) or globs (`layers.*.mlp.*_proj`).
    Default: all linear matrices of the blocks; experts and their routers never have one."""
    dora: bool = False
    """Direction and size of each row of the matrix are trained apart (DoRA, arXiv 2402.09353)."""
    quantize: Literal["nf4"] | None = None
    """The matrices with an update are kept in 4 bits while training (QLoRA, arXiv 2305.14314); asks for bitsandbytes."""

    @property
    def scaling(self) -> float:
        """What the update is multiplied by."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)


# What all families but GPT-2 share.
_LLAMA = {"positions": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": False, "causal": True}
_TITLES = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gpt2": "GPT-2", "eurobert": "EuroBERT",
    "qwen2_moe": "Qwen2-MoE (experts with a shared one)", "qwen3_moe": "Qwen3-MoE (experts without a shared one)",
}  # fmt: skip


def _written(value: Any) -> str:
    """As it would stand in a recipe."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- parameters ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParamCount:
    """Parameters of a model, and of those: of its embeddings (with an untied head), of its blocks' matrices, the ones
    that a token meets, which are all but the experts it is not sent to, and those of the experts it may be sent to."""

    total: int
    embedding: int
    hidden: int
    active: int
    experts: int


def count_params(config: GPTConfig) -> ParamCount:
    """Counted in time and memory that do not grow with the model: the shape may be a lie.

    On Python's integers, because PyTorch refuses sizes beyond 2^63 with an error of its own. `hidden` is what Muon
    updates, routers are none of it; without a vocab_size the embeddings of tokens count as none.
    """
    D, E = config.d_model, config.width_of_head
    q, kv = config.n_heads * E, config.kv_heads * E
    norm = D * (2 if config.norm == "layernorm" else 1)
    attention = 2 * D * (q + kv)
    attention_vectors = (q + 2 * kv) * config.qkv_bias + D * config.o_bias + 2 * E * config.qk_norm
    mlp, mlp_vectors = _count_mlp(config)
    embedding = (config.vocab_size or 0) * D * (1 if config.tie_embeddings else 2)
    embedding += config.max_seq_len * D * (config.positions == "learned")
    n_dense, routed, unused, routers = config.n_layers - config.n_expert_layers, 0, 0, 0
    hidden = config.n_layers * attention + n_dense * mlp
    if (experts := config.experts) is not None:
        every_expert = 3 * D * (experts.n * experts.d_ff + (experts.shared_d_ff or 0))
        hidden += config.n_expert_layers * every_expert
        routers = config.n_expert_layers * D * (experts.n + (experts.shared_d_ff is not None))
        routed = config.n_expert_layers * 3 * D * experts.d_ff * experts.n
        unused = routed // experts.n * (experts.n - experts.n_active)
    vectors = config.n_layers * (attention_vectors + 2 * norm) + n_dense * mlp_vectors + norm
    total = hidden + routers + vectors + embedding
    return ParamCount(total, embedding, hidden, total - unused, routed)


def _count_mlp(config: GPTConfig) -> tuple[int, int]:
    """(weights of the matrices, biases) of one block's MLP."""
    D, F = config.d_model, config.width_of_mlp
    into = 2 if config.mlp == "swiglu" else 1  # gate and up, or up alone
    return (into + 1) * D * F, (into * F + D) * config.mlp_bias
