"""Every stage on every spread of the model is the stage on one process: `pytest -m campaign -s` on this file.

The campaign prints the table of docs/parallel.md. In fp64, so that what is left is the rounding of sums (D4, B3, B4, B8).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import transformers
from ports import free_port
from posttraining import ONLINE, STAGES, tiny_stage, tiny_world
from reliability import read_jsonl, tiny_recipe, train

from llmkit.storage import newest_good

STEPS = 9  # into the third rollout
SPREADS: dict[str, tuple[int, dict[str, Any]]] = {
    "replicated": (2, {}),
    "shard: full": (2, {"shard": "full"}),
    "tensor: 2": (2, {"tensor": 2}),
    "both": (4, {"shard": "full", "tensor": 2}),
    "context: 2": (2, {"context": 2}),
    "shares of context": (4, {"shard": "full", "context": 2}),
}
IN_MAIN_MEMORY: dict[str, tuple[int, dict[str, Any]]] = {"offload": (2, {"shard": "full", "offload": True})}
OF_EXPERTS: dict[str, tuple[int, dict[str, Any]]] = {
    "experts: 2": (2, {"experts": 2}),
    "shares of experts": (4, {"shard": "full", "experts": 2}),
    "groups of experts": (4, {"shard": "hybrid", "replicas": 2, "experts": 2}),
}
MIXTURE = {"qk_norm": True, "experts": {"n": 4, "n_active": 2, "d_ff": 16}}
SHARES_POSITIONS = ("pretrain", "sft", "distill")  # the others refuse `context`: see tests/training/test_context.py
# Heads lie in several processes: their scores can't be compared there, and are refused.
DORA = {"r": 2, "alpha": 8, "dora": True}
TOGETHER = {"losses": [{"kind": "soft"}, {"kind": "hidden"}]}
GIVEN = {**TOGETHER, "on_policy_frac": 0.0}  # rows are cut that are the same for all who share them


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world(tmp_path_factory.mktemp("matrix"))


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of models with experts."""
    return tiny_world(tmp_path_factory.mktemp("crowd"), **MIXTURE)


def _child(process: int, world: int, recipe: str, port: int) -> None:
    torch.set_num_threads(1)
    place = {"RANK": process, "WORLD_SIZE": world, "LOCAL_RANK": process, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({key: str(value) for key, value in {**place, "MASTER_PORT": port}.items()})
    assert train(Path(recipe)) == 0, recipe


def on_processes(world: int, recipe: Path) -> None:
    mp.spawn(_child, (world, str(recipe), free_port()), nprocs=world)


def recipe_of(folder: Path, stage: str, out: str, **changes: Any) -> Path:
    if stage == "pretrain":  # without dropout, which every rank draws for its own rows
        model = {"dropout": 0.0, **changes.pop("model", {})}
        return tiny_recipe(folder, out=str(folder / out), model=model, batch={"micro_tokens": 64}, **changes)
    return tiny_stage(folder, stage, out, **changes)


def compare(folder: Path, stage: str, spread: str, **more: Any) -> float:
    """Trains both, if one process has not yet; the largest relative difference of any number in metrics.jsonl.

    `more`: of the recipe, under the first key's name.
    """
    n, parallel = (SPREADS | OF_EXPERTS | IN_MAIN_MEMORY)[spread]
    changes = {"precision": "fp64", "steps": STEPS, **more}
    named = "-".join([stage, *more])
    alone, apart = f"{named}-alone", f"{named}-{spread}".replace(": ", "-")
    if stage == "distill" and "tensor" in parallel and not more:
        changes |= TOGETHER
        alone += "-together"
    if stage == "distill" and "context" in parallel:
        changes |= GIVEN
        alone += "-given"
    if not (folder / alone / "DONE").exists():
        assert train(recipe_of(folder, stage, alone, **changes)) == 0
    on_processes(n, recipe_of(folder, stage, apart, **changes, parallel=parallel))
    one, several = (read_jsonl(folder / run / "metrics.jsonl") for run in (alone, apart))
    assert len(one) == len(several) and len([m for m in one if "train/loss" in m]) == STEPS
    worst = 0.0
    for a, b in zip(one, several, strict=True):
        assert a.keys() == b.keys()
        assert a.get("train/data_hash") == b.get("train/data_hash"), a["step"]
        for key, value in a.items():
            if stage == "dpo" and a["step"] <= 1 and key.endswith("accuracy"):
                continue  # policy and reference are one model: every margin is 0, and its sign a matter of rounding
            if key == "train/idle":
                continue
            worst = max(worst, abs(b[key] - value) / max(abs(value), 1e-3))
    return worst


def spreads_of(stage: str) -> list[str]:
    return [name for name, (_, said) in SPREADS.items() if stage in SHARES_POSITIONS or "context" not in said]


def test_a_student_of_shared_rows(world: Path) -> None:
    """Its teacher is asked for the same positions; hidden states are compared where they are."""
    assert compare(world, "distill", "context: 2") <= 1e-9


def test_a_policy_in_shares(world: Path) -> None:
    """Rollouts on a gathered copy, unequal numbers of micro-batches, a critic beside the policy, saves within a rollout."""
    assert compare(world, "ppo", "shard: full") <= 1e-9


@pytest.mark.campaign
def test_a_policy_that_shares_its_experts(crowd: Path) -> None:
    """And a critic that does; answers are written by a gathered copy, with all experts."""
    assert compare(crowd, "ppo", "shares of experts") <= 1e-9
    found = newest_good(crowd / "ppo-shares of experts")[0]
    _, info = transformers.AutoModelForCausalLM.from_pretrained(found, output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.campaign
@pytest.mark.parametrize("stage", ["pretrain", *STAGES])
def test_shares_in_main_memory(world: Path, stage: str) -> None:
    """A student without projections, which are in no share."""
    worst = compare(world, stage, "offload", **({"losses": [{"kind": "soft"}]} if stage == "distill" else {}))
    print(f"\n| {stage}, offload | {worst:.0e} |")
    assert worst <= 1e-9


@pytest.mark.campaign
@pytest.mark.parametrize("stage", ["pretrain", *STAGES])
def test_experts(crowd: Path, stage: str) -> None:
    more: dict[str, Any] = {}
    if stage not in ONLINE:  # every rank has rows of its own: 4 of them share 8
        more = {"model": MIXTURE} if stage == "pretrain" else {"batch": {"examples_per_step": 8}}
    found = {spread: compare(crowd, stage, spread, **more) for spread in OF_EXPERTS}
    print("\n| " + " | ".join([f"{stage}, experts", *(f"{worst:.0e}" for worst in found.values())]) + " |")
    assert max(found.values()) <= 1e-9


@pytest.mark.campaign
@pytest.mark.parametrize("stage", ["pretrain", *STAGES])
def test_stage(world: Path, stage: str) -> None:
    found = {spread: compare(world, stage, spread) for spread in spreads_of(stage)}
    print("\n| " + " | ".join([stage, *(f"{worst:.0e}" for worst in found.values())]) + " |")
    assert max(found.values()) <= 1e-9


@pytest.mark.campaign
@pytest.mark.parametrize("stage", STAGES)
def test_adapters(world: Path, stage: str) -> None:
    """Beside a base in shares: the policy without its adapters is the reference, the critic has adapters of its own."""
    more: dict[str, Any] = {"lora": DORA}
    if stage == "distill":  # projections are not trained beside adapters
        more["losses"] = [{"kind": "soft"}]
    spreads = [name for name, (_, said) in SPREADS.items() if "context" not in said]
    found = {spread: compare(world, stage, spread, **more) for spread in spreads}
    print("\n| " + " | ".join([f"{stage}, adapters", *(f"{worst:.0e}" for worst in found.values())]) + " |")
    assert max(found.values()) <= 1e-9


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("stage", "two", "four"),
    [
        *((stage, "shard: full", "both") for stage in ("pretrain", "sft", "ppo")),
        ("sft", "context: 2", "shares of context"),
    ],
)
def test_other_processes_go_on(world: Path, stage: str, two: str, four: str) -> None:
    """D3: 1 -> 2 -> 4 -> 1 processes in the middle of a run: the same samples, and to rounding the same numbers."""
    recipe = recipe_of(world, stage, f"{stage}-changed-{four.split()[0]}", precision="fp64", steps=STEPS)
    text = recipe.read_text()
    assert train(recipe, "stop_at=3") == 0
    for n, stop, spread in ((2, 5, two), (4, 7, four)):
        said = "".join(f"  {key}: {value}\n" for key, value in SPREADS[spread][1].items())
        recipe.write_text(f"{text}stop_at: {stop}\nparallel:\n{said}")
        on_processes(n, recipe)
    recipe.write_text(text)
    assert train(recipe) == 0
    alone = world / f"{stage}-alone"
    if not (alone / "DONE").exists():
        assert train(recipe_of(world, stage, alone.name, precision="fp64", steps=STEPS)) == 0
    one, changed = (read_jsonl(folder / "metrics.jsonl") for folder in (alone, recipe.with_suffix("")))
    for a, b in zip(one, changed, strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-9)


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("stage", "more"), [("sft", {}), ("ppo", {}), ("sft", {"lora": DORA}), ("ppo", {"lora": DORA})]
)
def test_resume_is_exact(world: Path, stage: str, more: dict[str, Any]) -> None:
    """A run in shares that was stopped and started again on as many processes is, to the bit, one that never was."""
    assert resumed(world, stage, {"shard": "full", "tensor": 2}, more) > (1 if more else 4)


@pytest.mark.campaign
def test_resume_with_experts_is_exact(crowd: Path) -> None:
    """The same of a policy and a critic whose experts lie on several ranks, stopped within a rollout."""
    assert resumed(crowd, "ppo", {"shard": "full", "experts": 2}, {}) > 4


def resumed(folder: Path, stage: str, parallel: dict[str, Any], more: dict[str, Any]) -> int:
    """Trains on 4 processes, at once and with a stop; how many files of tensors are the same to the bit, which all must
    be."""
    changes: dict[str, Any] = {"precision": "fp64", "steps": STEPS, "parallel": parallel, **more}
    whole, parts = ("-".join([stage, *more, kind]) for kind in ("whole", "parts"))
    on_processes(4, recipe_of(folder, stage, whole, **changes))
    for stop in (4, STEPS):
        on_processes(4, recipe_of(folder, stage, parts, stop_at=stop, **changes))
    one, two = (newest_good(folder / run)[0] for run in (whole, parts))
    assert one is not None and two is not None
    names = sorted(p.relative_to(one).as_posix() for p in one.rglob("*.safetensors"))
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert (folder / whole / "metrics.jsonl").read_bytes() == (folder / parts / "metrics.jsonl").read_bytes()
    return len(names)
