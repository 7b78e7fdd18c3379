"""What a network may be trained for, through the command line: each learns, resumes bitwise, and is a Hugging Face folder."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from llmkit.cli import main
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.training.log import read_lines

DEMO = Path(__file__).parents[2] / "data" / "demo"
SMALL = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_model": 64, "d_ff": 128, "max_seq_len": 64}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corner of the demo world, and a tokenizer of it with a mask token."""
    folder = tmp_path_factory.mktemp("world")
    lines = (DEMO / "corpus.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "corpus.jsonl").write_text("".join(lines[:900]), "utf-8")
    cfg = TokenizerConfig(vocab_size=768, special=("<|mask|>",))
    Tokenizer.train((json.loads(line)["text"] for line in lines[:900]), cfg).save(folder / "tokenizer")
    return folder


def train(folder: Path, recipe: dict[str, Any], *overrides: str) -> int:
    """`llmkit train` of a recipe that is written into the folder, quietly."""
    quiet = {"log": {"tensorboard": False, "plot": False, "every": 50}, "save": {"asynchronous": False}}
    file = folder / f"{recipe['stage']}.yaml"
    file.write_text(yaml.safe_dump({**quiet, **recipe}, allow_unicode=True), "utf-8")
    return main(["train", str(file), *overrides])


def recipe(world: Path, out: Path, **changes: Any) -> dict[str, Any]:
    base = {
        "stage": "pretrain",
        "out": str(out),
        "tokenizer": str(world / "tokenizer"),
        "data": {"path": str(world / "corpus.jsonl"), "cache_dir": str(world / "cache")},
        "model": SMALL,
        "batch": {"tokens_per_step": 1024, "micro_tokens": 512},
        "optim": {"lr": 3e-3, "warmup_steps": 5},
        "steps": 6,
        "eval": {"every": 6},
    }
    return {**base, **changes}


def evaluations(out: Path) -> list[dict[str, Any]]:
    return [r for r in read_lines(out / "metrics.jsonl") if "valid/loss" in r]


class Quiet(logging.Handler):
    """Collects what transformers has to say about a folder: nothing, it is hoped."""

    def __enter__(self) -> Quiet:
        from transformers.utils import logging as hf

        self.said: list[str] = []
        hf.get_logger().addHandler(self)
        self.caught = warnings.catch_warnings()
        self.caught.__enter__()
        warnings.simplefilter("error")
        return self

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging as hf

        hf.get_logger().removeHandler(self)
        self.caught.__exit__(None, None, None)


def same_run(a: Path, b: Path) -> None:
    """Two runs ended with the same bits."""
    left, right = (load_file(resolve_model(run) / "model.safetensors") for run in (a, b))
    assert left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()


# --- masked tokens ---------------------------------------------------------------------------------------------------


def unigram_nats(world: Path) -> tuple[float, float]:
    """Entropy of the token frequencies of the corpus, and the share of the most frequent token."""
    tokenizer = Tokenizer.load(world / "tokenizer")
    texts = [json.loads(line)["text"] for line in (world / "corpus.jsonl").read_text("utf-8").splitlines()]
    counts = Counter(int(i) for ids in tokenizer.encode_batch(texts) for i in ids)
    p = np.array(list(counts.values())) / sum(counts.values())
    return float(-(p * np.log(p)).sum()), float(p.max())


def test_masked_prediction_learns_and_loads(world: Path, tmp_path: Path) -> None:
    """Held-out hidden tokens at 80 % of the unigram's nats or less; a Hugging Face model with the same logits."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    changes = {"objective": "masked", "model": {**SMALL, "causal": False}, "steps": 250, "eval": {"every": 125}}
    changes |= {"optim": {"name": "muon", "lr": 5e-3, "warmup_steps": 5}, "batch": {"tokens_per_step": 2048}}
    one = tmp_path / "one"
    assert train(tmp_path, recipe(world, one, **changes)) == 0
    entropy, most = unigram_nats(world)
    first, *_, last = evaluations(one)
    assert last["valid/loss"] < 0.8 * entropy and last["valid/accuracy"] > 3 * most
    assert first["valid/loss"] == pytest.approx(math.log(768), rel=0.05)
    folder = resolve_model(one)
    with Quiet() as log:
        model = AutoModelForMaskedLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not log.said and type(model).__name__ == "EuroBertForMaskedLM"
    assert tokenizer.mask_token == "<|mask|>" and tokenizer.mask_token_id == model.config.mask_token_id
    ours = Tokenizer.load(folder)
    assert ours.mask_id == tokenizer.mask_token_id
    ids = torch.tensor([[ours.bos_id or 0, *ours.encode("Question: Where does"), ours.mask_id]])
    from llmkit.model.weights import load_model

    mine = load_model(folder)
    with torch.no_grad():
        torch.testing.assert_close(mine.logits(mine(ids)), model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "masked", "model": {**SMALL, "causal": False}},
        {"model": {**SMALL, "qk_norm": True, "experts": {"n": 4, "n_active": 2, "d_ff": 32, "balance": 0.1}}},
        {"model": {**SMALL, "sliding_window": 16}},
    ],
    ids=["masked", "experts", "window"],
)
def test_a_stopped_run_ends_with_the_same_bits(world: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """R1: the experts' load of the step before, and which tokens are hidden, survive a restart."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(tmp_path, recipe(world, one, **changes)) == 0
    for stop_at in (2, 5, 6):
        assert train(tmp_path, recipe(world, two, **changes), f"stop_at={stop_at}") == 0
    same_run(one, two)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "masked"}, "objective masked sees both sides: set model.causal to false"),
        ({"model": {**SMALL, "causal": False}}, "objective next_token would see the token it predicts"),
        ({"masking": {"frac": 0.3}}, "masking means something with objective: masked only"),
        (
            {"objective": "masked", "masking": {"replace_frac": 0.9, "random_frac": 0.2}},
            r"replace_frac \(0.9\) \+ random_frac \(0.2\) must be at most 1",
        ),
        (
            {"objective": "masked", "model": {**SMALL, "causal": False}, "tokenizer": {"kind": "byte"}},
            "needs a mask token: give the tokenizer",
        ),
    ],
)
def test_objectives_that_do_not_fit(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    import re

    assert train(tmp_path, recipe(world, tmp_path / "run", **changes)) == 2
    assert re.search(message, capsys.readouterr().err)


# --- classes and numbers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has read the corner for a moment."""
    out = tmp_path_factory.mktemp("base") / "run"
    changes = {"steps": 60, "eval": {"every": 60}, "optim": {"name": "muon", "lr": 5e-3, "warmup_steps": 5}}
    assert train(out.parent, recipe(world, out, **changes)) == 0
    return out


def reward(world: Path, out: Path, base: Path, objective: str, **changes: Any) -> dict[str, Any]:
    columns = {"label": "score" if objective == "regress" else "label"}
    data = {s: [{"path": str(DEMO / f"labelled_{s}.jsonl"), "columns": columns}] for s in ("train", "valid")}
    common = {
        "stage": "reward",
        "objective": objective,
        "init_from": str(base),
        "out": str(out),
        "data": {**data, "cache_dir": str(world / "cache")},
        "batch": {"tokens_per_step": 2048},
        "optim": {"lr": 3e-3, "warmup_steps": 5},
        "steps": 120,
        "eval": {"every": 60},
    }
    return {**common, **changes}


def test_a_classifier_learns_resumes_and_loads(world: Path, base: Path, tmp_path: Path) -> None:
    """Manners of held-out answers, chance 1 in 3; transformers gives the same scores to a padded batch (B54, B78)."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    one, two = tmp_path / "one", tmp_path / "two"
    assert train(tmp_path, reward(world, one, base, "classify")) == 0
    last = evaluations(one)[-1]
    assert last["valid/accuracy"] > 0.8 and last["valid/macro_f1"] > 0.8
    assert train(tmp_path, reward(world, two, base, "classify"), "stop_at=17") == 0
    assert train(tmp_path, reward(world, two, base, "classify")) == 0
    same_run(one, two)
    folder = resolve_model(one)
    with Quiet() as log:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not log.said
    assert model.config.id2label == {0: "plain", 1: "polite", 2: "rude"}
    rows = read_lines(DEMO / "labelled_valid.jsonl")
    ours = Tokenizer.load(folder)
    right = 0
    for row in rows[:40]:
        ids = [ours.bos_id, *ours.encode(row["text"])[:62], ours.eos_id]
        padded = torch.tensor([ids + [tokenizer.pad_token_id] * 7])
        with torch.no_grad():
            alone, with_padding = model(torch.tensor([ids])).logits, model(padded).logits
        torch.testing.assert_close(alone, with_padding, atol=1e-4, rtol=1e-4)
        right += model.config.id2label[int(alone.argmax())] == row["label"]
    assert right > 0.7 * 40


def test_a_regression_learns(world: Path, base: Path, tmp_path: Path) -> None:
    """The oracle's score of held-out answers: a good part of its variance; a bare number in transformers."""
    from transformers import AutoModelForSequenceClassification

    out = tmp_path / "run"
    assert train(tmp_path, reward(world, out, base, "regress")) == 0
    first, *_, last = evaluations(out)
    assert last["valid/r2"] > 0.3 > first["valid/r2"]
    assert last["valid/rmse"] == pytest.approx(math.sqrt(2 * last["valid/loss"]))
    model = AutoModelForSequenceClassification.from_pretrained(resolve_model(out))
    assert model.config.num_labels == 1 and model.config.problem_type == "regression"


def test_a_bidirectional_model_becomes_a_classifier(world: Path, tmp_path: Path) -> None:
    """From hidden tokens to manners; stopped in between, the same bits; transformers loads it and nothing is made up."""
    from transformers import AutoModelForSequenceClassification

    masked = {"objective": "masked", "model": {**SMALL, "causal": False}, "steps": 20, "eval": {"every": 20}}
    assert train(tmp_path, recipe(world, tmp_path / "masked", **masked)) == 0
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(tmp_path, reward(world, one, tmp_path / "masked", "classify")) == 0
    assert evaluations(one)[-1]["valid/accuracy"] > 0.7
    assert train(tmp_path, reward(world, two, tmp_path / "masked", "classify"), "stop_at=50") == 0
    assert train(tmp_path, reward(world, two, tmp_path / "masked", "classify")) == 0
    same_run(one, two)
    with Quiet() as log:
        model = AutoModelForSequenceClassification.from_pretrained(resolve_model(one))
    assert not log.said and type(model).__name__ == "EuroBertForSequenceClassification"
    assert main(["verify", str(resolve_model(one))]) == 0


def test_an_evaluation_of_a_classifier_by_hand(world: Path, base: Path, tmp_path: Path) -> None:
    """B5: loss and accuracy over the whole split equal those of single rows in transformers."""
    from transformers import AutoModelForSequenceClassification

    out = tmp_path / "run"
    assert train(tmp_path, reward(world, out, base, "classify", steps=2, eval={"every": 2})) == 0
    folder = resolve_model(out)
    model, ours = AutoModelForSequenceClassification.from_pretrained(folder), Tokenizer.load(folder)
    losses, right = [], 0
    for row in read_lines(DEMO / "labelled_valid.jsonl"):
        ids = [ours.bos_id, *ours.encode(row["text"])[:62], ours.eos_id]
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].double()
        label = model.config.label2id[row["label"]]
        losses.append(-scores.log_softmax(-1)[label].item())
        right += int(scores.argmax()) == label
    last = evaluations(out)[-1]
    assert last["valid/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert last["valid/accuracy"] == right / len(losses)


# --- foreign folders -------------------------------------------------------------------------------------------------


def foreign(kind: str, folder: Path, tokenizer: Tokenizer) -> Any:
    """A folder as transformers saves it, with random weights."""
    import transformers as hf

    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    torch.manual_seed(1)
    if kind == "gpt2":
        config = hf.GPT2Config(vocab_size=800, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ids)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        model = hf.GPT2LMHeadModel(config)
    else:
        name, more = {
            "llama": ("Llama", {}),
            "mistral": ("Mistral", {"sliding_window": 16}),
            "qwen2": ("Qwen2", {}),
            "qwen3": ("Qwen3", {}),
            "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
        }[kind]
        head = {} if kind == "qwen2" else {"head_dim": 8}
        config = getattr(hf, f"{name}Config")(
            vocab_size=800, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, **head, **more, **ids,
        )  # fmt: skip
        model = getattr(hf, f"{name}ForCausalLM")(config)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gpt2"])
def test_continued_pretraining_of_a_foreign_folder(world: Path, tmp_path: Path, kind: str) -> None:
    """transformers -> here (the same loss before the first step) -> stop -> resume -> transformers."""
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.load(world / "tokenizer")
    theirs = foreign(kind, tmp_path / "old", tokenizer)
    changes = {"init_from": str(tmp_path / "old"), "tokenizer": None, "model": None}
    changes["data"] = {**recipe(world, tmp_path)["data"], "packing": False}
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(tmp_path, recipe(world, one, **changes)) == 0
    first, last = evaluations(one)
    nats, n = 0.0, 0
    from llmkit.data.prepare import prepare
    from llmkit.stages import load_recipe

    (shards,) = prepare(load_recipe(tmp_path / "pretrain.yaml").data, tokenizer).valid
    for i in range(shards.n_docs):
        ids = torch.tensor(shards.document(i)[:65].astype(np.int64))[None]
        with torch.no_grad():
            logits = theirs(ids[:, :-1]).logits[0].double()
        nats -= logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()
        n += ids.shape[1] - 1
    assert first["valid/loss"] == pytest.approx(nats / n, rel=1e-4)
    assert last["valid/loss"] < first["valid/loss"]
    assert train(tmp_path, recipe(world, two, **changes), "stop_at=3") == 0
    assert train(tmp_path, recipe(world, two, **changes)) == 0
    same_run(one, two)
    with Quiet() as log:
        back = AutoModelForCausalLM.from_pretrained(resolve_model(one))
    assert not log.said and type(back) is type(theirs)
    new, old = back.state_dict(), theirs.state_dict()
    assert new.keys() == old.keys() and all(new[k].shape == old[k].shape for k in old)


def test_more_tokens_than_the_old_model_had(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """New rows begin at the mean of the old ones, and the report says so; another tokenizer is refused."""
    tokenizer = Tokenizer.load(world / "tokenizer")
    theirs = foreign("llama", tmp_path / "old", tokenizer)
    added = [f"<|tool_{i}|>" for i in range(60)]
    changes = {"init_from": str(tmp_path / "old"), "model": None, "steps": 1, "eval": {"every": None}}
    changes |= {"tokenizer": {"path": str(tmp_path / "old"), "add": added}, "optim": {"lr": 0.0, "weight_decay": 0.0}}
    assert train(tmp_path, recipe(world, tmp_path / "run", **changes), "save.every=1") == 0
    log = (tmp_path / "run" / "train.log").read_text("utf-8")
    assert "init_from" in log and "832" in log
    folder = resolve_model(tmp_path / "run")
    new = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    old = theirs.state_dict()["model.embed_tokens.weight"]
    assert new.shape == (832, 32) and torch.equal(new[: tokenizer.vocab_size], old[: tokenizer.vocab_size])
    mean = old[: tokenizer.vocab_size].mean(0)
    torch.testing.assert_close(new[tokenizer.vocab_size + 59], mean, atol=1e-6, rtol=1e-5)
    assert Tokenizer.load(folder).special["<|tool_59|>"] == tokenizer.vocab_size + 59
    capsys.readouterr()
    assert train(tmp_path, recipe(world, tmp_path / "other", **{**changes, "tokenizer": {"kind": "byte"}})) == 2
    assert "leave `tokenizer` out to keep its own" in capsys.readouterr().err


def test_what_may_change_with_old_weights(
    world: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A longer context may; the number of heads would silently give the old weights another meaning."""
    changes = {"init_from": str(base), "tokenizer": None, "steps": 1, "eval": {"every": None}, "save": {"every": 1}}
    longer = {"max_seq_len": 128, "rope_theta": 20000.0}
    assert train(tmp_path, recipe(world, tmp_path / "longer", **changes, model=longer)) == 0
    config = json.loads((resolve_model(tmp_path / "longer") / "config.json").read_text())
    assert config["max_position_embeddings"] == 128 and config["rope_theta"] == 20000.0
    assert config["num_attention_heads"] == 4
    assert train(tmp_path, recipe(world, tmp_path / "heads", **changes, model={"n_heads": 8})) == 2
    assert "model.n_heads (8): the model of init_from" in capsys.readouterr().err


# --- rows ------------------------------------------------------------------------------------------------------------


def test_padded_rows_have_the_loss_of_packed_ones(world: Path, tmp_path: Path) -> None:
    """Eight documents in one packed row, or one a row between padding: the same sum over the same labels."""
    short = [f"Mira has {n} goats." for n in range(8)]
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in short), "utf-8")
    losses = []
    for packing in (True, False):
        path = str(tmp_path / "short.jsonl")
        data = {"path": path, "valid": [{"path": path}], "packing": packing, "cache_dir": str(tmp_path / "cache")}
        changes = {"data": data, "precision": "fp64", "steps": 1, "eval": {"every": 1}}
        changes |= {"model": {**SMALL, "max_seq_len": 128}, "batch": {"tokens_per_step": 1024}}
        out = tmp_path / f"packing-{packing}"
        assert train(tmp_path, recipe(world, out, **changes)) == 0
        losses.append(evaluations(out)[0]["valid/loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_several_sources_are_mixed_named_and_reported(world: Path, tmp_path: Path) -> None:
    """`epochs` become shares; validation sets by name; what was consumed is in the log and in the model's card."""
    lines = (world / "corpus.jsonl").read_text("utf-8").splitlines(keepends=True)
    files = {}
    for lang in ("en", "zh"):
        files[lang] = tmp_path / f"{lang}.jsonl"
        files[lang].write_text("".join(x for x in lines[:300] if f'"lang": "{lang}"' in x), "utf-8")
    data = {
        "train": [
            {"name": n, "path": str(f), "epochs": e} for (n, f), e in zip(files.items(), (1.0, 3.0), strict=True)
        ],
        "valid": [{"name": n, "path": str(f)} for n, f in files.items()],
        "cache_dir": str(tmp_path / "cache"),
    }
    out = tmp_path / "run"
    samples = {"prompts": ["One morning", "从前"], "n": 2, "max_new_tokens": 4}
    assert train(tmp_path, recipe(world, out, data=data, steps=12, eval={"every": 12, "samples": samples})) == 0
    written = [r["prompt"] for r in read_lines(out / "samples.jsonl") if r["step"] == 12]
    assert written == ["One morning", "One morning", "从前", "从前"]
    last = evaluations(out)[-1]
    assert {"valid/loss", "valid/en/loss", "valid/zh/loss"} <= last.keys()
    steps = [r for r in read_lines(out / "metrics.jsonl") if "train/epoch/zh" in r]
    assert steps[-1]["train/epoch/zh"] == pytest.approx(3 * steps[-1]["train/epoch/en"], rel=0.05)
    assert "consumed   en: " in (out / "train.log").read_text("utf-8")
    card = (resolve_model(out) / "README.md").read_text("utf-8")
    assert "| consumed | en: " in card and "zh: " in card
