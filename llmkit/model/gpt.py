"""The whole network: attention, MLP, block, GPT, initial weights, KV cache.

Parameters are named and kept apart as in Hugging Face's Llama (`model.layers.0.self_attn.q_proj.weight`), so that
per-matrix methods (LoRA, Muon) find their matrices; `layouts` makes the state dict a Hugging Face checkpoint.

Shapes: B batch, T positions of this call, S positions attended to, D d_model, H query heads, K key/value heads, E head
width, F MLP width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmkit.config import UserError
from llmkit.model.config import GPTConfig
from llmkit.model.context import PartMask, RowPart
from llmkit.model.first import Values, give
from llmkit.model.layouts import config_of, use_layout
from llmkit.model.moe import LayerRouting, MoE, Routing, gather_routing, set_load
from llmkit.model.rope import Rope, rope_tables, rotate
from llmkit.model.sequence import SequenceParallel, Shape
from llmkit.products import Linear, linear


def window_of(config: GPTConfig, layer: int) -> int | None:
    """How many tokens a block's attention sees, the token itself included; None: all."""
    return config.sliding_window if layer >= config.n_full_layers else None


_CACHE_PIECE = 64  # columns by which a cache grows


class KVCache:
    """Keys and values of the positions seen so far: buffers of which the first `length` columns are filled.

    They grow a piece at a time, so that attention over all their columns costs little more than over the filled ones.
    """

    def __init__(
        self, config: GPTConfig, batch: int, max_len: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ):
        shape = (config.n_layers, batch, config.kv_heads, 0, config.width_of_head)
        self.k_LBKSE = torch.zeros(shape, dtype=dtype, device=device)
        self.v_LBKSE = torch.zeros(shape, dtype=dtype, device=device)
        self.length, self.max_len = 0, max_len
        self.windows = [window_of(config, layer) for layer in range(config.n_layers)]

    def reserve(self, T: int) -> None:
        """Makes room for T more columns."""
        end = self.length + T
        if end <= self.k_LBKSE.shape[3]:
            return
        n_columns = max(end, min(self.max_len, -(-end // _CACHE_PIECE) * _CACHE_PIECE))
        for name in ("k_LBKSE", "v_LBKSE"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros(*old.shape[:3], n_columns, old.shape[4])
            new[:, :, :, : self.length] = old[:, :, :, : self.length]
            setattr(self, name, new)

    def append(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Stores T new columns of one layer and returns its filled ones, from the first that any of the T may see."""
        self.reserve(k_BKTE.shape[2])
        end, window = self.length + k_BKTE.shape[2], self.windows[layer]
        first = 0 if window is None else max(0, self.length + 1 - window)
        self.k_LBKSE[layer, :, :, self.length : end] = k_BKTE
        self.v_LBKSE[layer, :, :, self.length : end] = v_BKTE
        return self.k_LBKSE[layer, :, :, first:end], self.v_LBKSE[layer, :, :, first:end]

    def whole(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """All columns of a layer, also those not yet filled, which hold zeros; None if they are not in one piece."""
        return self.k_LBKSE[layer], self.v_LBKSE[layer]

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


def norm_of(config: GPTConfig) -> nn.Module:
    """A norm over the residual stream; PyTorch computes both kinds in fp32 or better."""
    if config.norm == "layernorm":
        return nn.LayerNorm(config.d_model, config.norm_eps)
    return RMSNorm(config.d_model, config.norm_eps)


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019, arXiv 1910.07467); PyTorch takes the mean square in fp32 or better."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


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
    """Multi-head, grouped-query or multi-query attention, with rotary positions unless they are learned."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        D, E = config.d_model, config.width_of_head
        self.layer, self.head_dim = layer, E
        self.groups = config.n_heads // config.kv_heads
        self.q_proj = Linear(D, config.n_heads * E, bias=config.qkv_bias)
        self.k_proj = Linear(D, config.kv_heads * E, bias=config.qkv_bias)
        self.v_proj = Linear(D, config.kv_heads * E, bias=config.qkv_bias)
        self.o_proj = Linear(config.n_heads * E, D, bias=config.o_bias)
        self.q_norm = RMSNorm(E, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(E, config.norm_eps) if config.qk_norm else nn.Identity()
        self.dropout = config.dropout
        self.tap: Callable[[Tensor, Tensor, Tensor], None] | None = None  # shown q, k and v; see `distill.layers`

    def forward(
        self, x_BTD: Tensor, rope: Rope | None, mask: Tensor | PartMask | None, causal: bool, cache: KVCache | None
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        q = self.q_norm(self.q_proj(x_BTD).view(B, T, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x_BTD).view(B, T, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x_BTD).view(B, T, -1, self.head_dim).transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if self.tap is not None:
            self.tap(q, k, v)
        if isinstance(mask, PartMask):
            if mask.again and torch.is_grad_enabled():
                out = checkpoint(self._attend_part, q, k, v, mask, use_reentrant=False)
            else:
                out = self._attend_part(q, k, v, mask)
        else:
            if cache is not None:
                k, v = cache.append(self.layer, k, v)
                mask = mask if mask is None else mask[..., -k.shape[2] :]
            out = attend(q, *self._repeated(k, v), mask, causal, self.dropout if self.training else 0.0)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))

    def _repeated(self, k_BKSE: Tensor, v_BKSE: Tensor) -> tuple[Tensor, Tensor]:
        """For every query head its keys and values."""
        if self.groups == 1:
            return k_BKSE, v_BKSE
        return k_BKSE.repeat_interleave(self.groups, dim=1), v_BKSE.repeat_interleave(self.groups, dim=1)

    def _attend_part(self, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, mask: PartMask) -> Tensor:
        """Attention of a part of the rows' positions to all of them."""
        k, v = self._repeated(*mask.context.whole(k_BKTE, v_BKTE))
        dropout = self.dropout if self.training else 0.0
        chunks = zip(q_BHTE.chunk(2, dim=2), mask.chunks, strict=True)
        return torch.cat(
            [attend(q, k[:, :, :end], v[:, :, :end], seen, False, dropout) for q, (end, seen) in chunks], 2
        )


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202), or GPT-2's down(gelu(up(x)))."""

    def __init__(self, config: GPTConfig, width: int):
        super().__init__()
        D, bias = config.d_model, config.mlp_bias
        self.gated = config.mlp == "swiglu"
        if self.gated:
            self.gate_proj = Linear(D, width, bias=bias)
        self.up_proj = Linear(D, width, bias=bias)
        self.down_proj = Linear(width, D, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if not self.gated:
            return self.down_proj(F.gelu(self.up_proj(x_BTD), approximate="tanh"))
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.input_layernorm = norm_of(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = norm_of(config)
        self.mlp: MLP | MoE
        if config.experts is not None and config.experts.has_experts(layer):
            self.mlp = MoE(config.experts, config.d_model, lambda width: MLP(config, width))
        else:
            self.mlp = MLP(config, config.width_of_mlp)
        self.dropout = nn.Dropout(config.dropout)
        self.sequence: SequenceParallel | None = None  # where several processes compute rows together

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope | None,
        mask: Tensor | PartMask | None,
        causal: bool,
        cache: KVCache | None,
        shape: Shape | None = None,
    ) -> tuple[Tensor, LayerRouting | None]:
        """`shape`: B and T, where `sequence` says that the stream is this process's positions [P, D]."""

        def attention(normed_BTD: Tensor) -> Tensor:
            return self.self_attn(normed_BTD, rope, mask, causal, cache)

        x_BTD = x_BTD + self._dropped(self._on_whole(attention, self.input_layernorm(x_BTD), shape), shape)
        out = self._on_whole(self.mlp, self.post_attention_layernorm(x_BTD), shape)
        out_BTD, routing = out if isinstance(self.mlp, MoE) else (out, None)
        return x_BTD + self._dropped(out_BTD, shape), routing

    def whole(self, x_BTD: Tensor, shape: Shape | None) -> Tensor:
        """Of the stream all positions."""
        return x_BTD if self.sequence is None or shape is None else self.sequence.whole(x_BTD, shape)

    def _on_whole(self, part: Callable[[Tensor], Any], x_BTD: Tensor, shape: Shape | None) -> Any:
        return part(x_BTD) if self.sequence is None or shape is None else self.sequence.on_whole(part, x_BTD, shape)

    def _dropped(self, x_BTD: Tensor, shape: Shape | None) -> Tensor:
        return dropped(self.dropout, x_BTD, self.sequence, shape)


def dropped(dropout: nn.Dropout, x_BTD: Tensor, sequence: SequenceParallel | None, shape: Shape | None) -> Tensor:
    """Dropout of the residual stream, whole or cut by position."""
    if sequence is None or shape is None or not dropout.training or dropout.p == 0:
        return dropout(x_BTD)
    return sequence.dropout(x_BTD, dropout.p, shape)


def parallel_plan() -> dict[str, str]:
    """How processes that compute a row together share a block, by the module's name in it (see `model.sequence`).

    | how | what |
    |---|---|
    | `columns` | each has a share of the outputs: rows of the weight, and of the bias |
    | `rows` | each has a share of the inputs: columns of the weight; their outputs are added up, then the bias |
    | `partial` | whole for each, but it sees a share of the heads or of the positions: its gradient is the sum of theirs |
    """
    plan = {"self_attn.o_proj": "rows", "mlp.down_proj": "rows"}
    plan |= {f"self_attn.{name}": "columns" for name in ("q_proj", "k_proj", "v_proj")}
    plan |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), "partial")
    plan |= {f"self_attn.{name}": "partial" for name in ("q_norm", "k_norm")}
    return plan | {f"mlp.{name}": "columns" for name in ("gate_proj", "up_proj")}


class Decoder(nn.Module):
    """Embeddings, blocks and final norm: everything but a head, beside which it is always named `model`."""

    def __init__(self, config: GPTConfig, activation_checkpointing: bool):
        super().__init__()
        assert config.vocab_size is not None, "vocab_size is filled in before a model is built"
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_seq_len, config.d_model)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = norm_of(config)
        self.dropout = nn.Dropout(config.dropout)
        self.routing: Routing | None = None  # where the last forward pass in training sent its tokens
        self.sequence: SequenceParallel | None = None  # where several processes compute rows together
        self.pending: list[Values] = []  # see `first`: values of this and its head while they have no memory

    def share_rows(self, sequence: SequenceParallel) -> None:
        """Cuts the stream from the embeddings to the final norm by position; matrices as `parallel_plan` says."""
        self.sequence = sequence
        for block in self.layers:
            assert isinstance(block, Block)
            block.sequence = sequence

    def forward(
        self, ids_BT: Tensor, positions_BT: Tensor, mask: Tensor | RowPart | None, causal: bool, cache: KVCache | None
    ) -> Tensor:
        """Arguments as in `GPT.forward`; `causal`: where there is no mask, tokens see what comes before them."""
        x_BTD, rope = self.embed_tokens(ids_BT), None
        if self.config.positions == "learned":
            x_BTD = x_BTD + self.embed_positions(self._checked(positions_BT))
        else:
            rope = rope_tables(self.config, positions_BT)
            if x_BTD.dtype == torch.float64:
                rope = (rope[0].double(), rope[1].double())
        shape: Shape | None = None
        if self.sequence is not None:
            shape, x_BTD = (ids_BT.shape[0], ids_BT.shape[1]), self.sequence.own(x_BTD)
        x_BTD = dropped(self.dropout, x_BTD, self.sequence, shape)
        start = 0 if cache is None else cache.length
        masks: tuple[Tensor | PartMask | None, Tensor | PartMask | None]
        if isinstance(mask, RowPart):
            masks = part_masks(self.config, mask, causal, again=not self.activation_checkpointing)
        else:
            masks = layer_masks(self.config, start, ids_BT.shape[1], mask, causal, ids_BT.device)
        routings = []
        for i, block in enumerate(self.layers):
            args = (x_BTD, rope, masks[i >= self.config.n_full_layers], causal, cache, shape)
            if self.activation_checkpointing and self.training:
                x_BTD, routing = checkpoint(block, *args, use_reentrant=False)
            else:
                x_BTD, routing = block(*args)
            if routing is not None:
                routings.append(routing)
        self.routing = None if self.config.experts is None else gather_routing(routings, self.config.experts.n)
        x_BTD = self.norm(x_BTD)
        return x_BTD if self.sequence is None or shape is None else self.sequence.whole(x_BTD, shape)

    def set_expert_load(self, counts_LE: Tensor) -> None:
        """Gives the blocks with experts the load of the step before: `Routing.loss`'s counts, summed over that step."""
        set_load(self.layers, counts_LE)

    def _checked(self, positions_BT: Tensor) -> Tensor:
        """The positions, if all have an embedding. On a GPU the lookup asserts it: looking here would wait for the GPU."""
        longest = self.config.max_seq_len
        if not positions_BT.is_cuda and positions_BT.numel() and (last := int(positions_BT.max())) >= longest:
            raise UserError(
                f"position {last} has no embedding: with positions: learned, max_seq_len {longest} is the end"
            )
        return positions_BT


class GPT(nn.Module):
    """A language model. `forward` gives hidden states; `logits` and the chunked losses turn them into words."""

    def __init__(self, config: GPTConfig, activation_checkpointing: bool = False):
        """Allocates the model, unless on the meta device; call `init_weights` or load a checkpoint before use."""
        super().__init__()
        self.config = config
        self.model = Decoder(config, activation_checkpointing)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.d_model, self.model.embed_tokens.num_embeddings, bias=False)
        use_layout(self, config)

    @property
    def head_weight(self) -> Tensor:
        """The output embedding [V, D]: the input embedding itself when they are tied."""
        return self.model.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    @property
    def routing(self) -> Routing | None:
        """Where the last forward pass in training sent its tokens; None without experts, and in evaluation."""
        return self.model.routing

    def set_expert_load(self, counts_LE: Tensor) -> None:
        """See `Decoder.set_expert_load`."""
        self.model.set_expert_load(counts_LE)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token [..., V] in fp32 or better."""
        scores = linear(hidden, self.head_weight)
        return scores if scores.dtype == torch.float64 else scores.float()

    def forward(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor | None = None,
        mask: Tensor | RowPart | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [B, T, D].

        Args:
            ids_BT: token ids.
            positions_BT: position of each token in its document. Default: counted on from the cache's length.
            mask: bool [B or 1, 1, T, S], True where a query may attend; default: to itself and everything before, or
                if the model is not causal to everything. A sliding window narrows either. A RowPart: these are some of
                the positions of longer rows, of which other processes compute the rest at the same time.
            cache: receives the keys and values of these tokens; S is then its length after this call.

        Raises:
            ValueError: if the cache cannot hold T more tokens, or the model is not causal and can't have one; if a
                position has no embedding.
        """
        T = ids_BT.shape[1]
        start = 0 if cache is None else cache.length
        if cache is not None and not self.config.causal:
            raise UserError("a model with causal: false fills in masked tokens: it cannot generate text")
        if cache is not None and start + T > cache.max_len:
            raise ValueError(f"the cache holds {cache.max_len} positions, {start} are filled: {T} more do not fit")
        if positions_BT is None:
            positions_BT = torch.arange(start, start + T, device=ids_BT.device)[None]
        hidden_BTD = self.model(ids_BT, positions_BT, mask, self.config.causal and T > 1, cache)
        if cache is not None:
            cache.length += T
        return hidden_BTD


def causal_mask(start: int, T: int, device: torch.device, window: int | None = None) -> Tensor:
    """Which columns T tokens from column `start` on may see, [1, 1, T, start + T]: up to their own, the last `window`."""
    columns_S = torch.arange(start + T, device=device)
    own_T1 = columns_S[start:, None]
    seen_TS = columns_S <= own_T1
    return (seen_TS if window is None else seen_TS & (columns_S > own_T1 - window))[None, None]


def layer_masks(
    config: GPTConfig, start: int, T: int, mask: Tensor | None, causal: bool, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """The masks of layers that see everything, and of those with a sliding window, for T tokens from column `start` on.

    `mask` is the caller's, as in `GPT.forward`; None stands for what `attend` does without one.
    """
    if mask is None and causal and start and T > 1:
        mask = causal_mask(start, T, device)
    window, near = config.sliding_window, mask
    if window is not None and start + T > window and T > 1:  # of a single token, the cache gives what it may see
        near = causal_mask(start, T, device, window)
        near = near if mask is None else near & mask
    return mask, near


def part_masks(config: GPTConfig, part: RowPart, causal: bool, again: bool) -> tuple[PartMask, PartMask]:
    """As `layer_masks`, for a part of the rows' positions; `again` as in `PartMask`."""
    whole, window = part_mask(part, causal, None, again), config.sliding_window
    return whole, whole if window is None else part_mask(part, causal, window, again)


def part_mask(part: RowPart, causal: bool, window: int | None, again: bool = True) -> PartMask:
    """What the positions of a part of the rows may see of the whole rows."""
    docs_BS, S = part.docs_BS, part.docs_BS.shape[1]
    needs_documents = not (part.one_document if causal else part.full)
    chunks: list[tuple[int, Tensor | None]] = []
    for first, end in part.context.spans(S):
        seen = causal_mask(first, end - first, docs_BS.device, window) if causal else None
        until = end if causal else S
        if needs_documents:
            same = (docs_BS[:, first:end, None] == docs_BS[:, None, :until])[:, None]
            seen = same if seen is None else seen & same
        chunks.append((until, seen))
    return PartMask(part.context, tuple(chunks), again)


def document_mask(docs_BT: Tensor, causal: bool = True) -> Tensor:
    """Which positions may see which, [B, 1, T, T]: those of the same document (numbers as in `data.loader.Batch`).

    `causal`: only earlier ones, and itself.
    """
    T = docs_BT.shape[1]
    same_BTT = docs_BT[:, :, None] == docs_BT[:, None, :]
    if causal:
        same_BTT = same_BTT & torch.ones(T, T, dtype=torch.bool, device=docs_BT.device).tril()
    return same_BTT[:, None]


def init_weights(model: nn.Module, seed: int) -> None:
    """Sets every parameter once, from a generator of its own. `model` is a GPT, or another head beside a Decoder; while it
    has no memory, its values wait (see `first`).

    | parameter | value |
    |---|---|
    | embeddings (also of positions), head, q, k, v, gate, up, routers | normal, std 0.02 |
    | o_proj, down_proj (they write to the residual stream) | normal, std 0.02 / sqrt(2 n_layers) (GPT-2) |
    | norm weights | 1 |
    | biases | 0 |
    """
    residual_std = 0.02 / math.sqrt(2 * config_of(model).n_layers)
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def values() -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            if name.endswith("norm.weight"):
                yield name, torch.ones(shape)
            elif name.endswith(".bias"):
                yield name, torch.zeros(shape)
            else:
                assert len(shape) == 2, f"{name} has no initial value"
                std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                # Drawn in fp32 on the CPU, so that every precision and device starts from the same numbers.
                yield name, torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)

    give(model, values)
