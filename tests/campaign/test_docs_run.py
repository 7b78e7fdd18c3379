"""Runs every command that the pages in docs/ show, on tiny models, in a folder that looks like a clone.

Trainings are cut to a few steps and to questions that cost nothing; all else is as the page has it. Placeholders stand for
the models of the demo's stages, names of files for small ones of the kind that the page speaks of.

    pytest -m campaign tests/campaign/test_docs_run.py -s
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from benchmark_rows import rows_of, write_rows
from test_docs import COMMANDS, ROOT, Command

from llmkit.stages import load_recipe

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(3600)]
LINKED = ("configs", "data", "docs", "scripts", "tests", "llmkit", "README.md", "pyproject.toml", "Makefile")
# The demo's stages in an order in which each finds what it begins with.
STAGES = (
    "tokenizer/demo", "pretrain/demo", "pretrain/demo_masked", "sft/demo", "sft/demo_manners", "sft/demo_short",
    "sft/demo_alone", "sft/lora_demo", "reward/demo", "reward/classify", "reward/regress", "ppo/demo", "grpo/demo", "dpo/demo",
    "distill/demo", "distill/features",
)  # fmt: skip
TASKS = ("mmlu", "mmlu_pro", "gpqa", "drop", "humaneval", "gsm8k", "ceval", "cmmlu")
FEW = ["steps=2", "log.tensorboard=false", "log.plot=false"]
QUICK = {
    "tokenizer": [],
    "pretrain": [*FEW, "batch.tokens_per_step=512", "eval.every=2", "eval.max_tokens=512", "eval.samples.max_new_tokens=4"],
    "sft": [*FEW, "eval.every=null", "eval.answers=null"],
    "reward": [*FEW, "eval.every=null"],
    "dpo": [*FEW, "eval.every=null", "eval.answers=null"],
    "ppo": [*FEW, "eval.every=null", "eval.answers=null", "rollout.max_new_tokens=4"],
    "grpo": [*FEW, "eval.every=null", "eval.answers=null", "rollout.max_new_tokens=4"],
    "distill": [*FEW, "eval.every=null", "eval.answers=null", "cache=null"],
}  # fmt: skip
TEXTS = ("corpus.jsonl", "texts.jsonl", "held_out.jsonl", "my.txt", "tinyshakespeare.txt")
CHATS = ("chats.jsonl", "gsm8k_train.jsonl", "alpaca_data.json")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "2", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(words: list[str], at: Path, said: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llmkit.cli", *words],
        cwd=at, env=environment(), input=said, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def quick(recipe: str, given: list[str], at: Path) -> list[str]:
    """Overrides that make a recipe end in seconds; what the page says comes after them, and so holds."""
    stage = yaml.safe_load((at / recipe).read_text("utf-8"))["stage"]
    return [*QUICK[stage], *given]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, with a model of every stage of the demo."""
    at = tmp_path_factory.mktemp("clone")
    for name in LINKED:
        (at / name).symlink_to(ROOT / name)
    (at / ".venv").symlink_to(sys.prefix)
    for name in TEXTS:
        rows = (ROOT / "data/demo/corpus.jsonl").read_text("utf-8").splitlines()[:60]
        plain = name.endswith(".txt")
        (at / name).write_text("\n".join(json.loads(r)["text"] if plain else r for r in rows), "utf-8")
    chats = [{"instruction": f"{i} + {i} = ?", "input": "", "output": str(2 * i)} for i in range(40)]
    sums = [{"question": f"{i} + {i} = ?", "answer": f"so it is\n#### {2 * i}"} for i in range(40)]
    (at / "alpaca_data.json").write_text(json.dumps(chats), "utf-8")
    write_rows(at / "gsm8k_train.jsonl", sums)
    write_rows(at / "chats.jsonl", [{"prompt": f"{i} + {i} = ?", "completion": str(2 * i)} for i in range(40)])
    write_rows(at / "answers.jsonl", [{"prompt": "1 + 1 = ?", "responses": ["2", "3"]}])
    mine = {
        "stage": "pretrain", "out": "runs/mine", "tokenizer": {"kind": "byte"}, "data": {"path": "my.txt"}, "steps": 5,
        "model": {"n_layers": 1, "n_heads": 2, "d_model": 16, "max_seq_len": 64}, "batch": {"tokens_per_step": 128},
        "save": {"every": 1, "keep": 5},
    }  # fmt: skip
    (at / "mine.yaml").write_text(yaml.safe_dump(mine), "utf-8")
    for task in TASKS:
        write_rows(at / "DIR" / f"{task}.jsonl", rows_of(task, 4))
    for name in STAGES:
        recipe = f"configs/{name}.yaml"
        done = run(["train", recipe, *quick(recipe, [], at)], at)
        assert done.returncode == 0, f"{recipe}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
    assert run(["quantize", "runs/demo/distill", "runs/demo/int8", "--bits", "8"], at).returncode == 0
    for name, stage in {"a": "sft", "b": "sft_manners", "c": "sft_short"}.items():
        (at / "runs" / name).symlink_to(at / "runs/demo" / stage)
    return at


def prepared(command: Command, at: Path, number: int) -> list[str]:
    """The command's words as they are run."""
    adapters = "merge" in command.words
    stands = {
        "MODEL": "runs/demo/sft", "STUDENT": "runs/demo/distill", "RECIPE": "configs/pretrain/demo.yaml",
        "OUT": f"out-{number}", "FOLDER": f"out-{number}", "K": "secret", "RUN": "runs/demo/sft",
        "CHECKPOINT": "runs/demo/sft", "PIPELINE": "configs/demo/pipeline.yaml", "ADAPTER": "runs/demo/sft_lora",
    }  # fmt: skip
    words = [stands.get(word, word) for word in command.words[1:]]
    if adapters and not any("lora" in word for word in words):
        words[1] = "runs/demo/sft_lora"
    if words[0] in ("rank", "sample") or "--prompts" in words:  # models that learnt nothing write to the end
        words += ["--limit", "3"] * ("--limit" not in words) + ["--max-new-tokens", "8"] * (
            "--max-new-tokens" not in words
        )
        at_out = words.index("--out") + 1  # several commands of the pages write one file, each in its own way
        words[at_out] = f"out-{number}.jsonl"
    if words[0] == "replay":
        words[words.index("--step") + 1] = "2"
    if words[0] == "run" and "--dry-run" not in words and "--until" not in words:
        words += ["--until", "tokenizer", f"out=runs/whole-{number}"]  # the whole of it is `make demo`
    if words[0] in ("train", "prepare", "plan", "doctor", "inspect", "sweep") and words[-1] != words[0]:
        if not words[1].endswith(".yaml"):
            return words
        given = [w for w in words[2:] if "=" in w and not w.startswith("-")]
        if words[1] == "mine.yaml":
            return words
        if words[0] in ("train", "prepare"):
            load_recipe(words[1], [g for g in given if not g.startswith("part=")])
            words = [*words[:2], *quick(words[1], given, at)]
            if words[0] == "train" and not any(w.startswith("out=") for w in words):
                words.append(f"out=runs/again-{number}")
    return words


def serves(words: list[str], at: Path) -> None:
    """A server comes up, says where, and ends when it is told to."""
    words = [w for w in words if w not in ("--host", "0.0.0.0", "--port", "80")] + ["--port", "0"]
    with subprocess.Popen(
        [sys.executable, "-m", "llmkit.cli", *words],
        cwd=at, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        said = ""
        for line in server.stdout:
            said += line
            if "http://" in line:
                break
        time.sleep(1.0)
        server.send_signal(signal.SIGTERM)
        server.stdout.read()
        assert server.wait(timeout=60) in (0, 75, 143), said
    assert "http://" in said, said


@pytest.mark.parametrize("page", sorted({c.page for c in COMMANDS}))
def test_the_commands_of_a_page_run(page: str, clone: Path) -> None:
    """One after the other; all failures are told at the end. A page may use what those before it made."""
    failures = []
    for number, command in enumerate(COMMANDS):
        words = prepared(command, clone, number)
        if command.page != page or command.elsewhere or "7b" in " ".join(words):
            continue
        begun = time.monotonic()
        try:
            if words[0] == "serve" or "--serve" in words:
                serves(words, clone)
            else:
                done = run(words, clone, said="q\n" if words[0] == "rank" else "Where does Mira live?\n")
                assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-800:]}"
        except (AssertionError, subprocess.TimeoutExpired) as e:
            failures.append(f"{command}\n    {' '.join(words)}\n    {e}")
        print(f"{time.monotonic() - begun:5.1f} s  {command}", flush=True)
    assert not failures, "\n".join([f"{len(failures)} commands failed:", *failures])
