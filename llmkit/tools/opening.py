"""A recipe's task in the hands of a tool: its data or its whole training, without a run and its log."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmkit.config import UserError
from llmkit.stages import stage_module
from llmkit.training.config import RunConfig
from llmkit.training.dist import Ranks, pick_device
from llmkit.training.log import RunLog
from llmkit.training.loop import Context, Stop
from llmkit.training.task import Task


class Quiet(RunLog):
    """A log that writes no file: what is said goes to a function."""

    def __init__(self, out: Path, say: Callable[[str], None] = lambda text: None):
        super().__init__(out, active=False)
        self._say = say

    def say(self, text: str) -> None:
        self._say(text)


def context(
    recipe: RunConfig, out: Path, ranks: Ranks | None = None, say: Callable[[str], None] = lambda text: None
) -> Context:
    """Surroundings of a task that leave no trace.

    Args:
        out: where the task may write files of a run, such as rollouts.
        ranks: default: this process alone, on the recipe's device.
        say: is told what a run's log would be.
    """
    place = ranks or Ranks(device=pick_device(recipe.device))
    return Context(recipe, out, place, Quiet(out, say), Stop())


def task_of(recipe: Any) -> Task:
    """The task of a recipe. Raises UserError for a stage that trains no network."""
    open_task = getattr(stage_module(recipe), "open_task", None)
    if open_task is None:
        raise UserError(f"stage {recipe.stage} trains no network: give the recipe of another stage")
    task: Task = open_task(recipe)
    return task


@contextlib.contextmanager
def opened_data(recipe: Any, ranks: Ranks | None = None) -> Iterator[tuple[Any, Context]]:
    """A task that has read its data and asked no model, and its surroundings.

    What `prepare` would make first is made: a tokenizer that is trained on the data, and the cache of encoded data,
    which a later run finds ready.
    """
    if recipe.stage == "distill" and recipe.cache is not None:
        recipe = recipe.model_copy(update={"cache": None})  # what the teacher says is no part of the rows
    task = task_of(recipe)
    ctx = context(recipe, Path(recipe.out), ranks)
    try:
        task.read(ctx)
        yield task, ctx
    finally:
        close = getattr(task, "close", None)
        if close is not None:
            close()
