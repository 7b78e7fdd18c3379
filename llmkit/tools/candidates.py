"""Several different answers to each prompt of a file: what `llmkit rank` has ranked and `llmkit sample` chooses from."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmkit.config import UserError, validate
from llmkit.data.config import SourceConfig
from llmkit.data.layouts import Message, read_source
from llmkit.data.sources import where
from llmkit.data.turns import prompt_ids
from llmkit.inference.command import is_chat_model
from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import generate
from llmkit.model.weights import load_model
from llmkit.storage import MANIFEST, resolve_model, sha256_of
from llmkit.tokenizer import Tokenizer
from llmkit.training.dist import pick_device

TRIES = 4  # draws of k answers at most, until k of them differ
# Columns that say what kind of row it is, or whose: beside our own they would make it another.
_OF_PREFERENCES = ("prompt", "responses", "ranking", "scores", "score", "chosen", "rejected", "utility", "comment")
_OF_DIALOGUES = ("messages", "conversations", "completion", "label", "instruction", "history", "question", "prompt_row")
LAYOUT_COLUMNS = frozenset((*_OF_PREFERENCES, *_OF_DIALOGUES, "annotator"))


@dataclass(frozen=True)
class Asked:
    """A prompt of the file."""

    number: int
    """Its row, counted from 1 over all of the file."""
    prompt: list[Message] | str
    fields: dict[str, Any]
    tools: list[Any] | None
    at: str
    """File and row, for messages."""

    @property
    def written(self) -> list[Message] | str:
        """As it is written to a file: a question that stands alone as plain text."""
        alone = isinstance(self.prompt, list) and len(self.prompt) == 1 and self.prompt[0].keys() == {"role", "content"}
        return self.prompt[0]["content"] if alone and self.prompt[0]["role"] == "user" else self.prompt  # type: ignore[index]

    @property
    def others(self) -> dict[str, Any]:
        """The row's other columns, but for those that would change what kind of row it is."""
        kept = {k: v for k, v in self.fields.items() if k not in LAYOUT_COLUMNS}
        return kept if self.tools is None else {**kept, "tools": self.tools}


@dataclass(frozen=True)
class Drawn:
    """One answer of the model."""

    text: str
    ids: list[int]
    """New tokens, with the one that ended them."""
    finished: bool
    """It ended by itself: by the end of turn, or a stop string."""


def read_prompts(path: str, chat: bool, columns: Sequence[str], shuffle: int | None = None) -> list[Asked]:
    """The prompts of a file, a folder, a glob or a hub data set, in the order in which they are to be done.

    Args:
        chat: prompts are conversations; False: plain text.
        columns: `ours=theirs`, where columns are called otherwise.
        shuffle: the seed of another order; None: that of the file.
    """
    pairs = [column.partition("=") for column in columns]
    if any(not (ours and theirs) for ours, _, theirs in pairs):
        raise UserError(f"--column {' '.join(columns)}: expected ours=theirs, such as prompt=question")
    source = SourceConfig(path=path, columns={ours: theirs for ours, _, theirs in pairs})
    found = [
        Asked(number, row.prompt, row.fields, row.tools, where(piece, line))
        for number, (piece, line, row) in enumerate(read_source(source, "prompt", chat), 1)
    ]
    if not found:
        raise UserError(f"{path}: there are no prompts in it")
    if shuffle is not None:
        random.Random(f"order/{shuffle}").shuffle(found)
    return found


def fingerprint(prompts: Sequence[Asked]) -> str:
    """SHA-256 of the prompts with all their columns, whatever kind of file they came from, by the order of the rows."""
    digest = hashlib.sha256()
    for row in sorted(prompts, key=lambda row: row.number):
        digest.update(json.dumps([row.prompt, row.fields, row.tools], sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def sampling_of(args: argparse.Namespace, command: str) -> SamplingConfig:
    """The options of the command line; those not given have SamplingConfig's defaults."""
    for option in ("batch", "limit"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"{command}: --{option} must be at least 1 (got {value})")
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    sampling: SamplingConfig = validate(SamplingConfig, options, {(): command})
    if sampling.temperature == 0:
        raise UserError(f"{command}: --temperature 0 writes the same answer every time: it must be above 0")
    return sampling


class Writer:
    """A model that answers prompts; what it answers to one depends on the seed and the prompt's number alone."""

    def __init__(self, args: argparse.Namespace, sampling: SamplingConfig, dtype: torch.dtype | None = None):
        self.folder = resolve_model(args.model)
        self.tokenizer = Tokenizer.load(self.folder)
        self.chat = not args.raw and is_chat_model(self.folder, self.tokenizer)
        self.model = load_model(self.folder, dtype, pick_device(args.device))
        self._sampling, self._seed = sampling, args.seed

    def encode(self, row: Asked) -> list[int]:
        """The prompt's ids. Raises UserError, naming the row, for one that the template refuses."""
        try:
            return prompt_ids(self.tokenizer, row.prompt, self.chat, row.tools)
        except UserError as e:
            raise UserError(f"{row.at}: {e}") from None

    def fitting(self, rows: Sequence[Asked], say: Callable[[str], None]) -> list[Asked]:
        """The prompts behind which there is room for an answer; `say` is told how many are left out."""
        longest = self.model.config.max_seq_len
        lengths = [len(self.encode(row)) for row in rows]
        kept = [row for row, n in zip(rows, lengths, strict=True) if n < longest]
        if not kept:
            raise UserError(f"no prompt is shorter than the model's context of {longest} tokens")
        if len(kept) < len(rows):
            say(
                f"{len(rows) - len(kept)} of {len(rows)} prompts fill the model's context of {longest} tokens: left out"
            )
        return kept

    def draw(self, rows: Sequence[Asked], n: int) -> list[list[Drawn]]:
        """n answers to each prompt, as they come."""
        return self._draw(rows, n, 0)

    def differing(self, rows: Sequence[Asked], k: int) -> list[list[Drawn]]:
        """k answers to each prompt, all different, finished and not blank; fewer where TRIES * k draws give no more."""
        found: list[dict[str, Drawn]] = [{} for _ in rows]
        for attempt in range(TRIES):
            wanting = [i for i, answers in enumerate(found) if len(answers) < k]
            for i, answers in zip(wanting, self._draw([rows[i] for i in wanting], k, attempt), strict=True):
                for answer in answers:
                    if answer.finished and answer.text.strip() and len(found[i]) < k:
                        found[i].setdefault(answer.text.strip(), answer)
        return [list(answers.values()) for answers in found]

    def _draw(self, rows: Sequence[Asked], n: int, attempt: int) -> list[list[Drawn]]:
        if not rows:
            return []
        sampling = self._sampling.model_copy(update={"n": n})
        seeds = [random.Random(f"{self._seed}/{row.number}/{attempt}").getrandbits(63) for row in rows]
        made = generate(self.model, [self.encode(row) for row in rows], sampling, tokenizer=self.tokenizer, seeds=seeds)
        drawn = [Drawn(m.text, m.ids, m.finish_reason == "stop") for m in made]
        return [drawn[i * n : (i + 1) * n] for i in range(len(rows))]

    def settings(self) -> dict[str, Any]:
        """What the answers depend on, for `Ledger`."""
        manifest = self.folder / MANIFEST
        files = [manifest] if manifest.is_file() else sorted(self.folder.glob("*.safetensors"))
        weights = hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()
        return {
            "model": str(self.folder),
            "weights": weights,
            "chat": self.chat,
            "sampling": self._sampling.model_dump(mode="json"),
            "seed": self._seed,
        }


def check_out(path: str) -> Path:
    """The file to write; UserError if its name isn't that of a file of JSON lines."""
    out = Path(path)
    if out.suffix != ".jsonl":
        raise UserError(f"--out {path}: rows are written as JSON lines: its name must end in .jsonl")
    return out


def blocks(rows: Sequence[Asked], size: int) -> list[Sequence[Asked]]:
    """So many prompts at a time."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]
