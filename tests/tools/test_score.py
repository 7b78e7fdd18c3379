"""`llmkit score`: every layout, the same score as one answer alone, and a wrong file is the user's mistake."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmkit.cli import main
from llmkit.data.turns import encode_turn
from llmkit.inference.scoring import score_sequences
from llmkit.model.config import GPTConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import init_weights
from llmkit.model.heads import SequenceClassifier, init_head
from llmkit.model.weights import load_classifier
from llmkit.tokenizer import Tokenizer, TokenizerConfig

Score = Callable[..., list[dict[str, Any]]]


def reward_model(folder: Path, n_scores: int = 1, **facts: Any) -> Path:
    """A folder as training leaves it, with weights wide enough that scores differ."""
    tokenizer = Tokenizer.train([], TokenizerConfig(kind="byte"))
    config = GPTConfig(n_layers=1, n_heads=2, d_model=16, d_ff=24, max_seq_len=128, vocab_size=320)
    model = SequenceClassifier(config, n_scores)
    init_weights(model, 0)
    init_head(model, 1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(4)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    told = {"stage": "reward", "objective": "rank", "step": 1, "reward_mean": 0.5, "reward_std": 2.0, **facts}
    files = model_files(config, torch.float32, tokenizer, told, head="classify", n_labels=n_scores)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_model(tmp_path_factory.mktemp("score") / "rm")


@pytest.fixture
def score(model: Path, tmp_path: Path) -> Score:
    """score(rows, *options) -> the rows of the result."""

    def run(rows: list[dict[str, Any]], *options: str, folder: Path = model) -> list[dict[str, Any]]:
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
        out = tmp_path / "out.jsonl"
        out.unlink(missing_ok=True)
        assert main(["score", str(folder), str(tmp_path / "in.jsonl"), "--out", str(out), *options]) == 0
        return [json.loads(line) for line in out.read_text("utf-8").splitlines()]

    return run


def alone(model: Path, prompt: Any, answer: str) -> float:
    """The score of one answer, by itself."""
    before, after = encode_turn(Tokenizer.load(model), prompt, answer)
    classifier = load_classifier(model)
    return classifier(torch.tensor([before + after]), torch.tensor([len(before + after)])).item()


def test_every_layout(model: Path, score: Score) -> None:
    """One answer, two, or several; each has the score that it has alone; the row's own columns stay."""
    user = {"role": "user", "content": "Who?"}
    good, bad = alone(model, "Who?", "Mira did."), alone(model, "Who?", "I don't know, really.")
    assert abs(good - bad) > 1e-3
    chat = [user, {"role": "assistant", "content": "Mira did."}]
    for row in (
        {"messages": chat}, {"prompt": "Who?", "completion": "Mira did."}, {"question": "Who?", "answer": "Mira did."},
        {"instruction": "Who?", "input": "", "output": "Mira did."}, {"prompt": [user], "completion": [chat[1]]},
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Mira did."}]},
    ):  # fmt: skip
        (told,) = score([{**row, "id": 7}])
        assert told == {**row, "id": 7, "reward": pytest.approx(good, abs=1e-5)}
    (pair,) = score([{"prompt": "Who?", "chosen": "Mira did.", "rejected": "I don't know, really."}])
    assert pair["reward_chosen"] == pytest.approx(good, abs=1e-5)
    assert pair["reward_rejected"] == pytest.approx(bad, abs=1e-5)
    several = {"prompt": "Who?", "responses": ["I don't know, really.", "Mira did.", "Mira did."]}
    for more in ({}, {"ranking": [1, 2, 0]}, {"scores": [1, 1, 1]}, {"scores": [0, 2, 1]}):
        (told,) = score([{**several, **more}])
        assert told["rewards"] == pytest.approx([bad, good, good], abs=1e-5) and told.items() >= more.items()


def test_columns_of_other_names(model: Path, score: Score) -> None:
    (told,) = score([{"q": "Who?", "r": ["Mira did."]}], "--column", "prompt=q", "--column", "responses=r")
    assert told["rewards"] == pytest.approx([alone(model, "Who?", "Mira did.")], abs=1e-5)


def test_many_rows_of_many_lengths(model: Path, score: Score) -> None:
    """Batches sorted by length put every score back to its row, whatever the size of a batch."""
    rows = [{"prompt": f"p{i}", "completion": "x" * (i * 37 % 60 + 1)} for i in range(40)]
    expected = [alone(model, r["prompt"], r["completion"]) for r in rows]
    for tokens in ("64", "1000", "100000"):
        told = score(rows, "--batch-tokens", tokens)
        assert [r["reward"] for r in told] == pytest.approx(expected, abs=1e-5)
        assert [r["prompt"] for r in told] == [r["prompt"] for r in rows]


def test_shares_of_ranks_add_up(model: Path) -> None:
    classifier = load_classifier(model, torch.float64)
    rows = [[5 + i % 50] * (1 + i * 7 % 30) for i in range(25)]
    whole = score_sequences(classifier, rows, batch_tokens=60)
    asked: list[int] = []
    shares = [
        score_sequences(classifier, rows, batch_tokens=60, share=(r, 3), should_stop=lambda: bool(asked.append(1)))
        for r in range(3)
    ]
    assert whole is not None and len(asked) % 3 == 0
    total = sum(s for s in shares if s is not None)
    assert torch.equal(total, whole)
    assert score_sequences(classifier, rows, should_stop=lambda: True) is None


def test_the_summary(model: Path, score: Score, capsys: pytest.CaptureFixture[str]) -> None:
    """Mean, spread, the scale of the folder, and the accuracy where the file tells what is better."""
    rows = [
        {"prompt": "Who?", "chosen": "Mira did.", "rejected": "No."},
        {"prompt": "a", "chosen": "x", "rejected": "y"},
    ]
    told = score(rows)
    out = capsys.readouterr().out
    scores = [r[f"reward_{side}"] for r in told for side in ("chosen", "rejected")]
    mean = sum(scores) / 4
    right = sum(r["reward_chosen"] > r["reward_rejected"] for r in told) / 2
    assert f"scored     4 answers or steps in 2 rows\nrewards    mean {mean:+.4f}" in out
    assert f"{(mean - 0.5) / 2:+.3f} standard deviations from the reference answers' mean +0.5000" in out
    assert f"accuracy   {right:.4f}" in out


def test_rows_to_stdout_and_notes_to_stderr(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "p", "completion": "一二"}\n' * 3, "utf-8")
    assert main(["score", str(model), str(tmp_path / "in.jsonl"), "--limit", "2"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["completion"] for line in out.splitlines()] == ["一二", "一二"] and "一二" in out
    assert "layout prompt/completion" in err and "scored     2 answers" in err


def test_answers_that_are_too_long_have_no_score(model: Path, score: Score, capsys: pytest.CaptureFixture[str]) -> None:
    """The prompt loses its beginning where that helps; what can't fit is null and counted, and the others stand."""
    rows = [{"prompt": "p" * 300, "responses": ["short", "l" * 200]}, {"prompt": "p", "responses": ["short"]}]
    told = score(rows)
    assert told[0]["rewards"][1] is None and isinstance(told[0]["rewards"][0], float)
    assert told[1]["rewards"] == pytest.approx([alone(model, "p", "short")], abs=1e-5)
    assert "1 are longer than the model's context and have none" in capsys.readouterr().out


def test_steps(tmp_path: Path, score: Score) -> None:
    """A process model's score of each step, with labels or without, is that of the row that ends there."""
    folder = reward_model(tmp_path / "prm", objective="process", step_separator="\n\n")
    steps = {"prompt": "Sum?", "steps": ["one", "and two", "x" * 200]}
    (told,) = score([steps], folder=folder)
    assert score([{**steps, "labels": [1, None, 0]}], folder=folder)[0]["rewards"] == told["rewards"]
    tokenizer, classifier = Tokenizer.load(folder), load_classifier(folder)
    ids = tokenizer.encode_chat([{"role": "user", "content": "Sum?"}], add_generation_prompt=True).ids
    for step, found in zip(steps["steps"][:2], told["rewards"], strict=False):
        ids = [*ids, *tokenizer.encode(step), *tokenizer.encode("\n\n")]
        assert classifier(torch.tensor([ids]), torch.tensor([len(ids)])).item() == pytest.approx(found, abs=1e-5)
    assert told["rewards"][2] is None


@pytest.mark.parametrize("plain", [True, False])
def test_what_the_model_was_trained_on_decides_the_template(tmp_path: Path, score: Score, plain: bool) -> None:
    """Plain prompts for a model of plain prompts; a default system message, where training had one."""
    facts: dict[str, Any] = {"chat": False} if plain else {"system": "Be brief."}
    folder = reward_model(tmp_path / "rm", **facts)
    (told,) = score([{"prompt": "Who?", "completion": "Mira"}], folder=folder)
    tokenizer = Tokenizer.load(folder)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    turn = encode_turn(tokenizer, "Who?" if plain else messages, "Mira", chat=not plain)
    ids = [*itertools.chain(*turn)]
    expected = load_classifier(folder)(torch.tensor([ids]), torch.tensor([len(ids)])).item()
    assert told["reward"] == pytest.approx(expected, abs=1e-5)
    assert (ids[-1] == tokenizer.eos_id) if plain else (ids[-1] == tokenizer.end_of_turn_id)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}\n', "in.jsonl:1: the row has the fields text"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": 3, "completion": "b"}\n', "in.jsonl:2: prompt: "),
        ('{"prompt": "a", "responses": "b"}\n', "in.jsonl:1: responses: a list of at least one text"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "in.jsonl:1: no turn of the assistant"),
        ("{oops\n", "in.jsonl:1: not JSON"),
        ("", "in.jsonl: "),
    ],
)
def test_wrong_files_are_exit_2(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "in.jsonl").write_text(text, "utf-8")
    out = tmp_path / "out.jsonl"
    assert main(["score", str(model), str(tmp_path / "in.jsonl"), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.splitlines()[-1].startswith("error: ") and not out.exists()


def test_other_models_are_exit_2(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    classes = reward_model(tmp_path / "classes", 3, objective="classify")
    for folder, message in ((classes, "it knows no prompts and answers"), (tmp_path / "none", "no such folder")):
        assert main(["score", str(folder), str(tmp_path / "in.jsonl")]) == 2
        assert message in capsys.readouterr().err
    assert main(["score", str(model), str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "in.jsonl")]) == 2
    assert "is there already" in capsys.readouterr().err
