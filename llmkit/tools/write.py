"""`llmkit generate MODEL --prompts FILE --out FILE`: what a model writes to every prompt of a file, as rows of another."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from llmkit.config import UserError
from llmkit.data.layouts import Message
from llmkit.inference.command import DTYPES, read_sampling
from llmkit.tools.candidates import Asked, Drawn, Writer, blocks, check_out, fingerprint, read_prompts
from llmkit.tools.ledger import Ledger, Record

BATCH = 16  # prompts answered side by side


def run(args: argparse.Namespace) -> int:
    """Rows to --out, notes and progress to stderr. Prompts that are answered there already are not answered again."""
    _check(args)
    out, sampling = check_out(args.out), read_sampling(args)
    # A text depends on the seed and its prompt's row, so the file is the same however often it was begun anew.
    writer = Writer(argparse.Namespace(**{**vars(args), "seed": sampling.seed}), sampling, DTYPES.get(args.precision))
    if args.system is not None and not writer.chat:
        raise UserError("--system is for chat models: this one continues text")
    rows = [_instructed(row, args.system) for row in read_prompts(args.prompts, writer.chat, args.column)]
    rows = writer.fitting(rows, _say)
    settings = {
        **writer.settings(),
        "command": "generate",
        "prompts": fingerprint(rows),
        "precision": args.precision,
        "system": args.system,
    }
    with Ledger(out, settings) as ledger:
        todo = [row for row in rows[: args.limit] if row.number not in ledger.done]
        if ledger.done:
            _say(f"{out}: {len(ledger.done)} prompts are done, {len(todo)} are left")
        with tqdm(total=len(todo), unit=" prompts", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
            for block in blocks(todo, args.batch or BATCH):
                for row, drawn in zip(block, writer.draw(block, sampling.n), strict=True):
                    ledger.add(row.number, _rows_of(row, drawn), {"tokens": sum(len(d.ids) for d in drawn)})
                    bar.update()
        cut = sum(not row["finished"] for row in ledger.rows())
        told = f", {cut:,} of them cut off by max_new_tokens or the context" if cut else ""
        _say(f"{out}: {len(ledger.done) * sampling.n:,} texts to {len(ledger.done):,} prompts{told}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _check(args: argparse.Namespace) -> None:
    if args.out is None:
        raise UserError("generate: --prompts needs --out, the .jsonl that the texts are written to")
    if args.candidates is not None:
        raise UserError("generate: --candidates shows what follows one prompt: drop it, or --prompts")
    if args.draft is not None or args.draft_tokens is not None:
        raise UserError("generate: --draft is about one prompt at a time: drop it, or --prompts")
    for option in ("batch", "limit"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"generate: --{option} must be at least 1 (got {value})")


def _instructed(row: Asked, system: str | None) -> Asked:
    """The prompt with the system message, if it has none of its own."""
    if system is None or isinstance(row.prompt, str) or row.prompt[0]["role"] == "system":
        return row
    instruction: Message = {"role": "system", "content": system}
    return replace(row, prompt=[instruction, *row.prompt])


def _rows_of(row: Asked, drawn: Sequence[Drawn]) -> list[Record]:
    """A row for each text, in a layout of `stage: sft`, with the prompt's other columns."""
    found = []
    for k, one in enumerate(drawn):
        turn: Record = {"prompt": row.prompt, "completion": one.text}
        if not isinstance(row.prompt, str):
            turn = {"messages": [*row.prompt, {"role": "assistant", "content": one.text}]}
        number = {"sample": k} if len(drawn) > 1 else {}
        found.append({**turn, **number, "finished": one.finished, **row.others})
    return found
