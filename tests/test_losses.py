"""Cross entropy in chunks is cross entropy: value, gradient, precision, memory, and the shift of its labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmkit.data.loader import RowLoader, TextRows
from llmkit.data.shards import ShardWriter, TokenShards, write_index
from llmkit.losses import IGNORE, LossSum, classification, linear_cross_entropy, regression, squared_error
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT
from llmkit.training.supervised import token_loss

N, D, V = 50, 24, 97


def case(dtype: torch.dtype = torch.float64, ignored: float = 0.3, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, output embedding and labels; the same numbers in every dtype, rounded."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64) * scale
    weight = torch.randn(V, D, generator=g, dtype=torch.float64)
    labels = torch.randint(0, V, (N,), generator=g)
    labels[torch.rand(N, generator=g) < ignored] = IGNORE
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def naive(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Total, cross entropy and z term from the full logits."""
    logits, keep = hidden @ weight.T, labels != IGNORE
    ce = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    z = z_loss * logits[keep].logsumexp(-1).square().sum()
    return ce + z, ce, z


def close(a: Tensor, b: Tensor, relative: float) -> None:
    """Relative to the largest entry: a norm-wise bound, since single entries may be zero."""
    assert (a.double() - b.double()).abs().max() <= relative * b.double().abs().max()


# --- value and gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk", [1, 7, 16, N, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_equals_naive(dtype: torch.dtype, bound: float, chunk: int, z_loss: float) -> None:
    """B13: value and both gradients, N no multiple of the chunk, some labels ignored."""
    hidden, weight, labels = case(dtype)
    out = linear_cross_entropy(hidden, weight, labels, z_loss, chunk)
    grads = torch.autograd.grad(out.total * 0.37, (hidden, weight))
    h, w, _ = case(torch.float64)
    if dtype != torch.float64:
        h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    total, ce, z = naive(h, w, labels, z_loss)
    close(out.total, total, bound)
    close(out.parts["loss"], ce, bound)
    for ours, theirs in zip(grads, torch.autograd.grad(total * 0.37, (h, w)), strict=True):
        assert ours.dtype == dtype
        close(ours, theirs, bound)
    if z_loss:
        close(out.parts["z_loss"], z, bound)


def test_z_loss_stays_out_of_the_shown_loss() -> None:
    """B13: `loss` is the cross entropy alone, to the bit, whatever the z term; `total` holds both."""
    hidden, weight, labels = case()
    plain, with_z = (linear_cross_entropy(hidden, weight, labels, z) for z in (0.0, 0.5))
    assert torch.equal(plain.parts["loss"], with_z.parts["loss"])
    assert "z_loss" not in plain.parts and with_z.parts["z_loss"] > 0
    close(with_z.total, with_z.parts["loss"] + with_z.parts["z_loss"], 1e-14)


def test_bf16_statistics_are_wide() -> None:
    """B12: from bf16 logits on, everything is fp32. What remains is the rounding of the logits themselves."""
    hidden, weight, labels = case(torch.bfloat16, ignored=0.0)
    out = linear_cross_entropy(hidden, weight, labels, chunk=16)
    assert out.total.dtype == torch.float32 and out.parts["loss"].dtype == torch.float64
    logits = F.linear(hidden, weight).detach()
    close(out.parts["loss"], F.cross_entropy(logits.double(), labels, reduction="sum"), 1e-6)  # of the same bf16 logits
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    exact = naive(h, w, labels)[0]
    close(out.total, exact, 1e-3)
    for ours, theirs in zip(
        torch.autograd.grad(out.total, (hidden, weight)), torch.autograd.grad(exact, (h, w)), strict=True
    ):
        assert (ours.double() - theirs).norm() <= 1e-2 * theirs.norm()


def test_bf16_weight_gradient_is_summed_wide() -> None:
    """B12: 512 chunks of equal gradients; in bf16 the sum would stop growing at 256 of them."""
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    out = linear_cross_entropy(hidden, weight, torch.zeros(512, dtype=torch.int64), chunk=1)
    (grad,) = torch.autograd.grad(out.total, weight)
    assert grad.tolist() == [[-256.0], [256.0]]


def test_large_logits_stay_finite() -> None:
    """Logits of thousands: the sum of exponents would overflow in any precision."""
    hidden, weight, labels = case(torch.float32, scale=1e3)
    out = linear_cross_entropy(hidden, weight, labels)
    assert all(t.isfinite().all() for t in (out.total, *torch.autograd.grad(out.total, (hidden, weight))))


# --- what is ignored -------------------------------------------------------------------------------------------------


def test_all_ignored() -> None:
    """B8: a micro-batch without labels is a zero that still has a graph, so that no rank's backward is missing."""
    hidden, weight, labels = case(ignored=2.0)
    for z_loss in (0.0, 0.1):
        out = linear_cross_entropy(hidden, weight, labels, z_loss)
        assert out.total.item() == 0.0 and out.parts["loss"].item() == 0.0
        for grad, t in zip(torch.autograd.grad(out.total, (hidden, weight)), (hidden, weight), strict=True):
            assert torch.equal(grad, torch.zeros_like(t))


def test_ignored_positions_have_no_influence() -> None:
    """Whatever stands at an ignored position, NaN included, changes neither value nor gradient."""
    hidden, weight, labels = case()
    spoilt = torch.where((labels == IGNORE)[:, None], torch.nan, hidden.detach()).requires_grad_()
    outs = [linear_cross_entropy(h, weight, labels) for h in (hidden, spoilt)]
    assert torch.equal(outs[0].total, outs[1].total)
    (a, wa), (b, wb) = (torch.autograd.grad(o.total, (h, weight)) for o, h in zip(outs, (hidden, spoilt), strict=True))
    assert torch.equal(a, b) and torch.equal(wa, wb)
    assert not a[labels == IGNORE].any()


@pytest.mark.parametrize("bad", [-1, V])
def test_unknown_label_is_an_error(bad: int) -> None:
    hidden, weight, labels = case()
    labels[3] = bad
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(hidden, weight, labels)


# --- how it is used --------------------------------------------------------------------------------------------------


def test_tied_embedding() -> None:
    """One matrix as input and output embedding: its gradient has both halves. Leading dimensions are free."""
    ids = torch.randint(0, V, (3, 9), generator=torch.Generator().manual_seed(2))
    grads = []
    for fused in (True, False):
        table = case()[1]
        hidden = torch.tanh(F.embedding(ids[:, :-1], table))
        total = (
            linear_cross_entropy(hidden, table, ids[:, 1:], chunk=5).total
            if fused
            else naive(hidden.reshape(-1, D), table, ids[:, 1:].reshape(-1))[0]
        )
        grads.append(torch.autograd.grad(total, table)[0])
    close(*grads, 1e-12)


def test_evaluation_makes_no_gradient() -> None:
    """Without autograd the value is the same and nothing but the logits of one chunk is computed."""
    hidden, weight, labels = case()
    trained = linear_cross_entropy(hidden, weight, labels, 0.1, 7)
    with torch.no_grad(), _Sizes() as sizes:
        out = linear_cross_entropy(hidden, weight, labels, 0.1, 7)
    assert torch.equal(out.total, trained.total) and not out.total.requires_grad
    assert out.parts.keys() == trained.parts.keys()
    assert max(sizes.made) <= max(7 * V, N * D)


def test_parts_hold_no_graph() -> None:
    """B24."""
    hidden, weight, labels = case()
    out = linear_cross_entropy(hidden, weight, labels, 0.1)
    assert out.total.requires_grad and not any(p.requires_grad for p in out.parts.values())


def test_second_backward_is_refused() -> None:
    """The gradient is scaled in place: a second use must be an error, never a wrong number."""
    hidden, weight, labels = case()
    total = linear_cross_entropy(hidden, weight, labels).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


class _Sizes(TorchDispatchMode):
    """The number of elements of every tensor that an operation makes; views are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.made += [t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]
        return out


def test_full_logits_never_exist() -> None:
    """Nothing as large as [N, V] is made, forward or backward: the largest is the weight's own gradient."""
    n, d, v, chunk = 512, 8, 1000, 16
    hidden = torch.randn(n, d, requires_grad=True)
    weight = torch.randn(v, d, requires_grad=True)
    labels = torch.randint(0, v, (n,))
    with _Sizes() as sizes:
        linear_cross_entropy(hidden, weight, labels, 1e-4, chunk).total.backward()
    assert max(sizes.made) == max(chunk * v, v * d, n * d) < n * v / 10


# --- the shift -------------------------------------------------------------------------------------------------------


def successor(ids: Any) -> Any:
    """The next token of a text in which each token has one successor: a cycle through all 64."""
    return (5 * ids + 3) % 64


class Oracle(GPT):
    """Its hidden state is a token, `ahead` places further in the text; the output embedding is the identity."""

    def __init__(self, ahead: int):
        super().__init__(GPTConfig(n_layers=1, n_heads=1, d_model=64, vocab_size=64, max_seq_len=16))
        with torch.no_grad():
            self.model.embed_tokens.weight.copy_(torch.eye(64))
        self.ahead = ahead

    def forward(self, ids_BT: Tensor, *_: Any) -> Tensor:
        for _ in range(self.ahead):
            ids_BT = successor(ids_BT)
        return 60.0 * F.one_hot(ids_BT, 64).float()


@pytest.fixture
def cycle_shards(tmp_path: Path) -> TokenShards:
    """Documents of uneven length, each a stretch of the cycle that begins elsewhere."""
    rng, writer = np.random.default_rng(0), ShardWriter(tmp_path / "a", 64, "hash")
    for n in (5, 40, 1, 17, 2, 64, 33):
        ids = [int(rng.integers(64))]
        while len(ids) < n:
            ids.append(successor(ids[-1]))
        writer.add(np.array(ids), [n], n)
    writer.close()
    write_index(tmp_path, ["a"])
    return TokenShards(tmp_path)


@pytest.mark.parametrize("packing", [True, False])
def test_shift(cycle_shards: TokenShards, packing: bool) -> None:
    """B6, B7: who knows each document's next token has no loss; who repeats the current one, or jumps, has much."""
    rows = TextRows([cycle_shards], row_len=16, pad_id=0, packing=packing)
    loader = RowLoader(rows, rows_per_step=4, prefetch=0)
    loss, means = token_loss(0.0, 32), []
    for ahead in (0, 1, 2):
        batches = list(loader.eval_batches())
        total = sum(loss(Oracle(ahead), b).parts["loss"].item() for b in batches)
        means.append(total / sum(b.denominator for b in batches))
    assert means[1] < 1e-9
    assert means[0] > 50 and means[2] > 50


# --- squared error ---------------------------------------------------------------------------------------------------


def test_squared_error() -> None:
    prediction, target = torch.tensor([[1.0, 2.0], [4.0, 0.0]], requires_grad=True), torch.zeros(2, 2)
    out = squared_error(prediction, target)
    assert isinstance(out, LossSum) and out.total.item() == 10.5 and not out.parts["loss"].requires_grad
    assert torch.equal(torch.autograd.grad(out.total, prediction)[0], prediction)
    with pytest.raises(ValueError, match=r"\(2, 2\) and target \(2,\)"):
        squared_error(prediction, torch.zeros(2))  # would broadcast to the wrong number without a word


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    """A frozen head, or frozen layers below it: the other gradient is what it is with both."""
    inputs = dict(zip(("hidden", "weight"), case()[:2], strict=True))
    labels = case()[2]
    (free,) = (name for name in inputs if name != frozen)
    (expected,) = torch.autograd.grad(
        linear_cross_entropy(**rename(inputs), labels=labels, chunk=8).total, inputs[free]
    )
    inputs[frozen].requires_grad_(False)
    (got,) = torch.autograd.grad(linear_cross_entropy(**rename(inputs), labels=labels, chunk=8).total, inputs[free])
    assert torch.equal(got, expected)


def rename(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"hidden": inputs["hidden"], "weight_VD": inputs["weight"]}


# --- one label a sequence --------------------------------------------------------------------------------------------


def test_accuracy_counts_the_labels_that_come_first() -> None:
    hidden, weight, labels = case()
    best = (hidden @ weight.T).argmax(-1)
    labels[:7] = best[:7]
    out = linear_cross_entropy(hidden, weight, labels, chunk=8, accuracy=True)
    keep = labels != IGNORE
    assert out.parts["accuracy"].item() == (best[keep] == labels[keep]).sum().item() >= 7
    assert "accuracy" not in linear_cross_entropy(hidden, weight, labels).parts


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_classification(dtype: torch.dtype, bound: float) -> None:
    """Sum, gradient, accuracy and confusion against NumPy; a row of padding counts nowhere (B12: fp32 at least)."""
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(9, 3)), np.array([0, 1, 2, 2, IGNORE, 1, 0, IGNORE, 2])
    x = torch.tensor(scores, dtype=dtype, requires_grad=True)
    out = classification(x, torch.tensor(labels))
    keep = labels != IGNORE
    s, y = x.detach().double().numpy()[keep], labels[keep]
    p = np.exp(s) / np.exp(s).sum(1, keepdims=True)
    assert out.total.item() == pytest.approx(-np.log(p[np.arange(len(y)), y]).sum(), rel=bound)
    (grad,) = torch.autograd.grad(out.total, x)
    expected = np.zeros_like(scores)
    expected[keep] = p - np.eye(3)[y]
    close(grad, torch.tensor(expected), bound)
    assert out.total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    confusion = np.zeros((3, 3))
    np.add.at(confusion, (y, s.argmax(1)), 1)
    assert out.stats["confusion"].tolist() == confusion.tolist()
    assert out.parts["accuracy"].item() == np.trace(confusion)


def test_regression() -> None:
    """Half the squared error and the absolute error, over all numbers of a row; NaN targets are padding."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
    y = torch.tensor([[0.0, 0.0], [torch.nan, torch.nan], [5.0, 8.0]])
    out = regression(x, y)
    assert out.total.item() == (1 + 4 + 0 + 4) / 2 and out.parts["abs_error"].item() == 1 + 2 + 0 + 2
    assert torch.autograd.grad(out.total, x)[0].tolist() == [[1, 2], [0, 0], [0, -2]]


def test_no_rows_at_all() -> None:
    """B8: a micro-batch of padding gives zero, and a gradient."""
    x = torch.ones(2, 3, requires_grad=True)
    for out in (classification(x, torch.full((2,), IGNORE)), regression(x, torch.full((2, 3), torch.nan))):
        assert out.total.item() == 0 and not torch.autograd.grad(out.total, x)[0].any()
