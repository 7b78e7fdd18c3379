"""`llmkit sample`: rejection sampling. n answers to each prompt are scored, and the best become data for `stage: sft`."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from llmkit.config import UserError
from llmkit.rollout.rewards.base import Rewards
from llmkit.tools.candidates import (
    Asked,
    Drawn,
    Writer,
    blocks,
    check_out,
    fingerprint,
    read_prompts,
    sampling_of,
)
from llmkit.tools.grading import answer_of, read_rewards
from llmkit.tools.ledger import Ledger, Record
from llmkit.training.dist import pick_device


@dataclass(frozen=True)
class Keep:
    """Which answers to a prompt are kept."""

    n: int | None
    """So many of the best; None: all."""
    threshold: float | None
    """Only those that score at least this."""

    def choose(self, scores: Sequence[float]) -> list[int]:
        """Places of the answers to keep, best first; the earlier of two equal ones comes first."""
        good = [
            i for i, s in enumerate(scores) if not math.isnan(s) and (self.threshold is None or s >= self.threshold)
        ]
        return sorted(good, key=lambda i: (-scores[i], i))[: self.n]


def run(args: argparse.Namespace) -> int:
    """Rows to --out, notes and progress to stderr."""
    keep = _keep_of(args)
    out, sampling = check_out(args.out), sampling_of(args, "sample")
    configs = read_rewards(args.rewards, "--rewards")
    writer = Writer(args, sampling)
    shuffle = args.seed if args.shuffle else None
    rows = writer.fitting(read_prompts(args.prompts, writer.chat, args.column, shuffle), _say)
    settings = {
        **writer.settings(),
        "command": "sample",
        "prompts": fingerprint(rows),
        "shuffle": args.shuffle,
        "n": args.n,
        "keep": [keep.n, keep.threshold],
        "rewards": [c.model_dump(mode="json") for c in configs],
    }
    rewards = Rewards(configs, writer.tokenizer, pick_device(args.device))
    try:
        for row in rows[: args.limit]:
            check(rewards, row)
        with Ledger(out, settings) as ledger:
            todo = [row for row in rows[: args.limit] if row.number not in ledger.done]
            if ledger.done:
                _say(f"{out}: {len(ledger.done)} prompts are done, {len(todo)} are left")
            _fill(args, ledger, todo, writer, rewards, keep)
            summary = summarise(ledger, keep.threshold)
            ledger.tell({"summary": summary})
    finally:
        rewards.close()
    for line in _told(summary, args.n, keep.threshold):
        _say(line)
    return 0


def check(rewards: Rewards, row: Asked) -> None:
    """Raises UserError, naming the row, if the rewards can't grade answers to it."""
    try:
        rewards.check(row.fields)
    except UserError as e:
        raise UserError(f"{row.at}: {e}") from None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _keep_of(args: argparse.Namespace) -> Keep:
    if args.prompts is None:
        raise UserError("sample: --prompts, what is to be answered, is missing")
    if args.n < 1:
        raise UserError(f"sample: --n must be at least 1 (got {args.n})")
    if (args.keep == "top_k") != (args.keep_n is not None):
        raise UserError("sample: --keep top_k and --keep-n, how many, belong together")
    if args.keep_n is not None and not 1 <= args.keep_n <= args.n:
        raise UserError(f"sample: --keep-n {args.keep_n}: from 1 to the {args.n} answers of --n")
    if args.keep == "threshold" and args.threshold is None:
        raise UserError("sample: --keep threshold needs --threshold, the least score of an answer that is kept")
    return Keep({"best": 1, "top_k": args.keep_n, "threshold": None}[args.keep], args.threshold)


def _fill(
    args: argparse.Namespace, ledger: Ledger, todo: Sequence[Asked], writer: Writer, rewards: Rewards, keep: Keep
) -> None:
    seen = {_key(row) for row in ledger.rows()}
    with tqdm(total=len(todo), unit=" prompts", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        for block in blocks(todo, args.batch):
            drawn = writer.draw(block, args.n)
            answers = [
                answer_of(row, a.text, ids, a.ids, a.finished)
                for row, ids, some in zip(block, map(writer.encode, block), drawn, strict=True)
                for a in some
            ]
            scored = rewards.score(answers)
            for i, (row, some) in enumerate(zip(block, drawn, strict=True)):
                part = slice(i * args.n, (i + 1) * args.n)
                parts = {name: values[part] for name, values in scored.parts.items()}
                rows, note = judged(row, some, scored.total[part], parts, keep, seen)
                ledger.add(row.number, rows, note)
            if errors := {name: n for name, n in scored.errors.items() if n}:
                ledger.tell({"errors": errors, "reasons": scored.reasons})
            bar.update(len(block))


def judged(
    row: Asked,
    drawn: Sequence[Drawn],
    scores: Sequence[float],
    parts: dict[str, list[float]],
    keep: Keep,
    seen: set[str],
) -> tuple[list[Record], Record]:
    """What is written for a prompt: the rows that are kept, and the note of all its answers.

    An answer that was cut off, is blank, or stands in the file already is never kept: the first would teach to stop in
    the middle, the last would count twice.
    """
    usable: dict[str, int] = {}
    for i, answer in enumerate(drawn):
        text = answer.text.strip()
        if answer.finished and text and _key_of(row.written, text) not in seen:
            usable.setdefault(text, i)
    places = list(usable.values())
    chosen = [places[k] for k in keep.choose([scores[i] for i in places])]
    rows = []
    for i in chosen:
        text = drawn[i].text.strip()
        seen.add(_key_of(row.written, text))
        said = {name: _number(values[i]) for name, values in parts.items()}
        rows.append({**_turn(row, text), "score": scores[i], "scores": said, **row.others})
    known = [s for s in scores if not math.isnan(s)]
    note = {
        "first": _number(scores[0]),
        "mean": statistics.fmean(known) if known else None,
        "best": max(known, default=None),
        "passed": None if keep.threshold is None else sum(s >= keep.threshold for s in known),
        "scored": len(known),
        "finished": sum(a.finished for a in drawn),
        "differing": len({a.text.strip() for a in drawn}),
        "kept": len(chosen),
    }
    return rows, note


def _turn(row: Asked, text: str) -> Record:
    if isinstance(row.prompt, str):
        return {"prompt": row.prompt, "completion": text}
    return {"messages": [*row.prompt, {"role": "assistant", "content": text}]}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _key(row: Record) -> str:
    """What makes two rows the same: prompt and answer."""
    if "messages" not in row:
        return _key_of(row.get("prompt", ""), row.get("completion", ""))
    *asked, answer = row["messages"]
    alone = len(asked) == 1 and asked[0].keys() == {"role", "content"} and asked[0]["role"] == "user"
    return _key_of(asked[0]["content"] if alone else asked, answer["content"])


def _key_of(prompt: Any, text: str) -> str:
    return hashlib.sha256(json.dumps([prompt, text], sort_keys=True, default=repr).encode()).hexdigest()


# --- what came of it -------------------------------------------------------------------------------------------------


def summarise(ledger: Ledger, threshold: float | None) -> dict[str, Any]:
    """Means over all prompts of the file, whenever they were done."""
    notes = list(ledger.done.values())

    def mean(key: str) -> float | None:
        values = [note[key] for note in notes if note.get(key) is not None]
        return round(statistics.fmean(values), 6) if values else None

    told: dict[str, Any] = {
        "prompts": len(notes),
        "rows": sum(note["kept"] for note in notes),
        "prompts_without_a_row": sum(not note["kept"] for note in notes),
        **{key: mean(key) for key in ("first", "mean", "best", "finished", "differing")},
    }
    scored = sum(note["scored"] for note in notes)
    if threshold is not None and scored:
        told["pass_rate"] = round(sum(note["passed"] for note in notes) / scored, 6)
        told["prompts_passed"] = round(sum(note["passed"] > 0 for note in notes) / len(notes), 6)
    errors: Counter[str] = Counter()
    for line in ledger.remarks:
        errors.update(line.get("errors", {}))
    return {**told, "errors": dict(errors)} if errors else told


def _told(summary: dict[str, Any], n: int, threshold: float | None) -> Iterator[str]:
    yield f"{summary['rows']} rows from {summary['prompts']} prompts, {n} answers each"
    if summary["prompts_without_a_row"]:
        yield f"{summary['prompts_without_a_row']} prompts gave no row"
    if summary["mean"] is not None:
        yield (
            f"score        first answer {summary['first']:.4f}, mean {summary['mean']:.4f}, best of {n} "
            f"{summary['best']:.4f}"
        )
        yield f"answers      {summary['finished']:.2f} of {n} ended by themselves, {summary['differing']:.2f} differ"
    if "pass_rate" in summary:
        yield (
            f"at least {threshold:g}   {100 * summary['pass_rate']:.1f} % of the answers, at least one to "
            f"{100 * summary['prompts_passed']:.1f} % of the prompts"
        )
    for name, count in summary.get("errors", {}).items():
        yield f"warning: the reward '{name}' failed on {count} answers: see the notes beside the file"
