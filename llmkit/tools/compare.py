"""`llmkit compare`: models side by side: size, held-out loss, graded answers and speed, as one table and one picture."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from llmkit.config import MachineError, UserError, validate
from llmkit.data.config import SourceConfig
from llmkit.data.layouts import Dialogue, read_source
from llmkit.data.sources import documents, files_of, units_of, where
from llmkit.data.turns import encode_dialogue
from llmkit.inference.batch import check_model
from llmkit.inference.command import DTYPES, is_chat_model
from llmkit.losses import IGNORE
from llmkit.model.adapters import WEIGHTS, is_adapter
from llmkit.model.config import count_params
from llmkit.model.gpt import GPT
from llmkit.model.weights import load_model, weight_files
from llmkit.rollout.answers import FILE, AnswerEval
from llmkit.rollout.rewards.config import AnswersConfig
from llmkit.storage import machine_errors, replace_file, resolve_model
from llmkit.tokenizer import Tokenizer
from llmkit.tools.comparison import draw, table
from llmkit.tools.grading import read_rewards
from llmkit.tools.measures import Likelihood, Scored, Timed, likelihood, mean_of, speeds, text_rows
from llmkit.training.dist import Ranks, pick_device
from llmkit.training.task import Context

PROMPT_TOKENS, NEW_TOKENS = 128, 64
MAX_GROUPS = 40  # of answers
MAX_CONTEXT = 2048  # of held-out text, where nobody says another

Record = dict[str, Any]
Step = Callable[[int], Any]
"""Moves a progress bar on."""


@dataclass(frozen=True)
class Compared:
    """One of the models."""

    name: str
    folder: Path
    tokenizer: Tokenizer
    model: GPT
    raw: bool
    """Never with the chat template."""

    @property
    def context(self) -> int:
        return self.model.config.max_seq_len

    @property
    def answers_in_chat(self) -> bool:
        """Whether it is asked through its chat template, as `llmkit generate` asks it."""
        return not self.raw and is_chat_model(self.folder, self.tokenizer)

    @property
    def reads_chats(self) -> bool:
        """Whether conversations are written for it as its chat template has them."""
        return not self.raw and self.tokenizer.template is not None

    @property
    def n_bytes(self) -> int:
        """Of its weights on disk: adapters with their base."""
        files = weight_files(self.folder) + ([self.folder / WEIGHTS] if is_adapter(self.folder) else [])
        return sum(file.stat().st_size for file in files)


def run(args: argparse.Namespace) -> int:
    """The table to stdout and, with the numbers and the picture, to --out; notes and progress to stderr."""
    names = names_of(args.models, args.names)
    _check(args)
    out, device = Path(args.out), pick_device(args.device)
    dtype = DTYPES.get(args.precision)
    models = [load(name, path, dtype, args.raw, device) for name, path in zip(names, args.models, strict=True)]
    n_prompt, n_new = speed_lengths(args, models, PROMPT_TOKENS, NEW_TOKENS)
    report: Record = {
        "models": [_size(m) for m in models],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "same_tokenizer": len({m.tokenizer.hash for m in models}) == 1,
        "same_template": len({m.tokenizer.template_hash if m.reads_chats else "" for m in models}) == 1,
        "held_out": None,
        "questions": None,
        "speed": {"prompt_tokens": n_prompt, "new_tokens": n_new, "repeats": args.repeats} if args.repeats else None,
    }
    with ExitStack() as stack:
        # All that may be wrong with the data is found before the first model works.
        evals = None if args.questions is None else _questions(args, models, device, stack)
        by = None if evals is None else _groups_of(args, evals)
        held_out = None if args.text is None and args.chats is None else read_held_out(args, models)
        with machine_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        if held_out is not None:
            report["held_out"] = held_out.facts
            for found, result in zip(held_out.measure(models), report["models"], strict=True):
                result |= told_likelihood(found)
        if evals is not None:
            report["questions"] = {"path": args.questions, "by": by}
            for m, one, result in zip(models, evals, report["models"], strict=True):
                result |= _answers(m, one, by, out, device)
    if args.repeats:
        timed = [Timed(m.model, m.tokenizer) for m in models]
        with progress("speed", (args.repeats + 1) * len(models), " runs") as step:
            measured = speeds(timed, n_prompt, n_new, args.repeats, lambda: step(1))
        for speed, result in zip(measured, report["models"], strict=True):
            result["speed"] = {"prompt": speed.prompt, "generation": speed.generation}
    _write(out, plain(report))
    return 0


# --- options ---------------------------------------------------------------------------------------------------------


def names_of(paths: Sequence[str], given: str | None) -> list[str]:
    """What the models are called: as given, else by their folders, which are numbered where two are called the same.

    Raises:
        UserError: for another number of names than models, or one that is no name or stands twice.
    """
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        if len(names) != len(paths):
            raise UserError(f"compare: --names {given}: {len(names)} names for {len(paths)} models: give one each")
        for name in names:
            if not name or set(name) & set("/\\|\n"):
                raise UserError(f"compare: --names {given}: '{name}' is no name: no blank one, and without / \\ |")
            if names.count(name) > 1:
                raise UserError(f"compare: --names {given}: '{name}' stands twice: give each model its own")
        return names
    names = []
    for path in paths:
        parts = Path(path).resolve().parts
        name = parts[-1] if parts[-2:-1] != ("checkpoints",) else f"{parts[-3]}-{parts[-1]}"
        others = [f"{name}-{k}" for k in range(2, len(paths) + 1)]
        names.append(next(n for n in (name, *others) if n not in names))
    return names


def _check(args: argparse.Namespace) -> None:
    """Refuses what contradicts itself before a model is loaded."""
    if args.text is not None and args.chats is not None:
        raise UserError("compare: --text and --chats: a table has one held-out loss: ask for one at a time")
    if args.questions is None:
        for option in ("reward", "by", "column", "max_new_tokens"):
            if getattr(args, option):
                raise UserError(
                    f"compare: --{option.replace('_', '-')} is about answers: give --questions, what is asked"
                )
    if args.field is not None and args.text is None:
        raise UserError("compare: --field is where the text of --text stands: give that too")
    if args.context is not None and args.text is None and args.chats is None:
        raise UserError("compare: --context is for held-out text: give --text or --chats")
    least = {"limit": 1, "context": 1, "repeats": 0, "prompt_tokens": 1, "new_tokens": 2, "max_new_tokens": 1}
    for option, low in least.items():
        value = getattr(args, option)
        if value is not None and value < low:
            raise UserError(f"compare: --{option.replace('_', '-')} must be at least {low} (got {value})")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"compare: --out {args.out}: is a file: name a folder")


def load(name: str, path: str, dtype: torch.dtype | None, raw: bool, device: torch.device) -> Compared:
    """A model that continues text, with its tokenizer. Raises UserError for one that doesn't."""
    folder = resolve_model(path)
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder, dtype, device)
    try:
        check_model(model, tokenizer.vocab_size)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    return Compared(name, folder, tokenizer, model, raw)


def speed_lengths(
    args: argparse.Namespace, models: Sequence[Compared], prompt_tokens: int, new_tokens: int
) -> tuple[int, int]:
    """Tokens of the prompt and new ones: as asked for, else so many, made to fit the smallest context."""
    smallest = min(models, key=lambda m: m.context)
    room = smallest.context
    n_new = args.new_tokens or max(2, min(new_tokens, room - args.prompt_tokens if args.prompt_tokens else room // 3))
    n_prompt = args.prompt_tokens or max(1, min(prompt_tokens, room - n_new))
    if args.repeats and n_prompt + n_new > smallest.context:
        raise UserError(
            f"{args.command}: --prompt-tokens {n_prompt} and --new-tokens {n_new} don't fit into the context of "
            f"{smallest.name}, {smallest.context} tokens: lower them"
        )
    return n_prompt, n_new


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Step]:
    with tqdm(total=total, desc=what, unit=unit, file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        yield bar.update


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _size(m: Compared) -> Record:
    return {
        "name": m.name,
        "path": str(m.folder),
        "parameters": count_params(m.model.config).total,
        "bytes": m.n_bytes,
        "precision": str(m.model.head_weight.dtype).removeprefix("torch."),
        "tokenizer": m.tokenizer.hash,
        "vocab_size": m.tokenizer.vocab_size,
        "context": m.context,
    }


# --- held-out text ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """The same texts for every model, each encoded its way."""

    rows: list[list[Scored]]
    """Of each model."""
    n_bytes: int
    """Of the text that is asked for."""
    facts: Record

    def measure(self, models: Sequence[Compared]) -> Iterator[Likelihood]:
        for m, rows in zip(models, self.rows, strict=True):
            with progress(f"{m.name}: loss", len(rows), " rows") as step:
                try:
                    yield likelihood(m.model, rows, m.tokenizer.vocab_size, self.n_bytes, step)
                except MachineError as e:
                    raise MachineError(f"{m.name}: {e}; `llmkit verify {m.folder}` looks at its weights") from None


def read_held_out(args: argparse.Namespace, models: Sequence[Compared]) -> HeldOut:
    context = args.context or min(MAX_CONTEXT, *(m.context for m in models))
    if context > (smallest := min(models, key=lambda m: m.context)).context:
        raise UserError(
            f"{args.command}: --context {context}: {smallest.name} sees {smallest.context} tokens: lower it"
        )
    for m in models:
        if (text := m.tokenizer.lost) is not None:
            _say(f"note: {m.name}: its tokenizer can't write every text ({text!r}): what it loses costs it nothing")
    return _held_out_texts(args, models, context) if args.text is not None else _held_out_chats(args, models, context)


def _held_out_texts(args: argparse.Namespace, models: Sequence[Compared], context: int) -> HeldOut:
    field = args.field or "text"
    source = SourceConfig(path=args.text, field=field, limit=args.limit)
    texts = [text for unit in units_of(files_of(source), source.limit) for p in unit for text in documents(p, field)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"--text {args.text}: there is no text in it")
    facts = {"kind": "text", "path": args.text, "n": len(texts), "left_out": 0, "context": context}
    rows = [[row for text in texts for row in text_rows(m.tokenizer, text, context)] for m in models]
    return HeldOut(rows, sum(len(text.encode()) for text in texts), facts)


def _held_out_chats(args: argparse.Namespace, models: Sequence[Compared], context: int) -> HeldOut:
    """Conversations of which every model can read every row; the others are left out for all, and counted."""
    read = [_chats(args, m) for m in models]
    found: list[dict[Any, list[Scored]]] = [rows for rows, _ in read]
    known = [key for key in found[0] if all(key in rows for rows in found)]
    fitting = [key for key in known if all(len(row.ids) <= context for rows in found for row in rows[key])]
    n = max(n for _, n in read)
    if not n:
        raise UserError(f"--chats {args.chats}: there is no conversation in it")
    if not fitting:
        raise UserError(
            f"--chats {args.chats}: of {n} conversations none has an answer within the context of {context} tokens"
        )
    tokenizer = models[0].tokenizer
    labels = [t for key in fitting for row in found[0][key] for t in row.labels if t != IGNORE]
    facts = {"kind": "chats", "path": args.chats, "n": len(fitting), "left_out": n - len(fitting), "context": context}
    rows = [[row for key in fitting for row in rows_of[key]] for rows_of in found]
    return HeldOut(rows, tokenizer.n_bytes(labels), facts)


def _chats(args: argparse.Namespace, m: Compared) -> tuple[dict[Any, list[Scored]], int]:
    """By file and row, what of a conversation the model is asked for: the answers with their ends; and how many rows there
    are in all."""
    found: dict[Any, list[Scored]] = {}
    unusable: list[str] = []
    source = SourceConfig(path=args.chats, limit=args.limit)
    try:
        for piece, number, dialogue in read_source(
            source, "dialogue", m.reads_chats, system=args.system, on_unusable=lambda *a: unusable.append(str(a[2]))
        ):
            assert isinstance(dialogue, Dialogue)
            place = where(piece, number)
            try:
                turns = encode_dialogue(m.tokenizer, dialogue.messages, dialogue.tools, chat=m.reads_chats)
            except UserError as e:
                raise UserError(f"{place}: {e}") from None
            # The first token of all follows nothing, so nothing can be asked for it.
            found[place] = [
                Scored(t.ids[:-1], [i if on else IGNORE for i, on in zip(t.ids[1:], t.is_trained[1:], strict=True)])
                for t in turns
            ]
    except UserError as e:
        how = "" if m.reads_chats else " (plain text: data.chat is false)"
        raise UserError(f"--chats, as {m.name} reads them{how}: {e}") from None
    return found, len(found) + len(unusable)


def told_likelihood(found: Likelihood) -> Record:
    return {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "held_out_tokens": found.n_tokens,
        "held_out_bytes": found.n_bytes,
    }


# --- answers ---------------------------------------------------------------------------------------------------------


class _Alone:
    """What `AnswerEval` asks of a run, where there is none: one rank, and nobody who stops it."""

    def __init__(self, out: Path, device: torch.device, on_batch: Callable[[], Any]):
        self.out, self.ranks, self._on_batch = out, Ranks(device=device), on_batch

    def should_stop(self) -> bool:
        return False

    def all_should_stop(self) -> bool:
        self._on_batch()
        return False


def _questions(
    args: argparse.Namespace, models: Sequence[Compared], device: torch.device, stack: ExitStack
) -> list[AnswerEval]:
    """The same questions for every model: one that fills a model's context is left out for all."""
    columns = [text.partition("=") for text in args.column]
    if any(not (ours and theirs) for ours, _, theirs in columns):
        raise UserError(f"--column {' '.join(args.column)}: expected ours=theirs, such as prompt=question")
    rewards = read_rewards(args.reward or ["exact"], "--reward")
    options = {
        "path": args.questions,
        "columns": {ours: theirs for ours, _, theirs in columns},
        "rewards": [r.model_dump(mode="json") for r in rewards],
        "limit": args.limit,
    } | ({} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens})
    config: AnswersConfig = validate(AnswersConfig, options, {(): "compare"})
    evals = []
    for m in models:
        try:
            one = AnswerEval(config, m.tokenizer, chat=m.answers_in_chat, system=args.system, device=device)
        except UserError as e:
            how = "" if m.answers_in_chat else " (plain text: data.chat is false)"
            raise UserError(f"--questions, asked of {m.name}{how}: {str(e).removeprefix('eval.answers: ')}") from None
        stack.callback(one.close)
        evals.append(one)
    n = len(evals[0].questions)
    fits = [all(len(e.questions[i].ids) < m.context for e, m in zip(evals, models, strict=True)) for i in range(n)]
    if not any(fits):
        raise UserError(f"--questions {args.questions}: every prompt fills the context of a model")
    if not all(fits):
        _say(f"note: {fits.count(False)} of {n} questions fill the context of a model: left out for all")
    for one in evals:
        kept = [q for q, fit in zip(one.questions, fits, strict=True) if fit]
        one.questions = [replace(q, number=i) for i, q in enumerate(kept)]
    return evals


def _groups_of(args: argparse.Namespace, evals: Sequence[AnswerEval]) -> str | None:
    """The column by whose values the answers are also told: `kind` where every question has one, and it has few values."""
    by, rows = args.by or "kind", [q.prompt.fields for q in evals[0].questions]
    lacking = next((i for i, fields in enumerate(rows, 1) if by not in fields), None)
    n = 0 if lacking else len({str(fields[by]) for fields in rows})
    if args.by is not None and lacking:
        raise UserError(f"--by {by}: question {lacking} has no column of that name")
    if args.by is not None and n > MAX_GROUPS:
        raise UserError(f"--by {by}: it has {n} values, which no table shows: choose one of at most {MAX_GROUPS}")
    return by if 1 < n <= MAX_GROUPS else None


def _answers(m: Compared, questions: AnswerEval, by: str | None, out: Path, device: torch.device) -> Record:
    """Has a model answer all questions; its answers stay in `out` to be read."""
    n_batches = -(-len(questions.questions) // questions.config.micro_rows)
    with progress(f"{m.name}: answers", n_batches, " batches") as step:
        metrics = questions.evaluate(m.model, cast(Context, _Alone(out, device, lambda: step(1))))
    assert metrics is not None
    file = (out / FILE).replace(out / f"answers-{m.name}.jsonl")
    rows = [json.loads(line) for line in file.read_text("utf-8").split("\n")[:-1]]
    grades = {name: [row["parts"][name] for row in rows] for name in rows[0]["parts"]}
    if len(grades) > 1:
        grades["reward"] = [row["reward"] for row in rows]
    groups = None if by is None else [str(row["fields"][by]) for row in rows]
    errors = {k.removeprefix("answers/errors/"): int(v) for k, v in metrics.items() if k.startswith("answers/errors/")}
    told = {"n": len(rows), "tokens": metrics["answers/tokens"], "ended": metrics["answers/ended"], "errors": errors}
    return {"scores": {name: _scored(values, groups) for name, values in grades.items()}, "answers": told}


def _scored(grades: Sequence[float | None], groups: Sequence[str] | None) -> Record | None:
    """Mean and interval over all answers, and of each group; None where the part had nothing to say of any."""

    def told(some: Sequence[float | None]) -> Record | None:
        found = mean_of([math.nan if grade is None else grade for grade in some])
        return None if found is None else asdict(found)

    whole = told(grades)
    if whole is None or groups is None:
        return whole
    of = {g: [v for v, group in zip(grades, groups, strict=True) if group == g] for g in sorted(set(groups))}
    return whole | {"by": {g: told(some) for g, some in of.items()}}


# --- what came of it -------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Numbers that JSON doesn't know become null."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(out: Path, report: Record) -> None:
    """compare.json, compare.md and compare.png; the table is printed too."""
    text = table(report)
    with machine_errors(out):
        replace_file(out / "compare.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        replace_file(out / "compare.md", text)
    print(text, end="")
    picture = draw(report, out / "compare.png")
    if picture is None:
        _say("note: no picture is drawn: matplotlib is not installed (pip install 'llmkit[log]')")
    else:
        _say(f"written: {out / 'compare.md'}, compare.json, {picture.name}")
