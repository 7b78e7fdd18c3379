"""Our models as Hugging Face folders, both ways: config.json and safetensors that plain `transformers` loads.

Weight names need no translation (see `gpt`). config.json is written with the keys of transformers 4 (`rope_theta`,
`rope_scaling`, `torch_dtype`) and of 5 (`rope_parameters`, `dtype`): readers of either silently ignore the other's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llmkit.config import UserError, validate
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
MAX_TENSORS = 1_000_000
_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
# Keys of an untrusted config.json that name code; nothing here ever imports them.
_CODE_KEYS = ("auto_map", "model_file", "custom_pipelines")


def config_to_hf(config: GPTConfig, dtype: torch.dtype, ids: dict[str, int], extra: dict[str, Any]) -> dict[str, Any]:
    """config.json of a checkpoint.

    Args:
        config: the model's shape, with vocab_size set.
        dtype: of the saved weights.
        ids: bos_token_id, eos_token_id and pad_token_id.
        extra: our own facts, kept under the key "llmkit", which transformers ignores.
    """
    family = config.family
    scaling: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_seq_len,
        }
    hf: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.width_of_mlp,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.width_of_head,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": 0.02,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling if config.rope_scaling else None,
        "rope_parameters": {"rope_theta": config.rope_theta, **scaling},
        "dtype": _DTYPE_NAMES[dtype],
        "torch_dtype": _DTYPE_NAMES[dtype],
        **ids,
        "llmkit": extra,
    }
    if family in ("llama", "qwen3"):
        hf["attention_bias"] = config.qkv_bias
    if family == "llama":
        hf["mlp_bias"] = config.mlp_bias
    if family in ("qwen2", "qwen3"):
        hf |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.n_layers}
    return hf


def _rope_of(hf: dict[str, Any], name: str) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and our rope_scaling section, from either generation's keys."""
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    theta = float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"{name}: rope_type {kind!r} is not supported: default and llama3 are")
    return theta, {
        "factor": float(rope["factor"]),
        "low_freq_factor": float(rope["low_freq_factor"]),
        "high_freq_factor": float(rope["high_freq_factor"]),
        "original_max_seq_len": int(rope["original_max_position_embeddings"]),
    }


def config_from_hf(hf: dict[str, Any], name: str = "config.json") -> GPTConfig:
    """The shape that a config.json describes.

    Raises:
        UserError: for another architecture, or an option that our model does not compute.
    """
    family = hf.get("model_type")
    if family not in ARCHITECTURES:
        raise UserError(f"{name}: model_type {family!r} is not supported: {', '.join(ARCHITECTURES)} are")
    if hf.get("use_sliding_window"):
        raise UserError(f"{name}: use_sliding_window is not supported: set it to false if the context is short enough")
    if (act := hf.get("hidden_act", "silu")) != "silu":
        raise UserError(f"{name}: hidden_act {act!r} is not supported: silu is")
    try:
        theta, scaling = _rope_of(hf, name)
        bias = bool(hf.get("attention_bias", False))
        data = {
            "n_layers": hf["num_hidden_layers"],
            "n_heads": hf["num_attention_heads"],
            "n_kv_heads": hf.get("num_key_value_heads"),
            "d_model": hf["hidden_size"],
            "head_dim": hf.get("head_dim"),
            "d_ff": hf["intermediate_size"],
            "max_seq_len": hf.get("max_position_embeddings", 2048),
            "vocab_size": hf["vocab_size"],
            "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "norm_eps": hf.get("rms_norm_eps", 1e-6),
            "qkv_bias": True if family == "qwen2" else bias,
            "o_bias": False if family == "qwen2" else bias,
            "mlp_bias": family == "llama" and bool(hf.get("mlp_bias", False)),
            "qk_norm": family == "qwen3",
            "dropout": hf.get("attention_dropout", 0.0),
        }
    except KeyError as e:
        raise UserError(f"{name}: key {e} is missing") from None
    except (TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{name}: {e}") from None
    config: GPTConfig = validate(GPTConfig, data, {(): name})
    return config


def read_config(folder: Path) -> GPTConfig:
    """The shape in a folder's config.json. Code named in it is ignored."""
    name = str(folder / "config.json")
    try:
        hf = json.loads((folder / "config.json").read_bytes())
    except OSError as e:
        raise UserError(f"{name}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"{name}: not JSON: {e}") from None
    if not isinstance(hf, dict):
        raise UserError(f"{name}: a JSON object is expected")
    return config_from_hf({k: v for k, v in hf.items() if k not in _CODE_KEYS}, name)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: one, or those that the index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        names = ["model.safetensors"]
    else:
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
            raise UserError(f"{index}: not an index of weights: {e}") from None
        if not names or not all(isinstance(n, str) for n in names):
            raise UserError(f"{index}: not an index of weights: weight_map must name files")
    files = [folder / n for n in names]
    for file in files:
        if file.parent.resolve() != folder.resolve():
            raise UserError(f"{index}: '{file.name}' points outside the folder")
        if not file.is_file():
            only = ": only safetensors are read, `llmkit import` converts .bin and .pt" if len(files) == 1 else ""
            raise UserError(f"{file}: no such file{only}")
    return files


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file, one at a time. Raises UserError if it is not one."""
    try:
        with safe_open(file, framework="pt") as f:
            names = list(f.keys())
            if len(names) > MAX_TENSORS:
                raise UserError(f"{file}: {len(names)} tensors: at most {MAX_TENSORS} are read")
            for name in names:
                yield name, f.get_tensor(name)
    except UserError:
        raise
    except Exception as e:  # safetensors raises its own class, OSError and ValueError for malformed files
        raise UserError(f"{file}: not a readable safetensors file: {e}") from None


def shapes_of(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, from the headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                shapes |= {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118 - not a dict
        except Exception as e:
            raise UserError(f"{file}: not a readable safetensors file: {e}") from None
    return shapes


@torch.no_grad()
def load_weights(model: GPT, folder: Path) -> None:
    """Fills a model from a folder's safetensors.

    Raises:
        UserError: naming the first tensor that is missing, unknown or of another shape. Nothing is filled in silently.
    """
    files = weight_files(folder)
    own = {n: tuple(p.shape) for n, p in model.named_parameters()}
    found = shapes_of(files)
    if model.config.tie_embeddings:
        found.pop("lm_head.weight", None)  # some writers repeat the tied tensor
    for name in [*own, *found]:
        if own.get(name) != found.get(name):
            raise UserError(
                f"{folder}: {name}: the weights hold {found.get(name, 'nothing')}, config.json asks for "
                f"{own.get(name, 'nothing')}"
            )
    parameters = dict(model.named_parameters())
    for file in files:
        for name, tensor in read_tensors(file):
            if name in parameters:
                if not tensor.is_floating_point():
                    raise UserError(f"{file}: {name} is {tensor.dtype}: floating-point weights are expected")
                parameters[name].copy_(tensor)


def count_parameters(config: GPTConfig) -> int:
    """Parameters of a model of this shape, in time and memory that do not grow with it: the shape may be a lie.

    Arithmetic on Python's integers, because PyTorch refuses sizes beyond 2^63 with an error of its own.
    """
    D, E, width = config.d_model, config.width_of_head, config.width_of_mlp
    n_q, n_kv = config.n_heads * E, config.kv_heads * E
    attention = (
        D * (2 * n_q + 2 * n_kv) + config.qkv_bias * (n_q + 2 * n_kv) + config.o_bias * D + config.qk_norm * 2 * E
    )
    mlp = 3 * D * width + config.mlp_bias * (2 * width + D)
    embeddings = (1 if config.tie_embeddings else 2) * (config.vocab_size or 0) * D
    return config.n_layers * (attention + mlp + 2 * D) + embeddings + D


def load_model(folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> GPT:
    """A model from a Hugging Face folder or checkpoint, in evaluation mode.

    Args:
        folder: see `storage.resolve_model` for what may be named on a command line.
        dtype: of the parameters. Default: as saved.
        device: where the parameters live.

    Raises:
        UserError: for an unsupported or damaged folder; sizes are checked before anything is allocated.
    """
    config = read_config(folder)
    files = weight_files(folder)
    on_disk = sum(file.stat().st_size for file in files)
    if (n_params := count_parameters(config)) > on_disk:
        raise UserError(
            f"{folder}: config.json asks for {n_params} parameters, the weights are {on_disk} bytes: they do not "
            "belong together"
        )
    if dtype is None:
        dtype = next((tensor.dtype for _, tensor in read_tensors(files[0])), torch.float32)
        if not dtype.is_floating_point:
            raise UserError(f"{files[0]}: the weights are {dtype}: floating-point weights are expected")
    with torch.device("meta"):
        model = GPT(config)
    model = model.to(dtype=dtype).to_empty(device=device)
    load_weights(model, folder)
    return model.eval().requires_grad_(False)
