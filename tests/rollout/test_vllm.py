"""Rollouts by vLLM, with a stand-in of its API (tests/stand_ins): what goes to it, what comes back, and what is noticed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from ports import free_port
from safetensors.torch import load_file, save_file

from llmkit.cli import main
from llmkit.config import MachineError
from llmkit.inference.stream import Generation
from llmkit.model.config import ExpertsConfig, GPTConfig, LoraConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.lora import Base, apply_lora
from llmkit.model.saving import merged_tensors, saved_tensors
from llmkit.model.weights import load_model
from llmkit.rollout import collect, vllm as ours
from llmkit.rollout.collect import own_engine, sample_answers
from llmkit.rollout.config import RolloutConfig
from llmkit.rollout.prompts import PromptRow
from llmkit.rollout.vllm import Vllm
from llmkit.storage import newest_good
from llmkit.tokenizer import Tokenizer
from llmkit.tokenizer.config import TokenizerConfig
from llmkit.training.dist import Ranks

STAND_INS = Path(__file__).parents[1] / "stand_ins"
REWARDS = """
def share(prompts, completions, **columns):
    return [c.count("e") / max(1, len(c)) for c in completions]
"""
SECTIONS: dict[str, dict[str, Any]] = {
    "ppo": {
        "rollout": {"prompts_per_step": 32, "samples_per_prompt": 2},
        "update": {"minibatches": 2, "epochs": 2},
        "kl": {"coef": 0.01},
        "optim": {"lr": 3e-3},
        "critic": {"lr": 1e-2},
        "steps": 160,
    },
    "grpo": {
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 8},
        "kl": {"where": "none"},
        "optim": {"lr": 1e-2},
        "steps": 30,
    },
}


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The stand-in as `vllm`, hale; weights are handed over in `memory`."""
    monkeypatch.syspath_prepend(str(STAND_INS))
    for name in [n for n in sys.modules if n.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    module = importlib.import_module("vllm")
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(ours, "_MEMORY", tmp_path / "memory")
    yield module
    for name in [n for n in sys.modules if n.split(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """toy(stage, **changes) -> a recipe that rewards the share of the letter e, its rollouts by vLLM; `run` beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / f"rewards_{tmp_path.name}.py").write_text(REWARDS)
    rows = [{"prompt": chr(97 + i % 26) + "!" * (i % 7)} for i in range(40)]  # of one to seven tokens
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def make(stage: str, name: str = "run", **changes: Any) -> Path:
        recipe: dict[str, Any] = {
            "stage": stage,
            "out": str(tmp_path / name),
            "tokenizer": {"kind": "byte"},
            "model": {"n_layers": 1, "n_heads": 2, "d_model": 32, "max_seq_len": 32},
            "data": {"path": "prompts.jsonl", "chat": False, "valid_frac": 0.1},
            "rewards": [{"kind": "python", "function": f"rewards_{tmp_path.name}:share"}],
            "eval": {"every": 1000},
            "log": {"tensorboard": False, "plot": False},
            "device": "cpu",
            **SECTIONS[stage],
        }
        recipe["optim"] = {"warmup_steps": 0, "schedule": "constant", **recipe["optim"]}
        recipe["rollout"] = {"engine": "vllm", "correction": "token", "max_new_tokens": 8, **recipe["rollout"]}
        for key, value in changes.items():
            recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        return file

    return make


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [m for m in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "train/loss" in m]


def rollouts_of(run: Path) -> list[dict[str, Any]]:
    return [m for m in steps_of(run) if "train/rollout/reward" in m]


# --- it learns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_it_finds_the_optimum(stage: str, vllm: Any, toy: Callable[..., Path], tmp_path: Path) -> None:
    """As with its own engine (tests/stages), and with the policy's weights at every rollout: sampler and trainer agree."""
    assert main(["train", str(toy(stage))]) == 0
    run = tmp_path / "run"
    found = rollouts_of(run)
    assert found[0]["train/rollout/reward"] < 0.05 and found[-1]["train/rollout/reward"] >= 0.9
    first = [m for m in steps_of(run) if "train/rollout/reward" in m]
    assert max(m["train/sampler_gap"] for m in first) <= 1e-5
    assert all(m["train/correction"] == pytest.approx(1, abs=1e-5) for m in first)
    assert max(m["train/correction_max"] for m in first) <= 1 + 1e-4
    assert all(m["train/correction_cut"] == 0 and m["train/sampler_prob_gap"] <= 1e-5 for m in first)
    assert all(m["train/ratio_deviation"] <= 1e-4 for m in first)
    # One engine; then its weights and an empty prefix cache before each rollout, and before both evaluations.
    assert vllm.calls.count("start") == 1 and vllm.calls.count("reload") == len(found) + 2 - 1
    assert vllm.calls.count("reset") == vllm.calls.count("reload")
    assert not list((tmp_path / "memory").iterdir())  # nothing is left in main memory
    assert not (run / "hand_over").exists()


@pytest.mark.parametrize("fault", ["deaf", "keeps_cache", "bf16", "temperature"])
def test_a_sampler_that_is_not_the_policy_shows(
    fault: str, vllm: Any, toy: Callable[..., Path], tmp_path: Path
) -> None:
    """Weights of the step before, keys and values of them, other numbers, another distribution: each raises the gap and
    the weights' spread, and none of it reaches the ratios, which are the trainer's own."""
    setattr(vllm.faults, fault, 1.3 if fault == "temperature" else True)
    assert main(["train", str(toy("grpo", steps=12))]) == 0
    found = rollouts_of(tmp_path / "run")
    later = found[6:]  # the first rollout's weights are right in any case, and prompts come again after the fourth
    limit = {"deaf": 0.3, "keeps_cache": 1e-3, "bf16": 1e-4, "temperature": 0.03}[fault]
    assert min(m["train/sampler_gap"] for m in later) > limit
    assert min(m["train/correction_max"] for m in later) > 1 + limit
    assert all(m["train/ratio_deviation"] <= 1e-4 for m in found)
    warned = "sampler-differs" in (tmp_path / "run" / "train.log").read_text()
    assert warned == (fault != "bf16")


@pytest.mark.parametrize("correction", ["token", "sequence", "product"])
def test_another_distribution_is_corrected(
    correction: str, vllm: Any, toy: Callable[..., Path], tmp_path: Path
) -> None:
    """A sampler at 1.3 times the temperature: the policy learns all the same, and what is cut off is told."""
    vllm.faults.temperature = 1.3
    recipe = toy("grpo", rollout={"correction": correction}, eval={"every": 30})
    assert main(["train", str(recipe)]) == 0
    found = rollouts_of(tmp_path / "run")
    assert found[-1]["train/rollout/reward"] > (0.2 if correction == "product" else 0.6)  # weights of answers vary most
    assert max(m["train/correction_max"] for m in found) <= 2.0
    assert 0 <= min(m["train/correction_cut"] for m in found) < 0.5


@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_log_probabilities_are_of_what_was_drawn(
    temperature: float, vllm: Any, toy: Callable[..., Path], tmp_path: Path
) -> None:
    """vLLM's default is those before the temperature."""
    assert main(["train", str(toy("ppo", steps=8, rollout={"temperature": temperature, "correction": "product"}))]) == 0
    assert all(m["train/rollout/sampler_gap_max"] <= 1e-5 for m in rollouts_of(tmp_path / "run"))


def test_filters_are_corrected(vllm: Any, toy: Callable[..., Path], tmp_path: Path) -> None:
    """With top_p the sampler's log-probabilities are those of what is left, and weights are below 1."""
    assert main(["train", str(toy("grpo", steps=4, rollout={"top_p": 0.8, "top_k": 200}))]) == 0
    found = rollouts_of(tmp_path / "run")
    assert all(0.6 < m["train/correction"] < 0.95 for m in found)


def test_the_kl_is_the_trainers_own(vllm: Any, toy: Callable[..., Path], tmp_path: Path) -> None:
    """With one update a rollout, and a reference: the policy is asked itself, since another distribution sampled."""
    vllm.faults.temperature = 1.5
    kl = {"where": "reward", "estimator": "k1", "coef": 0.01}
    assert main(["train", str(toy("grpo", steps=3, kl=kl, eval={"every": 3}))]) == 0
    assert abs(rollouts_of(tmp_path / "run")[0]["train/rollout/kl_sum"]) < 1e-4  # KL(pi, pi)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert abs(next(m["valid/kl_sum"] for m in lines if "valid/kl_sum" in m)) < 1e-4


# --- what goes over --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_config(TokenizerConfig(kind="byte"))


def policy(tokenizer: Tokenizer, **changes: Any) -> GPT:
    """Its embedding has more rows than the tokenizer has tokens."""
    shape = {"n_layers": 2, "n_heads": 2, "d_model": 16, "max_seq_len": 64, "vocab_size": 320, **changes}
    model = GPT(GPTConfig(**shape))
    init_weights(model, 0)
    assert tokenizer.vocab_size < 320
    return model


GPT2 = {
    "positions": "learned",
    "norm": "layernorm",
    "mlp": "gelu_tanh",
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"tie_embeddings": False},
    "tied": {},
    "gpt2": GPT2,
    "qwen3": {"qk_norm": True},
    "qwen3_moe": {"qk_norm": True, "tie_embeddings": False, "experts": ExpertsConfig(n=4, n_active=2, d_ff=24)},
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_folder_is_the_policy(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Every family, plain and with adapters: transformers' class loads the folder and gives our logits, of tokens only."""
    from transformers import AutoModelForCausalLM

    model = policy(tokenizer, **SHAPES[name])
    assert name in ("tied", model.config.family)
    V = tokenizer.vocab_size
    for adapted in (False, True):
        if adapted:
            apply_lora(model, LoraConfig(r=2, dora=name == "llama"), 0, Base("base", "hash"))
            for n, p in model.named_parameters():
                if "lora_B" in n:
                    torch.nn.init.normal_(p, std=0.3)
        else:
            saved = saved_tensors(model)["model.safetensors"]
            handed = merged_tensors(model, V)
            assert handed.keys() == saved.keys()
            assert all(torch.equal(t, saved[n][: len(t)]) for n, t in handed.items())
        folder = tmp_path / f"{name}-{adapted}"
        folder.mkdir()
        shape = model.config.model_copy(update={"vocab_size": V})
        for file, content in model_files(shape, torch.float32, tokenizer, {"stage": "rollout", "step": 0}).items():
            (folder / file).write_bytes(content)
        tensors = {n: t.contiguous() for n, t in merged_tensors(model, V).items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        ids = torch.tensor([[97, 98, 101, 260, 102]])
        with torch.no_grad():
            own = model.eval().logits(model(ids))[..., :V]
            theirs = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        assert theirs.shape[-1] == V
        torch.testing.assert_close(theirs, own, rtol=1e-4, atol=1e-4)
        assert load_model(folder).config.vocab_size == V


@pytest.mark.parametrize("lora", [{"r": 2}, {"r": 2, "dora": True}])
def test_adapters_are_merged(
    lora: dict[str, Any], vllm: Any, toy: Callable[..., Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    model = GPT(GPTConfig(n_layers=1, n_heads=2, d_model=32, max_seq_len=32, vocab_size=320))
    init_weights(model, 0)
    for file, content in model_files(model.config, torch.float32, tokenizer, {"stage": "sft", "step": 0}).items():
        (base / file).write_bytes(content)
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, base / "model.safetensors", {"format": "pt"})
    recipe = yaml.safe_load(toy("ppo", steps=12, init_from=str(base), lora=lora).read_text())
    del recipe["model"], recipe["tokenizer"]
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(tmp_path / "lora.yaml")]) == 0
    found = rollouts_of(tmp_path / "run")
    assert len(found) == 3 and all(m["train/rollout/sampler_gap_max"] <= 1e-5 for m in found)
    assert abs(found[-1]["train/rollout/kl_sum"]) > 1e-4  # the adapters have moved


def test_the_averaged_weights_are_handed_over_too(vllm: Any, toy: Callable[..., Path], tmp_path: Path) -> None:
    """An evaluation of the average samples from the average, and the next rollout from the policy again."""
    changes = {"optim": {"ema_decay": 0.99}, "eval": {"every": 4, "weights": "ema"}}
    assert main(["train", str(toy("grpo", steps=12, **changes))]) == 0
    assert all(m["train/sampler_gap"] <= 1e-5 for m in rollouts_of(tmp_path / "run"))


def test_it_sleeps_between_rollouts(
    vllm: Any, toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order that vLLM's documentation has: weights, their content, then the cache. Refills are one rollout."""
    monkeypatch.setattr(Vllm, "sleeps", True)
    recipe = toy("grpo", steps=3, algorithm="dapo", kl={"where": "none"}, eval={"every": None})
    assert main(["train", str(recipe)]) == 0
    asked = [c.split(" ")[0] if c.startswith("generate") else c for c in vllm.calls]
    once = [c for i, c in enumerate(asked) if c != "generate" or asked[i - 1] != "generate"]
    awake = ["wake weights", "reload", "wake kv_cache", "reset", "generate", "sleep"]
    assert once == ["start", "generate", "sleep"] + 2 * awake
    assert all(m["train/sampler_gap"] <= 1e-5 for m in rollouts_of(tmp_path / "run"))


@pytest.mark.parametrize("where", ["run", "said"])
def test_where_the_weights_lie(
    where: str, vllm: Any, toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the run's folder where main memory has no room; where the recipe says. What a killed start left is removed."""
    monkeypatch.setattr(ours, "_MEMORY", tmp_path / "nowhere")
    seen: list[Path] = []
    original = vllm.LLM

    def start(model: str, **told: Any) -> Any:
        seen.append(Path(model))
        assert (Path(model) / "model.safetensors").is_file() and not (Path(model) / "left.bin").exists()
        return original(model, **told)

    monkeypatch.setattr(vllm, "LLM", start)
    left = tmp_path / "run" / "hand_over" / "node-0"
    left.mkdir(parents=True)
    (left / "left.bin").write_bytes(b"0")
    said = {"vllm": {"folder": str(tmp_path / "disk")}} if where == "said" else {}
    assert main(["train", str(toy("grpo", steps=2, rollout=said))]) == 0
    assert seen[0].parent == (tmp_path / "disk" if where == "said" else tmp_path / "run" / "hand_over")
    assert not seen[0].exists()


# --- what comes back -------------------------------------------------------------------------------------------------


def rows_of(tokenizer: Tokenizer, *texts: str) -> list[PromptRow]:
    return [PromptRow(tokenizer.encode(t), t, {}, None, i) for i, t in enumerate(texts)]


def engine(tokenizer: Tokenizer, tmp_path: Path, **changes: Any) -> Vllm:
    config = RolloutConfig(engine="vllm", correction="token", max_new_tokens=12, samples_per_prompt=3, **changes)
    return Vllm(config, tokenizer, Ranks(), tmp_path / "out")


def ending_policy(tokenizer: Tokenizer) -> GPT:
    """Ends an answer in about one token of six."""
    model = policy(tokenizer)
    stop = sorted(tokenizer.stop_ids)[0]
    with torch.no_grad():
        model.head_weight[stop] = 0
        model.head_weight[tokenizer.vocab_size :] = 50.0  # what must never be drawn: no token
        model.model.norm.weight.mul_(0.2)
        model.head_weight[: tokenizer.vocab_size] -= 0.0
        model.head_weight[:200] = -3 * model.head_weight[:200].abs().sign()
    return model


def test_answers_of_all_kinds(vllm: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Prompts of unequal length, answers that end by themselves, at max_new_tokens and at the context's end: ids as they
    were sampled, log-probabilities and text as the policy's own, and no answer depends on its batch or its neighbours."""
    model = ending_policy(tokenizer)
    rows = rows_of(tokenizer, "a", "what is it?", "x" * 58, "to be or not")
    seeds = [11, 12, 13, 14]
    made = {}
    for size in (128, 4):
        held = engine(tokenizer, tmp_path, batch_size=size)
        with held.awake(model) as write:
            made[size] = sample_answers(model, rows, seeds, held.config, tokenizer, engine=write)
        held.close()
    assert [a.ids for a in made[128]] == [a.ids for a in made[4]]
    answers = made[128]
    assert len({tuple(a.ids) for a in answers}) == len(answers)  # distinct seeds, in a group too
    new = [a.ids[len(a.row.ids) :] for a in answers]
    assert {a.finished for a in answers} == {True, False}
    for answer, added in zip(answers, new, strict=True):
        assert answer.ids[: len(answer.row.ids)] == answer.row.ids and max(added) < tokenizer.vocab_size
        assert answer.finished == (added[-1] in tokenizer.stop_ids)
        assert not set(added[:-1]) & tokenizer.stop_ids
        limit = min(12, 64 - len(answer.row.ids))
        assert answer.finished or len(added) == limit
        ids = torch.tensor([answer.ids])
        with torch.no_grad():
            scores = model.logits(model(ids))[0, :, : tokenizer.vocab_size].log_softmax(-1)
        own = scores[torch.arange(len(answer.row.ids) - 1, len(answer.ids) - 1), added]
        torch.testing.assert_close(torch.tensor(answer.logprobs[-len(added) :]), own, rtol=0, atol=1e-5)
        assert answer.text == tokenizer.decode(added[:-1] if answer.finished else added, start=False)
    assert any(len(added) == 6 for added in new[6:9])  # of 58 tokens there is room for six


def test_turns_go_on_from_ids(vllm: Any, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools: every turn is another request, whose prompt is all ids so far."""
    said = {"role": "tool", "content": "42"}
    monkeypatch.setattr(collect, "continue_ids", lambda *args: tokenizer.encode("[42]"))

    class Twice:
        max_turns = 3

        def reply(self, messages: Any, text: str, fields: Any) -> Any:
            return [said]

    row = PromptRow(tokenizer.encode("hi"), [{"role": "user", "content": "hi"}], {}, None, 0)
    held = engine(tokenizer, tmp_path)
    asked: list[list[int]] = []

    with held.awake(policy(tokenizer)) as write:

        def ending(prompts: Any, seeds: Any, n: int) -> list[Generation]:
            asked.extend(map(list, prompts))
            return [
                Generation([*g.ids[:-1], tokenizer.end_of_turn_id], g.logprobs, g.text, "stop")
                for g in write(prompts, seeds, n)
            ]

        answers = sample_answers(
            policy(tokenizer), [row], [1], held.config, tokenizer, environment=Twice(), engine=ending
        )
    assert all(a.n_turns == 3 for a in answers) and len(asked) == 1 + 3 * 2
    assert all(any(a.ids[: len(p)] == p for a in answers) for p in asked)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"finish": "abort"}, "ended answer 0 with 'abort'"),
        ({"drops_stop": True}, "but the stop token is not among|log-probabilities for 0 tokens"),
        ({"nan": True}, "not finite"),
    ],
)
def test_what_is_not_whole_ends_the_run(
    fault: dict[str, Any], said: str, vllm: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for name, value in fault.items():
        setattr(vllm.faults, name, value)
    held = engine(tokenizer, tmp_path)
    with held.awake(ending_policy(tokenizer)) as write, pytest.raises(MachineError, match=said):
        write([tokenizer.encode("abc")], [1], 20)


def test_it_is_the_same_interface(vllm: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Own engine and vLLM are two functions of (prompts, seeds, n)."""
    model, held = ending_policy(tokenizer), engine(tokenizer, tmp_path)
    prompts, own = [[97], [98, 99]], own_engine(policy(tokenizer), held.config, tokenizer, 4, lambda: False)
    with held.awake(model) as write:
        for made in (own(prompts, [1, 2], 2), write(prompts, [1, 2], 2)):
            assert len(made) == 4 and all(isinstance(g, Generation) for g in made)
        again = write([prompts[1]], [2], 2)
        assert [g.ids for g in again] == [g.ids for g in write(prompts, [1, 2], 2)[2:]]


# --- stopping and going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_run_that_goes_on_ends_alike(stage: str, vllm: Any, toy: Callable[..., Path], tmp_path: Path) -> None:
    """From a checkpoint between the updates of a rollout, and after one: the same numbers and weights to the bit, as far
    as the sampler gives the same answers again."""
    changes = {"steps": 10, "save": {"every": 3, "keep": 9}, "update": {"minibatches": 2, "epochs": 2}}
    for name in ("whole", "cut"):
        assert main(["train", str(toy(stage, name, **changes))]) == 0
    for step in (6, 9, 10):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
    (tmp_path / "cut" / "DONE").unlink()
    assert main(["train", str(toy(stage, "cut", **changes))]) == 0
    one, two = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut"))
    assert one == two
    folders = [newest_good(tmp_path / name)[0] for name in ("whole", "cut")]
    first, second = (load_file(f / "model.safetensors") for f in folders if f is not None)
    assert all(torch.equal(t, second[n]) for n, t in first.items())


def test_a_signal_is_heard_between_batches(vllm: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    from llmkit.config import Interrupted

    held = engine(tokenizer, tmp_path, batch_size=3)
    asked = iter([False, False, True])
    with held.awake(policy(tokenizer)) as write, pytest.raises(Interrupted):
        sample_answers(
            policy(tokenizer),
            rows_of(tokenizer, "a", "b", "c", "d"),
            [1, 2, 3, 4],
            held.config,
            tokenizer,
            should_stop=lambda: next(asked),
            engine=write,
        )
    assert [c for c in vllm.calls if c.startswith("generate")] == ["generate 3", "generate 3"]


# --- several ranks ---------------------------------------------------------------------------------------------------


def _child(rank: int, recipe: str, port: int, folder: str) -> None:
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    sys.path[:0] = [str(STAND_INS), folder]
    torch.set_num_threads(1)
    assert main(["train", recipe]) == 0
    import vllm

    Path(folder, f"calls-{rank}.json").write_text(json.dumps(vllm.calls))


@pytest.mark.parametrize("shard", [pytest.param("none", marks=pytest.mark.campaign), "full"])
def test_each_rank_has_an_engine(
    shard: str, vllm: Any, toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, whole or in shares, one folder: the rollouts of one rank, up to rounding, half of them each."""
    rollout = {"prompts_per_step": 5, "samples_per_prompt": 4, "record_every": 1, "max_new_tokens": 12}
    changes = {"steps": 3, "rollout": rollout, "eval": {"every": None}, "optim": {"lr": 1e-3}}
    one = toy("grpo", "one", **changes)
    two = toy("grpo", "two", **changes, parallel={"shard": shard})
    assert main(["train", str(one)]) == 0
    port = free_port()
    mp.spawn(_child, (str(two), port, str(tmp_path)), nprocs=2)
    for file in sorted((tmp_path / "one" / "rollouts").glob("*.jsonl")):
        a, b = (
            [json.loads(line) for line in (tmp_path / name / "rollouts" / file.name).read_text().splitlines()]
            for name in ("one", "two")
        )
        assert [r["answer"] for r in a] == [r["answer"] for r in b]
        assert len({r["answer"] for r in b}) > 15  # of 20: distinct seeds
    assert all(m["train/sampler_gap"] <= 1e-5 for m in steps_of(tmp_path / "two"))
    for rank, n in enumerate((8, 12)):
        calls = json.loads((tmp_path / f"calls-{rank}.json").read_text())
        assert calls == ["start", f"generate {n}"] + 2 * ["reload", "reset", f"generate {n}"]


def _failing(rank: int, recipe: str, port: int, folder: str) -> None:
    """As `_child`, but the engine of rank 1 gives up in its second rollout."""
    sys.path[:0] = [str(STAND_INS), folder]
    import vllm

    original = vllm.LLM.generate

    def generate(self: Any, *args: Any, **more: Any) -> Any:
        if rank == 1 and "reload" in vllm.calls:
            vllm.faults.finish = "abort"
        return original(self, *args, **more)

    vllm.LLM.generate = generate
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    torch.set_num_threads(1)
    Path(folder, f"code-{rank}").write_text(str(main(["train", recipe])))


def test_an_engine_that_fails_ends_all_ranks(toy: Callable[..., Path], tmp_path: Path) -> None:
    """The other rank, whose answers are done, does not wait for ever; and no weights are left in memory."""
    file = toy("grpo", steps=3, eval={"every": None}, rollout={"vllm": {"folder": str(tmp_path / "there")}})
    port = free_port()
    mp.spawn(_failing, (str(file), port, str(tmp_path)), nprocs=2)
    assert [(tmp_path / f"code-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    assert not list(tmp_path.glob("there/**/*.safetensors*"))


# --- wrong use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout": {"correction": "none"}}, "set correction: token"),
        ({"rollout": {"temperature": 0.005}}, "raise it, or take engine: own"),
        ({"precision": "fp64"}, "precision fp64 with rollout.engine vllm"),
        ({"parallel": {"tensor": 2}}, "parallel.tensor (2) with rollout.engine vllm"),
        ({"rollout": {"engine": "own", "vllm": {"memory_frac": 0.5}}}, "set engine: vllm, or drop the section"),
        ({"rollout": {"vllm": {"memory_frac": 1.5}}}, "memory_frac"),
    ],
)
def test_wrong_use(
    changes: dict[str, Any], said: str, vllm: Any, toy: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(toy("grpo", **changes))]) == 2
    assert said in capsys.readouterr().err and not vllm.calls


def test_without_the_package(
    toy: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, before anything is done; planning and looking at the data work without it."""
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "vllm" else original(n, *a))
    assert main(["train", str(toy("ppo"))]) == 2
    assert "vLLM, which is not installed: `pip install llmkit[vllm]`, or take engine: own" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
    assert main(["prepare", str(toy("ppo"))]) == 0


def test_plan_and_doctor_need_no_vllm(
    toy: Callable[..., Path], tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it takes of a device is said; the doctor looks at the policy's own sampler."""
    tokenizer.save(tmp_path / "tokenizer")
    recipe = toy("ppo", tokenizer={"kind": "byte", "path": str(tmp_path / "tokenizer")})
    said = yaml.safe_load(recipe.read_text())
    said["tokenizer"] = {"path": str(tmp_path / "tokenizer")}
    recipe.write_text(yaml.safe_dump(said))
    assert main(["plan", str(recipe)]) == 0
    assert (
        "vLLM takes 30% of each device's memory beside what is counted here, while it writes" in capsys.readouterr().out
    )
    assert main(["doctor", str(recipe)]) == 0
    assert "FAIL" not in capsys.readouterr().out


def test_no_other_extra_brings_it() -> None:
    """It chooses a PyTorch of its own, so it is installed only where it is asked for by name."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert [name for name, needs in extras.items() if "vllm" in "".join(needs)] == ["vllm"]
    assert not any("vllm" in need for need in project["dependencies"])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("__version__", "0.19.1+cu129", "vLLM 0.19.1+cu129 is older than what this was written for: install 0.22"),
        ("device_type", "cuda", "the run's device is cpu, but this build of vLLM computes on cuda"),
    ],
)
def test_another_vllm(
    name: str, value: str, said: str, vllm: Any, toy: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    import vllm.platforms

    setattr(vllm.platforms.current_platform if name == "device_type" else vllm, name, value)
    assert main(["train", str(toy("grpo"))]) == 2
    assert said in capsys.readouterr().err
