"""`llmkit merge`: plain models from adapters of every kind, in the dtypes of the base, whole or not at all."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from reliability import ShimDisk
from safetensors.torch import load_file, save_file

from llmkit import storage
from llmkit.cli import main
from llmkit.model.adapters import WEIGHTS, adapter_files, adapter_tensors, base_named
from llmkit.model.config import GPTConfig, LoraConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.heads import SequenceClassifier, init_head
from llmkit.model.lora import apply_lora
from llmkit.model.weights import load_classifier, load_model, load_weights
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.tools.verify import problems_of
from llmkit.training import checkpoint

BYTES = Tokenizer.train([], TokenizerConfig(kind="byte"))
GPT2 = {
    "positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "qkv_bias": True, "o_bias": True, "mlp_bias": True,
}  # fmt: skip
IDS = torch.randint(0, 261, (2, 12), generator=torch.Generator().manual_seed(5))


def write_base(folder: Path, dtype: torch.dtype = torch.float32, **shape) -> Path:
    folder.mkdir()
    config = GPTConfig(n_layers=2, n_heads=2, d_model=16, max_seq_len=32, vocab_size=320, **shape)
    model = GPT(config)
    init_weights(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    model.to(dtype)
    save_file(
        {n: t.contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )
    for name, content in model_files(config, dtype, BYTES, {"stage": "pretrain", "step": 1}).items():
        (folder / name).write_bytes(content)
    return folder


def write_adapter(folder: Path, model: torch.nn.Module, base: Path, head: dict | None = None, **options) -> Path:
    """Adapters that do something, as training writes them."""
    folder.mkdir()
    apply_lora(model, LoraConfig(r=3, **options), 0, base_named(str(base)))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * 0.2)
    save_file({n: t.detach().contiguous() for n, t in adapter_tensors(model).items()}, folder / WEIGHTS)
    files = model_files(model.config, torch.float32, BYTES, {"stage": "sft", "step": 7}, **(head or {}))
    for name, content in adapter_files(files, model).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "shape", [{}, GPT2, {"tie_embeddings": False, "qkv_bias": True}], ids=["llama", "gpt2", "qwen2"]
)
@pytest.mark.parametrize("options", [{}, {"dora": True, "targets": ("k_proj", "mlp")}], ids=["lora", "dora"])
def test_the_same_logits(tmp_path, shape, options, monkeypatch):
    """B23: of the merged folder and the adapters beside their base; tensors of the same names and shapes as the base's."""
    base = write_base(tmp_path / "base", **shape)
    model = load_model(base)
    folder, out = write_adapter(tmp_path / "adapter", model, base, **options), tmp_path / "out"
    monkeypatch.setattr(checkpoint.shard, "__defaults__", (1 << 14,))
    assert main(["merge", str(folder), str(out)]) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1 and (out / "model.safetensors.index.json").is_file()
    whole = load_model(out)
    want = model.eval().logits(model(IDS))
    assert (whole.logits(whole(IDS)) - want).abs().max() < 1e-4
    plain = load_model(base)
    assert (plain.logits(plain(IDS)) - want).abs().max() > 1e-2
    assert not problems_of(out) and storage.verify(out)["merge"]["base"] == str(base)
    told = json.loads((out / "config.json").read_text())
    assert told["llmkit"]["stage"] == "sft" and told["llmkit"]["merge"]["adapters"] == str(folder)
    assert not {"adapter_config.json", "llmkit.json"} & {p.name for p in out.iterdir()}
    assert "Merged" in (out / "README.md").read_text()


def test_a_base_in_half_precision_stays_so(tmp_path):
    """The sum is rounded once, from fp32."""
    base = write_base(tmp_path / "base", torch.bfloat16)
    model = load_model(base, torch.float32)
    folder = write_adapter(tmp_path / "adapter", model, base, targets=("q_proj",))
    assert main(["merge", str(folder), str(tmp_path / "out")]) == 0
    kept, made = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert all(t.dtype == torch.bfloat16 for t in made.values()) and made.keys() == kept.keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    name, adapters = "model.layers.0.self_attn.q_proj", load_file(folder / WEIGHTS)
    A, B = (adapters[f"base_model.model.{name}.lora_{kind}.weight"] for kind in "AB")
    want = (kept[f"{name}.weight"].float() + 32 / 3 * B @ A).bfloat16()
    assert torch.equal(made[f"{name}.weight"], want)
    assert {n for n in kept if not torch.equal(kept[n], made[n])} == {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)
    }


@pytest.mark.parametrize("shape", [{}, {"tie_embeddings": False}], ids=["tied", "untied"])
def test_a_reward_model(tmp_path, shape, caplog):
    """Its head comes along; a head for words does not."""
    import transformers

    base = write_base(tmp_path / "base", **shape)
    model = SequenceClassifier(load_model(base).config, 2)
    init_head(model, 1)
    load_weights(model, base, may_lack=model.head_names, may_hold=("lm_head.weight",))
    head = {"head": "classify", "n_labels": 2, "labels": ("no", "yes")}
    folder, out = write_adapter(tmp_path / "adapter", model, base, head), tmp_path / "out"
    assert not problems_of(folder)
    assert main(["merge", str(folder), str(out)]) == 0
    lengths, made = torch.tensor([12, 5]), load_classifier(out, n_scores=2)
    assert (made(IDS, lengths) - model(IDS, lengths)).abs().max() < 1e-4
    assert not problems_of(out) and "lm_head.weight" not in load_file(out / "model.safetensors")
    caplog.clear()
    loader = transformers.AutoModelForSequenceClassification
    theirs, info = loader.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()) and theirs.config.id2label == {0: "no", 1: "yes"}
    assert not [r for r in caplog.records if r.name.startswith("transformers")]


def test_nothing_is_left_of_a_merge_that_fails(tmp_path, monkeypatch, capsys):
    base = write_base(tmp_path / "base")
    folder, out = write_adapter(tmp_path / "adapter", load_model(base), base), tmp_path / "out"
    monkeypatch.setattr(storage, "disk", ShimDisk(6, errno.ENOSPC))
    assert main(["merge", str(folder), str(out)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
    monkeypatch.setattr(storage, "disk", storage.Disk())
    tensors = load_file(folder / WEIGHTS)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] * float("inf")}, folder / WEIGHTS)
    assert main(["merge", str(folder), str(out)]) == 2
    assert "not finite" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
    (base / "config.json").unlink()
    assert main(["merge", str(folder), str(out)]) == 2
    error = capsys.readouterr().err
    assert "the model they belong to can't be loaded" in error and error.count("\n") == 1
