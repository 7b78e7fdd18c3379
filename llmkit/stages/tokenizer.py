"""Trains a tokenizer and reports how well it serves each language."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from llmkit.data.texts import obtain_tokenizer, texts
from llmkit.data.workers import HELD_OUT
from llmkit.stages.recipes import TokenizerRecipe
from llmkit.storage import replace_file, to_json
from llmkit.tokenizer import Tokenizer

_REPORT_DOCUMENTS = 5000
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")


def by_language(documents: Iterable[str]) -> dict[str, list[str]]:
    """Documents by their script: those in which at least a tenth of the characters are Chinese, and the others."""
    groups: dict[str, list[str]] = {"zh": [], "other": []}
    for text in documents:
        groups["zh" if 10 * len(_HAN.findall(text)) >= len(text) else "other"].append(text)
    return {name: group for name, group in groups.items() if group}


def report(tokenizer: Tokenizer, texts_by_language: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    """How well a tokenizer serves each language: sizes, and texts that don't survive (there should be none).

    `single_byte_frac` is the share of tokens that are one byte: of Chinese, what the vocabulary has no word for.
    """
    languages = {}
    for language, documents in texts_by_language.items():
        n_texts = n_bytes = n_chars = n_tokens = n_single = failures = 0
        for text in documents:
            ids, normal = tokenizer.encode(text), tokenizer.normalize(text)
            n_texts += 1
            n_bytes += len(normal.encode("utf-8"))
            n_chars += len(normal)
            n_tokens += len(ids)
            n_single += sum(len(tokenizer.token_bytes(i)) == 1 for i in ids)
            failures += tokenizer.decode(ids) != normal
        languages[language] = {
            "texts": n_texts,
            "bytes": n_bytes,
            "tokens": n_tokens,
            "bytes_per_token": n_bytes / max(1, n_tokens),
            "chars_per_token": n_chars / max(1, n_tokens),
            "single_byte_frac": n_single / max(1, n_tokens),
            "round_trip_failures": failures,
        }
    return {
        "vocab_size": tokenizer.vocab_size,
        "asked_vocab_size": tokenizer.asked_vocab_size,
        "hash": tokenizer.hash,
        "languages": languages,
    }


def format_report(data: Mapping[str, Any]) -> str:
    """The report as a plain-text table."""
    asked = data["asked_vocab_size"]
    short = f" of {asked} asked for" if asked is not None and asked != data["vocab_size"] else ""
    lines = [f"vocabulary {data['vocab_size']}{short}, hash {data['hash'][:12]}"]
    heads = ("language", "texts", "bytes", "tokens", "bytes/token", "chars/token", "single bytes", "round trip")
    rows = [
        (name, str(v["texts"]), str(v["bytes"]), str(v["tokens"]), f"{v['bytes_per_token']:.2f}",
         f"{v['chars_per_token']:.2f}", f"{100 * v['single_byte_frac']:.1f} %",
         f"{v['round_trip_failures']} failed" if v["round_trip_failures"] else "ok")
        for name, v in data["languages"].items()
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    for row in [heads, *rows]:
        lines.append(
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        )
    return "\n".join(lines)


def run(recipe: TokenizerRecipe) -> None:
    """Trains, writes the folder and prints the report (held-out text, by language)."""
    out = Path(recipe.out)
    tokenizer = obtain_tokenizer(recipe.tokenizer, recipe.data, out)
    held_out = islice(texts(recipe.data, tokenizer.normalize, HELD_OUT), _REPORT_DOCUMENTS)
    told = report(tokenizer, by_language(held_out))
    replace_file(out / "report.json", to_json(told))
    print(f"{format_report(told)}\n{out}: tokenizer.json, tokenizer_config.json, report.json")


def prepare(recipe: TokenizerRecipe) -> bool:
    """A tokenizer has no shards to prepare; its text is read as it is."""
    return True


def plan(recipe: TokenizerRecipe) -> str:
    """Nothing to plan but the folder."""
    return f"trains a {recipe.tokenizer.kind} tokenizer into {recipe.out}"
