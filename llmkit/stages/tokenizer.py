"""Trains a tokenizer and reports how well it serves each language, or trains several kinds and compares them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from llmkit.data.texts import normalizer_of, obtain_tokenizer, texts
from llmkit.data.workers import HELD_OUT
from llmkit.stages.recipes import TokenizerRecipe
from llmkit.storage import replace_file, to_json
from llmkit.tokenizer import Tokenizer

_REPORT_DOCUMENTS = 5000
_N_LONGEST = 5
_TIMED_RUNS = 3
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")


def by_language(documents: Iterable[str]) -> dict[str, list[str]]:
    """Documents by their script: those in which at least a tenth of the characters are Chinese, and the others."""
    groups: dict[str, list[str]] = {"zh": [], "other": []}
    for text in documents:
        groups["zh" if 10 * len(_HAN.findall(text)) >= len(text) else "other"].append(text)
    return {name: group for name, group in groups.items() if group}


def report(tokenizer: Tokenizer, texts_by_language: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    """How well a tokenizer serves each language: sizes, and texts that don't survive (there should be none).

    `single_byte_frac` is the share of tokens that are one byte: of Chinese, what the vocabulary has no word for. `longest`
    are the longest tokens that the texts were cut into.
    """
    languages = {}
    for language, documents in texts_by_language.items():
        n_texts = n_bytes = n_chars = n_tokens = n_single = failures = 0
        used: set[int] = set()
        for text in documents:
            ids, normal = tokenizer.encode(text), tokenizer.normalize(text)
            n_texts += 1
            n_bytes += len(normal.encode("utf-8"))
            n_chars += len(normal)
            n_tokens += len(ids)
            n_single += sum(len(tokenizer.token_bytes(i)) == 1 for i in ids)
            failures += tokenizer.decode(ids) != normal
            used.update(ids)
        languages[language] = {
            "texts": n_texts,
            "bytes": n_bytes,
            "tokens": n_tokens,
            "bytes_per_token": n_bytes / max(1, n_tokens),
            "chars_per_token": n_chars / max(1, n_tokens),
            "single_byte_frac": n_single / max(1, n_tokens),
            "round_trip_failures": failures,
            "longest": _longest(tokenizer, used),
        }
    return {
        "vocab_size": tokenizer.vocab_size,
        "asked_vocab_size": tokenizer.asked_vocab_size,
        "hash": tokenizer.hash,
        "lossless": tokenizer.lossless,
        "lost": tokenizer.lost,
        "languages": languages,
    }


def _longest(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """The longest of these tokens that are whole characters, as text."""
    found = set()
    for i in ids:
        try:
            found.add(tokenizer.token_bytes(i).decode("utf-8"))
        except UnicodeDecodeError:
            continue
    return sorted(found, key=lambda t: (-len(t), t))[:_N_LONGEST]


_HEADS = ("texts", "bytes", "tokens", "bytes/token", "chars/token", "single bytes", "round trip")


def _cells(v: Mapping[str, Any]) -> list[str]:
    failed = v["round_trip_failures"]
    return [str(v["texts"]), str(v["bytes"]), str(v["tokens"]), f"{v['bytes_per_token']:.2f}", f"{v['chars_per_token']:.2f}",
            f"{100 * v['single_byte_frac']:.1f} %", f"{failed} failed" if failed else "ok"]  # fmt: skip


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they must be; the first is flush left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:], strict=True))]) for r in rows
    ]


def format_report(data: Mapping[str, Any]) -> str:
    """The report as a plain-text table."""
    asked = data["asked_vocab_size"]
    short = f" of {asked} asked for" if asked is not None and asked != data["vocab_size"] else ""
    loss = "" if data["lossless"] else f"\nnot lossless by its own definition: {data['lost']!r} does not survive"
    rows = [("language", *_HEADS), *((name, *_cells(v)) for name, v in data["languages"].items())]
    longest = [f"longest tokens, {name}: {' '.join(map(repr, v['longest']))}" for name, v in data["languages"].items()]
    lines = [f"vocabulary {data['vocab_size']}{short}, hash {data['hash'][:12]}{loss}", *_table(rows), *longest]
    return "\n".join(lines)


# --- comparing kinds -------------------------------------------------------------------------------------------------


def compare(recipe: TokenizerRecipe, should_stop: Callable[[], bool] | None = None) -> dict[str, Any]:
    """Trains each kind on the same texts in the same order, and reports on the same held-out texts.

    The texts are held in memory, so that what is timed is training alone.
    """
    normalize = normalizer_of(recipe.tokenizer)
    train = list(texts(recipe.data, normalize))
    held_out = by_language(islice(texts(recipe.data, normalize, HELD_OUT), _REPORT_DOCUMENTS))
    kinds = {}
    for kind in recipe.compare:
        start = time.perf_counter()
        tokenizer = Tokenizer.train(train, recipe.tokenizer.of_kind(kind), should_stop)
        train_s = time.perf_counter() - start
        for name, content in tokenizer.files().items():
            replace_file(Path(recipe.out) / kind / name, content)
        told = report(tokenizer, held_out)
        for language, documents in held_out.items():
            told["languages"][language]["encode_mb_per_s"] = _encode_speed(tokenizer, documents)
        kinds[kind] = {"train_s": train_s, **told}
    return {"train_texts": len(train), "train_bytes": sum(len(t.encode("utf-8")) for t in train), "kinds": kinds}


def _encode_speed(tokenizer: Tokenizer, documents: Sequence[str]) -> float:
    """MB of UTF-8 a second on one thread, the best of a few runs."""
    seconds = []
    for _ in range(_TIMED_RUNS):
        start = time.perf_counter()
        tokenizer.encode_batch(documents)
        seconds.append(time.perf_counter() - start)
    return sum(len(t.encode("utf-8")) for t in documents) / 1e6 / min(seconds)


def _compared(data: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """One table a language; its first row holds the heads."""
    kinds = data["kinds"]
    heads = ["kind", "vocabulary", "training s", "encode MB/s", *_HEADS[3:], "longest tokens"]
    tables: dict[str, list[list[str]]] = {}
    for kind, told in kinds.items():
        for language, v in told["languages"].items():
            row = [
                kind,
                str(told["vocab_size"]),
                f"{told['train_s']:.1f}",
                f"{v['encode_mb_per_s']:.1f}",
                *_cells(v)[3:],
            ]
            tables.setdefault(language, [heads]).append([*row, " ".join(map(repr, v["longest"][:3]))])
    return tables


def format_comparison(data: Mapping[str, Any], markdown: bool = False) -> str:
    """The comparison as tables, plain or Markdown."""
    lines = [f"trained on {data['train_texts']} texts, {data['train_bytes']} bytes; measured on held-out text"]
    for language, rows in _compared(data).items():
        lines += ["", f"## {language}" if markdown else f"{language}:", *([""] if markdown else [])]
        if markdown:
            cells = [[c.replace("|", "\\|") for c in row] for row in rows]
            lines += [f"| {' | '.join(row)} |" for row in cells]
            lines.insert(len(lines) - len(rows) + 1, "|---" + "|---:" * (len(rows[0]) - 2) + "|---|")
        else:
            lines += _table(rows)
    return "\n".join(lines)


# --- the stage -------------------------------------------------------------------------------------------------------


def run(recipe: TokenizerRecipe) -> None:
    """Trains, writes the folder and prints the report (held-out text, by language). Ctrl-C stops at once."""
    out = Path(recipe.out)
    if recipe.compare:
        told = compare(recipe)
        replace_file(out / "compare.json", to_json(told))
        replace_file(out / "compare.md", (format_comparison(told, markdown=True) + "\n").encode("utf-8"))
        print(f"{format_comparison(told)}\n{out}: compare.md, compare.json, and a folder of each kind")
        return
    tokenizer = obtain_tokenizer(recipe.tokenizer, recipe.data, out)
    held_out = islice(texts(recipe.data, tokenizer.normalize, HELD_OUT), _REPORT_DOCUMENTS)
    told = report(tokenizer, by_language(held_out))
    replace_file(out / "report.json", to_json(told))
    print(f"{format_report(told)}\n{out}: tokenizer.json, tokenizer_config.json, report.json")


def prepare(recipe: TokenizerRecipe) -> bool:
    """A tokenizer has no shards to prepare; its text is read as it is."""
    return True


def plan(recipe: TokenizerRecipe) -> Iterator[str]:
    """Nothing to plan but the folder."""
    yield f"trains a {' and '.join(recipe.compare) or recipe.tokenizer.kind} tokenizer into {recipe.out}"
