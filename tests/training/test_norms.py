"""What a run tells of its gradients: norms by layer against torch, the noise scale against a closed form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from reliability import assert_same, read_jsonl, tiny_recipe, train
from torch import nn
from toys import Points, linear, points, recipe, regression, tiny_gpt

from llmkit.config import UserError
from llmkit.losses import LossSum
from llmkit.training.config import LogConfig, RunConfig
from llmkit.training.dist import Ranks
from llmkit.training.engine import Engine
from llmkit.training.norms import NoiseScale, layers_of


def watching(config: RunConfig, **log: Any) -> RunConfig:
    return config.model_copy(update={"log": LogConfig(**log)})


# --- norms -----------------------------------------------------------------------------------------------------------


def test_layers() -> None:
    names = [n for n, _ in tiny_gpt(n_layers=11, tie_embeddings=False).named_parameters()]
    assert list(layers_of(names)) == ["embed_tokens", *(f"layers.{i}" for i in range(11)), "norm", "lm_head"]
    assert sum(map(len, layers_of(names).values())) == len(names)
    assert list(layers_of(["weight", "score.weight", "a.b.3.c.1.weight"])) == ["weight", "score", "a.b.3"]


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_norms_are_torchs(precision: str) -> None:
    """Before the clip, of the masters, every second step only; the update is what the optimizer did."""
    module = nn.Sequential(linear(4, 4, seed=1), linear(4, 3, seed=2))
    engine = Engine(module, watching(recipe(precision, lr=0.05, clip=0.01), norms_every=2))
    data = points(dtype=torch.float64 if precision == "fp64" else torch.bfloat16)
    engine.update([data], regression)
    assert engine.watched == {}
    before = {n: t.clone() for n, t in engine.masters.items()}
    norm = engine.update([data, data], regression)["grad_norm"]
    told = engine.watched
    assert set(told) == {f"norms/{i}/{k}" for i in (0, 1) for k in ("grad", "weight", "update_ratio")}
    for i in (0, 1):
        names = [f"{i}.weight", f"{i}.bias"]
        old, new = (torch.cat([t[n].flatten() for n in names]) for t in (before, engine.masters))
        grad = torch.cat([engine.grads[n].flatten() for n in names])  # clipped by now
        assert told[f"norms/{i}/weight"] == pytest.approx(old.norm().item(), rel=1e-6)
        assert told[f"norms/{i}/update_ratio"] == pytest.approx(((new - old).norm() / old.norm()).item(), rel=1e-5)
        assert told[f"norms/{i}/grad"] == pytest.approx(grad.norm().item() * norm / 0.01, rel=1e-6)
    assert math.hypot(told["norms/0/grad"], told["norms/1/grad"]) == pytest.approx(norm, rel=1e-6)


# --- the noise scale -------------------------------------------------------------------------------------------------

INPUTS, SIGMA = 6, 0.5
DELTA = torch.tensor([0.3, -0.2, 0.5, 0.0, 0.1, -0.4], dtype=torch.float64)


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(DELTA.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w[:, None]


def noisy_points(n: int, generator: torch.Generator) -> Points:
    """x normal, y = noise: with w = DELTA the gradient of a sample is x (x.DELTA - noise)."""
    x = torch.randn(n, INPUTS, generator=generator, dtype=torch.float64)
    return Points(x, SIGMA * torch.randn(n, 1, generator=generator, dtype=torch.float64))


def estimate(steps: int) -> dict[str, float]:
    """The last estimate of a weight that stays where it is, on micro-batches of 1 to 15 samples."""
    config = watching(recipe(name="sgd", lr=0.0, weight_decay=0.0, steps=steps), gradient_noise=True)
    engine = Engine(Weight(), config)
    engine.noise = NoiseScale(Ranks(), decay=1 - 1 / steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        engine.update([noisy_points(n, generator) for n in (1, 6, 2, 15)], regression)
    return engine.watched


def test_noise_scale_of_a_linear_regression() -> None:
    """E g = delta, Cov g = (|delta|^2 + sigma^2) I + delta delta^T: the estimate goes there, whatever the micro-batches.

    The plain mean of |G_i|^2, without the weights n_i / N, would be off by half.
    """
    square = DELTA.square().sum().item()
    trace = INPUTS * (square + SIGMA**2) + square
    told = estimate(1000)
    assert told["noise/trace"] == pytest.approx(trace, rel=0.06)
    assert told["noise/grad_square"] == pytest.approx(square, rel=0.08)
    assert told["noise/scale_tokens"] == pytest.approx(trace / square, rel=0.1)


def test_the_formula_by_hand() -> None:
    """Two micro-batches of 1 and 3 tokens whose token gradients are (1, 0) and (0, 2)."""
    noise = NoiseScale(Ranks())
    batches = [points(1), points(3)]
    scale = 1 / 4  # of the loss: the mean over 4 tokens
    noise.begin(batches)
    noise.see(torch.tensor([1.0, 0.0]) * scale)
    noise.end_micro(1)
    noise.see(torch.tensor([0.0]) * scale), noise.see(torch.tensor([6.0]) * scale)
    noise.end_micro(3)
    whole = (1 / 4) ** 2 + (6 / 4) ** 2
    told = noise.update(4, whole, scale)
    trace = ((1 * 1 + 3 * 4) / 4 - whole) * 4 / (2 - 1)
    assert told["noise/trace"] == pytest.approx(trace, rel=1e-6)
    assert told["noise/grad_square"] == pytest.approx(whole - trace / 4, rel=1e-6)
    assert "noise/scale_tokens" not in told or whole > trace / 4


def test_precision_and_scale_make_no_difference() -> None:
    """bf16 gradients are summed in fp32; the scale of fp16 is taken out."""
    told = {}
    for precision, dtype in (("fp64", torch.float64), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        data = [Points(p.x.to(dtype), p.y.to(dtype)) for p in (points(3, seed=1), points(9, seed=2), points(4, seed=3))]
        engine = Engine(linear(), watching(recipe(precision), gradient_noise=True))
        engine.loss_scale = 2.0**8 if precision == "fp16" else 1.0
        engine.update(data, regression)
        told[precision] = engine.watched
    for precision, error in (("bf16", 0.05), ("fp16", 0.01)):
        assert told[precision]["noise/trace"] == pytest.approx(told["fp64"]["noise/trace"], rel=error)


def test_one_micro_batch_has_no_noise() -> None:
    engine = Engine(linear(), watching(recipe(), gradient_noise=True))
    with pytest.raises(
        UserError, match=r"^log.gradient_noise compares the micro-batches of a step, and there is one: "
    ):
        engine.update([points(), points(0)], regression)
    engine = Engine(linear(), watching(recipe(), gradient_noise=True))
    engine.update([points(), points()], regression)
    engine.update([points(), points(0)], regression)  # a masked micro-batch later on is no error
    assert engine.watched == {}


def test_off_is_off() -> None:
    engine = Engine(linear(), recipe())
    engine.update([points(), points()], lambda m, b: LossSum(regression(m, b).total, {"loss": torch.zeros(())}))
    assert engine.noise is None and engine.watched == {} and engine.state()["noise"] is None


def test_a_run_and_its_resume(tmp_path: Path) -> None:
    """In metrics.jsonl under their own names; smoothed numbers go on where they were: bitwise as never stopped."""
    changes = {"steps": 12, "log": {"norms_every": 5, "gradient_noise": True}}
    for name, stops in (("a", ()), ("b", (7,))):
        path = tiny_recipe(tmp_path, out=str(tmp_path / name), **changes)
        for stop in stops:
            assert train(path, f"stop_at={stop}") == 0
        assert train(path) == 0
    lines = [r for r in read_jsonl(tmp_path / "a" / "metrics.jsonl") if "train/loss" in r]
    assert [r["step"] for r in lines if "norms/layers.1/update_ratio" in r] == [5, 10]
    assert all("noise/trace" in r for r in lines)
    assert_same(tmp_path / "b", tmp_path / "a")
