"""Cost model: parameters, FLOPs, memory and disk of a run, from its shape alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from llmkit.config import UserError
from llmkit.model.config import GPTConfig, count_params

_PACKED_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of a weight in 4 bits: its share of a scale, and of the scale's scale
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
# Dense peak of the matrix units, TFLOP/s, from NVIDIA's data sheets (without sparsity); fp32 means TF32.
_GPU_PEAK_TFLOPS = {
    "B200": {"bf16": 2250, "fp16": 2250, "fp32": 1125},
    "H200": {"bf16": 989, "fp16": 989, "fp32": 494},
    "H100": {"bf16": 989, "fp16": 989, "fp32": 494},
    "A100": {"bf16": 312, "fp16": 312, "fp32": 156},
    "L40S": {"bf16": 362, "fp16": 362, "fp32": 183},
    "4090": {"bf16": 165, "fp16": 165, "fp32": 82},
}


@dataclass(frozen=True)
class Cost:
    """What a model costs. Memory in bytes, work in floating-point operations."""

    n_params: int
    n_embedding_params: int
    n_active_params: int
    flops_per_token: float
    state_bytes: int
    activation_bytes: int
    checkpoint_bytes: int
    n_trained_params: int

    @property
    def memory_bytes(self) -> int:
        return self.state_bytes + self.activation_bytes


def _seen(window: int | None, seq_len: int) -> float:
    """How many positions a token of a causal row attends to, on average."""
    seen = min(window or seq_len, seq_len)
    return seen - seen * seen / (2 * seq_len)


def flops_per_token(model: GPTConfig, seq_len: int) -> float:
    """Forward and backward: 6 per weight that a token is multiplied with, and 12 per position it attends to and width
    of the heads (PaLM, appendix B): half of them where attention is causal, fewer with a sliding window."""
    count = count_params(model)
    multiplied = count.active - count.embedding + (model.vocab_size or 0) * model.d_model
    full, windowed = _seen(None, seq_len) if model.causal else seq_len, _seen(model.sliding_window, seq_len)
    n_windowed = 0 if model.sliding_window is None else model.n_layers - model.n_full_layers
    attended = (model.n_layers - n_windowed) * full + n_windowed * windowed
    return 6 * multiplied + 12 * model.n_heads * model.width_of_head * attended


def cost_of(
    model: GPTConfig, *, seq_len: int, micro_tokens: int, precision: str, optimizer: str, loss_chunk: int,
    activation_checkpointing: bool, ema: bool, momentum: bool = False, n_frozen: int = 0, n_frozen_hidden: int = 0,
    n_adapter: int = 0, n_adapter_hidden: int = 0, n_packed: int = 0,
) -> Cost:  # fmt: skip
    """The cost of training one replica.

    Memory of the state is exact, but for AdamW's 4 bytes a tensor; that of activations counts the tensors autograd
    keeps per token and block in eager mode, and is right within a third in fp32. In bf16 on a CPU they are about
    twice the estimate, since norms and short attention keep fp32 copies there.

    Args:
        momentum: whether SGD has one.
        n_frozen: parameters that are not trained: they have neither gradient, nor master, average or moments.
        n_frozen_hidden: those of them that Muon would update.
        n_adapter: weights of adapters, which are trained beside the model's own; a checkpoint then holds what is trained.
        n_adapter_hidden: those of them that Muon would update.
        n_packed: weights of the model that are kept in 4 bits.
    """
    count = count_params(model)
    n_params = count.total + n_adapter
    n_trained = n_params - n_frozen
    width, wide = BYTES[precision], 8 if precision == "fp64" else 4
    # Muon has one moment for each weight of a hidden matrix, and AdamW's two for everything else.
    n_hidden = count.hidden - n_frozen_hidden + n_adapter_hidden
    moments = {"adamw": 2 * n_trained, "muon": 2 * n_trained - n_hidden, "sgd": n_trained * momentum}[optimizer]
    master = wide if width != wide else 0
    # Weights, master, average, optimizer.
    weights = n_params * width - n_packed * (width - _PACKED_BYTES)
    training = n_trained * (master + wide * ema) + wide * moments
    checkpoint = (n_trained * width if n_adapter else weights) + training
    state = weights + training + n_trained * wide  # and the gradient
    D, F, heads = model.d_model, model.width_of_mlp, (model.n_heads + 2 * model.kv_heads) * model.width_of_head
    gated = model.mlp == "swiglu"  # keeps gate, up, silu(gate) and their product; GPT-2's keeps up and gelu(up)
    block: float = (8 * D + 3 * heads + (4 if gated else 2) * F) * width  # bytes per token
    if (experts := model.experts) is not None:  # states once for each expert they visit, before it and after
        mixture = (8 * D + 3 * heads + 4 * experts.active_width + 2 * D * experts.n_active) * width + 8 * experts.n
        block += (mixture - block) * model.n_expert_layers / model.n_layers
    # With checkpointing: every block's input, and one block recomputed with its gradients (measured: 2.2 blocks).
    per_token = model.n_layers * D * width + 2.2 * block if activation_checkpointing else model.n_layers * block
    activations = micro_tokens * per_token + loss_chunk * (model.vocab_size or 0) * (width + 2 * wide)
    flops = flops_per_token(model, seq_len)
    active = count.active + n_adapter
    return Cost(
        n_params, count.embedding, active, flops, round(state), round(activations), round(checkpoint), n_trained
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on the GPU, or from the machine and its container. None: nobody tells."""
    if device.type == "cuda":
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


def require_memory(cost: Cost, device: torch.device) -> None:
    """Raises UserError, naming the figures, if weights, gradients and optimizer alone can't fit.

    Activations are estimates, so they don't count here: what is refused can't run.
    """
    free = free_memory(device)
    if free is not None and cost.state_bytes > free:
        raise UserError(
            f"model: {cost.n_params:,} parameters need {cost.state_bytes / 1e9:,.1f} GB for weights, gradients and "
            f"optimizer, but {free / 1e9:,.1f} GB of {device.type} memory are free: choose a smaller model, or "
            "precision: bf16"
        )


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that a utilisation is measured against: a GPU's data sheet; on a CPU a matrix product, measured now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next(
            (1e12 * p[precision] for key, p in _GPU_PEAK_TFLOPS.items() if key in name and precision in p), None
        )
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
