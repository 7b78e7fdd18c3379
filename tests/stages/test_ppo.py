"""PPO: it finds a known optimum, keeps what it must keep, and is what its parts say it is."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub import PARAMETERS, stand_in

from llmkit.cli import main
from llmkit.config import UserError
from llmkit.losses.logprobs import token_logprobs
from llmkit.model.gpt import GPT
from llmkit.model.heads import ActorCritic, SequenceClassifier
from llmkit.model.lora import Base, apply_lora
from llmkit.model.weights import load_model
from llmkit.stages import load_recipe, stage_module
from llmkit.stages.ppo import PPOTask
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer
from llmkit.training import loop
from llmkit.training.engine import Engine
from llmkit.training.setup import model_config

REWARDS = """
def share(prompts, completions, **columns):
    return [c.count("e") / max(1, len(c)) for c in completions]

def constant(prompts, completions, **columns):
    return [1.0] * len(completions)

def fails_on_a(prompts, completions, **columns):
    return [None if "a" in c else 1.0 for c in completions]
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """toy(**changes) -> a recipe that rewards answers for their share of the letter e; `out` is `run` beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"rewards_{abs(hash(tmp_path)) % 10**9}"
    (tmp_path / f"{name}.py").write_text(REWARDS)
    rows = [{"prompt": chr(97 + i % 26) + chr(97 + i // 26)} for i in range(60)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def make(reward: str = "share", **changes: Any) -> Path:
        recipe: dict[str, Any] = {
            "stage": "ppo",
            "out": str(tmp_path / "run"),
            "tokenizer": {"kind": "byte"},
            "model": {"n_layers": 1, "n_heads": 2, "d_model": 32, "max_seq_len": 32},
            "data": {"path": "prompts.jsonl", "chat": False, "valid_frac": 0.1},
            "rollout": {"prompts_per_step": 32, "samples_per_prompt": 2, "max_new_tokens": 8},
            "update": {"minibatches": 2, "epochs": 2},
            "kl": {"coef": 0.01},
            "rewards": [{"kind": "python", "function": f"{name}:{reward}"}],
            "optim": {"lr": 3e-3, "warmup_steps": 0, "schedule": "constant", "weight_decay": 0.0},
            "critic": {"lr": 1e-2},
            "steps": 160,
            "eval": {"every": 160},
            "log": {"tensorboard": False, "plot": False},
        }
        for key, value in changes.items():
            recipe[key] = {**recipe[key], **value} if isinstance(recipe.get(key), dict) else value
        file = tmp_path / "ppo.yaml"
        file.write_text(yaml.safe_dump(recipe))
        return file

    yield make


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last(run: Path, key: str) -> float:
    return float(next(r[key] for r in reversed(log_of(run)) if key in r))


# --- what it learns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_finds_the_optimum(toy: Callable[..., Path], tmp_path: Path, seed: int) -> None:
    """The best answer is all e: share 1. A policy that knows nothing writes it once in 261 tokens."""
    assert main(["train", str(toy(seed=seed))]) == 0
    run = tmp_path / "run"
    assert log_of(run)[0]["valid/reward"] < 0.05
    assert last(run, "valid/reward") >= 0.95
    explained = [r["train/rollout/explained_variance"] for r in log_of(run) if "train/rollout/explained_variance" in r]
    assert max(explained[3:]) > 0.3  # the critic has learnt something too; at the optimum there is nothing to explain


def test_a_constant_reward_moves_only_the_kl(toy: Callable[..., Path], tmp_path: Path) -> None:
    """With nothing to gain the policy has no reason to leave its reference."""
    assert main(["train", str(toy("constant", steps=40, kl={"coef": 0.2}, eval={"every": 40}))]) == 0
    run = tmp_path / "run"
    assert all(r["train/rollout/reward"] == 1.0 for r in log_of(run) if "train/rollout/reward" in r)
    assert abs(last(run, "valid/kl_sum")) < 0.15  # nats of an answer; towards the optimum above it is 39


def test_a_huge_coefficient_keeps_the_policy(toy: Callable[..., Path], tmp_path: Path) -> None:
    changes: dict[str, Any] = {"kl": {"coef": 100.0}, "steps": 40, "eval": {"every": 40}, "optim": {"lr": 3e-4}}
    assert main(["train", str(toy(**changes, reward_clip=None))]) == 0
    assert abs(last(tmp_path / "run", "valid/kl_sum")) < 0.2 and last(tmp_path / "run", "valid/reward") < 0.1


@pytest.mark.parametrize("estimator", ["k2", "k3", "full"])
def test_a_kl_in_the_loss_holds_it_back(toy: Callable[..., Path], tmp_path: Path, estimator: str) -> None:
    """The same run, held much or little."""
    ends = []
    for coef in (0.0, 1.0):
        out = str(tmp_path / f"coef{coef:g}")
        kl = {"where": "loss", "estimator": estimator, "coef": coef}
        assert main(["train", str(toy(out=out, kl=kl, steps=60, eval={"every": 60}))]) == 0
        ends.append(last(Path(out), "valid/kl_sum"))
    assert ends[1] < ends[0] / 4


def test_the_weight_of_the_kl_adapts(toy: Callable[..., Path], tmp_path: Path) -> None:
    kl = {"coef": 0.001, "target": 2.0, "horizon": 640}
    assert main(["train", str(toy(kl=kl, steps=160))]) == 0
    coefs = [r["train/rollout/kl_coef"] for r in log_of(tmp_path / "run") if "train/rollout/kl_coef" in r]
    sums = [r["train/rollout/kl_sum"] for r in log_of(tmp_path / "run") if "train/rollout/kl_sum" in r]
    for now, then, kl_sum in zip(coefs[1:], coefs, sums, strict=False):
        error = min(max(kl_sum / 2.0 - 1, -0.2), 0.2)
        assert now == pytest.approx(then * (1 + error * 64 / 640), rel=1e-12)
    assert coefs[-1] > 1.5 * min(coefs) and sums[-1] > 2.0  # too far away all the time, and so held ever more


# --- what it promises ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_sampler_and_trainer_agree(toy: Callable[..., Path], tmp_path: Path, temperature: float) -> None:
    """B72, B73, B74, D6: what is trained is the distribution that was sampled; the first ratios are 1."""
    rollout = {"temperature": temperature, "record_every": 1}
    assert main(["train", str(toy(rollout=rollout, steps=8, eval={"every": 8}))]) == 0
    records = log_of(tmp_path / "run")
    gaps = [r["train/rollout/sampler_gap_max"] for r in records if "train/rollout/sampler_gap_max" in r]
    assert len(gaps) == 2 and max(gaps) <= 1e-5
    assert all(r["train/ratio_deviation"] <= 1e-5 for r in records if "train/rollout/reward" in r)
    first = [r["train/ratio"] for r in records if "train/rollout/reward" in r]
    assert first == pytest.approx([1.0, 1.0], abs=1e-6)
    assert records[1]["train/rollout/kl_sum"] == pytest.approx(0.0, abs=1e-5)  # KL(pi, pi)


def test_a_policy_that_is_not_what_was_sampled_is_noticed(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """B72: the ratio of the policy to itself is looked at before the first update of every rollout."""
    original = PPOTask.logprobs
    monkeypatch.setattr(PPOTask, "logprobs", lambda self, *args: original(self, *args) + 0.01)
    assert main(["train", str(toy(steps=4))]) == 3
    assert "every ratio of the policy to itself is 1" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_resting_policy_stays_to_the_bit(toy: Callable[..., Path], tmp_path: Path) -> None:
    """Neither momentum nor decay moves it while the critic warms up, and the critic does move."""
    decay = {"weight_decay": 0.1}
    file = toy(steps=12, optim=decay, critic={"lr": 1e-2, "warmup_updates": 6}, eval={"every": None}, save={"every": 2})
    kept: dict[int, dict[str, torch.Tensor]] = {}
    task = PPOTask(load_recipe(file))
    original = task.step

    def watching(engine: Engine, ctx: loop.Context) -> dict[str, float]:
        kept[engine.step] = {n: t.clone() for n, t in engine.masters.items()}
        return original(engine, ctx)

    task.step = watching  # type: ignore[method-assign]
    loop.train(task.recipe, task)
    task.close()

    def moved(first: int, last: int, prefix: str) -> bool:
        return any(not torch.equal(kept[first][n], kept[last][n]) for n in kept[first] if n.startswith(prefix))

    assert not moved(0, 6, "actor.") and moved(6, 8, "actor.") and moved(0, 2, "critic.")


def test_an_answer_without_a_grade_teaches_nothing(toy: Callable[..., Path], tmp_path: Path) -> None:
    """B71: what a grader failed on is no wrong answer."""
    assert main(["train", str(toy("fails_on_a", steps=4, eval={"every": None}, rollout={"temperature": 3.0}))]) == 0
    records = [r for r in log_of(tmp_path / "run") if "train/rollout/reward" in r]
    assert all(r["train/rollout/reward"] == 1.0 for r in records)
    assert all(r["train/denominator"] <= 8 * 32 for r in log_of(tmp_path / "run"))


def test_updates_end_where_the_policy_has_moved_enough(toy: Callable[..., Path], tmp_path: Path) -> None:
    """The refused update changes no weight and no moment, and the next step has a rollout of its own."""
    update = {"minibatches": 2, "epochs": 4, "target_kl": 1e-7}
    assert main(["train", str(toy(update=update, steps=6, eval={"every": None}))]) == 0
    records = log_of(tmp_path / "run")
    stopped = [bool(r.get("train/stopped_early")) for r in records]
    assert stopped == [False, True] * 3
    assert ["train/rollout/reward" in r for r in records] == [True, False] * 3


def test_the_record_tells_every_token(toy: Callable[..., Path], tmp_path: Path) -> None:
    """B92: what is logged is what was trained on, and follows from it."""
    assert main(["train", str(toy(steps=4, rollout={"record_every": 1}, eval={"every": None}))]) == 0
    (file,) = (tmp_path / "run" / "rollouts").glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    first = log_of(tmp_path / "run")[0]
    assert len(rows) == 64
    assert first["train/rollout/reward"] == pytest.approx(sum(r["reward"] for r in rows) / 64, abs=1e-5)
    for row in rows:
        answer = bytes(t["id"] for t in row["tokens"] if t["id"] < 256).decode("utf-8", "replace")
        assert set(row["tokens"][0]) == {"id", "text", "logprob", "kl", "value", "advantage"}
        assert row["parts"]["python"] == pytest.approx(answer.count("e") / max(1, len(answer)), abs=0.2)
    everything = [t["advantage"] for r in rows for t in r["tokens"]]
    assert sum(everything) / len(everything) == pytest.approx(0, abs=1e-4)  # whitened


@pytest.mark.parametrize("correction", ["token", "sequence"])
def test_warped_sampling_is_corrected(toy: Callable[..., Path], tmp_path: Path, correction: str) -> None:
    rollout = {"top_p": 0.9, "correction": correction}
    assert main(["train", str(toy(rollout=rollout, steps=160))]) == 0
    gap = [r["train/rollout/sampler_gap_max"] for r in log_of(tmp_path / "run") if "train/rollout/sampler_gap_max" in r]
    assert min(gap) > 0.01  # the two distributions differ, and it is told
    assert last(tmp_path / "run", "valid/reward") > 0.5


def test_both_models_of_a_checkpoint_load(
    toy: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise 1: the policy and its critic are Hugging Face folders, with our logits and values."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    assert main(["train", str(toy(steps=8, eval={"every": None}))]) == 0
    folder = resolve_model(tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        critic = AutoModelForSequenceClassification.from_pretrained(folder / "critic")
    assert not caplog.records and critic.config.num_labels == 1
    ids = torch.tensor([[97, 98, 101, 101, 102]])
    ours = load_model(folder)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours.forward(ids)), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    from llmkit.model.weights import load_classifier

    value = load_classifier(folder / "critic", n_scores=1)
    with torch.no_grad():
        got = value.at_tokens(ids)[0, -1]
        torch.testing.assert_close(got, critic(ids).logits[0], rtol=1e-4, atol=1e-4)
    assert main(["verify", str(tmp_path / "run")]) == 0
    labels = torch.tensor([[98, 101, 101, 102, -100]])
    with torch.no_grad():
        assert torch.isfinite(token_logprobs(ours.forward(ids), ours.head_weight, labels, vocab_size=261)[0]).all()


# --- wrong use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout": {"top_p": 0.9}}, "set correction: token"),
        ({"kl": {"where": "reward", "estimator": "k3"}}, "use k1"),
        ({"kl": {"where": "loss", "estimator": "k1"}}, "its gradient is zero on average"),
        ({"kl": {"where": "none", "target": 1.0}}, "target mean"),
        ({"update": {"minibatches": 3}}, "does not divide the 64 answers"),
        ({"rollout": {"max_new_tokens": 32}}, "don't fit rows of 32"),
        ({"guard": {"action": "rollback"}, "save": {"every": 2}}, "use skip or stop"),
        ({"rewards": []}, "rewards"),
        ({"reference": "nowhere/at/all"}, "no such folder"),
    ],
)
def test_wrong_use(
    toy: Callable[..., Path], capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    assert main(["train", str(toy(**changes))]) == 2
    assert said in capsys.readouterr().err


def test_the_hub_recipe_builds_on_the_meta_device(tmp_path: Path) -> None:
    """7B, policy and critic through adapters: its plan counts all four models, and the two that are trained are built."""
    file = Path(__file__).parents[2] / "configs/ppo/7b_lora.yaml"
    old = stand_in("Qwen/Qwen2.5-7B", tmp_path / "model")  # the instruct model's shape is the base model's
    recipe = load_recipe(file, [f"init_from={old}", f"rewards=[{{kind: model, path: {old}}}]"])
    config = model_config(recipe, Tokenizer.load(old).vocab_size)
    with torch.device("meta"):
        pair = ActorCritic(GPT(config), SequenceClassifier(config, 1))
        for part in (pair.actor, pair.critic):
            apply_lora(part, recipe.lora, 0, Base("base", "hash"))
    n = PARAMETERS["Qwen/Qwen2.5-7B"]
    frozen = sum(p.numel() for p in pair.actor.parameters() if not p.requires_grad)
    assert frozen == n and any(p.requires_grad for p in pair.critic.score.parameters())
    lines = []
    with contextlib.suppress(UserError):  # said at the end where the models don't fit this machine
        lines += stage_module(recipe).plan(recipe)
    text = "\n".join(lines)
    assert "the policy without its adapters: nothing" in text and text.count("parameters") == 2
    assert f"reward model {old}: {2 * n / 1e9:.3f} GB" in text
