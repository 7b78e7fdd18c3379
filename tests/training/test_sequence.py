"""Rows computed together, the residual stream cut by position: the numbers of one process, in 1 / N of its memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from ports import free_port
from safetensors.torch import load_file, save_file
from test_context import Alive
from test_parallel import DORA, GPT2, QWEN, told
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import VOCAB, largest_difference, recipe, tiny_gpt

from llmkit.distill.layers import Taps
from llmkit.losses import LossSum
from llmkit.model.config import LoraConfig
from llmkit.model.gpt import GPT, Block, document_mask
from llmkit.model.heads import SequenceClassifier, init_head
from llmkit.model.lora import Base, apply_lora
from llmkit.training.config import ParallelConfig
from llmkit.training.dist import Ranks, connect
from llmkit.training.engine import Engine


@dataclass(frozen=True)
class Rows:
    """A micro-batch of B rows with T tokens each."""

    ids_BT: Tensor

    @property
    def denominator(self) -> float:
        return float(self.ids_BT.numel())

    def to(self, device: torch.device) -> Rows:
        return Rows(self.ids_BT.to(device))


@dataclass(frozen=True)
class Job:
    """A tiny network, and two updates of it."""

    name: str
    parallel: dict[str, Any] = field(default_factory=dict)
    shape: dict[str, Any] = field(default_factory=dict)
    T: int = 7
    B: int = 3
    """Rows of each micro-batch, of which a step has two."""
    loss: str = "plain"
    recompute: bool = False
    lora: bool = False
    n_labels: int | None = None
    """A network with scores in place of words."""
    everything: bool = False
    """Every position sees all of its row, and nothing but the row tells how long that is: no family's, but ours to compute."""


def words(module: nn.Module, ids_BT: Tensor, mask: Tensor | None = None) -> Tensor:
    """Loss of every row's next tokens, added up."""
    assert isinstance(module, GPT)
    logits_BTV = module.logits(module(ids_BT, mask=mask))
    return nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum")


def plain(module: nn.Module, batch: Rows) -> LossSum:
    return LossSum(words(module, batch.ids_BT))


def masked(module: nn.Module, batch: Rows) -> LossSum:
    """Two documents a row."""
    docs_BT = (torch.arange(batch.ids_BT.shape[1]) > 2).long().expand_as(batch.ids_BT)
    return LossSum(words(module, batch.ids_BT, document_mask(docs_BT)))


def several(module: nn.Module, batch: Rows) -> LossSum:
    """Passes over rows of other lengths before the backward pass, as DPO makes them."""
    ids_BT = batch.ids_BT
    return LossSum(words(module, ids_BT) + words(module, ids_BT[:, :3]) + words(module, ids_BT[:1, :4]))


def hidden(module: nn.Module, batch: Rows) -> LossSum:
    """What two layers hold, as distillation compares it."""
    assert isinstance(module, GPT)
    with Taps(module, [1, 2]) as taps:
        total = words(module, batch.ids_BT)
    for layer, x_BTD in taps.hidden.items():
        assert x_BTD.shape == (*batch.ids_BT.shape, module.config.d_model)
        total = total + layer * x_BTD.square().mean(-1).sum()
    return LossSum(total)


def scores(module: nn.Module, batch: Rows) -> LossSum:
    lengths_B = torch.arange(len(batch.ids_BT)) + batch.ids_BT.shape[1] - len(batch.ids_BT)
    return LossSum(module(batch.ids_BT, lengths_B).square().sum())


LOSSES: dict[str, Callable[[nn.Module, Rows], LossSum]] = {
    "plain": plain, "masked": masked, "several": several, "hidden": hidden, "scores": scores
}  # fmt: skip


def model_of(job: Job) -> nn.Module:
    model = tiny_gpt(activation_checkpointing=job.recompute, **job.shape)
    if job.everything:
        model.config = model.config.model_copy(update={"causal": False})
    with torch.no_grad():  # norms and biases that do something
        for p in (p for p in model.parameters() if p.dim() == 1):
            p += torch.linspace(-0.3, 0.4, len(p))
    if job.lora:
        apply_lora(model, LoraConfig(**DORA), 7, Base("base", "hash"))
        for name, p in model.named_parameters():
            if ".lora_B" in name:
                p.data += torch.linspace(-0.2, 0.2, p.numel()).view(p.shape)
    if job.n_labels is None:
        return model
    judge = SequenceClassifier(model.config, job.n_labels, job.recompute)
    judge.model.load_state_dict(model.model.state_dict())
    init_head(judge, 3)
    return judge


def run(ranks: Ranks, job: Job, folder: Path) -> None:
    """Does a job and leaves its metrics in `<name>.json` and its weights in `<name>.safetensors`."""
    config = recipe(lr=1e-2, clip=0.5, steps=20).model_copy(update={"parallel": ParallelConfig(**job.parallel)})
    engine = Engine(model_of(job), config, ranks)
    for block in (m for m in engine.module.modules() if isinstance(m, Block)):
        block.self_attn.dropout = 0.0  # of weights each process draws for its own heads
    generator = torch.Generator().manual_seed(5)
    metrics = []
    for _ in range(2):
        batches = [Rows(torch.randint(VOCAB, (job.B, job.T), generator=generator)) for _ in range(2)]
        metrics.append(engine.update(batches[ranks.rank :: ranks.world], LOSSES[job.loss]))
    kept, n_sent = looked_at(engine.module, batches[0].ids_BT) if job.n_labels is None else (0, 0)
    with engine.replica() as module:
        weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    if ranks.is_main:
        save_file(weights, folder / f"{job.name}.safetensors")
        (folder / f"{job.name}.json").write_text(json.dumps({"train": metrics, "kept": kept, "sent": n_sent}))


class Sent(TorchDispatchMode):
    """Counts messages about positions."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func.name() in ("_c10d_functional::all_gather_into_tensor", "_c10d_functional::all_to_all_single")
        return func(*args, **(kwargs or {}))


def looked_at(module: nn.Module, ids_BT: Tensor) -> tuple[int, int]:
    """What a forward pass in training leaves for the backward pass, in bytes, and how many messages both send."""
    module.train()
    with Sent() as sent:
        with Alive() as alive:
            hidden_BTD = module(ids_BT)
            found = alive.n_bytes
        hidden_BTD.sum().backward()
    return found, sent.n


def _child(process: int, world: int, ports: list[int], jobs: list[Job], folder: Path) -> None:
    torch.set_num_threads(1)
    for port, job in zip(ports, jobs, strict=True):
        place = {"RANK": process, "WORLD_SIZE": world, "LOCAL_RANK": process, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({k: str(v) for k, v in {**place, "MASTER_PORT": port}.items()})
        ranks = connect("cpu", timeout_s=60, tensor=job.parallel["tensor"])
        run(ranks, job, folder)
        ranks.close()


def on_processes(world: int, jobs: list[Job], folder: Path) -> None:
    ports = [free_port() for _ in jobs]
    mp.spawn(_child, (world, ports, jobs, folder), nprocs=world)


TWO, FOUR = {"tensor": 2}, {"tensor": 4}
LONG = {"n_layers": 4, "d_model": 32, "d_ff": 64, "n_kv_heads": 4, "max_seq_len": 256}
# 3 rows of 7 positions are no multiple of 2 or 4; 1 row of 3 leaves one of 4 processes with nothing but padding.
JOBS = {
    2: [
        Job("odd", TWO, QWEN),
        Job("odd again", TWO, QWEN, recompute=True),
        Job("one row", TWO, GPT2, B=1),
        Job("both ways", TWO, GPT2, everything=True),
        Job("both ways again", TWO, GPT2, everything=True, recompute=True, B=1),
        Job("documents", TWO, {**QWEN, "sliding_window": 3, "n_full_layers": 1}, loss="masked", recompute=True),
        Job("several", TWO, GPT2, loss="several"),
        Job("several again", TWO, GPT2, loss="several", recompute=True),
        Job("several both ways", TWO, GPT2, everything=True, loss="several", recompute=True),
        Job("adapters", TWO, GPT2, loss="several", lora=True),
        Job("adapters again", TWO, GPT2, lora=True, recompute=True),
        Job("dropout", TWO, {**QWEN, "dropout": 0.3}),
        Job("dropout again", TWO, {**QWEN, "dropout": 0.3}, recompute=True),
        Job("hidden", TWO, QWEN, loss="hidden"),
        Job("hidden again", TWO, QWEN, loss="hidden", recompute=True),
        Job("scores", TWO, {}, loss="scores", n_labels=2),
        Job("scores both ways", TWO, {"causal": False}, loss="scores", n_labels=2, recompute=True),
        Job("long", TWO, LONG, T=256, B=1),
        Job("long again", TWO, LONG, T=256, B=1, recompute=True),
    ],
    4: [
        Job("few", FOUR, GPT2, T=3, B=1),
        Job("four", FOUR, GPT2, loss="several", recompute=True),
        Job("shares", {"tensor": 2, "shard": "full"}, QWEN, loss="several", recompute=True),
        Job("hidden shares", {"tensor": 2, "shard": "full"}, QWEN, loss="hidden"),
        Job("long four", FOUR, LONG, T=256, B=1),
        Job("long four again", FOUR, LONG, T=256, B=1, recompute=True),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All jobs, and beside each the same updates in one process."""
    path = tmp_path_factory.mktemp("sequence")
    for world, jobs in JOBS.items():
        on_processes(world, jobs, path)
        for job in jobs:
            run(Ranks(), replace(job, name=f"{job.name}-alone", parallel={}), path)
    return path


@pytest.mark.parametrize("name", [job.name for jobs in JOBS.values() for job in jobs])
def test_the_same_numbers(folder: Path, name: str) -> None:
    """D4: losses, gradient norms and all weights, to rounding in fp64: norms and biases too, which see a part each."""
    for mine, one in zip(told(folder, name)["train"], told(folder, f"{name}-alone")["train"], strict=True):
        assert mine == pytest.approx(one, rel=1e-10)
    mine, one = (load_file(folder / f"{run}.safetensors") for run in (name, f"{name}-alone"))
    assert largest_difference(mine, one) <= 1e-9


@pytest.mark.parametrize(
    ("name", "most"),
    [("long", 0.56), ("long again", 0.72), ("long four", 0.34), ("long four again", 0.58)],
)
def test_a_share_of_the_memory(folder: Path, name: str, most: float) -> None:
    """No block keeps whole rows; what all have is the hidden states that leave the network, and the rotary tables."""
    assert told(folder, name)["kept"] < most * told(folder, f"{name}-alone")["kept"]


@pytest.mark.parametrize(("name", "of_block"), [("long", 10), ("long four", 10), ("long again", 11)])
def test_how_many_messages(folder: Path, name: str, of_block: int) -> None:
    """Four forward, four backward, and two for what is put together once more; where a block is computed again, all of its
    forward pass but the last. Around the blocks, one at either end. `llmkit plan` counts on it."""
    assert told(folder, name)["sent"] == 4 * of_block + 2
    assert told(folder, f"{name}-alone")["sent"] == 0
