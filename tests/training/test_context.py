"""Processes that share the positions of each row compute what one process does: losses, gradients, tokens."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from ports import free_port
from test_parallel import GPT2, files_of, save, told
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import largest_difference, recipe, same_bits, tiny_gpt, uneven_documents, write_shards

from llmkit.config import UserError
from llmkit.data.loader import RowLoader, TextRows
from llmkit.data.packing import IGNORE
from llmkit.data.shards import TokenShards
from llmkit.model.context import Context
from llmkit.model.gpt import causal_mask, document_mask, part_mask
from llmkit.stages.recipes import DistillRecipe, PretrainRecipe, RewardRecipe
from llmkit.storage import newest_good
from llmkit.training import checkpoint
from llmkit.training.config import ParallelConfig
from llmkit.training.dist import Ranks, connect
from llmkit.training.engine import Engine
from llmkit.training.setup import context_of
from llmkit.training.supervised import held_out, supervised_step, token_loss
from llmkit.training.team import Team

LOSS = token_loss(z_loss=1e-3, chunk=24)


@dataclass(frozen=True)
class Job:
    """A start of a tiny run: from a checkpoint or from nothing, two steps, an evaluation and a checkpoint."""

    name: str
    parallel: dict[str, Any] = field(default_factory=dict)
    shape: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    recompute: bool = False


def run(ranks: Ranks, job: Job, folder: Path) -> None:
    """Does a job and leaves `<name>.json`, its checkpoint and, where it went on from one, that one written again."""
    config = recipe(lr=1e-2, clip=0.5, ema_decay=0.9, steps=20)
    config = config.model_copy(update={"parallel": ParallelConfig(**job.parallel)})
    engine, team = Engine(tiny_gpt(activation_checkpointing=job.recompute, **job.shape), config, ranks), Team(ranks)
    if job.start is not None:
        found = newest_good(folder / job.start)[0]
        assert found is not None
        if engine.split is None:
            engine.load(*checkpoint.load(found))
        else:
            engine.load_pieces(found, (), json.loads((found / "trainer_state/state.json").read_bytes()))
        write(engine, ranks, team, folder / f"{job.name}-again")
    ctx: Any = SimpleNamespace(ranks=ranks, all_should_stop=lambda: ranks.any(False))
    group, world = ranks.rank // ranks.context, ranks.world // ranks.context
    text = TextRows([TokenShards(folder / "shards")], pad_id=0, **{"row_len": 18, **job.rows})

    def loader(n: int) -> RowLoader:
        return RowLoader(
            text, rows_per_step=n, micro_rows=1, seed=3, prefetch=0, rank=group, world=world, context=context_of(ranks)
        )

    metrics: dict[str, Any] = {"train": [supervised_step(engine, ctx, loader(4), LOSS) for _ in range(2)]}
    sums = held_out(engine, ctx, loader(world), LOSS, 400)
    assert sums is not None
    metrics["valid"] = sums.mean("loss")
    if job.name.startswith("long"):
        metrics["kept"] = kept_bytes(engine.module, loader(world).step(0)[0])
    write(engine, ranks, team, folder / job.name)
    if ranks.is_main:
        (folder / f"{job.name}.json").write_text(json.dumps(metrics))


class Alive(TorchDispatchMode):
    """Knows the memory of all tensors made since it was entered."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    @property
    def n_bytes(self) -> int:
        return sum(n for ref, n in self._seen.values() if not ref.expired())


def kept_bytes(module: torch.nn.Module, batch: Any) -> int:
    """What a forward pass in training leaves for the backward pass."""
    module.train()
    with Alive() as alive:
        hidden = module(batch.ids_BT, batch.positions_BT, batch.part)
    found, seen = alive.n_bytes, time.monotonic()
    while time.monotonic() < seen + 1:  # gloo's threads let go of a message's tensors after its result is there
        time.sleep(0.01)
        if alive.n_bytes < found:
            found, seen = alive.n_bytes, time.monotonic()
    hidden.sum().backward()  # keys and values are put together once more
    return found


def write(engine: Engine, ranks: Ranks, team: Team, out: Path) -> None:
    """Where every process has the whole model, one writes it."""
    if ranks.is_main or engine.split is not None:
        save(engine, ranks, team, out)
    ranks.any(False)


def _child(process: int, world: int, ports: list[int], jobs: list[Job], folder: Path) -> None:
    torch.set_num_threads(1)
    for port, job in zip(ports, jobs, strict=True):
        place = {"RANK": process, "WORLD_SIZE": world, "LOCAL_RANK": process, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({k: str(v) for k, v in {**place, "MASTER_PORT": port}.items()})
        said = ParallelConfig(**job.parallel)
        ranks = connect("cpu", timeout_s=60, tensor=said.tensor, context=said.context, experts=said.experts)
        run(ranks, job, folder)
        ranks.close()


def on_processes(world: int, jobs: list[Job], folder: Path) -> None:
    """Jobs one after the other, each in a process group of its own."""
    ports = [free_port() for _ in jobs]
    mp.spawn(_child, (world, ports, jobs, folder), nprocs=world)


EXPERTS = {"qk_norm": True, "experts": {"n": 4, "n_active": 2, "d_ff": 16}}
ONE_TEXT = {"cross_document_attention": True, "row_len": 48}  # a row is one long document
# On 2 and on 4 processes. Rows of 18 are no multiple of the 4 or 8 chunks.
JOBS = {
    2: [
        Job("documents", {"context": 2}),
        Job("long", {"context": 2}, rows=ONE_TEXT),
        Job("window", {"context": 2}, {"sliding_window": 5, "n_full_layers": 1, "qkv_bias": True}, recompute=True),
        Job("learned", {"context": 2, "shard": "full"}, GPT2, {"packing": False}),
        Job("experts", {"context": 2, "shard": "full"}, EXPERTS, recompute=True),
        Job("both ways", {"context": 2}, {"causal": False}),
    ],
    4: [
        Job("four", {"context": 4}, rows=ONE_TEXT),
        Job("shares", {"context": 2, "shard": "hybrid", "replicas": 2}),
        Job("visits", {"context": 2, "experts": 2}, EXPERTS, recompute=True),
        Job("visits far", {"context": 2, "experts": 4, "shard": "full"}, EXPERTS),
        Job("heads", {"context": 2, "tensor": 2}, rows=ONE_TEXT),
        Job("resumed", {"context": 2, "shard": "full"}, start="documents"),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All jobs, and beside each the same steps in one process."""
    path = tmp_path_factory.mktemp("context")
    write_shards(path / "shards", uneven_documents())
    for world, jobs in JOBS.items():
        on_processes(world, jobs, path)
        for job in jobs:
            run(Ranks(), replace(job, name=f"{job.name}-alone", parallel={}), path)
    return path


@pytest.mark.parametrize("name", [job.name for jobs in JOBS.values() for job in jobs])
def test_the_same_numbers(folder: Path, name: str) -> None:
    """D4, B1: losses, gradient norms, evaluation, weights, average and moments, to rounding in fp64; the same tokens."""
    mine, one = told(folder, name), told(folder, f"{name}-alone")
    for a, b in zip(mine["train"], one["train"], strict=True):
        assert a["data_hash"] == b["data_hash"]
        assert a == pytest.approx(b, rel=1e-10)
    assert mine["valid"] == pytest.approx(one["valid"], rel=1e-10)
    assert largest_difference(files_of(folder / name), files_of(folder / f"{name}-alone")) <= 1e-9


def test_half_a_row_needs_half_the_memory(folder: Path) -> None:
    """No layer keeps keys and values of the whole row."""
    assert told(folder, "long")["kept"] < 0.6 * told(folder, "long-alone")["kept"]


def test_another_context_resumes(folder: Path) -> None:
    """D3: 2 processes that share rows -> 4 with weights in shares: what was loaded is what was saved, to the bit."""
    assert same_bits(files_of(folder / "resumed-again"), files_of(folder / "documents"))


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_parts_make_a_whole(tmp_path: Path, n: int, causal: bool) -> None:
    """Every position is in one part, sees there what it sees in the whole row, and all parts look at as much."""
    shards = write_shards(tmp_path, uneven_documents())
    batch = TextRows([shards], row_len=24, pad_id=0).batch(
        *torch.arange(4).repeat(3, 1).mul(torch.tensor([[1], [0], [1]])).numpy()
    )[0]
    contexts = [Context(n, place, None) for place in range(n)]
    parts = [batch.part_of(context) for context in contexts]
    whole = document_mask(batch.docs_BT, causal)
    found, looks = torch.zeros_like(whole), []
    for context, part in zip(contexts, parts, strict=True):
        assert part.part is not None
        spans = context.spans(24)
        own = torch.cat([torch.arange(*span) for span in spans])
        assert torch.equal(part.ids_BT, batch.ids_BT[:, own]) and torch.equal(
            part.positions_BT, batch.positions_BT[:, own]
        )
        masks = part_mask(part.part, causal, None).chunks
        for (first, end), (until, seen) in zip(spans, masks, strict=True):
            assert seen is not None
            found[:, :, first:end, :until] = seen
        looks.append(sum((end - first) * until for (first, end), (until, _) in zip(spans, masks, strict=True)))
    assert torch.equal(found, whole)
    assert len(set(looks)) == 1 and looks[0] < (24 * 24 // n if causal else 24 * 24 // n + 1)
    assert sum(p.denominator for p in parts) == batch.denominator
    assert sum(p.n_tokens for p in parts) == batch.n_tokens


def test_a_row_that_does_not_divide(tmp_path: Path) -> None:
    """Rows are filled up with padding that is no label and belongs to no document."""
    shards = write_shards(tmp_path, uneven_documents())
    batch = TextRows([shards], row_len=18, pad_id=0).batch(*(torch.zeros(3, 1, dtype=torch.int64).numpy()))[0]
    last = batch.part_of(Context(4, 0, None))  # 24 columns in 8 chunks of 3: the first and the last
    assert last.ids_BT.shape == (1, 6)
    assert last.labels_BT[0, 3:].tolist() == [IGNORE] * 3 and last.docs_BT[0, 3:].tolist() == [-1] * 3
    assert last.n_tokens == 3 and last.part is not None and not last.part.full


def test_window(tmp_path: Path) -> None:
    """A window is counted in columns of the whole row."""
    shards = write_shards(tmp_path, uneven_documents())
    text = TextRows([shards], row_len=16, pad_id=0, cross_document_attention=True)
    part = text.batch(*(torch.zeros(3, 1, dtype=torch.int64).numpy()))[0].part_of(Context(2, 1, None)).part
    assert part is not None
    masks = part_mask(part, True, 5).chunks
    whole = causal_mask(0, 16, torch.device("cpu"), 5)
    for (first, end), (until, seen) in zip(part.context.spans(16), masks, strict=True):
        assert seen is not None and torch.equal(seen, whole[:, :, first:end, :until])


BASE = {"out": "unused", "parallel": {"context": 2}, "data": {"path": "x"}}
DISTILL = {"stage": "distill", "teacher": "x", "init_from": "x"}


@pytest.mark.parametrize(
    ("recipe_class", "said", "why"),
    [
        (PretrainRecipe, {"stage": "pretrain", "model": {}, "compile": True}, "compile with parallel.context"),
        (PretrainRecipe, {"stage": "pretrain", "model": {}, "log": {"gradient_noise": True}}, "gradient_noise with parallel"),
        (RewardRecipe, {"stage": "reward", "objective": "rank", "init_from": "x"}, "only pretrain, sft and distill"),
        (DistillRecipe, {**DISTILL, "losses": ({"kind": "attention"},)}, "losses: attention"),
        (DistillRecipe, {**DISTILL, "cache": {}}, "with cache"),
        (DistillRecipe, {**DISTILL, "on_policy_frac": 0.5}, "with on_policy_frac"),
    ],
)  # fmt: skip
def test_refused(recipe_class: Any, said: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        recipe_class.model_validate({**BASE, **said})


def test_processes_that_do_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"parallel.context \(3\) does not divide the 4 rank"):
        connect("cpu", context=3)
    with pytest.raises(UserError, match=r"does not divide the 2 rank\(s\) of 2"):
        connect("cpu", tensor=2, context=4)
