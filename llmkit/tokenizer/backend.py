"""tokenizer.json -> the library's tokenizer for text of users, and what is left to do around it."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any, Literal

import tokenizers

from llmkit.config import UserError
from llmkit.tokenizer.config import MASKS, is_control
from llmkit.tokenizer.folders import FLAGS, Folder
from llmkit.tokenizer.pieces import Pieces, model_type, steps_of
from llmkit.tokenizer.sentencepiece import CharsMap, chars_map

_TEXT_STEPS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents")


def unmatchable(text: str) -> str:
    """The name that a control token has in a backend: with blanks, so that no text matches it."""
    return f" {text} "


def build_backend(spec: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
    """The library's tokenizer for text of users, and which of its ids are others in truth.

    A Unigram model would find control tokens in any text, as they are among its pieces, and so does BPE that looks for
    whole words. Here they get names with blanks, which no text holds once its blanks are signs. (Then added tokens may
    get other ids than they should.)
    """
    model = spec["model"]
    added = spec["added_tokens"]
    special = {t["content"] for t in added if t["special"]}
    if model_type(spec) == "Unigram":
        named = [[unmatchable(piece) if piece in special else piece, score] for piece, score in model["vocab"]]
        spec = {**spec, "model": {**model, "vocab": named}}
    elif model.get("ignore_merges") and special & set(model["vocab"]):
        renamed = {unmatchable(piece) if piece in special else piece: i for piece, i in model["vocab"].items()}
        unknown = model.get("unk_token")
        unknown = unmatchable(unknown) if unknown in special and unknown in model["vocab"] else unknown
        spec = {**spec, "model": {**model, "vocab": renamed, "unk_token": unknown}}
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    backend.encode_special_tokens = True
    ids = [(backend.token_to_id(t["content"]), int(t["id"])) for t in added if not t["special"]]
    return backend, {got: true for got, true in ids if got is not None and got != true}


def without_charsmap(spec: dict[str, Any]) -> tuple[dict[str, Any], CharsMap | None]:
    """The character map of a sentencepiece model that was read here, and the rest, which `tokenizers` does."""
    steps = steps_of(spec.get("normalizer"), "normalizers")
    found = [step for step in steps if "exact" in step]
    if not found:
        return spec, None
    rest = {"type": "Sequence", "normalizers": [step for step in steps if "exact" not in step]}
    return {**spec, "normalizer": rest}, chars_map(found[0]["precompiled_charsmap"], tuple(found[0]["exact"]))


def text_normalizer(spec: dict[str, Any]) -> tuple[Any, str | None, bool]:
    """The steps of the normalizer that change text but not how it is written (no signs for spaces), what they are, and
    whether that is all of them."""
    steps = steps_of(spec.get("normalizer"), "normalizers")
    n = next((i for i, step in enumerate(steps) if step["type"] not in _TEXT_STEPS), len(steps))
    part = {"type": "Sequence", "normalizers": steps[:n]}
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    shell = {"version": "1.0", "added_tokens": [], "normalizer": part, "model": empty}
    kind = None if n == 0 else steps[0]["type"] if n == 1 else "Sequence"
    return tokenizers.Tokenizer.from_str(json.dumps(shell)).normalizer, kind, n == len(steps)


def without_prefix(spec: dict[str, Any]) -> tuple[Literal["never", "first", "always"], dict[str, Any]]:
    """Where this tokenizer puts a space before text (never; at its beginning; also after control tokens), and the same
    without that space."""
    bare = copy.deepcopy({k: v for k, v in spec.items() if k != "model"}) | {"model": spec["model"]}
    where: Literal["never", "first", "always"] = "never"
    kept = [s for s in steps_of(bare.get("normalizer"), "normalizers") if s["type"] != "Prepend"]
    if len(kept) != len(steps_of(bare.get("normalizer"), "normalizers")):
        where, bare["normalizer"] = "always", {"type": "Sequence", "normalizers": kept}
    for step in steps_of(bare.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            where, step["add_prefix_space"] = "always", False
        elif step["type"] == "Metaspace":
            scheme = step.pop("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            step.pop("add_prefix_space", None)
            where = where if scheme == "never" else scheme
            step["prepend_scheme"] = "never"
    return where, bare


def add_tokens(found: Folder, tokens: Sequence[str]) -> None:
    """Puts new tokens after all that there are."""
    spec = found.spec
    if not tokens:
        return
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    pieces = Pieces(spec, backend)
    known = {*pieces.rest, *pieces.first, *(t["content"].encode("utf-8") for t in spec["added_tokens"])}
    for i, token in enumerate(tokens, pieces.size):
        if token.encode("utf-8") in known:
            raise UserError(f"tokenizer.add: {token!r} is a token of this tokenizer already: drop it")
        control = is_control(token)
        if not control and without_prefix(spec)[0] == "always":
            raise UserError(
                f"tokenizer.add: this tokenizer puts a space before every text, so also behind {token!r}: only control "
                "tokens such as <|name|> can be added"
            )
        # Plain text is found in normalised text, where normalising leaves the token as it is.
        normal = backend.normalizer is None or backend.normalizer.normalize_str(token) == token
        flags = {**FLAGS, "normalized": normal and not control, "special": control}
        spec["added_tokens"].append({"id": i, "content": token, **flags})
        if token in MASKS and found.names.get("mask_token") is None:
            found.names["mask_token"] = token
    loaded = tokenizers.Tokenizer.from_str(json.dumps(spec))
    wrong = [t for i, t in enumerate(tokens, pieces.size) if loaded.token_to_id(t) != i]
    if wrong:
        raise UserError(f"tokenizer.add: the ids of this tokenizer have gaps, so {wrong[0]!r} cannot be added")
