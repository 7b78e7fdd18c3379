"""Runs with adapters: something is learnt while the base stays as it is, killed ones resume bitwise, and every command
takes their folders."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from reliability import Crash, ShimDisk, assert_same, read_jsonl, result_of, tiny_recipe, train
from safetensors.torch import load_file

from llmkit import storage
from llmkit.cli import main
from llmkit.model.hf import read_config, read_labels
from llmkit.model.weights import load_classifier, load_model, shapes_of, weight_files
from llmkit.stages import load_recipe
from llmkit.stages.pretrain import PretrainTask
from llmkit.storage import resolve_model, sha256_of
from llmkit.tools.verify import problems_of
from llmkit.training.setup import cost, model_config

PREEMPTED, USER_MISTAKE = 75, 2
DORA = {"r": 4, "alpha": 16, "dropout": 0.1, "dora": True}


def other_text(path: Path) -> Path:
    """Unlike the base's: numbers that go up."""
    pick = random.Random(1)
    lines = [" ".join(str(n) for n in range(start, start + 8)) for start in (pick.randrange(90) for _ in range(160))]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in `base/`, and in `reference/` an uninterrupted run in bf16 with DoRA and an average of the adapters."""
    folder = tmp_path_factory.mktemp("lora")
    other_text(folder / "other.txt")
    base = {"out": str(folder / "base"), "steps": 40, "eval": {"every": 40}, "save": {"every": 40}}
    assert train(tiny_recipe(folder, **base)) == 0
    before = {p: sha256_of(p) for p in (folder / "base").rglob("*") if p.is_file()}
    assert train(lora_recipe(folder, "reference")) == 0
    assert {p: sha256_of(p) for p in (folder / "base").rglob("*") if p.is_file()} == before, "the base stays as it is"
    return folder


def lora_recipe(folder: Path, name: str, **changes: Any) -> Path:
    options = {
        "out": str(folder / name), "init_from": str(folder / "base"), "lora": DORA, "precision": "bf16", "steps": 24,
        "data": {"path": str(folder / "other.txt")}, "optim": {"lr": 2e-2}, **changes,
    }  # fmt: skip
    path = tiny_recipe(folder, **options)
    recipe = yaml.safe_load(path.read_text())
    del recipe["tokenizer"]
    recipe["model"] = {"dropout": 0.1}
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_something_is_learnt(world: Path) -> None:
    """B23: the loss falls by far, and the checkpoint holds nothing but adapters and their training state."""
    losses = [r["valid/loss"] for r in read_jsonl(world / "reference" / "metrics.jsonl") if "valid/loss" in r]
    assert losses[-1] < losses[0] - 0.5
    final = resolve_model(world / "reference")
    files = {p.relative_to(final).as_posix() for p in final.rglob("*") if p.is_file()}
    assert {"adapter_config.json", "adapter_model.safetensors", "llmkit.json", "tokenizer.json"} <= files
    assert not files & {"config.json", "model.safetensors"}
    adapters = shapes_of([final / "adapter_model.safetensors"])
    assert all(".lora_" in name for name in adapters) and len(adapters) == 2 * 7 * 3
    masters = shapes_of([final / "trainer_state" / "master.safetensors"])
    assert masters.keys() == shapes_of([final / "trainer_state" / "ema.safetensors"]).keys()
    assert all(".lora_" in name for name in masters)
    assert "training" in (world / "reference" / "train.log").read_text() and not problems_of(final)


def test_a_signal_and_two_deaths(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R5, R2: stopped in a step, then dying in a save: bitwise the run that never was stopped."""
    recipe, run = lora_recipe(world, "stopped"), world / "stopped"
    original = PretrainTask.step

    def wrapped(self: PretrainTask, engine: Any, ctx: Any) -> Any:
        if engine.step == 8:
            monkeypatch.setattr(PretrainTask, "step", original)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, engine, ctx)

    monkeypatch.setattr(PretrainTask, "step", wrapped)
    assert train(recipe) == PREEMPTED
    for at in (30, 75):
        monkeypatch.setattr(storage, "disk", ShimDisk(at))
        with pytest.raises(Crash):
            train(recipe)
    monkeypatch.setattr(storage, "disk", storage.Disk())
    assert train(recipe) == 0
    assert_same(run, world / "reference")


def test_another_base_is_refused_on_resume(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base is no part of the checkpoint: its hash is."""
    shutil.copytree(world / "base", world / "moved")
    recipe = lora_recipe(world, "changed", init_from=str(world / "moved"))
    assert train(recipe, "stop_at=6") == 0
    shutil.rmtree(world / "moved")
    assert train(tiny_recipe(world, out=str(world / "moved"), steps=4, seed=5)) == 0
    capsys.readouterr()
    assert train(recipe) == USER_MISTAKE
    assert "is not the model this run was started with" in capsys.readouterr().err
    assert main(["generate", str(world / "changed"), "--prompt", "1 2", "--device", "cpu"]) == USER_MISTAKE
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "adapters" in error


def test_every_command_takes_them(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """generate, embed, verify, merge and init_from; what `merge` writes is a plain model with the same logits."""
    run, out = world / "reference", tmp_path / "merged"
    assert main(["verify", str(run)]) == 0
    assert main(["merge", str(run), str(out)]) == 0
    assert main(["verify", str(out)]) == 0
    base, ids = resolve_model(world / "base"), torch.arange(40, 60)[None]
    model, whole = load_model(resolve_model(run), torch.float64), load_model(out, torch.float64)
    assert (model.logits(model(ids)) - whole.logits(whole(ids))).abs().max() < 1e-5
    assert shapes_of(weight_files(out)) == shapes_of(weight_files(base))
    kept, made = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(made[name].dtype == kept[name].dtype for name in kept), "of the base, not of training"
    assert {n for n in kept if not torch.equal(kept[n], made[n])} == {n for n in kept if "_proj" in n}
    assert read_config(out) == read_config(resolve_model(run))
    capsys.readouterr()
    texts = []
    for place in (run, out):
        args = ["--prompt", "1 2 3", "--temperature", "0", "--max-new-tokens", "8", "--device", "cpu"]
        assert main(["generate", str(place), *args]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["embed", str(run), "--text", "1 2", "--text", "3 4", "--device", "cpu"]) == 0
    assert main(["merge", str(out), str(tmp_path / "x")]) == USER_MISTAKE
    assert main(["merge", str(run), str(out)]) == USER_MISTAKE
    assert main(["average", str(tmp_path / "x"), str(run), str(run)]) == USER_MISTAKE
    assert not (tmp_path / "x").exists()
    go_on = tiny_recipe(
        world, out=str(world / "on"), init_from=str(run), steps=1, data={"path": str(world / "other.txt")}
    )
    told = yaml.safe_load(go_on.read_text())
    del told["tokenizer"], told["model"]
    go_on.write_text(yaml.safe_dump(told))
    assert train(go_on) == 0
    assert "adapters merged into 14" in (world / "on" / "train.log").read_text()
    first = read_jsonl(world / "on" / "metrics.jsonl")[0]["valid/loss"]
    last = [r["valid/loss"] for r in read_jsonl(run / "metrics.jsonl") if "valid/loss" in r][-1]
    assert abs(first - last) < 0.02, "bf16 there, fp32 here"


def test_transformers_loads_what_merge_writes(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import transformers

    assert main(["merge", str(world / "reference"), str(tmp_path / "m")]) == 0
    caplog.clear()
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values()) and not [r for r in caplog.records if r.name.startswith("transformers")]
    ids = torch.arange(40, 60)[None]
    model = load_model(tmp_path / "m")
    assert (theirs(ids).logits - model.logits(model(ids))).abs().max() < 1e-4


def test_plan_counts_what_is_trained(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = lora_recipe(world, "planned")
    assert main(["plan", str(recipe)]) == 0
    lines = capsys.readouterr().out
    final = resolve_model(world / "reference")
    trained = sum(torch.Size(s).numel() for s in shapes_of([final / "adapter_model.safetensors"]).values())
    assert f"trained      {trained:,} (" in lines
    told = load_recipe(recipe)
    costs = cost(told, model_config(told, 261))
    base = sum(torch.Size(s).numel() for s in shapes_of(weight_files(final)).values())
    assert (costs.n_trained_params, costs.n_params) == (trained, base + trained)
    # In bf16: adapters, their masters, average and two moments; what AdamW counts, and headers, are small.
    tensors = sum(t.numel() * t.element_size() for p in final.rglob("*.safetensors") for t in load_file(p).values())
    assert 0 <= tensors - costs.checkpoint_bytes <= 4 * 42


def test_a_run_on_4_bits(world: Path) -> None:
    """QLoRA, on the CPU: stopped and resumed bitwise; the loss falls; what is saved is adapters to the whole base."""
    pytest.importorskip("bitsandbytes")
    lora = {"r": 4, "alpha": 16, "quantize": "nf4"}
    for name in ("packed", "packed_again"):
        recipe = lora_recipe(world, name, lora=lora, steps=12, eval={"every": 12})
        if name == "packed_again":
            assert train(recipe, "stop_at=5") == 0
        assert train(recipe) == 0
    assert_same(world / "packed_again", world / "packed")
    losses = [r["valid/loss"] for r in read_jsonl(world / "packed" / "metrics.jsonl") if "valid/loss" in r]
    assert losses[-1] < losses[0] - 0.3
    assert json.loads((resolve_model(world / "packed") / "llmkit.json").read_text())["quantize"] == "nf4"
    assert not problems_of(resolve_model(world / "packed"))


def test_a_classifier_with_adapters(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The head is trained and saved with the adapters, also after a stop; the folder is a classifier, merged or not."""
    rows = [{"text": f"{word} {n}", "label": word} for n in range(40) for word in ("up", "down")]
    (world / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("judge", "judge_again"):
        recipe = {
            "stage": "reward", "objective": "classify", "out": str(world / name), "init_from": str(world / "base"),
            "lora": {"r": 4, "alpha": 16}, "steps": 16, "optim": {"lr": 1e-2}, "batch": {"tokens_per_step": 256},
            "data": {"path": str(world / "labelled.jsonl"), "valid_frac": 0.2, "cache_dir": str(world / "cache")},
            "eval": {"every": 8}, "save": {"every": 8}, "log": {"tensorboard": False, "plot": False}, "device": "cpu",
        }  # fmt: skip
        path = world / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        if name == "judge_again":
            assert train(path, "stop_at=5") == 0
        assert train(path) == 0
    final, again = (resolve_model(world / name) for name in ("judge", "judge_again"))
    assert sha256_of(final / "adapter_model.safetensors") == sha256_of(again / "adapter_model.safetensors")
    scores = [r["valid/accuracy"] for r in read_jsonl(world / "judge" / "metrics.jsonl") if "valid/accuracy" in r]
    assert scores[-1] > 0.9 > scores[0]
    assert "base_model.model.score.weight" in shapes_of([final / "adapter_model.safetensors"])
    assert main(["merge", str(world / "judge"), str(tmp_path / "m")]) == 0
    ids, lengths = torch.arange(40, 60)[None], torch.tensor([20])
    one, two = load_classifier(final), load_classifier(tmp_path / "m")
    assert torch.equal(one(ids, lengths), two(ids, lengths)) and not problems_of(final)
    assert read_labels(final) == read_labels(tmp_path / "m") == ("down", "up")


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"init_from": None, "model": {"d_model": 32, "n_heads": 2, "n_layers": 1}}, "lora adapts a trained model"),
        ({"freeze": ["layers.0"]}, "freeze: with lora all weights of the model are frozen already"),
        ({"model": {"max_seq_len": 64}}, "model.max_seq_len: with lora the model of init_from keeps its shape"),
        ({"tokenizer": {"path": "x", "add": ["<|x|>"]}}, "tokenizer.add: new tokens need embeddings"),
        ({"lora": {**DORA, "quantize": "nf4"}, "precision": "fp64"}, "4-bit weights have no fp64"),
        ({"lora": {"r": 0}}, "lora.r"),
        ({"lora": {"targets": ["qproj"]}}, "did you mean q_proj?"),
        ({"init_from": "{world}/reference"}, "merge them first with `llmkit merge"),
    ],
)
def test_wrong_use(world: Path, changes: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = lora_recipe(world, "wrong")
    recipe = {**yaml.safe_load(path.read_text()), **changes}
    recipe = {k: v.format(world=world) if isinstance(v, str) else v for k, v in recipe.items() if v is not None}
    path.write_text(yaml.safe_dump(recipe))
    assert train(path) == USER_MISTAKE
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1, error


def test_tokens_without_embeddings_are_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tokenizer folder with one token more than the base's."""
    from llmkit.tokenizer import Tokenizer, TokenizerConfig

    base = resolve_model(world / "base")
    longer = Tokenizer.from_config(TokenizerConfig(path=str(base), add=("<|extra|>",)))
    (world / "longer").mkdir()
    for name, content in longer.files(32).items():
        (world / "longer" / name).write_bytes(content)
    path = lora_recipe(world, "extended")
    recipe = {**yaml.safe_load(path.read_text()), "tokenizer": {"path": str(world / "longer")}}
    path.write_text(yaml.safe_dump(recipe))
    assert train(path) == USER_MISTAKE
    assert "their embeddings would stay untrained" in capsys.readouterr().err


def test_results_are_of_the_recipe_alone(world: Path) -> None:
    """The same recipe again, the same bits; another seed, others."""
    for name, seed in (("again", 0), ("other", 1)):
        assert train(lora_recipe(world, name, steps=6, seed=seed, eval={"every": 6})) == 0
    assert train(lora_recipe(world, "again2", steps=6, eval={"every": 6})) == 0
    assert result_of(world / "again") == result_of(world / "again2") != result_of(world / "other")
