"""Whole runs on several processes in fp32: curves after a change of world, and what Hugging Face makes of the folder.

`pytest -m campaign tests/stages/test_parallel_runs.py -s` prints the figures of docs/parallel.md.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from ports import free_port
from posttraining import STAGES, tiny_world
from reliability import read_jsonl, train
from safetensors.torch import load_file, save_file
from test_parallel_matrix import SPREADS, on_processes, recipe_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from llmkit.storage import newest_good
from llmkit.training.engine import Engine
from llmkit.training.parallel import local


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world(tmp_path_factory.mktemp("runs"))


def losses(run: Path) -> list[float]:
    return [m["train/loss"] for m in read_jsonl(run / "metrics.jsonl") if "train/loss" in m]


def _holding(process: int, world: int, recipe: str, port: int) -> None:
    """Trains, and leaves beside the recipe which piece of each parameter this process held at its last save."""
    torch.set_num_threads(1)
    place = {"RANK": process, "WORLD_SIZE": world, "LOCAL_RANK": process, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({key: str(value) for key, value in {**place, "MASTER_PORT": port}.items()})
    gathered = Engine.tensors

    def tensors(engine: Engine) -> dict[str, dict[str, Tensor]]:
        assert engine.split is not None
        held = {n: local(p).detach().contiguous() for n, p in engine.module.named_parameters()}
        save_file(held, f"{recipe}.{process}.safetensors")
        where = {n: (engine.split.shapes[n], [(s.start, s.stop) for s in engine.split.index(n)]) for n in held}
        Path(f"{recipe}.{process}.json").write_text(json.dumps(where))
        return gathered(engine)

    Engine.tensors = tensors  # type: ignore[method-assign]
    assert train(Path(recipe)) == 0, recipe


def test_hugging_face_loads_what_four_held(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Shares of rows computed together, policy and critic: to the bit what lay in the four processes, in silence."""
    recipe = recipe_of(world, "ppo", "held", steps=6, parallel=SPREADS["both"][1])
    mp.spawn(_holding, (4, str(recipe), free_port()), nprocs=4)
    whole: dict[str, Tensor] = {}
    for process in range(4):
        where = json.loads(Path(f"{recipe}.{process}.json").read_text())
        for name, piece in load_file(f"{recipe}.{process}.safetensors").items():
            shape, index = where[name]
            whole.setdefault(name, torch.full(shape, torch.nan))[tuple(slice(*ends) for ends in index)] = piece
    folder = newest_good(world / "held")[0]
    assert folder is not None
    for part, kind, auto in (
        ("", "actor", AutoModelForCausalLM),
        ("critic", "critic", AutoModelForSequenceClassification),
    ):
        model, told = auto.from_pretrained(folder / part, output_loading_info=True)
        assert not any(told.values()) and not caplog.records
        found = dict(model.named_parameters())
        mine = {n.removeprefix(f"{kind}."): t for n, t in whole.items() if n.startswith(f"{kind}.")}
        assert found.keys() == mine.keys() and len(mine) > 5
        assert all(torch.equal(found[n], t) for n, t in mine.items())


@pytest.mark.campaign
@pytest.mark.parametrize("stage", ["pretrain", *STAGES])
def test_the_first_step_in_fp32(world: Path, stage: str) -> None:
    """D4: losses and gradients of one step, within the rounding of fp32."""
    changes: dict[str, Any] = {"steps": 1}
    if stage == "distill":
        changes |= {"losses": [{"kind": "soft"}, {"kind": "hidden"}]}
    assert train(recipe_of(world, stage, f"{stage}-alone", **changes)) == 0
    (one,) = (m for m in read_jsonl(world / f"{stage}-alone" / "metrics.jsonl") if "train/loss" in m)
    worst = {}
    for spread in ("replicated", "shard: full", "tensor: 2", "both"):
        n, parallel = SPREADS[spread]
        out = f"{stage}-{spread}".replace(": ", "-")
        on_processes(n, recipe_of(world, stage, out, **changes, parallel=parallel))
        (several,) = (m for m in read_jsonl(world / out / "metrics.jsonl") if "train/loss" in m)
        assert several["train/data_hash"] == one["train/data_hash"]
        worst[spread] = max(
            abs(several[key] - one[key]) / max(abs(one[key]), 1e-3) for key in ("train/loss", "train/grad_norm")
        )
    print("\n| " + " | ".join([f"{stage}, fp32", *(f"{w:.0e}" for w in worst.values())]) + " |")
    assert max(worst.values()) <= 1e-5


@pytest.mark.campaign
@pytest.mark.parametrize("stage", ["pretrain", "sft", "ppo"])
def test_curves_after_a_change_of_world(world: Path, stage: str) -> None:
    """D3: 1 -> 2 -> 4 -> 1 processes in the middle of a run in fp32: within 1e-5 at the first step after each, and within
    2e-3 after 200 steps."""
    changes: dict[str, Any] = {"steps": 260, "eval": {"every": 1000}, "save": {"every": 20}, "optim": {"lr": 1e-3}}
    recipe = recipe_of(world, stage, f"{stage}-worlds", **changes)
    text, stops = recipe.read_text(), (20, 40, 60)
    assert train(recipe, f"stop_at={stops[0]}") == 0
    for stop, spread in zip(stops[1:], ("shard: full", "both"), strict=True):
        n, parallel = SPREADS[spread]
        said = "".join(f"  {key}: {value}\n" for key, value in parallel.items())
        recipe.write_text(f"{text}stop_at: {stop}\nparallel:\n{said}")
        on_processes(n, recipe)
    recipe.write_text(text)
    assert train(recipe) == 0
    assert train(recipe_of(world, stage, f"{stage}-one", **changes)) == 0
    one, changed = losses(world / f"{stage}-one"), losses(world / f"{stage}-worlds")
    off = [abs(a - b) / max(abs(a), 1e-3) for a, b in zip(one, changed, strict=True)]
    print(f"\n{stage}: first steps {[f'{off[s]:.0e}' for s in stops]}, after 200 more {max(off[-20:]):.0e}")
    assert max(off[s] for s in stops) <= 1e-5
    assert max(off[-20:]) <= 2e-3
