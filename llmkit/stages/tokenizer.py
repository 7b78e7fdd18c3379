"""Trains a tokenizer and reports how well it serves each language."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from llmkit.config import dump
from llmkit.data.config import DataConfig
from llmkit.data.texts import texts
from llmkit.data.workers import HELD_OUT
from llmkit.stages.recipes import TokenizerRecipe
from llmkit.storage import replace_file, to_json
from llmkit.tokenizer import Tokenizer, TokenizerConfig, format_report, report

_REPORT_DOCUMENTS = 5000
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")


def by_language(documents: Iterable[str]) -> dict[str, list[str]]:
    """Documents by their script: those in which at least a tenth of the characters are Chinese, and the others."""
    groups: dict[str, list[str]] = {"zh": [], "other": []}
    for text in documents:
        groups["zh" if 10 * len(_HAN.findall(text)) >= len(text) else "other"].append(text)
    return {name: group for name, group in groups.items() if group}


def obtain(cfg: TokenizerConfig, data: DataConfig, out: Path) -> Tokenizer:
    """The tokenizer of a recipe: loaded from its `path`, else from `out`, else trained on the training text and kept there.

    What is kept in `out` counts only if it was made from the same section of the recipe.
    """
    if cfg.path is not None:
        return Tokenizer.from_config(cfg)
    if (out / "recipe.yaml").is_file() and (out / "recipe.yaml").read_text("utf-8") == dump(cfg):
        return Tokenizer.load(out)
    # The normaliser must be known before the tokenizer is, for documents are split by the hash of their normalised text.
    normalize = Tokenizer.train((), TokenizerConfig(kind="byte", normalize=cfg.normalize)).normalize
    tokenizer = Tokenizer.train(texts(data, normalize), cfg)
    for name, content in tokenizer.files().items():
        replace_file(out / name, content)
    replace_file(out / "recipe.yaml", dump(cfg))  # last: without it the files above are made anew
    return tokenizer


def run(recipe: TokenizerRecipe) -> None:
    """Trains, writes the folder and prints the report (held-out text, by language)."""
    out = Path(recipe.out)
    tokenizer = obtain(recipe.tokenizer, recipe.data, out)
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
