"""GGUF: model, tokenizer and chat template in one file, for llama.cpp and what is built on it.

Names of tensors and block formats are those of the `gguf` package, llama.cpp's own. What is done here: rows of queries
and keys in the order of llama.cpp's rotation, the embedding cut to the tokenizer's tokens (the rows that round it up
could be sampled there), RoPE's stretching in llama.cpp's terms. A model that llama.cpp would compute otherwise is refused.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkit.config import MachineError, UserError
from llmkit.export.gguf_tokens import GGUFTokens, tokens_of
from llmkit.export.source import load_plain
from llmkit.inference.command import is_chat_model
from llmkit.model.config import GPTConfig, LinearScaling, Llama3Scaling, YarnScaling
from llmkit.model.gpt import GPT
from llmkit.model.hf import read_config
from llmkit.model.rope import rope_frequencies
from llmkit.storage import disk, machine_errors, sync_folder
from llmkit.tokenizer import Tokenizer

# What the matrices are stored as. Vectors (norms, biases) stay in fp32.
TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
# Embedding and head lose most by few bits and are read a row at a time: 8 bits each beside smaller blocks.
_SMALL_BLOCKS = ("q5_1", "q5_0", "q4_1", "q4_0")
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_REASONS = {
    "gpt2": "its learned positions and fused matrices are laid out otherwise there",
    "eurobert": "it sees text in both directions and generates none",
    "qwen2_moe": "its experts are laid out otherwise there",
    "qwen3_moe": "its experts are laid out otherwise there",
}
_FP16_MAX = 65504.0


def export_gguf(folder: Path, out: Path, kind: str = "f16") -> list[str]:
    """Writes a model as one GGUF file, whole or not at all; returns what a user should know of it, a sentence each.

    Args:
        folder: a checkpoint or Hugging Face folder; adapters are merged.
        out: the file; it is not there yet.
        kind: one of TYPES.

    Raises:
        UserError: for a model or tokenizer that llama.cpp doesn't compute as we do, or weights that the type can't hold.
        MachineError: if the file can't be written.
    """
    package = _package()
    config = read_config(folder)
    check_model(config, str(folder))
    tokenizer = Tokenizer.load(folder)
    tokens = tokens_of(tokenizer, str(folder), is_chat_model(folder, tokenizer))
    rows = len(tokens.tokens)
    if config.vocab_size is None or config.vocab_size < rows:
        raise UserError(f"{folder}: the tokenizer has {rows} tokens, the embedding {config.vocab_size} rows")
    model = load_plain(folder)
    arch = _ARCHITECTURES[config.family]
    temporary = out.with_name(f".{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    with machine_errors(out.parent):
        disk.mkdir(out.parent)
        try:
            writer = package.GGUFWriter(temporary, arch)
            try:
                _describe(writer, config, out.stem, kind, rows)
                _describe_tokens(writer, tokens)
                odd = _write_tensors(writer, model, arch, kind, rows)
            finally:
                writer.close()
            _finish(temporary, out)
        except BaseException as e:
            with contextlib.suppress(OSError):
                disk.unlink(temporary)
            if isinstance(e, OSError) and e.errno is None:  # numpy doesn't tell why it wrote a part only
                raise MachineError(f"{out}: could not be written: {e}: is the disk full?") from e
            raise
    notes = [*tokens.notes]
    if config.sliding_window is not None and config.sliding_window < config.max_seq_len:
        notes.append(
            f"the context is {config.sliding_window} tokens, the sliding window: llama.cpp has none for this architecture"
        )
    if odd:
        notes.append(f"{odd} matrices stay f16: their rows are no multiple of {kind}'s blocks of 32")
    return notes


def _package() -> Any:
    """The `gguf` package, or a sentence that says how to get it."""
    try:
        import gguf
    except ImportError:
        raise UserError("writing GGUF needs the extra: pip install 'llmkit[gguf]'") from None
    return gguf


def _finish(temporary: Path, out: Path) -> None:
    fd = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
    try:
        disk.sync(fd)
    finally:
        os.close(fd)
    disk.rename(temporary, out)
    sync_folder(out.parent)


def check_model(config: GPTConfig, name: str) -> None:
    """Raises UserError for a model that llama.cpp has no equal of."""
    family, scaling = config.family, config.rope_scaling
    if family in _REASONS:
        raise UserError(
            f"{name}: a {family} is not written as GGUF: {_REASONS[family]}. llama, mistral, qwen2, qwen3 are"
        )
    if family == "qwen3" and config.qkv_bias:
        raise UserError(f"{name}: llama.cpp's qwen3 has no biases (qkv_bias: true here)")
    if family == "qwen2" and config.n_heads * config.width_of_head != config.d_model:
        raise UserError(
            f"{name}: llama.cpp's qwen2 has heads that are as wide as the model together: n_heads x head_dim is "
            f"{config.n_heads * config.width_of_head}, d_model {config.d_model}"
        )
    if isinstance(scaling, Llama3Scaling) and _ARCHITECTURES[family] != "llama":
        raise UserError(
            f"{name}: llama.cpp knows rope_scaling of kind llama3 for the family llama only, not for {family}"
        )
    if isinstance(scaling, YarnScaling):
        usual = YarnScaling(kind="yarn", factor=scaling.factor, original_max_seq_len=scaling.original_max_seq_len)
        wrong = [key for key in YarnScaling.model_fields if getattr(scaling, key) != getattr(usual, key)]
        if wrong:
            raise UserError(
                f"{name}: rope_scaling of kind yarn has {wrong[0]} {getattr(scaling, wrong[0])}: only "
                f"{getattr(usual, wrong[0])} is the same in all versions of llama.cpp"
            )


# --- keys ------------------------------------------------------------------------------------------------------------


def _describe(writer: Any, config: GPTConfig, name: str, kind: str, rows: int) -> None:
    """The shape, as `general.*` and `<architecture>.*`."""
    import gguf

    file_type = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    E = config.width_of_head
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(int(gguf.LlamaFileType[file_type]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(rows)
    writer.add_context_length(min(config.max_seq_len, config.sliding_window or config.max_seq_len))
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.width_of_mlp)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(E)
    writer.add_value_length(E)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(E)
    writer.add_rope_freq_base(config.rope_theta)
    scaling = config.rope_scaling
    if isinstance(scaling, LinearScaling | YarnScaling):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.kind))
        writer.add_rope_scaling_factor(scaling.factor)
    if isinstance(scaling, YarnScaling):
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_seq_len)


def _describe_tokens(writer: Any, tokens: GGUFTokens) -> None:
    """The tokenizer, as `tokenizer.*`."""
    import gguf

    writer.add_tokenizer_model("gpt2")  # llama.cpp's name for BPE on bytes
    writer.add_tokenizer_pre(tokens.pre)
    writer.add_token_list(tokens.tokens)
    writer.add_token_types(tokens.types)
    writer.add_token_merges(tokens.merges)
    for key, i in tokens.ids.items():
        writer.add_uint32(getattr(gguf.Keys.Tokenizer, f"{key.upper()}_ID"), i)
    writer.add_add_bos_token("bos" in tokens.ids)  # as our own generation does before a plain prompt
    writer.add_add_eos_token(False)
    if tokens.chat_template is not None:
        writer.add_chat_template(tokens.chat_template)


# --- tensors ---------------------------------------------------------------------------------------------------------


def _write_tensors(writer: Any, model: GPT, arch: str, kind: str, rows: int) -> int:
    """Writes all tensors, a tensor in memory at a time; returns how many matrices didn't fit the type's blocks."""
    import gguf

    names = gguf.get_tensor_name_map(_arch_of(arch), model.config.n_layers)
    plan, odd = [], 0
    for own, tensor in _parameters(model, rows):
        name = names.get_name(own, try_suffixes=(".weight", ".bias")) if own != "rope_freqs.weight" else own
        assert name is not None, f"{own} has no name in GGUF"
        as_type, fits = _type_of(own, tensor, kind)
        odd += not fits
        block, size = gguf.GGML_QUANT_SIZES[as_type]
        writer.add_tensor_info(
            name, tuple(tensor.shape), np.dtype(np.float32), tensor.numel() // block * size, raw_dtype=as_type
        )
        plan.append(as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (own, tensor), as_type in zip(_parameters(model, rows), plan, strict=True):
        x = _in_order(own, tensor.detach().float().numpy(), model.config, arch)
        _check_values(own, x, as_type)
        writer.write_tensor_data(np.ascontiguousarray(gguf.quants.quantize(x, as_type)))
    return odd


def _arch_of(arch: str) -> Any:
    import gguf

    return {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[arch]


def _parameters(model: GPT, rows: int) -> Iterator[tuple[str, Tensor]]:
    """Names of ours and tensors, in the order of the file: the vocabulary's cut to its rows."""
    if isinstance(model.config.rope_scaling, Llama3Scaling):
        yield "rope_freqs.weight", _stretching(model.config)
    for name, p in model.named_parameters():
        yield name, p[:rows] if name in _VOCABULARY else p


def _stretching(config: GPTConfig) -> Tensor:
    """By how much each pair's wavelength grows, [E/2]."""
    device = torch.device("cpu")
    plain = rope_frequencies(config.model_copy(update={"rope_scaling": None}), device)
    return plain / rope_frequencies(config, device)


def _type_of(own: str, tensor: Tensor, kind: str) -> tuple[Any, bool]:
    """What a tensor is stored as, and whether that is what was asked for."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if tensor.dim() == 1:
        return GGMLQuantizationType.F32, True
    wanted = GGMLQuantizationType["Q8_0" if kind in _SMALL_BLOCKS and own in _VOCABULARY else kind.upper()]
    fits = tensor.shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0
    return (wanted, True) if fits else (GGMLQuantizationType.F16, False)


def _in_order(own: str, x: np.ndarray, config: GPTConfig, arch: str) -> np.ndarray:
    """Rows as llama.cpp wants them: for architecture llama it turns neighbours, where we turn rows i and i + E/2."""
    if arch != "llama" or ".self_attn." not in own or (".q_proj." not in own and ".k_proj." not in own):
        return x
    E = config.width_of_head
    return x.reshape(-1, 2, E // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _check_values(own: str, x: np.ndarray, as_type: Any) -> None:
    if not np.isfinite(x).all():
        raise UserError(f"{own}: holds values that are not finite: look at the model with `llmkit verify`")
    if as_type.name == "F16" and x.size and (largest := float(np.abs(x).max())) > _FP16_MAX:
        raise UserError(f"{own}: holds {largest:g}, more than fp16 can: choose --type bf16 or f32")
