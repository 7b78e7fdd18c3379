"""What a recipe will cost, before anything runs: here, or on a cluster. Torch is imported only to ask this machine."""

from llmkit.model.config import count_params
from llmkit.plan.cost import BYTES, Cost, cost_of, flops_per_token
from llmkit.plan.machine import free_memory, peak_flops, require_memory

__all__ = [
    "BYTES",
    "Cost",
    "cost_of",
    "count_params",
    "flops_per_token",
    "free_memory",
    "peak_flops",
    "require_memory",
]
