"""The stage that trains tokenizers: one with its report, or several to compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmkit import cli
from llmkit.config import UserError
from llmkit.stages import load_recipe
from llmkit.tokenizer import Tokenizer

COMPARE = "configs/tokenizer/compare.yaml"


def test_kinds_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All on the same text; every kind's folder is a tokenizer of its own."""
    data = tmp_path / "corpus.jsonl"
    lines = Path("data/demo/corpus.jsonl").read_text("utf-8").splitlines()[:500]
    data.write_text("\n".join(lines), encoding="utf-8")
    assert cli.main(["train", COMPARE, f"out={tmp_path / 'out'}", f"data.path={data}", "tokenizer.vocab_size=800"]) == 0
    told = json.loads((tmp_path / "out" / "compare.json").read_text("utf-8"))
    assert set(told["kinds"]) == {"bpe", "wordpiece", "unigram", "sentencepiece", "byte"}
    table = (tmp_path / "out" / "compare.md").read_text("utf-8")
    out = capsys.readouterr().out
    for kind, row in told["kinds"].items():
        tok = Tokenizer.load(tmp_path / "out" / kind)
        assert tok.hash == row["hash"] and tok.vocab_size == row["vocab_size"] <= 800 and row["lossless"]
        assert f"| {kind} | {tok.vocab_size} |" in table and kind in out
        assert row["train_s"] >= 0
        for language in ("zh", "other"):
            cells = row["languages"][language]
            assert cells["round_trip_failures"] == 0 and cells["encode_mb_per_s"] > 0 and len(cells["longest"]) == 5
            # The same text for all: bytes and texts are equal, and byte's tokens are its bytes.
            first = told["kinds"]["bpe"]["languages"][language]
            assert (cells["bytes"], cells["texts"]) == (first["bytes"], first["texts"])
            assert (cells["bytes_per_token"] == 1) == (kind == "byte")
    for language in (
        "zh",
        "other",
    ):  # what is trained makes fewer tokens than bytes, and Markdown rows are of one length
        assert f"## {language}" in table
    assert len({row.count(" | ") for row in table.splitlines() if row.startswith("| ")}) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compare=[bpe,bpe]", "names a kind twice"),
        ("tokenizer.vocab_size=300", "need 517"),
        ("compare=[spm]", "compare"),
    ],
)
def test_wrong_comparisons(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(COMPARE, [override])
    with pytest.raises(UserError, match=r"drop tokenizer\.path"):
        load_recipe("configs/tokenizer/demo.yaml", ["tokenizer=x", "compare=[bpe]"])


def test_a_foreign_tokenizer_that_loses_text_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_folders import MAKERS

    make, config = MAKERS["bert"]
    make().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    args = [f"tokenizer={tmp_path}", f"out={tmp_path / 'out'}"]
    assert cli.main(["train", "configs/tokenizer/demo.yaml", *args]) == 0
    out = capsys.readouterr().out
    assert "not lossless by its own definition" in out and "failed" in out and "longest tokens, zh:" in out
    assert json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))["lossless"] is False
