"""The small files of a checkpoint folder, for each kind of head: loaded by plain transformers with an empty log."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmkit.config import UserError
from llmkit.model.config import GPTConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT, Decoder, init_weights
from llmkit.model.layouts import use_layout
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.tools.verify import problems_of

transformers = pytest.importorskip("transformers")

MASKED = Tokenizer.train([], TokenizerConfig(kind="byte", special=("<|mask|>",)))
PLAIN = Tokenizer.train([], TokenizerConfig(kind="byte"))
GPT2 = {
    "positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "qkv_bias": True, "o_bias": True, "mlp_bias": True,
}  # fmt: skip
FACTS = {"stage": "pretrain", "step": 3, "note": "ours"}


class Classifier(torch.nn.Module):
    def __init__(self, config: GPTConfig, n_labels: int):
        super().__init__()
        self.model, self.score = Decoder(config, False), torch.nn.Linear(config.d_model, n_labels, bias=False)
        use_layout(self, config)


def shape(**options) -> GPTConfig:
    return GPTConfig(n_layers=1, n_heads=2, d_model=16, max_seq_len=32, vocab_size=320, **options)


def write(folder: Path, module: torch.nn.Module, files: dict[str, bytes]) -> None:
    init_weights(module, 0)
    save_file(module.state_dict(), folder / "model.safetensors")
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "kind,options", [("generate", GPT2), ("fill", {"causal": False}), ("classify", {}), ("classify", GPT2)]
)
def test_a_folder_of_each_kind(tmp_path, kind, options, caplog):
    """B66: ids, lengths and classes agree between config.json, the tokenizer and the weights."""
    config = shape(**options, tie_embeddings=False)
    tokenizer = MASKED if kind == "fill" else PLAIN
    head = {"head": "classify", "n_labels": 2, "labels": ("no", "yes")} if kind == "classify" else {}
    module = Classifier(config, 2) if kind == "classify" else GPT(config)
    files = model_files(config, torch.float32, tokenizer, FACTS, **head)
    write(tmp_path, module, files)
    loader, tag = {
        "generate": ("AutoModelForCausalLM", "text-generation"),
        "fill": ("AutoModelForMaskedLM", "fill-mask"),
        "classify": ("AutoModelForSequenceClassification", "text-classification"),
    }[kind]
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        model = getattr(transformers, loader).from_pretrained(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert caplog.records == []
    card = files["README.md"].decode()
    assert f"pipeline_tag: {tag}" in card and f"{loader}.from_pretrained" in card
    assert ("generation_config.json" in files) == (kind == "generate")
    assert model.config.llmkit == FACTS
    assert (model.config.pad_token_id, model.config.eos_token_id) == (tokenizer.pad_id, tokenizer.eos_id)
    assert problems_of(tmp_path) == []
    if kind == "fill":
        assert model.config.mask_token_id == theirs.mask_token_id == tokenizer.mask_id is not None
    if kind == "classify":
        assert model.config.id2label == {0: "no", 1: "yes"} and model.config.num_labels == 2


def test_a_model_that_fills_in_needs_a_mask_token():
    with pytest.raises(UserError, match="it has no mask token"):
        model_files(shape(causal=False), torch.float32, PLAIN, FACTS)
