"""However a model is spread over processes, it is one model: the same numbers, and one checkpoint that fits any mesh."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from ports import free_port
from toys import largest_difference, recipe, rows, same_bits, tiny_gpt, uneven_documents, write_shards

from llmkit.config import MachineError, UserError
from llmkit.data.shards import TokenShards
from llmkit.model.config import LoraConfig
from llmkit.model.gpt import GPT
from llmkit.model.lora import Base, adapters_of, apply_lora
from llmkit.model.weights import shapes_of
from llmkit.storage import newest_good, verify
from llmkit.training import checkpoint
from llmkit.training.checkpoint import Checkpointer
from llmkit.training.config import ParallelConfig, RunConfig
from llmkit.training.dist import Ranks, connect
from llmkit.training.engine import Engine
from llmkit.training.parallel import Split
from llmkit.training.supervised import held_out, supervised_step, token_loss
from llmkit.training.team import Team

LOSS = token_loss(z_loss=1e-3, chunk=24)
# Biases, learned positions, and a layout on disk in which matrices are transposed and q, k and v stand together.
GPT2 = {
    "norm": "layernorm", "mlp": "gelu_tanh", "positions": "learned", "qkv_bias": True, "o_bias": True, "mlp_bias": True,
    "n_kv_heads": 4,
}  # fmt: skip
MOE = {"qk_norm": True, "experts": {"n": 4, "n_active": 2, "d_ff": 16}}
QWEN = {"tie_embeddings": False, "qk_norm": True}


@dataclass(frozen=True)
class Job:
    """A start of a tiny run: from a checkpoint or from nothing, two steps, and a checkpoint."""

    name: str
    parallel: dict[str, Any]
    shape: dict[str, Any]
    start: str | None = None
    optim: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    compile: bool = False
    recompute: bool = False
    breaks: bool = False
    """The last process can't write its files."""


def model_of(job: Job) -> GPT:
    """The network, with adapters that already do something."""
    model = tiny_gpt(activation_checkpointing=job.recompute, **job.shape)
    if job.lora is not None:
        apply_lora(model, LoraConfig(**job.lora), 7, Base("base", "hash"))
        generator = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            if ".lora_B" in name:
                p.data.normal_(0.0, 0.1, generator=generator)
    return model


def run(ranks: Ranks, job: Job, folder: Path) -> None:
    """Does a job and leaves `<name>.json`, its checkpoint and, where it went on from one, that one written again."""
    config = recipe(lr=1e-2, clip=0.5, ema_decay=0.9, steps=20, **job.optim)
    config = config.model_copy(update={"parallel": ParallelConfig(**job.parallel), "compile": job.compile})
    engine, team = Engine(model_of(job), config, ranks), Team(ranks)
    if job.start is not None:
        found = newest_good(folder / job.start)[0]
        assert found is not None
        if engine.split is None:
            tensors, state = checkpoint.load(found)
            engine.load(tensors, state)
        else:
            engine.load_pieces(found, (), json.loads((found / "trainer_state/state.json").read_bytes()))
        save(engine, ranks, team, folder / f"{job.name}-again")
    ctx: Any = SimpleNamespace(ranks=ranks, all_should_stop=lambda: ranks.any(False))
    loader = rows(TokenShards(folder / "shards"), rows_per_step=12, micro_rows=1, rank=ranks.rank, world=ranks.world)
    told: dict[str, Any] = {"train": [supervised_step(engine, ctx, loader, LOSS) for _ in range(2)]}
    held = rows(
        TokenShards(folder / "shards"), rows_per_step=ranks.world, micro_rows=1, rank=ranks.rank, world=ranks.world
    )
    sums = held_out(engine, ctx, held, LOSS, None)
    assert sums is not None
    told["valid"], told["held"] = sums.mean("loss"), engine.flat_grad.numel()
    if job.breaks:
        with pytest.raises(MachineError, match="checkpoint"):
            save(engine, ranks, team, folder / job.name, breaks=ranks.process == ranks.processes - 1)
        told["left"] = [p.name for p in (folder / job.name / "checkpoints").iterdir()]
    else:
        save(engine, ranks, team, folder / job.name)
    if ranks.is_main:
        (folder / f"{job.name}.json").write_text(json.dumps(told))


def save(engine: Engine, ranks: Ranks, team: Team, out: Path, breaks: bool = False) -> None:
    tensors = engine.tensors()
    if engine.split is None:
        saver, size = Checkpointer(out, 9, asynchronous=True), 0
    else:
        saver, size = Checkpointer(out, 9, asynchronous=True, team=team), engine.wholes.total_bytes
    blobs = {}
    if ranks.is_main:
        blobs = {"trainer_state/state.json": json.dumps(engine.state()).encode()}
        blobs |= engine.wholes.index_files() if engine.split is not None else {}
    if breaks:

        def refuse(*_: Any) -> Any:
            raise OSError(28, "No space left on device", str(out))

        checkpoint.safetensors_chunks, kept = refuse, checkpoint.safetensors_chunks  # type: ignore[assignment]
    try:
        saver.save(engine.step, tensors, blobs, {"world": ranks.processes}, n_bytes=size)
        saver.wait()
    finally:
        if breaks:
            checkpoint.safetensors_chunks = kept


def _child(process: int, world: int, ports: list[int], jobs: list[Job], folder: Path) -> None:
    torch.set_num_threads(1)
    for port, job in zip(ports, jobs, strict=True):
        place = {"RANK": process, "WORLD_SIZE": world, "LOCAL_RANK": process, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({k: str(v) for k, v in {**place, "MASTER_PORT": port}.items()})
        said = ParallelConfig(**job.parallel)
        ranks = connect("cpu", timeout_s=60, tensor=said.tensor, experts=said.experts)
        run(ranks, job, folder)
        ranks.close()


def on_processes(world: int, jobs: list[Job], folder: Path) -> None:
    """Jobs one after the other, each in a process group of its own."""
    ports = [free_port() for _ in jobs]
    mp.spawn(_child, (world, ports, jobs, folder), nprocs=world)


# 1 -> 2 (shares) -> 4 (shares of rows computed together) -> 2 (rows computed together) -> 1
CHAIN = [
    Job("a", {}, GPT2),
    Job("b", {"shard": "full"}, GPT2, "a"),
    Job("c", {"shard": "full", "tensor": 2}, GPT2, "b"),
    Job("d", {"tensor": 2}, GPT2, "c"),
    Job("e", {}, GPT2, "d"),
]
DORA = {"r": 3, "alpha": 6.0, "dora": True, "targets": ("q_proj", "v_proj", "mlp")}
LORA = {"r": 3, "alpha": 6.0}
COMPILED: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "shares": ({"shard": "full"}, LORA),
    "together": ({"tensor": 2}, DORA),
}
ADAPTED = [
    Job("la", {}, GPT2, lora=DORA),
    Job("lb", {"shard": "full"}, GPT2, "la", lora=DORA),
    Job("lc", {"shard": "full", "tensor": 2}, GPT2, "lb", lora=DORA),
    Job("ld", {"tensor": 2}, GPT2, "lc", lora=DORA),
    Job("le", {}, GPT2, "ld", lora=DORA),
]
MUON = {"name": "muon", "weight_decay": 0.1}
APART = {
    2: [Job("full", {"shard": "full"}, QWEN, optim=MUON), Job("broken", {"shard": "full"}, QWEN, breaks=True),
        Job("dropping", {"tensor": 2}, QWEN, lora={**DORA, "dropout": 0.3}),
        Job("experts", {"shard": "full"}, MOE, lora=LORA)],
    4: [Job("both", {"shard": "full", "tensor": 2}, QWEN, optim=MUON),
        Job("hybrid", {"shard": "hybrid", "replicas": 2}, QWEN, optim=MUON),
        Job("wide", {"shard": "full"}, QWEN, lora=LORA, optim=MUON),
        Job("groups", {"shard": "hybrid", "replicas": 2}, QWEN, lora=LORA)],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All jobs, and beside them the same number of steps in one process."""
    path = tmp_path_factory.mktemp("parallel")
    write_shards(path / "shards", uneven_documents())
    run(Ranks(), CHAIN[0], path)
    run(Ranks(), ADAPTED[0], path)
    on_processes(2, [CHAIN[1], ADAPTED[1], *APART[2]], path)
    on_processes(4, [CHAIN[2], ADAPTED[2], *APART[4]], path)
    on_processes(2, [CHAIN[3], ADAPTED[3]], path)
    for chain in (CHAIN, ADAPTED):
        run(Ranks(), chain[4], path)
    for job in (*CHAIN[1:], *ADAPTED[1:]):
        run(Ranks(), replace(job, name=f"alone-{job.name}", parallel={}), path)
    run(Ranks(), Job("alone", {}, QWEN, optim=MUON), path)
    for job in (*APART[2], *APART[4]):
        if job.lora is not None:
            run(Ranks(), replace(job, name=f"alone-{job.name}", parallel={}), path)
    return path


def files_of(run: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, whatever files they are in."""
    found = newest_good(run)[0]
    assert found is not None
    return {f"{file}:{n}": t for file, tensors in checkpoint.load(found)[0].items() for n, t in tensors.items()}


def told(folder: Path, name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return result


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        *((c, "alone") for c in ("full", "both", "hybrid")),
        *((c, f"alone-{c}") for c in "bcde"),
        *((c, f"alone-{c}") for c in ("lb", "lc", "ld", "le", "dropping", "experts", "wide", "groups")),
    ],
)
def test_the_same_numbers(folder: Path, name: str, alone: str) -> None:
    """D4, B1, B3: losses, norms, evaluation and every tensor of the checkpoint, to rounding in fp64; the same tokens."""
    mine, one = told(folder, name), told(folder, alone)
    for a, b in zip(mine["train"], one["train"], strict=True):
        assert a["data_hash"] == b["data_hash"]
        assert a == pytest.approx(b, rel=1e-10)
    assert mine["valid"] == pytest.approx(one["valid"], rel=1e-10)
    # Muon's iteration is in bf16, of matrices whose last bits may differ
    assert largest_difference(files_of(folder / name), files_of(folder / alone)) <= 1e-10


@pytest.mark.parametrize(("name", "before"), [(job.name, job.start) for job in (*CHAIN[1:], *ADAPTED[1:])])
def test_any_mesh_resumes_any_other(folder: Path, name: str, before: str) -> None:
    """D3: what was loaded is what was saved, to the bit, from one process to two, four, two and one."""
    assert same_bits(files_of(folder / f"{name}-again"), files_of(folder / before))


def test_the_folder_is_a_model(folder: Path) -> None:
    """Parts that each process wrote, an index over the model's, a manifest over all; nothing is left over."""
    found = newest_good(folder / "c")[0]
    assert found is not None
    verify(found)
    parts = sorted(p.name for p in found.glob("model*"))
    assert len(parts) == 5 and parts[-1] == "model.safetensors.index.json"
    index = json.loads((found / parts[-1]).read_text())
    assert set(index["weight_map"].values()) == set(parts[:-1])
    stored = {n for part in parts[:-1] for n, _ in checkpoint.read_tensors(found / part)}
    assert stored == index["weight_map"].keys()
    sizes = [(found / part).stat().st_size for part in parts[:-1]]
    assert sum(sizes) >= index["metadata"]["total_size"]
    assert [p.name for p in (folder / "c" / "checkpoints").iterdir()] == [found.name]


@pytest.mark.campaign
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks(tmp_path: Path) -> None:
    """B22: as the same weights uncompiled, in shares and of rows computed together."""
    write_shards(tmp_path / "shards", uneven_documents())
    jobs = [Job(name, parallel, QWEN, lora=lora, compile=True) for name, (parallel, lora) in COMPILED.items()]
    on_processes(2, jobs, tmp_path)
    for job in jobs:
        alone = f"alone-{job.name}"
        run(Ranks(), replace(job, name=alone, parallel={}, compile=False), tmp_path)
        mine, one = told(tmp_path, job.name), told(tmp_path, alone)
        assert mine["valid"] == pytest.approx(one["valid"], rel=1e-10)
        for a, b in zip(mine["train"], one["train"], strict=True):
            assert a == pytest.approx(b, rel=1e-10)
        assert largest_difference(files_of(tmp_path / job.name), files_of(tmp_path / alone)) <= 1e-10


def test_adapters_are_pefts_folder(folder: Path) -> None:
    """One file, from one process, with the tensors that one process writes; nothing of the base."""
    found = newest_good(folder / "lc")[0]
    assert found is not None
    verify(found)
    assert [p.name for p in found.glob("*.safetensors*")] == ["adapter_model.safetensors"]
    alone = newest_good(folder / "alone-lc")[0]
    assert alone is not None
    name = "adapter_model.safetensors"
    assert shapes_of([found / name]) == shapes_of([alone / name])


def test_one_fails_and_all_know(folder: Path) -> None:
    """H2: a full disk on the last process: both raise, and no draft is left."""
    assert told(folder, "broken")["left"] == []


@pytest.mark.parametrize(
    ("shape", "ranks", "said", "why"),
    [
        ({}, Ranks(tensor=3), {"tensor": 3}, r"tensor \(3\) does not divide model.n_heads \(4\)"),
        ({"d_ff": 50, "n_kv_heads": 4}, Ranks(tensor=4), {"tensor": 4}, r"tensor \(4\) does not divide model.d_ff \(50\)"),
        (
            MOE, Ranks(tensor=2), {"tensor": 2}, "experts are not split.*shard: full",
        ),
    ],
)  # fmt: skip
def test_refused(shape: dict[str, Any], ranks: Ranks, said: dict[str, Any], why: str) -> None:
    """What does not divide is refused with the numbers and what would do."""
    config = recipe().model_copy(update={"parallel": ParallelConfig(**said)})
    with pytest.raises(UserError, match=why):
        Split(tiny_gpt(**shape), config, ranks, torch.float64, torch.float64)


def test_a_base_in_four_bits_is_refused() -> None:
    """Its layers are told by what they hold."""
    model = model_of(Job("a", {}, {}, lora=LORA))
    next(iter(adapters_of(model).values())).packed = SimpleNamespace()  # type: ignore[assignment]
    config = recipe().model_copy(update={"parallel": ParallelConfig(shard="full")})
    with pytest.raises(UserError, match=r"lora.quantize with parallel.shard: full: .* drop lora.quantize"):
        Split(model, config, Ranks(), torch.float64, torch.float64)


def test_blocks_are_compiled_one_by_one() -> None:
    """Where the model is spread; weights are put together between them."""
    config = recipe().model_copy(update={"parallel": ParallelConfig(), "compile": True})
    model = tiny_gpt()
    Split(model, config, Ranks(), torch.float64, torch.float64)
    assert all(block._compiled_call_impl is not None for block in model.model.layers)
    assert model._compiled_call_impl is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"log": {"gradient_noise": True}}, "gradient_noise with parallel.shard: full"),
    ],
)
def test_what_does_not_go_with_shares(change: dict[str, Any], why: str) -> None:
    config = RunConfig.model_validate({"out": "unused", "parallel": {"shard": "full"}, **change})
    with pytest.raises(UserError, match=why):
        Split(tiny_gpt(), config, Ranks(), torch.float32, torch.float32)


def test_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """`replicas` means nothing without hybrid; processes that can't be grouped are refused before any is waited for."""
    with pytest.raises(ValueError, match="belongs to shard: hybrid"):
        ParallelConfig(replicas=2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    refuse: Callable[[], Any] = lambda: connect("cpu", tensor=2)  # noqa: E731
    with pytest.raises(UserError, match=r"parallel.tensor \(2\) does not divide the 3 process"):
        refuse()
