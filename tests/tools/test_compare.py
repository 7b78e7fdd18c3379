"""`llmkit compare`: the same numbers as training's, the same questions for all, one table, and mistakes in one sentence."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from llmkit.cli import main
from llmkit.data.chats import ChatRows, prepare_chats
from llmkit.data.config import DataConfig, SourceConfig
from llmkit.losses import IGNORE
from llmkit.model.adapters import WEIGHTS, adapter_files, adapter_tensors, base_named
from llmkit.model.config import GPTConfig, LoraConfig, count_params
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT, document_mask, init_weights
from llmkit.model.lora import apply_lora
from llmkit.model.weights import load_model
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.tools.compare import names_of
from llmkit.tools.comparison import table
from llmkit.tools.measures import wilson

TEXT = "The mill stands by the river. 从前山谷里有一座磨坊。 Mira lives in the valley.\n"
Compare = Callable[..., dict[str, Any]]


def write_model(folder: Path, tokenizer: Tokenizer, stage: str = "sft", max_seq_len: int = 64) -> Path:
    """A model that has learnt nothing, but has opinions."""
    folder.mkdir()
    vocab_size = -(-tokenizer.vocab_size // 64) * 64
    config = GPTConfig(n_layers=1, n_heads=2, d_model=16, d_ff=24, max_seq_len=max_seq_len, vocab_size=vocab_size)
    model = GPT(config)
    init_weights(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors")
    for name, content in model_files(config, torch.float32, tokenizer, {"stage": stage, "step": 1}).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with another tokenizer and a shorter context than `answering`."""
    tokenizer = Tokenizer.train([TEXT] * 40, TokenizerConfig(vocab_size=300))
    return write_model(tmp_path_factory.mktemp("compare") / "other", tokenizer)


@pytest.fixture
def compare(tmp_path: Path) -> Compare:
    """compare(models, *options) -> what compare.json holds; without timing, unless it is asked for."""

    def run(models: list[Path], *options: str) -> dict[str, Any]:
        if "--repeats" not in options:
            options = (*options, "--repeats", "0")
        assert main(["compare", *map(str, models), "--out", str(tmp_path / "out"), *options]) == 0
        told: dict[str, Any] = json.loads((tmp_path / "out" / "compare.json").read_text("utf-8"))
        return told

    return run


def rows_of(table_text: str) -> dict[str, list[str]]:
    """The rows of a Markdown table by their first cell."""
    lines = [line for line in table_text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in cells}) == 1
    return {row[0]: row[1:] for row in cells}


# --- everything at once ----------------------------------------------------------------------------------------------


def test_one_table_one_picture(
    answering: Path, other: Path, questions: Path, tmp_path: Path, compare: Compare, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table is printed and kept; json holds its numbers; the answers and a picture lie beside it."""
    (tmp_path / "t.txt").write_text(TEXT * 3, "utf-8")
    told = compare(
        [answering, other], "--names", "teacher,学生", "--questions", str(questions), "--text", str(tmp_path / "t.txt"),
        "--max-new-tokens", "8", "--prompt-tokens", "12", "--new-tokens", "4", "--repeats", "2",
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert out == (tmp_path / "out" / "compare.md").read_text("utf-8")
    rows, (teacher, student) = rows_of(out), told["models"]
    assert rows[""] == ["teacher", "学生"] and [m["name"] for m in told["models"]] == ["teacher", "学生"]
    for folder, m in ((answering, teacher), (other, student)):
        config = load_model(folder).config
        assert m["parameters"] == count_params(config).total == sum(p.numel() for p in load_model(folder).parameters())
        assert m["bytes"] == (folder / "model.safetensors").stat().st_size and m["context"] == config.max_seq_len
        assert len(m["speed"]["prompt"]) == len(m["speed"]["generation"]) == 2 and min(m["speed"]["prompt"]) > 0
        assert m["perplexity"] == pytest.approx(math.exp(m["loss"]))
        name = m["name"]
        assert len((tmp_path / "out" / f"answers-{name}.jsonl").read_text("utf-8").splitlines()) == 12
    assert (
        rows["parameters"][1]
        == f"{student['parameters']:,} ({100 * student['parameters'] / teacher['parameters']:.1f} %)"
    )
    assert rows["loss, nats per token"] == [f"{m['loss']:.4f}" for m in told["models"]]
    assert rows["bits per byte"] == [f"{m['bits_per_byte']:.4f}" for m in told["models"]]
    assert not told["same_tokenizer"] and "compare bits per byte, not loss and perplexity" in out
    assert set(rows) >= {"exact, %", "exact: a, % (n = 6)", "exact: b, % (n = 6)", "generation, tokens/s"}
    picture = (tmp_path / "out" / "compare.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 20_000
    assert "compare.png" in err and sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "answers-teacher.jsonl", "answers-学生.jsonl", "compare.json", "compare.md", "compare.png",
    ]  # fmt: skip


def test_a_model_beside_itself(answering: Path, questions: Path, tmp_path: Path, compare: Compare) -> None:
    """Every number but the speeds is the same, to the bit, and all of it is kept."""
    (tmp_path / "t.txt").write_text(TEXT, "utf-8")
    told = compare([answering, answering], "--questions", str(questions), "--text", str(tmp_path / "t.txt"))
    first, second = told["models"]
    assert second.pop("name") == f"{first.pop('name')}-2" and first == second and told["same_tokenizer"]
    rows = rows_of((tmp_path / "out" / "compare.md").read_text("utf-8"))
    right = first["scores"]["exact"]["mean"]
    assert rows[f"exact, kept of {answering.name}"] == (["100.0 %"] * 2 if right else ["-", "-"])


def test_sizes_alone(answering: Path, compare: Compare, capsys: pytest.CaptureFixture[str]) -> None:
    (told,) = compare([answering])["models"]
    assert set(rows_of(capsys.readouterr().out)) - {"", "---"} >= {"parameters", "size on disk, MB", "precision"}
    assert "loss" not in told and "scores" not in told and "speed" not in told
    assert (
        told["precision"] == "float32"
        and compare([answering], "--precision", "bf16")["models"][0]["precision"] == "bfloat16"
    )


def test_adapters_count_with_their_base(answering: Path, tmp_path: Path, compare: Compare) -> None:
    model, folder = load_model(answering), tmp_path / "adapter"
    folder.mkdir()
    apply_lora(model, LoraConfig(r=2), 0, base_named(str(answering)))
    save_file({n: t.detach().contiguous() for n, t in adapter_tensors(model).items()}, folder / WEIGHTS)
    files = model_files(model.config, torch.float32, Tokenizer.load(answering), {"stage": "sft", "step": 1})
    for name, content in adapter_files(files, model).items():
        (folder / name).write_bytes(content)
    base, adapters = compare([answering, folder])["models"]
    assert adapters["parameters"] == base["parameters"]
    assert adapters["bytes"] == base["bytes"] + (folder / WEIGHTS).stat().st_size


# --- held-out text ---------------------------------------------------------------------------------------------------


def test_the_loss_on_conversations_is_that_of_training(answering: Path, tmp_path: Path, compare: Compare) -> None:
    """As `sft` encodes and packs them; over the tokenizer's tokens alone (B91)."""
    file = tmp_path / "chats.jsonl"
    turns = [
        {"role": r, "content": c}
        for r, c in [("user", "q1"), ("assistant", "yes"), ("user", "q2"), ("assistant", "好")]
    ]
    chats = [
        {"messages": turns},
        {"messages": turns[2:]},
        {"messages": [{"role": "system", "content": "Be brief."}, *turns[:2]]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in chats), "utf-8")
    (told,) = compare([answering], "--chats", str(file))["models"]
    tokenizer, model = Tokenizer.load(answering), load_model(answering)
    source = (SourceConfig(path=str(file)),)
    data = DataConfig(train=source, valid=source, cache_dir=str(tmp_path / "cache"))
    maker = ChatRows(prepare_chats(data, tokenizer, row_len=96).valid, row_len=96, pad_id=tokenizer.pad_id)
    rows, _ = maker.rows(np.zeros(maker.n_rows[0], np.int64), np.arange(maker.n_rows[0]))
    ids, labels, positions, docs = map(torch.from_numpy, (rows.ids_BT, rows.labels_BT, rows.positions_BT, rows.docs_BT))
    logits = model.logits(model(ids, positions, document_mask(docs, True)))[..., : tokenizer.vocab_size]
    nats = cross_entropy(logits.double().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    n = int((labels != IGNORE).sum())
    assert told["held_out_tokens"] == n and told["loss"] == pytest.approx(nats.item() / n, rel=1e-5)
    assert told["held_out_bytes"] == len("yes好好yes".encode()), "the bytes of what the assistant said"
    assert told["bits_per_byte"] == pytest.approx(nats.item() / math.log(2) / told["held_out_bytes"], rel=1e-5)


def test_all_tokenizers_are_asked_for_the_same_bytes(
    answering: Path, other: Path, tmp_path: Path, compare: Compare
) -> None:
    """Documents of every length, in rows of one context for all; blank ones are none."""
    texts = [TEXT * 9, "磨坊", "a", "  \n"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in texts), "utf-8")
    told = compare([answering, other], "--text", str(tmp_path / "t.jsonl"), "--field", "body")
    assert told["held_out"] == {
        "kind": "text", "path": str(tmp_path / "t.jsonl"), "n": 3, "left_out": 0, "context": 64,
    }  # fmt: skip
    for m, folder in zip(told["models"], (answering, other), strict=True):
        tokenizer = Tokenizer.load(folder)
        assert m["held_out_bytes"] == sum(len(t.encode()) for t in texts[:3])
        assert m["held_out_tokens"] == sum(len(tokenizer.encode(t)) for t in texts[:3])
        assert m["bits_per_byte"] == pytest.approx(m["loss"] * m["held_out_tokens"] / math.log(2) / m["held_out_bytes"])
    shorter = compare(
        [answering], "--text", str(tmp_path / "t.jsonl"), "--field", "body", "--context", "4", "--limit", "2"
    )
    assert shorter["held_out"]["context"] == 4 and shorter["held_out"]["n"] == 2
    assert shorter["models"][0]["loss"] != told["models"][0]["loss"]


def test_conversations_that_one_model_can_not_read_are_left_out_for_all(
    answering: Path, other: Path, tmp_path: Path, compare: Compare, capsys: pytest.CaptureFixture[str]
) -> None:
    def chat(question: str, answer: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    rows = [
        chat("q1", "yes"),
        chat("x" * 50, "fine"),
        chat("q2", "no"),
        {"messages": [{"role": "user", "content": "q3"}]},
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    told = compare([answering, other], "--chats", str(file))
    assert told["held_out"]["n"] == 2 and told["held_out"]["left_out"] == 2
    assert [m["held_out_bytes"] for m in told["models"]] == [5, 5]
    assert "2 conversations of " in (out := capsys.readouterr().out) and "(2 are too long or hold no answer)" in out
    assert compare([answering], "--chats", str(file))["held_out"]["n"] == 3


# --- answers ---------------------------------------------------------------------------------------------------------


def test_grades_are_those_of_the_answers(
    answering: Path, questions: Path, tmp_path: Path, compare: Compare, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each answer's own grade, counted by hand, in all and by kind; intervals; what is kept."""
    stump = write_model(tmp_path / "stump", Tokenizer.load(answering), max_seq_len=96)
    told = compare([answering, stump], "--questions", str(questions), "--max-new-tokens", "6")
    shares = []
    for m in told["models"]:
        lines = (tmp_path / "out" / f"answers-{m['name']}.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        right = [row["answer"].strip().lower().rstrip(".") == "yes" for row in rows]
        score = m["scores"]["exact"]
        assert score["mean"] == sum(right) / 12 and (score["low"], score["high"]) == pytest.approx(
            wilson(sum(right), 12)
        )
        for kind, group in score["by"].items():
            own = [r for r, row in zip(right, rows, strict=True) if row["fields"]["kind"] == kind]
            assert group["n"] == len(own) == 6 and group["mean"] == sum(own) / 6
        assert m["answers"]["ended"] == sum(row["ended"] for row in rows) / 12
        shares.append(score["mean"])
    table_rows = rows_of(capsys.readouterr().out)
    kept = table_rows[f"exact, kept of {answering.name}"]
    assert kept == (["100.0 %", f"{100 * shares[1] / shares[0]:.1f} %"] if shares[0] else ["-", "-"])


def test_other_graders(answering: Path, questions: Path, compare: Compare, capsys: pytest.CaptureFixture[str]) -> None:
    """Several parts and their sum; grades that are no shares are told as they are."""
    told = compare(
        [answering], "--questions", str(questions), "--reward", "exact", "--reward",
        "{kind: length, unit: characters, target: 5, weight: 2}", "--by", "answer", "--limit", "7",
    )  # fmt: skip
    (model,) = told["models"]
    assert model["answers"]["n"] == 7 and set(model["scores"]) == {"exact", "length", "reward"}
    exact, length, total = (model["scores"][part] for part in ("exact", "length", "reward"))
    assert total["mean"] == pytest.approx(exact["mean"] + 2 * length["mean"])
    assert "by" not in exact, "one value makes no groups"
    assert "reward" in rows_of(capsys.readouterr().out)


def test_questions_that_fill_one_context_are_left_out_for_all(
    answering: Path, other: Path, tmp_path: Path, compare: Compare, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "q.jsonl"
    rows = [{"prompt": "x" * n, "answer": "yes"} for n in (60, 3, 75, 5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    told = compare([answering, other], "--questions", str(file), "--max-new-tokens", "3")
    assert "2 of 4 questions fill the context of a model: left out for all" in capsys.readouterr().err
    assert [m["answers"]["n"] for m in told["models"]] == [2, 2] and told["questions"]["by"] is None
    for m in told["models"]:
        lines = (tmp_path / "out" / f"answers-{m['name']}.jsonl").read_text("utf-8").splitlines()
        assert [len(json.loads(line)["fields"]["answer"]) for line in lines] == [3, 3]
        assert [json.loads(line)["number"] for line in lines] == [0, 1]


def test_base_models_are_asked_without_a_template(
    answering: Path, questions: Path, tmp_path: Path, compare: Compare
) -> None:
    """As `llmkit generate` asks them; --raw asks all so."""
    base = write_model(tmp_path / "base", Tokenizer.load(answering), stage="pretrain", max_seq_len=96)
    chat = write_model(tmp_path / "chat", Tokenizer.load(answering), max_seq_len=96)

    def answers(*options: str) -> list[list[str]]:
        compare([base, chat], "--questions", str(questions), "--max-new-tokens", "4", *options)
        files = [tmp_path / "out" / f"answers-{name}.jsonl" for name in ("base", "chat")]
        return [[json.loads(line)["answer"] for line in f.read_text("utf-8").splitlines()] for f in files]

    apart, raw = answers(), answers("--raw")
    assert apart[0] != apart[1] and raw[0] == raw[1] == apart[0]


# --- the table -------------------------------------------------------------------------------------------------------


def test_what_can_not_be_said_is_a_dash() -> None:
    """Grades of nothing, a share of nothing, a perplexity beyond numbers; groups' names keep the table whole."""
    score = {"n": 2, "mean": 0.0, "low": 0.0, "high": 0.6, "is_share": True, "by": {"a|b\nc": None}}
    shared = {
        "parameters": 10,
        "bytes": 5,
        "precision": "float32",
        "loss": 900.0,
        "perplexity": None,
        "bits_per_byte": None,
    }
    models = [{"name": "a", "scores": {"exact": score}, **shared}, {"name": "b", "scores": {"exact": None}, **shared}]
    for m in models:
        m["answers"] = {"n": 2, "tokens": 3.0, "ended": 1.0, "errors": {"exact": 2} if m["name"] == "b" else {}}
    report = {
        "models": models, "device": "cpu", "threads": 1, "same_tokenizer": True, "same_template": True, "speed": None,
        "held_out": {"kind": "text", "path": "t", "n": 1, "left_out": 0, "context": 8}, "questions": {"path": "q", "by": "k"},
    }  # fmt: skip
    rows = rows_of(table(report))
    assert (
        rows["perplexity"] == rows["bits per byte"] == rows["exact, kept of a"] == rows["exact: a/b c, %"] == ["-", "-"]
    )
    assert rows["exact, %"] == ["0.0 (0.0 to 60.0)", "-"] and rows["exact failed on"] == ["0 answers", "2 answers"]


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_names() -> None:
    """Runs by their folder, checkpoints with their run, and numbers where two are called the same."""
    paths = ["runs/a", "runs/b/", "other/a", "runs/a/checkpoints/step-00000007", "org/model"]
    assert names_of(paths, None) == ["a", "b", "a-2", "a-step-00000007", "model"]
    assert names_of(["x", "y"], "teacher, the student") == ["teacher", "the student"]


MISTAKES = {
    "names of fewer": (["--names", "a"], "1 names for 2 models"),
    "names twice": (["--names", "a,a"], "'a' stands twice"),
    "names blank": (["--names", "a, "], "is no name"),
    "names with a slash": (["--names", "a,b/c"], "'b/c' is no name"),
    "two losses": (["--text", "t", "--chats", "c"], "ask for one at a time"),
    "a reward of nothing": (["--reward", "exact"], "--reward is about answers"),
    "groups of nothing": (["--by", "kind"], "--by is about answers"),
    "tokens of nothing": (["--max-new-tokens", "5"], "--max-new-tokens is about answers"),
    "a field of nothing": (["--field", "body"], "--field is where the text"),
    "a context of nothing": (["--context", "5"], "--context is for held-out text"),
    "no limit": (["--limit", "0"], "--limit must be at least 1 (got 0)"),
    "one token": (["--new-tokens", "1"], "--new-tokens must be at least 2 (got 1)"),
    "negative repeats": (["--repeats", "-1"], "--repeats must be at least 0"),
    "a prompt too long": (["--prompt-tokens", "70"], "--new-tokens 2 don't fit into the context of other, 64"),
    "context too long": (["--text", "QUESTIONS", "--context", "65"], "--context 65: other sees 64 tokens"),
    "no such text": (["--text", "nowhere.txt"], "nowhere.txt"),
    "no such field": (["--text", "QUESTIONS"], "QUESTIONS:1"),
    "no conversations": (["--chats", "QUESTIONS", "--limit", "3"], "as answering reads them: QUESTIONS"),
    "empty text": (["--text", "EMPTY"], "there is no text in it"),
    "empty chats": (["--chats", "EMPTY"], "there is no conversation in it"),
    "empty questions": (["--questions", "EMPTY"], "--questions, asked of answering: "),
    "unknown reward": (["--questions", "QUESTIONS", "--reward", "exakt"], "--reward"),
    "unknown group": (["--questions", "QUESTIONS", "--by", "sort"], "--by sort: question 1 has no column of that name"),
    "a wrong column": (["--questions", "QUESTIONS", "--column", "prompt"], "expected ours=theirs"),
    "no answer": (["--questions", "QUESTIONS", "--reward", "{kind: exact, field: right}"], "QUESTIONS:1: rewards: exact: "),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_exit_2(
    case: str, answering: Path, other: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = MISTAKES[case]
    named = tmp_path / "answering"
    named.symlink_to(answering)
    (tmp_path / "empty.jsonl").write_text("")
    files = {"QUESTIONS": str(questions), "EMPTY": str(tmp_path / "empty.jsonl")}
    argv = ["compare", str(named), str(other), "--out", str(tmp_path / "out"), *(files.get(o, o) for o in options)]
    if "--names" not in options:
        argv += ["--names", "answering,other"]
    assert main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message.replace("QUESTIONS", str(questions)) in error
    assert not (tmp_path / "out").exists(), "nothing is written before all is known to be right"


def test_models_that_write_nothing_are_exit_2(
    answering: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No folder, a model without its tokenizer, a file for --out."""
    bare = Path(shutil.copytree(answering, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    for folder in (tmp_path / "none", bare):
        assert main(["compare", str(folder), "--out", str(tmp_path / "out")]) == 2
        assert str(folder) in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    assert main(["compare", str(answering), "--out", str(tmp_path / "file")]) == 2
    assert "is a file: name a folder" in capsys.readouterr().err
