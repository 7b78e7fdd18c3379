"""`llmkit score`: a reward model's scores for given answers.

What a row holds decides what is scored: one answer (`messages`, prompt and completion, ...), a better and a worse one
(`chosen`, `rejected`), several (`responses`), or, by a process reward model, the steps of one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from llmkit.config import MachineError, UserError
from llmkit.data.config import SourceConfig
from llmkit.data.layouts import Dialogue, Kind, Layout, Preference, Prompt, Steps, reader
from llmkit.data.row import UnusableRow
from llmkit.data.sequences import encoded_answers
from llmkit.data.sources import files_of, units_of, where, whole_records
from llmkit.data.steps import encode_steps
from llmkit.inference.scoring import score_sequences, score_tokens
from llmkit.model.heads import SequenceClassifier
from llmkit.model.hf import read_json
from llmkit.model.reward_facts import RewardFacts, read_reward_facts
from llmkit.model.weights import load_classifier
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer
from llmkit.training.dist import pick_device

BLOCK = 2048  # rows that are read, scored and written at a time

Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """What of a row is scored."""

    record: Record
    """As it is in the file."""
    place: str
    """File and row, for errors."""
    names: tuple[str, ...] | None
    """What each score is called in the result; None: they are a list, `rewards`."""
    prompt: Any
    answers: list[str]
    tools: list[Any] | None = None
    pairs: tuple[tuple[int, int], ...] = ()
    """(better, worse), numbers of answers, where the row tells."""
    steps: Steps | None = None


@dataclass
class Told:
    """What the summary says, gathered while rows go by."""

    scores: list[float]
    leads: list[float]
    """Of pairs whose order the file tells: the better one's score less the worse one's."""
    n_rows: int = 0
    n_long: int = 0


# --- rows ------------------------------------------------------------------------------------------------------------


class Reader:
    """Rows of a file in whatever layout they are."""

    def __init__(self, source: SourceConfig, facts: Record, chat: bool, say: Callable[[str], None]):
        self.source, self.chat, self.say = source, chat, say
        self.system: str | None = facts.get("system")
        self.is_process = facts.get("objective") == "process"
        self._layouts: dict[str, Layout] = {}

    def __iter__(self) -> Iterator[Row]:
        for unit in units_of(files_of(self.source), self.source.limit):
            for piece in unit:
                for number, record in whole_records(piece):
                    place = where(piece, number)
                    try:
                        yield self._row(piece.path, place, record)
                    except UserError as e:
                        raise UserError(f"{place}: {e}") from None

    def _row(self, path: str, place: str, record: Record) -> Row:
        if path not in self._layouts:
            self._layouts[path] = self._layout(record)
            self.say(f"{path}: layout {self._layouts[path].name}")
        layout, given = self._layouts[path], dict(record)
        if self.is_process:  # labels are of no use here, and need not be there
            steps = next((record[key] for key in map(self._theirs, ("completions", "steps")) if key in record), None)
            given[self._theirs("labels")] = [1.0] * len(steps) if isinstance(steps, list) else []
        try:
            row = layout.read(given)
        except UnusableRow:
            if "responses" not in self._has(record):
                raise
            row = self._reader(record, "prompt").read(given)  # equally good answers are scored all the same
        if isinstance(row, Steps):
            return Row(record, place, None, row.prompt, [], row.tools, steps=row)
        if isinstance(row, Prompt):
            return Row(record, place, None, row.prompt, _texts(row.fields["responses"]), row.tools)
        if isinstance(row, Preference):
            pairs = tuple((better, worse) for better, worse, _ in row.pairs)
            names = None if layout.name in ("ranking", "scores") else ("reward_chosen", "reward_rejected")
            return Row(record, place, names, row.prompt, row.responses, row.tools, pairs)
        assert isinstance(row, Dialogue)
        *before, last = row.messages
        if last["role"] != "assistant" or not before:
            raise UserError("the conversation doesn't end with an answer of the assistant to something")
        prompt = before if self.chat else before[-1]["content"]
        return Row(record, place, ("reward",), prompt, [last["content"]], row.tools)

    def _theirs(self, name: str) -> str:
        return self.source.columns.get(name, name)

    def _has(self, record: Record) -> set[str]:
        names = ("prompt", "chosen", "rejected", "responses", "ranking", "scores")
        return {name for name in names if self._theirs(name) in record}

    def _reader(self, record: Record, kind: Kind) -> Layout:
        return reader(record.keys(), kind, self.source.columns, self.chat, system=self.system)

    def _layout(self, record: Record) -> Layout:
        """By the columns of a file's first row."""
        has = self._has(record)
        if self.is_process:
            return self._reader({**record, self._theirs("labels"): []}, "steps")
        if {"chosen", "rejected"} <= has or ("responses" in has and has & {"ranking", "scores"}):
            return self._reader(record, "preference")
        return self._reader(record, "prompt" if "responses" in has else "dialogue")


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise UserError("responses: a list of at least one text is expected")
    return value


# --- scores ----------------------------------------------------------------------------------------------------------


class Scorer:
    """Rows -> scores; an answer that is longer than the model's context has none."""

    def __init__(self, model: SequenceClassifier, tokenizer: Tokenizer, facts: Record, chat: bool, batch_tokens: int):
        self.model, self.tokenizer, self.chat, self.batch_tokens = model, tokenizer, chat, batch_tokens
        self.separator: str = facts.get("step_separator") or "\n"

    def __call__(self, rows: Sequence[Row], on_row: Callable[[int], None]) -> list[list[float | None]]:
        """The scores of each row's answers, or of its steps; None for what is too long."""
        if rows and rows[0].steps is not None:
            return self._of_steps(rows, on_row)
        ids: list[list[int]] = []
        places: list[list[int | None]] = []
        for row in rows:
            found: list[int | None] = []
            try:
                for answer in row.answers:  # one by one: what is cut off the prompt doesn't depend on the others
                    prompt, (encoded,), _ = encoded_answers(
                        self.tokenizer, row.prompt, [answer], self.model.config.max_seq_len, self.chat, row.tools
                    )
                    found.append(None if encoded is None else len(ids))
                    ids += [] if encoded is None else [prompt + encoded]
            except UserError as e:
                raise UserError(f"{row.place}: {e}") from None
            places.append(found)
        scores = score_sequences(self.model, ids, batch_tokens=self.batch_tokens)
        assert scores is not None
        flat = _finite(scores[:, 0].tolist())
        on_row(len(rows))
        return [[None if at is None else flat[at] for at in found] for found in places]

    def _of_steps(self, rows: Sequence[Row], on_row: Callable[[int], None]) -> list[list[float | None]]:
        ids, places = [], []
        longest = self.model.config.max_seq_len
        for row in rows:
            assert row.steps is not None
            try:
                encoded, ends, _, _ = encode_steps(self.tokenizer, row.steps, self.separator, longest, self.chat)
            except UserError as e:
                raise UserError(f"{row.place}: {e}") from None
            ids.append(encoded)
            places.append(ends)
        scores = score_tokens(self.model, ids, places, batch_tokens=self.batch_tokens, on_batch=on_row)
        steps = (len(row.steps.steps) if row.steps else 0 for row in rows)
        return [[*_finite(found), *[None] * (n - len(found))] for found, n in zip(scores, steps, strict=True)]


def _finite(scores: list[float]) -> list[float]:
    if not all(map(math.isfinite, scores)):
        raise MachineError("a score is not finite: the model's weights or activations overflow; see `llmkit verify`")
    return scores


def result_of(row: Row, scores: Sequence[float | None]) -> Record:
    """The row with its scores beside it."""
    if row.names is None:
        return {**row.record, "rewards": list(scores)}
    return {**row.record, **dict(zip(row.names, scores, strict=True))}


# --- the command -----------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Rows with their scores to --out or stdout; notes, progress and, without --out, the summary to stderr."""
    out = None if args.out is None else Path(args.out)
    if out is not None and out.exists():
        raise UserError(f"{out}: is there already: choose another --out, or remove it")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"score: --limit must be at least 1 (got {args.limit})")
    folder = resolve_model(args.model)
    facts = read_json(folder).get("llmkit")
    facts = facts if isinstance(facts, dict) else {}
    if facts.get("objective") in ("classify", "regress"):
        raise UserError(
            f"{folder}: was trained with objective: {facts['objective']} on plain texts, it knows no prompts and answers: "
            "a model trained with objective: rank is expected"
        )
    tokenizer, scale = Tokenizer.load(folder), read_reward_facts(folder)
    model = load_classifier(folder, None, pick_device(args.device), n_scores=1)
    chat = bool(facts.get("chat", tokenizer.template is not None)) and not args.raw
    if chat and tokenizer.template is None:
        raise UserError(f"{folder}: the tokenizer has no chat template: say --raw for plain prompts and answers")
    source = SourceConfig(path=args.file, columns=_columns(args.column), limit=args.limit)
    rows = iter(Reader(source, facts, chat, _say))
    told = Told([], [])
    with ExitStack() as stack:
        part = None if out is None else out.with_name(f"{out.name}.part")
        if part is not None:
            part.parent.mkdir(parents=True, exist_ok=True)
        target = sys.stdout if part is None else stack.enter_context(part.open("w", encoding="utf-8"))
        bar = stack.enter_context(tqdm(unit=" rows", file=sys.stderr, disable=not sys.stderr.isatty()))
        scorer = Scorer(model, tokenizer, facts, chat, args.batch_tokens)
        while block := list(itertools.islice(rows, BLOCK)):
            _write(target, block, scorer(block, bar.update), told)
    if not told.n_rows:
        raise UserError(f"{args.file}: there are no rows in it")
    if part is not None and out is not None:
        part.replace(out)
    for line in summary(told, scale):
        print(line, file=sys.stdout if out is not None else sys.stderr)
    return 0


def _write(target: TextIO, block: Sequence[Row], scores: Sequence[list[float | None]], told: Told) -> None:
    for row, found in zip(block, scores, strict=True):
        target.write(json.dumps(result_of(row, found), ensure_ascii=False, default=str) + "\n")
        told.n_rows += 1
        told.n_long += found.count(None)
        told.scores += [score for score in found if score is not None]
        for better, worse in row.pairs:
            if (a := found[better]) is not None and (b := found[worse]) is not None:
                told.leads.append(a - b)


def summary(told: Told, scale: RewardFacts | None) -> Iterator[str]:
    """A few lines on the scores."""
    scores = told.scores
    yield f"scored     {len(scores):,} answers or steps in {told.n_rows:,} rows" + (
        f"; {told.n_long:,} are longer than the model's context and have none" if told.n_long else ""
    )
    if scores:
        spread = statistics.pstdev(scores)
        yield (
            f"rewards    mean {statistics.fmean(scores):+.4f}, standard deviation {spread:.4f}, from "
            f"{min(scores):+.4f} to {max(scores):+.4f}"
        )
    if scores and scale is not None:
        mean = scale.normalised(statistics.fmean(scores))
        yield f"scale      {mean:+.3f} standard deviations from the reference answers' mean {scale.reward_mean:+.4f}"
    if told.leads:
        share = sum((lead > 0) + 0.5 * (lead == 0) for lead in told.leads) / len(told.leads)
        error = math.sqrt(share * (1 - share) / len(told.leads))
        yield f"accuracy   {share:.4f} +- {error:.4f} on {len(told.leads):,} pairs whose order the file tells"


def _columns(texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    if any(not (ours and theirs) for ours, _, theirs in pairs):
        raise UserError(f"--column {' '.join(texts)}: expected ours=theirs, such as prompt=question")
    return {ours: theirs for ours, _, theirs in pairs}


def _say(line: str) -> None:
    print(line, file=sys.stderr)
