"""The whole decoder: attention, MLP, block, GPT, initial weights, KV cache.

Parameters are named and kept apart as in Hugging Face's Llama (`model.layers.0.self_attn.q_proj.weight`), so that a
state dict is a Hugging Face checkpoint and per-matrix methods (LoRA, Muon) find their matrices.

Shapes: B batch, T positions of this call, S positions attended to, D d_model, H query heads, K key/value heads, E head
width, F MLP width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmkit.model.config import GPTConfig


class KVCache:
    """Keys and values of the positions seen so far: static buffers of which the first `length` columns are filled."""

    def __init__(
        self, config: GPTConfig, batch: int, max_len: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ):
        shape = (config.n_layers, batch, config.kv_heads, max_len, config.width_of_head)
        self.k_LBKSE = torch.zeros(shape, dtype=dtype, device=device)
        self.v_LBKSE = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def max_len(self) -> int:
        return self.k_LBKSE.shape[3]

    def append(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Stores T new columns of one layer and returns all of its filled ones."""
        end = self.length + k_BKTE.shape[2]
        self.k_LBKSE[layer, :, :, self.length : end] = k_BKTE
        self.v_LBKSE[layer, :, :, self.length : end] = v_BKTE
        return self.k_LBKSE[layer, :, :, :end], self.v_LBKSE[layer, :, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keeps only the given rows of the batch, in this order.

        Rows that stay in their place are not copied, as long as the others come from beyond the new batch's end.
        """
        moves = [(to, at) for to, at in enumerate(rows.tolist()) if to != at]
        for name in ("k_LBKSE", "v_LBKSE"):
            buffer: Tensor = getattr(self, name)
            if any(at < len(rows) for _, at in moves):
                buffer = buffer[:, rows]
            else:
                for to, at in moves:
                    buffer[:, to, :, : self.length] = buffer[:, at, :, : self.length]
                buffer = buffer[:, : len(rows)]
            setattr(self, name, buffer)


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019, arXiv 1910.07467); PyTorch takes the mean square in fp32 or better."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_frequencies(config: GPTConfig, device: torch.device) -> Tensor:
    """Angular frequency of each pair of a head, fp32 [E/2] (arXiv 2104.09864; llama3 scaling as in Llama 3.1)."""
    exponent = torch.arange(0, config.width_of_head, 2, dtype=torch.int64, device=device).float() / config.width_of_head
    freq = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    wavelength = 2 * math.pi / freq
    longest = scaling.original_max_seq_len / scaling.low_freq_factor
    shortest = scaling.original_max_seq_len / scaling.high_freq_factor
    smooth = (scaling.original_max_seq_len / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * freq / scaling.factor + smooth * freq
    return torch.where(wavelength > longest, freq / scaling.factor, torch.where(wavelength < shortest, freq, between))


def rope_tables(config: GPTConfig, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, fp32 [B, 1, T, E]: never in half precision, which is off by whole turns far out."""
    angles = positions_BT[:, None, :, None].float() * rope_frequencies(config, positions_BT.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BHTE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns pairs (i, i + E/2) by their angle, in fp32 or better."""
    left, right = x_BHTE.chunk(2, dim=-1)
    return (x_BHTE * cos + torch.cat((-right, left), dim=-1) * sin).to(x_BHTE.dtype)


# Up to this length the plain product beats PyTorch's fused CPU attention in bf16 (docs/performance.md).
_PLAIN_ATTENTION_MAX_LEN = 512


def attend(q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> Tensor:
    """Softmax attention. `mask` is bool [B or 1, 1, T, S], True where a query may look; softmax in fp32."""
    T, S = q_BHTE.shape[2], k_BHSE.shape[2]
    if not (q_BHTE.device.type == "cpu" and q_BHTE.dtype == torch.bfloat16 and 1 < T <= _PLAIN_ATTENTION_MAX_LEN):
        return F.scaled_dot_product_attention(
            q_BHTE, k_BHSE, v_BHSE, attn_mask=mask, is_causal=causal and mask is None, dropout_p=dropout
        )
    if mask is None and causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q_BHTE.device).tril()
    scores = (q_BHTE @ k_BHSE.transpose(-1, -2)).float() * q_BHTE.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.dropout(scores.softmax(-1), dropout, training=dropout > 0)
    return weights.to(v_BHSE.dtype) @ v_BHSE


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention with rotary positions."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        D, E = config.d_model, config.width_of_head
        self.layer, self.head_dim = layer, E
        self.groups = config.n_heads // config.kv_heads
        self.q_proj = nn.Linear(D, config.n_heads * E, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, config.kv_heads * E, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, config.kv_heads * E, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.n_heads * E, D, bias=config.o_bias)
        self.q_norm = RMSNorm(E, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(E, config.norm_eps) if config.qk_norm else nn.Identity()
        self.dropout = config.dropout

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, causal: bool, cache: KVCache | None
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        q = self.q_norm(self.q_proj(x_BTD).view(B, T, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x_BTD).view(B, T, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x_BTD).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if self.groups > 1:
            k, v = k.repeat_interleave(self.groups, dim=1), v.repeat_interleave(self.groups, dim=1)
        out = attend(q, k, v, mask, causal, self.dropout if self.training else 0.0)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        D, width, bias = config.d_model, config.width_of_mlp, config.mlp_bias
        self.gate_proj = nn.Linear(D, width, bias=bias)
        self.up_proj = nn.Linear(D, width, bias=bias)
        self.down_proj = nn.Linear(width, D, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, causal: bool, cache: KVCache | None
    ) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.self_attn(self.input_layernorm(x_BTD), rope, mask, causal, cache))
        return x_BTD + self.dropout(self.mlp(self.post_attention_layernorm(x_BTD)))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: everything but the output head. Named `model` in Hugging Face's checkpoints."""

    def __init__(self, config: GPTConfig, activation_checkpointing: bool):
        super().__init__()
        assert config.vocab_size is not None, "vocab_size is filled in before a model is built"
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, ids_BT: Tensor, positions_BT: Tensor, mask: Tensor | None, causal: bool, cache: KVCache | None
    ) -> Tensor:
        x_BTD = self.dropout(self.embed_tokens(ids_BT))
        rope = rope_tables(self.config, positions_BT)
        if x_BTD.dtype == torch.float64:
            rope = (rope[0].double(), rope[1].double())
        for block in self.layers:
            if self.activation_checkpointing and self.training:
                x_BTD = checkpoint(block, x_BTD, rope, mask, causal, cache, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rope, mask, causal, cache)
        return self.norm(x_BTD)


class GPT(nn.Module):
    """A decoder-only language model. `forward` gives hidden states; `logits` and the chunked losses turn them into words."""

    def __init__(self, config: GPTConfig, activation_checkpointing: bool = False):
        """Allocates the model; call `init_weights` or load a checkpoint before use."""
        super().__init__()
        self.config = config
        self.model = Decoder(config, activation_checkpointing)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, self.model.embed_tokens.num_embeddings, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The output embedding [V, D]: the input embedding itself when they are tied."""
        return self.model.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token [..., V] in fp32 or better."""
        scores = F.linear(hidden, self.head_weight)
        return scores if scores.dtype == torch.float64 else scores.float()

    def forward(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [B, T, D].

        Args:
            ids_BT: token ids.
            positions_BT: position of each token in its document. Default: counted on from the cache's length.
            mask: bool [B or 1, 1, T, S], True where a query may attend; default: to itself and everything before.
            cache: receives the keys and values of these tokens; S is then its length after this call.

        Raises:
            ValueError: if the cache cannot hold T more tokens.
        """
        T = ids_BT.shape[1]
        start = 0 if cache is None else cache.length
        if cache is not None and start + T > cache.max_len:
            raise ValueError(f"the cache holds {cache.max_len} positions, {start} are filled: {T} more do not fit")
        if positions_BT is None:
            positions_BT = torch.arange(start, start + T, device=ids_BT.device)[None]
        if mask is None and start and T > 1:
            columns = torch.arange(start + T, device=ids_BT.device)
            mask = (columns <= torch.arange(start, start + T, device=ids_BT.device)[:, None])[None, None]
        hidden_BTD = self.model(ids_BT, positions_BT, mask, T > 1, cache)
        if cache is not None:
            cache.length += T
        return hidden_BTD


def document_mask(docs_BT: Tensor) -> Tensor:
    """Which positions may see which, [B, 1, T, T]: earlier ones of the same document (numbers as in `data.loader.Batch`)."""
    T = docs_BT.shape[1]
    same_BTT = docs_BT[:, :, None] == docs_BT[:, None, :]
    return (same_BTT & torch.ones(T, T, dtype=torch.bool, device=docs_BT.device).tril())[:, None]


@torch.no_grad()
def init_weights(model: GPT, seed: int) -> None:
    """Sets every parameter once, from a generator of its own.

    | parameter | value |
    |---|---|
    | embeddings, head, q, k, v, gate, up | normal, std 0.02 |
    | o_proj, down_proj (they write to the residual stream) | normal, std 0.02 / sqrt(2 n_layers) (GPT-2) |
    | norm weights | 1 |
    | biases | 0 |
    """
    generator = torch.Generator().manual_seed(seed)
    residual_std = 0.02 / math.sqrt(2 * model.config.n_layers)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            p.fill_(1.0)
        elif name.endswith(".bias"):
            p.zero_()
        else:
            assert p.dim() == 2, f"{name} has no initial value"
            std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            # Drawn in fp32 on the CPU, so that every precision and device starts from the same numbers.
            p.copy_(torch.empty(p.shape, dtype=torch.float32).normal_(0.0, std, generator=generator))
