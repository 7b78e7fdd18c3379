"""Supervised fine-tuning: it learns to answer and to stop, resumes bitwise, and is a Hugging Face folder."""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hub import PARAMETERS, SHAPES, stand_in
from safetensors.torch import load_file

from llmkit.cli import main
from llmkit.config import UserError
from llmkit.data.chats import ChatRows, prepare_chats
from llmkit.data.config import DataConfig
from llmkit.data.loader import RowLoader
from llmkit.data.turns import prompt_ids
from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import generate
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.lora import adapter_size
from llmkit.model.weights import load_model
from llmkit.stages import load_recipe
from llmkit.stages.sft import EmbeddingNoise, conversation_lengths
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.training.config import OptimConfig, RunConfig
from llmkit.training.engine import Engine
from llmkit.training.log import read_lines
from llmkit.training.setup import cost, model_config, plan, row_len, rows_per_step
from llmkit.training.supervised import token_loss

BYTES = Tokenizer.train([], TokenizerConfig(kind="byte"))
SMALL = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_model": 48, "max_seq_len": 64}
COLOURS = {"a": "red", "b": "blue", "c": "green", "d": "white"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Letters and the colours they stand for, in one layout to train on and in another to evaluate on."""
    path = tmp_path_factory.mktemp("sft")
    rows = [{"instruction": f"{k} is", "input": "", "output": v} for k, v in COLOURS.items()] * 8
    (path / "train.json").write_text(json.dumps(rows))
    chats = [[("human", f"{k} is"), ("gpt", v)] for k, v in COLOURS.items()]
    lines = [json.dumps({"conversations": [{"from": w, "value": t} for w, t in c]}) for c in chats]
    (path / "valid.jsonl").write_text("\n".join(lines))
    prompts = [json.dumps({"prompt": f"{k} is", "answer": v}) for k, v in COLOURS.items()]
    (path / "prompts.jsonl").write_text("\n".join(prompts))
    return path


def recipe(folder: Path, out: str, **changes: Any) -> dict[str, Any]:
    base = {
        "stage": "sft",
        "out": str(folder / out),
        "tokenizer": {"kind": "byte"},
        "data": {
            "train": [{"path": str(folder / "train.json")}],
            "valid": [{"path": str(folder / "valid.jsonl")}],
            "cache_dir": str(folder / "cache"),
        },
        "model": SMALL,
        "batch": {"examples_per_step": 4, "micro_tokens": 128},
        "optim": {"name": "muon", "lr": 1e-2, "warmup_steps": 5, "min_lr_frac": 0.0},
        "steps": 120,
        "eval": {"every": 60},
        "log": {"tensorboard": False, "plot": False, "every": 50},
        "save": {"asynchronous": False},
    }
    return {**base, **changes}


def train(folder: Path, recipe: dict[str, Any], *overrides: str) -> int:
    file = folder / f"{Path(recipe['out']).name}.yaml"
    file.write_text(yaml.safe_dump(recipe, allow_unicode=True), "utf-8")
    return main(["train", str(file), *overrides])


def metrics(folder: Path, out: str) -> list[dict[str, Any]]:
    return list(read_lines(folder / out / "metrics.jsonl"))


def test_it_learns_to_answer_and_to_stop(folder: Path) -> None:
    """B27: a small run that has learnt its data writes every answer and then its end of turn, in the chat's form."""
    samples = {"prompts": ["a is"], "max_new_tokens": 12, "temperature": 0.0}
    rewards = [{"kind": "exact", "name": "right"}]
    answers = {"path": str(folder / "prompts.jsonl"), "rewards": rewards, "max_new_tokens": 12}
    assert train(folder, recipe(folder, "learns", eval={"every": 60, "samples": samples, "answers": answers})) == 0
    told = [m for m in metrics(folder, "learns") if "valid/loss" in m]
    assert told[-1]["valid/loss"] < 0.05 < 2 < told[0]["valid/loss"]
    assert told[-1]["valid/accuracy"] == 1.0 and told[-1]["valid/perplexity"] == pytest.approx(
        math.exp(told[-1]["valid/loss"])
    )
    assert told[0]["answers/right"] == 0 and told[-1]["answers/right"] == 1.0 and told[-1]["answers/ended"] == 1.0
    assert list(read_lines(folder / "learns" / "samples.jsonl"))[-1] == {"step": 120, "prompt": "a is", "text": "red"}
    model, tokenizer = (load(resolve_model(folder / "learns")) for load in (load_model, Tokenizer.load))
    prompts = [prompt_ids(tokenizer, f"{k} is") for k in COLOURS]
    made = generate(model, prompts, SamplingConfig(max_new_tokens=12, temperature=0), tokenizer=tokenizer)
    assert [g.text for g in made] == list(COLOURS.values())
    assert all(g.ids[-1] == tokenizer.end_of_turn_id and g.finish_reason == "stop" for g in made)


def test_it_resumes_bitwise(folder: Path) -> None:
    """With noise and dropout, stopped in mid-run: weights and metrics are those of a run that never stopped."""
    changes: dict[str, Any] = {
        "steps": 8,
        "neftune_alpha": 5.0,
        "model": {**SMALL, "dropout": 0.1},
        "eval": {"every": 4},
    }
    assert train(folder, recipe(folder, "whole", **changes)) == 0
    assert train(folder, recipe(folder, "parts", **changes), "stop_at=3") == 0
    assert train(folder, recipe(folder, "parts", **changes)) == 0
    assert metrics(folder, "whole") == metrics(folder, "parts")
    one, two = (load_file(resolve_model(folder / out) / "model.safetensors") for out in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_transformers_and_trl_get_the_same_loss(folder: Path) -> None:
    """The held-out loss is that of TRL's SFTTrainer on the same conversations, with the assistant's tokens as labels.

    Known differences: none in the labels; TRL also feeds the newline after the last end of turn, which nothing learns.
    """
    import logging

    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    assert train(folder, recipe(folder, "short", steps=10, eval={"every": 10})) == 0
    path = resolve_model(folder / "short")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    messages = [
        [{"role": "user", "content": f"{k} is"}, {"role": "assistant", "content": v}] for k, v in COLOURS.items()
    ]
    data = Dataset.from_list([{"messages": m} for m in messages])
    args = SFTConfig(
        output_dir=str(folder / "trl"),
        assistant_only_loss=True,
        per_device_eval_batch_size=4,
        report_to=[],
        use_cpu=True,
        bf16=False,
        eos_token="<|im_end|>",
        disable_tqdm=True,
    )
    logging.getLogger("transformers").setLevel(logging.ERROR)
    trainer = SFTTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    theirs = trainer.evaluate()["eval_loss"]
    ours = [m["valid/loss"] for m in metrics(folder, "short") if "valid/loss" in m][-1]
    assert ours == pytest.approx(theirs, abs=1e-5)


# --- noise -----------------------------------------------------------------------------------------------------------


def batch_of(tmp_path: Path, rows: list[tuple[str, str]], packing: bool = True) -> Any:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in rows))
    cfg = DataConfig(path=str(file), valid_frac=0.0, cache_dir=str(tmp_path / "cache"))
    (chats,) = prepare_chats(cfg, BYTES, row_len=64).train
    made = ChatRows([chats], row_len=64, pad_id=0, packing=packing)
    n = np.arange(made.n_rows[0])
    return made.batch(n, np.zeros_like(n), n)[0]


def network(**changes: Any) -> GPT:
    model = GPT(GPTConfig(**{**SMALL, "vocab_size": 320, **changes}))
    init_weights(model, 0)
    return model


def test_noise_is_that_of_the_paper(tmp_path: Path) -> None:
    """Uniform in +-alpha / sqrt(T D), T of the conversation itself; none on padding, none in evaluation."""
    batch = batch_of(tmp_path, [("x" * 15, "yy"), ("x", "y"), ("z" * 20, "w" * 20)])
    model, seen = network(), []
    noise = EmbeddingNoise(model, alpha=5.0)
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    loss = noise.around(token_loss(0.0, 256))
    clean = model.model.embed_tokens.weight[batch.ids_BT].detach()
    torch.manual_seed(3)
    loss(model.train(), batch)
    torch.manual_seed(3)
    loss(model, batch)
    loss(model.eval(), batch)
    added = seen[0] - clean
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], clean)
    assert not added[batch.docs_BT < 0].any()
    for b in range(len(added)):
        for d in range(int(batch.docs_BT[b].max()) + 1):
            here = added[b][batch.docs_BT[b] == d]
            limit = 5.0 / math.sqrt(here.numel())
            assert 0.97 * limit < here.abs().max() <= limit * (1 + 1e-5)
            assert here.var() == pytest.approx(limit**2 / 3, rel=0.15) and abs(here.mean()) < 0.1 * limit


def test_lengths_of_conversations() -> None:
    docs = torch.tensor([[0, 0, 0, 1, -1], [0, 1, 1, 2, 2]], dtype=torch.int32)
    assert conversation_lengths(docs).tolist() == [[3, 3, 3, 1, 1], [1, 2, 2, 2, 2]]


def test_noise_stays_out_of_the_weights_and_is_another_at_each_step(folder: Path) -> None:
    """What is evaluated has no noise, so with a rate of 0 the loss of training alone moves from step to step."""
    still = {"optim": {"lr": 0.0, "schedule": "constant"}, "steps": 4, "eval": {"every": 2}}
    assert train(folder, recipe(folder, "still", neftune_alpha=50.0, batch={"examples_per_step": 1}, **still)) == 0
    told = metrics(folder, "still")
    losses = [m["train/loss"] for m in told if "train/loss" in m]
    evaluated = [m["valid/loss"] for m in told if "valid/loss" in m]
    assert len(set(losses)) > 2 and len(set(evaluated)) == 1


# --- the step --------------------------------------------------------------------------------------------------------


def test_how_a_step_is_cut_makes_no_difference(tmp_path: Path) -> None:
    """B1, B3: conversations of very different lengths, one to four to a micro-batch: the same gradient to fp64 rounding."""
    rng = np.random.default_rng(0)
    rows = [("q" * int(rng.integers(1, 20)), "a" * int(rng.integers(1, 30))) for _ in range(16)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in rows))
    cfg = DataConfig(path=str(file), valid_frac=0.0, cache_dir=str(tmp_path / "cache"))
    (chats,) = prepare_chats(cfg, BYTES, row_len=64).train
    found = []
    for micro in (1, 2, 4):
        config = RunConfig(out="x", steps=1, optim=OptimConfig(name="sgd", lr=1.0, clip=None, weight_decay=0.0,
                           schedule="constant", warmup_steps=0), precision="fp64")  # fmt: skip
        engine = Engine(network(), config)
        rows_of = ChatRows([chats], row_len=64, pad_id=0, packing=False)
        with RowLoader(rows_of, rows_per_step=4, micro_rows=micro) as loader:
            engine.update(loader.step(0), token_loss(0.0, 256))
        found.append(torch.cat([p.detach().flatten() for p in engine.module.parameters()]))
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-12)
    assert torch.allclose(found[0], found[2], rtol=0, atol=1e-12)


# --- recipes and commands --------------------------------------------------------------------------------------------

REFUSED = {
    "data.cross_document_attention=true": "one conversation would answer another's question",
    "data.clean=default": "conversations are read as they are",
    "model.causal=false": "from left to right",
    "neftune_alpha=0": "greater than 0",
    "train_on=user": "'assistant', 'last' or 'all'",
    "data.add_eos=false": "the chat template says what is added",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_makes_no_sense_is_refused(folder: Path, override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(folder, recipe(folder, "refused"), override) == 2
    assert REFUSED[override] in capsys.readouterr().err and not (folder / "refused").exists()


def test_prepare_and_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "prepared.yaml"
    file.write_text(yaml.safe_dump(recipe(folder, "prepared")))
    assert main(["prepare", str(file)]) == 0 and main(["plan", str(file)]) == 0
    told = capsys.readouterr().out
    assert "32 conversations" in told and "0 left out, 0 cut" in told and "parameters" in told


def test_useless_data_stops_the_run_in_a_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """B34."""
    (folder / "bad.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
    data = {"path": str(folder / "bad.jsonl"), "cache_dir": str(folder / "cache")}
    assert train(folder, recipe(folder, "bad", data=data)) == 2
    err = capsys.readouterr().err
    assert "bad.jsonl:1: every turn of the assistant is empty" in err and "Traceback" not in err


def test_the_demo_is_what_the_docs_say() -> None:
    demo = load_recipe(Path(__file__).parents[2] / "configs/sft/demo.yaml")
    assert demo.init_from == "runs/demo/pretrain" and demo.out == "runs/demo/sft" and demo.train_on == "assistant"


@pytest.mark.parametrize("name", ["7b_lora", "alpaca", "gsm8k"])
def test_recipes_on_hub_models_build_on_the_meta_device(name: str, tmp_path: Path) -> None:
    """The model of the hub's shape, and beside it the adapters that the recipe asks for."""
    file = Path(__file__).parents[2] / f"configs/sft/{name}.yaml"
    hub = load_recipe(file).init_from
    recipe = load_recipe(file, [f"init_from={stand_in(hub, tmp_path / 'model')}"])
    config = model_config(recipe, BYTES.vocab_size)
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[hub]
    costs = cost(recipe, config)
    assert rows_per_step(recipe, row_len(recipe, config)) > 1
    lines = []
    with contextlib.suppress(UserError):  # said at the end where weights and optimizer don't fit this machine
        lines += plan(recipe)
    if recipe.lora is not None:
        shape, r = SHAPES[hub], recipe.lora.r
        d, f, kv = shape["hidden_size"], shape["intermediate_size"], shape["num_key_value_heads"] * 128
        n = shape["num_hidden_layers"] * r * (4 * d + 2 * (d + kv) + 3 * (d + f))
        matrices, lengths, packed = adapter_size(model, recipe.lora)
        assert (matrices, lengths, packed) == (n, 0, 0) and costs.n_params == PARAMETERS[hub] + n
        # Weights in bf16 and hardly anything else: no gradient and no optimizer state of what is frozen.
        assert 2 * PARAMETERS[hub] < costs.state_bytes < 2 * PARAMETERS[hub] + 20 * n
