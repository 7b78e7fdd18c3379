"""`tokenizer.model` files against sentencepiece itself."""

from __future__ import annotations

import io
import json
import random
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from test_kinds import CHINESE, ENGLISH, random_texts

from llmkit.config import UserError
from llmkit.tokenizer import Tokenizer

spm = pytest.importorskip("sentencepiece")
pytest.importorskip("google.protobuf")

LINES = [line for text in ENGLISH[:250] + CHINESE[:250] for line in text.split("\n")]
# What normalisers get wrong: decomposed letters, kana and jamo with marks behind them, wide forms, line ends, joiners.
HARD = ["Tiếng Việt", "한국어 텍스트", "がぎぐげご", "ｶﾞ", "été", "Ａ①ﬁ…", "日本", "हिन्दी", "ไทย", " ", "\r\n", "\xa0\ufe0f", "👩\u200d👩", "\x7f", "\u2581"]  # fmt: skip  # noqa: E501


def model(folder: Path, **options: Any) -> Any:
    """Trains with sentencepiece and writes tokenizer.model."""
    out = io.BytesIO()
    given = {"vocab_size": 1300, "byte_fallback": True, "pad_id": 3, "minloglevel": 2, "num_threads": 1, **options}
    spm.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=out, **given)
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    return spm.SentencePieceProcessor(model_proto=out.getvalue())


def texts() -> list[str]:
    rng = random.Random(3)
    forms = ["NFD", "NFC", "NFKD"]
    mixed = [unicodedata.normalize(rng.choice(forms), "".join(rng.choices(HARD, k=6))) for _ in range(700)]  # type: ignore[arg-type]
    cut = [t[rng.randrange(len(t)) :][: rng.randrange(40)] for t in ENGLISH[:300] + CHINESE[:300]]
    symbols = [
        "".join(rng.choices(["<user>", "abc", "a", "<s>", "</s>", "<0x41>", " ", "c", "\u2581"], k=6))
        for _ in range(300)
    ]
    return [*random_texts(2500, seed=5), *mixed, *cut, *symbols, *ENGLISH[-100:], *CHINESE[-100:], "", " ", "  "]


TEXTS = [t for t in texts() if "\x00" not in t]  # sentencepiece's map takes a zero byte for its own end mark
USER = ["<user>", "<sep>", "abc"]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize(
    "options",
    [
        {},  # nmt_nfkc, extra blanks taken out, a space before the text
        {"user_defined_symbols": USER},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "user_defined_symbols": USER},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False},
        {"normalization_rule_name": "nfkc_cf", "byte_fallback": False},
    ],
    ids=["default", "symbols", "identity", "no prefix", "casefold, unknown"],
)
def test_ids_and_texts_are_those_of_sentencepiece(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Thousands of texts; B50 as there: no text becomes a control token or the name of a byte."""
    theirs = model(tmp_path, model_type=kind, **options)
    tok = Tokenizer.load(tmp_path)
    assert (tok.bos_id, tok.eos_id, tok.pad_id, tok.vocab_size) == (1, 2, 3, theirs.get_piece_size())
    expected = theirs.encode(TEXTS)
    for text, ids, mine in zip(TEXTS, expected, tok.encode_batch(TEXTS, threads=2), strict=True):
        assert mine.tolist() == ids, text
        assert not {1, 2, 3} & set(ids)
        # sentencepiece writes an unknown token as U+2047 and drops all signs that the text itself begins with.
        if 0 not in ids and not text.lstrip().startswith("\u2581"):
            assert tok.decode(ids) == theirs.decode(ids), text
    tok.save(tmp_path / "saved")  # then tokenizer.json is all there is
    again = Tokenizer.load(tmp_path / "saved")
    assert again.hash == tok.hash and [again.encode(t) for t in TEXTS[::10]] == expected[::10]


def test_transformers_reads_what_we_save(tmp_path: Path) -> None:
    """The same ids where no character map is at work; `tokenizers` does those in a way of its own."""
    transformers = pytest.importorskip("transformers")
    theirs = model(tmp_path, normalization_rule_name="identity", remove_extra_whitespaces=False)
    tok = Tokenizer.load(tmp_path)
    tok.save(tmp_path / "saved")
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    plain = [t for t in TEXTS if not any(s in t for s in tok.special)]
    assert fast(plain, split_special_tokens=True, add_special_tokens=False)["input_ids"] == theirs.encode(plain)


def test_tokens_that_the_folder_adds(tmp_path: Path) -> None:
    model(tmp_path)
    size = Tokenizer.load(tmp_path).vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<think>": size + 1}))
    decoder = {str(size): {"content": "<|end|>", "special": True}, "0": {"content": "<unk>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end|>", "added_tokens_decoder": decoder})
    )
    tok = Tokenizer.load(tmp_path)
    assert (tok.eos_id, tok.vocab_size) == (size, size + 2) and size not in tok.encode("a<|end|>")
    assert size + 1 in tok.encode("a <think> b")


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(tmp_path)
    good = (tmp_path / "tokenizer.model").read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        at = rng.randrange(len(good))
        bad = good[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(4))) + good[at + rng.randrange(1, 50) :]
        (tmp_path / "tokenizer.model").write_bytes(bad if rng.random() < 0.7 else good[:at])
        try:
            Tokenizer.load(tmp_path)
        except UserError as e:
            assert str(e).startswith(str(tmp_path)) and "\n" not in str(e)
    for kind in ("char", "word"):
        model(tmp_path, model_type=kind, byte_fallback=False, hard_vocab_limit=False)
        with pytest.raises(UserError, match="only unigram and bpe"):
            Tokenizer.load(tmp_path)
    model(tmp_path, treat_whitespace_as_suffix=True)
    with pytest.raises(UserError, match="end of words"):
        Tokenizer.load(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"pip install 'llmkit\[sentencepiece\]'"):
        Tokenizer.load(tmp_path)
