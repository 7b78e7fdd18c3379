"""How text becomes ids, as a recipe says it."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from llmkit.config import Config

SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
MASKS = ("<|mask|>", "[MASK]")  # a control token of this name is the mask token
_CONTROL = re.compile(r"[<\[][^\s]*[A-Za-z][^\s]*[>\]]")

Kind = Literal["bpe", "wordpiece", "unigram", "sentencepiece", "byte"]


def is_control(token: str) -> bool:
    """Whether a token is written as a control token is: ASCII, brackets around something that holds a letter.

    The regex of every kind cuts such text apart, so no piece that training finds can ever be the whole token.
    """
    return token.isascii() and _CONTROL.fullmatch(token) is not None


class TokenizerConfig(Config):
    """How text becomes ids. A recipe may write `tokenizer: FOLDER` for `tokenizer: {path: FOLDER}`."""

    kind: Kind = "bpe"
    """`bpe`, `wordpiece`, `unigram`: trained on the bytes of words. `sentencepiece`: trained on characters of raw text,
    spaces written as a sign, rare characters as bytes. `byte`: 256 bytes and the special tokens, nothing trained."""
    vocab_size: int = Field(4096, ge=1, le=1 << 20)
    """Tokens asked for, special ones included; a small corpus may yield fewer. `byte` ignores it."""
    normalize: Literal["nfc", "nfkc", "none"] = "nfc"
    """Unicode normalisation before encoding. NFKC would turn Chinese punctuation into ASCII."""
    min_frequency: int = Field(2, ge=1)
    """A pair must occur this often to be merged (bpe, wordpiece, sentencepiece with `model: bpe`)."""
    model: Literal["unigram", "bpe"] = "unigram"
    """What `sentencepiece` trains."""
    coverage: float = Field(0.9995, gt=0.0, le=1.0)
    """`sentencepiece`: the share of the text's characters that get a token of their own; the rest are written as bytes."""
    special: tuple[str, ...] = ()
    """More control tokens, such as `<|tool|>`, after the five that every tokenizer has. `<|mask|>` or `[MASK]` becomes
    the mask token."""
    path: str | None = None
    """A folder that holds a tokenizer.json or tokenizer.model (a run, a checkpoint, a Hugging Face folder), instead of
    training one."""
    add: tuple[str, ...] = ()
    """With `path`: tokens to add to it. Written like `<|name|>` it becomes a control token, else plain text."""
    chat_template: str | None = None
    """`chatml` or a file with a Jinja template; null: the folder's own, or else chatml."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str) else data

    @field_validator("special", "add", mode="before")
    @classmethod
    def _tuple(cls, tokens: Any) -> Any:
        # A model validator that runs before turns JSON into Python data, where strict types know no list for a tuple.
        return tuple(tokens) if isinstance(tokens, list) else tokens

    @field_validator("special")
    @classmethod
    def _check_special(cls, special: tuple[str, ...]) -> tuple[str, ...]:
        for i, token in enumerate(special):
            if not is_control(token):
                raise ValueError(
                    f"{token!r}: a control token is written like <|name|>, <name> or [NAME], without spaces"
                )
            if token in SPECIAL or token in special[:i]:
                raise ValueError(f"{token!r} is there already: name each control token once")
            if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>|<unk>", token):
                raise ValueError(f"{token!r} is a name that sentencepiece's own tokens have: choose another")
        return special

    @field_validator("add")
    @classmethod
    def _check_add(cls, add: tuple[str, ...]) -> tuple[str, ...]:
        for i, token in enumerate(add):
            if not token or "\u2581" in token or any(c.isspace() for c in token):
                raise ValueError(f"{token!r}: a token to add is text without blanks and without the sign \u2581")
            if token in add[:i]:
                raise ValueError(f"{token!r} stands twice: add each token once")
        return add

    def of_kind(self, kind: Kind) -> TokenizerConfig:
        """The same settings for another kind, without what belongs to one kind alone. Raises ValueError as validation."""
        mine = {"model", "coverage"} if kind != "sentencepiece" else set()
        return TokenizerConfig.model_validate({**self.model_dump(exclude=mine), "kind": kind})

    @property
    def least_size(self) -> int:
        """Tokens that this kind has before anything is learnt."""
        alphabet = {"wordpiece": 512, "sentencepiece": 256 + 2 + (self.model == "unigram")}.get(self.kind, 256)
        return alphabet + len(SPECIAL) + len(self.special)

    @model_validator(mode="after")
    def _check_together(self) -> TokenizerConfig:
        if self.path is not None:
            fields = ("kind", "vocab_size", "normalize", "min_frequency", "special", "model", "coverage")
            extra = [f for f in fields if getattr(self, f) != type(self).model_fields[f].default]
            if extra:
                raise ValueError(f"path names a finished tokenizer, so drop {', '.join(extra)} (or drop path)")
        elif self.add:
            raise ValueError("add needs path: name the control tokens of a new tokenizer in special")
        if self.kind != "sentencepiece" and (self.model != "unigram" or self.coverage != 0.9995):
            raise ValueError("model and coverage belong to kind: sentencepiece, so drop them (or set that kind)")
        if self.kind != "byte" and self.vocab_size < self.least_size:
            raise ValueError(
                f"vocab_size {self.vocab_size} is too small: 256 bytes and the special tokens need {self.least_size}"
                + (" (each byte at the beginning and inside of a word)" if self.kind == "wordpiece" else "")
            )
        return self
