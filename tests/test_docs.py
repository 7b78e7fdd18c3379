"""The commands that the pages in docs/ show: each is one that `llmkit` understands, on recipes that hold.

`tests/campaign/test_docs_run.py` runs them. A line that needs what a small machine lacks says so: `# needs a GPU`,
`# needs the hub`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmkit.cli import build_parser
from llmkit.stages import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
NEEDS = re.compile(r"# needs (a GPU|the hub)")
PLACEHOLDERS = ("MODEL", "RECIPE", "PIPELINE")  # stand for what the reader has


@dataclass(frozen=True)
class Command:
    """One `llmkit` command as a page shows it."""

    page: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        """What a shell would make of it, without redirections and the parts in brackets, which the reader may leave out."""
        text, before = re.sub(r"\s\d?>\s*\S+", "", self.text), ""
        while text != before:
            before, text = text, re.sub(r"(?<=\s)\[[^\[\]'\"]*\](?=\s|$|\])", "", text)
        return shlex.split(text, comments=True)

    @property
    def elsewhere(self) -> bool:
        return NEEDS.search(self.text) is not None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def shell_lines(page: Path) -> Iterator[tuple[int, str]]:
    """Lines of shell blocks and of indented ones with their numbers; what ends with a backslash goes on."""
    fence: str | None = None
    begun, first = "", 0
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
        if line.startswith("```"):
            fence = line[3:].strip() if fence is None else None
            continue
        shell = fence in ("", "sh", "bash") if fence is not None else line.startswith("    ")
        if not shell:
            continue
        first = first if begun else number
        begun += line.strip().removesuffix("\\")
        if not line.endswith("\\"):
            yield first, begun.removeprefix("$ ")
            begun = ""


def commands(page: Path) -> list[Command]:
    found = []
    for number, line in shell_lines(page):
        for part in re.split(r"\s(?:&&|\|)\s", line):
            name = part.strip().removeprefix(".venv/bin/")
            if name.startswith("llmkit "):
                found.append(Command(page.name, number, name))
    return found


COMMANDS = [command for page in PAGES for command in commands(page)]


def test_pages_show_commands() -> None:
    assert len(COMMANDS) > 50
    assert len({c.page for c in COMMANDS}) > 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_hold(page: Path) -> None:
    """Every command parses; its recipe holds with the overrides that the page gives."""
    for command in commands(page):
        try:
            args = build_parser().parse_args(command.words[1:])
        except SystemExit:
            pytest.fail(f"{command}: no such command")
        recipe = getattr(args, "recipe", None)
        if recipe is not None and recipe not in PLACEHOLDERS and (ROOT / recipe).is_file():
            load_recipe(str(ROOT / recipe), [o for o in args.overrides if not o.startswith("part=")])
        elif recipe is not None and recipe.startswith("configs/"):
            pytest.fail(f"{command}: there is no such recipe")


def test_few_commands_need_another_machine() -> None:
    elsewhere = [str(c) for c in COMMANDS if c.elsewhere]
    assert len(elsewhere) <= 0.1 * len(COMMANDS), elsewhere


def test_links_lead_somewhere() -> None:
    """Links from page to page, and to pictures, name files that are there."""
    for page in (*PAGES, *ROOT.glob("README*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
