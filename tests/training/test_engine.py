"""One optimizer step: what it optimises, what it refuses, what it gives back."""

from __future__ import annotations

import gc
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import (
    Points,
    largest_difference,
    linear,
    points,
    recipe,
    regression,
    rows,
    same_bits,
    snapshot,
    tiny_gpt,
    uneven_documents,
    write_shards,
)

from llmkit.config import UserError
from llmkit.data.loader import RowLoader
from llmkit.data.shards import TokenShards
from llmkit.losses import LossSum
from llmkit.training.dist import Ranks
from llmkit.training.engine import Engine, NonFinite, seed_of
from llmkit.training.supervised import token_loss

LOSS = token_loss(z_loss=1e-3, chunk=24)


@pytest.fixture
def shards(tmp_path: Path) -> TokenShards:
    return write_shards(tmp_path / "shards", uneven_documents())


def run(engine: Engine, loader: RowLoader, steps: int) -> list[dict[str, float]]:
    return [engine.update(loader.step(engine.step), LOSS) for _ in range(steps)]


# --- what is optimised -----------------------------------------------------------------------------------------------


def test_batch_is_really_uneven(shards: TokenShards) -> None:
    """The tests below would pass on a mean of means if every row held as many labels."""
    counts = [[b.denominator for b in rows(shards, micro_rows=1).step(k)] for k in range(3)]
    assert all(max(c) - min(c) >= 3 for c in counts) and min(map(min, counts)) < 12


@pytest.mark.parametrize("micro_rows", [1, 2, 4])
def test_accumulation_changes_nothing(shards: TokenShards, micro_rows: int) -> None:
    """B1, B2, B4, B9: 1 x 8 == 8 x 1 == 4 x 2 == 2 x 4 rows of uneven documents, loss with z term, clipped, EMA."""
    options = {"clip": 0.5, "ema_decay": 0.9, "lr": 1e-2}
    one, many = (Engine(tiny_gpt(), recipe(**options)) for _ in "ab")
    expected, got = run(one, rows(shards), 4), run(many, rows(shards, micro_rows=micro_rows), 4)
    for a, b in zip(expected, got, strict=True):
        assert a == pytest.approx(b, rel=1e-12)
        assert a["grad_norm"] > 0.5  # so that the clip is at work
    assert largest_difference(snapshot(one), snapshot(many)) <= 1e-12


def test_accumulation_fp32(shards: TokenShards) -> None:
    """B1 at working precision."""
    one, many = (Engine(tiny_gpt(), recipe("fp32", name="sgd", lr=0.1)) for _ in "ab")
    run(one, rows(shards), 2), run(many, rows(shards, micro_rows=1), 2)
    assert largest_difference(snapshot(one), snapshot(many)) <= 1e-5


def test_loss_is_the_mean_over_all_labels(shards: TokenShards) -> None:
    """B5: brute force over single rows."""
    model, batches = tiny_gpt().double(), rows(shards, micro_rows=2).step(0)
    nats, count = 0.0, 0
    for batch in batches:
        for ids, positions, labels, docs in zip(
            batch.ids_BT, batch.positions_BT, batch.labels_BT, batch.docs_BT, strict=True
        ):
            for doc in docs[docs >= 0].unique():
                here = docs == doc
                logits = model.logits(model(ids[here][None], positions[here][None]))[0]
                nats += F.cross_entropy(logits, labels[here], reduction="sum").item()
                count += int((labels[here] != -100).sum())
    metrics = Engine(model, recipe()).update(batches, LOSS)
    assert metrics["denominator"] == count
    assert metrics["loss"] == pytest.approx(nats / count, rel=1e-12)


def test_two_steps_by_hand() -> None:
    """B10: gradients of one step never reach the next. Least squares with SGD in NumPy, two micro-batches a step."""
    module, data = linear(), [points(3, seed=1), points(5, seed=2)]
    x, y = (np.concatenate([getattr(p, k).numpy() for p in data]) for k in "xy")
    w, b = module.weight.detach().numpy().copy(), module.bias.detach().numpy().copy()
    engine = Engine(module, recipe(name="sgd", lr=0.05, weight_decay=0.0, clip=None))
    for _ in range(2):
        engine.update(data, regression)
        error = x @ w.T + b - y
        w, b = w - 0.05 * error.T @ x / 8, b - 0.05 * error.sum(0) / 8
        np.testing.assert_allclose(module.weight.detach().numpy(), w, rtol=1e-13)
        np.testing.assert_allclose(module.bias.detach().numpy(), b, rtol=1e-13)


@pytest.mark.parametrize("clip", [0.03, 1e6])
def test_clip_is_of_the_whole_gradient(clip: float) -> None:
    """B9: the norm is that of the whole step, before the clip, as torch has it; the clip scales all tensors alike."""
    data, plain = [points(2, seed=s) for s in range(4)], linear()
    module = linear()
    start = {n: p.detach().clone() for n, p in module.named_parameters()}
    for p in data:
        (regression(plain, p).total / 8).backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip).item()
    metrics = Engine(module, recipe(name="sgd", lr=1.0, weight_decay=0.0, clip=clip)).update(data, regression)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-13)
    for n, p in plain.named_parameters():
        torch.testing.assert_close(
            start[n] - p.grad, module.get_parameter(n).detach(), rtol=0, atol=2e-6 * min(clip, norm)
        )
    moved = math.sqrt(sum((p.detach() - start[n]).square().sum().item() for n, p in module.named_parameters()))
    assert moved == pytest.approx(min(clip, norm), rel=1e-12)


def test_frozen_and_unreached_parameters() -> None:
    """A frozen tensor has no gradient, no moments, no average; one that a step doesn't reach has gradient zero."""

    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.frozen = linear(seed=1), linear(seed=2), linear(seed=3).requires_grad_(False)
            self.use_b = True

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.frozen(x) + (self.b(x) if self.use_b else 0)

    module = Switch()
    frozen = module.frozen.weight.clone()
    engine = Engine(module, recipe(name="sgd", lr=0.1, weight_decay=0.0, ema_decay=0.9))
    engine.update([points()], regression)
    b = module.b.weight.detach().clone()
    module.use_b = False
    engine.update([points()], regression)
    assert not engine.grads["b.weight"].any() and engine.grads["a.weight"].any()
    assert torch.equal(module.b.weight, b) and torch.equal(module.frozen.weight, frozen)
    for names in (engine.grads, engine.ema, engine.masters):
        assert set(names) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert "frozen.weight" in engine.tensors()["model.safetensors"]


def test_packed_equals_unpacked(tmp_path: Path) -> None:
    """B31, D4: where documents fill rows exactly, packed rows and one document a row are the same step."""
    rng = np.random.default_rng(0)
    # Each row of 16 inputs holds documents of 5, 3 and 8 tokens; the stream's last label is the only one cut off.
    documents = [rng.integers(3, 64, n).tolist() for _ in range(8) for n in (5, 3, 8)] + [[7]]
    shards = write_shards(tmp_path / "s", documents)
    packed = rows(shards, rows_per_step=8)
    separate = rows(shards, rows_per_step=25, packing=False)
    engines = [Engine(tiny_gpt(), recipe(name="sgd", lr=0.1, clip=None)) for _ in "ab"]
    metrics = [run(e, loader, 1)[0] for e, loader in zip(engines, (packed, separate), strict=True)]
    assert metrics[0]["denominator"] == 8 * (4 + 2 + 7)
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-10)
    assert largest_difference(engines[0].grads, engines[1].grads) <= 1e-10


def test_documents_of_a_row_are_apart(tmp_path: Path) -> None:
    """B31: gradient(row of A and B) - gradient(B alone) does not change with what B says."""
    rng = np.random.default_rng(1)
    a = rng.integers(3, 64, 7).tolist()
    only_a = []
    for seed in (2, 3):
        b = np.random.default_rng(seed).integers(3, 64, 9).tolist()
        grads = []
        for name, documents in (("both", [a, b, [5]]), ("b", [b, [5]])):
            loader = rows(write_shards(tmp_path / f"{name}{seed}", documents), rows_per_step=1)
            engine = Engine(tiny_gpt(), recipe(clip=None))
            scale = engine.update(loader.step(0), LOSS)["denominator"]
            grads.append({n: g * scale for n, g in engine.grads.items()})
        only_a.append({n: grads[0][n] - grads[1][n] for n in grads[0]})
    assert largest_difference(*only_a) <= 1e-10
    assert max(g.abs().max() for g in only_a[0].values()) > 1e-2


# --- what is refused -------------------------------------------------------------------------------------------------


def spoil(where: str, value: float, module: nn.Module) -> Any:
    """A loss function with one bad number: in the loss, or in one tensor's gradient, of the second micro-batch."""
    calls = 0

    def loss(module: nn.Module, batch: Points) -> LossSum:
        nonlocal calls
        calls += 1
        out = regression(module, batch)
        return (
            LossSum(out.total * value, {"loss": out.total.detach() * value}) if where == "loss" and calls == 2 else out
        )

    def bad(grad: Tensor) -> Tensor:
        grad = grad.clone()
        if calls == 2:
            grad.view(-1)[-1] = value
        return grad

    if where != "loss":
        module.get_parameter(where).register_hook(bad)
    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "bias", "weight"])
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_non_finite_stops_before_the_update(value: float, where: str, precision: str) -> None:
    """B11, D8: nothing has changed, the tensor is named, the batch is handed over."""
    module, dtype = linear(), {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    engine = Engine(module, recipe(precision, ema_decay=0.9))
    data = [points(seed=s, dtype=dtype) for s in range(3)]
    engine.update(data, regression)
    before, state = snapshot(engine), engine.state()
    with pytest.raises(NonFinite, match=r"^step 2: ") as e:
        engine.update(data, spoil(where, value, module))
    assert same_bits(before, snapshot(engine)) and engine.state() == state
    if where != "loss":
        assert e.value.tensors == [where] and f"in {where}" in str(e.value)
    assert list(e.value.batches) == data
    assert all(math.isfinite(v) for v in engine.update(data, regression).values())  # and nothing of it stays behind


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(UserError, match="step 1: no position of the batch is trained on"):
        Engine(linear(), recipe()).update([points(0)], regression)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_refused_update_changes_nothing(name: str) -> None:
    """`accept` sees the reduced metrics; False leaves weights, optimizer and average as they are."""
    engine = Engine(linear(), recipe(name=name, ema_decay=0.5, momentum=0.9))
    engine.update([points()], regression)
    before, seen = snapshot(engine), []
    metrics = engine.update([points()], regression, accept=lambda m: seen.append(m) or False)
    assert same_bits(before, snapshot(engine))
    assert seen == [metrics] and metrics["loss"] > 0 and metrics["grad_norm"] > 0
    engine.update([points()], regression, accept=lambda m: True)
    assert not same_bits(before, snapshot(engine))


# --- evaluation and averages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [False, True])
def test_ema(warmup: bool) -> None:
    """B17: ema = d ema + (1 - d) weights after each of 50 updates, from the initial weights on; d = 0.9, warmed up.

    The closed form: the weights after update k count (1 - d_k) times the product of all later d.
    """
    engine = Engine(linear(), recipe(lr=0.1, ema_decay=0.9, ema_warmup=warmup))
    seen = [{n: p.numpy().copy() for n, p in engine.masters.items()}]
    for k in range(50):
        engine.update([points(seed=k)], regression)
        seen.append({n: p.numpy().copy() for n, p in engine.masters.items()})
    decays = [0.0] + [min(0.9, (1 + k) / (10 + k)) if warmup else 0.9 for k in range(50)]
    shares = [(1 - d) * math.prod(decays[k + 1 :]) for k, d in enumerate(decays)]
    assert sum(shares) == pytest.approx(1) and decays[1] == (0.1 if warmup else 0.9)
    expected = {n: sum(s * w[n] for s, w in zip(shares, seen, strict=True)) for n in engine.masters}
    for n, average in engine.ema.items():
        np.testing.assert_allclose(average.numpy(), expected[n], rtol=1e-12)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("weights", ["model", "ema"])
def test_evaluating_puts_everything_back(precision: str, weights: str) -> None:
    """B20: evaluation mode, no gradients and the chosen weights inside; afterwards, also after an error, as before."""
    engine = Engine(tiny_gpt(dropout=0.5), recipe(precision, weights=weights, ema_decay=0.5, lr=0.1))
    ids = torch.arange(12)[None]
    batch = TokenBatch(ids, torch.roll(ids, -1, 1))
    engine.update([batch], TokenBatch.loss)
    before = snapshot(engine)
    for training in (True, False):
        engine.module.train(training)
        with pytest.raises(KeyError), engine.evaluating() as module:
            assert not module.training and not torch.is_grad_enabled()
            shown = engine.ema if weights == "ema" else engine.masters
            assert all(torch.equal(p, shown[n].to(p.dtype)) for n, p in module.named_parameters())
            assert torch.equal(module(ids), module(ids))  # dropout 0.5
            raise KeyError
        assert engine.module.training is training and torch.is_grad_enabled()
        assert same_bits(before, snapshot(engine))


class TokenBatch:
    """Ids and labels without documents."""

    def __init__(self, ids: Tensor, labels: Tensor):
        self.ids, self.labels = ids, labels
        self.denominator = float(labels.numel())

    def to(self, device: torch.device) -> TokenBatch:
        return self

    @staticmethod
    def loss(module: Any, batch: TokenBatch) -> LossSum:
        logits = module.logits(module(batch.ids))
        total = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
        return LossSum(total, {"loss": total.detach()})


# --- randomness ------------------------------------------------------------------------------------------------------


class Noise(nn.Module):
    """Records the dropout it draws."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        self.drawn: list[tuple[float, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        kept = F.dropout(torch.ones(16), 0.5, self.training)
        self.drawn.append(tuple(kept.tolist()))
        return self.w.expand(len(x), 3) * kept[:3]


def noise(seed: int = 0, rank: int = 0, steps: int = 3, from_step: int = 0) -> list[tuple[float, ...]]:
    engine = Engine(Noise(), recipe(seed=seed), Ranks(rank=rank))
    engine.step = from_step
    torch.manual_seed(from_step + 1)  # whatever was drawn before must not matter
    for _ in range(steps - from_step):
        engine.update([points(2), points(3)], regression)
    return engine.module.drawn


def test_dropout_is_a_function_of_where_it_is() -> None:
    """Of (seed, step, micro-batch, rank), so that a resumed run draws what it would have drawn: promise 2."""
    drawn = noise()
    assert drawn == noise() and len(set(drawn)) == 6
    assert noise(from_step=2) == drawn[4:]
    assert not {*noise(seed=1), *noise(rank=1)} & set(drawn)


def test_seeds() -> None:
    """Pinned: another function would silently change every run's order, dropout and samples."""
    assert seed_of(0, "dropout", 1, 2, 3) == 5655521331460689962
    assert min(seed_of(i) for i in range(1000)) >= 0 and max(seed_of(i) for i in range(1000)) < 2**63


def test_activation_checkpointing_keeps_dropout(shards: TokenShards) -> None:
    """B21: the second forward pass draws what the first drew: the same gradient at dropout 0.1, to the bit."""
    engines = [Engine(tiny_gpt(activation_checkpointing=on, dropout=0.1), recipe()) for on in (False, True)]
    for engine in engines:
        engine.update(rows(shards, micro_rows=4).step(0), LOSS)
    assert same_bits(engines[0].grads, engines[1].grads)
    dry = Engine(tiny_gpt(), recipe())
    dry.update(rows(shards, micro_rows=4).step(0), LOSS)
    assert largest_difference(dry.grads, engines[0].grads) > 1e-3


# --- precision -------------------------------------------------------------------------------------------------------


def test_bf16_moves_as_many_weights(shards: TokenShards) -> None:
    """B16: 100 steps at lr 1e-5, where most bf16 weights alone would never move: the fp32 masters do."""
    moved = {}
    for precision in ("fp32", "bf16"):
        engine = Engine(tiny_gpt(), recipe(precision, lr=1e-5))
        start = {n: t.clone() for n, t in engine.masters.items()}
        run(engine, rows(shards, rows_per_step=1), 100)
        moved[precision] = sum((t != start[n]).sum().item() for n, t in engine.masters.items())
        shown = sum((p.float() != start[n].to(p.dtype)).sum().item() for n, p in engine.module.named_parameters())
        assert all(torch.equal(p, engine.masters[n].to(p.dtype)) for n, p in engine.module.named_parameters())
    assert moved["bf16"] >= 0.99 * moved["fp32"]
    assert shown < 0.7 * moved["bf16"]  # what the bf16 copies show of it: without masters the rest would be lost


def test_bf16_learns_what_fp32_learns(shards: TokenShards) -> None:
    losses = [
        run(Engine(tiny_gpt(), recipe(p, lr=1e-2)), rows(shards, rows_per_step=2), 30)[-1]["loss"]
        for p in ("fp32", "bf16")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_fp16_loss_scale() -> None:
    """An overflow halves the scale and skips; 2000 good updates double it; the update itself knows no scale."""
    half = points(seed=1, dtype=torch.float16)
    engine, plain = (Engine(linear(), recipe(p, name="sgd", lr=0.1, clip=0.5)) for p in ("fp16", "fp32"))
    assert engine.loss_scale == 2.0**16
    engine.loss_scale = 2.0**12
    metrics = engine.update([half], regression)
    expected = plain.update([Points(half.x.float(), half.y.float())], regression)
    assert metrics["loss_scale"] == 2.0**12 and metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
    assert largest_difference(engine.masters, plain.masters) <= 1e-3

    before, big = snapshot(engine), Points(half.x * 20, half.y)  # the loss is finite, its scaled gradient is not
    metrics = engine.update([big], regression)
    assert metrics["overflow"] == 1.0 and metrics["loss_scale"] == 2.0**11 and math.isfinite(metrics["loss"])
    assert same_bits(before, snapshot(engine))
    assert engine.step == 2 and engine.good_steps == 0

    engine.good_steps = 1999
    assert engine.update([half], regression)["loss_scale"] == 2.0**12
    engine.good_steps, engine.loss_scale = 1999, 2.0**24
    engine.update([half], lambda module, batch: LossSum(module(batch.x).float().sum() * 0, {"loss": torch.zeros(())}))
    assert engine.loss_scale == 2.0**24


def test_fp16_gives_up() -> None:
    """A gradient that overflows unscaled, or a loss that is not finite, is an error as in any other precision."""
    data = [points(dtype=torch.float16)] * 2
    engine = Engine(linear(), recipe("fp16"))
    engine.loss_scale = 1.0
    with pytest.raises(NonFinite, match="grad_norm inf in bias"):
        engine.update(data, spoil("bias", math.inf, engine.module))
    engine = Engine(linear(), recipe("fp16"))
    with pytest.raises(NonFinite, match="loss nan"):
        engine.update(data, spoil("loss", math.nan, engine.module))


def test_large_gradients_have_a_norm() -> None:
    """Many equal entries: a naive fp32 sum of squares would stop growing at 2**24 of them."""
    module = nn.Module()
    module.w = nn.Parameter(torch.zeros(20_000_000))
    engine = Engine(module, recipe("fp32", name="sgd", lr=0.0, weight_decay=0.0))
    out = engine.update([points(1)], lambda m, b: LossSum(m.w.sum(), {"loss": m.w.detach().sum()}))
    assert out["grad_norm"] == pytest.approx(math.sqrt(20_000_000), rel=1e-5)


# --- memory and compilation ------------------------------------------------------------------------------------------


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_metrics_hold_no_graph(shards: TokenShards) -> None:
    """B24: 500 steps whose metrics are kept grow memory by less than 1 MB per 100."""
    engine, loader = Engine(tiny_gpt(), recipe("fp32")), rows(shards, rows_per_step=2, micro_rows=1)
    kept = run(engine, loader, 100)
    gc.collect()
    before = resident_mb()
    kept += run(engine, loader, 500)
    gc.collect()
    assert all(type(v) is float for m in kept for v in m.values())
    assert resident_mb() - before <= 5


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compile_equals_eager(shards: TokenShards) -> None:
    """B22: loss and gradient of the compiled module, in fp32 and with masks."""
    plain, compiled = tiny_gpt(n_layers=1), tiny_gpt(n_layers=1)
    compiled.compile()
    engines = [Engine(m, recipe("fp32", name="sgd", lr=0.1)) for m in (plain, compiled)]
    a, b = (run(e, rows(shards), 2) for e in engines)
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=1e-5)
    assert largest_difference(snapshot(engines[0]), snapshot(engines[1])) <= 1e-5


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_round_trip(shards: TokenShards, name: str, precision: str) -> None:
    """Promise 2: an engine that is given the state goes on bitwise as the one it came from; dropout on."""
    config = recipe(precision, name=name, momentum=0.9, ema_decay=0.9, schedule="cosine")
    loader = rows(shards, micro_rows=4)
    first = Engine(tiny_gpt(dropout=0.1), config)
    run(first, loader, 3)
    saved = {file: {n: t.clone() for n, t in tensors.items()} for file, tensors in first.tensors().items()}
    state = first.state()
    expected = run(first, loader, 3)
    second = Engine(tiny_gpt(seed=9, dropout=0.1), config)
    second.load(saved, state)
    assert run(second, loader, 3) == expected
    assert same_bits(snapshot(first), snapshot(second))


def _other(**changes: Any) -> dict[str, dict[str, Tensor]]:
    shape = changes.pop("shape", {})
    return Engine(tiny_gpt(**shape), recipe("fp32", **changes)).tensors()


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (lambda: _other(shape={"d_ff": 40}), r"gate_proj.weight: \(40, 32\) is saved, \(48, 32\) is expected"),
        (lambda: _other(shape={"n_layers": 3}), r"layers.2.*is saved, nothing is expected"),
        (lambda: _other(shape={"tie_embeddings": False}), r"lm_head.weight: \(64, 32\) is saved, nothing is expected"),
        (lambda: _other(name="sgd"), r"optimizer.*nothing is saved"),
        (lambda: _other(ema_decay=0.9), r"ema.safetensors: in the checkpoint only"),
    ],
)
def test_other_state_is_refused(saved: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(tiny_gpt(), recipe("fp32")).load(saved(), {"step": 1, "loss_scale": 1.0, "good_steps": 1})


class Tied(nn.Module):
    """One weight under two names, a frozen one, a buffer that is saved and one that is not."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.a, self.b, self.still = linear(4, 4, seed), linear(4, 4, seed + 1), linear(4, 4, seed + 2)
        self.b.weight = self.a.weight
        self.still.requires_grad_(False)
        self.register_buffer("count", torch.full((3,), seed, dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.still(self.b(self.a(x)))


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_buffers_and_tied_weights_are_saved_once_and_loaded(precision: str) -> None:
    """B65: under the first name; the module's own buffers come back, what it says not to save doesn't."""
    data = points(outputs=4, dtype=torch.float64 if precision == "fp64" else torch.bfloat16)
    first, second = (Engine(Tied(seed), recipe(precision, lr=0.1, ema_decay=0.9)) for seed in (0, 5))
    for _ in range(2):
        first.update([data], regression)
    model = first.tensors()["model.safetensors"]
    assert list(model) == ["count", "a.weight", "a.bias", "b.bias", "still.weight", "still.bias"]
    saved = {file: {n: t.clone() for n, t in tensors.items()} for file, tensors in first.tensors().items()}
    assert not any("still" in n or "count" in n for file in saved if "trainer_state" in file for n in saved[file])
    second.load(saved, first.state())
    assert same_bits(snapshot(first), snapshot(second)) and second.module.count.tolist() == [2, 2, 2]
    assert second.module.b.weight is second.module.a.weight
    for engine in (first, second):
        engine.update([data], regression)
    assert same_bits(snapshot(first), snapshot(second))


def test_what_is_saved_is_the_modules_state_dict() -> None:
    """Contract of a checkpoint: where a module's state dict converts names and layouts, the file has them; no copies else."""
    engine = Engine(linear(), recipe(ema_decay=0.9))
    assert all(t.data_ptr() == engine.masters[n].data_ptr() for n, t in engine.tensors()["model.safetensors"].items())

    def out(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state["matrix"] = state.pop("weight").t().contiguous()

    def back(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state["weight"] = state.pop("matrix").t()

    engine.module.register_state_dict_post_hook(out)
    engine.module.register_load_state_dict_pre_hook(back)
    engine.update([points()], regression)
    saved = {file: {n: t.clone() for n, t in tensors.items()} for file, tensors in engine.tensors().items()}
    assert saved["model.safetensors"].keys() == {"matrix", "bias"}
    assert saved["trainer_state/ema.safetensors"].keys() == {"weight", "bias"}
    expected, state = snapshot(engine), engine.state()
    engine.update([points(seed=3)], regression)
    assert not same_bits(expected, snapshot(engine))
    engine.load(saved, state)
    assert same_bits(expected, snapshot(engine))
    saved["model.safetensors"]["matrix"] = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"model.safetensors: matrix: \(3, 4\) is saved, \(4, 3\) is expected"):
        engine.load(saved, state)
    assert same_bits(expected, snapshot(engine))  # nothing was loaded by halves


def test_statistics_are_summed_over_micro_batches() -> None:
    """Whole numbers stay whole, others are fp64; nothing is divided."""

    def loss(module: nn.Module, batch: Points) -> LossSum:
        out = regression(module, batch)
        stats = {"load": torch.tensor([[len(batch.x), 1]]), "mass": batch.x.float().square().sum()}
        return LossSum(out.total, out.parts, stats)

    engine, data = Engine(linear(), recipe()), [points(3, seed=1), points(5, seed=2)]
    assert engine.stats == {}
    engine.update(data, loss)
    assert engine.stats["load"].tolist() == [[8, 2]] and engine.stats["load"].dtype == torch.int64
    assert engine.stats["mass"].item() == pytest.approx(sum(p.x.square().sum().item() for p in data), rel=1e-6)
    assert engine.stats["mass"].dtype == torch.float64
    engine.update([points(2)], regression)
    assert engine.stats == {}
