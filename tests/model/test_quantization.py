"""Matrices in few bits: what is held, what is computed with it, and what must not be done to it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from llmkit.config import UserError
from llmkit.export.calibration import quantize_model
from llmkit.export.rounding import quantize_weight
from llmkit.losses import token_logprobs
from llmkit.model import coded
from llmkit.model.coded import dynamic_product, int4_product, int8_product, pack, unpack
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, KVCache, init_weights
from llmkit.model.quantization import (
    Quantization,
    QuantizedWeight,
    is_quantized,
    quantizable,
    quantization_of,
    stored_shapes,
    stored_tensors,
)

INT8, INT4, DYNAMIC = Quantization(8), Quantization(4), Quantization(8, dynamic=True)
IDS = torch.randint(0, 90, (2, 12), generator=torch.Generator().manual_seed(5))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tiny(**shape) -> GPT:
    sizes = {"n_layers": 2, "n_heads": 2, "d_model": 32, "max_seq_len": 32, "vocab_size": 96}
    model = GPT(GPTConfig(**{**sizes, **shape}))
    init_weights(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5 if p.dim() == 2 else 1)
    return model.eval().requires_grad_(False)


def dense_twin(model: GPT) -> GPT:
    """The same numbers in plain matrices."""
    twin = GPT(model.config)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(model.get_parameter(name))
    return twin.eval().requires_grad_(False)


@pytest.mark.parametrize("n_columns", [2, 30, 64])
def test_two_codes_a_byte(n_columns):
    codes = torch.randint(0, 16, (5, n_columns), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack(codes)
    assert packed.shape == (5, n_columns // 2) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, torch.empty(5, n_columns)), codes.float() - 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [1, 3, 40])
@pytest.mark.parametrize(("N", "K"), [(70, 96), (48, 64), (5, 33), (1, 2)])
@pytest.mark.parametrize("scheme", [INT8, INT4, Quantization(4, 16)], ids=str)
def test_products_are_those_of_the_dense_matrix(scheme, N, K, M, dtype, monkeypatch):
    """Rows by the fast way, by the plain one and block by block; K that fills no group, with and without a bias."""
    weight = torch.nn.Parameter(quantize_weight(random(N, K, dtype=dtype), scheme), requires_grad=False)
    x, bias = random(2, M, K, seed=1, dtype=dtype), random(N, seed=2, dtype=dtype)
    want = F.linear(x.float(), weight.dense(torch.float32), bias.float())
    limit = (1e-4 if dtype == torch.float32 else 2e-2) * want.norm()
    for block in (1 << 20, 64):
        monkeypatch.setattr(coded, "_BLOCK", block)
        found = F.linear(x, weight, bias)
        assert found.dtype == dtype and found.shape == (2, M, N)
        assert (found.float() - want).norm() <= limit
    assert torch.equal(F.linear(x, weight) + bias, found) and F.linear(x[:, :0], weight).shape == (2, 0, N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "K"), [(70, 96), (5, 33)])
def test_a_dynamic_product_is_that_of_rounded_rows(N, K, dtype):
    """By whole numbers and, where 32 doesn't divide K, in floating point; each row as if it stood alone."""
    weight = quantize_weight(random(N, K, dtype=dtype), DYNAMIC)
    x = random(40, K, seed=1, dtype=dtype)
    x[3], x[4, 0] = 0, 100  # an outlier costs its own row alone
    unit = x.float().abs().amax(1, keepdim=True) / 127
    rounded = torch.fake_quantize_per_channel_affine(
        x.float(), unit[:, 0].clamp(min=1e-9), torch.zeros(40, dtype=torch.int32), 0, -127, 127
    )
    want, found = rounded @ weight.dense(torch.float32).t(), F.linear(x, weight)
    assert found.dtype == dtype and not found[3].any()
    assert (found.float() - want).norm(dim=1).div(want.norm(dim=1).clamp(min=1e-9)).max() < (
        1e-5 if dtype == torch.float32 and K == 96 else 1e-2
    )
    exact = x.float() @ weight.dense(torch.float32).t()
    assert (found.float() - exact)[5:].norm() < 0.02 * exact[5:].norm()
    if K == 96:
        alone = torch.cat([F.linear(x[i : i + 1], weight) for i in range(40)])
        assert torch.equal(alone, found) and torch.equal(F.linear(x, weight[:9]), found[:, :9])
    half = weight.to(torch.bfloat16)
    assert isinstance(half, QuantizedWeight) and half.dynamic and copy.deepcopy(weight).dynamic


def test_numbers_that_are_not_finite_do_not_vanish_in_codes():
    weight, x = quantize_weight(random(8, 32), DYNAMIC), random(3, 32, seed=1)
    x[0, 5], x[1, 7] = float("nan"), float("inf")
    assert F.linear(x, weight).isfinite().all(1).tolist() == [False, False, True]


def test_the_fast_product_is_checked_and_can_be_missing(monkeypatch):
    """A product that is wrong, or not there, is found out before it is used: the plain one takes its place."""
    x, codes = random(2, 64), torch.randint(-127, 128, (9, 64), dtype=torch.int8)
    scales = torch.rand(9) + 0.5
    want = F.linear(x, codes * scales[:, None])

    def wrong(x, codes, scales):
        return coded._packed_product(x.bfloat16(), codes, scales).float()

    def missing(x, codes, scales):
        raise RuntimeError("no such kernel")

    for fake in (wrong, missing):
        monkeypatch.setitem(coded._FAST, torch.float32, fake)
        coded._fast_works.cache_clear()
        assert (int8_product(x, codes, scales) - want).norm() < 1e-6 * want.norm()
        assert not coded._fast_works(torch.float32)
    coded._fast_works.cache_clear()


def test_the_tiled_product_is_checked_and_can_be_missing(monkeypatch):
    """Its codes are made once, when they are first used; in another dtype the matrix doesn't have them."""
    weight = torch.nn.Parameter(quantize_weight(random(32, 64, dtype=torch.bfloat16), INT4), requires_grad=False)
    x = random(2, 64, seed=1, dtype=torch.bfloat16)
    want = F.linear(x.float(), weight.dense(torch.float32))
    if coded.tiled_works(32):
        F.linear(x, weight)
        part = weight[:16]
        assert weight.tiles is not None and F.linear(x, part).shape == (2, 16) and part.tiles is None
        first = weight.tiles
        F.linear(x, weight)
        assert weight.tiles is first and weight.to(torch.float32).tiles is None

    def missing(*args):
        raise RuntimeError("no such kernel")

    for fake in (missing, lambda x, G, tiles, lines: torch.zeros(len(x), lines.shape[1])):
        monkeypatch.setattr(coded, "tiled_product", fake)
        coded.tiled_works.cache_clear()
        assert (F.linear(x, weight).float() - want).norm() < 1e-2 * want.norm()
        assert not coded.tiled_works(32)
    coded.tiled_works.cache_clear()


def test_input_of_zeros_gives_zeros():
    weight = quantize_weight(random(8, 32), INT8)
    for product in (int8_product, dynamic_product):
        assert not product(torch.zeros(1, 32), weight.codes, weight.scales).any()
    weight = quantize_weight(random(8, 32), INT4)
    assert weight.lows is not None
    assert not int4_product(torch.zeros(1, 32), weight.codes, weight.scales, weight.lows).any()


@pytest.mark.parametrize("scheme", [INT8, INT4], ids=str)
def test_a_quantised_matrix_is_a_matrix_to_who_asks(scheme):
    W = random(20, 33)
    weight = quantize_weight(W, scheme)
    dense, ids = weight.dense(), torch.tensor([[3, 19], [0, 3]])
    assert weight.shape == W.shape and weight.dtype == W.dtype and len(weight) == 20 and weight.numel() == W.numel()
    assert torch.equal(F.embedding(ids, weight), dense[ids])
    part = weight[4:9]
    assert isinstance(part, QuantizedWeight) and torch.equal(part.dense(), dense[4:9])
    assert torch.equal(weight[:, 2:5], dense[:, 2:5]) and torch.equal(weight.t() @ W, dense.t() @ W)
    half = weight.to(torch.bfloat16)
    assert isinstance(half, QuantizedWeight) and half.dtype == torch.bfloat16 and torch.equal(half.codes, weight.codes)
    again = copy.deepcopy(torch.nn.Parameter(weight, requires_grad=False))
    assert torch.equal(again.dense(), dense) and again.codes.data_ptr() != weight.codes.data_ptr()
    assert "bits" in repr(weight)


@pytest.mark.parametrize("scheme", [INT8, INT4], ids=str)
def test_products_have_a_gradient_for_what_comes_in(scheme):
    """A frozen quantised model may stand behind something that is trained."""
    weight, x = quantize_weight(random(6, 32), scheme), random(2, 32, seed=1).requires_grad_()
    F.linear(x, weight).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, weight.dense().sum(0).expand(2, -1), atol=1e-5)


@pytest.mark.parametrize("scheme", [INT8, INT4], ids=str)
def test_it_is_neither_trained_nor_written(scheme):
    model = tiny()
    quantize_model(model, scheme)
    with pytest.raises(UserError, match="can't be trained"):
        model.requires_grad_(True)
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    for write in (lambda: weight.mul_(2), lambda: weight.copy_(torch.zeros_like(weight.dense())), weight.zero_):
        with pytest.raises(UserError, match="nothing can be written"), torch.no_grad():
            write()


MOE = {"experts": {"n": 3, "n_active": 2, "d_ff": 16, "shared_d_ff": 16}, "qkv_bias": True}
GPT2 = {
    "positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "qkv_bias": True, "o_bias": True, "mlp_bias": True,
}  # fmt: skip


@pytest.mark.parametrize("scheme", [INT8, INT4], ids=str)
@pytest.mark.parametrize(
    "shape", [{}, {"tie_embeddings": False, "qk_norm": True}, GPT2, MOE], ids=["tied", "untied", "gpt2", "experts"]
)
def test_a_model_computes_with_them(shape, scheme):
    """B65: hidden states, logits and log-probabilities are those of the dense matrices, with a cache as without; tied
    embeddings stay one matrix, and what is no matrix stays as it is."""
    model = tiny(**shape)
    kept = {n: p.clone() for n, p in model.named_parameters() if n not in quantizable(model)}
    quantize_model(model, scheme)
    assert is_quantized(model) and all(torch.equal(model.get_parameter(n), p) for n, p in kept.items())
    assert {n for n, p in model.named_parameters() if isinstance(p, QuantizedWeight)} == set(quantizable(model))
    assert (model.head_weight is model.model.embed_tokens.weight) == model.config.tie_embeddings
    twin = dense_twin(model)
    want, found = twin(IDS), model(IDS)
    assert (found - want).norm() < 1e-3 * want.norm()
    logits = model.logits(found)
    assert (logits - twin.logits(want)).norm() < 1e-3 * logits.norm()
    logprobs = [token_logprobs(m(IDS), m.head_weight, IDS, vocab_size=90)[0] for m in (model, twin)]
    assert (logprobs[0] - logprobs[1]).abs().max() < 1e-2
    cache = KVCache(model.config, 2, 12, torch.float32)
    steps = torch.cat(
        [model(IDS[:, :5], cache=cache), *(model(IDS[:, i : i + 1], cache=cache) for i in range(5, 12))], 1
    )
    assert (steps - found).norm() < 1e-3 * found.norm()


def test_routers_are_kept():
    """They are tiny, and a wrong choice is no rounding error."""
    model = tiny(**MOE)
    names = set(quantizable(model))
    assert "model.layers.0.mlp.experts.2.up_proj.weight" in names and "model.layers.0.mlp.gate.weight" not in names
    assert "model.layers.0.mlp.shared_expert.up_proj.weight" in names
    assert "model.layers.0.mlp.shared_expert_gate.weight" not in names


@pytest.mark.parametrize("scheme", [INT8, INT4, Quantization(4, 128)], ids=str)
def test_what_is_stored_is_what_is_expected(scheme):
    model = tiny(d_model=36, n_heads=2, d_ff=50, tie_embeddings=False)
    with torch.device("meta"):
        empty = GPT(model.config)
    asked = stored_shapes(empty, scheme)
    quantize_model(model, scheme)
    assert {n: tuple(t.shape) for n, t in stored_tensors(model).items()} == asked


def test_casts_reach_the_norms_as_well():
    """The model as a whole in bf16: the codes stay, what is computed is bf16."""
    model = tiny()
    quantize_model(model, INT8)
    codes = model.head_weight.codes.clone()
    want = model.logits(model(IDS))
    model = model.to(torch.bfloat16)
    assert isinstance(model.head_weight, QuantizedWeight) and torch.equal(model.head_weight.codes, codes)
    assert model(IDS).dtype == torch.bfloat16
    assert (model.logits(model(IDS)) - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "by 'gptq' are not read"),
        ("awq", "by 'awq' are not read"),
        ({"quant_method": "llmkit", "bits": 3}, "got 3 and 32"),
        ({"quant_method": "llmkit", "bits": 4, "group": 7}, "got 4 and 7"),
        ({"quant_method": "llmkit", "bits": 4, "group": "32"}, "got 4 and 32"),
        ({"quant_method": "llmkit", "bits": 4, "group": 1 << 40}, "group even, up to"),
        ({"quant_method": "llmkit", "bits": [8]}, "bits must be 8 or 4"),
        ({"quant_method": "llmkit", "bits": 4, "dynamic": True}, "true with 8 bits alone"),
        ({"quant_method": "llmkit", "bits": 8, "dynamic": "no"}, "got 'no'"),
    ],
)
def test_sections_that_cannot_be_are_refused(section, message):
    with pytest.raises(UserError, match=message):
        quantization_of({"quantization_config": section}, "config.json")
    assert quantization_of({}, "config.json") is None
