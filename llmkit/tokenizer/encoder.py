"""Fast engines behind `tokenizer.Tokenizer`: the same ids as `tokenizers`, several times as fast.

`tokenizers` defines what is right. tiktoken is built from the same merges and regex, checked against it, and not used where
it would differ.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import tokenizers

from llmkit.tokenizer.pieces import BYTE_OF_CHAR, bytes_of_token, is_byte_level, model_type, steps_of

# llama.cpp knows this regex (and few others) under the name `llama-bpe`, so exported models keep their ids there.
GPT4_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_REGEX = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of ByteLevel(use_regex=True)
MAX_RUN = 16_384  # see `has_long_blank`

logger = logging.getLogger(__name__)


# --- engines ---------------------------------------------------------------------------------------------------------

SAMPLE = (
    "The quick brown fox's can't, WON'T, we'\u017fe; I'll've 3.14159 12345678 x1y22z333",
    "  two   three\n\n\n  \t tabs\t\t \r\n\r\n  end   \n ",
    "中文和 English 混排，「标点」。全角１２３ＡＢＣ，没有空格的一长串汉字也要一样。",
    "日本語のテキスト、カタカナ、한국어 텍스트 한국어",
    "e\u0301a\u0300o\u0302 \u1112\u1161\u11ab \u212b \ufb01 \u2460 \u0958",
    "👩‍👩‍👧‍👦 🇨🇳 👍🏽 ☃\ufe0f ✈",
    "עברית العربية हिन्दी ไทย ქართული Ελληνικά русский",
    "<|im_start|>user<|im_end|><|bos|><|eos|><|pad|> <s></s> [INST]",
    "\x00\x01\x7f\x80\x85\xa0\u2028\u3000\ufeff\uffff\U0010ffff\u200b\u00ad",
    "def f(x):\n    return {'a': x ** 2}  # ok\n\n\tif x != y: pass",
    "a" * 300 + " " * 300 + "-" * 300 + "\n" * 300 + "é" * 300 + "漢" * 300 + "1" * 300 + " \n" * 100 + " x" * 100,
)


class ByteEngine:
    """One id per byte."""

    def __init__(self, id_of_byte: np.ndarray) -> None:
        self._id_of_byte = id_of_byte

    def encode(self, text: str) -> np.ndarray:
        return self._id_of_byte[np.frombuffer(text.encode("utf-8"), dtype=np.uint8)]


def has_long_blank(text: str) -> bool:
    """Whether whitespace fills a whole block of MAX_RUN characters (so any run of twice that length is found).

    tiktoken's regex engine backtracks over whitespace (`\\s+(?!\\S)`) and panics at about half a million characters.
    """
    return any(text[i : i + MAX_RUN].isspace() for i in range(0, len(text) - MAX_RUN + 1, MAX_RUN))


class TiktokenEngine:
    """tiktoken with the merges of a tokenizer.json."""

    def __init__(self, regex: str, id_of_rank: np.ndarray, ranks: dict[bytes, int]) -> None:
        import tiktoken

        self._id_of_rank = id_of_rank
        self._encoding = tiktoken.Encoding("llmkit", pat_str=regex, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str) -> np.ndarray:
        return self._id_of_rank[self._encoding.encode_to_numpy(text, disallowed_special=())]

    def encode_piece(self, piece: bytes) -> list[int]:
        """A piece that the regex doesn't cut: for checking."""
        return [int(self._id_of_rank[r]) for r in self._encoding._encode_single_piece(piece)]


def regex_of(spec: dict[str, Any]) -> str | None:
    """The regex that cuts text into pieces which are then turned into bytes; "" when it is not as simple as that."""
    steps = steps_of(spec.get("pre_tokenizer"), "pretokenizers")
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return ""
    if len(steps) == 1:
        return GPT2_REGEX if last.get("use_regex", True) else None
    split = steps[0]
    simple = len(steps) == 2 and split.get("type") == "Split" and not last.get("use_regex", True)
    if simple and split.get("behavior") == "Isolated" and not split.get("invert") and "Regex" in split["pattern"]:
        return str(split["pattern"]["Regex"])
    return ""  # correct, but nothing that another engine could be given


def _why_not_fast(spec: dict[str, Any], merged: list[str]) -> str | None:
    """Why merges alone don't say what `tokenizers` would do, if so."""
    model = spec["model"]
    odd = [k for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback") if model.get(k)]
    if odd:
        return f"its model has {', '.join(odd)}"
    if not regex_of(spec):
        return "its text is cut in a way of its own"
    if len(set(merged)) != len(merged):
        return "two of its merges yield the same token"
    return None


def _added_texts(spec: dict[str, Any]) -> set[str]:
    return {t["content"] for t in spec["added_tokens"]}


def build_tiktoken(spec: dict[str, Any], backend: tokenizers.Tokenizer) -> TiktokenEngine | str:
    """The tiktoken engine, or why there is none. It is checked against `tokenizers`: token by token, and on a sample."""
    vocab: dict[str, int] = spec["model"]["vocab"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in spec["model"]["merges"]]
    merged = [a + b for a, b in merges]
    reason = _why_not_fast(spec, merged)
    if reason:
        return reason
    base = [c for c in BYTE_OF_CHAR if c in vocab]
    if len(base) != 256:
        return f"it knows {len(base)} of the 256 bytes"
    ordered = [*base, *merged]
    if spec["model"].get("ignore_merges") and len(set(vocab) - set(ordered)) > len(set(vocab) & _added_texts(spec)):
        return "it knows whole words that no merge yields"
    ranks = {bytes_of_token(token): rank for rank, token in enumerate(ordered)}
    if len(ranks) != len(ordered):
        return "two of its tokens are the same bytes"
    try:
        fast = TiktokenEngine(regex_of(spec) or "", np.array([vocab[t] for t in ordered], dtype=np.int64), ranks)
        model = backend.model
        for token in ordered:
            if fast.encode_piece(bytes_of_token(token)) != [t.id for t in model.tokenize(token)]:
                return f"it disagrees on the token {token!r}"
        for text in SAMPLE:
            text = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
            if fast.encode(text).tolist() != backend.encode(text, add_special_tokens=False).ids:
                return f"it disagrees on {text[:40]!r}"
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return fast


def build_engine(spec: dict[str, Any], backend: tokenizers.Tokenizer) -> ByteEngine | TiktokenEngine | None:
    """The fast engine of a byte-level BPE, or None where `tokenizers` does the work: aloud, if it's such a BPE."""
    if model_type(spec) != "BPE" or not is_byte_level(spec):
        return None
    vocab = spec["model"]["vocab"]
    if not spec["model"]["merges"] and regex_of(spec) != "" and all(c in vocab for c in BYTE_OF_CHAR):
        # Without merges no regex can make a difference.
        return ByteEngine(np.array([vocab[c] for c, _ in sorted(BYTE_OF_CHAR.items(), key=lambda x: x[1])], np.int64))
    fast = build_tiktoken(spec, backend)
    if isinstance(fast, str):
        logger.warning("tokenizer: encoding takes the slow way (`tokenizers`), as %s", fast)
        return None
    return fast
