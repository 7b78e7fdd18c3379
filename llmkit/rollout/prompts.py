"""The prompts that a policy is trained on: read once, kept in memory, drawn in an order that is a function of the seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmkit.config import Interrupted, UserError
from llmkit.data.config import DataConfig, SourceConfig
from llmkit.data.layouts import Prompt, read_source
from llmkit.data.order import SampleOrder
from llmkit.data.sources import where
from llmkit.data.turns import prompt_ids
from llmkit.data.workers import is_held_out
from llmkit.tokenizer import Tokenizer


@dataclass(frozen=True)
class PromptRow:
    """One prompt, encoded up to where the answer begins."""

    ids: list[int]
    prompt: list[dict[str, Any]] | str
    fields: dict[str, Any] = field(repr=False)
    tools: list[Any] | None
    number: int
    """Its place among all prompts of a run."""


@dataclass(frozen=True)
class PromptData:
    """A run's prompts, by split and source."""

    train: list[list[PromptRow]]
    valid: list[list[PromptRow]]
    test: list[list[PromptRow]]
    weights: list[float]
    """The share of each training source in what is drawn."""
    n_cut: int
    """How many prompts lost tokens at their beginning."""
    fingerprint: str
    """Hex: equal for equal prompts and splits."""

    @property
    def all(self) -> list[PromptRow]:
        """Every prompt, at its own number."""
        rows = [row for split in (self.train, self.valid, self.test) for source in split for row in source]
        return sorted(rows, key=lambda row: row.number)


class PromptOrder:
    """Which prompts are drawn when: sample g of the run is a function of (seed, g)."""

    def __init__(self, data: PromptData, seed: int):
        self._sources = data.train
        self._order = SampleOrder([len(s) for s in data.train], data.weights, seed)

    def draw(self, first: int, n: int) -> list[PromptRow]:
        """Prompts number first to first + n - 1 of the run."""
        source, row = self._order.rows(np.arange(first, first + n))
        return [self._sources[s][r] for s, r in zip(source.tolist(), row.tolist(), strict=True)]


def read_prompts(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    max_len: int,
    *,
    check: Callable[[Mapping[str, Any]], None] = lambda fields: None,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
) -> PromptData:
    """Reads and encodes a recipe's prompts.

    Args:
        max_len: longer prompts lose tokens at their beginning, so that the assistant's header stays.
        check: raises UserError for a row that the rewards can't grade.

    Raises:
        UserError: naming file and row.
        Interrupted: should_stop() said so.
    """
    count, n_cut = 0, 0

    def read(source: SourceConfig, frac: float) -> tuple[list[PromptRow], list[PromptRow]]:
        nonlocal count, n_cut
        kept: tuple[list[PromptRow], list[PromptRow]] = ([], [])
        for piece, number, found in read_source(source, "prompt", cfg.chat, system=cfg.system, say=say):
            if should_stop():
                raise Interrupted("stopped while prompts were being read; run again to go on")
            assert isinstance(found, Prompt)
            try:
                check(found.fields)
                ids = prompt_ids(tokenizer, found.prompt, cfg.chat, found.tools)
            except UserError as e:
                raise UserError(f"{where(piece, number)}: {e}") from None
            n_cut += len(ids) > max_len
            row = PromptRow(ids[-max_len:], found.prompt, found.fields, found.tools, count)
            key = hashlib.sha256(json.dumps(found.prompt, ensure_ascii=False).encode()).hexdigest()
            kept[bool(frac) and is_held_out(key, frac)].append(row)
            count += 1
        if not kept[0]:
            raise UserError(f"{source.label}: no prompt in it")
        return kept

    train = [read(s, cfg.valid_frac if not cfg.valid else 0.0) for s in cfg.sources]
    valid = [read(s, 0.0)[0] for s in cfg.valid] or [held_out for _, held_out in train if held_out]
    test = [read(s, 0.0)[0] for s in cfg.test]
    kept = [k for k, _ in train]
    weights = [
        len(rows) * s.epochs if s.epochs is not None else s.weight for rows, s in zip(kept, cfg.sources, strict=True)
    ]
    return PromptData(kept, valid, test, weights, n_cut, _fingerprint([kept, valid, test]))


def _fingerprint(splits: Sequence[Sequence[Sequence[PromptRow]]]) -> str:
    digest = hashlib.sha256()
    for split in splits:
        for source in split:
            for row in source:
                told = json.dumps([row.ids, row.fields], sort_keys=True, ensure_ascii=False, default=str)
                digest.update(told.encode())
            digest.update(b"|")
        digest.update(b"#")
    return digest.hexdigest()
