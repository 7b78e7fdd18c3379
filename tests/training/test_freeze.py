"""`freeze`: which parameters are meant, and that they cost and change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reliability import assert_same, read_jsonl, tiny_recipe, train
from toys import linear, points, recipe, regression, rows, tiny_gpt, uneven_documents, write_shards

from llmkit.config import UserError
from llmkit.storage import newest_good
from llmkit.training import checkpoint
from llmkit.training.engine import Engine
from llmkit.training.freeze import freeze, frozen_names
from llmkit.training.norms import layers_of

NAMES = [n for n, _ in tiny_gpt(n_layers=12, tie_embeddings=False).named_parameters()]


def meant(*patterns: str) -> set[str]:
    return set(layers_of(frozen_names(NAMES, patterns)))


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("layers.0", {"layers.0"}),
        ("model.layers.1", {"layers.1"}),  # and not 10 and 11
        ("layers.0-3", {f"layers.{i}" for i in range(4)}),
        ("model.layers.9-11.mlp", {"layers.9", "layers.10", "layers.11"}),
        ("embed_tokens", {"embed_tokens"}),
        ("model.embed_tokens.weight", {"embed_tokens"}),
        ("lm_head", {"lm_head"}),
        ("norm", {"norm"}),
        ("layers", {f"layers.{i}" for i in range(12)}),
        ("layers.*.self_attn.[qk]_proj.weight", {f"layers.{i}" for i in range(12)}),
    ],
)
def test_patterns(pattern: str, layers: set[str]) -> None:
    assert meant(pattern) == layers


def test_patterns_are_exact() -> None:
    assert frozen_names(NAMES, ["layers.2.mlp", "norm"]) == {
        "model.norm.weight", *(f"model.layers.2.mlp.{k}_proj.weight" for k in ("gate", "up", "down"))
    }  # fmt: skip
    norms = frozen_names(NAMES, ["*norm*"])
    assert len(norms) == 25 and all("norm" in n for n in norms)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["layers.12"], r"'layers.12' is no parameter's name: near are .*layers.1"),
        (["embed_token"], "near are embed_tokens"),
        (["layers.0.self_atn"], "near are layers.0.self_attn"),
        (["xyz"], "there are embed_tokens, layers.0, .*, lm_head"),
        (["layers.3-2"], "the range 3-2 is empty"),
        (["model"], None),
        (["model", "lm_head"], "this is every parameter"),
        (["*"], "this is every parameter"),
    ],
)
def test_mistakes(patterns: list[str], message: str | None) -> None:
    if message is None:
        assert frozen_names(NAMES, patterns) == {n for n in NAMES if n.startswith("model.")}
        return
    with pytest.raises(UserError, match=f"^freeze: .*{message}") as e:
        frozen_names(NAMES, patterns)
    assert "\n" not in str(e.value)


def test_a_tied_head_is_named() -> None:
    model = tiny_gpt()
    with pytest.raises(UserError, match="the head is tied to embed_tokens: freeze that"):
        freeze(model, ["lm_head"])
    told = freeze(model, ["embed_tokens"])
    assert told is not None and "(and with it the output head, which is tied to it)" in told
    assert freeze(tiny_gpt(), []) is None
    told = freeze(tiny_gpt(tie_embeddings=False), ["embed_tokens"])
    assert told is not None and "tied" not in told


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_parameters_cost_and_change_nothing(tmp_path: Path, name: str, precision: str) -> None:
    """No gradient, no master, no moments, no average, no decay: bitwise what they were; the others move (B14, B23)."""
    shards = write_shards(tmp_path / "s", uneven_documents())
    model = tiny_gpt()
    freeze(model, ["embed_tokens", "layers.0", "*norm*"])
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    engine = Engine(model, recipe(precision, name=name, lr=0.02, weight_decay=0.5, momentum=0.9, ema_decay=0.9))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    from llmkit.training.supervised import token_loss

    loader = rows(shards)
    for k in range(3):
        engine.update(loader.step(k), token_loss(0.0, 64))
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) is (n in frozen), n
        assert p.grad is None
    trained = before.keys() - frozen
    assert engine.grads.keys() == engine.masters.keys() == engine.ema.keys() == trained
    n_trained = sum(before[n].numel() for n in trained)
    assert engine.flat_grad.numel() == n_trained
    for kind, tensors in engine.optimizer.state.items():
        assert tensors.keys() <= trained, kind
    files = engine.tensors()
    assert files["model.safetensors"].keys() == before.keys()
    for file, tensors in files.items():
        if file != "model.safetensors":
            assert not any(n in key for key in tensors for n in frozen), file


def test_a_frozen_part_trains_as_one_held_still() -> None:
    """The trained part's steps are those of least squares with the rest held constant."""
    module, plain = linear(), linear()
    freeze(module, ["bias"])
    engine = Engine(module, recipe(name="sgd", lr=0.1, weight_decay=0.0, clip=None))
    data = points()
    w, b = plain.weight.detach().clone(), plain.bias.detach().clone()
    for _ in range(3):
        engine.update([data], regression)
        w -= 0.1 * (data.x @ w.T + b - data.y).T @ data.x / len(data.x)
    torch.testing.assert_close(module.weight.detach(), w, rtol=1e-12, atol=0)
    assert torch.equal(module.bias, b)


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what is trained, saves everything, resumes exactly, and another set on resume is refused."""
    changes = {"steps": 12, "freeze": ["embed_tokens", "layers.0"], "model": {"tie_embeddings": False}}
    whole, parts = (tiny_recipe(tmp_path, out=str(tmp_path / n), **changes) for n in ("whole", "parts"))
    assert train(whole) == 0
    said = capsys.readouterr().out
    assert "parameters (" in said and "; frozen: embed_tokens, layers.0\n" in said
    assert train(parts, "stop_at=7") == 0
    assert train(parts, "stop_at=8", "freeze=[layers.0]") == 2
    assert "freeze" in capsys.readouterr().err
    assert train(parts) == 0
    assert_same(tmp_path / "parts", tmp_path / "whole")
    first, last = (tmp_path / "whole" / "checkpoints" / f"step-{s:08d}" for s in (8, 12))
    (a, _), (b, state) = checkpoint.load(first), checkpoint.load(last)
    for name, t in a["model.safetensors"].items():
        still = "embed_tokens" in name or "layers.0." in name
        assert torch.equal(t, b["model.safetensors"][name]) is still, name
    assert state["engine"]["step"] == 12 and newest_good(tmp_path / "whole")[0] == last
    assert len(read_jsonl(tmp_path / "whole" / "metrics.jsonl")) >= 12
    assert json.loads((tmp_path / "whole" / "DONE").read_text())["metric"] == "valid/loss"
