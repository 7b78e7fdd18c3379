"""`llmkit bench`: sizes that add up, a divergence that is the definition's, one table, and mistakes in one sentence."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkit.cli import main
from llmkit.losses import IGNORE
from llmkit.model.config import count_params
from llmkit.model.gpt import GPT
from llmkit.model.weights import load_model
from llmkit.tokenizer import Tokenizer, TokenizerConfig
from llmkit.tools.measures import Scored, divergence, likelihood, text_rows

TEXT = "The mill stands by the river. 从前山谷里有一座磨坊。 Mira lives in the valley.\n"
Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """bench(model, *options) -> what bench.json holds; without timing, unless it is asked for."""

    def run(*argv: object) -> dict[str, Any]:
        if "--repeats" not in argv:
            argv = (*argv, "--repeats", 0)
        assert main(["bench", *map(str, argv), "--out", str(tmp_path / "out")]) == 0
        told: dict[str, Any] = json.loads((tmp_path / "out" / "bench.json").read_text("utf-8"))
        return told

    return run


@pytest.fixture(scope="module")
def worse(answering: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with its weights rounded roughly, in bf16."""
    folder = Path(shutil.copytree(answering, tmp_path_factory.mktemp("bench") / "worse"))
    tensors = {n: ((t * 8).round() / 8).bfloat16() for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "t.txt").write_text(TEXT * 3, "utf-8")
    return tmp_path / "t.txt"


def rows_of(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_one_table_one_picture(
    answering: Path, worse: Path, text: Path, tmp_path: Path, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table is printed and kept; json holds its numbers; a picture lies beside it."""
    told = bench(answering, worse, "--text", text, "--prompt-tokens", 12, "--new-tokens", 4, "--repeats", 2)
    out, err = capsys.readouterr()
    assert out == (tmp_path / "out" / "bench.md").read_text("utf-8") and "bench.png" in err
    head, _, *rows = rows_of(out)
    assert [row[0] for row in rows] == [m["name"] for m in told["models"]] == ["fp32", "bf16", "worse"]
    assert head[-2:] == ["PP 12, tokens/s", "TG 4, tokens/s"] and {len(row) for row in rows} == {len(head)}
    n = count_params(load_model(answering).config).total
    fp32, bf16, other = told["models"]
    assert fp32["parameters"] == n and (fp32["bits_per_weight"], bf16["bits_per_weight"]) == (32, 16)
    assert (fp32["bytes"], bf16["bytes"]) == (4 * n, 2 * n)
    assert other["bytes"] == (worse / "model.safetensors").stat().st_size
    assert told["original"]["bytes"] == (answering / "model.safetensors").stat().st_size
    assert "kl" not in fp32 and rows[0][4:7] == ["-", "-", "-"]
    assert 0 <= bf16["kl"] < 1e-3 < other["kl"] and bf16["same_choice_pct"] > 95
    for m in told["models"]:
        assert m["perplexity"] == pytest.approx(math.exp(m["loss"]))
        assert len(m["speed"]["prompt"]) == len(m["speed"]["generation"]) == 2 and min(m["speed"]["prompt"]) > 0
    assert other["perplexity_change_pct"] == pytest.approx(100 * (other["perplexity"] / fp32["perplexity"] - 1))
    picture = (tmp_path / "out" / "bench.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 20_000


def test_sizes_alone(answering: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without text there is no perplexity, without --out no file."""
    assert main(["bench", str(answering), "--repeats", "0", "--precisions", "bf16"]) == 0
    out = capsys.readouterr().out
    head, _, *rows = rows_of(out)
    assert head == ["", "size, MB", "bits per weight"] and [row[0] for row in rows] == ["bf16"]
    assert rows[0][2] == "16.00" and not list(tmp_path.iterdir())


def test_a_copy_is_no_further_than_nothing(answering: Path, text: Path, tmp_path: Path, bench: Bench) -> None:
    """The same weights: not a bit of divergence. Its name is not one of the precisions'."""
    copy = Path(shutil.copytree(answering, tmp_path / "fp32"))
    *_, told = bench(answering, copy, "--text", text)["models"]
    assert told["name"] == "fp32'" and told["kl"] == 0 and told["same_choice_pct"] == 100
    assert told["perplexity_change_pct"] == 0


def test_quantised(answering: Path, text: Path, tmp_path: Path, bench: Bench) -> None:
    """Beside its original, and alone: its weights stay in their bits, whatever is computed in."""
    folders = [tmp_path / "int8", tmp_path / "int4"]
    for folder in folders:
        assert main(["quantize", str(answering), str(folder), "--bits", folder.name[-1]]) == 0
    *_, int8, int4 = bench(answering, *folders, "--text", text)["models"]
    assert int4["bits_per_weight"] < int8["bits_per_weight"] < 16 and int4["kl"] > int8["kl"] > 0
    fp32, bf16 = bench(folders[0], "--text", text)["models"]
    assert fp32["bytes"] == bf16["bytes"] == int8["bytes"] == (folders[0] / "quantized.safetensors").stat().st_size
    assert fp32["perplexity"] == pytest.approx(int8["perplexity"], rel=1e-5)


def test_conversations(answering: Path, tmp_path: Path, bench: Bench) -> None:
    """The numbers are of the assistant's turns alone, as `measures` gives them."""
    file = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "yes"}]
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(3)), "utf-8")
    told = bench(answering, "--chats", file)
    tokenizer, model = Tokenizer.load(answering), load_model(answering)
    chat = tokenizer.encode_chat(turns)
    labels = [i if on else IGNORE for i, on in zip(chat.ids[1:], chat.loss_mask[1:], strict=True)]
    found = likelihood(model, [Scored(chat.ids[:-1], labels)] * 3, tokenizer.vocab_size, 9)
    assert told["models"][0]["perplexity"] == pytest.approx(found.perplexity, rel=1e-6)
    assert told["models"][0]["held_out_tokens"] == found.n_tokens and told["held_out"]["n"] == 3


def test_the_divergence_is_the_definition(answering: Path, worse: Path) -> None:
    """Summed by hand over ragged rows of which some tokens aren't asked for; whatever the chunks are."""
    tokenizer, models = Tokenizer.load(answering), (load_model(answering), load_model(worse, torch.float32))
    rows = [row for k in (1, 3) for row in text_rows(tokenizer, TEXT * k, 40)]
    rows[1] = Scored(rows[1].ids, [IGNORE if k % 3 else t for k, t in enumerate(rows[1].labels)])
    total, same, n, V = 0.0, 0, 0, tokenizer.vocab_size
    for row in rows:
        asked = [k for k, label in enumerate(row.labels) if label != IGNORE]
        logp, logq = (_logprobs(m, row.ids)[asked, :V].log_softmax(-1) for m in models)
        total += float((logp.exp() * (logp - logq)).sum())
        same += int((logp.argmax(-1) == logq.argmax(-1)).sum())
        n += len(asked)
    seen: list[int] = []
    found = divergence(*models, rows, V, seen.append)
    assert found.kl == pytest.approx(total / n, rel=1e-5) and found.kl > 0
    assert found.same_frac == same / n and sum(seen) == len(rows)
    assert divergence(models[0], models[0], rows, V).kl == 0


def _logprobs(model: GPT, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(torch.tensor([ids]))[0]).double()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--precisions", "fp32,int3"], "each of fp32, bf16 once at most"),
        (["--precisions", "fp32,fp32"], "once at most"),
        (["--text", "t.txt", "--chats", "t.txt"], "ask for one at a time"),
        (["--field", "body"], "--field is where the text of --text stands"),
        (["--context", "8"], "--context is for held-out text"),
        (["--text", "t.txt", "--context", "500"], "bench: --context 500"),
        (["--repeats", "-1"], "--repeats must be at least 0"),
        (["--new-tokens", "1"], "--new-tokens must be at least 2"),
        (["--prompt-tokens", "90", "--new-tokens", "20"], "don't fit into the context"),
        (["--text", "no.txt"], "no.txt"),
        (["--out", "t.txt"], "is a file: name a folder"),
    ],
)
def test_mistakes(
    answering: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(text.parent)
    assert main(["bench", str(answering), *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err


def test_another_tokenizer_is_another_model(
    answering: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(answering, tmp_path / "other"))
    tokenizer = Tokenizer.train([TEXT] * 9, TokenizerConfig(vocab_size=270))
    for name, content in tokenizer.files().items():
        (other / name).write_bytes(content)
    code = main(["bench", str(answering), str(other), "--repeats", "0"])
    assert code == 2 and "llmkit compare" in capsys.readouterr().err
