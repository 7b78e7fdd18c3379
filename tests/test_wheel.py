"""The wheel works outside the clone: the command, the recipes and the demo's data are in it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SOURCES = ("llmkit", "configs", "data", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def run(argv: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=240, env=environment)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without network from a copy of the sources, so that the clone stays as it is."""
    if importlib.util.find_spec("setuptools") is None or not (ROOT / "setup.py").is_file():
        pytest.skip("setuptools or the sources are not here: no wheel is built")
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, target = ROOT / name, folder / "source" / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, target)
    argv = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "."]
    done = run([*argv, "--wheel-dir", str(folder)], folder / "source")
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("llmkit-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked, as `pip install --no-deps --target` leaves it."""
    target = tmp_path_factory.mktemp("site")
    argv = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    done = run([*argv, str(wheel)], target)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def llmkit(installed: Path, cwd: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """The installed command; it must not be the clone's code that answers."""
    code = "import llmkit, sys; assert llmkit.__file__.startswith(sys.argv.pop(1))\n"
    code += "from llmkit.cli import main; sys.exit(main())"
    return run([sys.executable, "-c", code, str(installed), *argv], cwd, PYTHONPATH=str(installed))


def test_what_is_in_it(wheel: Path) -> None:
    """All modules, all recipes, the schema and the demo's data; no tests, no caches, no generator."""
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in [*ROOT.glob("configs/**/*.yaml"), ROOT / "configs/recipe.schema.json", *ROOT.glob("data/demo/*")]:
        assert f"llmkit/_shipped/{file.relative_to(ROOT).as_posix()}" in names, file
    for file in (ROOT / "llmkit").rglob("*.py"):
        assert file.relative_to(ROOT).as_posix() in names, file
    odd = [
        n for n in names if "__pycache__" in n or n.startswith(("tests/", "scripts/", "data/")) or n.endswith(".pyc")
    ]
    assert not odd
    assert wheel.stat().st_size < 5e6


def test_the_command_is_declared(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as z:
        (name,) = [n for n in z.namelist() if n.endswith("entry_points.txt")]
        assert "llmkit = llmkit.cli:main" in z.read(name).decode()


def test_plan_outside_the_clone(installed: Path, tmp_path: Path) -> None:
    done = llmkit(installed, tmp_path, "plan", "configs/pretrain/demo.yaml", "tokenizer={kind: bpe, vocab_size: 2048}")
    assert done.returncode == 0 and "parameters" in done.stdout, done.stderr
    done = llmkit(installed, tmp_path, "plan", "configs/pretrain/dmo.yaml")
    assert done.returncode == 2 and "recipe not found" in done.stderr
    assert not any(tmp_path.iterdir())


def test_train_and_generate_outside_the_clone(installed: Path, tmp_path: Path) -> None:
    """Two steps of the demo on its own data, from an empty folder; what is made lies there."""
    overrides = ["tokenizer={kind: byte}", "steps=2", "batch.tokens_per_step=512", "model={n_layers: 1, d_model: 32}"]
    overrides += ["eval={max_tokens: 2000, samples: {prompts: []}}", "log.plot=false", "data.workers=1"]
    done = llmkit(installed, tmp_path, "train", "configs/pretrain/demo.yaml", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "runs" / "demo" / "pretrain"
    assert (out / "DONE").is_file() and yaml.safe_load((out / "recipe.yaml").read_text("utf-8"))["steps"] == 2
    done = llmkit(installed, tmp_path, "generate", str(out), "--prompt", "One", "--max-new-tokens", "5")
    assert done.returncode == 0 and done.stdout.endswith("\n"), done.stderr
    assert llmkit(installed, tmp_path, "verify", str(out)).returncode == 0


def test_a_recipe_may_build_on_a_shipped_one(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: configs/pretrain/demo.yaml\ntokenizer: {kind: byte}\nsteps: 5\n")
    done = llmkit(installed, tmp_path, "plan", str(tmp_path / "mine.yaml"))
    assert done.returncode == 0 and "in 5 steps" in done.stdout, done.stderr
