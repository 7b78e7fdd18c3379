"""`llmkit rank`: several answers to each prompt, and somebody's ranking of them, as rows that `stage: reward` reads."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llmkit.config import UserError, validate
from llmkit.rollout.rewards.base import Rewards
from llmkit.serving.command import listen, need_libraries
from llmkit.serving.config import ServingConfig
from llmkit.tokenizer import Tokenizer
from llmkit.tools.annotators import Judgement, Noise, Person, agreement, pairs_of
from llmkit.tools.candidates import (
    Asked,
    Writer,
    blocks,
    check_out,
    fingerprint,
    read_prompts,
    sampling_of,
)
from llmkit.tools.grading import read_rewards, tokenizer_for, whole_answer
from llmkit.tools.ledger import Ledger, Record
from llmkit.tools.sitting import Ahead, Sitting, Source, keep
from llmkit.training.dist import pick_device

ANNOTATORS = ("person", "simulated", "none")


def run(args: argparse.Namespace) -> int:
    """Rows to --out; what a person is shown goes to stdout, notes and progress to stderr."""
    noise = _check(args)
    out = check_out(args.out)
    page = _page(args, out) if args.serve else None
    given = _from_model(args) if args.answers is None else _from_file(args)
    settings = {
        **given.settings,
        "command": "rank",
        "prompts": fingerprint(given.rows),
        "annotator": "page" if args.serve else args.annotator,
        "shuffle": args.shuffle,
    }
    judge = None
    if args.annotator == "simulated":
        configs = read_rewards(args.utility, "--utility")
        settings |= {"utility": [c.model_dump(mode="json") for c in configs], "noise": [noise.kind, noise.amount]}
        tokenizer = given.tokenizer or tokenizer_for(configs)
        judge = _Simulated(
            Rewards(configs, tokenizer, pick_device(args.device)), noise, args.seed, given.chat, tokenizer
        )
    rows = given.rows[: args.limit]
    with Ledger(out, settings) as ledger:
        todo = [row for row in rows if row.number not in ledger.done]
        if ledger.done:
            _say(f"{out}: {len(ledger.done)} prompts are done, {len(todo)} are left")
        if page is not None:
            _on_a_page(args, page, ledger, rows, given.source)
        elif args.annotator == "person":
            _by_person(args, ledger, rows, todo, given.source)
        else:
            _by_machine(args, ledger, todo, given.source, judge)
        summary = _summary(ledger, noise if judge is not None else None)
        ledger.tell({"summary": summary})
    for line in _told(summary, noise):
        _say(line)
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _check(args: argparse.Namespace) -> Noise:
    """Refuses what contradicts itself before a model is loaded."""
    if (args.prompts is None) == (args.answers is None):
        raise UserError("rank: give --prompts, to be answered by MODEL, or --answers, a file that holds the answers")
    if args.answers is not None and args.model is not None:
        raise UserError("rank: --answers holds the answers already: leave MODEL out")
    if args.prompts is not None and args.model is None:
        raise UserError("rank: name the MODEL that answers the prompts")
    if args.answers is not None and args.annotator == "none":
        raise UserError("rank: --answers with --annotator none leaves nothing to do")
    if args.serve and args.annotator in ("simulated", "none"):
        raise UserError(f"rank: --serve is for people, --annotator {args.annotator} needs no page: drop one of the two")
    if not args.serve and args.annotator not in ANNOTATORS:
        raise UserError(
            f"rank: --annotator {args.annotator}: one of {', '.join(ANNOTATORS)}, or with --serve the name of whoever ranks"
        )
    if args.k < 2:
        raise UserError(f"rank: -k must be at least 2, so that there is something to compare (got {args.k})")
    simulated = args.annotator == "simulated"
    if simulated != bool(args.utility):
        raise UserError("rank: --annotator simulated and --utility, by which it judges, belong together")
    if args.noise is not None and args.flip is not None:
        raise UserError("rank: give --noise or --flip, not both")
    if not simulated and (args.noise is not None or args.flip is not None):
        raise UserError("rank: --noise and --flip are for --annotator simulated")
    if args.noise is not None:
        return Noise("bradley_terry", args.noise)
    return Noise() if args.flip is None else Noise("flip", args.flip)


# --- where the answers come from -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Given:
    """Prompts, and where their answers come from."""

    rows: list[Asked]
    source: Source
    settings: Record
    chat: bool
    tokenizer: Tokenizer | None


def _from_model(args: argparse.Namespace) -> _Given:
    sampling = sampling_of(args, "rank")
    writer = Writer(args, sampling)
    shuffle = args.seed if args.shuffle else None
    rows = writer.fitting(read_prompts(args.prompts, writer.chat, args.column, shuffle), _say)

    def source(asked: Sequence[Asked]) -> list[list[str]]:
        return [[answer.text.strip() for answer in found] for found in writer.differing(asked, args.k)]

    return _Given(rows, source, {**writer.settings(), "k": args.k}, writer.chat, writer.tokenizer)


def _from_file(args: argparse.Namespace) -> _Given:
    """Prompts and answers of a file: rows with `responses`, as `--annotator none` writes them."""
    rows = []
    for row in read_prompts(args.answers, not args.raw, args.column, args.seed if args.shuffle else None):
        given = row.fields.get("responses")
        if not isinstance(given, list) or len(given) < 2 or not all(isinstance(r, str) for r in given):
            raise UserError(f"{row.at}: responses: a list of two or more answers is expected")
        number = row.fields.get("prompt_row", row.number)
        if type(number) is not int:
            raise UserError(f"{row.at}: prompt_row: a whole number is expected (got {number!r})")
        rows.append(replace(row, number=number))
    if len({row.number for row in rows}) < len(rows):
        raise UserError(f"{args.answers}: two rows have the same prompt_row: remove the column to number them anew")
    return _Given(rows, _given_answers, {"seed": args.seed}, not args.raw, None)


def _given_answers(asked: Sequence[Asked]) -> list[list[str]]:
    return [row.fields["responses"] for row in asked]


# --- who ranks them --------------------------------------------------------------------------------------------------


class _Simulated:
    """Ranks by a utility with noise; its draws depend on the seed and the prompt's number alone."""

    def __init__(self, rewards: Rewards, noise: Noise, seed: int, chat: bool, tokenizer: Tokenizer):
        self._rewards, self._noise, self._seed = rewards, noise, seed
        self._chat, self._tokenizer = chat, tokenizer

    def __call__(
        self, rows: Sequence[Asked], texts: Sequence[Sequence[str]]
    ) -> list[tuple[Judgement | None, list[float]]]:
        """A judgement and the utilities of each prompt's answers; none where an answer could not be judged."""
        answers = [
            whole_answer(row, text, self._tokenizer, self._chat)
            for row, some in zip(rows, texts, strict=True)
            for text in some
        ]
        utilities = iter(self._rewards.score(answers).total)
        judged: list[tuple[Judgement | None, list[float]]] = []
        for row, some in zip(rows, texts, strict=True):
            mine = [next(utilities) for _ in some]
            pick = random.Random(f"{self._seed}/{row.number}/noise")
            known = not any(map(math.isnan, mine))
            judged.append((Judgement(self._noise.draw(mine, pick)) if known else None, mine))
        return judged


def _by_machine(
    args: argparse.Namespace, ledger: Ledger, todo: Sequence[Asked], source: Source, judge: _Simulated | None
) -> None:
    with tqdm(total=len(todo), unit=" prompts", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        for block in blocks(todo, args.batch):
            texts = source(block)
            if judge is None:
                for row, some in zip(block, texts, strict=True):
                    keep(ledger, row, some, None)
            else:
                for row, some, (judgement, utilities) in zip(block, texts, judge(block, texts), strict=True):
                    keep(ledger, row, some, judgement, utilities)
            bar.update(len(block))


def _by_person(
    args: argparse.Namespace, ledger: Ledger, rows: Sequence[Asked], todo: Sequence[Asked], source: Source
) -> None:
    """One prompt after the other; the next one's answers are written while this one's are read."""
    person = Person(sys.stdin.readline, _show, args.seed)
    queue = list(todo)
    with Ahead(source) as ahead:
        while queue:
            row = queue[0]
            (responses,) = ahead(row, queue[1] if len(queue) > 1 else None)
            if len(responses) < 2:
                keep(ledger, queue.pop(0), responses, None)
                continue
            title = f"prompt {len(rows) - len(queue) + 1} of {len(rows)}"
            judgement = person.judge(title, row.number, row.prompt, responses)
            if judgement == "quit":
                _show(f"{len(queue)} prompts are left: the same command goes on\n")
                return
            if judgement == "undo":
                _undo(ledger, rows, queue)
            elif judgement == "skip":
                ledger.add(queue.pop(0).number, [], {"left_out": "skipped"})
            else:
                assert isinstance(judgement, Judgement)
                keep(ledger, queue.pop(0), responses, judgement)
        _show("that was the last prompt\n")


def _page(args: argparse.Namespace, out: Path) -> ServingConfig:
    """Where the page is to be; refused before a model is loaded."""
    need_libraries("rank --serve")
    key = args.api_key if args.api_key is not None else os.environ.get("LLMKIT_API_KEY") or None
    told = {"host": args.host, "port": args.port, "name": out.stem, "api_key": key}
    config: ServingConfig = validate(ServingConfig, told, {(): "rank --serve"})
    return config


def _on_a_page(
    args: argparse.Namespace, config: ServingConfig, ledger: Ledger, rows: Sequence[Asked], source: Source
) -> None:
    """Several people, each in a browser, until a signal comes."""
    from llmkit.serving.ranking import serve

    sitting = Sitting(ledger, rows, source, args.seed)
    with contextlib.closing(sitting), listen(config.host, config.port) as listener:
        serve(config, sitting, "" if args.annotator == "person" else args.annotator, listener)
        told = sitting.agreement()
    for pair in told["pairs"]:
        tau = "-" if pair["tau"] is None else f"{pair['tau']:.3f}"
        _say(f"{pair['a']} and {pair['b']}: Kendall's tau {tau} on {pair['n_prompts']} prompts of both")
    if told["alpha"] is not None:
        _say(f"Krippendorff's alpha (ordinal) of all: {told['alpha']:.3f}")
    ledger.tell({"agreement": told})


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _undo(ledger: Ledger, rows: Sequence[Asked], queue: list[Asked]) -> None:
    """Puts the last prompt that a person judged at the head of the queue again, and those left out since."""
    by_number = {row.number: row for row in rows}
    while True:
        last = ledger.take_back()
        if last is None:
            _show("there is nothing to undo\n")
            return
        number, note = last
        if number in by_number:  # else it lies beyond this time's --limit, and is judged another time
            queue.insert(0, by_number[number])
        if note.get("left_out") != "alike":
            return


# --- what came of it -------------------------------------------------------------------------------------------------


def _summary(ledger: Ledger, noise: Noise | None) -> dict[str, Any]:
    """Counts of the whole file and, of a simulated annotator, how far its labels can be trusted."""
    rows = ledger.rows()
    left_out = [note["left_out"] for note in ledger.done.values() if "left_out" in note]
    told: dict[str, Any] = {
        "rows": len(rows),
        "left_out": {why: left_out.count(why) for why in sorted(set(left_out))},
        "pairs": sum(len(pairs_of(row["ranking"])) for row in rows if "ranking" in row),
    }
    if noise is not None:
        found = agreement(noise, [(row["utility"], row["ranking"]) for row in rows])
        told |= {"noise": str(noise)}
        told |= {"ceiling": round(found.ceiling, 4), "agreed": round(found.agreed, 4)} if found.n_pairs else {}
    return told


_WHY = {
    "alike": "for which the model gave no two different finished answers",
    "tied": "whose answers are all equally good",
    "unjudged": "of which the utility could not judge every answer",
    "skipped": "skipped",
}


def _told(summary: dict[str, Any], noise: Noise) -> Iterator[str]:
    yield f"{summary['rows']} rows" + (f", {summary['pairs']} pairs" if summary["pairs"] else "")
    for why, n in summary["left_out"].items():
        yield f"{n} prompts left out, {_WHY[why]}"
    if "ceiling" in summary:
        yield (
            f"annotator's noise: {noise}; whoever knows its utilities agrees with {100 * summary['ceiling']:.1f} % of the "
            f"pairs, the most that a reward model can (these labels: {100 * summary['agreed']:.1f} %)"
        )
