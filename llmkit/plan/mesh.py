"""How a job lies on many GPUs: what each holds in each phase, and which meshes there are. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from llmkit.model.config import GPTConfig, count_params
from llmkit.plan.cost import BYTES, activation_bytes
from llmkit.plan.gpus import Gpu
from llmkit.plan.job import Job, Net

Shard = Literal["none", "full", "hybrid"]
_RUNTIME = 2.5e9  # CUDA's context, NCCL's and cuBLAS's buffers
_HOLES = 1.08  # what the caching allocator loses between blocks of changing sizes
USABLE = 0.95  # of a GPU's memory: the driver's share, and what a person needs to sleep


@dataclass(frozen=True)
class Cluster:
    """Nodes of one kind."""

    gpu: Gpu
    nodes: int
    per_node: int
    network_gb_per_s: float
    """Of one GPU, one way."""

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    def __str__(self) -> str:
        nodes = f"{self.nodes:,} node{'s' if self.nodes > 1 else ''} of {self.per_node}"
        network = f", {self.network_gb_per_s:g} GB/s a GPU between nodes" if self.nodes > 1 else ""
        return f"{nodes} {self.gpu.name} ({self.gpu.memory_gb:g} GB){network}"


@dataclass(frozen=True)
class Mesh:
    """Which ranks hold what: `tensor` ranks split every matrix, `shards` groups of those split weights and optimizer,
    `context` of them the positions of a row, and `experts` of them every layer's experts."""

    world: int
    shard: Shard = "none"
    tensor: int = 1
    replicas: int = 1
    """hybrid: groups of ranks that each hold everything."""
    context: int = 1
    experts: int = 1
    offload: bool = False
    """Shares lie in main memory."""

    @property
    def data(self) -> int:
        """Ranks with different rows."""
        return self.world // (self.tensor * self.context)

    @property
    def shards(self) -> int:
        """Into how many parts the state is cut, beside the cut by `tensor`."""
        most = self.world // self.tensor
        return {"none": 1, "full": most, "hybrid": most // self.replicas}[self.shard]

    @property
    def copies(self) -> int:
        """How often the whole state is held."""
        return self.world // self.tensor // self.shards

    @property
    def members(self) -> int:
        """Ranks that hold one whole model together."""
        return max(self.shards * self.tensor, self.experts)

    def __str__(self) -> str:
        said = [f"parallel.shard={self.shard}"]
        said += [f"parallel.replicas={self.replicas}"] if self.shard == "hybrid" else []
        said += [f"parallel.tensor={self.tensor}"] if self.tensor > 1 else []
        said += [f"parallel.context={self.context}"] if self.context > 1 else []
        said += [f"parallel.experts={self.experts}"] if self.experts > 1 else []
        said += ["parallel.offload=true"] if self.offload else []
        return " ".join(said)


Memory = dict[str, dict[str, float]]  # phase -> part -> bytes on one rank


def params_of(net: Net, mesh: Mesh) -> tuple[float, float]:
    """Parameters that one rank computes with, before shares: of all but the experts, where embeddings and head are whole on
    each, and of its experts."""
    experts = count_params(net.model).experts
    hidden = net.cost.n_params - net.cost.n_embedding_params - experts
    return hidden / mesh.tensor + net.cost.n_embedding_params, experts / (mesh.tensor * mesh.experts)


def share_of(net: Net, mesh: Mesh) -> float:
    """What one rank keeps of a trained network: of its experts' share others with the same have shares in turn."""
    rest, experts = params_of(net, mesh)
    return (rest / mesh.shards + experts * mesh.experts / max(mesh.shards, mesh.experts)) / net.cost.n_params


def state_of(net: Net, mesh: Mesh) -> dict[str, float]:
    """What one rank keeps of a network throughout, part by part, in bytes."""
    if not net.trained:  # every rank has one of its own
        return {f"{net.role}: weights": net.cost.weight_bytes}
    share = share_of(net, mesh)
    rest = net.cost.state_bytes - net.cost.weight_bytes - net.cost.gradient_bytes
    weights = net.cost.weight_bytes
    if mesh.shards > 1 and BYTES[net.precision] < 4:
        # Shares of what is trained are fp32 and the masters themselves; what is computed with is made of them for a moment.
        weights -= net.cost.n_trained_params * BYTES[net.precision]
    return {
        f"{net.role}: weights": share * weights,
        f"{net.role}: gradient": share * net.cost.gradient_bytes,
        f"{net.role}: optimizer, masters": share * rest,
    }


def gathered_bytes(net: Net, mesh: Mesh) -> float:
    """Whole weights that a rank holds for a moment: two blocks, and embeddings and head throughout a step."""
    if mesh.shards == 1 and not mesh.offload:
        return 0.0
    width = BYTES[net.precision]
    rest, experts = params_of(net, mesh)
    block = (rest - net.cost.n_embedding_params + experts) / net.model.n_layers
    gradient = 4 * block * net.cost.n_trained_params / net.cost.n_params  # it goes out in fp32
    return 2 * block * width + gradient + net.cost.n_embedding_params * width


def memory_of(job: Job, mesh: Mesh) -> Memory:
    """What one rank holds in each phase, part by part, in bytes."""
    held: dict[str, float] = {"runtime": _RUNTIME}
    for net in job.nets:
        held |= {} if net.trained and mesh.offload else state_of(net, mesh)
    tokens = job.micro_rows(mesh.data) * -(-job.row_len // mesh.context)
    activations = sum(  # an actor's and its critic's are there together: they have one loss
        activation_bytes(
            net.model, job.row_len, tokens, net.precision, job.loss_chunk, job.recompute, "cuda", mesh.tensor
        )
        for net in job.trained
    )
    whole = sum(gathered_bytes(net, mesh) for net in job.trained)
    update = {"activations": _HOLES * activations, "whole weights for a moment": whole}
    phases: Memory = {"update": {**held, **update}}
    for written in (p for p in job.passes if p.kind == "write"):
        copied = sum(net.cost.n_params * BYTES[net.precision] for net in job.trained) if mesh.members > 1 else 0.0
        phases["answers"] = {**held, "whole copy": copied, "cache": float(job.cache_bytes(written))}
    return phases


def host_bytes(job: Job, mesh: Mesh) -> float:
    """Main memory that a rank's networks take before its GPU has them, in bytes: networks in parts are drawn or read one
    tensor at a time, others are whole at first, in fp32."""
    if mesh.shards * mesh.tensor == 1:
        return 4.0 * sum(net.cost.n_params for net in job.nets)
    widest = max(
        net.model.d_model * max(net.model.vocab_size or 0, net.model.width_of_mlp, net.model.d_model)
        for net in job.nets
    )
    return 2 * 4.0 * widest  # as it is read, and in another precision or with more rows


def offloaded_bytes(job: Job, mesh: Mesh) -> float:
    """Main memory that a rank's shares take throughout, in bytes."""
    return sum(sum(state_of(net, mesh).values()) for net in job.trained) if mesh.offload else 0.0


def peak_of(memory: Memory) -> tuple[str, float]:
    """The phase that needs most, and its bytes."""
    return max(((phase, sum(parts.values())) for phase, parts in memory.items()), key=lambda found: found[1])


def fits(job: Job, mesh: Mesh, cluster: Cluster) -> bool:
    """Whether every phase finds room on a GPU."""
    return peak_of(memory_of(job, mesh))[1] <= USABLE * 1e9 * cluster.gpu.memory_gb


def splits(model: GPTConfig, n: int) -> bool:
    """Whether matrices can be cut into n by heads and by columns of the MLP."""
    return not (model.n_heads % n or model.kv_heads % n or model.width_of_mlp % n)


def objection(job: Job, mesh: Mesh) -> str | None:
    """Why a mesh is impossible, whatever the memory; None if it isn't."""
    if mesh.world % mesh.tensor:
        return f"parallel.tensor ({mesh.tensor}) does not divide the {mesh.world} GPUs"
    if mesh.offload and mesh.world == 1:
        return "parallel.offload=true on one GPU: shares are of several: take more, or set parallel.offload=false"
    if mesh.context > 1 and (why := _uncut(job, mesh)):
        return why
    if mesh.experts > 1 and (why := _unshared(job, mesh)):
        return why
    if mesh.members > 1 and job.packed:
        return f"{mesh}: a base in 4 bits is not cut up: drop lora.quantize"
    for net in job.trained:
        if mesh.tensor > 1 and net.model.experts is not None:
            return f"parallel.tensor ({mesh.tensor}): experts are not split by width"
        if not splits(net.model, mesh.tensor):
            heads = f"{net.model.n_heads} heads, {net.model.kv_heads} for keys and values, MLP {net.model.width_of_mlp}"
            return f"parallel.tensor ({mesh.tensor}) does not divide the {net.role}'s sizes ({heads})"
    if mesh.data > job.rows:
        return (
            f"{mesh.data:,} ranks with different data, but a step has {job.rows:,} rows: raise batch.tokens_per_step or "
            "parallel.tensor or parallel.context, or take fewer GPUs"
        )
    if job.rows % mesh.data:
        return f"{job.rows:,} rows of a step can't be shared out evenly over {mesh.data:,} ranks with different data"
    if mesh.shard == "hybrid" and (mesh.replicas < 1 or (mesh.world // mesh.tensor) % mesh.replicas):
        return f"parallel.replicas ({mesh.replicas}) does not divide the {mesh.world // mesh.tensor} ranks with shares"
    return None


def _uncut(job: Job, mesh: Mesh) -> str | None:
    """Why the positions of a row can't be shared."""
    n, ranks = mesh.context, mesh.world // mesh.tensor
    if ranks % n:
        return f"parallel.context ({n}) does not divide the {ranks} ranks"
    if job.compiled:
        return f"parallel.context ({n}) can't be compiled: set compile=false"
    return None


def _unshared(job: Job, mesh: Mesh) -> str | None:
    """Why a layer's experts can't be held together by so many ranks."""
    n, ranks = mesh.experts, mesh.world // mesh.tensor
    if ranks % n:
        return f"parallel.experts ({n}) does not divide the {ranks} ranks"
    if mesh.shards > 1 and mesh.shards % n:
        return f"parallel.experts ({n}) does not divide the {mesh.shards} ranks that share a model"
    counts = {net.role: net.model.experts.n for net in job.trained if net.model.experts is not None}
    if not counts:
        return f"parallel.experts ({n}): the model has no experts"
    odd = [(role, count) for role, count in counts.items() if count % n]
    return f"parallel.experts ({n}) does not divide the {odd[0][0]}'s {odd[0][1]} experts of a layer" if odd else None


def meshes(job: Job, cluster: Cluster) -> Iterator[Mesh]:
    """Every mesh that makes sense: matrices are split, and experts held together, inside a node only."""
    for mesh in _without_experts(cluster):
        yield mesh
        if mesh.tensor == 1 and any(net.model.experts is not None for net in job.trained):
            yield from (replace(mesh, experts=n) for n in (2, 4, 8, 16) if cluster.per_node % n == 0)


def _without_experts(cluster: Cluster) -> Iterator[Mesh]:
    tensors = [n for n in (1, 2, 4, 8, 16) if n <= cluster.per_node and cluster.per_node % n == 0]
    for tensor in tensors:
        mesh = Mesh(cluster.world, tensor=tensor)
        yield mesh
        if mesh.data > 1:
            yield replace(mesh, shard="full")
        in_node, replicas = cluster.per_node // tensor, 2
        while mesh.data // replicas >= max(2, in_node):  # a group that shards fills a node at least
            if mesh.data % replicas == 0:
                yield replace(mesh, shard="hybrid", replicas=replicas)
            replicas *= 2


def easier(job: Job) -> Iterator[tuple[Job, str]]:
    """The job, and the same with settings that fit more meshes or less memory, each with the keys that say so."""
    yield job, ""
    said = ""
    if not job.recompute:
        job, said = replace(job, recompute=True), f"{said} activation_checkpointing=true".strip()
        yield job, said
    usual = job.micro_rows
    for most in (4, 2, 1):
        if most < usual(1):
            yield (
                replace(job, micro_rows=_at_most(most, usual)),
                f"{said} batch.micro_tokens={most * job.row_len}".strip(),
            )


def _at_most(most: int, usual: Callable[[int], int]) -> Callable[[int], int]:
    return lambda n_data: min(most, usual(n_data))
