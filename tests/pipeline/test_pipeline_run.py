"""`llmkit run` as people start it: real stages in processes of their own, killed and stopped and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmkit.cli import main
from llmkit.lineage import manifest_of
from llmkit.storage import resolve_model


def start(file: str, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "llmkit.cli", "run", file, *more],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def status(out: Path) -> dict[str, str]:
    try:
        return {name: one["status"] for name, one in json.loads((out / "pipeline.json").read_bytes())["nodes"].items()}
    except OSError:
        return {}


def wait_for(process: subprocess.Popen[str], sign: Path) -> None:
    """Until a node has come so far that this is on disk."""
    until = time.monotonic() + 60
    while not sign.exists():
        assert process.poll() is None and time.monotonic() < until, f"{sign} does not come"
        time.sleep(0.02)


def at_work(out: Path) -> list[int]:
    """Processes of nodes in this folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z" and "run" not in words and any(f"out={out}" in word for word in words):
            found.append(int(folder.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_killed_stopped_and_gone_on_with(
    world: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.nodes = {name: world.nodes[name] for name in ("pretrain", "sft", "int8")}  # a process each: few, then
    world.nodes["pretrain"]["set"] = {"tokenizer": {"kind": "byte"}}
    file, out = world.write(), world.out
    (world.root / "llmkit").mkdir()  # a folder of the package's name where one works is not the package
    (world.root / "llmkit" / "__init__.py").touch()
    monkeypatch.chdir(world.root)
    more = ("pretrain.steps=4000", "pretrain.eval.every=20")
    first = start(file, *more)
    wait_for(first, out / "pretrain" / "checkpoints" / "step-00000020" / "manifest.json")
    first.kill()
    first.wait()
    until = time.monotonic() + 5
    while at_work(out) and time.monotonic() < until:
        time.sleep(0.05)
    assert not at_work(out), "a node outlived its pipeline"
    assert status(out) == {"pretrain": "running"}

    second = start(file, *more)
    wait_for(second, out / "pretrain" / "checkpoints" / "step-00000040" / "manifest.json")
    assert main(["run", file, *more]) == 2 and "another process" in capsys.readouterr().err
    second.send_signal(signal.SIGTERM)
    said = second.communicate()[0]
    assert second.returncode == 75, said
    assert "resumed from" in said and "to go on: llmkit run" in said and "stopped by SIGTERM" in said
    assert status(out)["pretrain"] == "stopped"

    capsys.readouterr()
    assert main(["run", file]) == 0
    assert set(status(out).values()) == {"done"} and (out / "pretrain.old-1").is_dir()
    assert (out / "int8" / "config.json").is_file()
    made = manifest_of(resolve_model(out / "sft"))
    assert made is not None and made["lineage"]["parents"][0]["path"] == str(out / "pretrain")

    started = time.monotonic()
    again = subprocess.run([sys.executable, "-P", "-m", "llmkit.cli", "run", file], capture_output=True, text=True)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert time.monotonic() - started < 5


def test_dry_run_writes_nothing(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", world.write(), "--dry-run", "sft.steps=8", "--until", "sft"]) == 0
    said = capsys.readouterr().out
    assert not world.out.exists()
    lines = said.splitlines()
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["tokenizer", "tokenizer", "run"], ["pretrain", "pretrain", "run"], ["sft", "sft", "run"],
    ]  # fmt: skip
    assert "int8" not in said and "~" in lines[2] and "new" in lines[2]


def test_mistakes_are_exit_2(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", world.write(), "--from", "sftt"]) == 2
    assert "--from sftt: is no node: tokenizer" in capsys.readouterr().err
    assert main(["run", world.write(), "--from", "int8", "--until", "sft"]) == 2
    assert "does not need it" in capsys.readouterr().err
    os.makedirs(world.out)
    (world.out / "pipeline.json").write_text("{}")
    assert main(["run", world.write()]) == 2
    assert "is no state of a pipeline" in capsys.readouterr().err
