"""What a check is, and how a list of them is gone through."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from llmkit.config import UserError
from llmkit.tools.doctor.patient import NotHere, Patient


@dataclass(frozen=True)
class Check:
    """Something that holds in a run that is well."""

    name: str
    holds: str
    """What is looked at, as a statement."""
    cause: str
    """What it usually is, where it does not hold."""
    remedy: str
    find: Callable[[Patient], str | None]
    """What is wrong, with its numbers; None: nothing. Raises NotHere where the recipe has no such thing."""
    needs: tuple[str, ...] = ()
    """Checks without which this one means nothing: it is left out if one of them failed, so that the first cause is told
    and not what follows from it."""


@dataclass(frozen=True)
class Finding:
    """A check's outcome."""

    check: Check
    state: str
    """ok, failed, none (the recipe has no such thing), open (a check that it needs failed)."""
    told: str
    seconds: float


def examine(checks: Sequence[Check], patient: Patient, only: Collection[str] = ()) -> Iterator[Finding]:
    """Goes through the checks in their order.

    Args:
        only: names; those that they need are gone through too. Default: all.
    """
    wanted = _with_needs(checks, only)
    failed: set[str] = set()
    for check in checks:
        if only and check.name not in wanted:
            continue
        if blocked := [name for name in check.needs if name in failed]:
            failed.add(check.name)  # so that what needs this one is left out too
            yield Finding(check, "open", f"{blocked[0]} must hold first", 0.0)
            continue
        started = time.perf_counter()
        try:
            told = check.find(patient)
            state = "ok" if told is None else "failed"
        except NotHere as e:
            state, told = "none", str(e)
        except UserError:
            raise  # a mistake in the recipe: the command says it as every command does
        except Exception as e:
            frame = traceback.extract_tb(e.__traceback__)[-1]
            state, told = "failed", f"{type(e).__name__}: {e} ({frame.filename}:{frame.lineno})"
        if state == "failed":
            failed.add(check.name)
        yield Finding(check, state, told or "", time.perf_counter() - started)


def _with_needs(checks: Sequence[Check], only: Collection[str]) -> set[str]:
    needs = {check.name: check.needs for check in checks}
    if unknown := sorted(set(only) - needs.keys()):
        raise UserError(f"--only {unknown[0]}: no such check: one of {', '.join(needs)}")
    wanted = set(only)
    while more := {need for name in wanted for need in needs[name]} - wanted:
        wanted |= more
    return wanted
