"""`llmkit embed` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llmkit.cli import main
from llmkit.config import UserError
from llmkit.inference.embed import Words, context_vectors, encode_rows, text_vectors, token_vectors
from llmkit.model.config import GPTConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.weights import load_model
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.tools.embed import Analogy, parse_analogy, read_analogies, read_texts

TEXTS = ["the king and the queen", "a man, a woman", "the mill stands by the river", "国王,王后"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights."""
    folder = tmp_path_factory.mktemp("embed")
    tokenizer = Tokenizer.train([" ".join(TEXTS) * 40], TokenizerConfig(vocab_size=330))
    model = GPT(GPTConfig(n_layers=2, n_heads=2, d_model=16, max_seq_len=24, vocab_size=384))
    init_weights(model, 0)
    for name, content in model_files(model.config, torch.float32, tokenizer, {"stage": "pretrain", "step": 1}).items():
        (folder / name).write_bytes(content)
    save_file(
        {n: t.contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": t, "other": t[::-1]}) + "\n" for t in TEXTS), "utf-8")
    return file


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["embed", *argv])
    return code, *capsys.readouterr()


def vectors_of(folder: Path, texts: list[str], **options) -> torch.Tensor:
    tokenizer, model = Tokenizer.load(folder), load_model(folder)
    return text_vectors(model, encode_rows(tokenizer, texts, model.config.max_seq_len)[0], n_skip=1, **options)


def test_vectors_are_written(folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = vectors_of(folder, TEXTS).numpy()
    for name in ("a.npy", "a.npz", "a.jsonl"):
        out = tmp_path / "new" / name
        code, text, err = said(capsys, str(folder), "--file", str(corpus), "--out", str(out))
        assert (code, text, err) == (0, "", f"{out}: 4 vectors of 16 numbers\n")
        if name == "a.jsonl":
            rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
            assert [row["text"] for row in rows] == TEXTS
            found = np.array([row["vector"] for row in rows])
        else:
            found = np.load(out, allow_pickle=False)
            found = found["vectors"] if name == "a.npz" else found
            assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)
    out = tmp_path / "b.npy"
    options = ["--field", "other", "--pooling", "last", "--layer", "1"]
    assert said(capsys, str(folder), "--file", str(corpus), "--out", str(out), *options)[0] == 0
    other = vectors_of(folder, [t[::-1] for t in TEXTS], pooling="last", layer=1)
    np.testing.assert_allclose(np.load(out), other.numpy(), atol=1e-6)


def test_texts_are_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, str(folder), "--text", TEXTS[0], "--text", TEXTS[1])
    vectors = vectors_of(folder, TEXTS[:2])
    cosine = f"{float(vectors[0] @ vectors[1]):7.4f}"
    assert code == 0 and out == f" 1.0000  {cosine}  {TEXTS[0]}\n{cosine}   1.0000  {TEXTS[1]}\n"
    code, out, _ = said(capsys, str(folder), "--text", TEXTS[0])
    assert code == 0 and json.loads(out)["vector"] == pytest.approx(vectors[0].tolist(), abs=1e-6)


def test_the_nearest_texts(folder: Path, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("llmkit.tools.embed.BLOCK", 3)
    code, out, _ = said(capsys, str(folder), "--query", TEXTS[2], "--file", str(corpus), "-k", "2")
    assert code == 0 and len(out.splitlines()) == 2 and out.splitlines()[0] == f" 1.0000       3  {TEXTS[2]}"
    order = (vectors_of(folder, TEXTS) @ vectors_of(folder, [TEXTS[2]])[0]).argsort(descending=True)
    assert out.splitlines()[1].endswith(TEXTS[int(order[1])])
    lines = corpus.with_name("lines.txt")
    lines.write_text("\n".join([*TEXTS, "", "   "]), "utf-8")
    assert said(capsys, str(folder), "--query", TEXTS[2], "--file", str(lines), "-k", "2")[1] == out
    assert list(read_texts(str(lines), "text")) == TEXTS
    long = ["--text", "the mill " * 60, "--text", TEXTS[0]]
    assert said(capsys, str(folder), *long)[2] == "note: 1 of 2 texts were cut to the context of 24 tokens\n"
    code, out, _ = said(capsys, str(folder), "--query", TEXTS[0], "--query", TEXTS[1], *long)
    assert code == 0 and [line[:3] for line in out.splitlines()].count("---") == 2


def test_words(folder: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, model = Tokenizer.load(folder), load_model(folder)
    words = Words(token_vectors(model, "input", tokenizer.vocab_size), tokenizer)
    code, out, err = said(capsys, str(folder), "--analogy", "man:woman::king", "--analogy", "man:woman::king:queen")
    best = words.analogy("man", "woman", "king", 5)
    answers = ", ".join(f"{f.word} {f.score:.3f}" for f in best)
    first, second = out.splitlines()
    assert code == 0 and err == "" and first == f"man : woman :: king : {answers}"
    assert second.split()[0] == str(words.rank("man", "woman", "king", "queen"))
    code, out, err = said(capsys, str(folder), "--similar", "king", "--similar", "riverking", "-k", "3")
    assert code == 0 and err.startswith("note: 'riverking' is ") and "of which the mean is taken: " in err
    assert out.splitlines()[:2] == [
        "--- king",
        f"{words.similar('king', 1)[0].score:7.4f}  {words.similar('king', 1)[0].word}",
    ]
    code, out, _ = said(capsys, str(folder), "--similar", "king", "--vectors", "context", "--file", str(corpus))
    rows, _ = encode_rows(tokenizer, TEXTS, 24)
    seen = Words(context_vectors(model, rows, tokenizer.vocab_size, layer=1, window=16)[0], tokenizer)
    assert code == 0 and [line.split() for line in out.splitlines()[1:]] == [
        [f"{f.score:.4f}", f.word] for f in seen.similar("king", 5)
    ]


def test_a_file_of_analogies(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The share counts every row; those whose words are all one token are told apart."""
    asked = [
        ("man", "woman", "king", "queen"),
        ("king", "queen", "man", "woman"),
        ("man", "woman", "mill", "riverking"),
    ]
    rows = [dict(zip("abcd", terms, strict=True), axis="x", lang="en") for terms in asked[:2]]
    rows.append(dict(zip("abcd", asked[2], strict=True)))
    file = tmp_path / "analogies.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    code, out, _ = said(capsys, str(folder), "--analogies", str(file), "--method", "mul")
    tokenizer, model = Tokenizer.load(folder), load_model(folder)
    extra = [word for terms in asked for word in terms]
    words = Words(token_vectors(model, "input", tokenizer.vocab_size), tokenizer, extra)
    ranks = [words.rank(*terms, "mul") for terms in asked]
    lines = out.splitlines()
    assert code == 0 and [int(line.split()[0]) for line in lines[:3]] == ranks
    assert lines[4].startswith(
        f"{len(words.names)} words were candidates ({words.n_tokens} tokens and 1 words of several"
    )
    table = {line[:20].strip(): line[20:].split() for line in lines[6:]}
    assert table["all"][0] == "3" and table["all words one token"][0] == "2" and table["x en"][0] == "2"
    assert int(table["all"][1]) == sum(r == 1 for r in ranks)


MISTAKES = {
    "": "give --text, --file",
    "--file t.jsonl": "--file needs --out",
    "--text a --file t.jsonl --out a.npy": "--text or --file, not both",
    "--text a --out a.txt": "must end in .npy, .npz, .jsonl",
    "--query a --out a.npy --text b": "--query and --out are different questions",
    "--query a": "give --text, --file",
    "--similar a --text b": "drop --text",
    "--similar a --vectors context": "belong together",
    "--similar a --file t.jsonl": "belong together",
    "--similar a --layer 1": "--layer is for texts",
    "--similar a --window 3": "for --vectors context only",
    "--similar a -k 0": "-k must be at least 1",
    "--analogy man:woman:king": "expected a:b::c",
    "--analogy man:woman::": "expected a:b::c",
    "--text a --text b --layer 9": "layer 9",
    "--analogies none.jsonl": "none.jsonl: No such file",
    "--query a --file none.jsonl": "none.jsonl",
}


@pytest.mark.parametrize("argv", MISTAKES)
def test_mistakes_are_one_sentence(argv: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, str(folder), *argv.split())
    assert code == 2 and out == "" and err.startswith("error: ") and MISTAKES[argv] in err and err.count("\n") == 1


def test_what_an_analogy_may_look_like(tmp_path: Path) -> None:
    assert parse_analogy(" man : woman :: king ") == Analogy("man", "woman", "king")
    assert parse_analogy("man:woman::king:queen") == Analogy("man", "woman", "king", "queen")
    file = tmp_path / "a.jsonl"
    for content, message in {
        '{"a": "x"}': "a.jsonl:1: expected",
        '\n{"a": "x", "b": "y", "c": "z", "d": 4}': "a.jsonl:2: expected",
        "[1]": "a.jsonl:1: expected",
        "{": "a.jsonl:1: not JSON",
        "": "no analogies",
    }.items():
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            read_analogies(str(file))
    file.write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8 at byte 0"):
        read_analogies(str(file))
    assert len(read_analogies("data/demo/analogies.jsonl")) == 88
