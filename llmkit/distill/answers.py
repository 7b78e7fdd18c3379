"""Sequence-level distillation: the teacher's own answers take the place of the data's (Kim and Rush 2016, arXiv 1606.07947).

They are written once, a shard of rows at a time, and kept in the cache as conversations that are read like any others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmkit import storage
from llmkit.config import Interrupted, UserError
from llmkit.data.cache import ContentHashes, cache_writable, key_of, locked
from llmkit.data.config import DataConfig, SourceConfig
from llmkit.data.layouts import Dialogue, read_source
from llmkit.data.row import UnusableRow
from llmkit.data.sources import Piece, files_of, where
from llmkit.data.turns import prompt_ids
from llmkit.distill.config import TeacherAnswersConfig
from llmkit.inference.config import SamplingConfig
from llmkit.inference.generate import generate
from llmkit.inference.logprobs import folder_files
from llmkit.model.gpt import GPT
from llmkit.tokenizer import Tokenizer
from llmkit.training.engine import seed_of

_VERSION = 1
_SHARD_ROWS = 256  # so many answers are lost at most when the work is killed


@dataclass(frozen=True)
class _Row:
    """A row of the source."""

    number: int
    """Counted from 0 in the whole source: its seed."""
    piece: Piece
    place: int
    """Its number in the piece."""
    dialogue: Dialogue | None
    why: str = ""
    """What is wrong with a row that holds no conversation."""


@dataclass
class _Counts:
    """What became of the rows."""

    answered: int = 0
    cut: int = 0
    """Answers that were not done after max_new_tokens, or at the end of the teacher's context."""
    empty: int = 0
    """Answers without a word."""
    too_long: int = 0
    """Questions that fill the teacher's context."""
    unasked: int = 0
    """Conversations that begin with the answer."""
    unusable: int = 0
    """Rows that hold no conversation: they are passed on, so that whoever reads the answers counts them."""

    def add(self, other: _Counts) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def teacher_dialogues(
    cfg: TeacherAnswersConfig,
    source: SourceConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    teacher: Callable[[], GPT],
    *,
    folders: Sequence[Path],
    precision: str,
    seed: int = 0,
    part: tuple[int, int] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """The conversations of a source with the teacher's words as their last answer: a jsonl file in `data.cache_dir`.

    It is keyed by a hash of the teacher's files and tokenizer, of the data and of all that the answers depend on. An answer
    is a function of the seed and its row's number. Work that was cut short goes on with the first shard that is missing,
    to the same bytes.

    Args:
        source: rows of any layout of a dialogue; what follows the last answer is dropped.
        data: says where the cache is, whether prompts are conversations, and their system message.
        tokenizer: the teacher's own.
        teacher: gives the model; called only if an answer is missing.
        folders: those of the teacher, for its hash.
        precision: what it is computed in, for the hash too.
        part: (i, n): only the shards i, i + n, i + 2 n ..., counted from 1, for n jobs that share a cache. The file is then
            written by a call without it.
        say: is told how far it is, and at the end how many answers were left out.

    Raises:
        UserError: naming file and row, for one that is no conversation; if no answer came to its end.
        Interrupted: should_stop() said so; the shards that are done are kept.
    """
    files, cache = files_of(source), Path(data.cache_dir)
    hashes = ContentHashes(cache)
    key = {
        "version": _VERSION,
        "teacher": [hashes.of(folder_files(folder)) for folder in folders],
        "tokenizer": (tokenizer.hash, tokenizer.template_hash, tokenizer.names),
        "files": [(f.kind, f.compression, h) for f, h in zip(files, hashes.of(files), strict=True)],
        "columns": source.columns,
        "limit": source.limit,
        "chat": data.chat,
        "system": data.system,
        "settings": cfg.model_dump(mode="json", exclude={"batch_size"}),
        "precision": precision,
        "seed": seed,
    }
    hashes.save()
    file = cache / f"{key_of(key)[:32]}.answers.jsonl"
    if file.is_file():
        return file
    folder = file.with_suffix(".parts")
    with locked(folder, should_stop, shared=part is not None):
        if file.is_file():  # another run was faster
            return file
        writer = _Writer(cfg, data.chat, tokenizer, teacher, seed, should_stop)
        shards = _write_shards(_rows_of(source, data, say), folder, writer, part, lambda n: _tell(say, source, n))
        if part is None:
            _join(shards, file, source.label, cfg.max_new_tokens, say)
            shutil.rmtree(folder, ignore_errors=True)
    return file


def source_of_answers(source: SourceConfig, file: Path) -> SourceConfig:
    """A source whose rows are in this file, as `teacher_dialogues` wrote them, under its old name and weight."""
    return SourceConfig(path=str(file), name=source.label, weight=source.weight, epochs=source.epochs)


def _tell(say: Callable[[str], None], source: SourceConfig, n: int) -> None:
    say(f"answers    the teacher has answered {n:,} rows of {source.label}")


# --- rows ------------------------------------------------------------------------------------------------------------


def _rows_of(source: SourceConfig, data: DataConfig, say: Callable[[str], None]) -> Iterator[list[_Row]]:
    """The rows of a source in its order, a shard's at a time."""
    waiting: list[_Row] = []
    n = 0

    def take(piece: Piece, place: int, dialogue: Dialogue | None, why: str = "") -> None:
        nonlocal n
        waiting.append(_Row(n, piece, place, dialogue, why))
        n += 1

    def unusable(piece: Piece, place: int, why: UnusableRow) -> None:
        take(piece, place, None, str(why))

    for piece, place, dialogue in read_source(
        source, "dialogue", data.chat, system=data.system, say=say, on_unusable=unusable
    ):
        take(piece, place, dialogue)
        while len(waiting) >= _SHARD_ROWS:
            yield waiting[:_SHARD_ROWS]
            del waiting[:_SHARD_ROWS]
    for start in range(0, len(waiting), _SHARD_ROWS):
        yield waiting[start : start + _SHARD_ROWS]


def _write_shards(
    shards: Iterator[list[_Row]],
    folder: Path,
    writer: _Writer,
    part: tuple[int, int] | None,
    tell: Callable[[int], None],
) -> list[Path]:
    """Writes those that are missing; all of them in their order.

    The first line of a shard's file counts its rows, the others are conversations.
    """
    number, of = part or (1, 1)
    found = []
    for n, rows in enumerate(shards):
        file = folder / f"{n:06d}.jsonl"
        found.append(file)
        if n % of != number - 1 or file.is_file():
            continue
        conversations, counts = writer.answer(rows)
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in (asdict(counts), *conversations)]
        with cache_writable(folder):
            storage.replace_file(file, "".join(lines))
        tell(rows[-1].number + 1)
    return found


def _join(shards: list[Path], file: Path, name: str, max_new_tokens: int, say: Callable[[str], None]) -> None:
    """One file of all shards."""
    counts, lines = _Counts(), []
    for shard in shards:
        try:
            first, *rest = shard.read_text("utf-8").splitlines(keepends=True)
            counts.add(_Counts(**json.loads(first)))
        except (OSError, ValueError, TypeError) as e:
            raise UserError(f"{shard}: damaged: {e}: delete it and start again") from None
        lines += rest
    if not counts.answered:
        raise UserError(
            f"{name}: none of the teacher's answers can be learnt: {counts.cut:,} were not done after {max_new_tokens} "
            f"tokens (teacher_answers.max_new_tokens), {counts.empty:,} are empty, {counts.too_long:,} questions fill its "
            f"context, {counts.unasked:,} rows ask nothing, {counts.unusable:,} are no conversations"
        )
    with cache_writable(file.parent):
        storage.replace_file(file, "".join(lines))
    left_out = {
        f"not done after {max_new_tokens} tokens": counts.cut,
        "without a word": counts.empty,
        "whose question fills the teacher's context": counts.too_long,
        "that ask nothing": counts.unasked,
    }
    told = "".join(f"; left out: {n:,} {why}" for why, n in left_out.items() if n)
    say(f"answers    {counts.answered:,} by the teacher for {name}{told}")


# --- answers ---------------------------------------------------------------------------------------------------------


class _Writer:
    """Has the teacher answer rows. It is loaded when the first is asked for."""

    def __init__(
        self,
        cfg: TeacherAnswersConfig,
        chat: bool,
        tokenizer: Tokenizer,
        teacher: Callable[[], GPT],
        seed: int,
        should_stop: Callable[[], bool],
    ):
        self._cfg, self._chat, self._tokenizer, self._seed = cfg, chat, tokenizer, seed
        self._load, self._should_stop = teacher, should_stop
        self._model: GPT | None = None
        self._sampling = SamplingConfig(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)

    def answer(self, rows: Sequence[_Row]) -> tuple[list[dict[str, Any]], _Counts]:
        """The conversations that a shard is made of, in the order of its rows, and what became of the others."""
        counts = _Counts()
        prompts = {row.number: ids for row in rows if (ids := self._prompt(row, counts)) is not None}
        texts = self._written(prompts, counts)
        made: list[dict[str, Any]] = []
        for row in rows:
            if row.dialogue is None:
                # Nobody's words: such a row is counted by whoever reads this, as the source's own would be.
                nothing = [{"role": role, "content": ""} for role in ("user", "assistant")]
                made.append({"messages": nothing, "left_out": row.why})
            elif (text := texts.get(row.number)) is not None:
                tools = {} if row.dialogue.tools is None else {"tools": row.dialogue.tools}
                answer = {"role": "assistant", "content": text}
                made.append({"messages": [*_before_answer(row.dialogue), answer], **tools})
                counts.answered += 1
        return made, counts

    def _prompt(self, row: _Row, counts: _Counts) -> list[int] | None:
        """The ids that the answer follows; None, and counted, if there is nothing to answer."""
        if row.dialogue is None:
            counts.unusable += 1
            return None
        asked = _before_answer(row.dialogue)
        if not any(m["role"] in ("user", "tool") for m in asked):
            counts.unasked += 1
            return None
        try:
            if self._chat:
                ids = prompt_ids(self._tokenizer, asked, tools=row.dialogue.tools)
            else:
                ids = prompt_ids(self._tokenizer, str(asked[0]["content"]), chat=False)
        except UserError as e:
            raise UserError(f"{where(row.piece, row.place)}: {e}") from None
        if not ids:
            counts.unasked += 1
            return None
        if len(ids) >= self._teacher().config.max_seq_len:
            counts.too_long += 1
            return None
        return ids

    def _written(self, prompts: dict[int, list[int]], counts: _Counts) -> dict[int, str]:
        """The answers to be learnt, by row; the others are counted. The longest prompts come first, as many side by side as
        are asked for."""
        order = sorted(prompts, key=lambda n: (-len(prompts[n]), n))
        found: dict[int, str] = {}
        for start in range(0, len(order), self._cfg.batch_size):
            batch = order[start : start + self._cfg.batch_size]
            made = generate(
                self._teacher(),
                [prompts[n] for n in batch],
                self._sampling,
                tokenizer=self._tokenizer,
                seeds=[seed_of(self._seed, "teacher's answer", n) for n in batch],
                should_stop=self._should_stop,
            )
            if any(one.finish_reason == "interrupted" for one in made):
                raise Interrupted("stopped while the teacher wrote its answers; run again to go on")
            for n, one in zip(batch, made, strict=True):
                if one.finish_reason != "stop":
                    counts.cut += 1
                elif not one.text.strip():
                    counts.empty += 1
                else:
                    found[n] = one.text
        return found

    def _teacher(self) -> GPT:
        if self._model is None:
            self._model = self._load()
        return self._model


def _before_answer(dialogue: Dialogue) -> list[dict[str, Any]]:
    """All that stands before the assistant's last turn."""
    last = max(i for i, m in enumerate(dialogue.messages) if m["role"] == "assistant")
    return dialogue.messages[:last]
