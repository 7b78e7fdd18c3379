"""Two ranks are one rank for every stage after pretraining: the same samples, the same losses, the same weights (D1, D3).

In fp64, so that what is left is the rounding of sums, and a mistake of logic would show (B3, B4, B76, B81, B88).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from ports import free_port
from posttraining import ONLINE, STAGES, tiny_stage, tiny_world
from reliability import read_jsonl, train
from safetensors.torch import load_file

from llmkit.storage import newest_good

STEPS = 9  # into the third rollout
KEYS = ("group", "prompt", "answer", "finished", "reward")
EXACT = ("step", "train/tokens", "train/data_hash", "train/epoch", "train/rollout/length", "train/rollout/ended")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages on one rank and on two."""
    folder = tiny_world(tmp_path_factory.mktemp("ranks"))
    recipes = {}
    for n in (1, 2):
        for stage in STAGES:
            recipes[stage, n] = tiny_stage(folder, stage, f"{stage}-{n}", precision="fp64", steps=STEPS)
    for stage in STAGES:
        assert train(recipes[stage, 1]) == 0
    ports = [free_port() for _ in STAGES]
    mp.spawn(_child, ([str(recipes[stage, 2]) for stage in STAGES], ports), nprocs=2)
    return folder


def _child(rank: int, recipes: list[str], ports: list[int]) -> None:
    """One of two ranks, in a process group of its own for each stage."""
    torch.set_num_threads(1)
    for recipe, port in zip(recipes, ports, strict=True):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()})
        assert train(Path(recipe)) == 0, recipe


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_steps(stage: str, world: Path) -> None:
    """Every number of every step, evaluations too; what counts samples is equal to the last digit."""
    one, two = (read_jsonl(world / f"{stage}-{n}" / "metrics.jsonl") for n in (1, 2))
    assert len(one) == len(two) and len([m for m in one if "train/loss" in m]) == STEPS
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if stage == "dpo" and a["step"] <= 1 and key.endswith("accuracy"):
                continue  # policy and reference are one model: every margin is 0, and its sign a matter of rounding
            if key.startswith(EXACT):
                assert b[key] == value, (a["step"], key)
            else:
                assert b[key] == pytest.approx(value, rel=1e-8, abs=1e-10), (a["step"], key)


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_weights(stage: str, world: Path) -> None:
    """Of policy and critic, and of the optimizer; they have moved."""
    folders = [newest_good(world / f"{stage}-{n}")[0] for n in (1, 2)]
    assert folders[0] is not None and folders[1] is not None
    names = sorted(p.relative_to(folders[0]).as_posix() for p in folders[0].rglob("*.safetensors"))
    assert ("critic/model.safetensors" in names) == (stage == "ppo") and "model.safetensors" in names
    assert ("trainer_state/task.safetensors" in names) == (stage in ONLINE)  # STEPS is within a rollout
    for name in names:
        one, two = (load_file(folder / name) for folder in folders)
        assert one.keys() == two.keys()
        for key, value in one.items():
            difference = (value.double() - two[key].double()).abs().max() if value.numel() else torch.zeros(())
            assert difference <= 1e-9 * (1 + value.double().abs().max()), (name, key)
    base = load_file(world / "base" / "model.safetensors")
    moved = load_file(folders[0] / "model.safetensors")
    assert any((moved[n].double() - t.double()).abs().max() > 1e-4 for n, t in base.items() if n in moved)


@pytest.mark.parametrize("stage", ONLINE)
def test_the_same_rollouts(stage: str, world: Path) -> None:
    """Tokens, grades and groups as they were written down; no answer twice (B88)."""
    for file in sorted((world / f"{stage}-1" / "rollouts").glob("*.jsonl")):
        one, two = read_jsonl(file), read_jsonl(world / f"{stage}-2" / "rollouts" / file.name)
        for a, b in zip(one, two, strict=True):
            assert [a[k] for k in KEYS] == [b[k] for k in KEYS]
        answers = [tuple(t["id"] for t in row["tokens"]) for row in one]
        assert len(set(answers)) > len(answers) / 2
