"""Rollouts as a page shows them: some answers of some rollouts, token by token in columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkit.tools.report.curves import parsed, short

Record = dict[str, Any]
COLUMNS = ("kl", "advantage", "value", "logprob")
_PIECE = "\ufffd"  # what a token that is a part of a character decodes to
_LINES, _BYTES = 512, 32 << 20  # of a file that are read


def read_rollouts(run: Path, most_files: int, most_answers: int, most_tokens: int) -> list[Record]:
    """Rollouts at equal distances, the first and the last among them, with some of their answers.

    Args:
        run: the run's folder.
        most_files: rollouts that are shown.
        most_answers: of each; prompts that come again in other rollouts are preferred, so that they can be compared.
        most_tokens: of an answer.
    """
    files = sorted((run / "rollouts").glob("rollout-*.jsonl"))
    chosen = spread(files, most_files)
    read = [_lines(file) for file in chosen]
    seen: dict[str, int] = {}
    for answers in read:
        for prompt in {a["prompt"] for a in answers}:
            seen[prompt] = seen.get(prompt, 0) + 1
    return [
        {
            "number": int(file.stem.rpartition("-")[2]),
            "n": len(answers),
            "answers": [shown(a, most_tokens) for a in _choose(answers, seen, most_answers)],
        }
        for file, answers in zip(chosen, read, strict=True)
        if answers
    ]


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, at equal distances, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    if most <= 1:
        return list(items[-most:]) if most else []
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _lines(file: Path) -> list[Record]:
    with file.open("rb") as f:
        lines = f.read(_BYTES).split(b"\n")[:-1]
    return parsed(lines[:_LINES], file)


def _choose(answers: Sequence[Record], seen: dict[str, int], most: int) -> list[Record]:
    """Groups of answers to one prompt, of each the best and the worst first, until there are enough."""
    groups: dict[int, list[Record]] = {}
    for answer in answers:
        groups.setdefault(answer["group"], []).append(answer)
    ordered = sorted(groups.values(), key=lambda group: -seen[group[0]["prompt"]])
    each = max(2, most // max(1, len(ordered)))
    chosen: list[Record] = []
    for group in ordered:
        by_reward = sorted(group, key=lambda a: (a["reward"] is None, -(a["reward"] or 0)))
        chosen += spread(by_reward, min(each, most - len(chosen)))
    return chosen


def shown(answer: Record, most_tokens: int) -> Record:
    """An answer with its tokens in columns: their texts, and what is known of each; null where the policy didn't write it."""
    tokens = answer["tokens"][:most_tokens]
    columns = {}
    for name in COLUMNS:
        if any(name in token for token in tokens):
            values = [token.get(name) for token in tokens]
            columns[name] = [None if v is None else short(v, 3) for v in values]
    return {
        "group": answer["group"],
        "prompt": answer["prompt"],
        "reward": answer["reward"],
        "parts": answer["parts"],
        "finished": answer["finished"],
        "texts": whole_characters([token["text"] for token in tokens], answer["answer"]),
        "cut": max(0, len(answer["tokens"]) - most_tokens),
        **columns,
    }


def whole_characters(texts: Sequence[str], answer: str) -> list[str]:
    """The texts of tokens, where several of them make one character together, with that character at the first of them.

    A token that is a part of a character decodes to a replacement sign alone; which character it was, the text of the
    whole answer tells: it stands between what is before and what is behind.
    """
    made, at, i = list(texts), 0, 0
    while i < len(texts):
        if _PIECE not in texts[i]:
            if not answer.startswith(texts[i], at):
                return list(texts)  # the pieces don't add up to the answer: they are shown as they are
            at, i = at + len(texts[i]), i + 1
            continue
        end = i
        while end < len(texts) and _PIECE in texts[end]:
            end += 1
        following = texts[end] if end < len(texts) else ""
        stop = answer.find(following, at + 1) if following else len(answer)
        if stop < 0:
            return list(texts)
        made[i:end] = [answer[at:stop], *[""] * (end - i - 1)]
        at, i = stop, end
    return made
