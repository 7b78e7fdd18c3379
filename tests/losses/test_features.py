"""What is compared inside two models: naive forms, masks, what must not matter, and cells that never all exist."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmkit.losses import attention_loss, features, hidden_loss, relation_loss

B, H, T, E, E_T = 3, 4, 10, 6, 8


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(total: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(total * 0.37, of)


def close(a: Tensor, b: Tensor, bound: float = 1e-12) -> None:
    """Relative to the largest entry."""
    assert (a.double() - b.double()).abs().max() <= bound * b.double().abs().max().clamp_min(1)


# --- hidden states ---------------------------------------------------------------------------------------------------


def test_hidden_equals_a_loop() -> None:
    """Value and gradients of states and projection in fp64."""
    x, w, y = normal(0, 9, 5).requires_grad_(), normal(1, 7, 5).requires_grad_(), normal(2, 9, 7) * 3
    total = torch.zeros(())
    for student, teacher in zip(x, y, strict=True):
        s = w @ student
        size = teacher.square().mean().sqrt()
        total = total + ((s / size - teacher / size) ** 2).mean()
    ours = hidden_loss(x, y, w)
    close(ours, total)
    for a, b in zip(gradients(ours, x, w), gradients(total, x, w), strict=True):
        close(a, b)
    cosine = (1 - F.cosine_similarity(x @ w.T, y)).sum()
    ours = hidden_loss(x, y, w, "cosine")
    close(ours, cosine)
    for a, b in zip(gradients(ours, x, w), gradients(cosine, x, w), strict=True):
        close(a, b)


@pytest.mark.parametrize("measure", ["mse", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_states_teach_nothing(measure: Any, dtype: torch.dtype) -> None:
    """0 with zero gradient, bare and behind the identity; to the cosine, whatever the size of the student's states."""
    x = normal(0, 9, 5, dtype=dtype).requires_grad_()
    eye = torch.eye(5, dtype=dtype).requires_grad_()
    for projection in (None, eye):
        total = hidden_loss(x, x.detach().clone(), projection, measure)
        assert total == 0 and total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not any(grad.any() for grad in gradients(total, x, *([eye] if projection is not None else [])))
    larger = hidden_loss(4 * x, x, None, measure).item()
    assert (
        larger < 1e-10 if measure == "cosine" else larger == pytest.approx(9 * 9, rel=1e-2)
    )  # (4 - 1)^2 at 9 positions


def test_massive_tokens_do_not_drown_the_others() -> None:
    """A token whose states are 1000 times larger counts as much as the others; zeros are no NaN."""
    x, y, sizes = normal(0, 9, 5).requires_grad_(), normal(1, 9, 5), torch.tensor([1000.0] + [1.0] * 8)[:, None]
    close(hidden_loss(x * sizes, y * sizes), hidden_loss(x, y))
    zeros = torch.zeros(2, 5, requires_grad=True)
    total = hidden_loss(zeros, torch.ones(2, 5))
    assert total.isfinite() and gradients(total, zeros)[0].isfinite().all()


def test_a_projection_learns() -> None:
    """Gradient steps on the projection alone find the teacher's states in the student's."""
    x = normal(0, 200, 6)
    y = x @ normal(1, 6, 4)
    w = (0.3 * normal(2, 4, 6)).requires_grad_()
    first = hidden_loss(x, y, w).item()
    for _ in range(200):
        (grad,) = torch.autograd.grad(hidden_loss(x, y, w) / len(x), w)
        with torch.no_grad():
            w -= 0.5 * grad
    assert hidden_loss(x, y, w) < 0.1 * first


def test_hidden_refuses_other_widths() -> None:
    with pytest.raises(ValueError, match=r"\(9, 5\) can't be compared with the teacher's \(9, 7\): give a projection"):
        hidden_loss(normal(0, 9, 5), normal(1, 9, 7))


# --- attention and relations -----------------------------------------------------------------------------------------


def cells() -> tuple[Tensor, Tensor]:
    """Who sees whom: two documents in row 0, padding at the end of row 1; and which positions are supervised."""
    visible = torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T).clone()
    visible[0, :, 4:, :4] = False
    visible[1, :, 7:] = False
    visible[1, :, :, 7:] = False
    queries = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.6
    queries[1, 7:] = False
    assert queries[:, 0].any() and not queries.all()
    return visible, queries


def attention_case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """The student has a key for two heads each, the teacher one for each."""
    shapes = ((B, H, T, E), (B, 2, T, E), (B, H, T, E_T), (B, H, T, E_T))
    q_s, k_s, q_t, k_t = (normal(i, *shape, dtype=dtype) for i, shape in enumerate(shapes))
    return q_s.requires_grad_(), k_s.requires_grad_(), q_t, k_t


def attention_naive(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, visible: Tensor, queries: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for b, t in queries.nonzero().tolist():
        seen = visible[b if len(visible) > 1 else 0, 0, t].nonzero()[:, 0].tolist()
        for h in range(H):
            for u in seen:
                s = q_s[b, h, t] @ k_s[b, h // 2, u] / E**0.5
                total = total + (s - q_t[b, h, t] @ k_t[b, h, u] / E_T**0.5) ** 2 / (H * len(seen))
    return total


def relation_naive(x_s: Tensor, x_t: Tensor, heads: int, visible: Tensor, queries: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for b, t in queries.nonzero().tolist():
        seen = visible[b if len(visible) > 1 else 0, 0, t].nonzero()[:, 0]
        for h in range(heads):
            rows = []
            for x in (x_s[b], x_t[b]):
                width = x.shape[-1] // heads
                head = x[:, h * width : (h + 1) * width]
                rows.append((head[seen] @ head[t] / width**0.5).softmax(-1))
            q, p = rows
            total = total + (p * (p / q).log()).sum() / heads
    return total


@pytest.fixture(params=[None, 1, T * H, T * T * H, 2 * T * T * H], ids=["whole", "query", "row", "rows", "two rows"])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many cells exist at once: one query's, a row's, several rows'."""
    if request.param is not None:
        monkeypatch.setattr(features, "_CELLS", request.param)


@pytest.mark.parametrize("shared", [False, True])
def test_attention_equals_a_loop(at_once: None, shared: bool) -> None:
    """Value and gradients in fp64, only over visible cells of supervised queries; one mask may serve all rows."""
    q_s, k_s, q_t, k_t = attention_case()
    visible, queries = cells()
    visible = visible[2:] if shared else visible
    ours = attention_loss(q_s, k_s, q_t, k_t, visible, queries)
    wanted = attention_naive(q_s, k_s, q_t, k_t, visible, queries)
    close(ours, wanted)
    for a, b in zip(gradients(ours, q_s, k_s), gradients(wanted, q_s, k_s), strict=True):
        close(a, b)


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("shared", [False, True])
def test_relation_equals_a_loop(at_once: None, heads: int, shared: bool) -> None:
    """KL(teacher || student) of what is visible; other widths, any number of heads; value and gradient in fp64."""
    x_s, x_t = normal(0, B, T, 12).requires_grad_(), normal(1, B, T, 18)
    visible, queries = cells()
    visible = visible[2:] if shared else visible
    ours = relation_loss(x_s, x_t, heads, visible, queries)
    wanted = relation_naive(x_s, x_t, heads, visible, queries)
    close(ours, wanted)
    close(gradients(ours, x_s)[0], gradients(wanted, x_s)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_heads_teach_nothing(at_once: None, dtype: torch.dtype) -> None:
    q_s, k_s, _, _ = attention_case(dtype)
    visible, queries = cells()
    x = normal(5, B, T, 12, dtype=dtype).requires_grad_()
    for total, of in (
        (attention_loss(q_s, k_s, q_s.detach(), k_s.detach(), visible, queries), (q_s, k_s)),
        (relation_loss(x, x.detach(), 3, visible, queries), (x,)),
    ):
        assert total == 0 and total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for grad, leaf in zip(gradients(total, *of), of, strict=True):
            assert grad.dtype == leaf.dtype and not grad.any()


def test_what_is_not_seen_says_nothing() -> None:
    """Other documents, padding and the future change no bit, whatever stands there, NaN excepted; nor do queries that
    are not supervised, and a row of padding alone is no NaN."""
    q_s, k_s, q_t, k_t = (t.detach() for t in attention_case())
    x_s, x_t = normal(5, B, T, 12), normal(6, B, T, 18)
    visible, queries = cells()
    queries[1], queries[0, :4], queries[2] = False, False, False  # what is left sees row 0 from 4 on
    queries[0, 5] = True
    plain = attention_loss(q_s, k_s, q_t, k_t, visible, queries), relation_loss(x_s, x_t, 2, visible, queries)
    for i, t in enumerate((q_s, k_s, q_t, k_t)):
        t[1:] = t[0, :, :4] = 100.0 * (i + 1)
    for t in (x_s, x_t):
        t[1:] = t[0, :4] = 100.0
    wild = attention_loss(q_s, k_s, q_t, k_t, visible, queries), relation_loss(x_s, x_t, 2, visible, queries)
    assert all(torch.equal(a, b) and a > 0 for a, b in zip(plain, wild, strict=True))


def test_nothing_supervised() -> None:
    q_s, k_s, q_t, k_t = attention_case()
    visible, queries = cells()
    total = attention_loss(q_s, k_s, q_t, k_t, visible, torch.zeros_like(queries))
    assert total == 0 and not any(grad.any() for grad in gradients(total, q_s, k_s))
    x = normal(0, B, T, 12).requires_grad_()
    total = relation_loss(x, normal(1, B, T, 12), 2, torch.zeros_like(visible), torch.zeros_like(queries))
    assert total == 0 and not gradients(total, x)[0].any()


def test_half_precision_is_computed_in_single() -> None:
    """bf16 inputs against fp64 on the same rounded numbers."""
    visible, queries = cells()
    halves = attention_case(torch.bfloat16)
    exact = attention_loss(*(t.detach().double() for t in halves), visible, queries)
    close(attention_loss(*halves, visible, queries), exact, 1e-5)
    x_s, x_t = normal(5, B, T, 12, dtype=torch.bfloat16), normal(6, B, T, 18, dtype=torch.bfloat16)
    exact = relation_loss(x_s.double(), x_t.double(), 2, visible, queries)
    close(relation_loss(x_s, x_t, 2, visible, queries), exact, 1e-5)


def test_frozen_sides() -> None:
    """Only what is trained gets a gradient, and evaluation makes none."""
    q_s, k_s, q_t, k_t = attention_case()
    visible, queries = cells()
    both = gradients(attention_loss(q_s, k_s, q_t, k_t, visible, queries), q_s, k_s)
    alone = gradients(attention_loss(q_s, k_s.detach(), q_t, k_t, visible, queries), q_s)
    assert torch.equal(both[0], alone[0])
    with torch.no_grad():
        assert not attention_loss(q_s, k_s, q_t, k_t, visible, queries).requires_grad


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation made; views are left out."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]
        self.elements = max(self.elements, *(made if made and not func.is_view else [0]), 0)
        return out


def test_all_cells_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing as large as [B, H, T, T] is made, forward or backward."""
    monkeypatch.setattr(features, "_CELLS", 2**12)
    b, t = 4, 64
    q, k = (normal(i, b, H, t, 8).requires_grad_() for i in range(2))
    x, visible = normal(2, b, t, 16).requires_grad_(), torch.ones(1, 1, t, t, dtype=torch.bool).tril()
    queries = torch.ones(b, t, dtype=torch.bool)
    with Largest() as largest:
        attention_loss(q, k, k.detach(), q.detach(), visible, queries).backward()
        relation_loss(x, 2 * x.detach(), 2, visible, queries).backward()
    assert largest.elements < b * H * t * t / 4


def test_refusals() -> None:
    q_s, k_s, q_t, k_t = attention_case()
    visible, queries = cells()
    with pytest.raises(ValueError, match="attention of 4 heads can't be compared with the teacher's 2: use relations"):
        attention_loss(q_s, k_s, q_t[:, :2], k_t[:, :2], visible, queries)
    with pytest.raises(ValueError, match="5 relation heads don't divide the student's width of 12"):
        relation_loss(normal(0, B, T, 12), normal(1, B, T, 15), 5, visible, queries)
    with pytest.raises(ValueError, match="4 relation heads don't divide the teacher's width of 15"):
        relation_loss(normal(0, B, T, 12), normal(1, B, T, 15), 4, visible, queries)
