"""Kills at random moments of runs full of refused steps: `pytest -m campaign tests/campaign/test_guard_kills.py -s`."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from reliability import Server, read_jsonl, result_of, tiny_recipe

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(1500)]

# Thresholds so low that ordinary steps are refused, two dozen of them.
GUARD: dict[str, Any] = {
    "loss_z": 0.8, "grad_norm_z": 2.6, "warmup": 4, "window": 8, "back": 3, "max_total": 60, "max_in_a_row": 12,
}  # fmt: skip


@pytest.mark.parametrize("action", ["rollback", "skip"])
def test_twenty_runs_killed_three_times(tmp_path: Path, action: str) -> None:
    """With layers frozen and the gradient watched: each ends with the bits of the run that was never killed."""
    changes: dict[str, Any] = {
        "steps": 100,
        "guard": {"action": action, **GUARD},
        "save": {"every": 4, "keep": 1},
        "log": {"gradient_noise": True, "norms_every": 3},
        "freeze": ["layers.0"],
    }
    pick, kills = random.Random(1), 0
    with Server(tmp_path) as server:
        quiet = tiny_recipe(tmp_path, out=str(tmp_path / "quiet"), **changes)
        begun = time.monotonic()
        child = server.start(quiet)
        assert child.wait() == 0, child.said
        seconds = time.monotonic() - begun
        refused = [r["guard"] for r in read_jsonl(tmp_path / "quiet" / "metrics.jsonl") if "guard" in r]
        assert len(refused) >= 10 and {e["action"] for e in refused} == {action}
        for i in range(20):
            recipe = tiny_recipe(tmp_path, out=str(tmp_path / f"killed-{i}"), **changes)
            for _ in range(3):
                child = server.start(recipe)
                time.sleep(pick.uniform(0.2, seconds))
                with contextlib.suppress(ProcessLookupError):
                    child.kill(pick.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
                kills += child.wait() != 0
            child = server.start(recipe)
            assert child.wait() == 0, child.said
            assert result_of(tmp_path / f"killed-{i}") == result_of(tmp_path / "quiet")
    print(f"\n{action}: {len(refused)} refused steps, 20 runs killed {kills} times: all bitwise the same")
