"""Preferences through the command line: each loss learns, a stopped run ends with the same bits, micro-batches and ranks
change nothing, and what cannot work is refused in a sentence."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ports import free_port
from safetensors.numpy import load_file as load_arrays, save_file as save_arrays
from safetensors.torch import load_file, save_file
from test_objectives import Quiet, evaluations, same_run

from llmkit.cli import main
from llmkit.data.turns import encode_turn
from llmkit.inference import logprobs
from llmkit.model.config import GPTConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.weights import load_model
from llmkit.stages import dpo, load_recipe
from llmkit.storage import checkpoints_of, resolve_model
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.training.log import read_lines

BYTES = Tokenizer.train((), TokenizerConfig(kind="byte"))
SHAPE = {"n_layers": 1, "n_heads": 2, "d_model": 32, "d_ff": 48, "max_seq_len": 128}
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.5},
    "robust": {"beta": 0.5, "label_smoothing": 0.1},
    "hinge": {"beta": 0.5},
    "ipo": {"beta": 0.5},
    "simpo": {"beta": 5.0, "gamma": 1.0},
    "orpo": {"beta": 1.0},
    "kto": {"beta": 0.5},
}
AT_START = {"dpo": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": 1.0, "kto": 0.5}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_model(folder: Path, **shape: Any) -> None:
    """A Hugging Face folder with random weights."""
    config = GPTConfig(**{**SHAPE, **shape}, vocab_size=-(-BYTES.vocab_size // 64) * 64)
    model = GPT(config)
    init_weights(model, 0)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    for name, data in model_files(config, torch.float32, BYTES, {"stage": "sft", "step": 0}).items():
        (folder / name).write_bytes(data)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, and answers of uneven length of which those with the letter e are better."""
    folder, dice = tmp_path_factory.mktemp("world"), random.Random(0)
    write_model(folder / "model")

    def said(letters: str) -> str:
        return "".join(dice.choices(letters, k=dice.randrange(2, 12)))

    pairs = [{"prompt": f"q{i}", "chosen": said("eea"), "rejected": said("zza")} for i in range(120)]
    write(folder / "pairs.jsonl", pairs)
    write(folder / "ranked.jsonl", [
        {"prompt": f"r{i}", "responses": [said("zz"), said("ee"), said("aa")], "ranking": [1, 2, 0]} for i in range(20)
    ])  # fmt: skip
    return folder


def recipe(world: Path, out: Path, **changes: Any) -> Path:
    """Writes a recipe beside `out`; a mapping is merged into the recipe's own."""
    told: dict[str, Any] = {
        "stage": "dpo",
        "init_from": str(world / "model"),
        "out": str(out),
        "data": {"path": str(world / "pairs.jsonl"), "valid_frac": 0.25, "cache_dir": str(out.parent / "cache")},
        "batch": {"examples_per_step": 8, "micro_tokens": 512},
        "optim": {"lr": 1e-2, "warmup_steps": 0},
        "steps": 12,
        "eval": {"every": 12},
        "save": {"asynchronous": False},
        "log": {"tensorboard": False, "plot": False, "every": 100},
        "device": "cpu",
    }
    for key, value in changes.items():
        told[key] = {**told[key], **value} if isinstance(value, dict) and key in told else value
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(told), "utf-8")
    return file


def train(file: Path, *overrides: str) -> int:
    return main(["train", str(file), *overrides])


def steps_of(out: Path) -> list[dict[str, Any]]:
    return [r for r in read_lines(out / "metrics.jsonl") if "train/loss" in r]


# --- what is learnt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_learns(world: Path, tmp_path: Path, loss: str) -> None:
    """B84: the first loss is known; held-out pairs are told apart; only what has a reference is measured against it."""
    out = tmp_path / "run"
    assert train(recipe(world, out, loss=loss, **LOSSES[loss])) == 0
    steps, (before, after) = steps_of(out), evaluations(out)
    if loss in AT_START:
        assert steps[0]["train/loss"] == pytest.approx(AT_START[loss], abs=1e-5)
        assert before["valid/loss"] == pytest.approx(AT_START[loss], abs=1e-5)
        assert before["valid/rewards/chosen"] == pytest.approx(0, abs=1e-4)
    # A good answer of kto counts as right where it gains more than other prompts' answers do: most of those are good too.
    assert after["valid/accuracy"] > (0.6 if loss == "kto" else 0.9)
    assert after["valid/loss"] < 0.8 * before["valid/loss"]
    assert after["valid/rewards/margin"] > before["valid/rewards/margin"] + 0.5
    assert ("valid/drift/chosen" in after) == (loss not in ("simpo", "orpo"))
    assert bool(list((tmp_path / "cache").glob("*.logprobs.*"))) == (loss not in ("simpo", "orpo"))


def test_rewards_are_those_of_the_models(world: Path, tmp_path: Path) -> None:
    """B92: the logged reward of held-out pairs, from the two checkpoints again: beta (log p - log p reference)."""
    out = tmp_path / "run"
    assert train(recipe(world, out, beta=0.3)) == 0
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    task = dpo.DPOTask(load_recipe(out.with_suffix(".yaml")))
    data = dpo._answers(task.recipe, BYTES, 128, lambda: False, lambda line: None)
    held = {bytes(data.valid[0].ids(i)) for i in range(data.valid[0].n_sequences)}
    models = [load_model(resolve_model(p)).double() for p in (out, world / "model")]
    rewards: dict[str, list[float]] = {"chosen": [], "rejected": []}
    for row in rows:
        for side, found in rewards.items():
            prompt, answer = encode_turn(BYTES, row["prompt"], row[side])
            if bytes(torch.tensor(prompt + answer, dtype=torch.int32).numpy()) not in held:
                continue
            ids = torch.tensor([prompt + answer])
            w = [
                m.logits(m(ids)).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()
                for m in models
            ]
            found.append(0.3 * (w[0] - w[1]).item())
    last = evaluations(out)[-1]
    for side, found in rewards.items():
        assert len(found) == len(data.valid[0])
        assert last[f"valid/rewards/{side}"] == pytest.approx(sum(found) / len(found), abs=1e-4)


def test_all_pairs_of_a_ranking_count_as_one_prompt(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    data = {"path": None, "train": [{"path": str(world / f"{n}.jsonl"), "name": n} for n in ("pairs", "ranked")]}
    assert train(recipe(world, out, data=data, steps=2)) == 0
    assert [r["train/denominator"] for r in steps_of(out)] == [8, 8]
    assert {"valid/pairs/accuracy", "valid/ranked/accuracy"} <= evaluations(out)[-1].keys()


def test_a_model_that_looks_back_over_a_window(world: Path, tmp_path: Path) -> None:
    """Its prompts are not shared, since an answer's prompt would be out of sight: the loss still starts at ln 2."""
    write_model(tmp_path / "model", sliding_window=6)
    out = tmp_path / "run"
    assert train(recipe(world, out, init_from=str(tmp_path / "model"), steps=2)) == 0
    assert steps_of(out)[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)


SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "dpo_en_demo.json"


@pytest.mark.skipif(not SAMPLE.is_file(), reason=f"{SAMPLE} is not there: other people's data is not tried")
def test_other_peoples_pairs(world: Path, tmp_path: Path) -> None:
    """LLaMA-Factory's sample, as it is."""
    write_model(tmp_path / "model", max_seq_len=8192)
    out = tmp_path / "run"
    data = {"path": None, "train": [{"path": str(SAMPLE), "limit": 4}], "valid_frac": 0.0}
    batch = {"examples_per_step": 2, "micro_tokens": 8192}
    assert train(recipe(world, out, init_from=str(tmp_path / "model"), data=data, batch=batch, steps=1)) == 0
    assert steps_of(out)[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_transformers_loads_it(world: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "run"
    assert train(recipe(world, out, steps=2)) == 0
    with Quiet() as log:
        theirs = AutoModelForCausalLM.from_pretrained(resolve_model(out))
    assert not log.said
    ids = torch.tensor([encode_turn(BYTES, "q1", "eea")[0]])
    ours = load_model(resolve_model(out))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_adapters_need_no_second_model(world: Path, tmp_path: Path) -> None:
    """With LoRA the loss starts at ln 2 too, the base stays as it is, and the result is an adapter folder."""
    out = tmp_path / "run"
    assert train(recipe(world, out, lora={"r": 4}, optim={"lr": 3e-2}, steps=20)) == 0
    assert steps_of(out)[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert evaluations(out)[-1]["valid/accuracy"] > 0.8
    assert (resolve_model(out) / "adapter_model.safetensors").is_file()


# --- the same, however it is computed --------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_stopped_run_ends_with_the_same_bits(world: Path, tmp_path: Path, loss: str) -> None:
    """R1: stopped at steps, and while the reference is asked: the same weights and metrics, and no part is asked twice."""
    one, two = tmp_path / "one", tmp_path / "two"
    shutil.copytree(world / "model", tmp_path / "model")
    changes = {"loss": loss, "steps": 6, "eval": {"every": 3}, "init_from": str(tmp_path / "model"), "max_drift": 0.01}
    assert train(recipe(world, one, **changes)) == 0
    shutil.rmtree(tmp_path / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "_PART_TOKENS", 500)
        original, done = logprobs._of_batch, []

        def stopping(*args: Any) -> Any:
            done.append(1)
            if len(done) == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args)

        patch.setattr(logprobs, "_of_batch", stopping)
        assert train(recipe(world, two, **changes)) == 75
        assert not checkpoints_of(two) and list((tmp_path / "cache").glob("*.parts/*"))
        for stop_at in (2, 5, 6):
            assert train(recipe(world, two, **changes), f"stop_at={stop_at}") == 0
    same_run(one, two)
    assert (two / "train.log").read_text().count("less likely than under the reference") <= 1


def on_two_ranks(file: Path) -> None:
    port = str(free_port())
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import sys; from llmkit.cli import main; sys.exit(main(['train', sys.argv[1]]))"]
    children = [
        subprocess.Popen([*command, str(file)], env={**shared, "RANK": r, "LOCAL_RANK": r}, stdout=subprocess.DEVNULL)
        for r in "01"
    ]
    assert [c.wait(120) for c in children] == [0, 0]


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_micro_batches_and_ranks_change_nothing(world: Path, tmp_path: Path, loss: str) -> None:
    """D4, D5, B1: in fp64, one micro-batch, many of them and two ranks; KTO's z0 is that of the whole step."""
    runs = {"whole": 1 << 20, "pieces": 64} | ({"ranks": 128} if loss == "kto" else {})
    files = {
        name: recipe(
            world, tmp_path / name, loss=loss, precision="fp64", steps=3, eval={"every": 3}, beta=0.5,
            batch={"micro_tokens": tokens}, save={"every": 3},
        )
        for name, tokens in runs.items()
    }  # fmt: skip
    assert train(files["whole"]) == 0 and train(files["pieces"]) == 0
    if "ranks" in runs:
        on_two_ranks(files["ranks"])
    expected = load_file(resolve_model(tmp_path / "whole") / "model.safetensors")
    a = read_lines(tmp_path / "whole" / "metrics.jsonl")
    for other in list(runs)[1:]:
        weights = load_file(resolve_model(tmp_path / other) / "model.safetensors")
        for name, t in expected.items():
            torch.testing.assert_close(weights[name], t, atol=1e-10, rtol=1e-10)
        b = read_lines(tmp_path / other / "metrics.jsonl")
        for left, right in zip(a, b, strict=True):
            assert left.keys() == right.keys() and left.get("train/data_hash") == right.get("train/data_hash")
            # Before the first step all log-ratios are 0 but for rounding: their signs say nothing.
            left, right = (
                {k: v for k, v in r.items() if k != "train/data_hash" and (r["step"] or "accuracy" not in k)}
                for r in (left, right)
            )
            assert left == pytest.approx(right, abs=1e-9)
    if loss == "kto":
        assert max(r["train/kl"] for r in a if "train/kl" in r) > 0


# --- what cannot work ------------------------------------------------------------------------------------------------


def test_a_reference_that_is_something_else(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """B83: numbers that are not the starting model's stop the run at step 1; another model on purpose does not."""
    out, file = tmp_path / "run", recipe(world, tmp_path / "run", steps=2)
    assert main(["prepare", str(file)]) == 0
    for cached in (tmp_path / "cache").glob("*.logprobs.safetensors"):
        save_arrays({"logprobs": load_arrays(cached)["logprobs"][::-1].copy()}, cached)
    assert train(file) == 3
    assert "step 1: the loss is" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(world / "model", other)
    weights = load_file(other / "model.safetensors")
    save_file({n: t + 0.02 * torch.randn_like(t) for n, t in weights.items()}, other / "model.safetensors")
    assert train(recipe(world, tmp_path / "run2", steps=1, reference=str(other))) == 0
    assert abs(steps_of(tmp_path / "run2")[0]["train/loss"] - math.log(2)) > 1e-3
    assert not steps_of(out)


def test_falling_answers_are_told_once(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(recipe(world, out, optim={"lr": 1e-1}, max_drift=0.05, steps=6)) == 0
    told = [
        line for line in (out / "train.log").read_text().splitlines() if "less likely than under the reference" in line
    ]
    assert len(told) == 1 and "set nll_weight" in told[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": None, "model": SHAPE}, "dpo goes on from a model that can answer"),
        ({"loss": "robust"}, "loss robust undoes label noise: say how much in label_smoothing"),
        ({"loss": "hinge", "label_smoothing": 0.1}, r"label_smoothing belongs to loss: dpo \| robust \| simpo"),
        ({"gamma": 0.3}, "gamma belongs to loss: simpo"),
        ({"loss": "orpo", "nll_weight": 1.0}, "nll_weight belongs to loss"),
        ({"loss": "simpo", "reference": "x"}, "reference: simpo has none"),
        ({"model": {"dropout": 0.1}}, r"model.dropout \(0.1\): policy and reference would differ by chance"),
        ({"loss": "kto", "batch": {"examples_per_step": 1}}, "at least 2 are needed"),
        ({"data": {"packing": False}}, "a row is one answer to a prompt"),
        ({"eval": {"samples": {"prompts": ["a"]}}}, "eval.answers"),
        ({"z_loss": 1e-4}, "z_loss is a term of pretraining"),
        ({"batch": {"max_len": 12}}, r"of 120 pairs .* can't be learnt from"),
    ],
)
def test_mistakes(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert train(recipe(world, tmp_path / "run", **changes)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error


def test_a_reference_of_another_tokenizer(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(world / "model", other)
    Tokenizer.train((), TokenizerConfig(kind="byte", special=("<|x|>",))).save(other)
    assert train(recipe(world, tmp_path / "run", reference=str(other))) == 2
    assert "its tokenizer has other ids than the policy's" in capsys.readouterr().err
