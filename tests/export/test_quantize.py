"""`llmkit quantize`: folders in 8 and 4 bits, what they keep of a model, and what is refused."""

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
from llmkit.config import UserError
from llmkit.export.calibration import Inputs, quantize_model
from llmkit.export.quantize import calibration_texts
from llmkit.export.rounding import fit_groups, quantize_weight, round_by_products
from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import generate
from llmkit.model.config import GPTConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.heads import SequenceClassifier, init_head
from llmkit.model.quantization import Quantization, QuantizedWeight, stored_tensors
from llmkit.model.weights import load_classifier, load_model, load_weights
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.tools.verify import problems_of
from llmkit.training import checkpoint

BYTES = Tokenizer.train([], TokenizerConfig(kind="byte"))
GPT2 = {
    "positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "qkv_bias": True, "o_bias": True, "mlp_bias": True,
}  # fmt: skip
MOE = {"experts": {"n": 3, "n_active": 1, "d_ff": 32}, "qk_norm": True}
IDS = torch.randint(0, 261, (2, 12), generator=torch.Generator().manual_seed(5))
FILE = "quantized.safetensors"
PLAIN = "model.safetensors"


def write(folder: Path, dtype: torch.dtype = torch.float32, **shape) -> Path:
    """A model that is wide enough for scales to weigh little, with weights that make its logits differ."""
    folder.mkdir()
    model = GPT(
        GPTConfig(**{"n_layers": 2, "n_heads": 2, "d_model": 64, "max_seq_len": 32, "vocab_size": 320, **shape})
    )
    init_weights(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5 if p.dim() == 2 else 1)
    model.to(dtype)
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, folder / PLAIN, {"format": "pt"})
    for name, content in model_files(model.config, dtype, BYTES, {"stage": "sft", "step": 1}).items():
        (folder / name).write_bytes(content)
    return folder


def divergence(model: GPT, other: GPT) -> float:
    """Mean KL(model || other) over some positions, nats."""
    p, q = (m.logits(m(IDS)).log_softmax(-1) for m in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


# --- rounding --------------------------------------------------------------------------------------------------------


def test_fitted_groups_are_better_than_their_range_cut_in_equal_parts():
    values = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    codes, scales, lows = fit_groups(values, torch.ones(32), torch.float16)
    found = (codes * scales.float()[:, None] + lows.float()[:, None] - values).square().sum(-1)
    least, most = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    step = (most - least) / 15
    plain = (((values - least) / step).round() * step + least - values).square().sum(-1)
    assert codes.max() <= 15 and (found <= plain * 1.001).all() and found.mean() < 0.85 * plain.mean()


def test_errors_that_count_more_are_made_smaller():
    values = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    weight = torch.cat((torch.full((4,), 100.0), torch.ones(28)))
    errors = []
    for w in (torch.ones(32), weight):
        codes, scales, lows = fit_groups(values, w, torch.float32)
        errors.append((codes * scales[:, None] + lows[:, None] - values)[:, :4].square().mean())
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_at_the_edges(bits):
    """Rows that are 0 or constant, numbers that fp16 can't hold, a last group that is short, two values apart by much."""
    W = torch.zeros(6, 37)
    W[1] = 3.0
    W[2] = 1e-30
    W[3] = torch.linspace(-2e5, 2e5, 37)
    W[4, ::2], W[4, 1::2] = 0.25, -0.5
    weight = quantize_weight(W, Quantization(bits))
    assert torch.equal(weight.dense()[0], W[0]) and weight.dense().isfinite().all()
    assert torch.allclose(weight.dense(), W, rtol=0, atol=2e5 / (127 if bits == 8 else 14))
    assert torch.allclose(weight.dense()[[1, 4]], W[[1, 4]], rtol=1e-2)
    assert weight.scales.dtype == torch.float32
    small = quantize_weight(W[3:4] * 1e-12, Quantization(bits))
    assert (small.dense() - W[3] * 1e-12).abs().max() <= 2e-7 / (127 if bits == 8 else 14)
    assert quantize_weight(torch.randn(3, 32), Quantization(4)).scales.dtype == torch.float16


@pytest.mark.parametrize("scheme", [Quantization(8), Quantization(4), Quantization(4, 16)], ids=str)
def test_the_error_of_normal_weights(scheme):
    W = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    error = (quantize_weight(W, scheme).dense() - W).norm() / W.norm()
    assert error < {8: 0.009, 4: 0.075}[scheme.bits]


def test_rounding_by_products_keeps_products():
    """On inputs that are correlated the products are off by less than half, though the weights are off by more."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 12, generator=generator) @ torch.randn(12, 96, generator=generator)
    x += 0.1 * torch.randn(500, 96, generator=generator)
    W = torch.randn(40, 96, generator=generator) * 0.1
    plain = quantize_weight(W, Quantization(4)).dense()
    kept = quantize_weight(W, Quantization(4), x.t() @ x).dense()
    assert (x @ (kept - W).t()).norm() < 0.5 * (x @ (plain - W).t()).norm()
    assert (kept - W).norm() > (plain - W).norm()


def test_inputs_that_never_come():
    """A column whose inputs are all 0, and a matrix that sees none at all, are rounded by their weights."""
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    hessian = torch.diag(torch.cat((torch.ones(63), torch.zeros(1))))
    for h in (hessian, torch.zeros(64, 64)):
        codes, scales, lows = round_by_products(W, h, 32, torch.float16)
        dense = (codes * scales.float()[..., None] + lows.float()[..., None]).view(8, 64)
        assert (dense - W).norm() < 0.1 * W.norm()


# --- calibration -----------------------------------------------------------------------------------------------------


def test_inputs_of_layers_that_are_given_the_same_are_added_up_once():
    layers = {name: torch.nn.Linear(4, 2) for name in ("q", "k", "o")}
    inputs, xs = Inputs(layers), [torch.randn(1, 3, 4) for _ in range(4)]
    with inputs.watched():
        for x, other in (xs[:2], xs[2:]):
            for name, given in (("q", x), ("k", x), ("o", other)):
                layers[name](given)
    layers["q"](xs[0])  # no longer watched
    want = sum(x[0].t() @ x[0] for x in xs[::2])
    assert torch.allclose(inputs.hessian("q"), want, atol=1e-5) and inputs.hessian("k") is inputs.hessian("q")
    assert torch.allclose(inputs.hessian("o"), sum(x[0].t() @ x[0] for x in xs[1::2]), atol=1e-5)
    assert Inputs(layers).hessian("q") is None


@pytest.mark.parametrize("shape", [{}, {"tie_embeddings": False}, GPT2, MOE], ids=["tied", "untied", "gpt2", "experts"])
def test_calibration_keeps_more_of_the_model(tmp_path, shape):
    """Also with one text of one token, and with experts that no token chose."""
    base = write(tmp_path / "base", **shape)
    original, plain, kept, poor = (load_model(base) for _ in range(4))
    quantize_model(plain, Quantization(4))
    count: list[int] = []
    quantize_model(kept, Quantization(4), [row.tolist() for row in IDS], lambda: count.append(1))
    assert len(count) == sum(isinstance(p, QuantizedWeight) for p in kept.parameters())
    assert divergence(original, kept) < 0.8 * divergence(original, plain)
    quantize_model(poor, Quantization(4), [[7]])
    assert divergence(original, poor) < 1.0


def test_texts_and_conversations(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("a river " * 20)
    rows = calibration_texts(str(tmp_path / "t.txt"), None, BYTES, 32)
    assert max(map(len, rows)) == 32 and sum(map(len, rows)) == 161 and rows[0][0] == BYTES.bos_id
    (tmp_path / "d.jsonl").write_text('{"text": "one", "n": 1}\n{"text": "", "n": 2}\n{"text": "three", "n": 3}\n')
    assert len(calibration_texts(str(tmp_path / "d.jsonl"), None, BYTES, 32)) == 2
    (tmp_path / "b.jsonl").write_text('{"body": "one"}\n')
    assert calibration_texts(str(tmp_path / "b.jsonl"), "body", BYTES, 32) == [[BYTES.bos_id, *BYTES.encode("one")]]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "好"}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (row,) = calibration_texts(str(tmp_path / "c.jsonl"), None, BYTES, 99)
    assert row == BYTES.encode_chat(turns).ids
    monkeypatch.setattr("llmkit.export.quantize.TOKENS", 40)
    assert [len(r) for r in calibration_texts(str(tmp_path / "t.txt"), None, BYTES, 32)] == [32, 8]
    (tmp_path / "e.txt").write_text("")
    with pytest.raises(UserError, match="there is no text in it"):
        calibration_texts(str(tmp_path / "e.txt"), None, BYTES, 32)


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{}, {"tie_embeddings": False}, GPT2, MOE], ids=["tied", "untied", "gpt2", "experts"])
@pytest.mark.parametrize(("bits", "largest", "farthest"), [(8, 0.28, 1e-3), (4, 0.2, 0.2)])
def test_a_folder_comes_back_bit_for_bit(tmp_path, shape, bits, largest, farthest, monkeypatch):
    """Codes and scales are those that were made, in several files too; made again they are the same bytes; the model
    says about what it said, and `generate` works. Tied embeddings are there once (B65)."""
    base, out, again = write(tmp_path / "base", **shape), tmp_path / "out", tmp_path / "again"
    assert main(["quantize", str(base), str(out), "--bits", str(bits)]) == 0
    before, after = (f.stat().st_size for f in (base / PLAIN, out / FILE))
    header = 8 + int.from_bytes(
        (out / FILE).read_bytes()[:8], "little"
    )  # of so small a model the names are a large part
    assert after - header < largest * before
    made = load_model(base)
    quantize_model(made, Quantization(bits))
    model, stored = load_model(out), load_file(out / FILE)
    for tensors in (stored_tensors(model), stored_tensors(made)):
        assert tensors.keys() == stored.keys()
        assert all(t.dtype == stored[n].dtype and torch.equal(t, stored[n]) for n, t in tensors.items())
    assert sum(n.startswith(("model.embed_tokens", "lm_head")) for n in stored) == (
        (2 if bits == 8 else 3) * (1 if model.config.tie_embeddings else 2)
    )
    assert not problems_of(out) and storage.verify(out)["quantize"]["bits"] == bits
    monkeypatch.setattr(checkpoint.shard, "__defaults__", (1 << 14,))
    assert main(["quantize", str(base), str(again), "--bits", str(bits)]) == 0
    assert len(list(again.glob("quantized-*.safetensors"))) > 1 and not problems_of(again)
    twin = stored_tensors(load_model(again))
    assert twin.keys() == stored.keys() and all(torch.equal(t, stored[n]) for n, t in twin.items())
    original = load_model(base)
    assert divergence(original, model) < farthest
    (text,) = generate(model, [[1, 70, 80]], SamplingConfig(temperature=0.0, max_new_tokens=4), tokenizer=BYTES)
    assert 1 <= len(text.ids) <= 4


def test_what_a_folder_tells(tmp_path, capsys):
    base = write(tmp_path / "base", torch.bfloat16)
    (tmp_path / "t.txt").write_text("the mill stands by the river " * 5)
    argv = ["quantize", str(base), str(tmp_path / "out"), "--bits", "4", "--group", "16"]
    assert main([*argv, "--calibrate", str(tmp_path / "t.txt")]) == 0
    assert "int4 in groups of 16" in capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["quantization_config"] == {"quant_method": "llmkit", "bits": 4, "group": 16}
    assert told["llmkit"]["stage"] == "sft" and told["llmkit"]["quantize"]["calibration_tokens"] == 146
    assert "from_pretrained" not in (tmp_path / "out" / "README.md").read_text()
    model = load_model(tmp_path / "out")
    assert model.head_weight.dtype == torch.bfloat16 and model(IDS).dtype == torch.bfloat16
    wide = load_model(tmp_path / "out", torch.float32)
    assert wide(IDS).dtype == torch.float32 and (wide(IDS) - model(IDS).float()).norm() < 0.05 * wide(IDS).norm()


def test_a_folder_says_that_inputs_are_rounded_as_well(tmp_path, capsys):
    """The same codes as without; what differs is how they are computed with, and by little."""
    base, plain, dynamic = write(tmp_path / "base"), tmp_path / "plain", tmp_path / "dynamic"
    assert main(["quantize", str(base), str(plain), "--bits", "8"]) == 0
    assert main(["quantize", str(base), str(dynamic), "--bits", "8", "--dynamic"]) == 0
    assert "inputs in int8 as well" in capsys.readouterr().out and not problems_of(dynamic)
    assert json.loads((dynamic / "config.json").read_text())["quantization_config"] == {
        "quant_method": "llmkit", "bits": 8, "dynamic": True,
    }  # fmt: skip
    assert (plain / FILE).read_bytes() == (dynamic / FILE).read_bytes()
    models = [load_model(folder) for folder in (base, plain, dynamic)]
    assert 0 < divergence(models[0], models[1]) < divergence(models[0], models[2]) < 0.02
    found = [
        generate(models[2], prompts, SamplingConfig(temperature=0.0, max_new_tokens=6), tokenizer=BYTES)
        for prompts in ([[1, 70, 80]], [[1, 70, 80], [1, 90, 91, 92, 93]])
    ]
    assert found[0][0].ids == found[1][0].ids  # what stands beside a row is nothing to its rounding


def test_plain_transformers_refuses_it_aloud(tmp_path):
    transformers = pytest.importorskip("transformers")
    base = write(tmp_path / "base")
    assert main(["quantize", str(base), str(tmp_path / "out"), "--bits", "8"]) == 0
    with pytest.raises(Exception, match=r"no file named model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_reward_model(tmp_path):
    """Its head of scores stays as it is."""
    base = write(tmp_path / "base")
    model = SequenceClassifier(load_model(base).config, 1)
    init_head(model, 1)
    load_weights(model, base, may_lack=model.head_names, may_hold=("lm_head.weight",))
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, base / PLAIN, {"format": "pt"})
    files = model_files(model.config, torch.float32, BYTES, {"stage": "reward", "step": 1}, head="classify")
    (base / "config.json").write_bytes(files["config.json"])
    assert main(["quantize", str(base), str(tmp_path / "out"), "--bits", "8"]) == 0
    made, lengths = load_classifier(tmp_path / "out", n_scores=1), torch.tensor([12, 5])
    assert torch.equal(made.get_parameter("score.weight"), model.get_parameter("score.weight"))
    want = model.eval()(IDS, lengths)
    assert (made(IDS, lengths) - want).abs().max() < 0.05 * want.abs().max() and not problems_of(tmp_path / "out")


def test_a_model_does_not_change_with_its_file(tmp_path):
    """B116: what was read is a copy."""
    base, out = write(tmp_path / "base"), tmp_path / "out"
    assert main(["quantize", str(base), str(out), "--bits", "8"]) == 0
    model = load_model(out)
    want = model(IDS)
    with (out / FILE).open("r+b") as f:
        f.write(b"\x00" * (out / FILE).stat().st_size)
    assert torch.equal(model(IDS), want)


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and its quantised folder; not to be changed."""
    folder = tmp_path_factory.mktemp("pair")
    base = write(folder / "base")
    assert main(["quantize", str(base), str(folder / "int4"), "--bits", "4"]) == 0
    return base, folder / "int4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "8", "--group", "32"], "is for --bits 4"),
        (["--bits", "8", "--calibrate", "x.txt"], "is for --bits 4"),
        (["--bits", "4", "--dynamic"], "is for --bits 8"),
        (["--bits", "4", "--group", "5"], "an even number from 2"),
        (["--bits", "4", "--group", "0"], "an even number from 2"),
        (["--bits", "4", "--field", "body"], "name its file too"),
        (["--bits", "4", "--calibrate", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_options_that_do_not_go_together(pair, tmp_path, options, message, capsys):
    assert main(["quantize", str(pair[0]), str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_quantised_model_is_for_inference_alone(pair, tmp_path, capsys):
    """It can be neither quantised again, trained, averaged nor given adapters."""
    base, small = pair
    assert main(["quantize", str(small), str(tmp_path / "out"), "--bits", "8"]) == 2
    assert "is quantised already (int4 in groups of 32)" in capsys.readouterr().err
    assert main(["quantize", str(base), str(small), "--bits", "8"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["average", str(tmp_path / "out"), str(small), str(small)]) == 2
    assert "is quantised (int4 in groups of 32): take the model" in capsys.readouterr().err
    with pytest.raises(UserError, match="can't be trained: take the model they were made from"):
        load_weights(GPT(load_model(base).config), small)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(small), "r": 2, "target_modules": ["q_proj"]})
    )
    save_file({"x": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="adapters need the model it was made from"):
        load_model(adapter)


@pytest.mark.parametrize("what", ["missing", "shape", "dtype", "group", "size", "infinite"])
def test_damage_is_named(pair, tmp_path, what):
    """B66: names, shapes and dtypes are checked against config.json before a model is built."""
    out, name = tmp_path / "out", "model.layers.0.mlp.up_proj.weight"
    out.mkdir()
    for file in pair[1].iterdir():
        if file.name != "manifest.json":
            (out / file.name).write_bytes(file.read_bytes())
    tensors, config = load_file(out / FILE), json.loads((out / "config.json").read_text())
    if what == "missing":
        del tensors[f"{name}.lows"]
    elif what == "shape":
        tensors[f"{name}.codes"] = tensors[f"{name}.codes"][:, :-1].contiguous()
    elif what == "dtype":
        tensors[f"{name}.codes"] = tensors[f"{name}.codes"].view(torch.int8)
    elif what == "infinite":
        tensors[f"{name}.scales"][0, 0] = float("inf")
    elif what == "group":
        config["quantization_config"]["group"] = 16
    else:
        config["vocab_size"] = 10**9
    save_file(tensors, out / FILE)
    (out / "config.json").write_text(json.dumps(config))
    if what == "infinite":
        assert "1 values are not finite" in problems_of(out)[0]
        return
    with pytest.raises(UserError) as e:
        load_model(out)
    expected = {"dtype": "is int8: uint8 is expected", "size": "do not belong together", "group": "asks for (64, 12)"}
    assert expected.get(what, name) in str(e.value).replace("layers.*", "layers.0")
    assert what == "dtype" or problems_of(out)


def test_weights_that_are_not_finite(tmp_path, capsys):
    base = write(tmp_path / "base")
    tensors = load_file(base / PLAIN)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, base / PLAIN, {"format": "pt"})
    assert main(["quantize", str(base), str(tmp_path / "out"), "--bits", "4"]) == 2
    assert "model.layers.1.mlp.up_proj.weight: the weights are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_of_a_folder_that_could_not_be_written(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(storage, "disk", ShimDisk(6, errno.ENOSPC))
    assert main(["quantize", str(pair[0]), str(tmp_path / "out"), "--bits", "8"]) == 1
    assert "No space left on device" in capsys.readouterr().err and not list(tmp_path.iterdir())
