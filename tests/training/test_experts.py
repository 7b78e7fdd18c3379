"""Ranks that hold some of the experts each compute what one process does, and their checkpoint fits any mesh."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from ports import free_port
from safetensors.torch import load_file, save_file
from test_parallel import LORA, MOE, MUON, Job, files_of, on_processes, run, told
from toys import largest_difference, recipe, same_bits, tiny_gpt, uneven_documents, write_shards

from llmkit.config import UserError
from llmkit.model.config import ExpertsConfig
from llmkit.model.moe import MoE
from llmkit.training.config import ParallelConfig
from llmkit.training.dist import Ranks, connect
from llmkit.training.experts import share_experts
from llmkit.training.parallel import Split

SHARED = {"qkv_bias": True, "experts": {"n": 8, "n_active": 3, "d_ff": 16, "shared_d_ff": 24, "dense_layers": (0,)}}
# 1 -> 2 (experts) -> 4 (experts, shares) -> 4 (experts, groups of shares) -> 2 (shares) -> 1
CHAIN = [
    Job("a", {}, MOE),
    Job("b", {"experts": 2}, MOE, "a"),
    Job("c", {"experts": 2, "shard": "full"}, MOE, "b"),
    Job("d", {"experts": 2, "shard": "hybrid", "replicas": 2}, MOE, "c"),
    Job("e", {"shard": "full"}, MOE, "d"),
    Job("f", {}, MOE, "e"),
]
APART = {
    2: [
        Job("muon", {"experts": 2}, SHARED, optim=MUON),
        Job("all", {"experts": 2, "shard": "full"}, SHARED, optim=MUON),
        Job("adapted", {"experts": 2}, MOE, lora=LORA),
        Job("halves", {"experts": 2}, MOE, optim={"precision": "bf16"}),
        Job("half shares", {"experts": 2, "shard": "full"}, MOE, optim={"precision": "bf16"}),
    ],
    4: [
        Job("pairs", {"experts": 2}, MOE, optim=MUON),
        Job("four", {"experts": 4}, SHARED, recompute=True),
        Job("shares", {"experts": 2, "shard": "full"}, SHARED, optim=MUON, recompute=True),
        Job("again", {"experts": 2, "shard": "full"}, SHARED, optim=MUON, recompute=True),
        Job("wide", {"experts": 2, "shard": "full"}, MOE, lora=LORA),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All jobs, and beside each the same steps in one process."""
    path = tmp_path_factory.mktemp("experts")
    write_shards(path / "shards", uneven_documents())
    run(Ranks(), CHAIN[0], path)
    on_processes(2, [CHAIN[1], *APART[2]], path)
    on_processes(4, [*CHAIN[2:4], *APART[4]], path)
    on_processes(2, [CHAIN[4]], path)
    run(Ranks(), CHAIN[5], path)
    for job in (*CHAIN[1:], *APART[2], *APART[4]):
        run(Ranks(), replace(job, name=f"alone-{job.name}", parallel={}), path)
    return path


@pytest.mark.parametrize("name", [*"bcdef", "muon", "all", "adapted", "pairs", "four", "shares", "wide"])
def test_the_same_numbers(folder: Path, name: str) -> None:
    """D4, B1: losses, norms, evaluation, weights, average and moments, to rounding in fp64; the same tokens."""
    mine, one = told(folder, name), told(folder, f"alone-{name}")
    for a, b in zip(mine["train"], one["train"], strict=True):
        assert a["data_hash"] == b["data_hash"]
        assert a == pytest.approx(b, rel=1e-10)
    assert mine["valid"] == pytest.approx(one["valid"], rel=1e-10)
    assert largest_difference(files_of(folder / name), files_of(folder / f"alone-{name}")) <= 1e-9


@pytest.mark.parametrize("name", ["halves", "half shares"])
def test_half_precision(folder: Path, name: str) -> None:
    """Sums are of other parts, in bf16: about the same."""
    mine, one = told(folder, name), told(folder, f"alone-{name}")
    for a, b in zip(mine["train"], one["train"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=5e-2
        )


@pytest.mark.parametrize(("name", "before"), [(job.name, job.start) for job in CHAIN[1:]])
def test_any_mesh_resumes_any_other(folder: Path, name: str, before: str) -> None:
    """D3: what was loaded is what was saved, to the bit."""
    assert same_bits(files_of(folder / f"{name}-again"), files_of(folder / before))


@pytest.mark.parametrize(("name", "n", "shares"), [("muon", 2, 1), ("pairs", 2, 1), ("four", 4, 1), ("all", 2, 2)])
def test_a_rank_holds_its_share(folder: Path, name: str, n: int, shares: int) -> None:
    """Weights, and so masters, gradients and moments: an n-th of the experts and a share of the rest."""
    tensors = files_of(folder / name)
    sizes = {k: t.numel() for k, t in tensors.items() if k.startswith("model.safetensors:")}
    experts = sum(size for k, size in sizes.items() if ".experts." in k)
    held = told(folder, name)["held"]
    assert 0 < experts < sum(sizes.values()) == told(folder, f"alone-{name}")["held"]
    rest = held - experts // n - (sum(sizes.values()) - experts) // shares
    assert 0 <= rest <= 32 * (shares > 1)  # matrices of one row are the first process's


def test_a_step_is_a_function_of_its_data(folder: Path) -> None:
    """Whoever is faster: the same bits."""
    assert same_bits(files_of(folder / "shares"), files_of(folder / "again"))
    assert told(folder, "shares")["train"] == told(folder, "again")["train"]


@pytest.mark.campaign
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("parallel", "recompute"), [({"experts": 2}, True), ({"experts": 2, "shard": "full"}, False)])
def test_compiled_blocks(tmp_path: Path, parallel: dict[str, Any], recompute: bool) -> None:
    """B22: as the same weights uncompiled on one process."""
    write_shards(tmp_path / "shards", uneven_documents())
    job = Job("compiled", parallel, SHARED, compile=True, recompute=recompute)
    on_processes(2, [job], tmp_path)
    run(Ranks(), replace(job, name="alone", parallel={}, compile=False), tmp_path)
    mine, one = told(tmp_path, "compiled"), told(tmp_path, "alone")
    assert mine["train"][1] == pytest.approx(one["train"][1], rel=1e-10)
    assert largest_difference(files_of(tmp_path / "compiled"), files_of(tmp_path / "alone")) <= 1e-10


# --- one layer -------------------------------------------------------------------------------------------------------


def layer() -> MoE:
    torch.manual_seed(0)
    mixture = MoE(ExpertsConfig(n=6, n_active=2, d_ff=3), 4, lambda width: torch.nn.Sequential(
        torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 4)
    )).double()  # fmt: skip
    with torch.no_grad():  # state -> experts: the first number of a state says which two
        mixture.gate.weight.zero_()
        for e in range(6):
            mixture.gate.weight[e, e // 2] = 8.0
    return mixture


# What each rank's tokens are like: numbers of the pairs (0, 1), (2, 3), (4, 5) that they visit. With two ranks the first
# holds 0 to 2.
LOADS = {
    "all to the first": ([0, 0, 0], [0, 0]),
    "one sends nothing to the other": ([0, 0, 2, 1], [2, 2]),
    "each to the other": ([2, 2, 2], [0]),
    "experts without visits": ([0, 2], [2, 0, 0, 2]),
}


def states(kinds: list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(kinds))
    x = torch.randn(1, len(kinds), 4, generator=generator, dtype=torch.float64)
    x[..., :3] = 0.0
    for i, kind in enumerate(kinds):
        x[0, i, kind] = 1.0
    return x


def _layer_child(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in place.items()})
    ranks = connect("cpu", timeout_s=60, experts=2)
    found: dict[str, torch.Tensor] = {}
    for frozen in (False, True):
        for name, kinds in LOADS.items():
            mixture = layer()
            # Only the other rank's experts learn, and nothing below: who has nothing to learn still hands gradients on.
            if frozen:
                mixture.requires_grad_(False)
                mixture.experts[5].requires_grad_(True)
            share_experts(mixture, ranks)
            x = states(kinds[rank]).requires_grad_(not frozen)
            y, _ = mixture(x)
            assert torch.equal(y.detach(), mixture(x)[0].detach())
            y.square().sum().backward()
            key = f"{name}/{frozen}"
            found[f"{key}/y"] = y.detach()
            if not frozen:
                found[f"{key}/x"] = x.grad if x.grad is not None else torch.zeros_like(x)
            for n, p in mixture.named_parameters():
                if p.grad is not None and p.numel():
                    found[f"{key}/{n}"] = p.grad
    save_file(found, f"{out}/{rank}.safetensors")
    ranks.close()


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], ...]:
    path = tmp_path_factory.mktemp("layer")
    port = free_port()
    mp.spawn(_layer_child, (port, str(path)), nprocs=2)
    return tuple(load_file(path / f"{rank}.safetensors") for rank in range(2))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", LOADS)
def test_however_uneven_the_load(layers: tuple[dict[str, torch.Tensor], ...], name: str, frozen: bool) -> None:
    """Outputs and gradients of two ranks are those of one process that has all tokens; no visit is dropped."""
    mixture, given = layer(), [states(kinds).requires_grad_() for kinds in LOADS[name]]
    y, _ = mixture(torch.cat(given, 1))
    y.square().sum().backward()
    visited = {e for kinds in LOADS[name] for kind in kinds for e in (2 * kind, 2 * kind + 1)}
    for rank, (mine, x) in enumerate(zip(layers, given, strict=True)):
        first = rank * given[0].shape[1]
        torch.testing.assert_close(
            mine[f"{name}/{frozen}/y"], y.detach()[:, first : first + x.shape[1]], rtol=1e-12, atol=1e-12
        )
        if not frozen:
            assert x.grad is not None
            torch.testing.assert_close(mine[f"{name}/{frozen}/x"], x.grad, rtol=1e-12, atol=1e-12)
        for e, expert in enumerate(mixture.experts):
            here = e // 3 == rank and e in visited and (not frozen or e == 5)
            for n, p in expert.named_parameters():
                grad = mine.get(f"{name}/{frozen}/experts.{e}.{n}")
                assert (grad is not None) == here, (e, n)
                if grad is not None:
                    assert p.grad is not None
                    torch.testing.assert_close(grad, p.grad, rtol=1e-12, atol=1e-12)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "world", "said", "why"),
    [
        ({}, 2, {"experts": 2}, r"parallel.experts \(2\): the model has no experts"),
        (MOE, 3, {"experts": 3}, r"parallel.experts \(3\) does not divide the 4 experts of a layer"),
        (MOE, 4, {"experts": 2, "log": True}, "log.gradient_noise with parallel.experts: 2"),
    ],
)
def test_refused(shape: dict[str, Any], world: int, said: dict[str, Any], why: str) -> None:
    said = dict(said)
    config = recipe()
    if said.pop("log", False):
        config = config.model_copy(update={"log": config.log.model_copy(update={"gradient_noise": True})})
    config = config.model_copy(update={"parallel": ParallelConfig(**said)})
    with pytest.raises(UserError, match=why):
        Split(tiny_gpt(**shape), config, Ranks(world=world, experts=said["experts"]), torch.float64, torch.float64)


def test_a_group_of_shares_holds_every_expert() -> None:
    from llmkit.training.experts import experts_mesh

    with pytest.raises(
        UserError, match=r"experts \(4\) does not divide the 2 ranks that share a model \(2 groups of 2 in 4"
    ):
        experts_mesh(Ranks(world=4, experts=4), 2)


def test_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"experts \(2\) with tensor \(2\).*experts goes with shard"):
        ParallelConfig(experts=2, tensor=2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"parallel.experts \(3\) does not divide the 4 rank\(s\)"):
        connect("cpu", experts=3)
