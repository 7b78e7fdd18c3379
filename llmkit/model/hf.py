"""Our models as Hugging Face folders, both ways: config.json and safetensors that plain `transformers` loads.

config.json is written with the keys of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and of 5
(`rope_parameters`, `dtype`): readers of either silently ignore the other's. A key that a config.json leaves out has the
default of its class in transformers. `weights` reads what lies beside it.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any, Literal

import torch

from llmkit.config import UserError, validate
from llmkit.model.adapters import base_of, head_rows, is_adapter, told_config
from llmkit.model.config import (
    ExpertsConfig,
    Family,
    GPTConfig,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
)

log = logging.getLogger(__name__)

Head = Literal["lm", "classify"]
# The class with a vocabulary's head, and the one with scores of whole texts (see `heads`).
ARCHITECTURES: dict[Family, tuple[str, str]] = {
    "llama": ("LlamaForCausalLM", "LlamaForSequenceClassification"),
    "mistral": ("MistralForCausalLM", "MistralForSequenceClassification"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
    "gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    "eurobert": ("EuroBertForMaskedLM", "EuroBertForSequenceClassification"),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeForSequenceClassification"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeForSequenceClassification"),
}
_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop")
_MAX_LABELS = 1_000_000
# Keys of an untrusted config.json that name code; nothing here ever imports them.
_CODE_KEYS = ("auto_map", "model_file", "custom_pipelines")


# --- config.json, written --------------------------------------------------------------------------------------------


def config_to_hf(
    config: GPTConfig, dtype: torch.dtype, ids: dict[str, int], extra: dict[str, Any], *, head: Head = "lm",
    n_labels: int = 1, labels: tuple[str, ...] | None = None, problem_type: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """config.json of a checkpoint.

    Args:
        config: the model's shape, with vocab_size set.
        dtype: of the saved weights.
        ids: bos_token_id, eos_token_id and pad_token_id; of a model that is not causal mask_token_id as well.
        extra: our own facts, kept under the key "llmkit", which transformers ignores.
        head: "classify" has scores of whole texts in place of a vocabulary's head (`heads.SequenceClassifier`).
        n_labels: scores of a classifier; 1 for a reward or a regression.
        labels: the scores' names. Default: LABEL_0, LABEL_1, ... as in transformers.
        problem_type: transformers' name for the loss, by which its pipelines pick softmax, sigmoid or neither. Default:
            regression (the bare score) of one label, single_label_classification of several.

    """
    family = config.family
    lm, classifier = ARCHITECTURES[family]
    hf: dict[str, Any] = {
        "architectures": [lm],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": config.causal,
        "torch_dtype": _DTYPE_NAMES[dtype],
        "dtype": _DTYPE_NAMES[dtype],
        **(_gpt2_keys(config) if family == "gpt2" else _llama_keys(config)),
        **ids,
        "llmkit": extra,
    }
    if head == "classify":
        names = labels or tuple(f"LABEL_{i}" for i in range(n_labels))
        assert len(names) == n_labels, f"{len(names)} labels for {n_labels} scores"
        hf |= {
            "architectures": [classifier],
            "num_labels": n_labels,
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": problem_type or ("regression" if n_labels == 1 else "single_label_classification"),
        }
        if not config.causal:
            hf["classifier_pooling"] = "mean"
    return hf


def _llama_keys(config: GPTConfig) -> dict[str, Any]:
    """The shape, for the families of the Llama kind."""
    family, scaling = config.family, _rope_to_hf(config.rope_scaling)
    hf: dict[str, Any] = {
        "hidden_size": config.d_model,
        "intermediate_size": config.width_of_mlp,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.width_of_head,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": config.dropout,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling if config.rope_scaling is not None else None,
        "rope_parameters": {"rope_theta": config.rope_theta, **scaling},
    }
    if family in ("llama", "qwen3", "qwen3_moe", "eurobert"):
        hf["attention_bias"] = config.qkv_bias
    if family == "qwen2_moe":
        hf["qkv_bias"] = config.qkv_bias
    if family in ("llama", "eurobert"):
        hf["mlp_bias"] = config.mlp_bias
    if family == "mistral":
        hf["sliding_window"] = config.sliding_window
    if family in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"):
        windowed = config.sliding_window is not None
        hf |= {
            "use_sliding_window": windowed,
            "sliding_window": config.sliding_window,
            "max_window_layers": config.n_full_layers if windowed else config.n_layers,
        }
    return hf if config.experts is None else hf | _experts_to_hf(config.experts)


def _experts_to_hf(experts: ExpertsConfig) -> dict[str, Any]:
    hf: dict[str, Any] = {
        "num_experts": experts.n,
        "num_experts_per_tok": experts.n_active,
        "moe_intermediate_size": experts.d_ff,
        "norm_topk_prob": experts.normalize,
        "mlp_only_layers": list(experts.dense_layers),
        "decoder_sparse_step": experts.every,
        "output_router_logits": False,
        # transformers' term takes visits per token for the load, ours the share of all visits: n_active times less.
        "router_aux_loss_coef": experts.balance / experts.n_active,
    }
    if experts.shared_d_ff is not None:
        return hf | {"shared_expert_intermediate_size": experts.shared_d_ff}
    return hf | {"num_local_experts": experts.n}  # what transformers 5 calls it in Qwen3-MoE


def _gpt2_keys(config: GPTConfig) -> dict[str, Any]:
    return {
        "n_embd": config.d_model,
        "n_inner": config.width_of_mlp,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_positions": config.max_seq_len,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        **dict.fromkeys(_DROPOUTS, config.dropout),
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
    }


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    hf: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if isinstance(scaling, LinearScaling):
        return hf
    hf["original_max_position_embeddings"] = scaling.original_max_seq_len
    if isinstance(scaling, Llama3Scaling):
        return hf | {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    hf |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
    return hf if scaling.attention_factor is None else hf | {"attention_factor": scaling.attention_factor}


# --- config.json, read -----------------------------------------------------------------------------------------------

# What transformers' classes fill in for a key that is left out, where it isn't what we do.
_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_EXPERTS = {
    "max_position_embeddings": 32768, "sliding_window": 4096, "norm_topk_prob": False, "decoder_sparse_step": 1,
    "mlp_only_layers": None, "router_aux_loss_coef": 0.001,
}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "eurobert": {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5},
    "qwen2_moe": {
        **_EXPERTS,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "qwen3_moe": {
        **_EXPERTS,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "gpt2": {
        "n_positions": 1024,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        **dict.fromkeys(_DROPOUTS, 0.1),
        "tie_word_embeddings": True,
    },
}
_GPT2_ONLY = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def config_from_hf(hf: dict[str, Any], name: str = "config.json") -> GPTConfig:
    """The shape that a config.json describes.

    Raises:
        UserError: for another architecture, or an option that our model does not compute.
    """
    family = hf.get("model_type")
    if family not in ARCHITECTURES:
        raise UserError(f"{name}: model_type {family!r} is not supported: {', '.join(ARCHITECTURES)} are")
    hf = {**_DEFAULTS[family], **hf}
    try:
        data = _read_gpt2(hf, name) if family == "gpt2" else _read_llama(hf, name)
        data |= {"vocab_size": hf["vocab_size"], "tie_embeddings": bool(hf.get("tie_word_embeddings", False))}
    except UserError:
        raise
    except KeyError as e:
        raise UserError(f"{name}: key {e} is missing") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as e:
        raise UserError(f"{name}: {e}") from None
    config: GPTConfig = validate(GPTConfig, data, {(): name})
    return config


def _read_llama(hf: dict[str, Any], name: str) -> dict[str, Any]:
    family = hf["model_type"]
    if (act := hf.get("hidden_act", "silu")) != "silu":
        raise UserError(f"{name}: hidden_act {act!r} is not supported: silu is")
    theta, scaling = _rope_of(hf, name)
    bias = bool(hf.get("attention_bias", False)) and family in ("llama", "qwen3", "qwen3_moe", "eurobert")
    if family == "qwen2_moe":
        bias = bool(hf["qkv_bias"])
    return {
        "n_layers": hf["num_hidden_layers"],
        "n_heads": hf["num_attention_heads"],
        "n_kv_heads": hf.get("num_key_value_heads"),
        "d_model": hf["hidden_size"],
        "head_dim": hf.get("head_dim"),
        "d_ff": hf["intermediate_size"],
        "max_seq_len": _context_of(hf, scaling),
        "causal": family != "eurobert",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "qkv_bias": True if family == "qwen2" else bias,
        "o_bias": False if family in ("qwen2", "qwen2_moe") else bias,
        "mlp_bias": family in ("llama", "eurobert") and bool(hf.get("mlp_bias", False)),
        "qk_norm": family in ("qwen3", "qwen3_moe"),
        "experts": _read_experts(hf) if family in ("qwen2_moe", "qwen3_moe") else None,
        "dropout": hf.get("attention_dropout", 0.0),
        **_window_of(hf, name),
    }


def _read_experts(hf: dict[str, Any]) -> dict[str, Any]:
    """Our experts section."""
    n_active, family = int(hf["num_experts_per_tok"]), hf["model_type"]
    return {
        "n": hf.get("num_local_experts", hf["num_experts"]),
        "n_active": n_active,
        "d_ff": hf["moe_intermediate_size"],
        "normalize": bool(hf["norm_topk_prob"]),
        "shared_d_ff": hf["shared_expert_intermediate_size"] if family == "qwen2_moe" else None,
        # Rounded, so that three times a third of 0.001 is 0.001 again.
        "balance": float(f"{float(hf['router_aux_loss_coef']) * n_active:.12g}"),
        "dense_layers": tuple(hf["mlp_only_layers"] or ()),
        "every": hf["decoder_sparse_step"],
    }


def _read_gpt2(hf: dict[str, Any], name: str) -> dict[str, Any]:
    if (act := hf["activation_function"]) not in ("gelu_new", "gelu_pytorch_tanh"):
        raise UserError(f"{name}: activation_function {act!r} is not supported: gelu_new is")
    for key, only in _GPT2_ONLY.items():
        if bool(hf.get(key, only)) != only:
            raise UserError(f"{name}: {key} {str(not only).lower()} is not supported: {str(only).lower()} is")
    drops = [hf[key] for key in _DROPOUTS]
    if len(set(drops)) > 1:
        raise UserError(
            f"{name}: {', '.join(_DROPOUTS)} are {', '.join(map(str, drops))}: one number for all is supported"
        )
    return {
        "n_layers": hf["n_layer"],
        "n_heads": hf["n_head"],
        "d_model": hf["n_embd"],
        "d_ff": hf.get("n_inner"),
        "max_seq_len": hf["n_positions"],
        "positions": "learned",
        "norm": "layernorm",
        "norm_eps": hf["layer_norm_epsilon"],
        "mlp": "gelu_tanh",
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "dropout": drops[0],
    }


def _window_of(hf: dict[str, Any], name: str) -> dict[str, Any]:
    """sliding_window and n_full_layers."""
    family, n_layers = hf["model_type"], int(hf["num_hidden_layers"])
    window, n_full = None, 0
    if family == "mistral":
        window = hf["sliding_window"]
    elif family == "qwen2_moe" and hf.get("use_sliding_window"):
        raise UserError(f"{name}: use_sliding_window is not supported in qwen2_moe, which has it in every second layer")
    elif family == "qwen3_moe" and hf.get("use_sliding_window"):
        window = hf["sliding_window"]  # in all layers
    elif family in ("qwen2", "qwen3") and hf.get("use_sliding_window"):
        window, n_full = hf["sliding_window"], min(int(hf["max_window_layers"]), n_layers)
    kinds = hf.get("layer_types")
    if window is not None and kinds is not None:
        n_full = kinds.index("sliding_attention") if "sliding_attention" in kinds else n_layers
        if kinds != ["full_attention"] * n_full + ["sliding_attention"] * (n_layers - n_full):
            raise UserError(f"{name}: layer_types is not supported: only first full, then sliding attention is")
    return {"sliding_window": window, "n_full_layers": n_full} if n_full < n_layers else {}


def _rope_of(hf: dict[str, Any], name: str) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and our rope_scaling section, from either generation's keys."""
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    theta = float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{name}: RoPE of its own for each kind of layer is not supported")
    if (part := rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))) != 1.0:
        raise UserError(f"{name}: partial_rotary_factor {part} is not supported: 1.0 is")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, {"kind": kind, "factor": float(rope["factor"])}
    original = hf.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    original = int(original or hf["max_position_embeddings"])
    if kind == "llama3":
        return theta, {
            "kind": kind,
            "factor": float(rope["factor"]),
            "low_freq_factor": float(rope["low_freq_factor"]),
            "high_freq_factor": float(rope["high_freq_factor"]),
            "original_max_seq_len": original,
        }
    if kind != "yarn":
        raise UserError(f"{name}: rope_type {kind!r} is not supported: default, linear, llama3 and yarn are")
    factor = float(rope.get("factor") or hf["max_position_embeddings"] / original)
    attention = rope.get("attention_factor")
    if attention is None and rope.get("mscale") and rope.get("mscale_all_dim"):  # DeepSeek's way to say it
        over, under = (0.1 * rope[key] * math.log(factor) + 1.0 for key in ("mscale", "mscale_all_dim"))
        attention = over / under
    return theta, {
        "kind": kind,
        "factor": factor,
        "original_max_seq_len": original,
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
        "attention_factor": attention,
        "truncate": bool(rope.get("truncate", True)),
    }


def _context_of(hf: dict[str, Any], scaling: dict[str, Any] | None) -> Any:
    """max_seq_len: what YaRN stretches to, where max_position_embeddings still tells another length (Qwen's recipe)."""
    told = hf["max_position_embeddings"]
    if scaling is None or scaling["kind"] != "yarn":
        return told
    original, factor = scaling["original_max_seq_len"], scaling["factor"]
    return told if told / original in (1.0, factor) else round(original * factor)


def read_json(folder: Path) -> dict[str, Any]:
    """A folder's config.json; of adapters the one that base and adapters have together."""
    if is_adapter(folder):
        return _of_adapters(folder)
    name = str(folder / "config.json")
    try:
        hf = json.loads((folder / "config.json").read_bytes())
    except OSError as e:
        raise UserError(f"{name}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"{name}: not JSON: {e}") from None
    if not isinstance(hf, dict):
        raise UserError(f"{name}: a JSON object is expected")
    return hf


def _of_adapters(folder: Path) -> dict[str, Any]:
    told = told_config(folder)
    if told is not None:
        return told
    hf, n_scores = read_json(base_of(folder)), head_rows(folder)
    if n_scores is not None and hf.get("model_type") in ARCHITECTURES:  # PEFT keeps a classifier's head, not its config
        hf = {key: value for key, value in hf.items() if key not in ("id2label", "label2id")}
        hf |= {"architectures": [ARCHITECTURES[hf["model_type"]][1]], "num_labels": n_scores}
    return hf


def read_config(folder: Path) -> GPTConfig:
    """The shape in a folder's config.json. Code named in it is ignored, with a warning."""
    name, hf = str(folder / "config.json"), read_json(folder)
    if code := [key for key in _CODE_KEYS if key in hf]:
        log.warning("%s: %s names code of the folder's own: it is ignored", name, ", ".join(code))
    return config_from_hf({k: v for k, v in hf.items() if k not in _CODE_KEYS}, name)


def read_labels(folder: Path) -> tuple[str, ...] | None:
    """Names of a classifier's scores, in order; None if the folder holds a language model.

    Raises:
        UserError: if config.json can't be read, or its labels are not numbered from 0.
    """
    hf = read_json(folder)
    if hf.get("architectures") not in [[classifier] for _, classifier in ARCHITECTURES.values() if classifier]:
        return None
    by_id, n_labels = hf.get("id2label"), hf.get("num_labels", 2)  # 2 is transformers' default
    if by_id is None and isinstance(n_labels, int) and 0 < n_labels <= _MAX_LABELS:
        by_id = {str(i): f"LABEL_{i}" for i in range(n_labels)}
    if not isinstance(by_id, dict) or by_id.keys() != set(map(str, range(len(by_id)))):
        raise UserError(f"{folder / 'config.json'}: id2label must name the labels 0, 1, ...")
    return tuple(str(by_id[str(i)]) for i in range(len(by_id)))
