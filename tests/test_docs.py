"""The commands and keys that README and the pages in docs/ show: each is one that `llmkit` understands, on recipes that hold.

`tests/campaign/test_docs_run.py` runs them. A line that needs what a small machine lacks says so: `# needs a GPU`,
`# needs the hub`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmkit.cli import build_parser
from llmkit.stages import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("README*.md")), ROOT / "data/README.md"]
NEEDS = re.compile(r"#.*\bneeds (a GPU|the hub|a cluster|a cloud|Docker)|# not tested: ")
PLACEHOLDERS = ("MODEL", "RECIPE", "PIPELINE")  # stand for what the reader has
PROGRAMS = ("llmkit", "python", "torchrun", "make", "pip", "sbatch", "kubectl", "sky", "docker")
SHELL = ("mkdir", "cat", "echo", "for", "done", "source")  # what else stands in blocks of shell


@dataclass(frozen=True)
class Command:
    """One command as a page shows it."""

    page: str
    section: str
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
        """Whether it can't be tried on one small machine: the page says why, or it would set up this one or test itself."""
        return NEEDS.search(self.text) is not None or self.text.startswith("make ")

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


def program(part: str) -> str:
    """The first word of a command without the variables before it and its folder."""
    words = part.split()
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        del words[0]
    return words[0].removeprefix(".venv/bin/") if words else ""


def commands(page: Path) -> list[Command]:
    found = []
    lines = page.read_text("utf-8").splitlines()
    for number, line in shell_lines(page):
        section = next((text for text in reversed(lines[:number]) if text.startswith("## ")), "")
        for part in re.split(r"\s(?:&&|\|)\s", line):
            name = program(part)
            if name in PROGRAMS and not part.startswith("llmkit/"):
                text = part[part.index(name) :].strip()
                found.append(Command(str(page.relative_to(ROOT)), section, number, text))
    return found


COMMANDS = [command for page in PAGES for command in commands(page)]


def test_pages_show_commands() -> None:
    assert len(COMMANDS) > 50
    assert len({c.page for c in COMMANDS}) > 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_line_of_shell_is_passed_over(page: Path) -> None:
    """What stands in a block of shell begins with a program that is run, or prepares for one."""
    for block in re.findall(r"^```(?:sh|bash)\n(.*?)^```", page.read_text("utf-8"), re.S | re.M):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            assert not line.strip() or program(line) in (*PROGRAMS, *SHELL), f"{page.name}: {line}"


def spans(page: Path) -> Iterator[str]:
    """Commands that a sentence names: `llmkit diff A B`."""
    for line in page.read_text("utf-8").splitlines():
        if not line.startswith("    "):
            yield from re.findall(r"`(llmkit [a-z][^`]*)`", line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_sentences_are_commands(page: Path) -> None:
    """Each names a command, and only options that this one has."""
    choices = next(a.choices for a in build_parser()._actions if a.dest == "command")
    assert choices is not None
    for span in spans(page):
        name = span.split()[1]
        assert name in choices, f"{page.name}: {span}"
        known = choices[name]._option_string_actions
        for option in re.findall(r"(?<=\s)--?[a-z][\w-]*", span):
            assert option in known, f"{page.name}: {span}: no option {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_hold(page: Path) -> None:
    """Every command of llmkit's parses; its recipe holds with the overrides that the page gives."""
    for command in commands(page):
        if command.words[0] != "llmkit":
            continue
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
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_reached_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#\s]+)", (ROOT / "README.md").read_text("utf-8")))
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= linked


# --- the keys of recipes that pages name -----------------------------------------------------------------------------

FILES = (".json", ".safetensors", ".jsonl", ".md", ".yaml", ".py", ".png", ".html", ".model", ".onnx", ".data")
NO_KEYS = ("optim.lrr", "batch.part", "losses.", "data.rewards")  # the mistake that README shows; names in Python


def keys_of(node: dict[str, Any], before: str = "", within: tuple[str, ...] = ()) -> Iterator[str]:
    """Dotted keys that the recipes' schema knows. What may have any key ends with an asterisk."""
    if "$ref" in node:
        name = node["$ref"].rsplit("/", 1)[1]
        if within.count(name) < 2:
            yield from keys_of(SCHEMA["$defs"][name], before, (*within, name))
    for part in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        yield from keys_of(part, before, within)
    if isinstance(node.get("items"), dict):
        yield from keys_of(node["items"], before, within)
    if isinstance(node.get("additionalProperties"), dict):
        yield f"{before}.*"
    for key, part in node.get("properties", {}).items():
        yield f"{before}.{key}".lstrip(".")
        yield from keys_of(part, f"{before}.{key}".lstrip("."), within)


SCHEMA = json.loads((ROOT / "configs/recipe.schema.json").read_text("utf-8"))
KEYS = set(keys_of(SCHEMA))
SECTIONS = {key.split(".")[0] for key in KEYS}


def told(value: Any, before: str = "") -> Iterator[str]:
    """Dotted keys of a piece of a recipe."""
    for one in value if isinstance(value, list) else [value]:
        for key, part in one.items() if isinstance(one, dict) else ():
            yield f"{before}.{key}".lstrip(".")
            yield from told(part, f"{before}.{key}".lstrip("."))


def named_keys(page: Path) -> Iterator[str]:
    text = page.read_text("utf-8")
    for block in re.findall(r"^```yaml\n(.*?)^```", text, re.S | re.M):
        recipe = yaml.safe_load(block)
        if "nodes" not in recipe:
            yield from told(recipe)
    for span in re.findall(r"`([^`\n]+)`", text):
        if match := re.fullmatch(r"([a-z_]+): [\[{].*[\]}]", span):
            yield from told(yaml.safe_load(span)) if match[1] in SECTIONS else ()
        for key in re.findall(r"(?<![\w./{-])[a-z_]+(?:\.[a-z_]+)+(?![\w/*(-])", span):
            if key.split(".")[0] in SECTIONS and not key.endswith(FILES):
                yield key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_keys_of_recipes_are_keys(page: Path) -> None:
    """Those of blocks of YAML and of sentences. Rewards have the keys of their kinds, which the schema doesn't tell apart."""
    free = tuple(key[:-1] for key in KEYS if key.endswith("*"))
    for key in named_keys(page):
        known = key in KEYS or key.startswith((*free, *NO_KEYS)) or ".rewards." in key
        assert known, f"{page.name}: {key} is no key of a recipe"


def test_there_are_keys() -> None:
    assert {"optim.lr", "data.train.path", "eval.samples.prompts", "lora.r"} <= KEYS and "lora.rank" not in KEYS
    assert sum(len(list(named_keys(page))) for page in PAGES) > 300
