"""`llmkit doctor [RECIPE]`."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from llmkit.config import UserError
from llmkit.stages import load_recipe
from llmkit.tools.doctor import data_checks, number_checks, policy_checks, run_checks
from llmkit.tools.doctor.check import Check, Finding, examine
from llmkit.tools.doctor.environment import facts
from llmkit.tools.doctor.patient import Patient
from llmkit.tools.opening import task_of

_BY_NAME = {
    check.name: check
    for module in (data_checks, number_checks, policy_checks, run_checks)
    for check in module.CHECKS
}  # fmt: skip
_SIGNS = {"ok": "ok  ", "failed": "FAIL", "none": "-   ", "open": "?   "}


def _sorted(checks: dict[str, Check]) -> tuple[Check, ...]:
    """Every check after those that it needs, otherwise in the order in which they are written."""
    found: dict[str, Check] = {}

    def add(name: str) -> None:
        for need in checks[name].needs:
            if need not in found:
                add(need)
        found.setdefault(name, checks[name])

    for name in checks:
        add(name)
    return tuple(found.values())


CHECKS = _sorted(_BY_NAME)


def run(args: argparse.Namespace) -> int:
    """Prints what was found; 1 if something is wrong."""
    if args.list:
        for check in CHECKS:
            print(f"{check.name:18s} {check.holds}\n{'':18s} else: {check.cause}; {check.remedy}")
        return 0
    if args.recipe is None and (args.overrides or args.only):
        raise UserError("doctor: --only and key=value are about a recipe: name one")
    recipe = None if args.recipe is None else load_recipe(args.recipe, args.overrides)
    bad = _environment(Path("runs" if recipe is None else recipe.out))
    if recipe is None:
        return int(bad)
    task_of(recipe)  # refuses a stage without a network before anything is made
    started = time.perf_counter()
    torch.set_num_threads(1)  # the network is small: threads would wait for each other
    print(f"\n{args.recipe} ({recipe.stage}), on a small network of its kind")
    with tempfile.TemporaryDirectory(prefix="llmkit-doctor-") as folder:
        patient = Patient(recipe, Path(folder))
        try:
            findings = [_print(finding) for finding in examine(CHECKS, patient, args.only)]
        finally:
            patient.close()
    states = [finding.state for finding in findings]
    failed = states.count("failed")
    print(
        f"\n{states.count('ok')} checks hold, {failed} failed"
        + (f", {states.count('open')} could not be made because of that" if failed else "")
        + f", {states.count('none')} don't apply; {time.perf_counter() - started:.0f} s"
    )
    return int(bool(failed) or bad)


def _environment(out: Path) -> bool:
    """Tells of the machine; whether something of it is fatal."""
    bad = False
    for fact in facts(out):
        sign = "ok  " if fact.advice is None else "FAIL" if fact.fatal else "note"
        print(f"{sign}  {fact.name:10s} {fact.told}" + (f"\n{'':17s}{fact.advice}" if fact.advice else ""))
        bad = bad or fact.fatal
    return bad


def _print(finding: Finding) -> Finding:
    check = finding.check
    note = f" ({finding.told})" if finding.state in ("none", "open") else ""
    print(f"{_SIGNS[finding.state]}  {check.name:18s} {check.holds}{note}", flush=True)
    if finding.state == "failed":
        for name, text in (("found", finding.told), ("cause", check.cause), ("remedy", check.remedy)):
            print(f"{'':24s} {name}: {text}")
    return finding


def failures(findings: Sequence[Finding]) -> list[str]:
    """Names of the checks that failed."""
    return [finding.check.name for finding in findings if finding.state == "failed"]
