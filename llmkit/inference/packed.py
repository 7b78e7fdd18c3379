"""The network as it writes: the same sums as `GPT.forward`, laid out for few tokens at a time.

Matrices that read the same input are one (q, k and v; gate and up), packed once for as long as the weights stay as they
are; what is the same in all layers (angles, masks) is computed once a step; and heads that share keys are not copied.

Shapes: B rows, T tokens of this call, M = B * T, S columns attended to, D d_model, H query heads, K key/value heads,
G = H / K, E head width, V vocabulary.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.model.gpt import GPT, MLP, Block, KVCache, RMSNorm, attend, layer_masks
from llmkit.model.rope import rope_tables
from llmkit.products import Linear, PackedMatrix, can_pack

WORTH_TOKENS = 64
"""Packing takes about as long as it saves in writing so many tokens (fp32, one row; less in bf16 and for several rows)."""
_MEMORY_SHARE = 8  # packed weights may take this part of the machine's memory: all of it, for what is free changes


class Network(Protocol):
    """What gives scores of the next tokens: a GPT, or the same packed."""

    def forward(
        self, ids_BT: Tensor, positions_BT: Tensor | None, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """See `GPT.forward`. Not `__call__`: a trainer may have compiled a module in place, for other shapes."""

    def logits(self, hidden: Tensor) -> Tensor:
        """See `GPT.logits`."""


def network_of(model: GPT, n_tokens: int, n_rows: int) -> Network:
    """What is faster for writing about n_tokens in so many rows: the model itself, or a packed copy.

    A copy doesn't see later changes of the weights.

    Which it is depends on nothing but the model, the numbers and the machine, so that a text written again is the same.
    """
    if type(model) is not GPT or n_tokens < WORTH_TOKENS or not can_pack(model.get_parameter("model.norm.weight")):
        return model
    n_bytes = sum(p.nbytes for p in model.parameters())
    if torch.is_autocast_enabled("cpu") or n_bytes * _MEMORY_SHARE > _memory():
        return model
    return Packed(model, n_rows)


def _memory() -> int:
    """Bytes of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62


class _Product:
    """One or several layers that read the same input, as a single matrix where all of them are plain."""

    def __init__(self, n_rows: int, *parts: nn.Module):
        self._parts, self._matrix = parts, None
        plain = [p for p in parts if type(p) is Linear and can_pack(p.weight)]
        weights: list[Tensor] = [p.weight for p in plain]
        biases: list[Tensor] = [p.bias for p in plain if p.bias is not None]
        if len(plain) == len(parts) and len(biases) in (0, len(parts)):
            self._matrix = PackedMatrix(torch.cat(weights), torch.cat(biases) if biases else None, n_rows)

    def __call__(self, x_MK: Tensor) -> Tensor:
        if self._matrix is not None:
            return self._matrix(x_MK)
        outs: list[Tensor] = [part(x_MK) for part in self._parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)

    def plus(self, x_MK: Tensor, more_MN: Tensor) -> Tensor:
        """The product with something added."""
        return more_MN + self(x_MK) if self._matrix is None else self._matrix.plus(x_MK, more_MN)


class _Norm:
    """A norm over the last dimension. That of fp32 in four kernels: `F.rms_norm` takes eight on a CPU."""

    def __init__(self, module: nn.Module):
        self._module = module
        self._by_length = isinstance(module, RMSNorm) and module.weight.dtype == torch.float32
        if isinstance(module, RMSNorm):
            width = module.weight.numel()
            self._weight = module.weight.detach() * width**0.5
            self._least = torch.tensor((width * module.eps) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        if not self._by_length:
            out: Tensor = self._module(x)
            return out
        # x / sqrt(mean(x^2) + eps) = sqrt(n) x / sqrt(|x|^2 + n eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x / torch.hypot(length, self._least)).mul_(self._weight)


@dataclass(frozen=True)
class _Step:
    """What all layers of one forward pass share."""

    B: int
    T: int
    angles: tuple[Tensor, Tensor] | None
    cache: KVCache
    is_whole: bool
    """Whether attention looks at all columns of the cache, also empty ones, which the masks hide."""


class _Layer:
    """A block."""

    def __init__(self, block: nn.Module, window: bool, n_rows: int):
        assert isinstance(block, Block)
        attention, mlp = block.self_attn, block.mlp
        self.window = window
        self._layer, self._head_dim, self._groups = attention.layer, attention.head_dim, attention.groups
        self._qkv = _Product(n_rows, attention.q_proj, attention.k_proj, attention.v_proj)
        self._o = _Product(n_rows, attention.o_proj)
        self._n_q, self._n_kv = attention.q_proj.out_features, attention.k_proj.out_features
        self._has_head_norm = isinstance(attention.q_norm, RMSNorm)
        self._q_norm, self._k_norm = _Norm(attention.q_norm), _Norm(attention.k_norm)
        self._norms = _Norm(block.input_layernorm), _Norm(block.post_attention_layernorm)
        self._mlp = mlp
        if isinstance(mlp, MLP):
            self._up = _Product(n_rows, mlp.gate_proj, mlp.up_proj) if mlp.gated else _Product(n_rows, mlp.up_proj)
            self._down = _Product(n_rows, mlp.down_proj)

    def __call__(self, x_MD: Tensor, mask: Tensor | None, step: _Step) -> Tensor:
        x_MD = self._o.plus(self._attention(self._norms[0](x_MD), mask, step), x_MD)
        normed_MD = self._norms[1](x_MD)
        mlp = self._mlp
        if not isinstance(mlp, MLP):  # experts: each token goes its own way
            return x_MD + mlp(normed_MD.view(step.B, step.T, -1))[0].view_as(x_MD)
        up = self._up(normed_MD)
        if not mlp.gated:
            return self._down.plus(F.gelu(up, approximate="tanh"), x_MD)
        gate_MF, up_MF = up.chunk(2, -1)
        return self._down.plus(F.silu(gate_MF).mul_(up_MF), x_MD)

    def _attention(self, x_MD: Tensor, mask: Tensor | None, step: _Step) -> Tensor:
        """The heads' outputs side by side, [M, H * E]."""
        B, T, E = step.B, step.T, self._head_dim
        qkv = self._qkv(x_MD)
        qk_MHE = qkv[:, : self._n_q + self._n_kv].view(B * T, -1, E)
        H = self._n_q // E
        if self._has_head_norm:
            qk_MHE = torch.cat((self._q_norm(qk_MHE[:, :H]), self._k_norm(qk_MHE[:, H:])), 1)
        if step.angles is not None:
            cos_M1E, sin_M1E = step.angles
            # (-right, left) of `rope.rotate` is (right, left) with the first half of the sines negative.
            turned = torch.addcmul(qk_MHE * cos_M1E, qk_MHE.roll(E // 2, -1), sin_M1E)
            qk_MHE = turned if turned.dtype == qkv.dtype else turned.to(qkv.dtype)
        q_BTHE = qk_MHE[:, :H].view(B, T, H, E)
        k_BKTE = qk_MHE[:, H:].view(B, T, -1, E).transpose(1, 2)
        v_BKTE = qkv[:, self._n_q + self._n_kv :].view(B, T, -1, E).transpose(1, 2)
        k_BKSE, v_BKSE = step.cache.append(self._layer, k_BKTE, v_BKTE)
        if step.is_whole:
            k_BKSE, v_BKSE = step.cache.whole(self._layer) or (k_BKSE, v_BKSE)
        mask = None if mask is None else mask[..., -k_BKSE.shape[2] :]
        if T == 1:
            return attend_once(q_BTHE[:, 0], k_BKSE, v_BKSE, mask).reshape(B, -1)
        if self._groups > 1:
            k_BKSE, v_BKSE = (x.repeat_interleave(self._groups, dim=1) for x in (k_BKSE, v_BKSE))
        out_BHTE = attend(q_BTHE.transpose(1, 2), k_BKSE, v_BKSE, mask, T > 1, 0.0)
        return out_BHTE.transpose(1, 2).reshape(B * T, -1)


def attend_once(q_BHE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask_B11S: Tensor | None) -> Tensor:
    """Softmax attention of one query a row, [B, H, E]; heads that share keys read them once. Softmax in fp32.

    As plain products: PyTorch's fused attention computes tiles of queries, which is several times slower in bf16.
    """
    B, K, S, E = k_BKSE.shape
    q_NGE = q_BHE.reshape(B * K, -1, E)
    k_NSE, v_NSE = k_BKSE.reshape(B * K, S, E), v_BKSE.reshape(B * K, S, E)
    scores_NGS = (q_NGE @ k_NSE.transpose(1, 2)).float()
    scores_NGS.mul_(E**-0.5)
    if mask_B11S is not None:
        scores_NGS.view(B, -1, S).masked_fill_(~mask_B11S[:, 0], float("-inf"))
    weights_NGS = scores_NGS.softmax(-1).to(v_NSE.dtype)
    return (weights_NGS @ v_NSE).view(B, -1, E)


class Packed:
    """A model's weights, packed for as long as they stay as they are. For inference only; dropout does not exist here."""

    def __init__(self, model: GPT, n_rows: int = 32):
        """Copies the matrices, for so many rows.

        Those that are not plain (adapters, quantised ones, experts) are computed by their modules.
        """
        config, decoder = model.config, model.model
        self._model, self.config = model, config
        self._layers = [_Layer(block, i >= config.n_full_layers, n_rows) for i, block in enumerate(decoder.layers)]
        self._norm = _Norm(decoder.norm)
        self._head = PackedMatrix(model.head_weight, None, n_rows) if can_pack(model.head_weight) else None
        self._angles_PE: tuple[Tensor, Tensor] | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token [..., V], fp32."""
        if self._head is None:
            return self._model.logits(hidden)
        return self._head(hidden.reshape(-1, hidden.shape[-1])).view(*hidden.shape[:-1], -1).float()

    def forward(
        self, ids_BT: Tensor, positions_BT: Tensor | None, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """Hidden states after the final norm [B, T, D], as `GPT.forward` gives them; a cache is needed."""
        assert cache is not None and positions_BT is not None
        B, T = ids_BT.shape
        start = cache.length
        if start + T > cache.max_len:
            raise ValueError(f"the cache holds {cache.max_len} positions, {start} are filled: {T} more do not fit")
        decoder = self._model.model
        x_MD = decoder.embed_tokens(ids_BT.flatten())
        positions_M = positions_BT.expand(B, T).flatten()
        if self.config.positions == "learned":
            x_MD = x_MD + decoder.embed_positions(positions_M)
        cache.reserve(T)
        # Products in bf16 copy what is not in one piece, so that empty columns cost less than leaving them out.
        is_whole = T == 1 and x_MD.dtype == torch.bfloat16 and cache.whole(0) is not None
        masks = layer_masks(self.config, start, T, mask, T > 1, ids_BT.device)
        full, near = self._whole_masks(mask, cache) if is_whole else masks
        step = _Step(B, T, self._angles_of(positions_M, cache.max_len), cache, is_whole)
        for layer in self._layers:
            x_MD = layer(x_MD, near if layer.window else full, step)
        cache.length += T
        return self._norm(x_MD).view(B, T, -1)

    def _whole_masks(self, mask: Tensor | None, cache: KVCache) -> tuple[Tensor, Tensor]:
        """`gpt.layer_masks` for one more token of every row and all columns of the cache."""
        columns_S = torch.arange(cache.k_LBKSE.shape[3], device=cache.k_LBKSE.device)
        full = (columns_S <= cache.length)[None, None, None]
        if mask is not None:
            full = full & F.pad(mask, (0, len(columns_S) - mask.shape[-1]))
        window = self.config.sliding_window
        return full, full if window is None else full & (columns_S > cache.length - window)

    def _angles_of(self, positions_M: Tensor, n_columns: int) -> tuple[Tensor, Tensor] | None:
        """cos and sin [M, 1, E] of the positions, which lie before n_columns; of the sines' first half the negative."""
        if self.config.positions == "learned":
            return None
        if self._angles_PE is None or len(self._angles_PE[0]) < n_columns:
            cos, sin = rope_tables(self.config, torch.arange(n_columns, device=positions_M.device)[None])
            half = sin.shape[-1] // 2
            signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)
            self._angles_PE = cos[0, 0], signed[0, 0]
        cos_PE, sin_PE = self._angles_PE
        return cos_PE.index_select(0, positions_M)[:, None], sin_PE.index_select(0, positions_M)[:, None]
