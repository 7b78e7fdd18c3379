"""`llmkit average` against NumPy, as a folder that transformers loads in silence, and all that it refuses."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reliability import ShimDisk, leftovers, tiny_recipe, train
from safetensors.torch import load_file, save_file

from llmkit import storage
from llmkit.cli import main
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.layouts import to_disk
from llmkit.model.weights import load_model
from llmkit.storage import checkpoints_of, read_manifest, sha256_of, verify
from llmkit.training import checkpoint

USER_MISTAKE = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with three checkpoints each, one in bf16; an average of the weights is kept."""
    folder = tmp_path_factory.mktemp("average")
    for name, changes in (("run", {"seed": 1}), ("other", {"seed": 2}), ("half", {"precision": "bf16"})):
        assert (
            train(tiny_recipe(folder, out=str(folder / name), steps=12, save={"every": 4, "keep": 3}, **changes)) == 0
        )
    return folder


def average(*args: Any) -> int:
    return main(["average", *map(str, args)])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def check(out: Path, parents: list[Path], shares: list[float]) -> None:
    """The fp64 mean in NumPy, rounded once: to the last bit of fp32, where sums in fp64 may round to either side."""
    given = [weights(p) for p in parents]
    made = weights(out)
    assert made.keys() == given[0].keys()
    for name, t in made.items():
        mean = sum(s * g[name].double().numpy() for s, g in zip(shares, given, strict=True))
        assert t.dtype == given[0][name].dtype
        np.testing.assert_allclose(t.double().numpy(), mean, rtol=2**-23, atol=0)


def test_the_last_checkpoints_of_a_run(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, run = tmp_path / "mean", world / "run"
    assert average(out, run, "--last", 3) == 0
    parents = checkpoints_of(run)
    check(out, parents, [1 / 3] * 3)
    assert "  0.3333  " in capsys.readouterr().out
    manifest = read_manifest(out)
    assert [p["folder"] for p in manifest["parents"]] == [str(p) for p in parents]
    assert manifest["parents"][0]["sha256"] == {"manifest.json": sha256_of(parents[0] / "manifest.json")}
    assert verify(out)["weights"] == "model" and not (out / "trainer_state").exists()
    assert json.loads((out / "config.json").read_text())["llmkit"]["average"]["parents"] == manifest["parents"]
    assert str(parents[1]) in (out / "README.md").read_text()
    assert main(["verify", str(out)]) == 0


def test_it_loads_in_transformers_without_a_word(world: Path, tmp_path: Path) -> None:
    """Promise 1, and the logits are those of the averaged weights."""
    transformers = pytest.importorskip("transformers")
    out, records = tmp_path / "mean", []
    assert average(out, world / "run", world / "other", "--weights", "1,3") == 0
    check(out, [world / n / "checkpoints" / "step-00000012" for n in ("run", "other")], [0.25, 0.75])

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    handler = Recorder(logging.WARNING)
    loggers = [logging.getLogger(), logging.getLogger("transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
            transformers.AutoTokenizer.from_pretrained(out)
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert records == [] and caught == []
    ids = torch.arange(10)[None]
    ours = load_model(out)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("run", ["run", "half"])
def test_the_average_kept_in_training(world: Path, tmp_path: Path, run: str) -> None:
    """--ema of one checkpoint is its average as a model, in the weights' dtype; of two, the mean of their averages."""
    folder = checkpoints_of(world / run)[0]
    assert average(tmp_path / "one", folder, "--ema") == 0
    kept, made = load_file(folder / "trainer_state" / "ema.safetensors"), weights(tmp_path / "one")
    assert made.keys() == weights(folder).keys() == kept.keys()
    for name, t in made.items():
        assert t.dtype == (torch.bfloat16 if run == "half" else torch.float32)
        assert torch.equal(t, kept[name].to(t.dtype))
        assert not torch.equal(t, weights(folder)[name])
    assert verify(tmp_path / "one")["weights"] == "ema"
    assert average(tmp_path / "two", world / "run", world / "other", "--ema") == 0
    a, b = (load_file(checkpoints_of(world / r)[0] / "trainer_state" / "ema.safetensors") for r in ("run", "other"))
    for name, t in weights(tmp_path / "two").items():
        assert torch.equal(t, ((a[name].double() + b[name].double()) / 2).float())


def test_a_family_with_a_layout_of_its_own(world: Path, tmp_path: Path) -> None:
    """GPT-2's files hold other names and transposed matrices; the average has ours, and a frozen part has none."""
    shape = {"n_layers": 2, "n_heads": 2, "d_model": 16, "max_seq_len": 16, "vocab_size": 40}
    gpt2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu_tanh", "qkv_bias": True, "o_bias": True}
    config = GPTConfig(**shape, **gpt2, mlp_bias=True, norm_eps=1e-5)
    model = GPT(config)
    init_weights(model, 0)
    folder = tmp_path / "gpt2"
    shutil.copytree(
        checkpoints_of(world / "run")[0], folder, ignore=shutil.ignore_patterns("*.safetensors", "manifest*")
    )
    from llmkit.model.hf import config_to_hf

    (folder / "config.json").write_text(json.dumps(config_to_hf(config, torch.float32, {"eos_token_id": 1}, {})))
    state = {n: t.contiguous() for n, t in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    kept = {n: p.detach() + 1 for n, p in model.named_parameters() if "embed" not in n and "q_proj" not in n}
    save_file(kept, folder / "trainer_state" / "ema.safetensors")
    assert average(tmp_path / "out", folder, "--ema") == 0
    own = {n: kept.get(n, p.detach()) for n, p in model.named_parameters()}
    expected, made = to_disk(config, own), weights(tmp_path / "out")
    assert made.keys() == expected.keys() == state.keys() and "transformer.h.0.attn.c_attn.weight" in made
    assert all(torch.equal(t, expected[n]) for n, t in made.items())


def test_shards(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model comes out in several files with an index, and may come in so."""
    monkeypatch.setattr(checkpoint.shard, "__defaults__", (20_000,))
    out = tmp_path / "mean"
    assert average(out, world / "run", world / "other") == 0
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 2 and (out / "model.safetensors.index.json").is_file()
    assert average(tmp_path / "again", out, world / "other") == 0
    parts: dict[str, torch.Tensor] = {}
    for file in files:
        parts |= load_file(file)
    single = tmp_path / "single"
    monkeypatch.undo()
    assert average(single, world / "run", world / "other") == 0
    whole = weights(single)
    assert parts.keys() == whole.keys() and all(torch.equal(t, whole[n]) for n, t in parts.items())


def test_refusals(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names the folder and the difference; nothing is written."""
    run, other, out = world / "run", world / "other", tmp_path / "out"
    wide = tiny_recipe(world, out=str(world / "wide"), steps=4, model={"d_model": 64}, optim={"ema_decay": None})
    assert train(wide) == 0
    foreign = tmp_path / "foreign"
    shutil.copytree(checkpoints_of(other)[0], foreign, ignore=shutil.ignore_patterns("manifest.json"))
    (foreign / "tokenizer.json").write_text("{}")
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints_of(other)[0], broken, ignore=shutil.ignore_patterns("manifest.json"))
    tensors = weights(broken)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, broken / "model.safetensors")
    cases = [
        ((run,), "the mean of one model is itself"),
        ((run, world / "wide"), "wide/checkpoints/step-00000004: config.json: head_dim is 32, in"),
        ((run, foreign), "foreign: tokenizer.json is not that of"),
        ((run, broken), "the average is not finite"),
        ((run, other, "--weights", "1"), "--weights 1: 2 positive numbers"),
        ((run, other, "--weights", "1,-1"), "2 positive numbers"),
        ((run, other, "--weights", "a,b"), "numbers with commas"),
        ((run, other, "--last", "2"), "name one run"),
        ((run, "--last", "9"), "holds 3 good checkpoints"),
        ((world / "wide", "--ema"), "holds no trainer_state/ema.safetensors"),
        ((run, world / "nowhere"), "no such folder"),
    ]
    for args, message in cases:
        capsys.readouterr()
        assert average(out, *args) == USER_MISTAKE, args
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert not out.exists() and leftovers(tmp_path) == []
    assert average(run, run, other) == USER_MISTAKE
    assert "is there already" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    for at in (1, 4, 9):
        monkeypatch.setattr(storage, "disk", ShimDisk(at, errno.ENOSPC))
        assert average(tmp_path / "out", world / "run", world / "other") == 1
        assert list(tmp_path.iterdir()) == []
