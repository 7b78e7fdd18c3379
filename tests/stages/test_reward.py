"""Reward models through the command line: what they learn, that they resume bitwise, and that transformers agrees."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ports import free_port
from safetensors.torch import load_file
from test_objectives import Quiet, evaluations, same_run

from llmkit.cli import main
from llmkit.data.preferences import PreferenceRows, prepare_preferences
from llmkit.data.turns import encode_turn
from llmkit.inference.scoring import score_sequences
from llmkit.model.config import GPTConfig
from llmkit.model.reward_facts import read_reward_facts
from llmkit.model.weights import load_classifier
from llmkit.stages import load_recipe
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer
from llmkit.training.judging import Ranking
from llmkit.training.log import read_lines

GOOD, BAD = ("mill", "river", "boat", "apple"), ("mud", "rust", "smoke", "thorn")
FILLER = ("the", "a", "red", "old", "by", "on", "two", "with")
MODEL = {"n_layers": 1, "n_heads": 2, "d_model": 32, "d_ff": 48, "max_seq_len": 96}


def sentence(dice: random.Random, n_good: int, n_bad: int) -> str:
    words = dice.choices(GOOD, k=n_good) + dice.choices(BAD, k=n_bad) + dice.choices(FILLER, k=dice.randrange(1, 5))
    dice.shuffle(words)
    return " ".join(words)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs and rankings that good and bad words decide, and steps that are right unless they hold a bad word."""
    folder, dice = tmp_path_factory.mktemp("world"), random.Random(0)
    pairs = [
        {"prompt": f"Tell {i}.", "chosen": sentence(dice, 2, 0), "rejected": sentence(dice, 0, 2)} for i in range(260)
    ]
    write(folder / "pairs.jsonl", pairs)
    ranked = []
    for i in range(60):
        answers = [sentence(dice, good, 3 - good) for good in range(4)]
        order = dice.sample(range(4), 4)
        told = sorted(range(4), key=lambda at: -order[at])
        ranked.append({"prompt": f"Say {i}.", "responses": [answers[good] for good in order], "ranking": told})
    write(folder / "ranked.jsonl", ranked)
    steps = []
    for i in range(260):
        labels = [dice.random() < 0.7 for _ in range(dice.randrange(1, 4))]
        texts = [sentence(dice, int(ok), int(not ok)) for ok in labels]
        steps.append({"prompt": f"Solve {i}.", "completions": texts, "labels": labels})
    write(folder / "steps.jsonl", steps)
    return folder


def recipe(world: Path, out: Path, objective: str = "rank", **changes: Any) -> Path:
    """Writes a recipe beside `out`; a mapping is merged into the recipe's own."""
    files = ["steps.jsonl"] if objective == "process" else ["pairs.jsonl", "ranked.jsonl"]
    told: dict[str, Any] = {
        "stage": "reward",
        "objective": objective,
        "out": str(out),
        "tokenizer": {"kind": "byte"},
        "data": {
            "train": [{"path": str(world / f), "name": f.partition(".")[0]} for f in files],
            "valid_frac": 0.2,
            "cache_dir": str(world / "cache"),
        },
        "model": MODEL,
        "batch": {"examples_per_step": 16, "micro_tokens": 4096},
        "optim": {"lr": 1e-2, "warmup_steps": 5, "weight_decay": 0.0},
        "steps": 60,
        "eval": {"every": 30},
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


def answers_of(world: Path, tokenizer: Tokenizer, name: str = "pairs.jsonl") -> list[list[int]]:
    rows = read_lines(world / name)
    texts = [(r["prompt"], r[side]) for r in rows for side in ("chosen", "rejected")]
    return [[*itertools.chain(*encode_turn(tokenizer, prompt, text))] for prompt, text in texts]


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert train(recipe(world, out, log={"tensorboard": False, "plot": True, "every": 100})) == 0
    return out


# --- ranking ---------------------------------------------------------------------------------------------------------


def test_separable_pairs_are_learnt(world: Path, trained: Path) -> None:
    """Held-out accuracy above 0.98, and the words alone decide: swapped answers get swapped scores."""
    first, *_, last = evaluations(trained)
    assert last["valid/pairs/accuracy"] > 0.98 and last["valid/ranked/accuracy"] > 0.9
    assert last["valid/loss"] < 0.5 * first["valid/loss"] and abs(first["valid/accuracy"] - 0.5) < 0.25
    assert last["valid/margin"] == pytest.approx(last["valid/chosen"] - last["valid/rejected"], abs=1e-5)
    assert abs(last["valid/chosen"] + last["valid/rejected"]) < 2  # centred


def test_the_report_card(trained: Path) -> None:
    """In the run's folder, as JSON and as a picture, and its accuracy is that of the evaluation where both are pairs."""
    card = json.loads((trained / "reward_card.json").read_text("utf-8"))
    assert (trained / "reward_card.png").stat().st_size > 10_000
    log = (trained / "train.log").read_text("utf-8")
    assert f"accuracy   {card['accuracy']:.3f} +- " in log and "calibration error" in log
    assert card["n_pairs"] == sum(g["n"] for g in card["accuracy_by_length_gap"]) == sum(card["margins"]["counts"])
    assert card["accuracy"] > 0.95 and card["calibration_error"] < 0.1


def test_transformers_gives_the_same_scores(world: Path, trained: Path) -> None:
    """An empty log, and equal scores alone, with padding on the right, and on the left (B54, B55, B78)."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = resolve_model(trained)
    with Quiet() as log:
        theirs = AutoModelForSequenceClassification.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not log.said and theirs.config.num_labels == 1 and theirs.score.weight.shape == (1, 32)
    ours = load_classifier(folder, n_scores=1)
    rows = answers_of(world, Tokenizer.load(folder))[:24]
    mine = score_sequences(ours, rows)
    assert mine is not None
    chat = [{"role": "user", "content": "Tell 0."}, {"role": "assistant", "content": "mill river"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n")
    same = [*itertools.chain(*encode_turn(Tokenizer.load(folder), "Tell 0.", "mill river"))]
    assert tokenizer(text, add_special_tokens=False).input_ids == same
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    for ids, score in zip(rows, mine[:, 0].tolist(), strict=True):
        n = width - len(ids)
        left, mask = torch.tensor([[pad] * n + ids]), torch.tensor([[0] * n + [1] * len(ids)])
        with torch.no_grad():
            assert theirs(torch.tensor([ids])).logits.item() == pytest.approx(score, abs=1e-4)
            assert theirs(torch.tensor([ids + [pad] * n])).logits.item() == pytest.approx(score, abs=1e-4)
            assert theirs(left, attention_mask=mask).logits.item() == pytest.approx(score, abs=1e-4)


def test_the_score_is_read_at_the_last_token_by_length(trained: Path) -> None:
    """B78: a prompt full of ends of turns and of padding ids changes nothing about where the score is read."""
    folder = resolve_model(trained)
    model, tokenizer = load_classifier(folder, torch.float64), Tokenizer.load(folder)
    body = tokenizer.encode("mill river")
    odd = [
        tokenizer.end_of_turn_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
        *body,
        tokenizer.pad_id,
        tokenizer.end_of_turn_id,
    ]
    rows = [odd, [*odd, *body], body]
    together, alone = score_sequences(model, rows), [score_sequences(model, [row]) for row in rows]
    everywhere = model.at_tokens(torch.tensor([odd]))
    assert together is not None
    for i, one in enumerate(alone):
        assert one is not None
        torch.testing.assert_close(together[i], one[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(everywhere[0, -1], together[0], atol=1e-12, rtol=0)


def test_padding_changes_nothing(trained: Path) -> None:
    """B76: 1 to 64 columns more, fp64."""
    model = load_classifier(resolve_model(trained), torch.float64)
    ids = torch.tensor([[5, 17, 99, 40], [70, 3, 0, 0]])
    lengths = torch.tensor([4, 2])
    plain = model(ids, lengths)
    for n in (1, 7, 64):
        padded = torch.cat([ids, torch.full((2, n), 9)], 1)
        torch.testing.assert_close(model(padded, lengths), plain, atol=1e-12, rtol=0)


def test_what_a_checkpoint_tells_of_its_rewards(world: Path, trained: Path) -> None:
    """Mean and std of the best answers of the training data, and the held-out accuracy, by hand."""
    folder = resolve_model(trained)
    facts = read_reward_facts(folder)
    assert facts is not None
    cfg = load_recipe(trained.with_suffix(".yaml"))
    tokenizer = Tokenizer.load(folder)
    data = prepare_preferences(cfg.data, tokenizer, row_len=96)
    best = [s.ids(i) for s in data.train for i in range(s.n_sequences) if i not in set(s.pairs[:, 2].tolist())]
    assert facts.reward_n == len(best) == sum(len(s) for s in data.train)
    model = load_classifier(folder)
    scores = np.array(
        [model(torch.tensor(ids[None].astype(np.int64)), torch.tensor([len(ids)])).item() for ids in best]
    )
    assert facts.reward_mean == pytest.approx(scores.mean(), abs=1e-4)
    assert facts.reward_std == pytest.approx(scores.std(), rel=1e-3)
    assert facts.normalised(facts.reward_mean + facts.reward_std) == pytest.approx(1)
    assert facts.reward_n_pairs == sum(len(s.pairs) for s in data.valid)
    card = json.loads((trained / "reward_card.json").read_text("utf-8"))
    assert facts.reward_accuracy == pytest.approx(card["accuracy"])


def test_references_of_ones_own(world: Path, tmp_path: Path) -> None:
    """`reference` names dialogues; their last answers set the scale."""
    rows = [{"messages": [{"role": "user", "content": f"Tell {i}."}, {"role": "assistant", "content": "mud rust"}]}
            for i in range(5)]  # fmt: skip
    write(tmp_path / "sft.jsonl", rows)
    out = tmp_path / "run"
    changes = {"reference": {"path": str(tmp_path / "sft.jsonl")}, "reference_limit": 3, "steps": 20}
    assert train(recipe(world, out, **changes)) == 0
    facts = read_reward_facts(resolve_model(out))
    assert facts is not None and facts.reward_n == 3 and facts.reward_mean < 0


def test_stopped_twice_and_killed_it_ends_with_the_same_bits(world: Path, tmp_path: Path) -> None:
    """R1, R2: also the facts in config.json, where stops fall on steps that measure them and on steps that don't."""
    one, two = tmp_path / "one", tmp_path / "two"
    changes = {"steps": 24, "eval": {"every": 8}, "save": {"every": 6, "asynchronous": True}, "margin": 0.1}
    assert train(recipe(world, one, **changes)) == 0
    again = recipe(world, two, **changes)
    assert train(again, "stop_at=8") == 0 and train(again, "stop_at=11") == 0
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(again)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    assert child.wait() == -9
    assert train(again) == 0
    same_run(one, two)
    a, b = ((resolve_model(run) / "config.json").read_bytes() for run in (one, two))
    assert a == b and b"reward_mean" in a
    assert (one / "reward_card.json").read_bytes() == (two / "reward_card.json").read_bytes()


# Dies without a word in the middle of update 17, which a checkpoint at 12 precedes.
KILLED = """
import os, signal, sys
from llmkit.training.engine import Engine
from llmkit.cli import main
apply = Engine._apply
def dies(self, *args):
    if self.step == 16: os.kill(os.getpid(), signal.SIGKILL)
    apply(self, *args)
Engine._apply = dies
main(["train", sys.argv[1]])
"""


def test_micro_batches_and_ranks_change_nothing(world: Path, tmp_path: Path) -> None:
    """B1, B3, B4: the same weights from one micro-batch, from many, and on two ranks; fp64, 1e-10."""
    changes = {"steps": 5, "precision": "fp64", "eval": {"every": None}, "save": {"every": 5}, "margin": 0.2}
    whole, pieces, ranks = (tmp_path / name for name in ("whole", "pieces", "ranks"))
    assert train(recipe(world, whole, **changes, batch={"micro_tokens": 1 << 20})) == 0
    assert train(recipe(world, pieces, **changes, batch={"micro_tokens": 128})) == 0
    file = recipe(world, ranks, **changes, batch={"micro_tokens": 512})
    port = str(free_port())
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import sys; from llmkit.cli import main; sys.exit(main(['train', sys.argv[1]]))"]
    children = [
        subprocess.Popen([*command, str(file)], env={**shared, "RANK": r, "LOCAL_RANK": r}, stdout=subprocess.DEVNULL)
        for r in "01"
    ]
    assert [c.wait(120) for c in children] == [0, 0]
    expected = load_file(resolve_model(whole) / "model.safetensors")
    facts = read_reward_facts(resolve_model(whole))
    for other in (pieces, ranks):
        weights = load_file(resolve_model(other) / "model.safetensors")
        for name, t in expected.items():
            torch.testing.assert_close(weights[name], t, atol=1e-10, rtol=1e-10)
        told = read_reward_facts(resolve_model(other))
        assert facts is not None and told is not None
        assert told.reward_mean == pytest.approx(facts.reward_mean, abs=1e-6) and told.reward_n == facts.reward_n
        assert told.reward_accuracy == facts.reward_accuracy
    a, b = (read_lines(run / "metrics.jsonl") for run in (whole, ranks))
    assert [r["train/data_hash"] for r in a if "train/data_hash" in r] == [
        r["train/data_hash"] for r in b if "train/data_hash" in r
    ]


def test_all_pairs_of_a_prompt_are_in_one_step_and_weigh_one(world: Path, tmp_path: Path) -> None:
    """Each answer is run once, however many pairs it is in; a prompt with 6 pairs counts as one with 1."""
    out = tmp_path / "run"
    cfg = load_recipe(recipe(world, out))
    tokenizer = Tokenizer.from_config(cfg.text_tokenizer)
    judging = Ranking(
        cfg, tokenizer, GPTConfig(**MODEL, vocab_size=tokenizer.vocab_size), 96, lambda: False, lambda line: None
    )
    rows = judging.rows(judging.split("train"), 96, tokenizer.pad_id)
    assert isinstance(rows, PreferenceRows)
    batch, _ = rows.batch(np.arange(2), np.array([0, 1]), np.array([0, 0]))
    assert batch.ids_BT.shape[0] == 2 + 4 and len(batch.better_P) == 1 + 6 and batch.denominator == 2
    assert batch.weights_P.tolist() == pytest.approx([1] + [1 / 6] * 6)


def test_margins_of_the_data(world: Path, tmp_path: Path) -> None:
    """`margin: data` asks for the difference of scores: the run with it ends further apart."""
    rows = [
        {"prompt": f"Say {i}.", "responses": ["mud", "mill", "smoke river"], "scores": [0, 9, 5]} for i in range(60)
    ]
    write(tmp_path / "scores.jsonl", rows)
    spread = {}
    for margin in (0.0, "data"):
        out = tmp_path / f"run-{margin}"
        data = {"train": [{"path": str(tmp_path / "scores.jsonl")}]}
        assert train(recipe(world, out, margin=margin, data=data, steps=40, eval={"every": 40})) == 0
        spread[margin] = evaluations(out)[-1]["valid/margin"]
    assert spread["data"] > spread[0.0] + 0.5


def test_adapters_and_a_head(world: Path, tmp_path: Path) -> None:
    """LoRA: the head is trained as a whole; folder, facts and scores are a reward model's; resumed bitwise."""
    (tmp_path / "text.txt").write_text(" ".join((*GOOD, *BAD, *FILLER)) * 200, "utf-8")
    base = {
        "stage": "pretrain",
        "out": str(tmp_path / "base"),
        "tokenizer": {"kind": "byte"},
        "data": {"path": str(tmp_path / "text.txt"), "cache_dir": str(world / "cache")},
        "model": MODEL,
        "batch": {"tokens_per_step": 960},
        "steps": 10,
        "eval": {"every": None},
        "log": {"tensorboard": False, "plot": False},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    assert train(tmp_path / "base.yaml") == 0
    one, two = tmp_path / "one", tmp_path / "two"
    changes = {
        "model": None,
        "tokenizer": None,
        "init_from": str(tmp_path / "base"),
        "lora": {"r": 8},
        "steps": 40,
        "eval": {"every": 40},
    }
    assert train(recipe(world, one, **changes)) == 0
    assert evaluations(one)[-1]["valid/pairs/accuracy"] > 0.95
    again = recipe(world, two, **changes)
    assert train(again, "stop_at=7") == 0 and train(again) == 0
    a, b = (resolve_model(run) for run in (one, two))
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in (a, b))
    assert left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
    assert not (a / "model.safetensors").exists() and any(n.endswith("score.weight") for n in left)
    facts = read_reward_facts(a)
    assert facts is not None and facts == read_reward_facts(b) and (facts.reward_accuracy or 0) > 0.9
    out = tmp_path / "scored.jsonl"
    assert main(["score", str(one), str(world / "pairs.jsonl"), "--out", str(out)]) == 0
    told = read_lines(out)
    assert sum(r["reward_chosen"] > r["reward_rejected"] for r in told) > 0.95 * len(told)


# --- processes -------------------------------------------------------------------------------------------------------


def test_steps_are_judged_where_they_end(world: Path, tmp_path: Path) -> None:
    """Learnt on held-out answers; resumed bitwise; transformers' score of a prefix is the score of its last step."""
    from transformers import AutoModelForSequenceClassification

    one, two = tmp_path / "one", tmp_path / "two"
    assert train(recipe(world, one, "process", steps=70, eval={"every": 70})) == 0
    last = evaluations(one)[-1]
    assert last["valid/accuracy"] > 0.93 and last["valid/first_error_accuracy"] > 0.88
    assert last["valid/first_error_f1"] > 0.88
    again = recipe(world, two, "process", steps=70, eval={"every": 70})
    assert train(again, "stop_at=33") == 0 and train(again) == 0
    same_run(one, two)
    folder = resolve_model(one)
    out = tmp_path / "scored.jsonl"
    assert main(["score", str(one), str(world / "steps.jsonl"), "--limit", "12", "--out", str(out)]) == 0
    with Quiet() as log:
        theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    assert not log.said
    tokenizer, right = Tokenizer.load(folder), []
    for row in read_lines(out):
        ids = tokenizer.encode_chat([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True).ids
        assert len(row["rewards"]) == len(row["completions"])
        ends = []
        for step, label, score in zip(row["completions"], row["labels"], row["rewards"], strict=True):
            ids = [*ids, *tokenizer.encode(step), *tokenizer.encode("\n")]
            ends.append(len(ids) - 1)
            with torch.no_grad():
                assert theirs(torch.tensor([ids])).logits.item() == pytest.approx(score, abs=1e-4)
            right.append((score > 0) == label)
        with torch.no_grad():  # all at once, as docs/reward.md has it
            hidden = theirs.model(torch.tensor([ids])).last_hidden_state
            assert theirs.score(hidden)[0, ends, 0].tolist() == pytest.approx(row["rewards"], abs=1e-4)
    assert sum(right) > 0.9 * len(right)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        ("process", {"margin": 0.5}, "margin belongs to objective: rank"),
        ("rank", {"classes": ["a", "b"]}, "classes belongs to objective: classify"),
        ("rank", {"model": {"dropout": 0.1}}, "a reward would differ from one reading to the next"),
        ("process", {"model": {"causal": False}}, "model.causal must be true"),
        ("rank", {"label_smoothing": 0.5}, "label_smoothing"),
        ("rank", {"data": {"clean": "default"}}, "data.clean and data.dedup are for plain text"),
        ("rank", {"data": {"train": [{"path": "WORLD/steps.jsonl"}]}}, "no layout of a preference has these"),
        ("process", {"data": {"train": [{"path": "WORLD/pairs.jsonl"}]}}, "no layout of a steps has these"),
        ("rank", {"batch": {"max_len": 16}}, "data.max_dropped_frac"),
    ],
)
def test_wrong_use_is_one_sentence(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    objective: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    text = json.dumps(changes).replace("WORLD", str(world))
    assert train(recipe(world, tmp_path / "run", objective, **json.loads(text))) == 2
    assert message in capsys.readouterr().err
