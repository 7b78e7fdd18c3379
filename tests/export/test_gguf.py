"""GGUF: read back by the `gguf` package, every tensor and key; what llama.cpp would compute otherwise is refused."""

from __future__ import annotations

import errno
import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from reliability import ShimDisk
from safetensors.torch import save_file

from llmkit import storage
from llmkit.cli import main
from llmkit.config import UserError
from llmkit.export.gguf import TYPES, check_model
from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import generate
from llmkit.model.config import GPTConfig, LoraConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.rope import rope_frequencies
from llmkit.model.weights import load_model
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.tokenizer.pieces import BYTE_OF_CHAR

gguf = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")

TEXTS = [
    "The mill stands by the river, and Mira's boat waits. ",
    "从前山谷里有一座磨坊。 磨坊旁边住着米拉。 12345 ",
] * 40
BPE = Tokenizer.train(TEXTS, TokenizerConfig(vocab_size=400))
BYTES = Tokenizer.train([], TokenizerConfig(kind="byte"))
FAMILIES = {
    "llama": {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "n_kv_heads": 2},
    "mistral": {"sliding_window": 24, "tie_embeddings": False, "n_kv_heads": 1},
    "qwen2": {"qkv_bias": True, "n_kv_heads": 2},
    "qwen3": {"qk_norm": True, "head_dim": 16, "tie_embeddings": False},
}
# The largest error of one value: of what its block spans, or for floats of the value itself.
ERRORS = {"q8_0": 0.5 / 127, "q5_1": 0.5 / 31, "q5_0": 1 / 16, "q4_1": 0.5 / 15, "q4_0": 1 / 8}


def write_model(folder: Path, tokenizer: Tokenizer = BPE, scale: float = 5.0, stage: str = "sft", **shape) -> Path:
    """A random model; with 11 layers, so that names sorted as text would show (B64)."""
    folder.mkdir()
    rows = -(-tokenizer.vocab_size // 64) * 64
    sizes = {"n_layers": 11, "n_heads": 4, "d_model": 32, "d_ff": 96, "max_seq_len": 64, "vocab_size": rows}
    config = GPTConfig(**{**sizes, **shape})
    model = GPT(config)
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p * scale if p.dim() == 2 else p + torch.randn(p.shape, generator=generator) * 0.1)
    save_file(
        {n: t.contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )
    for name, content in model_files(config, torch.float32, tokenizer, {"stage": stage, "step": 1}).items():
        (folder / name).write_bytes(content)
    return folder


def exported(folder: Path, kind: str = "f32") -> gguf.GGUFReader:
    out = folder.parent / f"{folder.name}-{kind}.gguf"
    assert main(["export", str(folder), str(out), "--format", "gguf", "--type", kind]) == 0
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(".")]
    return gguf.GGUFReader(out)


def fields(reader: gguf.GGUFReader) -> dict:
    return {name: field.contents() for name, field in reader.fields.items()}


def tensors(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    """As numbers, in the shape [out, in] that our parameters have."""
    return {t.name: quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def expected(model: GPT, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Every tensor of the file, from rules written down anew: block by block, row by row."""
    config, V, E = model.config, tokenizer.vocab_size, model.config.width_of_head
    own = {n: p.detach().float().numpy() for n, p in model.named_parameters()}
    want = {"token_embd.weight": own["model.embed_tokens.weight"][:V], "output_norm.weight": own["model.norm.weight"]}
    if not config.tie_embeddings:
        want["output.weight"] = own["lm_head.weight"][:V]
    parts = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, x in own.items():
        if not name.startswith("model.layers."):
            continue
        _, _, layer, rest = name.split(".", 3)
        part, _, suffix = rest.rpartition(".")
        if config.family in ("llama", "mistral") and part in ("self_attn.q_proj", "self_attn.k_proj"):
            # Of each head the pairs (0, E/2), (1, E/2 + 1), ... stand side by side.
            order = [h * E + i + half for h in range(len(x) // E) for i in range(E // 2) for half in (0, E // 2)]
            x = x[order]
        want[f"blk.{layer}.{parts[part]}.{suffix}"] = x
    return want


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_bitwise(tmp_path, family):
    """B60, B64, B65, B66: q and k with n_kv != n_heads, 11 layers, tied and untied, shapes from the file alone."""
    folder = write_model(tmp_path / family, **FAMILIES[family])
    reader, model = exported(folder), load_model(folder)
    config, got, want = model.config, tensors(reader), expected(model, BPE)
    assert config.family == family and got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == np.float32 and np.array_equal(got[name], x), name
    arch, keys = ("llama" if family == "mistral" else family), fields(reader)
    assert keys["general.architecture"] == arch and keys["general.file_type"] == gguf.LlamaFileType.ALL_F32
    context = 24 if family == "mistral" else 64  # a window is no part of that architecture
    told = {
        "context_length": context, "embedding_length": 32, "block_count": 11, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.width_of_head, "attention.value_length": config.width_of_head,
        "rope.dimension_count": config.width_of_head, "rope.freq_base": 10000.0, "vocab_size": BPE.vocab_size,
        "attention.layer_norm_rms_epsilon": np.float32(1e-5),
    }  # fmt: skip
    assert {key: keys[f"{arch}.{key}"] for key in told} == told


def test_a_forward_pass_from_the_file(tmp_path):
    """The numbers in the file, computed as llama.cpp does it (neighbours are turned), give our logits."""
    folder = write_model(tmp_path / "m", n_layers=2, n_kv_heads=2)
    w, model = {n: torch.from_numpy(x.copy()) for n, x in tensors(exported(folder)).items()}, load_model(folder)
    ids = torch.tensor([[5, 300, 17, 42, 301, 8]])
    T, E, H, K = 6, 8, 4, 2
    angles = torch.arange(T).float()[:, None] * 10000.0 ** (-torch.arange(0, E, 2).float() / E)

    def turn(x_HTE: torch.Tensor) -> torch.Tensor:
        even, odd, cos, sin = x_HTE[..., 0::2], x_HTE[..., 1::2], angles.cos(), angles.sin()
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w[f"{name}.weight"]

    x = w["token_embd.weight"][ids[0]]
    for i in range(2):
        h = norm(x, f"blk.{i}.attn_norm")
        q, k, v = (
            (h @ w[f"blk.{i}.attn_{n}.weight"].T).view(T, heads, E).transpose(0, 1)
            for n, heads in (("q", H), ("k", K), ("v", K))
        )
        q, k, v = turn(q), turn(k).repeat_interleave(H // K, 0), v.repeat_interleave(H // K, 0)
        scores = (q @ k.mT / E**0.5).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1) @ w[f"blk.{i}.attn_output.weight"].T
        h = norm(x, f"blk.{i}.ffn_norm")
        gate, up = h @ w[f"blk.{i}.ffn_gate.weight"].T, h @ w[f"blk.{i}.ffn_up.weight"].T
        x = x + torch.nn.functional.silu(gate) * up @ w[f"blk.{i}.ffn_down.weight"].T
    logits = norm(x, "output_norm") @ w["token_embd.weight"].T
    want = model.logits(model(ids))[0, :, : BPE.vocab_size]
    assert want.abs().max() > 1 and (logits - want).abs().max() < 1e-4


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "f32"])
def test_every_type_within_its_error(tmp_path, kind):
    """B67: norms stay fp32; matrices have the type asked for, embedding and head 8 bits beside smaller ones."""
    folder = write_model(tmp_path / "m", n_layers=2, tie_embeddings=False)
    reader, want = exported(folder, kind), expected(load_model(folder), BPE)
    for t in reader.tensors:
        x, y = want[t.name], quants.dequantize(t.data, t.tensor_type)
        if x.ndim == 1:
            assert t.tensor_type.name == "F32" and np.array_equal(x, y)
            continue
        small = kind.startswith(("q4", "q5")) and t.name in ("token_embd.weight", "output.weight")
        used = "q8_0" if small else kind
        assert t.tensor_type.name == used.upper()
        if used in ("f16", "bf16"):
            assert (np.abs(x - y) <= np.abs(x) * 2.0 ** (-11 if used == "f16" else -8) + 1e-7).all()
            continue
        blocks, near = x.reshape(-1, 32), y.reshape(-1, 32)
        span = np.ptp(blocks, axis=1) if used.endswith("_1") else np.abs(blocks).max(axis=1)
        # The scale itself is rounded to fp16.
        assert (np.abs(blocks - near).max(axis=1) <= span * (ERRORS[used] + 2e-3) + 1e-6).all(), t.name
    assert fields(reader)["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]


def test_rows_that_fit_no_block_stay_fp16(tmp_path, capsys):
    reader = exported(write_model(tmp_path / "m", d_ff=80, n_layers=1), "q4_0")
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert "1 matrices stay f16" in capsys.readouterr().err


def test_stretched_positions(tmp_path):
    """RoPE's stretching: llama3 as a factor for each pair, linear and YaRN as keys."""
    llama3 = {"kind": "llama3", "factor": 4.0, "original_max_seq_len": 32}
    folder = write_model(tmp_path / "a", rope_scaling=llama3, n_layers=1)
    factors = tensors(exported(folder))["rope_freqs.weight"]
    config, plain = load_model(folder).config, 10000.0 ** (-np.arange(0, 8, 2) / 8)
    assert np.allclose(plain / factors, rope_frequencies(config, torch.device("cpu")).numpy(), rtol=1e-6)
    assert factors.max() == 4.0 and factors.min() >= 1.0
    yarn = {"kind": "yarn", "factor": 2.0, "original_max_seq_len": 32}
    keys = fields(exported(write_model(tmp_path / "b", rope_scaling=yarn, n_layers=1)))
    told = {k: keys[f"llama.rope.scaling.{k}"] for k in ("type", "factor", "original_context_length")}
    assert told == {"type": "yarn", "factor": 2.0, "original_context_length": 32}
    linear = {"kind": "linear", "factor": 3.0}
    keys = fields(exported(write_model(tmp_path / "c", rope_scaling=linear, n_layers=1)))
    assert (keys["llama.rope.scaling.type"], keys["llama.rope.scaling.factor"]) == ("linear", 3.0)


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def test_the_tokenizer(tmp_path, capsys):
    """B62: no row without a token. Tokens, kinds, merges, special ids and template, in llama.cpp's terms."""
    keys = fields(exported(write_model(tmp_path / "m", n_layers=1)))
    spec, own = json.loads(BPE.files()["tokenizer.json"]), {}
    for key, value in keys.items():
        own[key.removeprefix("tokenizer.")] = value
    ids = {**spec["model"]["vocab"], **{t["content"]: t["id"] for t in spec["added_tokens"]}}
    assert own["ggml.tokens"] == sorted(ids, key=ids.__getitem__) and len(own["ggml.tokens"]) == BPE.vocab_size
    control = {i for i, kind in enumerate(own["ggml.token_type"]) if kind == gguf.TokenType.CONTROL}
    assert control == BPE.special_ids
    assert own["ggml.merges"] == [" ".join(pair) for pair in spec["model"]["merges"]] and len(own["ggml.merges"]) > 50
    assert (own["ggml.model"], own["ggml.pre"]) == ("gpt2", "llama-bpe")
    named = {"bos": "<|bos|>", "eos": "<|eos|>", "padding": "<|pad|>", "eot": "<|im_end|>"}
    assert {key: own[f"ggml.{key}_token_id"] for key in named} == {k: BPE.special[t] for k, t in named.items()}
    assert own["ggml.add_bos_token"] is True and own["ggml.add_eos_token"] is False
    assert own["chat_template"] == BPE.chat_template
    assert "NFC" in capsys.readouterr().err
    # A base model was never trained on its template.
    assert "tokenizer.chat_template" not in fields(exported(write_model(tmp_path / "b", n_layers=1, stage="pretrain")))


# llama.cpp's own expressions, by its names for them.
_CASES = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_CPP = {
    "llama-bpe": _CASES + r"\p{N}{1,3}" + _REST,
    "qwen2": _CASES + r"\p{N}" + _REST,
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}


def ids_by_the_file(keys: dict, text: str) -> list[int]:
    """What llama.cpp does with the file's tokenizer: cut, look words up (llama-bpe), else merge the best pair."""
    regex = pytest.importorskip("regex")
    ids = {token: i for i, token in enumerate(keys["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(keys["tokenizer.ggml.merges"])}
    letters, found = {b: c for c, b in BYTE_OF_CHAR.items()}, []
    for word in regex.findall(LLAMA_CPP[keys["tokenizer.ggml.pre"]], text):
        parts = [letters[b] for b in word.encode()]
        if keys["tokenizer.ggml.pre"] == "llama-bpe" and "".join(parts) in ids:
            parts = ["".join(parts)]
        while pairs := [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]:
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        found += [ids[part] for part in parts]
    return found


def random_texts(n: int) -> Iterator[str]:
    rng = random.Random(0)
    letters = "abc XYZ 0123456 .,;'-ts \n\t 从前山谷里有一座磨坊。é ß カタ 😀 <|im_end|>"
    words = ["The", " mill", "river", "磨坊", "waits", "12345", " ", "\n\n", "'s", "<|im_end|>", "。"]
    for _ in range(n):
        pieces = [rng.choice(words) if rng.random() < 0.5 else rng.choice(letters) for _ in range(rng.randrange(1, 25))]
        yield BPE.normalize("".join(pieces))


def digits(spec: dict) -> None:
    split = spec["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"\p{N}{1,3}", r"\p{N}")


def gpt2(spec: dict) -> None:
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("change", "name"), [(None, "llama-bpe"), (digits, "qwen2"), (gpt2, "gpt-2")], ids=["llama-bpe", "qwen2", "gpt-2"]
)
def test_the_same_ids_from_the_file_alone(tmp_path, change, name):
    """1,000 random strings, Chinese included: the tokens, merges and the regex's name that were written say it all."""
    folder = write_model(tmp_path / "m", n_layers=1)
    if change is not None:
        change_tokenizer(folder, change)
    keys, tokenizer = fields(exported(folder)), Tokenizer.load(folder)
    assert keys["tokenizer.ggml.pre"] == name
    for text in random_texts(1000):
        assert ids_by_the_file(keys, text) == tokenizer.encode(text), text


def test_a_tokenizer_of_bytes(tmp_path):
    """llama.cpp asks for merges: one that no text can ever use."""
    keys = fields(exported(write_model(tmp_path / "m", BYTES, n_layers=1)))
    (merge,) = keys["tokenizer.ggml.merges"]
    assert not set(merge.split(" ")) & set("".join(keys["tokenizer.ggml.tokens"]))


def change_tokenizer(folder: Path, change) -> Path:
    file = folder / "tokenizer.json"
    spec = json.loads(file.read_text("utf-8"))
    change(spec)
    file.write_text(json.dumps(spec), "utf-8")
    return folder


def test_a_word_that_no_merge_yields(tmp_path):
    """Merges alone would not find it, but llama-bpe looks words up first: so the regex is named by its other name."""
    size = BPE.vocab_size
    folder = write_model(tmp_path / "w", n_layers=1, vocab_size=size + 1)
    change_tokenizer(folder, lambda spec: spec["model"]["vocab"].update(zqzq=size))
    assert fields(exported(folder))["tokenizer.ggml.pre"] == "smaug-bpe"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+|\W"), "llama.cpp has no name"),
        (lambda s: s.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda s: s["model"].update(byte_fallback=True), "byte_fallback"),
    ],
)
def test_tokenizers_that_llama_cpp_has_none_of(tmp_path, change, says, capsys):
    folder = change_tokenizer(write_model(tmp_path / "m", n_layers=1), change)
    assert main(["export", str(folder), str(tmp_path / "out.gguf"), "--format", "gguf"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not (tmp_path / "out.gguf").exists()


def test_characters_are_refused(tmp_path, capsys):
    tokenizer = Tokenizer.train(TEXTS, TokenizerConfig(kind="sentencepiece", vocab_size=400))
    folder = write_model(tmp_path / "m", tokenizer, n_layers=1)
    assert main(["export", str(folder), str(tmp_path / "out.gguf"), "--format", "gguf"]) == 2
    assert "Unigram on characters" in capsys.readouterr().err


# --- refusals --------------------------------------------------------------------------------------------------------

GPT2 = {
    "positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "qkv_bias": True, "o_bias": True, "mlp_bias": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (GPT2, "a gpt2 is not written"),
        ({"causal": False}, "a eurobert is not written"),
        ({"qk_norm": True, "experts": {"n": 4, "n_active": 2, "d_ff": 16}}, "a qwen3_moe is not written"),
        ({"qk_norm": True, "qkv_bias": True, "o_bias": True}, "no biases"),
        ({"qkv_bias": True, "head_dim": 16}, "n_heads x head_dim is 64, d_model 32"),
        (
            {"qk_norm": True, "rope_scaling": {"kind": "llama3", "factor": 2.0, "original_max_seq_len": 32}},
            "llama only",
        ),
        (
            {"rope_scaling": {"kind": "yarn", "factor": 2.0, "original_max_seq_len": 32, "beta_fast": 8.0}},
            "beta_fast 8",
        ),
    ],
)
def test_models_that_llama_cpp_has_none_of(shape, says):
    config = GPTConfig(n_layers=2, n_heads=4, d_model=32, max_seq_len=64, vocab_size=64, **shape)
    with pytest.raises(UserError, match=says):
        check_model(config, "m")


def test_nothing_is_left_of_what_fails(tmp_path, monkeypatch, capsys):
    """Values that fp16 can't hold, NaN, a full disk, a name that is taken."""
    folder, out = write_model(tmp_path / "m", n_layers=1, scale=1e7), tmp_path / "out.gguf"
    command = ["export", str(folder), str(out), "--format", "gguf"]
    assert main(command) == 2
    assert "--type bf16" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    monkeypatch.setattr(storage, "disk", ShimDisk(2, errno.ENOSPC))
    monkeypatch.setattr("llmkit.export.gguf.disk", storage.disk)
    assert main([*command, "--type", "f32"]) == 1
    assert "No space left" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["m"]

    def torn(*_: object) -> None:
        raise OSError("512 requested and 100 written")  # what numpy says of a full disk, without a number

    with monkeypatch.context() as patch:
        patch.setattr(storage, "disk", storage.Disk())
        patch.setattr("llmkit.export.gguf.disk", storage.disk)
        patch.setattr(gguf.GGUFWriter, "write_tensor_data", torn)
        assert main([*command, "--type", "f32"]) == 1
    assert "is the disk full?" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["m"]
    out.write_text("mine")
    assert main([*command, "--type", "f32"]) == 2
    assert "is there already" in capsys.readouterr().err and out.read_text() == "mine"


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, capsys):
    folder = write_model(tmp_path / "m", n_layers=1)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["export", str(folder), str(tmp_path / "out.gguf"), "--format", "gguf"]) == 2
    assert "pip install 'llmkit[gguf]'" in capsys.readouterr().err


def test_adapters_are_merged(tmp_path):
    from llmkit.model.adapters import WEIGHTS, adapter_files, adapter_tensors, base_named
    from llmkit.model.lora import apply_lora

    base = write_model(tmp_path / "base", n_layers=1)
    model = load_model(base)
    apply_lora(model, LoraConfig(r=2, targets=("v_proj",)), 0, base_named(str(base)))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({n: t.detach().contiguous() for n, t in adapter_tensors(model).items()}, adapter / WEIGHTS)
    files = model_files(model.config, torch.float32, BPE, {"stage": "sft", "step": 1})
    for name, content in adapter_files(files, model).items():
        (adapter / name).write_bytes(content)
    got, plain = tensors(exported(adapter)), tensors(exported(base))
    assert {n for n in got if not np.array_equal(got[n], plain[n])} == {"blk.0.attn_v.weight"}


def test_a_quantised_folder_is_refused(tmp_path, capsys):
    """Its rounding would be rounded again."""
    folder, out = write_model(tmp_path / "m", n_layers=1), tmp_path / "int8"
    assert main(["quantize", str(folder), str(out), "--bits", "8"]) == 0
    assert main(["export", str(out), str(tmp_path / "out.gguf"), "--format", "gguf"]) == 2
    assert "is quantised already" in capsys.readouterr().err


# --- llama.cpp itself ------------------------------------------------------------------------------------------------


def in_llama_cpp(file: Path, **options):
    """A file in llama.cpp. Its cache would hold keys and values in fp16, which is too coarse to compare with."""
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is not installed: nothing was run by llama.cpp"
    )
    return llama_cpp.Llama(
        str(file), n_ctx=64, n_threads=1, type_k=0, type_v=0, flash_attn=False, verbose=False, **options
    )


@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_says_the_same(tmp_path, family, kind):
    """Greedy tokens, and ids of 1,000 random strings."""
    folder = write_model(tmp_path / "m", n_layers=2, **FAMILIES[family])
    exported(folder, kind)
    llama = in_llama_cpp(tmp_path / f"m-{kind}.gguf")
    prompt, want = BPE.encode("The mill 从前"), []
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=12)
    (ours,) = generate(load_model(folder), [prompt], sampling, tokenizer=BPE)
    for token in llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
        want.append(token)
        if len(want) == len(ours.ids):
            break
    assert want == list(ours.ids)
    for text in random_texts(1000):
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == BPE.encode(text)


@pytest.mark.parametrize("name", ["bytes", "qwen2", "gpt-2", "smaug-bpe"])
def test_llama_cpp_cuts_text_the_same(tmp_path, name):
    """Every other way to cut, by the regexes that its names stand for there."""
    size = BPE.vocab_size + (name == "smaug-bpe")
    folder = write_model(tmp_path / "m", BYTES if name == "bytes" else BPE, n_layers=1, vocab_size=-(-size // 64) * 64)
    if name == "smaug-bpe":
        change_tokenizer(folder, lambda spec: spec["model"]["vocab"].update(zqzq=size - 1))
    elif name != "bytes":
        change_tokenizer(folder, {"qwen2": digits, "gpt-2": gpt2}[name])
    keys, tokenizer = fields(exported(folder)), Tokenizer.load(folder)
    assert keys["tokenizer.ggml.pre"] == ("llama-bpe" if name == "bytes" else name)
    llama = in_llama_cpp(tmp_path / "m-f32.gguf", vocab_only=True)
    for text in [*random_texts(1000), "zqzq zqzq, 12345 zq"]:
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text), text


def test_llama_cpp_reads_a_conversation_the_same(tmp_path):
    """The text of the chat template, its control tokens included."""
    llama_chat = pytest.importorskip(
        "llama_cpp.llama_chat_format", reason="llama-cpp-python is not installed: nothing was run by llama.cpp"
    )
    folder = write_model(tmp_path / "m", n_layers=1)
    keys = fields(exported(folder))
    llama = in_llama_cpp(tmp_path / "m-f32.gguf", vocab_only=True)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "从前 the mill?"},
        {"role": "assistant", "content": "好 waits."},
        {"role": "user", "content": "12345"},
    ]
    render = llama_chat.Jinja2ChatFormatter(
        template=keys["tokenizer.chat_template"], eos_token="<|eos|>", bos_token="<|bos|>"
    )
    text = render(messages=turns).prompt
    found = llama.tokenize(text.encode(), add_bos=False, special=True)
    assert found == BPE.encode_chat(turns, add_generation_prompt=True).ids


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_llama_cpp_stretches_positions_the_same(tmp_path, kind):
    scaling = {"kind": kind, "factor": 4.0} | ({} if kind == "linear" else {"original_max_seq_len": 16})
    folder = write_model(tmp_path / "m", n_layers=2, rope_scaling=scaling)
    exported(folder)
    llama = in_llama_cpp(tmp_path / "m-f32.gguf", logits_all=True)
    ids = torch.randint(0, BPE.vocab_size, (1, 60), generator=torch.Generator().manual_seed(0))
    llama.eval(ids[0].tolist())
    model, plain = load_model(folder), GPT(load_model(folder).config.model_copy(update={"rope_scaling": None}))
    plain.load_state_dict(model.state_dict())
    want, other = (m.logits(m(ids))[0, :, : BPE.vocab_size].detach() for m in (model, plain))
    difference = (torch.from_numpy(llama.scores[:60, : BPE.vocab_size].copy()) - want).abs().max()
    assert difference < 1e-4 * want.abs().max() and (other - want).abs().max() > 0.1 * want.abs().max()
