"""GRPO and its family: the credit of every choice against a loop, toys with a known optimum, and what must not move."""

from __future__ import annotations

import contextlib
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import PARAMETERS, stand_in
from safetensors.torch import load_file
from torch import Tensor

from llmkit.config import MachineError, UserError, dump, validate
from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import generate
from llmkit.losses import token_logprobs
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, init_weights
from llmkit.rollout.batch import Rollouts
from llmkit.stages import load_recipe, stage_module
from llmkit.stages.grpo import GRPOTask, credits
from llmkit.stages.recipes import GRPORecipe
from llmkit.stages.recipes.grpo import PRESETS
from llmkit.tokenizer import Tokenizer
from llmkit.tokenizer.config import TokenizerConfig
from llmkit.training.setup import model_config

REWARDS = """
def share(completions, **_):
    return [text.count("e") / max(len(text), 1) for text in completions]

def avoid(completions, **_):
    return [1 - reward for reward in share(completions)]

def constant(completions, **_):
    return [0.7] * len(completions)

def bad(completions, **_):
    raise ValueError("a grader's own fault")
"""
TOY: dict[str, Any] = {
    "stage": "grpo",
    "out": "out",
    "tokenizer": {"kind": "byte"},
    "data": {"path": "prompts.jsonl", "valid_frac": 0.0, "chat": False},
    "model": {"n_layers": 1, "n_heads": 2, "d_model": 32, "max_seq_len": 32},
    "rollout": {"prompts_per_step": 8, "samples_per_prompt": 8, "max_new_tokens": 8, "record_every": None},
    "rewards": [{"kind": "python", "function": "toy_rewards:share"}],
    "optim": {"lr": 1e-2, "warmup_steps": 0, "schedule": "constant"},
    "kl": {"where": "none"},
    "steps": 30,
    "log": {"tensorboard": False, "plot": False},
    "eval": {"every": 1000},
}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with prompts and reward functions, which is the working directory."""
    (tmp_path / "toy_rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"say {i}" + "!" * i} for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def recipe_of(**changes: Any) -> GRPORecipe:
    recipe: GRPORecipe = validate(GRPORecipe, {**TOY, **changes})
    return recipe


def train(folder: Path, name: str = "out", **changes: Any) -> list[dict[str, Any]]:
    """Runs the toy with some sections changed; what it logged of every step."""
    recipe = recipe_of(out=str(folder / name), **changes)
    stage_module(recipe).run(recipe)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [m for m in map(json.loads, lines) if "train/loss" in m]


def weights_of(folder: Path, name: str = "out", step: int | None = None) -> dict[str, Tensor]:
    checkpoints = sorted((folder / name / "checkpoints").iterdir())
    chosen = checkpoints[-1] if step is None else folder / name / "checkpoints" / f"step-{step:08d}"
    return load_file(chosen / "model.safetensors")


def rewards_in(metrics: list[dict[str, Any]]) -> list[float]:
    return [m["train/rollout/reward"] for m in metrics if "train/rollout/reward" in m]


# --- the recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str, tmp_path: Path) -> None:
    """A name fills in the three choices, the clip and the KL; whatever the recipe says goes before it."""
    base = {k: v for k, v in TOY.items() if k != "kl"} | {"algorithm": name}
    recipe = validate(GRPORecipe, {**base, "rollout": {}})
    for key, value in PRESETS[name].items():
        found = getattr(recipe, key)
        assert found == value if not isinstance(value, dict) else value.items() <= found.model_dump().items()
    assert recipe.rollout.samples_per_prompt == 8
    file = tmp_path / "again.yaml"
    file.write_text(dump(recipe))
    assert load_recipe(file) == recipe
    other = validate(
        GRPORecipe,
        {
            **base,
            "aggregation": "sequence_mean",
            "kl": {"where": "loss", "coef": 0.5},
            "update": {"clip_high": 0.9},
            "rollout": {"samples_per_prompt": 3},
        },
    )
    assert (other.aggregation, other.kl.coef, other.kl.kind) == ("sequence_mean", 0.5, "k2")
    assert other.update.clip_high == 0.9 and other.rollout.samples_per_prompt == 3
    assert other.update.clip_low == PRESETS[name].get("update", {}).get("clip_low", 0.2)


def test_a_coefficient_alone_keeps_the_algorithms_kl() -> None:
    recipe = recipe_of(algorithm="grpo", kl={"coef": 0.2})
    assert (recipe.kl.where, recipe.kl.kind, recipe.kl.coef) == ("loss", "k3", 0.2)
    recipe = recipe_of(algorithm="grpo", kl={"where": "reward"})
    assert (recipe.kl.where, recipe.kl.kind) == ("reward", "k1")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rollout": {"samples_per_prompt": 1}}, "compares the answers to a prompt.*samples_per_prompt"),
        ({"algorithm": "gspo", "aggregation": "token_mean"}, "take sequence_mean"),
        ({"algorithm": "rloo", "update": {"epochs": 2}}, "no ratio to correct"),
        ({"algorithm": "reinforce++", "dynamic_sampling": True}, "groups that differ"),
        ({"equal_by": "exact"}, "belongs to dynamic_sampling"),
        ({"algorithm": "dapo", "equal_by": "exact"}, "no part of the rewards is called 'exact': python"),
        ({"kl": {"where": "loss", "estimator": "k1"}}, "gradient is zero on average"),
        ({"kl": {"where": "reward", "estimator": "k2"}}, "points elsewhere"),
        ({"kl": {"where": "reward", "estimator": "k3"}}, "not that of the KL"),
        ({"kl": {"where": "reward", "estimator": "full"}}, "no gradient at its own token"),
        ({"rollout": {"top_p": 0.9}}, "negative KL"),
        ({"algorithm": "ppo"}, "algorithm: expected 'grpo', 'dr_grpo'"),
        ({"algorithm": ["grpo"]}, "algorithm: expected"),
    ],
)
def test_wrong_recipes(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        recipe_of(**changes)


# --- credit ----------------------------------------------------------------------------------------------------------

SCORES = [1.0, 0.0, 0.5, 2.0, 2.0, float("nan")]
GROUPS = [4, 4, 4, 9, 9, 9]
LENGTHS = [3, 1, 2, 2, 4, 3]


def rollouts() -> Rollouts:
    """Six answers to two prompts of two tokens; the last one has no grade, so that no action of it counts."""
    g = torch.Generator().manual_seed(0)
    actions = torch.zeros(6, 8, dtype=torch.bool)
    for i, n in enumerate(LENGTHS):
        actions[i, 1 : 1 + n] = True
    logprobs = -torch.rand(6, 8, generator=g, dtype=torch.float64)
    return Rollouts(
        ids_NT=torch.zeros(6, 8, dtype=torch.int64),
        actions_NT=actions,
        lengths_N=torch.tensor(LENGTHS) + 2,
        prompt_lengths_N=torch.full((6,), 2),
        group_N=torch.tensor(GROUPS),
        prompt_N=torch.tensor(GROUPS),
        finished_N=torch.tensor([True, True, False, True, True, True]),
        sampler_NT=logprobs,
        scores_N=torch.tensor(SCORES, dtype=torch.float64),
        ref_NT=logprobs + 0.3 * torch.randn(6, 8, generator=g, dtype=torch.float64),
    ).without_ungraded()


def slow_credit(advantage: str, where: str, coef: float, made: Rollouts) -> list[list[float]]:
    """Advantages of every answer's actions, from the table in docs/grpo.md."""
    graded = range(5)
    kl = [
        [(made.sampler_NT[i, 1 + t] - made.ref_NT[i, 1 + t]).item() for t in range(LENGTHS[i])]  # type: ignore[index]
        for i in graded
    ]
    kl = [[coef * k if where == "reward" else 0.0 for k in row] for row in kl]
    whole = [SCORES[i] - sum(kl[i]) for i in graded]
    if advantage in ("return", "baseline"):
        out = []
        for i in graded:
            members = [SCORES[j] for j in graded if GROUPS[j] == GROUPS[i]]
            score = SCORES[i] - (statistics.mean(members) if advantage == "baseline" else 0.0)
            out.append([score - sum(kl[i][t:]) for t in range(LENGTHS[i])])
        flat = [a for row in out for a in row]
        mean, std = statistics.mean(flat), (statistics.pvariance(flat) + 1e-8) ** 0.5
        return [[(a - mean) / std for a in row] for row in out]
    out = []
    for i in graded:
        members = [whole[j] for j in graded if GROUPS[j] == GROUPS[i]]
        centred = whole[i] - statistics.mean(members)
        others = (sum(members) - whole[i]) / (len(members) - 1)
        value = {
            "group_mean": centred,
            "group_std": centred / (statistics.stdev(members) + 1e-4),
            "group_batch": centred / (statistics.stdev(whole) + 1e-4),
            "leave_one_out": whole[i] - others,
        }[advantage]
        out.append([value] * LENGTHS[i])
    return out


@pytest.mark.parametrize("advantage", ["group_mean", "group_std", "group_batch", "leave_one_out", "return", "baseline"])
@pytest.mark.parametrize("where", ["none", "reward"])
def test_credits_equal_a_loop(advantage: str, where: str) -> None:
    """B81: groups by their ids; an answer without a grade counts nowhere, its group goes on without it."""
    made = rollouts()
    recipe = recipe_of(advantage=advantage, kl={"where": where} if where == "none" else {"where": where, "coef": 0.3})
    found = credits(recipe, made, 0.3)
    for i, expected in enumerate(slow_credit(advantage, where, 0.3, made)):
        assert found[i][made.actions_NT[i]].tolist() == pytest.approx(expected, abs=1e-10)
    assert not found[~made.actions_NT].any()


def test_dynamic_sampling_looks_for_groups_that_differ() -> None:
    """Group 9 has one reward only, apart from the answer that no grader could judge."""
    made = rollouts()
    task = GRPOTask(recipe_of(algorithm="dapo"))
    assert task.wanted(made).tolist() == [True] * 3 + [False] * 3  # type: ignore[union-attr]
    parts = {"right": torch.tensor([1.0, 1, 1, 0, 1, 1])}
    task = GRPOTask(recipe_of(algorithm="dapo", equal_by="right", rewards=[{**TOY["rewards"][0], "name": "right"}]))
    by_part = task.wanted(Rollouts.of({**made.tensors(), **{f"part.{k}": v for k, v in parts.items()}}))
    assert by_part.tolist() == [False] * 3 + [True] * 3  # type: ignore[union-attr]
    assert GRPOTask(recipe_of()).wanted(made) is None


def test_answers_that_were_cut_off_may_be_left_out() -> None:
    """They count for the mean of their group, but none of their tokens is learnt from."""
    made = rollouts()
    kept, _ = GRPOTask(recipe_of(drop_cut_off=True)).credit(made, None, None)  # type: ignore[arg-type]
    plain, told = GRPOTask(recipe_of()).credit(made, None, None)  # type: ignore[arg-type]
    assert not kept.actions_NT[2].any() and torch.equal(kept.actions_NT[:2], plain.actions_NT[:2])
    assert torch.equal(kept.advantages_NT[0], plain.advantages_NT[0])  # type: ignore[index]
    assert told["groups_equal"] == 0.5


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", PRESETS)
def test_learns_the_best_token(toy: Path, algorithm: str) -> None:
    """The reward is the share of one token of 261: the optimum is 1. (Three seeds of each: docs/grpo.md.)"""
    changes = {"rollout": {**TOY["rollout"], "max_refills": 1}, "algorithm": algorithm}
    rewards = rewards_in(train(toy, **changes))
    assert rewards[0] < 0.1 and rewards[-1] > 0.95


@pytest.mark.parametrize("algorithm", ["grpo", "gspo"])
def test_learns_from_older_answers(toy: Path, algorithm: str) -> None:
    """Two minibatches and two epochs a rollout. B72: before the first of the four updates all ratios are 1."""
    metrics = train(toy, algorithm=algorithm, steps=80, update={"minibatches": 2, "epochs": 2})
    assert rewards_in(metrics)[-1] > 0.95
    first = [m for i, m in enumerate(metrics) if i % 4 == 0]
    assert all(abs(m["train/ratio"] - 1) < 1e-6 and m["train/approx_kl"] < 1e-9 for m in first)
    later = [m for i, m in enumerate(metrics) if i % 4]
    assert max(m["train/approx_kl"] for m in later) > 1e-4
    assert max(m["train/clipped_high"] + m["train/clipped_low"] for m in later) > 0


@pytest.mark.parametrize("kl", [{"where": "reward"}, {"where": "loss"}, {"where": "loss", "estimator": "full"}])
def test_a_huge_coefficient_keeps_the_policy(toy: Path, kl: dict[str, Any]) -> None:
    """Without a KL the same steps take the reward far up (`test_learns_the_best_token`)."""
    # Clipped, a step's length doesn't depend on the coefficient: only a small rate shows where the gradient points.
    held = train(toy, kl={**kl, "coef": 1000.0}, optim={**TOY["optim"], "lr": 2e-3}, steps=15)
    assert held[-1]["train/rollout/reward"] < 0.05
    assert max(abs(m.get("train/rollout/kl_mean", 0.0)) for m in held) < 0.05


def test_a_constant_reward_moves_nothing(toy: Path) -> None:
    """B81: no gradient, so no update either: AdamW's weight decay would move the weights, to the bit they stay."""
    rewards = [{"kind": "python", "function": "toy_rewards:constant"}]
    for name in ("grpo", "reinforce++-baseline"):
        metrics = train(toy, name, algorithm=name, rewards=rewards, steps=2, save={"every": 1, "keep": 5})
        assert all(m["train/idle"] == 1 and m["train/grad_norm"] == 0 for m in metrics)
        assert all(m["train/rollout/groups_equal"] == 1 for m in metrics)
        first, last = weights_of(toy, name, 1), weights_of(toy, name, 2)
        assert first.keys() == last.keys() and all(torch.equal(first[n], last[n]) for n in first)


def test_a_constant_reward_leaves_the_kl_to_work(toy: Path) -> None:
    """From a policy far from its reference, only the KL moves it: back, token by token, though all rewards are equal."""
    old = {"model": None, "tokenizer": None}
    train(toy, "start", steps=1)
    train(toy, "far", steps=12, init_from=str(toy / "start"), **old)
    for estimator in ("k2", "k3", "full"):
        metrics = train(
            toy,
            f"back-{estimator}",
            steps=12,
            init_from=str(toy / "far"),
            reference=str(toy / "start"),
            rewards=[{"kind": "python", "function": "toy_rewards:constant"}],
            kl={"where": "loss", "estimator": estimator, "coef": 1.0},
            **old,
        )
        name = "train/kl_loss" if estimator == "full" else "train/rollout/kl_mean"
        assert metrics[0][name] > 0.05 and metrics[-1][name] < 0.6 * metrics[0][name], estimator
        assert all(m["train/policy_loss"] == 0 for m in metrics)


def test_adapters_learn_beside_their_own_reference(toy: Path) -> None:
    """LoRA: the reference is the policy without its adapters, so the KL is 0 at first. They unlearn what it does."""
    train(toy, "start", steps=20)
    metrics = train(
        toy,
        "lora",
        init_from=str(toy / "start"),
        rewards=[{"kind": "python", "function": "toy_rewards:avoid"}],
        lora={"r": 8, "alpha": 16},
        kl={"where": "loss", "coef": 1e-3},
        model=None,
        tokenizer=None,
        steps=15,
    )
    assert abs(metrics[0]["train/rollout/kl_sum"]) < 1e-5 and metrics[-1]["train/rollout/kl_sum"] > 1
    assert rewards_in(metrics)[0] < 0.5 and rewards_in(metrics)[-1] > 0.95
    saved = sorted((toy / "lora" / "checkpoints").iterdir())[-1]
    assert (saved / "adapter_model.safetensors").is_file() and not (saved / "model.safetensors").exists()


def test_ungraded_answers_are_counted_apart(toy: Path) -> None:
    """A grader that always fails ends the run with a sentence, not with rewards of 0 (B71)."""
    with pytest.raises((UserError, MachineError), match="grader"):
        train(toy, rewards=[{"kind": "python", "function": "toy_rewards:bad"}])


# --- one distribution ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_sampler_and_trainer_agree(temperature: float) -> None:
    """B73, B74, D6: log-probabilities of ragged prompts, sampled with a cache, and computed again in one forward pass."""
    tokenizer = Tokenizer.from_config(TokenizerConfig(kind="byte"))
    config = GPTConfig(n_layers=2, n_heads=2, d_model=32, max_seq_len=64, vocab_size=320)
    model = GPT(config)
    init_weights(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.dim() == 2 else 1)
    prompts = [tokenizer.encode(text) for text in ("a", "some longer prompt", "in between")]
    sampling = SamplingConfig(max_new_tokens=24, temperature=temperature, n=3)
    worst = 0.0
    for i, made in enumerate(generate(model, prompts, sampling, tokenizer=tokenizer)):
        prompt = prompts[i // 3]
        ids = torch.tensor([[*prompt, *made.ids]])
        labels = ids[:, 1:].clone()
        labels[:, : len(prompt) - 1] = -100
        with torch.no_grad():
            logprobs, _ = token_logprobs(
                model(ids[:, :-1]),
                model.head_weight,
                labels,
                temperature=temperature,
                vocab_size=tokenizer.vocab_size,
            )
        worst = max(worst, (logprobs[0, len(prompt) - 1 :] - torch.tensor(made.logprobs)).abs().max().item())
    assert worst < 1e-5


def test_warped_sampling_is_corrected(toy: Path) -> None:
    """With top_p the sampler is another distribution than the policy: the gap is told, and weighs the loss."""
    rollout = {**TOY["rollout"], "top_p": 0.9, "correction": "token"}
    metrics = train(toy, rollout=rollout)
    assert rewards_in(metrics)[-1] > 0.95
    assert metrics[0]["train/sampler_gap"] > 1e-3


def test_the_hub_recipe_builds_on_the_meta_device(tmp_path: Path) -> None:
    """7B with adapters: its plan, and the network of its shape without memory."""
    file = Path(__file__).parents[2] / "configs/grpo/7b_lora.yaml"
    old = stand_in("Qwen/Qwen2.5-7B", tmp_path / "model")  # the instruct model's shape is the base model's
    recipe = load_recipe(file, [f"init_from={old}"])
    tokenizer = Tokenizer.load(old)
    with torch.device("meta"):
        model = GPT(model_config(recipe, tokenizer.vocab_size))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS["Qwen/Qwen2.5-7B"]
    lines = []
    with contextlib.suppress(UserError):  # said at the end where the models don't fit this machine
        lines += stage_module(recipe).plan(recipe)
    assert lines
