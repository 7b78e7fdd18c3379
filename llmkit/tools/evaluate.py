"""`llmkit eval`: benchmarks and held-out text, with intervals, every single answer, and a page to look at."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llmkit.config import UserError
from llmkit.data.config import SourceConfig
from llmkit.data.sources import documents, files_of, units_of
from llmkit.evaluation.asking import ModelRespondent, OnRows
from llmkit.evaluation.contamination import N, overlap
from llmkit.evaluation.harness import METRICS, Told, chance, examine, n_steps
from llmkit.evaluation.page import page, table
from llmkit.evaluation.rows import Questions, read_task
from llmkit.inference.command import is_chat_model
from llmkit.model.gpt import GPT
from llmkit.model.weights import load_model
from llmkit.sandbox.cage import Sandbox
from llmkit.storage import machine_errors, replace_file, resolve_model
from llmkit.tokenizer import Tokenizer
from llmkit.tools.measures import likelihood, mean_of, text_rows
from llmkit.training.dist import pick_device

MAX_CONTEXT = 2048  # of held-out text, where nobody says another
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Record = dict[str, Any]


def run(args: argparse.Namespace) -> int:
    """The table to stdout and, with --out, all that was found to a folder; notes and progress to stderr."""
    names = task_names(args)
    data = None if args.data is None else Path(args.data)
    tasks = [read_task(name, data, args.limit, args.shots) for name in names]
    sandbox = _sandbox(args, tasks)
    texts = None if args.text is None else _texts(args.text, args.field or "text")
    if args.against is not None:
        next(_texts(args.against, args.field or "text"), None)  # what is wrong with it is found before a model works
    folder = resolve_model(args.model)
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder, DTYPES[args.precision] if args.precision else None, pick_device(args.device))
    chat = not args.raw and is_chat_model(folder, tokenizer)
    who = ModelRespondent(model, tokenizer, chat, args.batch_tokens)
    report: Record = {
        "name": name_of(folder),
        "path": str(folder),
        "chat": chat,
        "precision": str(model.head_weight.dtype).removeprefix("torch."),
        "tasks": [],
        "text": None if texts is None else _held_out(args, model, tokenizer, texts),
    }
    items: dict[str, list[Record]] = {}
    try:
        for questions in tasks:
            with _bar(questions.task.name, n_steps(questions)) as step:
                found = examine(who, questions, sandbox=sandbox, max_new_tokens=args.max_new_tokens, on_rows=step)
            told = summary(questions, found)
            if args.against is not None:
                told["overlap"] = _overlap(questions, found, args)
            report["tasks"].append(told)
            items[questions.task.name] = [one.record for one in found]
    finally:
        if sandbox is not None:
            sandbox.close()
    write(None if args.out is None else Path(args.out), report, items)
    return 0


def name_of(folder: Path) -> str:
    """What a model is called on the page: by its run, or its folder."""
    return f"{folder.parents[1].name}-{folder.name}" if folder.parent.name == "checkpoints" else folder.name


def task_names(args: argparse.Namespace) -> list[str]:
    """The tasks' names; refuses what contradicts itself before anything is loaded."""
    names = [name.strip() for name in (args.tasks or "").split(",") if name.strip()]
    if not names and args.text is None:
        raise UserError("eval: say what is asked: --tasks mmlu,gsm8k, or --text FILE for perplexity and bits per byte")
    if double := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"eval: --tasks: {double} stands twice: leave one out")
    if args.text is None and args.context is not None:
        raise UserError("eval: --context is for held-out text: give --text too")
    if args.text is None and args.against is None and args.field is not None:
        raise UserError("eval: --field is where the text of --text or --against stands: give one of them")
    if args.against is not None and not names:
        raise UserError("eval: --against looks for questions in texts: give --tasks")
    for option, low in {"limit": 1, "shots": 0, "max_new_tokens": 1, "context": 1, "batch_tokens": 1}.items():
        value = getattr(args, option)
        if value is not None and value < low:
            raise UserError(f"eval: --{option.replace('_', '-')} must be at least {low} (got {value})")
    if args.out is not None and Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"eval: --out {args.out}: is a file: name a folder")
    return names


def _sandbox(args: argparse.Namespace, tasks: Sequence[Questions]) -> Sandbox | None:
    """Where programs are run, after its self-test; None if there are none."""
    programs = [q.task.name for q in tasks if q.task.kind == "code"]
    if not programs:
        return None
    if not args.run_code:
        raise UserError(
            f"eval: {programs[0]} runs programs that the model writes: say --run-code to allow that, in a sandbox"
        )
    sandbox = Sandbox()
    print(f"sandbox    {sandbox.describe()}", file=sys.stderr)
    return sandbox


@contextmanager
def _bar(what: str, total: int) -> Iterator[OnRows]:
    with tqdm(total=total, desc=what, unit=" rows", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        yield lambda n: bar.update(n) and None


# --- figures ---------------------------------------------------------------------------------------------------------


def summary(questions: Questions, found: Sequence[Told]) -> Record:
    """A task's figures with their 95 % intervals, as JSON."""
    task = questions.task
    main = METRICS[task.kind][0]
    # Per byte, options of one length are in the order that they are in anyway.
    even = all(len({len(choice.encode()) for choice in one.item.choices}) < 2 for one in found)
    figures = [name for name in METRICS[task.kind] if not (even and name == "acc_norm")]
    groups = sorted({one.item.group for one in found})
    return {
        "name": task.name,
        "kind": task.kind,
        "source": questions.source,
        "n": len(found),
        "chance": chance(questions),
        "examples_asked": task.n_shots if questions.examples else 0,
        "examples_mean": math.fsum(one.record["examples"] for one in found) / len(found),
        "cut": sum(one.record["cut"] for one in found),
        "unfinished": sum(not one.record.get("finished", True) for one in found),
        "errors": sum(one.grades[main] is None for one in found),
        "metrics": {name: _mean(found, name) for name in figures},
        "groups": {group: _mean([one for one in found if one.item.group == group], main) for group in groups},
        "overlap": None,
    }


def _mean(found: Sequence[Told], metric: str) -> Record | None:
    grades = (one.grades[metric] for one in found)
    mean = mean_of([math.nan if grade is None else grade for grade in grades])
    if mean is None:
        return None
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(mean).items()}


def _overlap(questions: Questions, found: Sequence[Told], args: argparse.Namespace) -> Record:
    """How much of the questions stands in --against; each record is told its own share."""
    asked = [one.item.bare or one.item.question for one in found]
    result = overlap(asked, _texts(args.against, args.field or "text"))
    for one, share in zip(found, result.shares, strict=True):
        one.record["overlap"] = share
    main = METRICS[questions.task.kind][0]
    marked = list(zip(found, result.is_dirty, strict=True))
    return {
        "path": args.against,
        "n": N,
        "n_checked": sum(dirty is not None for _, dirty in marked),
        "n_dirty": sum(dirty is True for _, dirty in marked),
        "n_short": sum(dirty is None for _, dirty in marked),
        "clean": _mean([one for one, dirty in marked if dirty is False], main),
        "dirty": _mean([one for one, dirty in marked if dirty], main),
    }


def _texts(path: str, field: str) -> Iterator[str]:
    for unit in units_of(files_of(SourceConfig(path=path, field=field))):
        for piece in unit:
            yield from documents(piece, field)


def _held_out(args: argparse.Namespace, model: GPT, tokenizer: Tokenizer, texts: Iterator[str]) -> Record:
    longest = model.config.max_seq_len
    context = args.context or min(MAX_CONTEXT, longest)
    if context > longest:
        raise UserError(f"eval: --context {context}: the model sees {longest} tokens: lower it")
    kept = [text for text in texts if text.strip()][: args.limit]
    if not kept:
        raise UserError(f"eval: --text {args.text}: there is no text in it")
    rows = [row for text in kept for row in text_rows(tokenizer, text, context)]
    n_bytes = sum(len(text.encode()) for text in kept)
    with _bar("text", len(rows)) as step:
        found = likelihood(model, rows, tokenizer.vocab_size, n_bytes, step)
    told = {"loss": found.loss, "perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte}
    return {
        "path": args.text,
        "context": context,
        "n_texts": len(kept),
        **told,
        "n_tokens": found.n_tokens,
        "n_bytes": n_bytes,
    }


def write(out: Path | None, report: Record, items: dict[str, list[Record]]) -> None:
    """The table to stdout; with a folder also eval.json, eval.md, eval.html, and every question in items/<task>.jsonl."""
    print(table(report), end="")
    if out is None:
        return
    with machine_errors(out):
        (out / "items").mkdir(parents=True, exist_ok=True)
        for name, records in items.items():
            lines = (json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
            replace_file(out / "items" / f"{name}.jsonl", "".join(lines))
        replace_file(out / "eval.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        replace_file(out / "eval.md", table(report))
        replace_file(out / "eval.html", page(report, items))
    print(f"written: {out / 'eval.html'}, eval.md, eval.json, items/", file=sys.stderr)
