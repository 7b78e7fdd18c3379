"""The cost model against what is there: parameters, counted operations, measured memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmkit.config import validate
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, causal_mask, window_of
from llmkit.model.rope import rope_tables
from llmkit.plan import BYTES, cost_of, count_params, flops_per_token, peak_flops
from llmkit.plan.cost import block_bytes
from llmkit.plan.here import Calibration
from llmkit.stages.recipes import PretrainRecipe
from llmkit.training.config import OptimConfig, RunConfig
from llmkit.training.engine import Engine
from llmkit.training.freeze import freeze
from llmkit.training.optim import hidden_matrices, tensor_bytes
from llmkit.training.setup import cost as cost_of_recipe

GPT2: dict[str, Any] = {
    "positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "qkv_bias": True, "o_bias": True, "mlp_bias": True,
}  # fmt: skip
SHAPES: list[dict[str, Any]] = [
    {},
    {"n_kv_heads": 1},
    {"n_kv_heads": 2, "head_dim": 6},
    {"head_dim": 32, "d_ff": 100},
    {"qkv_bias": True},
    {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "n_kv_heads": 2},
    {"qk_norm": True, "n_kv_heads": 2, "head_dim": 10},
    {"qk_norm": True, "qkv_bias": True, "o_bias": True},
    {"mlp_bias": True, "n_layers": 5},
    GPT2,
    {"causal": False, "n_kv_heads": 2},
    {"sliding_window": 9},
    {"sliding_window": 9, "qkv_bias": True, "n_full_layers": 1},
]


def shape(**options: Any) -> GPTConfig:
    return GPTConfig(**{"n_layers": 3, "n_heads": 4, "d_model": 32, "vocab_size": 101, **options})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_parameters(options: dict[str, Any], tied: bool) -> None:
    """Exactly those of the module."""
    config = shape(tie_embeddings=tied, **options)
    with torch.device("meta"):
        model = GPT(config)
    count, parameters = count_params(config), dict(model.named_parameters())
    assert count.total == sum(p.numel() for p in parameters.values())
    assert count.embedding == sum(p.numel() for n, p in parameters.items() if "embed_" in n or "lm_head" in n)
    assert count.hidden == sum(parameters[n].numel() for n in hidden_matrices(model))


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_flops(options: dict[str, Any]) -> None:
    """B25: a forward pass counted operation by operation, times three; of attention what the masks let through."""
    T = 64
    config = shape(d_model=64, vocab_size=300, max_seq_len=T, **options)
    model = GPT(config)
    ids = torch.zeros(2, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.logits(model(ids))
    windows = [window_of(config, layer) for layer in range(config.n_layers)]
    seen = [causal_mask(0, T, ids.device, w).sum().item() / T if config.causal else T for w in windows]
    masked = 4 * config.n_heads * config.width_of_head * sum(T - s for s in seen)
    counted = 3 * (counter.get_total_flops() / ids.numel() - masked)
    assert flops_per_token(config, T) == pytest.approx(counted, rel=0.02)


def cost(config: GPTConfig, **options: Any) -> Any:
    defaults = {
        "seq_len": 256, "micro_tokens": 2048, "precision": "fp32", "optimizer": "adamw", "loss_chunk": 256,
        "activation_checkpointing": False, "ema": False,
    }  # fmt: skip
    return cost_of(config, **{**defaults, **options})


@pytest.mark.parametrize("precision", BYTES)
@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize(("name", "momentum"), [("adamw", None), ("muon", None), ("sgd", None), ("sgd", 0.9)])
def test_state_is_exact(precision: str, ema: bool, name: str, momentum: float | None) -> None:
    """Weights, masters, gradient, moments and average of a real engine; what a checkpoint holds of them."""
    config = shape(tie_embeddings=False, qkv_bias=True)
    optim = OptimConfig(name=name, momentum=momentum, ema_decay=0.9 if ema else None)
    engine = Engine(GPT(config), RunConfig(out="unused", precision=precision, optim=optim))
    saved = sum(tensor_bytes(t.values()) for t in engine.tensors().values())
    counters = sum(4 for n in engine.optimizer.state_dict() if n.startswith("step."))
    expected = cost(config, precision=precision, optimizer=name, ema=ema, momentum=momentum is not None)
    assert expected.checkpoint_bytes == saved - counters
    assert expected.state_bytes == saved - counters + engine.flat_grad.numel() * engine.flat_grad.element_size()
    assert expected.memory_bytes == expected.state_bytes + expected.activation_bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_cost_their_weights_alone(precision: str, name: str) -> None:
    """No gradient, master, average or moment, as in a real engine."""
    config = shape(tie_embeddings=False)
    data = {
        "stage": "pretrain", "out": "unused", "data": {"path": "x"}, "model": json.loads(config.model_dump_json()),
        "precision": precision, "optim": {"name": name, "ema_decay": 0.9}, "freeze": ["embed_tokens", "layers.0"],
        "batch": {"tokens_per_step": config.max_seq_len},
    }  # fmt: skip
    recipe = validate(PretrainRecipe, data)
    module = GPT(config)
    freeze(module, recipe.freeze)
    engine = Engine(module, recipe)
    saved = sum(tensor_bytes(t.values()) for t in engine.tensors().values())
    counters = sum(4 for n in engine.optimizer.state_dict() if n.startswith("step."))
    expected = cost_of_recipe(recipe, config)
    assert expected.checkpoint_bytes == saved - counters
    assert expected.state_bytes == saved - counters + engine.flat_grad.numel() * engine.flat_grad.element_size()
    assert expected.state_bytes < 0.8 * cost(config, precision=precision, optimizer=name, ema=True).state_bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("length", [64, 640])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "n_kv_heads": 2}, GPT2], ids=str)
def test_what_autograd_keeps(options: dict[str, Any], length: int, precision: str) -> None:
    """Of a token in a block, counted by the hooks that see every tensor it keeps."""
    config = shape(d_model=64, max_seq_len=length, **options)
    model = GPT(config).to(torch.float32 if precision == "fp32" else torch.bfloat16)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # a tensor that lives keeps its address

    def keep(t: torch.Tensor) -> torch.Tensor:
        if (at := t.untyped_storage().data_ptr()) not in weights:
            kept[at] = t
        return t

    def total(n_layers: int) -> int:
        kept.clear()
        x_BTD = torch.randn(2, length, 64, dtype=model.head_weight.dtype, requires_grad=True)
        rope = None if config.positions == "learned" else rope_tables(config, torch.arange(length)[None])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            for block in list(model.model.layers)[:n_layers]:
                x_BTD, _ = block(x_BTD, rope, None, True, None)
        return sum(t.untyped_storage().nbytes() for t in kept.values())

    counted = (total(3) - total(1)) / 2 / (2 * length)
    assert block_bytes(config, length, precision) == pytest.approx(counted, rel=0.05)


MEASURE = """
import json, sys
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, init_weights
from llmkit.training.config import OptimConfig, RunConfig
from llmkit.training.engine import Engine
from llmkit.training.supervised import token_loss
from llmkit.data.loader import Batch
import torch

def hwm():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) << 10

options = json.loads(sys.argv[1])
def step(config, rows, T):
    model = GPT(config, options["activation_checkpointing"])
    init_weights(model, 0)
    engine = Engine(model, RunConfig(out="unused", precision=options["precision"]))
    ids = torch.zeros(rows, T, dtype=torch.int64)
    docs = torch.zeros(rows, T, dtype=torch.int32)
    batch = Batch(ids, ids, torch.arange(T).expand(rows, T), docs, float(ids.numel()), float(ids.numel()))
    engine.update([batch], token_loss(0.0, 256))

small = GPTConfig(n_layers=1, n_heads=1, d_model=8, vocab_size=8)
step(small, 1, 8)  # everything is loaded
before = hwm()
step(GPTConfig(**options["model"]), options["rows"], options["T"])
print(hwm() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(("checkpointing", "family"), [(False, {}), (True, {}), (False, GPT2)])
def test_memory_is_right_within_a_third(checkpointing: bool, family: dict[str, Any]) -> None:
    """The peak of a process that makes one update, against the estimate with what every process needs."""
    model = {"n_layers": 4, "n_heads": 4, "d_model": 256, "vocab_size": 4096, **family}
    options = {"model": model, "rows": 16, "T": 256, "precision": "fp32", "activation_checkpointing": checkpointing}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(options)], capture_output=True, text=True, timeout=100, check=True
    )
    estimate = cost(GPTConfig(**model), micro_tokens=16 * 256, activation_checkpointing=checkpointing)
    usual = Calibration()
    told = estimate.state_bytes + usual.activations * estimate.activation_bytes + usual.base_bytes
    assert int(done.stdout) / told == pytest.approx(1.0, abs=1 / 3)


def test_peak_flops() -> None:
    """A CPU's is measured; where there is no data sheet, there is no figure."""
    measured = peak_flops(torch.device("cpu"), "fp32")
    assert measured is not None and 1e8 < measured < 1e14
    assert peak_flops(torch.device("mps"), "fp32") is None
