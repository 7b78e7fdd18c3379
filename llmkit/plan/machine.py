"""What this machine has: free memory, and the peak that a utilisation is measured against."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.config import UserError
from llmkit.plan.cost import Cost
from llmkit.plan.gpus import recognised

if TYPE_CHECKING:
    import torch


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on the GPU, or from the machine and its container. None: nobody tells."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        told = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        free = 1024 * int(told["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None
    try:  # a container's limit (cgroup 2); "max" is none
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text("ascii"))
        return min(free, max(0, int((group / "memory.max").read_text("ascii")) - used))
    except (OSError, ValueError):
        return free


def require_memory(cost: Cost, device: torch.device, n_parts: int = 1) -> None:
    """Raises UserError, naming the figures, if weights, gradients and optimizer alone can't fit.

    Activations are estimates, so they don't count here: what is refused can't run. `n_parts`: ranks that share them.
    """
    free, needed = free_memory(device), cost.state_bytes / n_parts
    if free is not None and needed > free:
        shared = f", in {n_parts} parts" if n_parts > 1 else ""
        raise UserError(
            f"model: {cost.n_params:,} parameters need {needed / 1e9:,.1f} GB for weights, gradients and "
            f"optimizer{shared}, but {free / 1e9:,.1f} GB of {device.type} memory are free: choose a smaller model, or "
            "precision: bf16"
        )


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that a utilisation is measured against: a GPU's data sheet; on a CPU a matrix product, measured now."""
    import torch

    if device.type == "cuda":
        gpu = recognised(torch.cuda.get_device_name(device))
        return None if gpu is None else gpu.peak_flops(precision)
    if device.type != "cpu":
        return None
    n, dtype = 1024, torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.ones(n, n, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
