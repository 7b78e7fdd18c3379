"""Reward functions of the user, found by name and called as TRL calls them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from llmkit.config import UserError, locate
from llmkit.rollout.rewards.config import PythonReward
from llmkit.rollout.rewards.grading import Answer, Grade


@contextlib.contextmanager
def _working_directory_first() -> Iterator[None]:
    """Lets modules of the working directory be imported, as `python script.py` beside them would."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the module may have taken it out itself
            sys.path.remove(here)


def find_function(name: str) -> Callable[..., Any]:
    """The function of a dotted name, `package.module:name` or `package.module.name`.

    The module is looked for in the working directory, among what is installed, and beside this package, where `data/`
    and `configs/` of a clone lie.

    Raises:
        UserError: if there is no such module or function, or importing it fails.
    """
    module_name, _, function_name = name.rpartition(":" if ":" in name else ".")
    if not module_name:
        raise UserError(f"function: {name}: write it as package.module:name")
    try:
        module = _import(module_name)
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"function: importing {module_name} failed: {type(e).__name__}: {e}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [k for k, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        raise UserError(
            f"function: {module_name} has no function '{function_name}'; it has {', '.join(known) or 'none'}"
        )
    return function


def _import(name: str) -> ModuleType:
    file = Path(*name.split(".")).with_suffix(".py")
    with _working_directory_first():
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as e:
            if e.name is None or not f"{name}.".startswith(f"{e.name}."):  # something that the module itself needs
                raise
    shipped = locate(file)
    if not shipped.is_file():
        raise UserError(f"function: there is no module '{name}': neither {file} in {Path.cwd()} nor an installed one")
    spec = importlib.util.spec_from_file_location(name, shipped)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FunctionGrader:
    """What the function returns for all answers of a call at once."""

    def __init__(self, config: PythonReward):
        self.config = config
        self.function = find_function(config.function)
        parameters = inspect.signature(self.function).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if unknown := sorted(config.arguments.keys() - self._names if not self._takes_all else ()):
            raise UserError(f"arguments: {config.function} takes no '{unknown[0]}'")

    def describe(self) -> str:
        return self.config.function

    def check(self, fields: Mapping[str, Any]) -> None:
        """Only the function knows what it needs."""

    def close(self) -> None:
        """There is nothing to end."""

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        """Calls it once.

        Conversations are passed as lists of messages, and their completions as the messages that follow them; plain
        prompts and completions as text. A column that a row lacks is None there. A function without **columns gets what
        it names.

        Raises:
            ValueError: if it returns another number of scores than there are answers.
        """
        columns = {name: [a.fields.get(name) for a in answers] for a in answers for name in a.fields}
        given: dict[str, Any] = {
            **columns,
            "prompts": [a.prompt for a in answers],
            "completions": [completion(a) for a in answers],
            "completion_ids": [a.ids[a.n_prompt :] for a in answers],
            **self.config.arguments,
        }
        if not self._takes_all:
            given = {name: value for name, value in given.items() if name in self._names}
        scores = self.function(**given)
        if inspect.iscoroutine(scores):
            scores = asyncio.run(scores)
        scores = list(scores)
        if len(scores) != len(answers):
            raise ValueError(f"{self.config.function} returned {len(scores)} scores for {len(answers)} answers")
        return scores


def completion(answer: Answer) -> list[dict[str, Any]] | str:
    """What the model added, in the form that the prompt has."""
    if isinstance(answer.prompt, str):
        return answer.text
    added = answer.messages[len(answer.prompt) :]
    return added or [{"role": "assistant", "content": answer.text}]
