"""Rewards of the demo world, for recipes: `{kind: python, function: data.rewards.quality}`.

Called as TRL calls reward functions, with the columns of the rows as lists. A row's columns are the oracle's item, as in
`prompts.jsonl` and `heldout.jsonl`; where a row tells it in a column `item`, as in the chats, that is taken.
"""

import importlib.util
from pathlib import Path


def _load_world():
    """By its path, so that it doesn't matter from where recipes are run."""
    spec = importlib.util.spec_from_file_location("demo_world", Path(__file__).with_name("world.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


W = _load_world()


def _text(completion):
    """What was answered: plain text, or the last message of a conversation."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _items(n, columns):
    """The item of every row; None where a row is none of the demo world's."""
    rows = [{key: values[i] for key, values in columns.items() if values[i] is not None} for i in range(n)]
    items = [row.get("item", row) for row in rows]
    return [item if {"kind", "lang", "answer"} <= item.keys() else None for item in items]


def quality(prompts, completions, **columns):
    """0 to 1: safe before correct before polite before concise (`world.quality`'s total)."""
    items = _items(len(completions), columns)
    return [None if i is None else W.quality(i, _text(c))["total"] for i, c in zip(items, completions, strict=True)]


def correct(prompts, completions, **columns):
    """1 if the right answer can be found in the text, however it is wrapped up, else 0."""
    items = _items(len(completions), columns)
    return [None if i is None else W.quality(i, _text(c))["correct"] for i, c in zip(items, completions, strict=True)]


def exact(prompts, completions, **columns):
    """1 if the text is the right answer but for case, blanks around it and final punctuation, else 0."""
    items = _items(len(completions), columns)
    return [None if i is None else W.score(i, _text(c)) for i, c in zip(items, completions, strict=True)]
