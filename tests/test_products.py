"""Products by oneDNN and by PyTorch's own choice are the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmkit import products

SHAPES = [(7, 5, 11), (64, 48, 16), (33, 16, 80)]


@pytest.fixture(params=[0, 1 << 60], ids=["onednn", "own"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every product goes to one of the two libraries; True: to oneDNN."""
    if request.param == 0 and not products._has_onednn():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(products, "_LEAST", request.param)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    request.addfinalizer(lambda: torch.set_num_threads(before))
    x = torch.zeros(1, 1)
    assert products._by_onednn(x, 1) == (request.param == 0)
    return bool(request.param == 0)


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g) for s in shapes]


@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_and_its_gradients(chosen: bool, M: int, K: int, N: int, bias: bool) -> None:
    """Against the same product in fp64, whatever the shape, with rows in several dimensions and in strides."""
    x, w, b, g = tensors((2, K, M), (N, K), (N,), (2, M, N))
    x = x.transpose(1, 2)
    wide = [t.double().requires_grad_() for t in (x, w, b)]
    own = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, w, b)]
    expected = F.linear(wide[0], wide[1], wide[2] if bias else None)
    got = products.linear(own[0], own[1], own[2] if bias else None)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    expected.backward(g.double())
    got.backward(g)
    for a, e in zip(own[: 2 + bias], wide, strict=False):
        assert a.grad is not None and e.grad is not None
        torch.testing.assert_close(a.grad.double(), e.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
def test_products_without_gradient(chosen: bool, M: int, K: int, N: int) -> None:
    """A plain product, and what rows add to the gradient of a matrix, whichever way that lies."""
    a, b, g, x = tensors((M, K), (K, N), (M, N), (M, K))
    torch.testing.assert_close(products.matmul(a, b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    total = products.zeros_for_gradient(torch.empty(N, K), torch.float32)
    for _ in range(2):
        products.add_weight_gradient(total, g, x)
    torch.testing.assert_close(total.double(), 2 * g.double().t() @ x.double(), rtol=1e-5, atol=1e-5)


def test_frozen_matrices_get_no_gradient(chosen: bool) -> None:
    """What needs none costs none: the weight of a frozen layer, the input of the first."""
    x, w = tensors((6, 4), (3, 4))
    w.requires_grad_()
    products.linear(x, w).sum().backward()
    assert x.grad is None and w.grad is not None
    x2, w2 = x.clone().requires_grad_(), w.detach().clone()
    products.linear(x2, w2).sum().backward()
    assert w2.grad is None and x2.grad is not None


def test_other_types_stay_where_they_are(chosen: bool) -> None:
    """fp64 and bf16 are PyTorch's choice, and mixed types its error."""
    x, w = tensors((6, 4), (3, 4))
    assert torch.equal(products.linear(x.double(), w.double()), F.linear(x.double(), w.double()))
    assert torch.equal(products.linear(x.bfloat16(), w.bfloat16()), F.linear(x.bfloat16(), w.bfloat16()))
    with pytest.raises(RuntimeError):
        products.linear(x, w.double())
