"""The commands of README.md run as they stand there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.cli import build_parser
from llmkit.stages import load_recipe

ROOT = Path(__file__).parent.parent
LINKED = ("configs", "data", "docs", "scripts", "tests", "llmkit", "README.md", "pyproject.toml", "Makefile")


def blocks(page: str = "README.md") -> list[str]:
    """The shell blocks of a README, without the lines that say `# not tested`, and why."""
    readme = ROOT / page
    text = readme.read_text("utf-8") if readme.is_file() else ""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M):
        lines = [line for line in block.splitlines() if line.strip() and "# not tested" not in line]
        if lines:
            found.append("\n".join(lines))
    return found


def test_what_is_not_tested_says_why() -> None:
    for line in (ROOT / "README.md").read_text("utf-8").splitlines():
        if "# not tested" in line:
            assert re.search(r"# not tested[^:]*: \S+ \S+", line), line


def test_the_commands_are_commands() -> None:
    """Every `llmkit` and `torchrun` line parses, and its recipe holds with the overrides given."""
    n_commands = 0
    for line in "\n".join(blocks()).splitlines():
        words = shlex.split(line, comments=True)
        starts = [i + 1 for i, word in enumerate(words) if Path(word).name in ("llmkit", "train.py")]
        if not starts:
            continue
        argv = words[starts[0] :]
        args = build_parser().parse_args(["train", *argv] if words[starts[0] - 1].endswith("train.py") else argv)
        if "recipe" in args and "overrides" in args:
            load_recipe(args.recipe, args.overrides)
        n_commands += 1
    assert n_commands, "README.md shows no command of ours"


def run_blocks(page: str, at: Path) -> None:
    """One after the other in one folder that looks like a clone, so what they write stays out of this one."""
    for name in LINKED:
        if (ROOT / name).exists():
            (at / name).symlink_to(ROOT / name)
    (at / ".venv").symlink_to(sys.prefix)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    for block in blocks(page):
        done = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", block], cwd=at, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.timeout(600)
def test_the_commands_run(tmp_path: Path) -> None:
    assert blocks(), "README.md shows no shell block"
    run_blocks("README.md", tmp_path)
