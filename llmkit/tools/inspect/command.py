"""`llmkit inspect RECIPE | MODEL`."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkit.config import UserError
from llmkit.data.loader import RowLoader
from llmkit.rollout.prompts import PromptOrder
from llmkit.stages import load_recipe
from llmkit.storage import replace_file, resolve_model
from llmkit.tools.inspect.figures import described, dropped_tokens, left_out, shares
from llmkit.tools.inspect.page import page
from llmkit.tools.inspect.parameters import lines, parameters_of
from llmkit.tools.inspect.shown import Text, text_of, texts_of
from llmkit.tools.inspect.terminal import colours_wanted, legend, lines_of
from llmkit.tools.opening import opened_data
from llmkit.training.engine import seed_of
from llmkit.training.policy import PolicyTask
from llmkit.training.task import Context, Task


def run(args: argparse.Namespace) -> int:
    """Shows a recipe's batches, or a model's parameters."""
    if not args.what.endswith((".yaml", ".yml")):
        if args.overrides or args.html:
            raise UserError(f"{args.what}: key=value and --html are for recipes (.yaml)")
        folder = resolve_model(args.what)
        print("\n".join(lines(folder, parameters_of(folder))))
        return 0
    if args.step < 1 or args.texts < 1:
        raise UserError("--step and --texts count from 1")
    recipe = load_recipe(args.what, args.overrides)
    with opened_data(recipe) as (task, ctx):
        told = list(_told(task, ctx, recipe))
        found = _texts(task, ctx, recipe, args.step)
        texts = list(found) if args.html else list(itertools.islice(found, args.texts))
    title = f"{Path(args.what).stem} ({recipe.stage}), {'prompts' if isinstance(task, PolicyTask) else 'step'} "
    title += f"{args.step}" if not isinstance(task, PolicyTask) else f"of rollout {args.step}"
    if args.html:
        replace_file(Path(args.html), page(title, told, texts))
        print(f"{args.html}: {len(texts):,} texts")
        return 0
    coloured = colours_wanted()
    print("\n".join([title, *told, "", legend(coloured)]))
    for text in texts:
        print("\n".join(lines_of(text, coloured, args.tokens)))
    return 0


def _sources(task: Any) -> list[Any]:
    """Of the training split, whatever the stage calls it."""
    if hasattr(task, "judging"):
        return list(task.judging.split("train"))
    data = task.lessons.data if hasattr(task, "lessons") else task.data
    return list(data.train)


def _told(task: Task, ctx: Context, recipe: Any) -> Iterator[str]:
    if isinstance(task, PolicyTask):
        n_train, n_valid = (sum(map(len, s)) for s in (task.prompts.train, task.prompts.valid))
        lengths = sorted(len(row.ids) for source in task.prompts.train for row in source)
        yield f"prompts    {n_train:,} to train on, {n_valid:,} held out; {task.prompts.n_cut:,} cut at their beginning"
        yield f"lengths    {lengths[0]} to {lengths[-1]} tokens, the middle one {lengths[len(lengths) // 2]}"
        return
    loader = _loader(task, ctx)
    try:
        yield from described(shares(loader, recipe.steps), loader, recipe.steps)
        yield from left_out(_sources(task))
        yield from dropped_tokens(loader)
    finally:
        loader.close()


def _loader(task: Task, ctx: Context) -> RowLoader:
    loader = task.open_rows(ctx)
    assert loader is not None
    return loader


def _texts(task: Any, ctx: Context, recipe: Any, step: int) -> Iterator[Text]:
    """Of a step, counted from 1; of ppo and grpo the prompts of a rollout."""
    if isinstance(task, PolicyTask):
        n, order = recipe.rollout.prompts_per_step, PromptOrder(task.prompts, seed_of(recipe.seed, "order"))
        for i, row in enumerate(order.draw((step - 1) * n, n)):
            yield text_of(f"prompt {i}, row {row.number} of the data", row.ids, [0.0] * len(row.ids), task.tokenizer)
        return
    causal = getattr(task, "model_config", None) is None or task.model_config.causal or recipe.stage == "reward"
    loader = _loader(task, ctx)
    try:
        for batch in loader.step(step - 1):
            yield from texts_of(batch, task.tokenizer, causal)
    finally:
        loader.close()
