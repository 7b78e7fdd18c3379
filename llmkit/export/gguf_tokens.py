"""A tokenizer as our folders hold it -> the one that llama.cpp builds from a GGUF file.

llama.cpp cuts text by regexes of its own, of which a file only names one, and normalises nothing. So only a tokenizer to
which it gives the same ids is written; any other is refused, with the reason.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import tokenizers

from llmkit.config import UserError
from llmkit.tokenizer import Tokenizer
from llmkit.tokenizer.encoder import GPT2_REGEX, GPT4_REGEX, regex_of
from llmkit.tokenizer.pieces import BYTE_OF_CHAR, is_byte_level, model_type, steps_of, vocab_of

QWEN2_REGEX = GPT4_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")  # every digit stands alone
_PRE = {GPT4_REGEX: "llama-bpe", QWEN2_REGEX: "qwen2", GPT2_REGEX: "gpt-2"}
# GPT4_REGEX with merges alone: under `llama-bpe` a word that is a token is taken as it is.
_MERGES_ALONE = "smaug-bpe"
# A file must hold a merge. This character stands for no byte, so no text is ever written with it.
_NO_MERGE = "\u0400 \u0400"
_NORMALIZERS = ("NFC", "NFKC")
_ODD = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
_ENDS_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<|end|>")


@dataclass(frozen=True)
class GGUFTokens:
    """What a file tells of its tokenizer: the keys `tokenizer.ggml.*`."""

    pre: str
    """llama.cpp's name for the regex."""
    tokens: list[str]
    """By id: in the byte alphabet; control tokens and added ones as their text."""
    types: list[int]
    """The `gguf.TokenType` of each."""
    merges: list[str]
    """Two tokens with a blank between them, the first to be merged first."""
    ids: dict[str, int]
    """`bos`, `eos`, `pad`, `unk`, `mask` and `eot` (the end of a turn), where there is such a token."""
    chat_template: str | None
    notes: tuple[str, ...]
    """What a user should know, a sentence each."""


def tokens_of(tokenizer: Tokenizer, name: str, chat: bool) -> GGUFTokens:
    """The tokenizer for llama.cpp. The package `gguf` must be there.

    Args:
        tokenizer: of the model.
        name: its folder, for error messages.
        chat: whether the chat template goes along; a base model was never trained on its own.

    Raises:
        UserError: if llama.cpp would give other ids.
    """
    import gguf

    spec: dict[str, Any] = json.loads(tokenizer.files()["tokenizer.json"])
    where = f"{name}: tokenizer.json"
    pre, notes = _pre_of(spec, where), _normalized(spec, where)
    added = {int(t["id"]): t for t in spec["added_tokens"]}
    texts = {i: token for token, i in vocab_of(spec).items()} | {i: str(t["content"]) for i, t in added.items()}
    tokens, types = [], []
    for i in range(tokenizer.vocab_size):
        kind = gguf.TokenType.NORMAL if i in texts else gguf.TokenType.UNUSED  # ids may have gaps
        if i in added:
            kind = gguf.TokenType.CONTROL if added[i]["special"] else gguf.TokenType.USER_DEFINED
        tokens.append(texts.get(i, f"[unused{i}]"))
        types.append(int(kind))
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    template = tokenizer.chat_template if chat else None
    return GGUFTokens(pre, tokens, types, merges or [_NO_MERGE], _ids_of(tokenizer), template, notes)


def _pre_of(spec: dict[str, Any], where: str) -> str:
    """llama.cpp's name for the way in which this tokenizer cuts and merges."""
    model = spec["model"]
    if model_type(spec) != "BPE" or not is_byte_level(spec):
        kind = f"{model_type(spec)} on {'bytes' if is_byte_level(spec) else 'characters'}"
        raise UserError(f"{where}: is {kind}: only BPE on bytes is written as GGUF (tokenizer.kind bpe or byte)")
    if odd := [key for key in _ODD if model.get(key)]:
        raise UserError(f"{where}: its model has {', '.join(odd)}, which llama.cpp doesn't know")
    if missing := sum(char not in model["vocab"] for char in BYTE_OF_CHAR):
        raise UserError(f"{where}: knows {256 - missing} of the 256 bytes: llama.cpp asks for all of them")
    if not model["merges"]:
        return _PRE[GPT4_REGEX]  # to single bytes it makes no difference where text is cut
    regex = regex_of(spec)
    pre = _PRE.get(regex or "")
    if pre is None:
        how = "by steps of its own" if regex == "" else "nowhere" if regex is None else f"by {regex}"
        raise UserError(f"{where}: text is cut {how}, for which llama.cpp has no name: it would give other ids")
    if bool(model.get("ignore_merges")) == (pre == "llama-bpe") or _all_reachable(spec):
        return pre
    if pre == "llama-bpe":
        return _MERGES_ALONE
    raise UserError(f"{where}: takes whole words that no merge yields (ignore_merges); llama.cpp's {pre} doesn't")


def _all_reachable(spec: dict[str, Any]) -> bool:
    """Whether the merges make one token of every token's text, so that looking it up first changes nothing."""
    merging = {**spec, "normalizer": None, "model": {**spec["model"], "ignore_merges": False}}
    model = tokenizers.Tokenizer.from_str(json.dumps(merging)).model
    added = {t["content"] for t in spec["added_tokens"]}
    return all(len(model.tokenize(token)) == 1 for token in spec["model"]["vocab"] if token not in added)


def _normalized(spec: dict[str, Any], where: str) -> tuple[str, ...]:
    kinds = [step["type"] for step in steps_of(spec.get("normalizer"), "normalizers")]
    if odd := [kind for kind in kinds if kind not in _NORMALIZERS]:
        raise UserError(f"{where}: its normalizer has {odd[0]}: llama.cpp changes no text before it encodes it")
    if not kinds:
        return ()
    return (f"llama.cpp does not normalise text: give it {', '.join(kinds)}, which is what the model learnt from",)


def _ids_of(tokenizer: Tokenizer) -> dict[str, int]:
    unknown = tokenizer.names.get("unk_token")
    # A turn may end with another token than a text does: a file has room for one such.
    ends = {text: i for text, i in tokenizer.special.items() if i in tokenizer.stop_ids and i != tokenizer.eos_id}
    known = [ends[text] for text in _ENDS_OF_TURN if text in ends]
    ids = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "pad": tokenizer.pad_id,
        "unk": None if unknown is None else tokenizer.special.get(unknown),
        "mask": tokenizer.mask_id,
        "eot": next(iter([*known, *ends.values()]), None),
    }
    return {key: i for key, i in ids.items() if i is not None}
