"""Data sheets of GPUs: what a plan and a utilisation are measured against. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.config import UserError

_HALF = ("bf16", "fp16")


@dataclass(frozen=True)
class Gpu:
    """One GPU as its maker describes it, and the links of the servers it is usually sold in. Rates are one way."""

    name: str
    half_tflops: float
    """Dense peak of the matrix units in bf16 and fp16, without sparsity."""
    tf32_tflops: float
    """The same in TF32, which is what fp32 products run in here."""
    memory_gb: float
    """Of 10^9 bytes."""
    memory_gb_per_s: float
    """Of the GPU's own memory."""
    link_gb_per_s: float
    """Between GPUs of a node: NVLink, or PCIe where there is none."""
    network_gb_per_s: float
    """Between nodes, for each GPU: its share of the node's adapters."""
    product_frac: float
    """Share of the peak that large products reach for hours: newer ones are held back by their power limit."""
    attention_frac: float
    """The same of fused attention as PyTorch has it."""
    per_node: int = 8
    """GPUs of one node."""

    def peak_flops(self, precision: str) -> float | None:
        """FLOP/s; None where the maker tells nothing, as in fp64."""
        if precision in _HALF:
            return 1e12 * self.half_tflops
        return 1e12 * self.tf32_tflops if precision == "fp32" else None


# NVIDIA's data sheets; networks as in its own servers (DGX: one 400 Gbit/s adapter a GPU, A100: 200), elsewhere 100 Gbit/s
# for a node's four or eight. The two shares of A100 and H100 are set so that speeds published for Llama 3 come out
# (tests/test_plan_cluster.py); the others' are theirs.
GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu("B200", 2250, 1125, 180, 8000, 900, 50, 0.58, 0.38),
        Gpu("H200", 989, 494, 141, 4800, 450, 50, 0.6, 0.38),
        Gpu("H100", 989, 494, 80, 3350, 450, 50, 0.58, 0.38),
        Gpu("A100", 312, 156, 80, 2039, 300, 25, 0.7, 0.42),
        Gpu("L40S", 362, 183, 48, 864, 32, 3.1, 0.58, 0.38, per_node=4),
        Gpu("4090", 165, 82, 24, 1008, 32, 1.6, 0.7, 0.42),
    )
}


def find_gpu(name: str) -> Gpu:
    """The data sheet a person means. Raises UserError for one that isn't there."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise UserError(f"--gpu {name}: its data sheet isn't known here: choose one of {', '.join(GPUS)}")
    return gpu


def recognised(device_name: str) -> Gpu | None:
    """The data sheet of a device as its driver calls it: "NVIDIA H100 80GB HBM3"."""
    return next((gpu for gpu in GPUS.values() if gpu.name in device_name), None)
