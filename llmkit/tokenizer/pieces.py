"""What the tokens of a tokenizer.json stand for, as bytes: all that decoding needs.

Decoders of tokenizer.json work on the whole list of tokens. Every one known here comes down to two tables: the bytes
of a token at the very beginning of a text (where some drop or add a space), and anywhere else. So ids can be decoded
one by one, and bytes be counted.
"""

from __future__ import annotations

import re
from typing import Any

import tokenizers

from llmkit.config import UserError

MAX_ID = 1 << 24
_KNOWN = ("ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece")
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(moved)}


BYTE_OF_CHAR = _byte_alphabet()


def bytes_of_token(token: str) -> bytes:
    """The bytes of a byte-level token."""
    try:
        return bytes(BYTE_OF_CHAR[c] for c in token)
    except KeyError:  # a token that was put into the vocabulary as it is
        return token.encode("utf-8")


def steps_of(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre_tokenizer or decoder: those of a Sequence, or the one."""
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def model_type(spec: dict[str, Any]) -> str:
    """BPE, WordPiece or Unigram; old files don't say it."""
    model = spec["model"]
    kind = model.get("type") or (
        "BPE" if "merges" in model else "Unigram" if isinstance(model["vocab"], list) else "WordPiece"
    )
    if kind not in ("BPE", "WordPiece", "Unigram"):
        raise UserError(f"tokenizer.json: its model is {kind!r}, but only BPE, WordPiece and Unigram are known")
    return str(kind)


def vocab_of(spec: dict[str, Any]) -> dict[str, int]:
    """token -> id, without the added tokens that the model doesn't know."""
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, list):
        return {piece: i for i, (piece, _) in enumerate(vocab)}
    return {str(t): int(i) for t, i in vocab.items()}


def is_byte_level(spec: dict[str, Any]) -> bool:
    """Whether tokens are written in the byte alphabet."""
    steps = steps_of(spec.get("decoder"), "decoders")
    return bool(steps) and steps[-1]["type"] == "ByteLevel"


class Pieces:
    """The bytes of every id.

    Attributes:
        first, rest: bytes of an id at the beginning of a text, and after other tokens. `first` is `rest` itself where
            there is no difference.
        size: highest id + 1.
    """

    def __init__(self, spec: dict[str, Any], backend: tokenizers.Tokenizer) -> None:
        """Raises UserError for a decoder that isn't known."""
        decoder = spec.get("decoder")
        steps = steps_of(decoder, "decoders")
        odd = [s["type"] for s in steps if s["type"] not in _KNOWN]
        if odd or any(s["type"] == "Strip" and s["stop"] for s in steps):
            raise UserError(f"tokenizer.json: its decoder has {odd[0] if odd else 'Strip at the end'}, not known here")
        vocab = vocab_of(spec)
        added = {int(t["id"]): str(t["content"]) for t in spec["added_tokens"]}
        ids = {*vocab.values(), *added}
        if not ids or min(ids) < 0 or max(ids) > MAX_ID:
            raise UserError(f"tokenizer.json: ids must be within 0 and {MAX_ID}")
        self.size = max(ids) + 1
        self.rest = [b""] * self.size
        if is_byte_level(spec):
            replaced = [(s["pattern"], s["content"]) for s in steps if s["type"] == "Replace"]
            if len(replaced) + 1 != len(steps) or any("String" not in p for p, _ in replaced):
                raise UserError("tokenizer.json: its decoder does more than ByteLevel and Replace, not known here")
            for token, i in vocab.items():
                for pattern, content in replaced:
                    token = token.replace(pattern["String"], content)
                self.rest[i] = bytes_of_token(token)
            for i, text in added.items():
                self.rest[i] = text.encode("utf-8")
            self.first = self.rest
            return
        decode = backend.decoder.decode if decoder is not None else " ".join
        fallback = any(s["type"] == "ByteFallback" for s in steps)
        if decode(["a"]) != "a":
            raise UserError("tokenizer.json: its decoder changes plain letters, not known here")
        self.first = [b""] * self.size
        for token, i in vocab.items():
            byte = _BYTE_PIECE.fullmatch(token) if fallback else None
            if byte is not None and int(byte[1], 16) >= 0x80:
                self.first[i] = self.rest[i] = bytes([int(byte[1], 16)])
            else:
                self.first[i], self.rest[i] = decode([token]).encode("utf-8"), decode(["a", token]).encode("utf-8")[1:]
        for i, text in added.items():
            # transformers sends added tokens through the decoder too; what blanks it puts around them is kept.
            self.first[i] = text.encode("utf-8")
            self.rest[i] = (" " if decode(["a", "b"]) == "a b" else "").encode("utf-8") + self.first[i]
        if self.first == self.rest:
            self.first = self.rest
