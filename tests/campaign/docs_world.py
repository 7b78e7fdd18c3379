"""A folder that looks like a clone in which the demo was made, so small that every command of the docs takes seconds.

The recipes in it are the project's own with fewer steps, shorter answers and narrower networks (`SMALL`), the demo's files
have every n-th row, and the models of the demo's stages are trained once by their own commands, as many at a time as there
are cores. Each page gets a copy, in which the models' weights are links.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from benchmark_rows import rows_of, write_rows
from test_docs import ROOT

LINKED = ("docs", "scripts", "tests", "llmkit", "README.md", "README.zh-CN.md", "pyproject.toml", "Makefile")
# The demo's stages; those of a line find what they begin with in the lines above.
STAGES = (
    ("tokenizer/demo", "pretrain/demo_masked"),
    ("pretrain/demo",),
    ("sft/demo", "sft/demo_short", "sft/demo_alone", "sft/lora_demo", "reward/classify", "reward/regress"),
    ("sft/demo_manners", "reward/demo", "dpo/demo", "distill/demo", "distill/features", "grpo/demo"),
    ("ppo/demo",),
)
BIG = ("7b", "70b", "8b", "1b", "124m", "560m")  # recipes that are only planned; their sizes are what is told
ROWS = {"chat_train": 300, "corpus": 1800, "heldout": 18, "prompts": 24, "prompts_analogy": 40, "rankings": 60}
FEW = {"steps": 2, "log": {"tensorboard": False, "plot": False}, "eval": {"every": 1}}
RL = {**FEW, "eval": {"every": 2, "answers": None}}
SMALL: dict[str, dict[str, Any]] = {
    "tokenizer": {},
    "pretrain": {**FEW, "batch": {"tokens_per_step": 512}, "eval": {"every": 1, "max_tokens": 512}},
    "sft": {**FEW, "batch": {"tokens_per_step": 1024, "micro_tokens": None, "max_len": 256}},
    "reward": FEW,
    "dpo": {**FEW, "batch": {"examples_per_step": 8, "max_len": 256}},
    "ppo": {**RL, "rollout": {"prompts_per_step": 8, "max_new_tokens": 4}, "update": {"minibatches": 1, "epochs": 1}},
    "grpo": {**RL, "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 4}},
    "distill": FEW,
}
NARROW = {"n_layers": 2, "n_heads": 4, "d_model": 64}
TASKS = ("mmlu", "mmlu_pro", "gpqa", "drop", "humaneval", "gsm8k", "ceval", "cmmlu")
TEXTS = ("corpus.jsonl", "texts.jsonl", "held_out.jsonl", "my.txt", "tinyshakespeare.txt")


def environment() -> dict[str, str]:
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return {**os.environ, "OMP_NUM_THREADS": threads, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(words: list[str], at: Path, said: str = "") -> subprocess.CompletedProcess[str]:
    """A program of the pages; `llmkit` is the one of this source tree."""
    argv = [sys.executable, "-m", "llmkit.cli", *words[1:]] if words[0] == "llmkit" else words
    return subprocess.run(argv, cwd=at, env=environment(), input=said, capture_output=True, text=True, timeout=600)


# --- what is small ---------------------------------------------------------------------------------------------------


def put(recipe: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the changes, section by section."""
    merged = dict(recipe)
    for key, value in changes.items():
        mine = merged.get(key)
        merged[key] = put(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return merged


def small(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe that ends in seconds, of the same stage and on the same data."""
    if "stage" not in recipe:
        return {key: small(value) if key == "set" else value for key, value in recipe.items()}
    found = put(recipe, SMALL[recipe["stage"]])
    if isinstance(found.get("eval"), dict):
        for key, length in (("samples", 4), ("answers", 8)):
            if found["eval"].get(key):
                found["eval"][key]["max_new_tokens"] = length
    if found.get("model"):
        found["model"] = {**found["model"], **NARROW}
    if "/" in str(found.get("init_from")) and not found["init_from"].startswith("runs/"):
        found["init_from"] = "runs/demo/pretrain"  # in place of a model of the hub
    return found


def make_recipes(at: Path) -> None:
    for source in sorted((ROOT / "configs").rglob("*.*")):
        target = at / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text("utf-8")
        if source.suffix == ".yaml" and not source.stem.startswith(BIG):
            recipe = yaml.safe_load(text)
            if "nodes" in recipe:
                small_pipeline(recipe)
            text = yaml.safe_dump(small(recipe) if "stage" in recipe else recipe, allow_unicode=True, sort_keys=False)
        target.write_text(text, "utf-8")


def small_pipeline(pipeline: dict[str, Any]) -> None:
    """What a pipeline itself sets, made small in place; the rest its recipes say."""
    for node in pipeline["nodes"].values():
        changes = node.get("set", {})
        few = {"steps": 2, "eval.every": 2, "limit": 8, "max_new_tokens": 24, "repeats": 1}
        changes |= {key: value for key, value in few.items() if key in changes}
        if "sft" in node.get("recipe", ""):  # enough to end an answer now and then, since its answers are ranked
            changes |= {"steps": 24, "eval.every": 24}
        if "rollout" in changes:
            changes["rollout"] = {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 4}
            changes["update"] = {"minibatches": 1, "epochs": 1}


def make_data(at: Path) -> None:
    """The demo's files with every n-th row, and files of the kinds that the pages speak of."""
    shutil.copytree(ROOT / "data", at / "data", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (at / "data/demo").glob("*.jsonl"):
        rows = file.read_text("utf-8").splitlines()
        rows.sort(key=lambda row: str(json.loads(row).get("kind")))  # so that every kind stays
        every = max(1, len(rows) // ROWS.get(file.stem, 200))
        if file.stem != "analogies":
            file.write_text("\n".join(rows[::every]) + "\n", "utf-8")
    for name in TEXTS:
        rows = (at / "data/demo/corpus.jsonl").read_text("utf-8").splitlines()[:60]
        plain = name.endswith(".txt")
        (at / name).write_text("\n".join(json.loads(r)["text"] if plain else r for r in rows), "utf-8")
    sums = [(f"{i} + {i} = ?", str(2 * i)) for i in range(200)]
    alpaca = [{"instruction": asked, "input": "", "output": told} for asked, told in sums]
    (at / "alpaca_data.json").write_text(json.dumps(alpaca), "utf-8")
    for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl"):
        write_rows(at / name, [{"question": asked, "answer": f"so it is\n#### {told}"} for asked, told in sums])
    write_rows(at / "chats.jsonl", [{"prompt": asked, "completion": told} for asked, told in sums])
    write_rows(at / "answers.jsonl", [{"prompt": "1 + 1 = ?", "responses": ["2", "3"]}])
    for task in TASKS:
        write_rows(at / "DIR" / f"{task}.jsonl", rows_of(task, 4))


def make_mine(at: Path) -> None:
    """The recipe that the quickstart tells its reader to write, and a run of it for pages that speak of runs/mine."""
    block = re.search(r"^```yaml\n(.*?)^```", (ROOT / "docs/quickstart.md").read_text("utf-8"), re.S | re.M)
    assert block is not None
    mine = small(yaml.safe_load(block.group(1)))
    mine |= {"tokenizer": {"kind": "bpe", "vocab_size": 300}, "optim": {"ema_decay": 0.9}}
    mine |= {"steps": 5, "save": {"every": 1, "keep": 5}}
    (at / "mine.yaml").write_text(yaml.safe_dump(mine), "utf-8")


# --- the world, and copies of it -------------------------------------------------------------------------------------


def ran(words: list[str], at: Path) -> None:
    done = run(words, at)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"


def make_world(at: Path) -> None:
    at.mkdir(parents=True)
    for name in LINKED:
        (at / name).symlink_to(ROOT / name)
    (at / ".venv").symlink_to(sys.prefix)
    make_recipes(at)
    make_data(at)
    make_mine(at)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for names in STAGES:
            list(pool.map(lambda name: ran(["llmkit", "train", f"configs/{name}.yaml"], at), names))
    ran(["llmkit", "train", "mine.yaml"], at)
    ran(["llmkit", "quantize", "runs/demo/distill", "runs/demo/int8", "--bits", "8"], at)
    for name, stage in {"a": "sft", "b": "sft_manners", "c": "sft"}.items():
        (at / "runs" / name).symlink_to(at / "runs/demo" / stage)


def the_world(shared: Path) -> Path:
    """The one world of all processes of a test run: whoever comes first makes it."""
    at, done = shared / "world", shared / "world.done"
    with (shared / "world.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(at, ignore_errors=True)
            make_world(at)
            done.touch()
    return at


def copy_of(world: Path, at: Path) -> Path:
    """A world of a page's own. Weights and cached tokens are never written in place, so links to them will do."""

    def put_file(source: str, target: str) -> None:
        if source.endswith((".safetensors", ".bin")):
            os.link(source, target)
        else:
            shutil.copy2(source, target)

    shutil.copytree(world, at, symlinks=True, copy_function=put_file)
    for link in (at / "runs").iterdir():  # those that led into the world
        if link.is_symlink():
            target = at / Path(os.readlink(link)).relative_to(world)
            link.unlink()
            link.symlink_to(target)
    return at
