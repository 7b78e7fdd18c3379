"""`llmkit plan --gpu`: a job on a cluster, line by line, and the meshes that would do. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llmkit.config import UserError
from llmkit.plan.clock import Clock, Step
from llmkit.plan.job import Job
from llmkit.plan.mesh import (
    USABLE,
    Cluster,
    Memory,
    Mesh,
    easier,
    fits,
    host_bytes,
    memory_of,
    meshes,
    objection,
    offloaded_bytes,
    peak_of,
)

_DAY = 86400.0
_SHOWN = 5  # meshes in the table
_WORTH = 0.97  # a mesh is suggested from this share of the time on


@dataclass(frozen=True)
class Found:
    """A mesh that would do, and the keys that have to change for it."""

    job: Job
    mesh: Mesh
    keys: str
    step: Step

    def __str__(self) -> str:
        return f"{self.mesh} {self.keys}".strip()


def suggestions(job: Job, cluster: Cluster) -> list[Found]:
    """Meshes on which the job fits, the fastest first; where none does as it stands, with settings that need less."""
    for setting, keys in easier(job):
        found = [
            Found(setting, mesh, keys, Clock(setting, mesh, cluster).step())
            for mesh in meshes(setting, cluster)
            if objection(setting, mesh) is None and fits(setting, mesh, cluster)
        ]
        if found:
            return sorted(found, key=lambda f: f.step.total)
    return []


def describe(job: Job, wanted: Mesh, cluster: Cluster) -> Iterator[str]:
    """What each GPU would hold and do.

    Args:
        job: the recipe's.
        wanted: what its `parallel` says on this cluster.
        cluster: where.

    Raises:
        UserError: when all is said, if that is impossible or doesn't fit, with the numbers and what would.
    """
    if cluster.gpu.peak_flops(job.precision) is None:
        raise UserError(f"precision: {job.precision} is not what a {cluster.gpu.name} is made for: set precision: bf16")
    yield f"cluster      {cluster}: {cluster.world:,} GPUs"
    better = suggestions(job, cluster)
    why = objection(job, wanted)
    if why is None:
        memory = memory_of(job, wanted)
        phase, peak = peak_of(memory)
        room = USABLE * 1e9 * cluster.gpu.memory_gb
        if peak > room:
            why = (
                f"{wanted}: {peak / 1e9:,.1f} GB a GPU in the phase '{phase}', of {cluster.gpu.memory_gb:g} GB "
                f"({room / 1e9:,.1f} usable)"
            )
        yield from _memory_lines(job, wanted, memory, cluster)
        if peak <= room:
            yield from _time_lines(job, wanted, Clock(job, wanted, cluster).step(), cluster)
    if better:
        yield "meshes       the fastest that fit:"
        yield from _table(better[:_SHOWN])
        if why is None and better[0].step.total < _WORTH * Clock(job, wanted, cluster).step().total:
            yield f"suggested    {better[0]}"
    for note in job.notes:
        yield f"assumed      {note}"
    if why is not None:
        raise UserError(f"{why}; {_remedy(job, better, cluster)}")


def _remedy(job: Job, better: list[Found], cluster: Cluster) -> str:
    """What would do."""
    if better:
        return f"what would do: {better[0]}"
    nodes = cluster.nodes
    while nodes < 4096:
        nodes *= 2
        found = suggestions(job, replace(cluster, nodes=nodes))
        if found:
            return f"nothing fits on {cluster.world:,} of them: take {nodes:,} nodes with {found[0]}"
    return f"nothing fits on any number of nodes of {cluster.per_node} {cluster.gpu.name}: take larger GPUs or a smaller model"


def _memory_lines(job: Job, mesh: Mesh, memory: Memory, cluster: Cluster) -> Iterator[str]:
    n_micro = mesh.data * job.micro_rows(mesh.data)
    yield (
        f"mesh         {mesh}: {mesh.data:,} x {mesh.context * mesh.tensor} ranks, the state in "
        f"{mesh.shards * mesh.tensor:,} parts"
        + (f", {mesh.copies:,} copies" if mesh.copies > 1 else "")
        + (f"; a layer's experts on {mesh.experts} ranks together" if mesh.experts > 1 else "")
    )
    yield (
        f"step         {job.rows:,} rows of {job.row_len:,}; {job.micro_rows(mesh.data)} row(s) a forward pass on a rank, "
        f"{-(-job.rows // n_micro)} of them"
    )
    for phase, parts in memory.items():
        told = ", ".join(f"{name} {n / 1e9:.1f}" for name, n in parts.items() if n >= 5e7)
        yield f"memory       {sum(parts.values()) / 1e9:6.1f} GB a GPU in the phase '{phase}': {told}"
    shares = cluster.per_node * offloaded_bytes(job, mesh) / 1e9
    yield (
        f"host         {cluster.per_node * host_bytes(job, mesh) / 1e9:,.0f} GB of main memory a node at the start, "
        f"{job.checkpoint_bytes / cluster.nodes / 1e9:,.1f} later to save from"
        + (f", {shares:,.0f} for shares throughout" if mesh.offload else "")
    )
    yield (
        f"checkpoint   {job.checkpoint_bytes / 1e9:,.1f} GB each, {job.kept_checkpoints} kept: "
        f"{job.checkpoint_bytes * job.kept_checkpoints / 1e9:,.0f} GB of disk"
    )


def _time_lines(job: Job, mesh: Mesh, step: Step, cluster: Cluster) -> Iterator[str]:
    per_day = job.tokens_per_step / step.total * _DAY
    shares = ", ".join(f"{name} {s:.3g} s" for name, s in step.seconds.items() if s >= 0.005 * step.total)
    sent = ", ".join(f"{why} {n / 1e9:,.1f} GB" for why, n in step.messages.items())
    yield f"messages     {sent or 'none'} sent by a rank in a step"
    yield f"time         {duration(step.total)} a step ({shares}); MFU {100 * step.mfu:.0f} %"
    yield (
        f"             {per_day / 1e9:,.2f} billion tokens a day; {job.steps:,} steps take {duration(job.steps * step.total)} "
        f"({job.steps * step.total / 3600 * cluster.world:,.0f} GPU hours)"
    )


def duration(seconds: float) -> str:
    """In a unit that a person would take."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 2 * _DAY else f"{seconds / _DAY:,.1f} days"


def _table(found: list[Found]) -> Iterator[str]:
    rows = [("", "GB a GPU", "s a step", "MFU", "messages")]
    for f in found:
        _, peak = peak_of(memory_of(f.job, f.mesh))
        messages = 100 * f.step.seconds.get("messages", 0.0) / f.step.total
        rows.append(
            (str(f), f"{peak / 1e9:.1f}", f"{f.step.total:.3g}", f"{100 * f.step.mfu:.0f} %", f"{messages:.0f} %")
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield f"  {row[0].ljust(widths[0])}  " + "  ".join(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))
