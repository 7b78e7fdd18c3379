"""Runs every command that README and the pages in docs/ show, in a folder that looks like a clone (`docs_world`).

What stands there in capitals is put for a model or a file of that folder; some files that commands write get names of their
own, and what a model would write at length is cut. All else is as the page has it. A command that can't be run on one small
machine says so on its page (`# needs a cluster`); such are counted, and at most a tenth.

    pytest -m campaign tests/campaign/test_docs_run.py -n auto --dist worksteal

A page's commands, as they end, are in `commands.txt` of its temporary folder (`--basetemp`).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from docs_world import copy_of, environment, run, the_world
from ports import free_port
from test_docs import COMMANDS, Command
from test_readme import blocks, run_blocks

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(3600)]
PAGES = sorted({c.page for c in COMMANDS})
MANY = 12  # a page with more commands is run section by section: none needs what another section made
# Longest first, so that no process is left alone with a long one.
PARTS = Counter((c.page, c.section if sum(d.page == c.page for d in COMMANDS) > MANY else "") for c in COMMANDS)


READMES = ("README.md", "README.zh-CN.md")  # their blocks use loops and pipes, so a shell runs them as they are
STANDS = {
    "MODEL": "runs/demo/sft", "STUDENT": "runs/demo/distill", "RECIPE": "configs/pretrain/demo.yaml", "K": "secret",
    "RUN": "runs/demo/sft", "CHECKPOINT": "runs/mine", "PIPELINE": "configs/demo/pipeline.yaml",
    "ADAPTER": "runs/demo/sft_lora", "--nproc-per-node=8": "--nproc-per-node=1",
    "--master-addr=10.0.0.1": "--master-addr=127.0.0.1", "--master-port=29500": f"--master-port={free_port()}",
}  # fmt: skip
SCRIPTS = {
    "scripts/worked_examples.py": ["--plot", "milk-tea.png"],
    "scripts/rlhf_demo.py": ["--seeds", "0"],
    "scripts/distill_demo.py": ["--seeds", "0", "--jobs", "1"],
    "scripts/oracle.py": ["--limit", "4"],
    "scripts/bench/moe.py": ["--small"],
    "data/generate.py": ["--out", "demo-again"],
}
# These end with 1 where a model misses the goals of the demo, as those of the world do; their tables must be there.
JUDGING = {"scripts/rlhf_demo.py": "MISSED", "scripts/distill_demo.py": "MISSED"}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the pages' own are copied from."""
    base = tmp_path_factory.getbasetemp()
    return the_world(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


def prepared(command: Command, number: int) -> list[str]:
    """The command's words as they are run."""
    words = [STANDS.get(word, f"out-{number}" if word in ("OUT", "FOLDER") else word) for word in command.words]
    program, rest = words[0], words[1:]
    if program == "python":
        return [*words, *SCRIPTS.get(rest[0], [])]
    if program == "pip":  # everything is there: whether the extra is one, and needs nothing else
        return [*words, "--dry-run", "--no-index"]
    if program == "torchrun":
        return [*words, f"out=runs/again-{1 if '--nnodes=2' in words else number}"]
    if rest[0] in ("rank", "sample") or "--prompts" in rest:  # models that learnt nothing write to the end
        for option, value in (("--limit", "3"), ("--max-new-tokens", "8")):
            words += [option, value] * (option not in words)
        words[words.index("--out") + 1] = f"out-{number}.jsonl"  # several commands write one file, each in its way
    if rest[0] in ("compare", "chat", "generate"):
        words += ["--max-new-tokens", "8"] * ("--max-new-tokens" not in words)
    if rest[0] == "replay":  # a step that the small run has
        words[words.index("--step") + 1] = "2"
    if rest[0] == "run" and "--dry-run" not in words:
        words = [w for w in words if not w.startswith("out=")] + [f"out=runs/whole-{number}"]
    if rest[0] == "sweep":
        words[words.index("--trials") + 1] = "2"
        words = [{"steps=40": "steps=4", "eval.every=20": "eval.every=2"}.get(w, w) for w in words]
        words = [{"steps=60": "steps=4", "eval.every=50": "eval.every=2"}.get(w, w) for w in words]
    if rest[0] == "train" and rest[1] != "mine.yaml" and not any(w.startswith("out=") for w in words):
        words.append(f"out=runs/again-{number}")
    return words


def serves(words: list[str], at: Path) -> None:
    """A server comes up, says where, and ends when it is told to."""
    words = [w for w in words[1:] if w not in ("--host", "0.0.0.0", "--port", "80")] + ["--port", "0"]
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


def obeys(words: list[str], at: Path, others: list[subprocess.Popen[str]]) -> None:
    """Runs a command. One that waits for another machine's is kept in `others`, until that has ended too."""
    if words[:2] == ["llmkit", "serve"] or "--serve" in words:
        return serves(words, at)
    if "--node-rank=0" in words:
        others.append(
            subprocess.Popen(
                words, cwd=at, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
        return None
    done = run(words, at, said="q\n" if words[1] == "rank" else "Where does Mira live?\n")
    judged = words[0] == "python" and done.returncode == 1 and JUDGING.get(words[1], "-") in done.stdout
    assert done.returncode == 0 or judged, f"exit code {done.returncode}: {done.stdout[-300:]} {done.stderr[-1200:]}"
    for other in others:
        said, _ = other.communicate(timeout=120)
        assert other.returncode == 0, f"the other machine's exit code {other.returncode}: {said[-800:]}"
    others.clear()
    return None


@pytest.mark.parametrize("page", READMES)
def test_the_blocks_of_a_readme_run(page: str, tmp_path: Path) -> None:
    assert blocks(page)
    run_blocks(page, tmp_path)


@pytest.mark.parametrize(("page", "section"), [part for part, _ in PARTS.most_common() if part[0] not in READMES])
def test_the_commands_of_a_page_run(page: str, section: str, world: Path, tmp_path: Path) -> None:
    """One after the other; all failures are told at the end."""
    at, failures, others = copy_of(world, tmp_path / "clone"), [], []
    if page == "docs/quickstart.md":  # whose reader makes it
        shutil.rmtree(at / "runs/mine")
    for number, command in enumerate(COMMANDS):
        if command.page != page or section not in ("", command.section) or command.elsewhere:
            continue
        words, begun = prepared(command, number), time.monotonic()
        failure = None
        try:
            obeys(words, at, others)
        except (AssertionError, subprocess.TimeoutExpired) as e:
            failure = f"{command}\n    {' '.join(words)}\n    {e}"
            failures.append(failure)
        told = f"{time.monotonic() - begun:5.1f} s  {failure or command}"
        print(told, flush=True)
        with (tmp_path / "commands.txt").open("a", encoding="utf-8") as log:
            log.write(told + "\n")
    for other in others:
        other.kill()
        failures.append(f"{other.args}: nobody met it")
    assert not failures, "\n".join([f"{len(failures)} commands failed:", *failures])


def test_few_commands_are_left_out() -> None:
    left = [command for command in COMMANDS if command.elsewhere]
    print(f"\n{len(COMMANDS)} commands on {len(PAGES)} pages; {len(left)} are not run here:", *left, sep="\n  ")
    assert len(left) <= 0.1 * len(COMMANDS)
