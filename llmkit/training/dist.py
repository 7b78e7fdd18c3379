"""The process group: the only file that reads RANK and WORLD_SIZE.

With one process every method is a no-op, so callers never ask how many there are. Under tensor parallelism several
processes compute the same rows: they share a rank here, which says what data is read, and sums over ranks count it once.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from llmkit.config import MachineError, UserError
from llmkit.training.config import LivenessConfig
from llmkit.training.liveness import ElsewhereError, Liveness, noted


@dataclass(frozen=True)
class Ranks:
    """This process's place among all of them, and the device it computes on."""

    rank: int = 0
    """Which share of the data is its own; the same for processes that compute each position together."""
    world: int = 1
    """Into how many shares the data is cut."""
    local_rank: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    store: Any = None
    tensor: int = 1
    """How many processes compute each row together; process number rank * tensor + place is this one."""
    place: int = 0
    """This process's among those."""
    mesh: Any = None
    """PyTorch's DeviceMesh with the dimensions `data` and `tensor`; None while `tensor` is 1."""
    liveness: Liveness | None = None
    """Who looks whether the other processes are alive; None: nobody."""
    per_node: int = 1
    """Processes on this machine."""
    context: int = 1
    """How many neighbouring ranks read the same rows, and compute some of their positions each."""
    context_group: Any = None
    """Those that do so with this one; None while `context` is 1."""
    experts: int = 1
    """How many neighbouring ranks hold each layer's experts together."""

    @property
    def is_main(self) -> bool:
        return self.process == 0

    @property
    def process(self) -> int:
        """This process's number among all of them."""
        return self.rank * self.tensor + self.place

    @property
    def processes(self) -> int:
        return self.world * self.tensor

    @property
    def data_group(self) -> Any:
        """One process of each rank; None: all processes."""
        return None if self.mesh is None else self.mesh["data"].get_group()

    @property
    def tensor_group(self) -> Any:
        """The processes that share this one's rows."""
        assert self.mesh is not None
        return self.mesh["tensor"].get_group()

    @noted()
    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds a tensor up over all ranks, in place: every rank gets the same bits."""
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.data_group)
        return tensor

    def sum_numbers(self, *numbers: float) -> list[float]:
        """Adds numbers up over all ranks, in fp64 (fp32 on MPS, which has no fp64)."""
        if self.world == 1:
            return list(numbers)
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return list(self.sum_(torch.tensor(numbers, dtype=dtype, device=self.device)).tolist())

    @noted()
    def max_number(self, number: float) -> float:
        """The largest of the ranks' numbers."""
        if self.world == 1:
            return number
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        largest = torch.tensor(number, dtype=dtype, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.data_group)
        return float(largest.item())

    def sum_hash(self, value: int) -> int:
        """Adds 63-bit hashes up over all ranks, modulo 2^63."""
        if self.world == 1:
            return value % 2**63
        parts = [value >> 32, value & 0xFFFFFFFF]  # two halves, so that the sum over ranks can't overflow
        high, low = self.sum_(torch.tensor(parts, dtype=torch.int64, device=self.device)).tolist()
        return ((high << 32) + low) % 2**63

    @noted()
    def any(self, flag: bool) -> bool:
        """Whether the flag is set in at least one process; all get the same answer and so act together."""
        if self.processes == 1:
            return flag
        flags = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.SUM)
        return bool(flags.item())

    def concat(self, tensor: Tensor) -> Tensor:
        """The ranks' one-dimensional tensors, of any lengths, one after the other, on every rank."""
        if self.world == 1:
            return tensor
        sizes = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        sizes[self.rank] = len(tensor)
        ends = self.sum_(sizes).cumsum(0).tolist()
        whole = torch.zeros(ends[-1], dtype=tensor.dtype, device=self.device)
        whole[ends[self.rank] - len(tensor) : ends[self.rank]] = tensor.to(self.device)
        return self.sum_(whole).to(tensor.device)  # all but one rank add zeros, so every bit is that rank's

    def together(self, work: Callable[[], Any]) -> Any:
        """This rank's share of some work. If it fails on one rank, it fails on all, instead of leaving them waiting."""
        error: BaseException | None = None
        result = None
        try:
            result = work()
        except Exception as e:
            error = e
        if self.any(error is not None):
            raise error or ElsewhereError(f"rank {self.process}: another rank failed: see its message")
        return result

    def shard(self, layers: nn.ModuleList) -> None:
        """Spreads the weights of frozen layers over the ranks: each is put together just before it computes.

        All ranks must call each layer equally often.
        """
        from torch.distributed.fsdp import fully_shard

        for layer in layers:
            fully_shard(layer, reshard_after_forward=True)

    @noted()
    def from_main(self, value: Any) -> Any:
        """Rank 0's value (JSON) on every rank."""
        if self.processes == 1:
            return value
        text = json.dumps(value).encode() if self.is_main else b""  # torch's own way for objects is pickle
        size = torch.tensor(len(text), device=self.device)
        dist.broadcast(size, src=0)
        data = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.is_main:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(data, src=0)
        return json.loads(bytes(data.tolist()))

    @noted(patient=True)
    def main_first(self, name: str, work: Callable[[], Any], shared: type[Exception]) -> Any:
        """Runs `work` on rank 0 and then, when it is done, on the others, which find its files ready.

        The others wait at the store, not in a collective, so that hours of preparation run into no time limit. An
        exception of the type `shared` on rank 0 is raised on all ranks; another one fails them.
        """
        if self.processes == 1:
            return work()
        if self.is_main:
            try:
                result = work()
            except BaseException as e:
                self.store.set(name, "shared" if isinstance(e, shared) else "failed")
                raise
            self.store.set(name, "done")
            return result
        while not self.store.check([name]):
            time.sleep(0.2)
        outcome = self.store.get(name)
        if outcome == b"shared":
            raise shared(f"rank 0 said so in '{name}'")
        if outcome != b"done":
            raise ElsewhereError(f"rank 0 failed in '{name}': see its message")
        return work()

    def at(self, step: int) -> None:
        """Notes which step this process works on."""
        if self.liveness is not None:
            self.liveness.step = step

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Around all that the ranks do together. Leaves the group at the end.

        Raises:
            MachineError: another rank was the cause of what this one failed of; it names that rank.
        """
        try:
            yield
        except Exception as e:
            verdict = self.liveness.blame(e) if self.liveness is not None else None
            if verdict is not None:
                raise MachineError(verdict) from e
            raise
        finally:
            self.close()

    def close(self) -> None:
        if self.liveness is not None:
            self.liveness.close()
        if self.processes > 1 and dist.is_initialized():
            dist.destroy_process_group()


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device a recipe asks for. Raises UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device: cuda, but no CUDA device is visible: set device: auto, or check the driver")
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{torch.cuda.device_count()} CUDA devices for local rank {local_rank}: start fewer processes per node"
            )
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device: mps, but it is not available: set device: auto")
    return torch.device(name)


def connect(
    device: str,
    timeout_s: float = 600.0,
    tensor: int = 1,
    limits: LivenessConfig | None = None,
    context: int = 1,
    experts: int = 1,
) -> Ranks:
    """Joins the process group that torchrun describes, or stays alone.

    Args:
        device: as in the recipe.
        timeout_s: how long a collective may wait before the job is ended.
        tensor: how many neighbouring processes compute each row together.
        limits: how long a process may show no sign of life; None: nobody looks.
        context: how many ranks share the positions of each row.
        experts: how many ranks hold each layer's experts together.

    Raises:
        UserError: the processes can't be grouped so.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    picked = pick_device(device, local_rank)
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    if world % tensor:
        raise UserError(
            f"parallel.tensor ({tensor}) does not divide the {world} process(es) that were started: start a multiple of it"
        )
    if world // tensor % context:
        together = f" of {tensor}" if tensor > 1 else ""
        raise UserError(
            f"parallel.context ({context}) does not divide the {world // tensor} rank(s){together} that were started: start "
            "a multiple of it"
        )
    if world // tensor % experts:
        raise UserError(
            f"parallel.experts ({experts}) does not divide the {world // tensor} rank(s) that were started: start a multiple "
            "of it"
        )
    if world == 1:
        return Ranks(device=picked)
    meeting = rendezvous("env://", rank, world, timeout=timedelta(seconds=timeout_s))
    store, rank, world = next(iter(meeting))
    # A torchrun that starts its ranks again keeps the store, with addresses and verdicts of the start before.
    store = PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if picked.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s))
    mesh = None
    if tensor > 1:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(picked.type, (world // tensor, tensor), mesh_dim_names=("data", "tensor"))
    context_group = _context_group(rank, world, tensor, context) if context > 1 else None
    liveness = None
    if limits is not None:  # on a connection of its own: who waits at the store must not hold up the sign of life
        liveness = Liveness(PrefixStore("alive", store.clone()), rank, world, local_rank, limits).start()  # type: ignore[attr-defined]
    ours = PrefixStore("llmkit", store)
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return Ranks(
        rank // tensor,
        world // tensor,
        local_rank,
        picked,
        ours,
        tensor,
        rank % tensor,
        mesh,
        liveness,
        per_node,
        context,
        context_group,
        experts,
    )


def _context_group(process: int, world: int, tensor: int, context: int) -> Any:
    """The process group of those that have the other positions of this one's rows, and the same heads."""
    found = None
    for first in range(0, world, tensor * context):
        for place in range(tensor):
            members = [first + place + tensor * i for i in range(context)]
            group = dist.new_group(members)  # all processes make all groups
            found = group if process in members else found
    return found
