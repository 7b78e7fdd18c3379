"""Optimizers against torch's and NumPy's, who decays and who doesn't, and tables of learning rates."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import tiny_gpt

from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT
from llmkit.training.config import OptimConfig
from llmkit.training.optim import Optimizer, decayed_names, hidden_matrices, learning_rate, orthogonalize

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}


class Net(nn.Module):
    """One parameter of every kind: embedding, hidden matrix, norm, bias, head."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hidden = nn.Embedding(7, 4), nn.Linear(4, 6)
        self.norm, self.lm_head = nn.RMSNorm(6), nn.Linear(6, 7, bias=False)
        self.to(dtype)


def gradients(weights: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """Noise whose size differs a thousandfold from tensor to tensor and falls with the step."""
    g = torch.Generator().manual_seed(step)
    draw = lambda w: torch.randn(w.shape, generator=g, dtype=torch.float64)  # noqa: E731
    return {n: (draw(w) * 10.0 ** (i % 4 - 3) / (1 + step)).to(w.dtype) for i, (n, w) in enumerate(weights.items())}


def build(dtype: torch.dtype, **options: Any) -> tuple[Net, dict[str, Tensor], Optimizer]:
    net = Net(dtype)
    weights = {n: p.detach() for n, p in net.named_parameters()}
    return net, weights, Optimizer(OptimConfig(**options), weights, net)


def torch_groups(net: nn.Module, decay: float) -> list[dict[str, Any]]:
    names = decayed_names(net)
    return [
        {"params": [p for n, p in net.named_parameters() if (n in names) is decayed], "weight_decay": decay * decayed}
        for decayed in (True, False)
    ]


def compare(
    ours: Optimizer, weights: dict[str, Tensor], net: nn.Module, theirs: Any, bound: float, steps: int = 50
) -> None:
    """Both see the same gradients at a rate that changes; their weights stay within `bound` at every step."""
    for k in range(steps):
        grads, lr = gradients(weights, k), 1e-2 * (1 + math.cos(k / 10)) / 2
        for n, p in net.named_parameters():
            p.grad = grads[n].clone()
        for group in theirs.param_groups:
            group["lr"] = lr
        ours.step(grads, lr)
        theirs.step()
        for n, p in net.named_parameters():
            torch.testing.assert_close(
                weights[n], p.detach(), rtol=bound, atol=bound, msg=lambda m, n=n, k=k: f"{n}, {k}: {m}"
            )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_adamw_is_torchs(dtype: torch.dtype, bound: float) -> None:
    """B17: 50 steps."""
    _, weights, ours = build(dtype, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    net = Net(dtype)
    theirs = torch.optim.AdamW(torch_groups(net, 0.3), betas=(0.8, 0.95), eps=1e-6, foreach=False)
    compare(ours, weights, net, theirs, bound)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_adamw_is_the_papers(dtype: torch.dtype, bound: float) -> None:
    """B17: Loshchilov & Hutter, arXiv 1711.05101, algorithm 2, in NumPy."""
    net, weights, ours = build(dtype, betas=(0.9, 0.99), weight_decay=0.1)
    w = {n: t.double().numpy().copy() for n, t in weights.items()}
    m, v = ({n: np.zeros_like(a) for n, a in w.items()} for _ in "mv")
    for k in range(1, 51):
        grads = gradients(weights, k)
        ours.step(grads, 3e-3)
        for n in w:
            g = grads[n].double().numpy()
            m[n] = 0.9 * m[n] + 0.1 * g
            v[n] = 0.99 * v[n] + 0.01 * g**2
            w[n] *= 1 - 3e-3 * 0.1 * (n in decayed_names(net))
            w[n] -= 3e-3 * (m[n] / (1 - 0.9**k)) / (np.sqrt(v[n] / (1 - 0.99**k)) + 1e-8)
    for n in w:
        np.testing.assert_allclose(weights[n].double().numpy(), w[n], rtol=bound, atol=bound)
    assert all(t.item() == 50 for t in ours.state["step"].values())


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_sgd(momentum: float | None, decay: float) -> None:
    """torch's, where it has the same: its own decay goes through the momentum, ours is decoupled (SGDW)."""
    _, weights, ours = build(torch.float64, name="sgd", momentum=momentum, weight_decay=decay)
    net = Net(torch.float64)
    if not decay or momentum is None:
        compare(ours, weights, net, torch.optim.SGD(torch_groups(net, decay), lr=1.0, momentum=momentum or 0.0), 1e-14)
        assert ("momentum" in ours.state) is (momentum is not None)
        return
    w = {n: t.numpy().copy() for n, t in weights.items()}
    buffer = {n: np.zeros_like(a) for n, a in w.items()}
    for k in range(20):
        grads = gradients(weights, k)
        ours.step(grads, 0.05)
        for n in w:
            buffer[n] = momentum * buffer[n] + grads[n].numpy()
            w[n] = w[n] * (1 - 0.05 * decay * (n in decayed_names(net))) - 0.05 * buffer[n]
    for n in w:
        np.testing.assert_allclose(weights[n].numpy(), w[n], rtol=1e-13)


# --- Muon ------------------------------------------------------------------------------------------------------------


def test_muon_is_torchs() -> None:
    """Hidden matrices as torch.optim.Muon, within the noise of its bf16 iteration; everything else as AdamW."""
    sizes = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "tie_embeddings": False}
    ours_net, theirs_net = tiny_gpt(**sizes), tiny_gpt(**sizes)
    weights = {n: p.detach() for n, p in ours_net.named_parameters()}
    start = {n: w.clone() for n, w in weights.items()}
    ours = Optimizer(OptimConfig(name="muon", weight_decay=0.2), weights, ours_net)
    hidden = hidden_matrices(ours_net)
    muon = torch.optim.Muon(
        [p for n, p in theirs_net.named_parameters() if n in hidden],
        weight_decay=0.2, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    rest = [(n, p) for n, p in theirs_net.named_parameters() if n not in hidden]
    adam = torch.optim.AdamW(
        [
            {"params": [p for n, p in rest if (n == "lm_head.weight") is d], "weight_decay": 0.2 * d}
            for d in (True, False)
        ],
        betas=(0.9, 0.95),
    )
    for k in range(10):
        grads = gradients(weights, k)
        for n, p in theirs_net.named_parameters():
            p.grad = grads[n].clone()
        for group in [*muon.param_groups, *adam.param_groups]:
            group["lr"] = 1e-2
        ours.step(grads, 1e-2), muon.step(), adam.step()
    for n, p in theirs_net.named_parameters():
        moved = (p.detach() - start[n]).norm()
        assert (weights[n] - p.detach()).norm() <= (0.01 if n in hidden else 1e-5) * moved, n


def test_muon_groups() -> None:
    """B15: q, k and v apart, each whole; embeddings, head, norms and biases are AdamW's, at the same rate."""
    net = tiny_gpt(n_layers=1, tie_embeddings=False, qkv_bias=True)
    optimizer = Optimizer(
        OptimConfig(name="muon", weight_decay=0.2), {n: p.detach() for n, p in net.named_parameters()}, net
    )
    layer = "model.layers.0."
    attention = [f"{layer}self_attn.{x}_proj" for x in "qkvo"]
    mlp = [f"{layer}mlp.{x}_proj" for x in ("gate", "up", "down")]
    norms = [f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight", "model.norm.weight"]
    groups = {name: (set(names), decay) for name, (names, decay) in optimizer.groups.items() if names}
    assert groups == {
        "muon": ({f"{m}.weight" for m in attention + mlp}, 0.2),
        "adamw/decay": ({"lm_head.weight"}, 0.2),
        "adamw": ({"model.embed_tokens.weight", *norms, *(f"{m}.bias" for m in attention[:3])}, 0.0),
    }
    assert set(optimizer.state["momentum"]) == groups["muon"][0]
    assert set(optimizer.state["exp_avg"]) == groups["adamw"][0] | {"lm_head.weight"}


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 64), (2, 64, 16)])
def test_orthogonalize(shape: tuple[int, ...]) -> None:
    """All singular values come near 1, the singular vectors stay: the update has no preferred direction."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = orthogonalize(x).float()
    values = torch.linalg.svdvals(out)
    # Newton-Schulz with these coefficients leaves values in about [0.7, 1.2]; tiny ones of a square matrix stay lower.
    assert values.max() < 1.25 and values[:, : -(-3 * values.shape[1] // 4)].min() > 0.6
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    inner = (u.mT @ out @ v.mT).diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(inner.sum(-1), values.sum(-1), rtol=0.02)
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4, dtype=torch.bfloat16))


def test_muon_leaves_what_has_no_gradient() -> None:
    """An expert that no token visits is not moved by its old momentum; the others of its shape move as without it."""
    torch.manual_seed(0)
    nets = [nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2)) for _ in "ab"]
    nets[1].load_state_dict(nets[0].state_dict())
    weights = [{n: p.detach() for n, p in net.named_parameters()} for net in nets]
    optimizers = [
        Optimizer(OptimConfig(name="muon", weight_decay=0.0), w, net) for w, net in zip(weights, nets, strict=True)
    ]
    grads = {n: torch.randn(8, 8) for n in weights[0]}
    for optimizer in optimizers:
        optimizer.step(grads, 1e-2)
    before = weights[0]["0.weight"].clone()
    optimizers[0].step({"0.weight": torch.zeros(8, 8), "1.weight": grads["1.weight"]}, 1e-2)
    optimizers[1].step(grads, 1e-2)
    assert torch.equal(weights[0]["0.weight"], before)
    assert torch.equal(weights[0]["1.weight"], weights[1]["1.weight"])


def test_muon_update_has_adamws_size() -> None:
    """0.2 sqrt(max(A, B)) times an orthogonal matrix has entries of about 0.2 in the root mean square."""
    net = tiny_gpt(d_ff=96)
    weights = {n: p.detach() for n, p in net.named_parameters()}
    start = {n: w.clone() for n, w in weights.items()}
    Optimizer(OptimConfig(name="muon", weight_decay=0.0), weights, net).step(gradients(weights, 0), 1.0)
    for n in hidden_matrices(net):
        assert 0.13 < (weights[n] - start[n]).square().mean().sqrt() < 0.25, n


# --- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_parameter_in_one_group(shape: str, tied: bool, name: str) -> None:
    """B14: exactly once; decay on the linear layers' matrices and an untied head, and on nothing else."""
    config = GPTConfig(n_layers=2, n_heads=2, d_model=16, vocab_size=64, tie_embeddings=tied, **SHAPES[shape])
    net = GPT(config)
    weights = {n: p.detach() for n, p in net.named_parameters()}
    optimizer = Optimizer(OptimConfig(name=name, weight_decay=0.2), weights, net)
    listed = [n for names, _ in optimizer.groups.values() for n in names]
    assert sorted(listed) == sorted(weights)
    for names, decay in optimizer.groups.values():
        for n in names:
            linear = n.endswith("_proj.weight") or n == "lm_head.weight"
            assert decay == (0.2 if linear else 0.0), n
            assert weights[n].dim() == 2 or decay == 0.0


def test_decay_shrinks_and_nothing_else_moves() -> None:
    """With zero gradients only the decayed weights change, by lr * decay."""
    for name in ("adamw", "sgd", "muon"):
        _, weights, optimizer = build(torch.float64, name=name, weight_decay=0.5)
        start = {n: w.clone() for n, w in weights.items()}
        optimizer.step({n: torch.zeros_like(w) for n, w in weights.items()}, 0.1)
        for n, w in weights.items():
            torch.testing.assert_close(w, start[n] * (0.95 if n in {"hidden.weight", "lm_head.weight"} else 1.0))


def test_frozen_parameters_are_left_out() -> None:
    """The optimizer knows only what it is given."""
    net = Net(torch.float64)
    weights = {n: p.detach() for n, p in net.named_parameters() if n != "lm_head.weight"}
    optimizer = Optimizer(OptimConfig(), weights, net)
    assert not any("lm_head" in n for n in optimizer.state_dict())
    optimizer.step(gradients(weights, 0), 0.1)


# --- learning rate ---------------------------------------------------------------------------------------------------

GOLDEN = {  # peak 1, ten steps of which two warm up, floor 0.1
    "constant": ({}, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    "linear": ({}, [0.5, 1, 1, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125]),
    "cosine": ({}, [0.5, 1, 1, 0.965746, 0.868198, 0.722208, 0.55, 0.377792, 0.231802, 0.134254]),
    "wsd": (
        {"decay_frac": 0.4, "decay_shape": "linear"},
        [0.5, 1, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325],
    ),
    "wsd sqrt": (
        {"decay_frac": 0.4, "decay_shape": "sqrt"},
        [0.5, 1, 1, 1, 1, 1, 1, 0.55, 0.363604, 0.220577],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_schedule_tables(name: str) -> None:
    """B18: every step of every schedule, the last included; the floor would be reached one step later."""
    options, table = GOLDEN[name]
    config = OptimConfig(lr=1.0, schedule=name.split()[0], warmup_steps=2, min_lr_frac=0.1, **options)
    assert [learning_rate(config, k, 10) for k in range(10)] == pytest.approx(table, abs=1e-6)
    assert learning_rate(config, 10, 10) == pytest.approx(1.0 if name == "constant" else 0.1)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_schedule_edges(schedule: str) -> None:
    """B18: a run of one step trains at the peak; a warm-up as long as the run, or longer, only rises."""
    at = lambda step, total, **options: learning_rate(OptimConfig(lr=2.0, schedule=schedule, **options), step, total)  # noqa: E731
    assert at(0, 1) == 2.0
    assert [at(k, 4, warmup_steps=4) for k in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert [at(k, 4, warmup_steps=8) for k in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert at(99, 100, warmup_frac=1.0) == 2.0
    assert at(0, 5, warmup_steps=0) == 2.0
    assert at(0, 1000) == pytest.approx(0.2)  # the default: a hundredth of the run
    rates = [at(k, 50, min_lr_frac=0.0) for k in range(50)]
    assert all(a >= b for a, b in itertools.pairwise(rates)) and min(rates) > 0


def test_wsd_that_decays_throughout() -> None:
    """decay_frac 1 with a warm-up: the warm-up wins as long as it lasts."""
    config = OptimConfig(lr=1.0, schedule="wsd", warmup_steps=2, decay_frac=1.0, decay_shape="linear", min_lr_frac=0.0)
    assert [learning_rate(config, k, 5) for k in range(5)] == pytest.approx([0.5, 1.0, 0.6, 0.4, 0.2])


def test_rate_of_zero() -> None:
    assert learning_rate(OptimConfig(lr=0.0), 3, 10) == 0.0
