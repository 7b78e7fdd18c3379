"""How a family's checkpoint differs from our parameters, and the hooks that make state dicts the checkpoint's.

All families have Llama's names here (`model.layers.0.self_attn.q_proj.weight`), so that Muon, weight decay, freezing
and adapters need one rule. Those of the Llama kind have them on disk too. GPT-2 has names of its own there, keeps q, k
and v in one tensor, and stores its matrices as [in, out].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.model.config import GPTConfig

# module of ours -> module on disk; `*` is the number of the block.
_GPT2 = {
    "model.embed_tokens": "transformer.wte",
    "model.embed_positions": "transformer.wpe",
    "model.norm": "transformer.ln_f",
    "model.layers.*.input_layernorm": "transformer.h.*.ln_1",
    "model.layers.*.self_attn.q_proj": "transformer.h.*.attn.c_attn",
    "model.layers.*.self_attn.k_proj": "transformer.h.*.attn.c_attn",
    "model.layers.*.self_attn.v_proj": "transformer.h.*.attn.c_attn",
    "model.layers.*.self_attn.o_proj": "transformer.h.*.attn.c_proj",
    "model.layers.*.post_attention_layernorm": "transformer.h.*.ln_2",
    "model.layers.*.mlp.up_proj": "transformer.h.*.mlp.c_fc",
    "model.layers.*.mlp.down_proj": "transformer.h.*.mlp.c_proj",
}
_HEADS = ("lm_head.", "score.")  # beside the decoder, under their own names in every family
# Buffers that older writers saved among the weights: causal masks and frequencies, which are computed.
_NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True)
class _Entry:
    """One tensor on disk: the tensors of ours it holds, side by side, and whether it is [in, out]."""

    ours: tuple[str, ...]
    transposed: bool


@lru_cache(maxsize=16)
def _entries(n_layers: int) -> dict[str, _Entry]:
    """Every tensor of a GPT-2 checkpoint but the heads, by its name on disk."""
    entries: dict[str, _Entry] = {}
    for ours, disk in _GPT2.items():
        for layer in range(n_layers if "*" in ours else 1):
            for kind in ("weight", "bias"):
                name = f"{disk}.{kind}".replace("*", str(layer))
                before = entries[name].ours if name in entries else ()
                own = f"{ours}.{kind}".replace("*", str(layer))
                entries[name] = _Entry((*before, own), kind == "weight" and ours.endswith("_proj"))
    return entries


def _layout(config: GPTConfig) -> dict[str, _Entry]:
    return _entries(config.n_layers) if config.family == "gpt2" else {}


def to_disk(config: GPTConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters as the tensors of the family's checkpoint; contiguous, new ones where the layout differs."""
    left, out = dict(tensors), {}
    for name, entry in _layout(config).items():
        pieces = [left.pop(own) for own in entry.ours if own in left]
        if len(pieces) == len(entry.ours):
            whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            out[name] = whole.t().contiguous() if entry.transposed else whole
    return {**out, **left}


def from_disk(config: GPTConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the family's checkpoint, all or some of them, as our parameters: views where the layout differs."""
    layout, out = _layout(config), {}
    for name, tensor in tensors.items():
        entry = layout.get(name)
        if entry is None:
            out[name] = tensor
            continue
        whole = tensor.t() if entry.transposed else tensor
        out.update(zip(entry.ours, whole.chunk(len(entry.ours)), strict=True))
    return out


def canonical_names(config: GPTConfig, names: Iterable[str]) -> dict[str, str]:
    """Names found in a folder -> their names in a checkpoint that our state dict makes; what is no weight is left out.

    A folder may have been saved from the bare decoder, without its prefix (openai-community/gpt2 is).
    """
    prefix = "transformer." if config.family == "gpt2" else "model."
    weights = [name for name in names if not name.endswith(_NOT_WEIGHTS)]
    bare = not any(name.startswith(prefix) for name in weights)
    return {name: prefix + name if bare and not name.startswith(_HEADS) else name for name in weights}


# --- hooks -----------------------------------------------------------------------------------------------------------


def use_layout(module: nn.Module, config: GPTConfig) -> None:
    """Makes `module.state_dict()` the family's checkpoint, and `load_state_dict` take one.

    Args:
        module: holds a `gpt.Decoder` as `.model`, and whatever head beside it.
        config: the decoder's; where names and layouts are the same there is nothing to do.
    """
    if _layout(config):
        module.register_state_dict_post_hook(_saved)
        module.register_load_state_dict_pre_hook(_loaded)


def config_of(module: nn.Module) -> GPTConfig:
    """Of the decoder in a module."""
    config = module.get_submodule("model").config
    assert isinstance(config, GPTConfig)
    return config


def _replace(state: dict[str, Tensor], prefix: str, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    for name in old:
        del state[prefix + name]
    state.update({prefix + name: tensor for name, tensor in new.items()})


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _saved(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    own = _below(state, prefix)
    _replace(state, prefix, own, to_disk(config_of(module), own))


def _loaded(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    found = _below(state, prefix)
    _replace(state, prefix, found, from_disk(config_of(module), found))
