"""Shares in main memory: the same bits as on the device, and nothing of main memory reaches a collective."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ports import free_port
from test_parallel import DORA, LORA, LOSS, MOE, MUON, QWEN, Job, files_of, model_of, on_processes, save, told
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import recipe, rows, same_bits, tiny_gpt, uneven_documents, write_shards

from llmkit.config import UserError
from llmkit.data.shards import TokenShards
from llmkit.storage import newest_good
from llmkit.training.config import ParallelConfig, RunConfig
from llmkit.training.dist import Ranks, connect
from llmkit.training.engine import Engine
from llmkit.training.parallel import Split, local
from llmkit.training.supervised import supervised_step
from llmkit.training.team import Team
from llmkit.training.wholes import Wholes

FULL: dict[str, Any] = {"shard": "full"}
JOBS = {
    2: [
        Job("first", FULL, QWEN),
        Job("again", FULL, QWEN, "first"),
        Job("muon", FULL, QWEN, optim=MUON),
        Job("fp32", FULL, QWEN, optim={"precision": "fp32", "weights": "ema"}),
        Job("bf16", FULL, QWEN, optim={"precision": "bf16", **MUON}),
        Job("lora", FULL, QWEN, lora=LORA, optim={"precision": "bf16"}),
        Job("experts", {**FULL, "experts": 2}, MOE),
    ],
    4: [
        Job("both", {**FULL, "tensor": 2}, QWEN, optim=MUON),
        Job("dora", {**FULL, "tensor": 2}, QWEN, lora=DORA),
        Job("hybrid", {"shard": "hybrid", "replicas": 2, "experts": 2}, MOE),
    ],
}


def in_main_memory(job: Job) -> Job:
    """The same job with shares in main memory."""
    start = None if job.start is None else f"{job.start}-home"
    return Job(f"{job.name}-home", {**job.parallel, "offload": True}, job.shape, start, optim=job.optim, lora=job.lora)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All jobs, with shares on the device and in main memory."""
    path = tmp_path_factory.mktemp("offload")
    write_shards(path / "shards", uneven_documents())
    for world, jobs in JOBS.items():
        on_processes(world, [*jobs, *map(in_main_memory, jobs)], path)
    return path


@pytest.mark.parametrize("name", [job.name for jobs in JOBS.values() for job in jobs])
def test_the_same_bits(folder: Path, name: str) -> None:
    """Losses, norms, evaluation, weights, masters, averages and optimizer state, after a resume too."""
    assert told(folder, f"{name}-home") == told(folder, name)
    assert same_bits(files_of(folder / f"{name}-home"), files_of(folder / name))


# --- two memories, where there is one --------------------------------------------------------------------------------


class Apart(TorchDispatchMode):
    """Holds tensors of main memory and of a device apart, where both are one: by their storages, with PyTorch's rules.

    What is made of tensors in main memory lies there. An operation takes tensors of one kind, but for copies and numbers
    without dimensions, and a collective takes none of main memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self._home: dict[int, Any] = {}  # kept, so that no other storage gets the same place
        self.collectives = 0

    def put(self, tensors: Iterable[Tensor]) -> None:
        """These lie in main memory."""
        for t in tensors:
            self._home[t.untyped_storage()._cdata] = t.untyped_storage()

    def has(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._home

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor) and not t.is_meta]
        kinds = {self.has(t) for t in given if t.dim()} or {self.has(t) for t in given}
        if func.namespace == "c10d":
            self.collectives += 1
            assert not any(map(self.has, given)), f"{func} is given a tensor of main memory"
        copies = func.overloadpacket.__name__ in ("copy_", "_foreach_copy_")
        assert copies or len(kinds) <= 1, f"{func} of tensors of main memory and of the device"
        out = func(*args, **(kwargs or {}))
        if True in kinds and not copies:
            self.put(t for t in tree_leaves(out) if isinstance(t, Tensor) and not t.is_meta)
        return out


def stand_in(apart: Apart, moves: bool) -> None:
    """Makes this process's engine work within `apart`, outside of FSDP2's own work; `moves`: its moves are moves."""

    def there(self: Split, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor) if moves else tensor

    def back(self: Split, tensor: Tensor) -> Tensor:
        out = torch.empty(tensor.shape, dtype=tensor.dtype)
        apart.put([out])
        return out.copy_(tensor)

    def within(work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with apart:
                return work(*args, **kwargs)

        return wrapped

    Split.there, Split.back = there, back  # type: ignore[method-assign]
    for kind, names in (
        (Split, ("sum_gradients", "replica")),
        (Engine, ("_norms", "_non_finite", "_apply")),
        (Wholes, ("gather", "load")),
    ):
        for name in names:
            setattr(kind, name, within(getattr(kind, name)))


def state_of(engine: Engine) -> list[Tensor]:
    """All that must lie in main memory."""
    held = [local(p).detach() for p in engine.module.parameters()]
    held += [engine.flat_grad, *engine.masters.values(), *engine.ema.values(), *engine.optimizer.state_dict().values()]
    return held


def _apart(process: int, world: int, port: int, job: Job, folder: Path, moves: bool) -> None:
    torch.set_num_threads(1)
    place = {"RANK": process, "WORLD_SIZE": world, "LOCAL_RANK": process, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({k: str(v) for k, v in {**place, "MASTER_PORT": port}.items()})
    said = ParallelConfig(**job.parallel)
    ranks = connect("cpu", timeout_s=60, tensor=said.tensor, experts=said.experts)
    apart = Apart()
    stand_in(apart, moves)
    config = recipe(lr=1e-2, clip=0.5, ema_decay=0.9, steps=20, **job.optim)
    config = config.model_copy(update={"parallel": said, "log": config.log.model_copy(update={"norms_every": 1})})
    engine = Engine(model_of(job), config, ranks)
    apart.put(state_of(engine))
    assert engine.split is not None and engine.split.home == torch.device("cpu")
    ctx: Any = SimpleNamespace(ranks=ranks, all_should_stop=lambda: ranks.any(False))
    loader = rows(TokenShards(folder / "shards"), rows_per_step=12, micro_rows=1, rank=ranks.rank, world=ranks.world)
    if not moves:
        with pytest.raises(AssertionError, match="of tensors of main memory and of the device"):
            supervised_step(engine, ctx, loader, LOSS)
        with apart, pytest.raises(AssertionError, match=r"c10d.* is given a tensor of main memory"):
            dist.all_reduce(engine.flat_grad.mul(2.0))
        ranks.close()
        return
    for _ in range(2):
        supervised_step(engine, ctx, loader, LOSS)
    assert engine.watched
    state = engine.state()
    save(engine, ranks, Team(ranks), folder / job.name)
    with engine.replica() as whole:
        assert not any(apart.has(p) for p in whole.parameters())
    found = newest_good(folder / job.name)[0]
    assert found is not None
    engine.load_pieces(found, (), state)
    engine._non_finite({"loss": float("nan")}, [])
    assert all(map(apart.has, state_of(engine))) and apart.collectives > 10
    ranks.close()


@pytest.mark.parametrize(
    ("world", "job"),
    [
        (2, Job("bf16", FULL, QWEN, optim={"precision": "bf16", **MUON})),
        (2, Job("experts", {**FULL, "experts": 2}, MOE)),
        (4, Job("dora", {**FULL, "tensor": 2}, QWEN, lora=DORA)),
    ],
)
def test_collectives_are_of_the_device(tmp_path: Path, world: int, job: Job) -> None:
    """Steps with norms by layer, saves, resumes and whole copies, as if main memory were another one."""
    write_shards(tmp_path / "shards", uneven_documents())
    mp.spawn(_apart, (world, free_port(), in_main_memory(job), tmp_path, True), nprocs=world)


def test_what_is_not_moved_is_found(tmp_path: Path) -> None:
    """The stand-in itself: without the moves to the device the first sum of squares is refused."""
    write_shards(tmp_path / "shards", uneven_documents())
    mp.spawn(_apart, (2, free_port(), in_main_memory(Job("bf16", FULL, QWEN)), tmp_path, False), nprocs=2)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refused() -> None:
    """Without shares, on one process, and beside parameters that are in no network."""
    with pytest.raises(ValueError, match=r"offload: true with shard: none: .* set shard: full or hybrid"):
        ParallelConfig(offload=True)
    config = RunConfig.model_validate({"out": "unused", "parallel": {"shard": "full", "offload": True}})
    with pytest.raises(UserError, match=r"offload: true on one process: .* set parallel.offload: false"):
        Engine(tiny_gpt(), config)
    student = nn.ModuleDict({"model": tiny_gpt(), "projection": nn.Linear(2, 2)})
    with pytest.raises(
        UserError, match=r"offload: true with parallel.shard: full: .* is not in shares: set offload: false"
    ):
        Split(student, config, Ranks(), torch.float32, torch.float32)
