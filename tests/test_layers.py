"""Imports go strictly down, and what answers at once imports nothing heavy."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llmkit

PACKAGE = Path(llmkit.__file__).parent
# From the ground up. A module belongs to the entry with the longest matching name; it may import lower floors and, as
# long as no cycle arises, its own.
FLOORS: list[tuple[str, ...]] = [
    ("config", "*.config", "stages.recipes"),
    ("storage", "sandbox", "products", "lineage"),
    ("tokenizer",),
    ("training.dist", "training.liveness"),
    ("training.watch",),
    ("training.log",),
    (
        "model",
        "data",
        "losses",
        "advantages",
        "plan",
        "training.optim",
        "training.parallel",
        "training.experts",
        "training.guard",
        "training.norms",
        "training.freeze",
        "training.meter",
    ),
    ("inference", "training.engine", "training.checkpoint", "training.team", "training.wholes", "training.task"),
    ("training.loop", "evaluation", "export"),
    (
        "training.supervised",
        "training.setup",
        "training.jobs",
        "training.judging",
        "training.preferring",
        "training.policy",
        "rollout",
        "evaluation.harness",
        "distill",
    ),
    ("stages",),
    ("pipeline", "tools", "serving"),
    ("commands",),
    ("cli",),
]
HEAVY = ("torch", "datasets", "pyarrow", "pandas", "transformers", "matplotlib", "tensorboard", "tqdm.auto")


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py")) if "_shipped" not in file.parts}


def imports_of(file: Path) -> set[str]:
    """Every module of ours that a file imports, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are absolute here"
            names = [f"{node.module}.{a.name}" for a in node.names]
        for name in names:
            if name.startswith("llmkit."):
                inner = name.removeprefix("llmkit.")
                found.add(inner if inner in MODULES else inner.rpartition(".")[0])
    return found - {""}


IMPORTS = {name: imports_of(file) for name, file in MODULES.items()}


def floor_of(name: str) -> int:
    """The number of a module's floor."""
    if name.endswith(".config"):
        return 0
    entries = {entry: i for i, floor in enumerate(FLOORS) for entry in floor}
    matching = [e for e in entries if name == e or name.startswith(e + ".")]
    assert matching, f"{name} has no floor: give it one in FLOORS, and in docs/architecture.md"
    return entries[max(matching, key=len)]


def upward(name: str, targets: set[str]) -> list[str]:
    """What a module must not import."""
    allowed = {t for t in targets if t == "stages" and name.startswith("stages.")}
    return sorted(t for t in targets - allowed if floor_of(t) > floor_of(name))


@pytest.mark.parametrize("name", [n for n in MODULES if n and MODULES[n].stat().st_size])
def test_imports_go_down(name: str) -> None:
    assert not upward(name, IMPORTS[name]), f"{name}: these lie above it"


def test_the_guard_sees(tmp_path: Path) -> None:
    """An upward import is found inside a function and under an alias too."""
    lines = ["from llmkit.training import loop as x", "import llmkit.cli", "from llmkit.stages import STAGES"]
    (tmp_path / "a.py").write_text("def f():\n    " + "\n    ".join(lines))
    found = imports_of(tmp_path / "a.py")
    assert found == {"training.loop", "cli", "stages"}
    assert upward("model.gpt", found) == ["cli", "stages", "training.loop"]
    assert upward("tools.x", found) == ["cli"]


def test_there_is_no_cycle() -> None:
    """Neighbours may know each other, but only in one direction."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' -> '.join((*path, name))}"
        if name not in done:
            for target in sorted(IMPORTS[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_stages_never_import_stages() -> None:
    """What two stages share lives a floor below; the package itself and its recipes belong to all of them."""
    shared = {"stages", "stages.schema"} | {n for n in MODULES if n.startswith("stages.recipes")}
    for name, targets in IMPORTS.items():
        if name.startswith("stages.") and name not in shared:
            assert not {t for t in targets if t.startswith("stages.")} - shared, name
    for name in shared - {"stages", "stages.schema"}:
        assert not {t for t in IMPORTS[name] if t.startswith("stages")} - shared, name


def test_only_the_command_line_knows_argv() -> None:
    """Nothing but cli.py reads sys.argv, and nothing of the package imports the tests or the scripts."""
    for name, file in MODULES.items():
        text = file.read_text("utf-8")
        assert "sys.argv" not in text or name in ("cli", "data.workers"), name
        assert "import scripts" not in text and "from tests" not in text, name


ANSWERS_AT_ONCE = {
    "import of the cli": "import llmkit.cli",
    "--help": "from llmkit.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    "--version": "from llmkit.cli import main\nmain(['--version'])",
    "schema": "from llmkit.cli import main\nmain(['schema'])",
    "import of the stages": "import llmkit.stages",
    "a wrong recipe": "from llmkit.cli import main\nassert main(['train', 'configs/pretrain/demo.yaml', 'x=1']) == 2",
    "no such recipe": "from llmkit.cli import main\nassert main(['plan', 'configs/pretrain/dmo.yaml']) == 2",
}


@pytest.mark.parametrize("case", ANSWERS_AT_ONCE)
def test_nothing_heavy_is_imported_before_it_must(case: str) -> None:
    """Help, schema and an error in a recipe come without torch; help and version even without pydantic and numpy."""
    heavy = HEAVY + (("pydantic", "numpy", "tokenizers", "yaml") if case in ("import of the cli", "--help") else ())
    code = f"{ANSWERS_AT_ONCE[case]}\nimport sys\nprint('HEAVY', [m for m in {heavy!r} if m in sys.modules])"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("HEAVY []"), done.stdout[-300:]
