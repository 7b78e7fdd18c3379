"""ONNX: the graph in ONNX Runtime against our own network, over shapes, with and without a past, padded, and greedily."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llmkit import storage
from llmkit.cli import main
from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import generate
from llmkit.model.config import GPTConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.weights import load_model
from llmkit.tokenizer import Tokenizer, TokenizerConfig

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

BYTES = Tokenizer.train([], TokenizerConfig(kind="byte"))
SHAPES = {
    "llama": {"n_kv_heads": 2, "tie_embeddings": False, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 16, "sliding_window": 6, "n_full_layers": 1},
    "gpt2": {
        "positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "qkv_bias": True, "o_bias": True,
        "mlp_bias": True,
    },
}  # fmt: skip


def write_model(folder: Path, dtype: torch.dtype = torch.float32, **shape) -> Path:
    folder.mkdir()
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 32, "max_seq_len": 48, "vocab_size": 320}
    config = GPTConfig(**{**sizes, **shape})
    model = GPT(config)
    init_weights(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(8)
    tensors = {n: t.contiguous().to(dtype) for n, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name, content in model_files(config, dtype, BYTES, {"stage": "sft", "step": 7}).items():
        (folder / name).write_bytes(content)
    return folder


class Runtime:
    """A user's side: ONNX Runtime and the names in the folder's card, nothing of llmkit."""

    def __init__(self, folder: Path):
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        self.past = [i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]

    def __call__(self, ids, mask, past: dict | None = None) -> tuple[np.ndarray, dict]:
        if past is None:
            past = {i.name: np.zeros((len(ids), i.shape[1], 0, i.shape[3]), np.float32) for i in self.past}
        names = [o.name for o in self.session.get_outputs()]
        feeds = {"input_ids": np.asarray(ids, np.int64), "attention_mask": np.asarray(mask, np.int64), **past}
        got = dict(zip(names, self.session.run(None, feeds), strict=True))
        return got.pop("logits"), {name.replace("present", "past_key_values"): x for name, x in got.items()}


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory) -> tuple[GPT, Runtime, Path]:
    place = tmp_path_factory.mktemp(request.param)
    # B67: what was saved in bf16 is exact in the graph's fp32.
    dtype = torch.bfloat16 if request.param == "gpt2" else torch.float32
    folder = write_model(place / "model", dtype, **SHAPES[request.param])
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "qwen3":
            patch.setattr("llmkit.export.onnx._IN_ONE_FILE", 0)  # as a model of more than a gigabyte
        assert main(["export", str(folder), str(place / "onnx"), "--format", "onnx"]) == 0
    model = load_model(folder, torch.float32)
    assert model.config.family == request.param
    return model, Runtime(place / "onnx"), place / "onnx"


def logits_of(model: GPT, ids) -> np.ndarray:
    with torch.no_grad():
        return model.logits(model(torch.as_tensor(ids))).numpy()


def test_the_same_logits_over_shapes(pair):
    """B56: any rows, lengths and cuts, one token and none of a past included; past the window of 6."""
    model, runtime, _ = pair
    rng = np.random.default_rng(0)
    worst = 0.0
    for n in range(25):
        B, S = int(rng.integers(1, 6)), 1 if n == 0 else int(rng.integers(1, 49))
        ids = rng.integers(0, 320, (B, S))
        cuts = sorted({0, S, *rng.integers(0, S + 1, int(rng.integers(0, 4))).tolist()})
        pieces, past = [], None
        for start, end in itertools.pairwise(cuts):
            logits, past = runtime(ids[:, start:end], np.ones((B, end)), past)
            pieces.append(logits)
        want = logits_of(model, ids)
        worst = max(worst, float(np.abs(np.concatenate(pieces, 1) - want).max()))
        assert all(x.shape[2] == S for x in past.values())
    assert np.abs(want).max() > 1 and worst <= 1e-4


def test_padding_on_either_side(pair):
    """B54: rows of different lengths are what they are alone; positions come from the mask."""
    model, runtime, _ = pair
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 320, n) for n in (3, 11, 1, 8)]
    for left in (True, False):
        ids, mask = np.zeros((4, 11), np.int64), np.zeros((4, 11), np.int64)
        for b, row in enumerate(rows):
            here = slice(11 - len(row), 11) if left else slice(0, len(row))
            ids[b, here], mask[b, here] = row, 1
        logits, past = runtime(ids, mask)
        assert np.isfinite(logits).all()
        for b, row in enumerate(rows):
            assert np.abs(logits[b][mask[b] == 1] - logits_of(model, row[None])[0]).max() <= 1e-4
        if left:  # and so is what follows
            more = rng.integers(0, 320, (4, 2))
            logits, _ = runtime(more, np.concatenate([mask, np.ones((4, 2))], 1), past)
            for b, row in enumerate(rows):
                want = logits_of(model, np.concatenate([row, more[b]])[None])[0, -2:]
                assert np.abs(logits[b] - want).max() <= 1e-4


def test_greedy_text_is_equal(pair):
    model, runtime, _ = pair
    rng = random.Random(0)
    prompts = [[rng.randrange(5, BYTES.vocab_size) for _ in range(n)] for n in (1, 5, 12)]
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=20)
    for prompt, ours in zip(prompts, generate(model, prompts, sampling, tokenizer=BYTES), strict=True):
        found, past, ids = [], None, prompt
        while len(found) < len(ours.ids):
            logits, past = runtime([ids], np.ones((1, len(prompt) + len(found))), past)
            ids = [int(logits[0, -1, : BYTES.vocab_size].argmax())]
            found += ids
        assert found == list(ours.ids)


def test_the_folder(pair):
    """Checked by ONNX's own checker, sealed by a manifest, with what runtimes look for; no paths of this machine."""
    import onnx

    model, _, folder = pair
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "model.onnx", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md",
        "manifest.json", *(["model.onnx.data"] if model.config.family == "qwen3" else []),
    }  # fmt: skip
    assert storage.verify(folder)["export"]["format"] == "onnx"
    data = (folder / "model.onnx").read_bytes()
    assert b".py" not in data and str(Path.cwd()).encode() not in data
    assert json.loads((folder / "config.json").read_text())["llmkit"]["step"] == 7
    shapes = {i.name: i.shape for i in onnxruntime.InferenceSession(folder / "model.onnx").get_inputs()}
    assert shapes["attention_mask"] == ["batch_size", "past_sequence_length + sequence_length"]
    assert Tokenizer.load(folder).hash == BYTES.hash


@pytest.mark.parametrize(
    ("shape", "options", "says"),
    [
        ({"qk_norm": True, "experts": {"n": 4, "n_active": 2, "d_ff": 16}}, [], "mixture of experts"),
        ({}, ["--type", "q4_0"], "ONNX is written as f32"),
    ],
)
def test_what_is_refused(tmp_path, capsys, shape, options, says):
    folder = write_model(tmp_path / "m", **shape)
    assert main(["export", str(folder), str(tmp_path / "out"), "--format", "onnx", *options]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_graph_that_differs_is_not_kept(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "m", n_layers=1)
    program = SimpleNamespace(model=None, save=lambda file, external_data: file.write_bytes(b"graph"))
    monkeypatch.setattr("llmkit.export.onnx._program_of", lambda model: program)
    monkeypatch.setattr("llmkit.export.onnx._tidy", lambda model, config: None)
    monkeypatch.setattr("llmkit.export.onnx.largest_difference", lambda model, file: float("nan"))
    with pytest.raises(RuntimeError, match="is not kept"):
        main(["export", str(folder), str(tmp_path / "out"), "--format", "onnx"])
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, capsys, package):
    folder = write_model(tmp_path / "m", n_layers=1)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["export", str(folder), str(tmp_path / "out"), "--format", "onnx"]) == 2
    assert f"({package}): pip install 'llmkit[onnx]'" in capsys.readouterr().err
